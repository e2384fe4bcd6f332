"""theta_init without a copy of it in memory: read from the model's own files, tensor by tensor, where they hold it to the bit.

Whether they do is looked at once, after loading: a weight that lies in no file under its name or that of a tied one, or that
loading changed (merged, renamed, dequantised), is copied. So is a small model, which costs little and never reads again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uipe_core.deltas.files import RESIDENT
from uipe_core.deltas.update_vectors import snapshot
from uipe_core.errors import UserError
from uipe_core.models.skeleton import tied_names
from uipe_core.storage.safetensors_files import LazyTensors, ShardReader, StoredTensor, parts, read_headers, weight_files


def saved_folder(location: str, revision: str | None = None) -> Path | None:
    """The folder that a model was loaded from, or the hub's copy of it on this machine; None where there is neither."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    found = try_to_load_from_cache(location, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def pristine(model: Any, folder: Path | None) -> Mapping[str, Tensor]:
    """The weights of a model that was just loaded, by parameter name, on the CPU and in their dtype; tied weights once.

    Args:
        model: A transformers model as loaded: not yet cast, moved or trained.
        folder: The folder that it was loaded from.

    Returns:
        What the files hold is read when it is asked for, and not kept; the rest are copies. Reading raises UserError where a
        file has changed since.
    """
    parameters = dict(model.named_parameters())
    if folder is None or sum(parameter.nbytes for parameter in parameters.values()) <= RESIDENT:
        return snapshot(model)
    try:
        files = weight_files(folder)
        stored = read_headers(files)
    except UserError:
        # Loaded from elsewhere, for example an adapter's folder, whose base model lies in another.
        return snapshot(model)
    for alias, name in tied_names(model, parameters).items():
        if alias in stored:
            stored.setdefault(name, stored[alias])
    reader = ShardReader()
    lying = {n: stored[n] for n, p in parameters.items() if n in stored and _holds(reader.read(stored[n]), p)}
    kept = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items() if name not in lying}
    return _weights(model, kept, lying, reader, {path: _state(path) for path in files})


def _weights(
    model: Any,
    kept: Mapping[str, Tensor],
    lying: Mapping[str, StoredTensor],
    reader: ShardReader,
    states: Mapping[Path, tuple[int, int, int] | None],
) -> LazyTensors:
    shapes, dtypes = {}, {}
    for name, parameter in model.named_parameters():
        shapes[name], dtypes[name] = tuple(parameter.shape), parameter.dtype

    def read(name: str) -> Tensor:
        if name in kept:
            return kept[name]
        path = lying[name].path
        # A walk from weights of another model would be scored like any other.
        if _state(path) != states[path]:
            raise UserError(f"{path}: changed since the model was loaded; put it back, or run the study on the new model anew")
        return reader.read(lying[name]).to(dtypes[name])

    return LazyTensors(shapes, read)


def _holds(stored: Tensor, parameter: Tensor) -> bool:
    """Whether a stored tensor, cast to the parameter's dtype, is the parameter to the bit."""
    if stored.shape != parameter.shape:
        return False
    pairs = zip(parts(stored), parts(parameter.detach()), strict=True)
    return all(torch.equal(_bytes(one.to(parameter.device, parameter.dtype)), _bytes(other)) for one, other in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    """For comparison: zeros of different sign differ, and a NaN is what it is."""
    return tensor.reshape(-1).view(torch.uint8)


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written again; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
