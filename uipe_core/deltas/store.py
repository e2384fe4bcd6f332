"""Store base runs by content: each is trained once, by whichever study needs it first."""

import json
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uipe_core.deltas.files import load_update, save_update
from uipe_core.deltas.update_vectors import UpdateVector
from uipe_core.storage.content_store import BrokenEntryError, ContentStore, content_key
from uipe_core.storage.files import write_atomic
from uipe_core.storage.remote_store import RemoteEntry, RemoteLocation, RemoteStore


@dataclass(frozen=True)
class EpochResult:
    """Result of one epoch: its update vector, and the mean of its training losses in nats.

    Of several processes only the first gets the update; in the others it has no tensors.
    """

    epoch: int
    update: UpdateVector
    loss: float


RUN = "run.json"


@dataclass(frozen=True)
class BaseRun:
    """A finished base run in the store.

    Attributes:
        key: Content address.
        folder: Folder of its files; None for one at a URL.
        epochs: One record per epoch: ``epoch``, ``loss`` (nats; of trained runs), ``norm`` of the update vector, ``seconds``.
        parts: For a run of several entries, the entry of each epoch; `folder` is then that of the first.
        remote: Its entry at a URL, from which nodes fetch update vectors.
    """

    key: str
    folder: Path | None
    epochs: tuple[Mapping[str, float], ...]
    parts: tuple["BaseRun", ...] = ()
    remote: RemoteEntry | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of its entries in the store, for `DeltaStore.open`."""
        return tuple(part.key for part in self.parts) or (self.key,)

    def load(self, epoch: int) -> UpdateVector:
        """Load the update vector of an epoch, from 1; a large dense one stays in its file (`load_update`)."""
        if self.parts:
            return self.parts[epoch - 1].load(1)
        name = _epoch_file(epoch)
        if self.folder is not None:
            return load_update(self.folder / name)
        assert self.remote is not None
        folder, release = self.remote.hold(name)
        try:
            update = load_update(folder / name)
        except BaseException:
            release()
            raise
        weakref.finalize(update, release)  # until then its file may be read
        return update


def join_runs(runs: Sequence[BaseRun]) -> BaseRun:
    """Join runs of one epoch each to one base run, in the given order."""
    epochs = tuple({**run.epochs[0], "epoch": number} for number, run in enumerate(runs, 1))
    return BaseRun(content_key({"parts": [run.key for run in runs]}), runs[0].folder, epochs, tuple(runs))


class DeltaStore:
    """Content-addressed store of base runs: atomic, checksummed, safetensors only.

    Args:
        root: Folder of the store, or its location at a URL.
    """

    def __init__(self, root: Path | RemoteLocation) -> None:
        self._entries: ContentStore | RemoteStore
        self._entries = RemoteStore(root) if isinstance(root, RemoteLocation) else ContentStore(root)

    def find(self, inputs: Mapping[str, Any]) -> BaseRun | None:
        """Return the base run determined by `inputs`, or None; a broken entry is quarantined and counts as missing."""
        key = content_key(inputs)
        found = self._entries.find(key)
        try:
            return None if found is None else _open(key, found)
        except BrokenEntryError:
            return None  # logged and quarantined

    def open(self, keys: Sequence[str]) -> BaseRun:
        """Return the base run of entries that a driver found intact; checksums are not verified again."""
        runs = [_open(key, self._published(key)) for key in keys]
        return runs[0] if len(runs) == 1 else join_runs(runs)

    def holds(self, inputs: Mapping[str, Any]) -> bool:
        """Return True if the base run determined by `inputs` exists, without reading it."""
        key = content_key(inputs)
        return self._entries.holds(key) if isinstance(self._entries, ContentStore) else self._entries.find(key) is not None

    def _published(self, key: str) -> Path | RemoteEntry:
        if isinstance(self._entries, ContentStore):
            return self._entries.root / key
        found = self._entries.find(key)
        if found is None:
            raise BrokenEntryError(f"base run {key} is no longer in the store; the same command trains it again")
        return found

    def get_or_train(self, inputs: Mapping[str, Any], train: Iterable[EpochResult]) -> BaseRun:
        """Return the base run determined by `inputs`; if there is none, consume `train` and publish its epochs.

        Nothing is published if `train` raises.
        """

        def make(folder: Path) -> None:
            records = []
            started = time.perf_counter()
            for result in train:
                save_update(result.update, folder / _epoch_file(result.epoch))
                seconds = time.perf_counter() - started
                norm = result.update.norm
                records.append({"epoch": result.epoch, "loss": result.loss, "norm": norm, "seconds": seconds})
                del result  # free it before the next epoch trains
                started = time.perf_counter()
            write_atomic(folder / RUN, json.dumps(records, indent=1).encode())

        return _open(content_key(inputs), self._entries.get_or_make(inputs, make))

    def get_or_import(self, inputs: Mapping[str, Any], write: Callable[[Path], float]) -> BaseRun:
        """Return the run of one epoch determined by `inputs`; if there is none, `write(path)` saves its update and returns its
        norm.

        Nothing is published if `write` raises.
        """

        def make(folder: Path) -> None:
            started = time.perf_counter()
            norm = write(folder / _epoch_file(1))
            record = {"epoch": 1, "norm": norm, "seconds": time.perf_counter() - started}
            write_atomic(folder / RUN, json.dumps([record], indent=1).encode())

        return _open(content_key(inputs), self._entries.get_or_make(inputs, make))


def _epoch_file(epoch: int) -> str:
    return f"epoch-{epoch:03d}.safetensors"


def _open(key: str, entry: Path | RemoteEntry) -> BaseRun:
    if isinstance(entry, Path):
        return BaseRun(key, entry, tuple(json.loads((entry / RUN).read_bytes())))
    return BaseRun(key, None, tuple(json.loads(entry.read(RUN))), remote=entry)
