"""Read safetensors files of a model or adapter folder: their headers, and tensors one at a time."""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uipe_core.errors import UserError
from uipe_core.storage.files import read_json

FLOATS = ("F32", "BF16", "F16")
"""Stored dtypes whose values fp32 holds exactly, by safetensors' names."""

REMEDY = "fetch or save it again"

MAPPED = 1 << 24
"""Bytes read of a file after which it is mapped again: until then its pages count as memory of the process."""

PART = 1 << 22
"""Elements per chunk where torch would otherwise copy a whole tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: The safetensors file.
        name: Name in the file.
        shape: Shape.
        dtype: Dtype by safetensors' name, for example ``BF16``.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class LazyTensors(Mapping[str, Tensor]):
    """Mapping of tensors that are read or made on access and not kept.

    Args:
        shapes: Shape of every tensor by name, in the order of fastest access.
        make: Makes the tensor of a name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Tensor]) -> None:
        self.shapes = shapes
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return shapes by name, in the order of `tensors`, without reading any."""
    if isinstance(tensors, LazyTensors):
        return dict(tensors.shapes)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor into views of about `PART` elements along its first dimension; equal shapes split alike."""
    if tensor.numel() <= PART:
        return (tensor,)
    return tensor.split(max(1, PART * len(tensor) // tensor.numel()))


def temporary_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a CPU tensor of zeros whose memory returns to the system when it is freed.

    Blocks of up to 32 MiB from malloc, freed tensor after tensor, left holes that added up to the size of the model.
    """
    count = math.prod(shape)
    if not count:
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, dtype.itemsize * count, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """Return the safetensors files of a folder: one file, or the shards named by its index.

    Args:
        folder: An existing folder.
        stem: ``model``, or ``adapter_model`` for PEFT.

    Raises:
        UserError: If there are none, the index is damaged, or a shard is missing.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickled:
            raise UserError(
                f"{folder}: its weights are pickles ({pickled[0].name}), which may run code when read; load them "
                "where you trust them and save them again with save_pretrained, which writes safetensors"
            )
        raise UserError(f"{folder}: it has no {single.name} and no {index.name}; give the folder with the weights")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        paths = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({type(error).__name__}); fetch or save the checkpoint again") from error
    # By name, not by link target: in the hub's cache every file is a link.
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index}: it names {outside[0]!r}, which is not a file of its folder; do not use this checkpoint")
    missing = [path.name for path in paths if not path.is_file()]
    if not paths:
        raise UserError(f"{index}: it names no shard; fetch or save the checkpoint again")
    if missing:
        lost = f"{len(missing)} of {len(paths)} shards are missing, first {missing[0]}"
        raise UserError(f"{folder}: {lost}; fetch or save it again")
    return paths


def read_headers(paths: list[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of some files by name, in the order of fastest reading; raise UserError if a file is damaged."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        with open_weights(path) as stream:
            found.update({name: stored_tensor(path, stream, name) for name in stream.offset_keys()})
    return found


def stored_tensor(path: Path, stream: Any, name: str) -> StoredTensor:
    """Return the header entry of a tensor in an open file."""
    part = stream.get_slice(name)
    return StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())


def open_weights(path: Path, remedy: str = REMEDY) -> Any:
    """Map a safetensors file; raise UserError with `remedy` if it is damaged or cut off."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); {remedy}") from error


class ShardReader:
    """Read tensors one by one; the last file stays mapped until `MAPPED` bytes of it were read.

    Args:
        remedy: Advice if a file is damaged or gone.
    """

    def __init__(self, remedy: str = REMEDY) -> None:
        self._remedy = remedy
        self._path: Path | None = None
        self._stream: Any = None
        self._read = 0

    def read(self, stored: StoredTensor) -> Tensor:
        """Return a tensor as stored, mapped: pages are read on use and kept as long as the tensor.

        Raises:
            UserError: If its file is gone or was damaged meanwhile.
        """
        if stored.path != self._path or self._read > MAPPED:
            self._path, self._stream = None, None
            self._stream = open_weights(stored.path, self._remedy)
            self._path, self._read = stored.path, 0
        try:
            tensor: Tensor = self._stream.get_tensor(stored.name)
        except SafetensorError as error:
            raise UserError(f"{stored.path}: changed while it was read ({error}); start again") from error
        self._read += tensor.nbytes
        return tensor
