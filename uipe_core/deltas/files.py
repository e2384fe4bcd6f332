"""Write and read the safetensors file of an update vector, whole or tensor by tensor."""

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
"""Bytes up to which update vectors and initial models stay in memory: mapping small files again costs more than it saves."""

_REMEDY = "run the same command again: a damaged entry of the delta store is found and made again"


def save_update(update: UpdateVector, path: Path) -> None:
    """Write an update vector as one safetensors file; kind and adapter configuration are its metadata."""
    metadata = {"kind": update.kind, "adapter": json.dumps(update.adapter)}
    save_file({name: tensor.contiguous() for name, tensor in update.tensors.items()}, path, metadata=metadata)


def save_streamed(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]) -> float:
    """Write a dense update vector tensor by tensor in the format of `save_update`; return its norm.

    safetensors' own writer needs all tensors at once. The format: header length in 8 bytes, header as JSON, then the numbers.

    Args:
        path: File to write.
        shapes: Shape of every tensor by name, in the order of `tensors`.
        tensors: Names and fp32 tensors on the CPU.

    Raises:
        ValueError: If names, shapes, dtypes or the number of tensors differ from `shapes`.
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
            del tensor  # before the next one is made: two large ones would double the peak
    if (extra := next(source, None)) is not None:
        raise ValueError(f"no more tensors expected, got {extra[0]}")
    return norm


def load_update(path: Path) -> UpdateVector:
    """Read an update vector; a dense one of more than `RESIDENT` bytes stays in its file, each tensor read on access.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is cut off or no update vector; for one in its file, also on access to a tensor.
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
            tensors = LazyTensors({name: s.shape for name, s in stored.items()}, lambda name: reader.read(stored[name]))
    return UpdateVector(metadata["kind"], tensors, json.loads(metadata["adapter"]))
