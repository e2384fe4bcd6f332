"""Open the database of a study, retry while it is locked or gone, and lock it for one driver."""

import hashlib
import logging
import math
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from search.spec.redaction import without_password, without_secrets_of
from uipe_core.errors import UserError, first_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

STORAGE_ERRORS = (StorageInternalError, DBAPIError)
"""What Optuna and SQLAlchemy raise when the database does not do what it is asked."""

PATIENCE_SECONDS = 60.0
"""How long a database may be locked or gone before a run gives up."""

LONGEST_PAUSE_SECONDS = 5.0

CHECK_SECONDS = 10.0
"""How often a driver looks whether its claim on a shared database still stands."""

BUSY_SECONDS = 5
"""How long SQLite itself waits for a lock: Ctrl-C is not heard meanwhile."""

POSTGRESQL = {
    # A server that vanishes without a word (a machine without power) is noticed within about half a minute.
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30000,
}

PASSING_IN_SQLITE = ("locked", "busy")

PASSING_ONCE_OPEN = (*PASSING_IN_SQLITE, "unable to open", "disk I/O")
"""Words of SQLite's errors that mean: later it may go. The last two are what a network file system that is away looks like."""


def sqlite_file(url: URL) -> Path | None:
    """File of an SQLite database; None for one in memory, or another database. SQLAlchemy leaves ``file:`` in front of URIs."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return Path(url.database.removeprefix("file:"))


class WriterLock:
    """The right of one driver to write a study's trials into a database that other drivers can reach; ends with its process.

    PostgreSQL: an advisory lock of the server, held by a connection of its own. SQLite: a lock of the operating system on
    a file beside the database. Other databases have none: there two drivers exclude each other by their output folder only.

    Args:
        url: The storage.
        name: Name of the study.
    """

    def __init__(self, url: URL, name: str) -> None:
        self._said = f"storage {without_password(url.render_as_string(hide_password=False))}"
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
        """Takes the claim.

        Raises:
            UserError: If another driver has it.
        """
        if self._file is not None:
            try:
                self._file.acquire(timeout=0)
            except Timeout:
                raise self._refusal() from None
        self.check()

    def check(self) -> None:
        """Makes sure of the claim, and takes it again if the server has forgotten it since.

        Raises:
            UserError: If another driver has it now.
            DBAPIError: If the server cannot be asked.
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
        """Gives the claim back."""
        self._drop()
        if self._file is not None:
            self._file.release()

    def _drop(self) -> None:
        if self._connection is not None:
            # Ends the session, and the lock with it, also where the server does not answer any more.
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    def _refusal(self) -> UserError:
        return UserError(
            f"{self._said}: another run writes to its study {self._name!r}, from another output folder or machine; wait for it "
            "or stop it, or give this study another name"
        )


class Database:
    """An open database, asked again with growing pauses while it is locked or gone.

    When patience has run out once, everything is tried only once until something succeeds: a run that ends must not wait a
    minute for each of its trials.

    Args:
        backend: The database.

    Attributes:
        optuna: As an Optuna storage. It keeps nothing in memory.
    """

    def __init__(self, backend: RDBStorage) -> None:
        self._backend = backend
        self.optuna = cast(BaseStorage, RetryingStorage(self, backend))
        self._claim: WriterLock | None = None
        self._patience = PATIENCE_SECONDS
        self._failing_since: float | None = None
        self._checked = time.monotonic()

    @property
    def engine(self) -> Engine:
        """SQLAlchemy's engine."""
        return self._backend.engine

    def acquire_writer_lock(self, url: str, name: str) -> None:
        """Makes this process the only writer of a study's trials.

        Raises:
            UserError: If another driver is.
        """
        acquire_writer_lock = WriterLock(make_url(url), name)
        self.with_retry(acquire_writer_lock.take)
        self._claim = acquire_writer_lock
        # A new connection may be to a server that was started again, and has forgotten the claim.
        event.listen(self.engine, "connect", self._forget_check)

    def hurry(self) -> None:
        """From now on everything is tried only once."""
        self._patience = 0.0

    def close(self) -> None:
        """Closes the connections and gives the claim back."""
        self._backend.remove_session()
        self.engine.dispose()
        if self._claim is not None:
            self._claim.release()

    def with_retry(self, action: Callable[[], Result]) -> Result:
        """Does something that may be done twice, again and again while the database is locked or gone."""
        return self.insist(lambda _: action())

    def insist(self, action: Callable[[bool], Result], proves: bool = True) -> Result:
        """As `with_retry`; the action hears whether it is asked again.

        Args:
            action: What is done.
            proves: Whether its success shows that the database can be written.
        """
        pause = 0.1
        again = False
        while True:
            try:
                # An interrupt in the middle of a transaction can leave its connection, and its lock, with nobody to close it:
                # what ends the open trials afterwards would find the database locked.
                with defer_signals():
                    self._check_claim(again)
                    result = action(again)
            except STORAGE_ERRORS as error:
                now = time.monotonic()
                if not _may_pass(error, PASSING_ONCE_OPEN):
                    raise
                if self._failing_since is None:
                    self._failing_since = now
                    shown = explain_storage_error(error, str(self._backend.url))
                    logger.warning("storage: %s; trying again for up to %.0f s", shown, self._patience)
                if now + pause > self._failing_since + self._patience:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                again = True
            else:
                if proves and self._failing_since is not None:
                    logger.warning("storage: there again after %.0f s", time.monotonic() - self._failing_since)
                    self._failing_since = None
                return result

    def _check_claim(self, again: bool) -> None:
        if self._claim is not None and (again or time.monotonic() - self._checked > CHECK_SECONDS):
            self._claim.check()
            self._checked = time.monotonic()

    def _forget_check(self, *_: Any) -> None:
        self._checked = -math.inf


class RetryingStorage:
    """A stand-in for one of Optuna's storages that passes everything on, patiently.

    Args:
        database: Whose patience it has.
        storage: What it stands in for.
    """

    def __init__(self, database: Database, storage: BaseStorage) -> None:
        self._database = database
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        """What the storage has under this name; what it does, it does patiently."""
        if name in ("_storage", "__setstate__"):
            raise AttributeError(name)  # a copy in the making has none yet
        found = getattr(self._storage, name)
        if not callable(found):
            return found
        # What was read may come from memory, or from a database that is locked for writing only.
        proves = not name.startswith("get_")
        return lambda *given, **named: self._database.insist(lambda _: found(*given, **named), proves)


# What asks for the type gets it; nothing of Optuna's own is inherited.
BaseStorage.register(RetryingStorage)


def open_storage(url: str) -> Database:
    """Opens the storage of a URL.

    Raises:
        UserError: If it cannot be opened.
    """
    ends = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            backend = _backend(url)
            break
        except Exception as error:
            # A server that is not there when a run starts is more likely a wrong name than one that will come.
            passes = url.startswith("sqlite") and _may_pass(error, PASSING_IN_SQLITE)
            if (passes or _made_meanwhile(error)) and time.monotonic() < ends:
                time.sleep(1 if passes else 0.1)
                continue
            why = type(error).__name__
            if isinstance(error, DBAPIError):
                why = f"{why}: {without_secrets_of(_said(error), url)}"
            raise UserError(f"storage {without_password(url)}: cannot be opened: {why}") from None
    return Database(backend)


def explain_storage_error(error: Exception, url: str) -> str:
    """What a database said, in a line without the secrets of its URL."""
    return without_secrets_of(_said(error), url)


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
    """Connection settings of PostgreSQL for drivers built on its own library, those of the URL aside."""
    known = url.get_driver_name() in ("psycopg", "psycopg2")
    return {key: value for key, value in POSTGRESQL.items() if key not in url.query} if known else {}


def _may_pass(error: Exception, words: Sequence[str]) -> bool:
    """Whether what failed may succeed later; `words` decide for SQLite."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError):
        return False
    if isinstance(cause.orig, sqlite3.Error):
        return any(word in str(cause.orig) for word in words)
    return cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError)


def _made_meanwhile(error: Exception) -> bool:
    """Whether another program made the tables of a new database at the same moment: they are there at the next look."""
    words = ("already exists", "duplicate key", "unique constraint")
    return isinstance(error, DBAPIError) and any(word in str(error.orig).lower() for word in words)


def _said(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    return first_line(cause)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Holds back signals while its body runs; the last one that came is sent again afterwards.

    Signals are only heard by the main thread: in any other nothing is done, and nothing needs to be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for each in SIGNALS:
            before[each] = signal.signal(each, lambda number, _: came.append(number))
        yield
    finally:
        for each, handler in before.items():
            # A handler that was not installed from Python cannot be put back by it either.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[-1])
