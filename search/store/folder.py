"""Lock a study's folder for its driver, and keep tracebacks of failed trials, controls and base runs in it."""

import logging
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from search.spec.errors import without_password
from uipe_core.errors import UserError, without_colours
from uipe_core.storage.files import is_free, write_atomic

logger = logging.getLogger(__name__)

LOCK = ".lock"
LOCK_SECONDS = 1
"""How long a run waits for its folder: longer than a status command holds the lock."""

FOLDER = "errors"


def take_folder(out: Path) -> FileLock:
    """Make an output folder if it is missing, and lock it for this driver; the lock ends with its process.

    Raises:
        UserError: If it cannot be written, or another driver holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {out}: {error.strerror}; choose another with --out") from error
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"output folder {out}: another run of this study is under way; wait for it or stop it") from None
    return lock


def is_running(out: Path) -> bool:
    """Return True if a driver is at work in a study's folder: it holds the folder's lock."""
    lock = out / LOCK
    try:
        return lock.exists() and not is_free(lock)
    except OSError:
        return False  # a folder that may only be read


def keep_traceback(out: Path, name: str, text: str) -> str:
    """Write a traceback to ``OUT/errors/NAME.txt`` without passwords of URLs, and log it.

    Args:
        out: The study's folder.
        name: ``trial-<number>``, ``control-<number>`` or ``base-run-<label>``.
        text: The traceback.

    Returns:
        Path of the file in the study's folder.
    """
    place = Path(FOLDER, f"{name}.txt")
    shown = without_password(without_colours(text)).strip()  # Ray colours the tracebacks of its tasks
    (out / FOLDER).mkdir(exist_ok=True)
    write_atomic(out / place, f"{shown}\n".encode(), flush=False)
    logger.info("%s failed:\n%s", name, shown)
    return place.as_posix()


def read_tracebacks(out: Path, trial: int | None = None) -> dict[str, str]:
    """Return the tracebacks in a study's folder by name of their file, or that of one trial.

    Raises:
        UserError: The trial has none.
    """
    files = {path.stem: path for path in (out / FOLDER).glob("*.txt")}
    names = sorted(files, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    if trial is not None:
        if f"trial-{trial}" not in files:
            kept = ", ".join(names) or "none"
            raise UserError(f"--trial: {trial} has no traceback in {out / FOLDER}; kept there: {kept}")
        names = [f"trial-{trial}"]
    return {name: files[name].read_text(errors="replace") for name in names}
