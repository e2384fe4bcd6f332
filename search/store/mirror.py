"""Mirror a study's output folder to a URL: a run works in a folder of this machine and uploads it as it grows.

Layout below the URL: ``files/<start of SHA-256>/<path>``, and ``index.json``, written last, which says what belongs to the
folder. A changed file is uploaded next to its old version, so that readers always find one state as a whole. ``lease.json``
names the run that holds the folder.
"""

import contextlib
import json
import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from tenacity import RetryError, Retrying, retry_if_result, stop_after_attempt, wait_incrementing

from search.spec.errors import without_password
from uipe_core.errors import UserError
from uipe_core.storage.files import cache_folder, file_hash, parse_json, read_json, write_atomic
from uipe_core.storage.remote_folder import RemoteFolder
from uipe_core.storage.scratch import scratch_folder

logger = logging.getLogger(__name__)

INDEX, LEASE, NOTE = "index.json", "lease.json", ".mirror.json"
DATABASE = "study.db"
LEFT_OUT = ("ray", "study.db-wal", "study.db-shm", "study.db-journal")
"""Ray's own files, and what SQLite keeps next to a database."""
PUSH_SECONDS = 30.0
BEAT_SECONDS = 15.0
STALE_SECONDS = 150.0
"""A run not seen for so long counts as dead; clocks of machines may differ by half a minute."""
SETTLE_SECONDS = 1.0
ATTEMPTS = 5


def is_url(out: Path | str) -> bool:
    """Return True if an output folder is at a URL."""
    return "://" in str(out)


@contextlib.contextmanager
def working_folder(out: Path | str) -> Iterator[Path]:
    """Yield the folder a study is run in: itself, or for a URL the folder of this machine that is mirrored there meanwhile.

    Raises:
        UserError: If another run works on the URL, or at the end it cannot be brought up to date.
    """
    if not is_url(out):
        yield Path(out)
        return
    with _Mirror(str(out)).at_work() as folder:
        yield folder


def readable_folder(out: Path | str) -> Path:
    """Return the folder a study is read from: itself, or for a URL a copy on this machine, brought up to date."""
    if not is_url(out):
        return Path(out)
    mirror = _Mirror(str(out))
    folder = mirror.folder.with_name(f"{mirror.folder.name}.read")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        mirror.pull(folder)
    return folder


def is_worked_on(url: str) -> bool:
    """Return True if the lease of a run on a URL is fresh."""
    lease = _Mirror(url).lease()
    return lease is not None and time.time() - lease["seen"] < STALE_SECONDS


class _Mirror:
    """The folder at a URL, and the one on this machine that it mirrors."""

    def __init__(self, url: str) -> None:
        if without_password(url) != url:
            raise UserError(
                f"output folder {without_password(url)}: give keys and passwords in the environment, not in the URL"
            )
        self._url = url
        self._remote = RemoteFolder(url)
        self.folder = cache_folder("runs") / sha256(url.encode()).hexdigest()[:16]
        self._owner = ""
        self._seen: dict[str, tuple[int, int]] = {}
        self._index: dict[str, Any] = {"files": {}}
        self._replaced: set[str] = set()
        self._done = threading.Event()
        self._lost = False

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Path]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise self._under_way("on this machine") from None
        try:
            owner = Path(f"{self.folder}.owner")
            if not owner.is_file():
                write_atomic(owner, uuid.uuid4().hex.encode())
            self._owner = owner.read_text()
            self._take_lease()
            self._catch_up()
            thread = threading.Thread(target=self._keep_up, daemon=True)
            thread.start()
            try:
                yield self.folder
            except BaseException:
                self._end(thread)
                with contextlib.suppress(UserError):
                    self._last_push()
                raise
            self._end(thread)
            self._last_push()
        finally:
            lock.release()

    def pull(self, folder: Path) -> None:
        """Make a folder what the index says; only what differs is fetched."""
        # A run that goes on meanwhile may have removed what the index named: then there is a newer index.
        attempts = Retrying(
            retry=retry_if_result(lambda done: not done), wait=wait_incrementing(0, 1), stop=stop_after_attempt(ATTEMPTS)
        )
        try:
            attempts(self._pull_once, folder)
        except RetryError:
            what = f"files that its {INDEX} names are missing or damaged"
            raise UserError(f"{self._url}: {what}; run the study again to upload them") from None

    def _pull_once(self, folder: Path) -> bool:
        """Fetch what the index names; returns False if something of it is missing or damaged."""
        index = self._remote_index()
        if index is None:
            raise UserError(f"{self._url}: no study there (no {INDEX}); give what `uipe run --out` was given")
        here = _note(folder)["files"]
        for name, facts in index["files"].items():
            if here.get(name) == facts and (folder / name).is_file():
                continue
            temporary = folder / f".{uuid.uuid4().hex}.tmp"
            try:
                if self._remote.download(_object(name, facts), temporary) != facts["sha256"]:
                    return False
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(folder / name)
                for suffix in ("-wal", "-shm") if name == DATABASE else ():
                    (folder / f"{name}{suffix}").unlink(missing_ok=True)
            finally:
                temporary.unlink(missing_ok=True)
        for name in here.keys() - index["files"].keys():
            (folder / name).unlink(missing_ok=True)
        write_atomic(folder / NOTE, json.dumps(index).encode())
        return True

    def _catch_up(self) -> None:
        """Fetch what another machine did since, before a run; what only this one has is put aside, never lost."""
        index = self._remote_index()
        if index is not None and index["id"] != _note(self.folder).get("id"):
            if self.folder.is_dir() and any(self.folder.iterdir()):
                aside = self.folder.with_name(f"{self.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
                self.folder.rename(aside)
                logger.warning("%s: was worked on elsewhere since; this machine's older copy is now in %s", self._url, aside)
            self.pull(self.folder)
        self.folder.mkdir(exist_ok=True)
        self._index = _note(self.folder)

    def push(self) -> None:
        """Upload what has changed in the folder."""
        with scratch_folder() as scratch:
            files = {}
            for path in _files(self.folder):
                name = path.relative_to(self.folder).as_posix()
                try:
                    state = (path.stat().st_size, path.stat().st_mtime_ns)
                    known = self._index["files"].get(name)
                    if known is not None and name != DATABASE and self._seen.get(name) == state:
                        files[name] = known
                        continue
                    source = _snapshot(path, scratch) if name == DATABASE else path
                    facts = {"bytes": source.stat().st_size, "sha256": file_hash(source)}
                    if facts != known:
                        self._remote.upload(source, _object(name, facts))
                except FileNotFoundError:
                    continue  # was there for a moment only
                files[name], self._seen[name] = facts, state
        if files == self._index["files"]:
            return
        index = {"schema": 1, "id": uuid.uuid4().hex, "files": files}
        self._remote.write(INDEX, json.dumps(index).encode())
        write_atomic(self.folder / NOTE, json.dumps(index).encode())
        # Readers of the index before may still be at work, so its files go one push later; a file may be as it once was.
        current = {_object(name, facts) for name, facts in files.items()}
        for outdated in self._replaced - current:
            self._remote.delete(outdated)
        self._replaced = {_object(name, facts) for name, facts in self._index["files"].items()} - current
        self._index = index

    def _keep_up(self) -> None:
        pushed = time.monotonic()
        while not self._done.wait(BEAT_SECONDS):
            try:
                self._beat()
                if self._lost:
                    return
                if time.monotonic() - pushed > PUSH_SECONDS:
                    self.push()
                    pushed = time.monotonic()
            except (UserError, OSError, sqlite3.Error) as error:
                logger.warning("%s: not brought up to date: %s", self._url, error)

    def _end(self, thread: threading.Thread) -> None:
        self._done.set()
        thread.join()

    def _last_push(self) -> None:
        if not self._lost:
            self._beat()
        if self._lost:
            raise UserError(f"output folder {self._url}: another run has taken it over; what this one did is in {self.folder}")
        try:
            self.push()
            self._remote.delete(LEASE)
        except (UserError, OSError, sqlite3.Error) as error:
            logger.warning("%s: not brought up to date: %s", self._url, error)
            raise UserError(
                f"output folder {self._url}: {error}; everything is in {self.folder}, and the same command brings it there"
            ) from None

    def _take_lease(self) -> None:
        lease = self.lease()
        age = time.time() - lease["seen"] if lease is not None else STALE_SECONDS
        if lease is not None and lease["owner"] != self._owner and age < STALE_SECONDS:
            raise self._under_way(f"on another machine, last seen {max(age, 0):.0f} s ago")
        self._write_lease()
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours():
            raise self._under_way("on another machine, started at the same moment")

    def _beat(self) -> None:
        if self._is_ours():
            self._write_lease()
            return
        self._lost = True
        logger.error("%s: another run has taken it over; this one is no longer mirrored there", self._url)

    def _is_ours(self) -> bool:
        lease = self.lease()
        return lease is not None and lease["owner"] == self._owner

    def _write_lease(self) -> None:
        self._remote.write(LEASE, json.dumps({"owner": self._owner, "seen": time.time()}).encode())

    def lease(self) -> dict[str, Any] | None:
        """Return the lease: its ``owner``, and when that was last ``seen``; None if there is none."""
        found = _parsed(self._remote.read(LEASE))
        good = found is not None and isinstance(found.get("owner"), str) and isinstance(found.get("seen"), int | float)
        return found if good else None

    def _remote_index(self) -> dict[str, Any] | None:
        content = self._remote.read(INDEX)
        if content is None:
            return None
        index = _parsed(content)
        if index is None or not isinstance(index.get("id"), str) or not _files_are_named(index.get("files")):
            raise UserError(f"{self._url}: its {INDEX} is damaged or of something else; give another output folder")
        return index

    def _under_way(self, where: str) -> UserError:
        return UserError(
            f"output folder {self._url}: another run of this study is under way, {where}; wait for it or stop it (a run "
            f"that died there is forgotten after {STALE_SECONDS:.0f} s)"
        )


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    try:
        found = parse_json(content or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _files_are_named(files: object) -> bool:
    """Return True if every file that an index names stays in the folder."""
    return isinstance(files, dict) and all(
        isinstance(facts, dict)
        and isinstance(facts.get("sha256"), str)
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        and not name.startswith(".")
        for name, facts in files.items()
    )


def _note(folder: Path) -> dict[str, Any]:
    """Return the index a folder was last equal to."""
    try:
        return read_json(folder / NOTE)
    except (OSError, ValueError):
        return {"files": {}}


def _object(name: str, facts: dict[str, Any]) -> str:
    return f"files/{facts['sha256'][:16]}/{name}"


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in LEFT_OUT or path.is_symlink():
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def _snapshot(database: Path, scratch: Path) -> Path:
    """Copy a database as of one moment, while it is written to."""
    target = scratch / DATABASE
    with (
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=60)) as source,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)
        # The copy is made in rollback mode: it needs no file next to it.
        copy.execute("PRAGMA journal_mode=DELETE")
    return target
