"""The scores of every item of a study's trials, as files: readable at once, on the disk a moment later.

A driver that waits for the disk after each trial does little else: with 64 workers it was two fifths of its time. The process
that wrote a file may be killed without harm to it; only a machine that loses its power in that moment can lose one, as it can
lose the latest trials of the database.
"""

import contextlib
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import fsync_path, write_atomic

logger = logging.getLogger(__name__)


class ItemFiles:
    """Item scores by trial.

    Args:
        out: The study's folder; the files are in ``items`` below it.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out / "items"
        self._disk = ThreadPoolExecutor(1, "uipe-items")
        self._on_their_way: deque[Future[None]] = deque()

    def write(self, number: int, content: bytes, control: bool = False) -> None:
        """Writes a trial's scores.

        Raises:
            OSError: If they cannot be written, or earlier ones did not reach the disk.
        """
        self._raise_failures(wait=False)
        path = self._path(number, control)
        write_atomic(path, content, flush=False)
        self._on_their_way.append(self._disk.submit(_flush, path))

    def read(self, number: int, control: bool = False) -> dict[str, NDArray[Any]] | None:
        """A trial's arrays by ``set/measurement``; None where it has none.

        Raises:
            UserError: If the file is damaged.
        """
        path = self._path(number, control)
        try:
            with np.load(path) as archive:
                return dict(archive)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged archive fails in zipfile, zlib, numpy or the system
            raise UserError(
                f"{path}: the item scores of trial {number} are damaged ({first_line(error)}); delete the file"
            ) from error

    def flush(self) -> None:
        """Waits until all is on the disk.

        Raises:
            OSError: If something did not reach it.
        """
        self._raise_failures(wait=True)

    def close(self) -> None:
        """As `flush`, at an end that has its own reason: what did not reach the disk is logged."""
        self._disk.shutdown()
        for failure in filter(None, (flush.exception() for flush in self._on_their_way)):
            logger.warning("item scores in %s did not reach the disk: %s", self._folder, failure)

    def _raise_failures(self, wait: bool) -> None:
        while self._on_their_way and (wait or self._on_their_way[0].done()):
            self._on_their_way.popleft().result()

    def _path(self, number: int, control: bool) -> Path:
        return self._folder / ("controls" if control else "trials") / f"{number:05d}.npz"


def _flush(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, by somebody who no longer needs it
        fsync_path(path)
