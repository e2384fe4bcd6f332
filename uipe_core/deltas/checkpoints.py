"""Update vectors from checkpoints that exist already: anyone's unlearned models as base runs.

A checkpoint is a folder: a model (one safetensors file, or shards with an index) or a PEFT adapter. A model becomes a dense
update vector, delta = theta_checkpoint - theta_init in fp32, read tensor by tensor and written as it comes: memory holds a
tensor and the pages of one shard of either side. An adapter becomes a low-rank one (`uipe_core.deltas.adapters`).

How exact theta(0) = theta_init + delta is, cast to the dtype of the initial model:

- bf16 and fp16 weights come back to the bit, unless an entry shrank below 2**-15 (fp16: 2**-12) of what it was; then the
  difference needs more than the 24 bits of fp32, and the error before rounding is at most 2**-23 of the *initial* entry.
- fp32 weights may miss by one unit in the last place of the larger of the two.
- A checkpoint stored more finely than the initial model is rounded to the initial model's dtype, in which everything is scored.

Tensors are matched with the parameters of the model by name, so model types whose files name weights otherwise than
the model does (mixtures of experts, whose experts are stacked while loading) are refused with what differs.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uipe_core.deltas.adapters import ADAPTER_CONFIG, adapter_weights, is_adapter, read_adapter
from uipe_core.deltas.files import save_streamed, save_update
from uipe_core.deltas.store import BaseRun, DeltaStore, joined
from uipe_core.errors import UserError
from uipe_core.models.loading import Progress
from uipe_core.models.skeleton import InitialModel, dense_weights
from uipe_core.storage.files import file_hash
from uipe_core.storage.safetensors_files import PART, ShardReader, StoredTensor, weight_files

CHECKPOINT_SCHEMA = 1
"""Raised whenever a change in how checkpoints are read alters the update vectors that come out."""


def checkpoint_folders(folder: Path) -> list[Path]:
    """The ``checkpoint-*`` folders of a trainer's output folder in the order of their steps; empty where there are none."""
    found = [
        path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_identity(folder: Path) -> str:
    """Content hash of a checkpoint: its configuration and weights, wherever they lie.

    Raises:
        UserError: If it is missing, no checkpoint, or has no weights.
    """
    _require_checkpoint(folder)
    stem = "adapter_model" if is_adapter(folder) else "model"
    digest = hashlib.sha256()
    for path in [folder / (ADAPTER_CONFIG if is_adapter(folder) else "config.json"), *weight_files(folder, stem)]:
        digest.update(f"{path.name}:{file_hash(path)};".encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def check_checkpoint(initial: InitialModel, folder: Path) -> None:
    """Whether a checkpoint fits the initial model, by its configuration and the headers of its files.

    Raises:
        UserError: If it is missing, damaged, of another architecture or shape, or nothing that an update vector can be made of.
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
    """The base run whose epochs are checkpoints; those that the store has are not read again.

    Args:
        initial: What the checkpoints were unlearned from.
        checkpoints: Folder and inputs (`checkpoint_inputs`) of each, in order.
        store: Where the update vectors go.
        progress: Called with (checkpoints done, checkpoints in all), in fractions of a hundredth.

    Raises:
        UserError: If a checkpoint is needed and does not fit (`check_checkpoint`), equals the initial model, or has
            weights that are not finite.
    """
    runs = []
    for number, (folder, inputs) in enumerate(checkpoints):
        found = store.find(inputs)
        runs.append(found or _import(initial, folder, inputs, store, _share(progress, number, len(checkpoints))))
        if progress is not None:
            progress(100 * (number + 1), 100 * len(checkpoints))
    return joined(runs)


def checkpoint_inputs(initial: str, checkpoint: str) -> dict[str, Any]:
    """Everything that determines a checkpoint's update vector, from two identities: its address in the delta store."""
    return {"kind": "checkpoint", "schema": CHECKPOINT_SCHEMA, "initial": initial, "checkpoint": checkpoint}


def find_checkpoints(store: DeltaStore, inputs: Sequence[Mapping[str, Any]]) -> BaseRun | None:
    """The base run whose epochs are checkpoints, if the store has them all."""
    runs = [found for found in map(store.find, inputs) if found is not None]
    return joined(runs) if len(runs) == len(inputs) else None


def _share(progress: Progress | None, number: int, count: int) -> Progress:
    def note(done: int, total: int) -> None:
        if progress is not None:
            progress(100 * number + 100 * done // total, 100 * count)

    return note


def _import(initial: InitialModel, folder: Path, inputs: Mapping[str, Any], store: DeltaStore, progress: Progress) -> BaseRun:
    _require_checkpoint(folder)
    if is_adapter(folder):
        update = read_adapter(folder, initial.skeleton)

        def write(path: Path) -> float:
            save_update(update, path)
            return _something(folder, update.norm)

    else:
        weights = dense_weights(initial, folder)

        def write(path: Path) -> float:
            shapes = {name: stored.shape for name, stored in weights.items()}
            return _something(folder, save_streamed(path, shapes, _deltas(initial, weights, progress)))

    return store.get_or_import(inputs, write)


def _something(folder: Path, norm: float) -> float:
    if norm == 0:
        raise UserError(
            f"checkpoint {folder}: its weights are those of the initial model, so there is no direction to walk in; give the "
            "unlearned checkpoint, or take this one out"
        )
    return norm


def _deltas(initial: InitialModel, weights: Mapping[str, StoredTensor], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 difference of each parameter, one at a time."""
    theirs, ours = ShardReader(), ShardReader()
    # What is walked from is the model as it is loaded, in the dtype of its configuration.
    loaded_as = initial.skeleton.config.dtype
    for done, (name, stored) in enumerate(weights.items(), 1):
        delta = theirs.read(stored).to(torch.float32, copy=True)
        start = ours.read(initial.weights[name])
        start = start if loaded_as is None else start.to(loaded_as)
        # In parts, because torch would make fp32 copies of the whole.
        for part, other in zip(delta.view(-1).split(PART), start.reshape(-1).split(PART), strict=True):
            if not torch.isfinite(part.sub_(other)).all():
                raise UserError(f"checkpoint {stored.path.parent}: {name} is not finite; it diverged, so give an earlier one")
        yield name, delta
        # See `save_streamed`; what is read from a file also keeps its pages in memory.
        del delta, start, part, other
        progress(done, len(weights))


def _require_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder}: no such folder; put it back where the study names it, or correct the path")
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        inside = checkpoint_folders(folder)
        remedy = (
            f"give its folders, first {inside[0].name}" if inside else "give a folder that save_pretrained or a trainer wrote"
        )
        raise UserError(f"checkpoint {folder}: it has no config.json and no {ADAPTER_CONFIG}; {remedy}")
