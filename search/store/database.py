"""Open the database of a study, retry while it is locked or gone, and lock it for one driver."""

import hashlib
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from search.spec.errors import without_password, without_secrets_of
from search.store.sqlite_reading import BUSY_SECONDS, PATIENCE_SECONDS
from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import is_free
from uipe_core.storage.signals import defer_signals

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

STORAGE_ERRORS = (StorageInternalError, DBAPIError)
"""Errors that Optuna and SQLAlchemy raise when a database fails."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0

CHECK_SECONDS = 10.0
"""How often a driver checks that it still holds the writer lock of a shared database."""

POSTGRESQL = {
    # A server that vanishes silently (a machine without power) is noticed within about half a minute.
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30000,
}

TRANSIENT_IN_SQLITE = ("locked", "busy")

TRANSIENT_ONCE_OPEN = (*TRANSIENT_IN_SQLITE, "unable to open", "disk I/O")
"""Words of SQLite's errors after which a retry may succeed. The last two come from a network file system that is away."""


def sqlite_file(url: URL) -> Path | None:
    """Return the file of an SQLite database; None for one in memory or another database."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return Path(url.database.removeprefix("file:"))  # SQLAlchemy leaves it in front of URIs


class WriterLock:
    """Lock for one driver that writes a study's trials into a database which other drivers can reach; ends with its process.

    PostgreSQL: an advisory lock of the server, held by a connection of its own. SQLite: a lock of the operating system on
    a file next to the database. Other databases have none: there two drivers exclude each other by their output folder only.

    Args:
        url: The storage.
        name: Name of the study.
    """

    def __init__(self, url: URL, name: str) -> None:
        self._title = f"storage {without_password(url.render_as_string(hide_password=False))}"
        self._name = name
        self._key = int.from_bytes(hashlib.sha256(f"uipe {name}".encode()).digest()[:8], signed=True)
        self._engine: Engine | None = None
        self._connection: Connection | None = None
        self._file: FileLock | None = None
        backend = url.get_backend_name()
        if backend == "postgresql":
            self._engine = create_engine(
                url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=_connect_arguments(url)
            )
        elif (file := sqlite_file(url)) is not None:
            self._file = FileLock(f"{file}.{name}.lock")

    def take(self) -> None:
        """Take the lock.

        Raises:
            UserError: If another driver holds it.
        """
        if self._file is not None:
            try:
                self._file.acquire(timeout=0)
            except Timeout:
                raise self._refusal() from None
        self.check()

    def is_free(self) -> bool:
        """Return True if no driver holds the lock; nothing is written to find that out."""
        if self._file is not None:
            place = Path(self._file.lock_file)
            return not place.exists() or is_free(place)
        try:
            self.check()
        except UserError:
            return False
        self._drop()
        return True

    def check(self) -> None:
        """Check that the lock is held, and take it again if the server has forgotten it.

        Raises:
            UserError: If another driver holds it now.
            DBAPIError: If the server does not answer.
        """
        if self._engine is None:
            return
        if self._connection is not None:
            try:
                self._connection.execute(text("SELECT 1"))
                return
            except DBAPIError:
                self._drop()
        connection = self._engine.connect()
        try:
            granted = connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": self._key}).scalar_one()
            if not granted:
                raise self._refusal()
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        self._connection = connection

    def release(self) -> None:
        """Release the lock."""
        self._drop()
        if self._file is not None:
            self._file.release()

    def _drop(self) -> None:
        if self._connection is not None:
            # Ends the session, and the lock with it, even where the server no longer answers.
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    def _refusal(self) -> UserError:
        return UserError(
            f"{self._title}: another run writes to its study {self._name!r}, from another output folder or machine; wait for "
            "it or stop it, or give this study another name"
        )


class Database:
    """An open database, asked again with growing pauses while it is locked or gone.

    When patience has run out once, everything is tried only once until something succeeds: a run that ends must not wait a
    minute for each of its trials.

    Args:
        backend: The database.

    Attributes:
        backend: It, without retries.
        optuna: It as an Optuna storage whose every call is retried. It keeps nothing in memory.
    """

    def __init__(self, backend: RDBStorage) -> None:
        self.backend = backend
        self.optuna = cast(BaseStorage, RetryingStorage(self, backend))
        self._lock: WriterLock | None = None
        self._patience = PATIENCE_SECONDS
        self._failing_since: float | None = None
        self._checked = time.monotonic()

    @property
    def engine(self) -> Engine:
        """SQLAlchemy's engine."""
        return self.backend.engine

    def acquire_writer_lock(self, url: str, name: str) -> None:
        """Make this process the only writer of a study's trials.

        Raises:
            UserError: If another driver is.
        """
        lock = WriterLock(make_url(url), name)
        self.with_retry(lambda _: lock.take())
        self._lock = lock
        # A new connection may be to a server that was started again, and has forgotten the lock.
        event.listen(self.engine, "connect", self._forget_check)

    def rows(self, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        """Return the rows of a query with parameters by name."""

        def read(_: bool) -> list[Any]:
            with self.engine.connect() as connection:
                return list(connection.execute(text(statement), parameters).all())

        # A database that is locked for writing can still be read.
        return self.with_retry(read, proves=False)

    def hurry(self) -> None:
        """Try everything only once from now on."""
        self._patience = 0.0

    def close(self) -> None:
        """Close the connections and release the writer lock."""
        self.backend.remove_session()
        self.engine.dispose()
        if self._lock is not None:
            self._lock.release()

    def with_retry(self, action: Callable[[bool], Result], proves: bool = True) -> Result:
        """Run something that may be done twice, again and again while the database is locked or gone.

        Args:
            action: Takes whether it is a retry.
            proves: Its success shows that the database can be written.
        """
        attempts = count()

        def attempt() -> Result:
            again = next(attempts) > 0
            # An interrupt in the middle of a transaction can leave its connection, and its lock, with nothing to close it:
            # what ends the open trials afterwards would find the database locked.
            with defer_signals():
                self._check_lock(again)
                return action(again)

        result = Retrying(
            retry=retry_if_exception(lambda error: _is_transient(error, TRANSIENT_ONCE_OPEN)),
            wait=wait_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS),
            stop=self._gives_up,
            reraise=True,
        )(attempt)
        if proves and self._failing_since is not None:
            logger.warning("storage: there again after %.0f s", time.monotonic() - self._failing_since)
            self._failing_since = None
        return result

    def _gives_up(self, attempt: RetryCallState) -> bool:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            error = None if attempt.outcome is None else attempt.outcome.exception()
            assert error is not None
            shown = explain_storage_error(error, str(self.backend.url))
            logger.warning("storage: %s; trying again for up to %.0f s", shown, self._patience)
        return now + attempt.upcoming_sleep > self._failing_since + self._patience

    def _check_lock(self, again: bool) -> None:
        if self._lock is not None and (again or time.monotonic() - self._checked > CHECK_SECONDS):
            self._lock.check()
            self._checked = time.monotonic()

    def _forget_check(self, *_: Any) -> None:
        self._checked = -math.inf


class RetryingStorage:
    """An Optuna storage whose every call is retried.

    Args:
        database: Retries them.
        storage: Answers them.
    """

    def __init__(self, database: Database, storage: BaseStorage) -> None:
        self._database = database
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        """Return the storage's attribute; a method of it with retries."""
        if name in ("_storage", "__setstate__"):
            raise AttributeError(name)  # a copy in the making has none yet
        found = getattr(self._storage, name)
        if not callable(found):
            return found
        # What was read may come from memory, or from a database that is locked for writing only.
        proves = not name.startswith("get_")
        return lambda *given, **named: self._database.with_retry(lambda _: found(*given, **named), proves)


# Code that asks for the type gets it; nothing of Optuna's own is inherited.
BaseStorage.register(RetryingStorage)


def open_storage(url: str) -> Database:
    """Open the storage of a URL; wait for an SQLite file that is locked.

    Raises:
        UserError: If it cannot be opened.
    """

    def locked(error: BaseException | None) -> bool:
        # A server that is not there when a run starts is more likely a wrong name than one that will come.
        return url.startswith("sqlite") and _is_transient(error, TRANSIENT_IN_SQLITE)

    opening = Retrying(
        retry=retry_if_exception(lambda error: locked(error) or _created_meanwhile(error)),
        wait=lambda attempt: 1.0 if attempt.outcome is not None and locked(attempt.outcome.exception()) else 0.1,
        stop=stop_after_delay(PATIENCE_SECONDS),
        reraise=True,
    )
    try:
        return Database(opening(_backend, url))
    except Exception as error:
        why = type(error).__name__
        if isinstance(error, DBAPIError):
            why = f"{why}: {explain_storage_error(error, url)}"
        raise UserError(f"storage {without_password(url)}: cannot be opened: {why}") from None


def explain_storage_error(error: BaseException, url: str) -> str:
    """Return the first line of a database's error, without the secrets of its URL."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    return without_secrets_of(first_line(cause), url)


def _backend(url: str) -> RDBStorage:
    if not url.startswith("sqlite"):
        parsed = make_url(url)
        arguments = _connect_arguments(parsed) if parsed.get_backend_name() == "postgresql" else {}
        return RDBStorage(url, engine_kwargs={"connect_args": arguments})
    backend = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_SECONDS}})

    @event.listens_for(backend.engine, "connect")
    def _fast_and_safe(connection: Any, _: Any) -> None:
        # With a write-ahead log a commit survives the death of the process without waiting for the disk each time.
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    backend.engine.dispose()
    return backend


def _connect_arguments(url: URL) -> dict[str, Any]:
    """Return connection settings of PostgreSQL for drivers built on its own library, except those the URL sets."""
    known = url.get_driver_name() in ("psycopg", "psycopg2")
    return {key: value for key, value in POSTGRESQL.items() if key not in url.query} if known else {}


def _is_transient(error: BaseException | None, words: Sequence[str]) -> bool:
    """Return whether a later try may succeed; `words` decide for SQLite."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError):
        return False
    if isinstance(cause.orig, sqlite3.Error):
        return any(word in str(cause.orig) for word in words)
    return cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError)


def _created_meanwhile(error: BaseException) -> bool:
    """Return whether another program created a new database's tables at the same moment: the next try finds them."""
    words = ("already exists", "duplicate key", "unique constraint")
    return isinstance(error, DBAPIError) and any(word in str(error.orig).lower() for word in words)
