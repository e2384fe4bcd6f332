"""Make base runs of existing checkpoints: anyone's unlearned models.

A checkpoint is a folder: a model (one safetensors file, or shards with an index) or a PEFT adapter. A model becomes a dense
update vector, delta = theta_checkpoint - theta_init in fp32, read and written tensor by tensor: memory holds one tensor and the
mapped pages of one shard of either side. An adapter becomes a low-rank one (`uipe_core.deltas.adapters`).

Exactness of theta(0) = theta_init + delta, cast to the dtype of the initial model:

- bf16 and fp16 weights are restored to the bit, unless an entry shrank below 2**-15 (fp16: 2**-12) of its initial value. Then
  the difference needs more than fp32's 24 bits; the error before rounding is at most 2**-23 of the *initial* entry.
- fp32 weights may miss by one unit in the last place of the larger of the two.
- A checkpoint stored more finely than the initial model is rounded to its dtype, in which everything is scored.

Tensors are matched with parameters as transformers loads them, by its own key mapping: files may have other names (GPT-NeoX)
or a tensor for each expert. What the mapping cannot place is refused with its names.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uipe_core.deltas.adapters import ADAPTER_CONFIG, adapter_weights, is_adapter, read_adapter
from uipe_core.deltas.files import save_streamed, save_update
from uipe_core.deltas.store import BaseRun, DeltaStore, join_runs
from uipe_core.errors import UserError
from uipe_core.models.loading import Progress
from uipe_core.models.skeleton import InitialModel, Weight, dense_weights
from uipe_core.models.transformers_compat import loaded_dtypes
from uipe_core.storage.files import file_hash
from uipe_core.storage.safetensors_files import PART, ShardReader, weight_files

CHECKPOINT_SCHEMA = 1
"""Raised with every change that alters the update vectors read from checkpoints."""


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the ``checkpoint-*`` folders of a trainer's output folder by step; empty if there are none."""
    found = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


def checkpoint_identity(folder: Path) -> str:
    """Return the content hash of a checkpoint's configuration and weights.

    Raises:
        UserError: If it is missing, no checkpoint, or has no weights.
    """
    _require_checkpoint(folder)
    config, stem = (ADAPTER_CONFIG, "adapter_model") if is_adapter(folder) else ("config.json", "model")
    digest = hashlib.sha256()
    for path in [folder / config, *weight_files(folder, stem)]:
        digest.update(f"{path.name}:{file_hash(path)};".encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def check_checkpoint(initial: InitialModel, folder: Path) -> None:
    """Check by configuration and file headers that a checkpoint fits the initial model; of an adapter all factors are read.

    That the weights of a whole model are finite is seen when it is imported, before any trial: reading them all takes as long.

    Raises:
        UserError: If it is missing, damaged, of another architecture or shape, or cannot become an update vector.
    """
    _require_checkpoint(folder)
    if is_adapter(folder):
        adapter_weights(folder, initial.skeleton)
    else:
        dense_weights(initial, folder)


def import_checkpoints(
    initial: InitialModel,
    checkpoints: Sequence[tuple[Path, Mapping[str, Any]]],
    store: DeltaStore,
    progress: Progress | None = None,
) -> BaseRun:
    """Return the base run whose epochs are checkpoints; those already in the store are not read again.

    Args:
        initial: The model the checkpoints were unlearned from.
        checkpoints: Folder and inputs (`checkpoint_inputs`) of each, in order.
        store: Where the update vectors go.
        progress: Called with (checkpoints done, checkpoints in all), in hundredths.

    Raises:
        UserError: If a checkpoint is needed and does not fit (`check_checkpoint`), equals the initial model, or has weights
            that are not finite.
    """
    runs = []
    for number, (folder, inputs) in enumerate(checkpoints):

        def note(done: int, total: int, before: int = 100 * number) -> None:
            if progress is not None:
                progress(before + 100 * done // total, 100 * len(checkpoints))

        runs.append(store.find(inputs) or store.get_or_import(inputs, _writer(initial, folder, note)))
        note(1, 1)
    return join_runs(runs)


def checkpoint_inputs(initial: str, checkpoint: str) -> dict[str, Any]:
    """Return everything that determines a checkpoint's update vector, from two identities: its address in the store."""
    return {"kind": "checkpoint", "schema": CHECKPOINT_SCHEMA, "initial": initial, "checkpoint": checkpoint}


def find_checkpoints(store: DeltaStore, inputs: Sequence[Mapping[str, Any]]) -> BaseRun | None:
    """Return the base run whose epochs are checkpoints if the store has them all, else None."""
    runs = [found for found in map(store.find, inputs) if found is not None]
    return join_runs(runs) if len(runs) == len(inputs) else None


def _writer(initial: InitialModel, folder: Path, progress: Progress) -> Callable[[Path], float]:
    """Return the function that writes a checkpoint's update vector to a file and returns its norm."""
    _require_checkpoint(folder)
    update = read_adapter(folder, initial.skeleton) if is_adapter(folder) else None
    weights: Mapping[str, Weight] = {} if update is not None else dense_weights(initial, folder)

    def write(path: Path) -> float:
        if update is not None:
            save_update(update, path)
            norm = update.norm
        else:
            shapes = {name: weight.shape for name, weight in weights.items()}
            norm = save_streamed(path, shapes, _deltas(initial, folder, weights, progress))
        if norm == 0:
            raise UserError(
                f"checkpoint {folder}: its weights are those of the initial model, so there is no direction to walk in; give "
                "the unlearned checkpoint, or take this one out"
            )
        return norm

    return write


def _deltas(
    initial: InitialModel, folder: Path, weights: Mapping[str, Weight], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and fp32 difference of each parameter, one at a time."""
    theirs, ours = ShardReader(), ShardReader()
    # Walks start from the model as loaded, in the dtype of its configuration.
    loaded_as = {} if initial.skeleton.config.dtype is None else loaded_dtypes(initial.skeleton)
    for done, (name, weight) in enumerate(weights.items(), 1):
        delta = weight.read(theirs).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        start = initial.weights[name].read(ours)
        start = start.to(loaded_as.get(name, start.dtype))
        # In chunks, because torch would make fp32 copies of the whole.
        for part, other in zip(delta.view(-1).split(PART), start.reshape(-1).split(PART), strict=True):
            if not torch.isfinite(part.sub_(other)).all():
                raise UserError(f"checkpoint {folder}: {name} is not finite; it diverged, so give an earlier one")
        yield name, delta
        # See `save_streamed`; a tensor read from a file also keeps its pages in memory.
        del delta, start, part, other
        progress(done, len(weights))


def _require_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder}: no such folder; put it back where the study names it, or correct the path")
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        inside = checkpoint_folders(folder)
        found = f"its folders, first {inside[0].name}" if inside else "a folder that save_pretrained or a trainer wrote"
        raise UserError(f"checkpoint {folder}: it has no config.json and no {ADAPTER_CONFIG}; give {found}")
