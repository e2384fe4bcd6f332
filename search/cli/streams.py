"""Handle standard streams that the shell closed, that are full, or whose terminal is gone; print log records there."""

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from search.cli.tables import echo


class _ToStandardError(logging.Handler):
    """Print log records wherever standard error goes at the moment: progress bars redirect it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # closed, full, or a terminal that is gone
            echo(self.format(record), err=True)


RECORDS = _ToStandardError()
"""Handler of the log records of uipe."""


def open_streams() -> None:
    """Open what the shell has closed, lest a file that is opened here gets its number and what is printed lands there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    before = sys.__stdout__
    if before is not None and sys.stdout is before:
        sys.stdout = _Output(before.buffer, before.encoding, before.errors, line_buffering=before.line_buffering)


class _Output(io.TextIOWrapper):
    """Standard output that knows whether it failed: a disk that is full may also be another's."""

    failed = False

    def write(self, text: str) -> int:
        with self._noted():
            return super().write(text)

    def flush(self) -> None:
        with self._noted():
            super().flush()

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.failed = True
            raise


def failure_of_output(error: BaseException) -> str | None:
    """Return what is to be said where standard output failed, nothing if its reader left; None for another error."""
    if not isinstance(error, OSError) or not getattr(sys.stdout, "failed", False):
        return None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the interpreter can flush what it still has
    reader_left = error.errno == errno.EPIPE
    return "" if reader_left else f"error: standard output: {error.strerror}; only what was to be printed is lost"


def end(code: int, sentence: str) -> NoReturn:
    """Exit after a sentence on standard error, which may be a terminal that is gone."""
    try:
        if sentence:
            echo(sentence, err=True)
        sys.stderr.flush()
    except OSError:
        # What it still has would fail again as the interpreter ends, with code 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(code)
