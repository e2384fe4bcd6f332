"""Write files atomically, flush them to the disk, hash them, probe locks."""

import hashlib
import os
import uuid
from pathlib import Path

from filelock import FileLock, Timeout


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory entry to the disk, so that a rename that follows cannot outrun its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_free(lock: Path) -> bool:
    """Whether nobody holds a lock file that exists; the lock is the system's, so one of a dead process is free."""
    probe = FileLock(lock)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return False
    probe.release()
    return True


def cache_folder(name: str) -> Path:
    """Default place of a cache: under the environment variable UIPE_CACHE, or ``~/.cache/uipe``."""
    return Path(os.environ.get("UIPE_CACHE", Path.home() / ".cache" / "uipe")).expanduser() / name


def write_atomic(path: Path, content: bytes, flush: bool = True) -> None:
    """Writes a file so that readers see the old content or the new, never a part: temporary name, fsync, rename.

    Args:
        path: The file.
        content: What will be in it.
        flush: Whether to wait for the disk. Without, a machine that crashes may keep the name and lose the content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        if flush:
            fsync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
