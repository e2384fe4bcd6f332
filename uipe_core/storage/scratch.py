"""Temporary folders of this machine that do not outlive their process for long: the next one removes what a killed one left."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "uipe-"

OWNER = "owner"
"""File in each folder that its process holds locked. The lock ends with the process, however that ends."""


@contextmanager
def scratch_folder(parent: Path | str | None = None, left: Callable[[Path], None] = lambda folder: None) -> Iterator[Path]:
    """Yield a new temporary folder; first remove those of dead processes.

    Args:
        parent: Where it is made; None is the folder for temporary files.
        left: Called with each folder that a dead process left, before it is removed.
    """
    place = Path(tempfile.gettempdir() if parent is None else parent)
    _remove_abandoned(place, left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    lock = os.open(folder / f".{OWNER}", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f".{OWNER}").rename(folder / OWNER)  # under its name it is locked from the first moment on
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(place: Path, left: Callable[[Path], None]) -> None:
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left(folder)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
