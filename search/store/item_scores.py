"""Store the scores of every item, a file per trial: readable at once, flushed to the disk by a thread.

With 64 workers a driver that waits for the disk after each trial spends two fifths of its time on it. A file survives the
death of the process that wrote it. Only a machine that loses power at that moment can lose one, as it can lose the latest
trials of the database.
"""

import contextlib
import hashlib
import io
import logging
import zipfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.errors import UserError, first_line
from uipe_core.metrics.scores import TEXTS
from uipe_core.storage.files import fsync_path, write_atomic

logger = logging.getLogger(__name__)

ITEMS_HASH = "items_hash"
"""Attribute of a trial that its file of item scores is held against."""


def content_hash(content: bytes) -> str:
    """Return the start of the SHA-256 of a file's content, in 32 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


MOST_BYTES = 2**30
"""What a trial's file may unpack to; those of thousands of items take some megabytes."""


def read_arrays(content: bytes, start: str = "") -> dict[str, NDArray[Any]]:
    """Return the arrays of a numpy archive whose names start so.

    Raises:
        ValueError: It unpacks to too much, or holds Python objects.
        Exception: It is damaged, which shows in zipfile, zlib or numpy.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES >> 30} GiB")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name.startswith(start)}


class ItemFiles:
    """Item scores by trial.

    Args:
        out: The study's folder; the files are in ``items`` below it.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out / "items"
        self._disk = ThreadPoolExecutor(1, "uipe-items")
        self._pending: deque[Future[None]] = deque()

    def write(self, number: int, content: bytes, control: bool = False) -> str:
        """Write a trial's scores; return their hash.

        Raises:
            OSError: If they cannot be written, or earlier ones did not reach the disk.
        """
        self._raise_failures(wait=False)
        path = self._path(number, control)
        write_atomic(path, content, flush=False)
        self._pending.append(self._disk.submit(_flush, path))
        return content_hash(content)

    def read(self, number: int, control: bool = False, item_set: str | None = None) -> dict[str, NDArray[Any]] | None:
        """Read a trial's arrays by ``set/measurement``, of one set if it is named; None where it has none.

        Answers as text are read only as the set `TEXTS`.

        Raises:
            UserError: If the file is damaged.
        """
        path = self._path(number, control)
        try:
            arrays = read_arrays(path.read_bytes(), f"{item_set}/" if item_set else "")
            return {name: array for name, array in arrays.items() if item_set or not name.startswith(f"{TEXTS}/")}
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged archive fails in zipfile, zlib, numpy or the system
            raise UserError(
                f"{path}: the item scores of trial {number} are damaged ({first_line(error)}); delete the file"
            ) from error

    def flush(self) -> None:
        """Wait until all files are on the disk.

        Raises:
            OSError: If one could not be written.
        """
        self._raise_failures(wait=True)

    def close(self) -> None:
        """Flush, and log instead of raising what did not reach the disk: the run ends for a reason of its own."""
        self._disk.shutdown()
        for failure in filter(None, (flush.exception() for flush in self._pending)):
            logger.warning("item scores in %s did not reach the disk: %s", self._folder, failure)

    def _raise_failures(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0].done()):
            self._pending.popleft().result()

    def _path(self, number: int, control: bool) -> Path:
        return self._folder / ("controls" if control else "trials") / f"{number:05d}.npz"


def _flush(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        fsync_path(path)
