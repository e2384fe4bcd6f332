"""The safetensors files of a model or adapter folder: what is in them by their headers, and tensors one at a time."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from uipe_core.errors import UserError

FLOATS = ("F32", "BF16", "F16")
"""Stored dtypes whose values fp32 holds exactly, by safetensors' names."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: The safetensors file.
        name: Its name in the file.
        shape: Its shape.
        dtype: Its dtype by safetensors' name, for example ``BF16``.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: one file, or the shards that its index names.

    Args:
        folder: A folder that exists.
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
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({type(error).__name__}); fetch or save the checkpoint again") from error
    missing = [path.name for path in paths if not path.is_file()]
    if not paths:
        raise UserError(f"{index}: it names no shard; fetch or save the checkpoint again")
    if missing:
        lost = f"{len(missing)} of {len(paths)} shards are missing, first {missing[0]}"
        raise UserError(f"{folder}: {lost}; fetch or save it again")
    return paths


def read_headers(paths: list[Path]) -> dict[str, StoredTensor]:
    """What is in some files, by name, in the order in which it is best read; no weight is read.

    Raises:
        UserError: If a file is damaged or cut off.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        with _open(path) as stream:
            for name in stream.offset_keys():
                part = stream.get_slice(name)
                found[name] = StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); fetch or save it again") from error


class ShardReader:
    """Reads tensors one by one; the last file stays mapped, any other is let go."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stream: Any = None

    def read(self, stored: StoredTensor) -> Tensor:
        """A tensor as stored.

        Raises:
            UserError: If its file has gone or was damaged meanwhile.
        """
        if stored.path != self._path:
            self._path, self._stream = None, None
            self._stream = _open(stored.path)
            self._path = stored.path
        try:
            tensor: Tensor = self._stream.get_tensor(stored.name)
        except SafetensorError as error:
            raise UserError(f"{stored.path}: changed while it was read ({error}); start again") from error
        return tensor
