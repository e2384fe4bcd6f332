"""Read an SQLite database that this process does not write, with Python's own sqlite3.

SQLAlchemy and alembic take longer to import than a status takes to read, and both want to write: nothing is written here,
so a study on a read-only file system, or in a folder of somebody else's, can be read.
"""

import atexit
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

from search.store import optuna_compat
from search.store.record import StudyRecord, own_database
from uipe_core.errors import UserError, first_line
from uipe_core.storage.scratch import scratch_folder

if TYPE_CHECKING:
    from search.store.database import Database

BUSY_SECONDS = 5.0
"""How long SQLite itself waits for a lock."""

PATIENCE_SECONDS = 60.0
"""How long a database may be locked before reading gives up."""


class SQLiteFile:
    """An SQLite database, open for reading.

    Args:
        path: Its file.

    Raises:
        UserError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._copy = contextlib.ExitStack()
        try:
            self._connection = self._connect()
        except (sqlite3.Error, OSError) as error:
            raise self._unreadable(error) from None

    def rows(self, statement: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Return the rows of a query with parameters by name; wait while the database is locked.

        Raises:
            UserError: If it stays locked, or is damaged.
        """
        waiting = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, sqlite3.OperationalError) and "locked" in str(error)),
            wait=wait_exponential(0.1, 5.0),
            stop=stop_after_delay(PATIENCE_SECONDS),
            reraise=True,
        )
        try:
            return waiting(lambda: self._connection.execute(statement, parameters).fetchall())
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def flaws(self) -> list[str]:
        """Return what SQLite's own check finds damaged, some at most."""
        try:
            found = [str(row[0]) for row in self._connection.execute("PRAGMA integrity_check(3)")]
        except sqlite3.Error as error:
            found = [first_line(error)]
        return [] if found == ["ok"] else [f"{self._path}: {first_line(flaw)}" for flaw in found]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        self._copy.close()

    def _connect(self) -> sqlite3.Connection:
        path, flags = self._path, "mode=rw"
        if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            log = path.with_name(f"{path.name}-wal")
            if log.exists() and log.stat().st_size:
                # What its writer has not moved into the database yet can only be read with a file of locks next to it.
                folder = self._copy.enter_context(scratch_folder())
                atexit.register(self._copy.close)
                path = copy_database(path, folder)
            else:
                flags = "immutable=1"
        address = f"{path.resolve().as_uri()}?{flags}"
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA query_only=1")
        return connection

    def _unreadable(self, error: Exception) -> UserError:
        remedy = "try again" if "locked" in str(error) else "restore the file from a copy, or see what `uipe doctor` finds"
        return UserError(f"storage {self._path}: cannot be opened or read: {first_line(error)}; {remedy}")


def copy_database(path: Path, folder: Path) -> Path:
    """Copy an SQLite database with its write-ahead log, which its owner may be writing; return the copy.

    Raises:
        UserError: It changes all the time.
    """
    log = path.with_name(f"{path.name}-wal")

    def state() -> list[tuple[int, int]]:
        return [(found.st_size, found.st_mtime_ns) for each in (path, log) if each.exists() for found in [each.stat()]]

    for _ in range(5):
        before = state()
        for each in (path, log):
            if each.exists():
                shutil.copyfile(each, folder / each.name)
        if state() == before:
            return folder / path.name
        time.sleep(0.2)
    raise UserError(f"storage {path}: it is being written all the time and may not be locked here; try again")


def open_to_read(out: Path, record: StudyRecord) -> "Database | SQLiteFile":
    """Open the trials of a study: an SQLite file without Optuna, which takes a second to import and wants to write."""
    url = storage_url(out, record)
    if url.startswith("sqlite"):
        file = out / "study.db" if record.spec.get("storage") is None else _file(url)
        if file is not None:
            if not file.is_file():
                begins = "a run that has just started makes them in a moment; else"
                raise UserError(f"{out}: its trials ({file}) are missing; {begins} restore the file or run the study again")
            opened = SQLiteFile(file)
            try:
                if optuna_compat.has_known_schema(opened.rows):
                    return opened
            except UserError:
                opened.close()
                raise
            opened.close()
    from search.store.database import open_storage

    return open_storage(url)


def storage_url(out: Path, record: StudyRecord) -> str:
    """Return the URL of a study's trials. Its password is not recorded: UIPE_STORAGE has the whole URL."""
    if record.spec.get("storage") is None:
        return own_database(out)  # not the recorded place: the folder may have been moved or copied
    return os.environ.get("UIPE_STORAGE") or record.storage


def _file(url: str) -> Path | None:
    from sqlalchemy import make_url

    from search.store.database import sqlite_file

    return sqlite_file(make_url(url))
