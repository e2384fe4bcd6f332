"""Keep immutable entries in a folder, named by the hash of their inputs: atomic, checksummed, made once.

Layout: ``<root>/<key>/`` with the entry's files and ``manifest.json``; ``<root>/quarantine/`` for entries that failed their
check; ``<root>/tmp/`` for entries being written; ``<root>/locks/`` for the makers' locks.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from uipe_core.errors import UserError
from uipe_core.storage.files import file_hash, fsync_path, is_free, parse_json, share, try_lock, write_atomic

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

UNWRITABLE = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST")}
"""Operating system errors that mean: this place cannot be written."""


class BrokenEntryError(Exception):
    """The files of an entry do not match its manifest."""


def content_key(inputs: Mapping[str, Any]) -> str:
    """Return the key of an entry: 32 hexadecimal digits of the SHA-256 of its inputs as canonical JSON."""
    return hashlib.sha256(_canonical(inputs)).hexdigest()[:32]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def manifest_of(key: str, inputs: Mapping[str, Any], files: Mapping[str, Any], **more: str) -> dict[str, Any]:
    """Return a manifest: the entry's inputs, size and SHA-256 of each file by name, and a checksum of the manifest itself."""
    manifest: dict[str, Any] = {"key": key, "inputs": dict(inputs), "files": dict(files), **more}
    manifest["checksum"] = hashlib.sha256(_canonical(manifest)).hexdigest()
    return manifest


def read_manifest(content: bytes) -> dict[str, Any]:
    """Parse a manifest; raise BrokenEntryError if it is not a JSON object."""
    try:
        manifest = parse_json(content)
    except ValueError:
        raise BrokenEntryError("manifest is not JSON") from None
    if not isinstance(manifest, dict):
        raise BrokenEntryError("manifest is not an object")
    return manifest


def check_manifest(manifest: Mapping[str, Any], key: str) -> None:
    """Raise BrokenEntryError if a manifest was altered, belongs to another key, or names files outside its entry."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    if manifest.get("checksum") != hashlib.sha256(_canonical(rest)).hexdigest():
        raise BrokenEntryError("manifest was altered")
    if manifest.get("key") != key or content_key(manifest.get("inputs", {})) != key:
        raise BrokenEntryError("entry belongs to another key")
    # The checksum is no secret: a foreign manifest can have a right one.
    _files_of(manifest)


def _system_error(error: Exception) -> int:
    """Return the operating system's error number behind an exception, 0 if there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    # The Rust writers of safetensors and tokenizers give the number in their text only.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _files_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file by name, a path inside the entry; raise BrokenEntryError for anything else."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(f, dict) and {"bytes", "sha256"} <= f.keys() for f in files.values()):
        raise BrokenEntryError("manifest does not say what files there are")
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise BrokenEntryError(f"manifest names a file outside its entry: {name!r}")
    return files


class ContentStore:
    """Make each entry once, even with concurrent callers, and return only entries that pass their checksums.

    Args:
        root: Folder of the store; created at the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._verified: set[str] = set()

    def find(self, key: str) -> Path | None:
        """Return the folder of an entry, or None. A torn or altered entry is logged, quarantined, and counts as missing."""
        try:
            return self._intact(key)
        except BrokenEntryError:
            # Check again under the lock: the entry may have been remade since, and that one must stay.
            with self.locked(key):
                return self._intact_or_quarantine(key)

    def holds(self, key: str) -> bool:
        """Return True if the entry exists; its checksums are not verified."""
        return (self.root / key / MANIFEST).is_file()

    def flaw(self, key: str) -> str | None:
        """Verify the checksums of an entry; return the flaw found, or None. Changes nothing.

        Raises:
            FileNotFoundError: If there is no entry.
        """
        if not (self.root / key).is_dir():
            raise FileNotFoundError(key)
        try:
            self._verify(key)
        except BrokenEntryError as error:
            return str(error)
        return None

    def unfinished(self) -> list[str]:
        """Return keys of entries left unfinished: started, and no maker holds their lock any more."""
        keys = [path.name for path in sorted((self.root / "tmp").glob("*"))]
        return [key for key in keys if not self._lock(key).exists() or is_free(self._lock(key))]

    def clear_unfinished(self, key: str) -> bool:
        """Remove the unfinished files of a maker that was killed; return False if one is at work on the key again."""
        with try_lock(self._lock(key)) as held:
            if held:
                shutil.rmtree(self.root / "tmp" / key)
        return held

    def get_or_make(self, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Return the folder of the entry for `inputs`; call `make(empty_folder)` if there is none yet.

        Concurrent callers on one machine wait for the first (a lock of the operating system, released with its process). If
        `make` raises, nothing is published.

        Raises:
            UserError: If the store cannot be written (read-only folder, full disk).
        """
        key = content_key(inputs)
        found = self.find(key)
        if found is not None:
            return found
        with self.locked(key):
            return self._intact_or_quarantine(key) or self._make(key, inputs, make)

    def manifest(self, key: str) -> dict[str, Any]:
        """Return the manifest of an entry; raise BrokenEntryError if it is missing or malformed."""
        try:
            return read_manifest((self.root / key / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise BrokenEntryError("manifest is missing (the entry was never finished)") from None

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of an entry, or one of another name; an unwritable store raises UserError."""
        with self.as_user_errors():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock(key)):
                yield

    @contextmanager
    def as_user_errors(self) -> Iterator[None]:
        """Turn a full disk, a read-only folder and the like inside the block into a UserError."""
        try:
            yield
        except Exception as error:
            number = _system_error(error)
            if number not in UNWRITABLE:
                raise
            raise UserError(
                f"cache folder {self.root}: {os.strerror(number)}; free some space or choose another folder "
                "(cache.models and cache.deltas in the study file, or the environment variable UIPE_CACHE)"
            ) from error

    def _lock(self, key: str) -> Path:
        return self.root / "locks" / f"{key}.lock"

    def _intact(self, key: str) -> Path | None:
        folder = self.root / key
        if not folder.is_dir():
            return None
        if key not in self._verified:
            self._verify(key)
            self._verified.add(key)
        return folder

    def _intact_or_quarantine(self, key: str) -> Path | None:
        try:
            return self._intact(key)
        except BrokenEntryError as error:
            self._quarantine(self.root / key, str(error))
            return None

    def _make(self, key: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        # We hold the lock, so files found here are from a maker that was killed.
        temporary = self.root / "tmp" / key
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            make(temporary)
            self._seal(temporary, key, inputs)
            folder = self.root / key
            temporary.replace(folder)
            fsync_path(self.root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._verified.add(key)
        return folder

    def _seal(self, folder: Path, key: str, inputs: Mapping[str, Any]) -> None:
        share(folder)
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            fsync_path(path)
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        manifest = manifest_of(key, inputs, files)
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        fsync_path(folder)

    def _verify(self, key: str) -> None:
        manifest = self.manifest(key)
        check_manifest(manifest, key)
        for name, facts in _files_of(manifest).items():
            path = self.root / key / name
            if not path.is_file():
                raise BrokenEntryError(f"{name} is missing")
            if path.stat().st_size != facts["bytes"]:
                raise BrokenEntryError(f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}")
            if file_hash(path) != facts["sha256"]:
                raise BrokenEntryError(f"{name} does not match its checksum")

    def _quarantine(self, folder: Path, reason: str) -> None:
        target = self.root / "quarantine" / f"{folder.name}.{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        logger.warning("%s: %s; moved to %s, it will be made again", folder, reason, target)
