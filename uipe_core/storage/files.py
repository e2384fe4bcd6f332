"""Read files that come from elsewhere; write files atomically, flush them to the disk, hash them, lock them."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def require_regular(path: Path) -> None:
    """Raise OSError for a folder, a pipe or a device: opening a pipe would wait for its other end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_regular(path: Path) -> bytes:
    """Return the content of a file; raises OSError as `require_regular`, or if it cannot be read."""
    require_regular(path)
    return path.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is none (`json.JSONDecodeError` has the line), no UTF-8 (`UnicodeDecodeError`), or nested so deeply that
            Python cannot hold it.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; raises as `read_regular` and `parse_json`.

    Half of a surrogate pair is a ValueError: it cannot be a file's name, a value in a database, or printed.
    """
    raw = read_regular(path)
    found = parse_json(raw)
    if _SURROGATE.search(raw):
        require_whole_characters(found)
    return found


def require_whole_characters(found: object) -> None:
    """Raise ValueError if a parsed JSON value has half of a surrogate pair: JSON can write it, and it is no text."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk, so that a later rename cannot reach the disk before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def try_lock(lock: Path) -> Iterator[bool]:
    """Yield True while holding a file lock, False if another process holds it; a dead process holds none."""
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def is_free(lock: Path) -> bool:
    """Return True if no process holds an existing lock file."""
    with try_lock(lock) as held:
        return held


def cache_folder(name: str) -> Path:
    """Return the default folder of a cache: under the environment variable UIPE_CACHE, or ``~/.cache/uipe``."""
    return Path(os.environ.get("UIPE_CACHE", Path.home() / ".cache" / "uipe")).expanduser() / name


def share(folder: Path) -> None:
    """Make the files of a folder as readable as the folder itself, which has what the umask leaves.

    safetensors writes into a temporary file that only its owner may read.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` at the end of the block: it appears whole or not at all.

    Args:
        target: The folder; must not exist, or be empty. Missing parents are made.
    """
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        share(temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomic(path: Path, content: bytes, flush: bool = True) -> None:
    """Write a file (temporary name, fsync, rename): readers see the old content or the new, never a part.

    Args:
        path: Target; missing folders are made.
        content: Bytes to write.
        flush: Wait for the disk. Without it, a machine that crashes may keep the name and lose the content.
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
