"""The file of an update vector: one safetensors file, written at once or tensor by tensor, and read tensor by tensor."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from uipe_core.deltas.update_vectors import DENSE, LOW_RANK, UpdateVector, tensor_norm
from uipe_core.errors import UserError
from uipe_core.storage.safetensors_files import LazyTensors, ShardReader, open_weights, stored_tensor

RESIDENT = 1 << 26
"""Bytes up to which an update vector or an initial model is kept: mapping a small file anew would cost more than it saves."""

_REMEDY = "run the same command again: an entry of the delta store that is not whole is found and made anew"


def save_update(update: UpdateVector, path: Path) -> None:
    """Writes an update vector as one safetensors file; kind and adapter configuration are its metadata."""
    metadata = {"kind": update.kind, "adapter": json.dumps(update.adapter)}
    save_file({name: tensor.contiguous() for name, tensor in update.tensors.items()}, path, metadata=metadata)


def save_streamed(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]) -> float:
    """Writes a dense update vector as its tensors come, in the form of `save_update`, and returns its norm.

    The writer of safetensors wants all tensors at once. Its format is the length of the header in 8 bytes, the header as JSON,
    then the numbers; where names and shapes are known beforehand, one tensor at a time is all that needs to be in memory.

    Args:
        path: File to write.
        shapes: Shape of every tensor by name, in the order in which `tensors` brings them.
        tensors: Names and fp32 tensors on the CPU.

    Raises:
        ValueError: If a tensor comes out of turn, has another shape or is not fp32, or there are too few or too many.
    """
    header: dict[str, Any] = {"__metadata__": {"kind": DENSE, "adapter": json.dumps(None)}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    norm = 0.0
    source = iter(tensors)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for expected, shape in shapes.items():
            name, tensor = next(source, ("nothing", torch.empty(0)))
            if (name, tensor.dtype, list(tensor.shape)) != (expected, torch.float32, list(shape)):
                raise ValueError(f"{expected} {tuple(shape)} in fp32 expected, got {name} {tuple(tensor.shape)} {tensor.dtype}")
            stream.write(tensor.contiguous().numpy().data)
            norm = math.hypot(norm, tensor_norm(tensor))
            # Let go before the next one is made: two large ones at once would double the peak.
            del tensor
    if (extra := next(source, None)) is not None:
        raise ValueError(f"no more tensors expected, got {extra[0]}")
    return norm


def load_update(path: Path) -> UpdateVector:
    """Reads an update vector written by `save_update` or `save_streamed`.

    A dense one of more than `RESIDENT` bytes stays in its file: each tensor is read when it is asked for, and not kept.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is cut off or no update vector; of one that stays in its file, also when a tensor is read.
    """
    size = path.stat().st_size
    with open_weights(path, _REMEDY) as stream:
        metadata = stream.metadata() or {}
        if metadata.get("kind") not in (DENSE, LOW_RANK):
            raise UserError(f"{path}: no update vector (kind {metadata.get('kind')!r}); {_REMEDY}")
        names = list(stream.keys())
        tensors: Mapping[str, Tensor]
        if metadata["kind"] == LOW_RANK or size <= RESIDENT:
            tensors = {name: stream.get_tensor(name) for name in names}
        else:
            stored = {name: stored_tensor(path, stream, name) for name in names}
            reader = ShardReader(_REMEDY)
            shapes = {name: place.shape for name, place in stored.items()}
            tensors = LazyTensors(shapes, lambda name: reader.read(stored[name]))
    return UpdateVector(metadata["kind"], tensors, json.loads(metadata["adapter"]))
