"""Read theta_init from the model's files tensor by tensor, without a copy in memory, if they hold it to the bit.

That is checked once, after loading. A weight that no file holds, or that loading changed beyond renaming and stacking
(dequantised), is copied; so is a small model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uipe_core.deltas.files import RESIDENT
from uipe_core.deltas.update_vectors import snapshot
from uipe_core.errors import UserError
from uipe_core.models.skeleton import find_weights
from uipe_core.storage.safetensors_files import LazyTensors, ShardReader, parts, read_headers, weight_files


def saved_folder(location: str, revision: str | None = None) -> Path | None:
    """Return the folder a model was loaded from, or the hub's cached copy; None if there is neither."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    found = try_to_load_from_cache(location, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def read_initial_weights(model: Any, folder: Path | None) -> Mapping[str, Tensor]:
    """Return the weights of a model just loaded, by parameter name, on the CPU, in their dtype; tied weights once.

    Weights that the files hold are read on access and not kept, which raises UserError if a file changed; the rest are copies.

    Args:
        model: A transformers model as loaded: not yet cast, moved or trained.
        folder: The folder it was loaded from.
    """
    parameters = dict(model.named_parameters())
    if folder is None or sum(parameter.nbytes for parameter in parameters.values()) <= RESIDENT:
        return snapshot(model)
    try:
        files = weight_files(folder)
        found = find_weights(model, read_headers(files)).weights
    except UserError:
        return snapshot(model)  # for example an adapter's folder: its base model is elsewhere
    reader, states = ShardReader(), {path: _state(path) for path in files}
    same = {n: found[n] for n, p in parameters.items() if n in found and _equal(found[n].read(reader), p)}
    copies = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items() if name not in same}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}

    def read(name: str) -> Tensor:
        if name in copies:
            return copies[name]
        for path in {place.path for place in same[name].places.values()}:
            # Updates applied to another model's weights would be scored without an error.
            if _state(path) != states[path]:
                raise UserError(
                    f"{path}: changed since the model was loaded; put it back, or run the study again on the new one"
                )
        return same[name].read(reader).to(dtypes[name])

    return LazyTensors(shapes, read)


def _equal(stored: Tensor, parameter: Tensor) -> bool:
    """Return True if a stored tensor, cast to the parameter's dtype, equals the parameter to the bit."""
    if stored.shape != parameter.shape:
        return False
    pairs = zip(parts(stored), parts(parameter.detach()), strict=True)
    return all(torch.equal(_bytes(one.to(parameter.device, parameter.dtype)), _bytes(other)) for one, other in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    """View a tensor as bytes: zeros of different sign differ, equal NaNs do not."""
    return tensor.reshape(-1).view(torch.uint8)


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return size, modification time and inode of a file, None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
