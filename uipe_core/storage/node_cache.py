"""Cache entries from a URL on a node: verified, bounded, least recently used removed first.

A process that reads an entry holds a shared lock of the operating system on the entry's file in ``uses``; the lock ends with
the process. Only entries without such a lock are removed. One process of a node fetches at a time.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from uipe_core.errors import UserError
from uipe_core.storage.content_store import ContentStore, content_key

ROOM_SECONDS = 600.0
"""How long to wait for other processes to release entries when the cache is full."""
GIGABYTE = 10**9


class NodeCache:
    """A bounded content store.

    Args:
        root: Folder on this node's disk.
        limit: Bytes it may hold; must fit all entries that processes of the node read at the same time.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._root = root
        self._limit = limit
        self._entries = _entries(root / "entries")

    def hold(self, inputs: Mapping[str, Any], size: int, fetch: Callable[[Path], None]) -> tuple[Path, Callable[[], None]]:
        """Return the folder of an entry and a function that releases it; until then, or until the process ends, it stays.

        Args:
            inputs: Inputs that determine the entry.
            size: Its bytes.
            fetch: Fills an empty folder; called if this node has no intact entry.

        Raises:
            UserError: If it does not fit.
        """
        key = content_key(inputs)
        with ExitStack() as held:
            held.enter_context(self._lock(key, fcntl.LOCK_SH))
            folder = self._entries.find(key)
            if folder is None:
                with self._entries.locked("space"):
                    folder = self._entries.find(key)
                    if folder is None:
                        self._make_room(size)
                        folder = self._entries.get_or_make(inputs, fetch)
            os.utime(self._uses / key)
            return folder, held.pop_all().close

    @property
    def _uses(self) -> Path:
        return self._root / "uses"

    @contextmanager
    def _lock(self, key: str, kind: int) -> Iterator[None]:
        """Hold the lock of an entry's readers; filelock has no shared locks."""
        with self._entries.as_user_errors():
            self._uses.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._uses / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> None:
        """Remove entries until `size` more bytes fit; the caller holds the lock of fetchers."""
        if size > self._limit:
            raise UserError(
                f"cache.node_gigabytes: {self._limit / GIGABYTE:g} is too little for an update vector of {size / GIGABYTE:.3g} "
                "GB; give at least that for every trial a node runs at once, and one more"
            )
        for name in ("quarantine", "tmp"):
            shutil.rmtree(self._entries.root / name, ignore_errors=True)
        ends = time.monotonic() + ROOM_SECONDS
        while (excess := sum(map(self._bytes, self._keys())) + size - self._limit) > 0:
            if not self._evict(excess):
                if time.monotonic() > ends:
                    raise UserError(
                        f"cache.node_gigabytes: {self._limit / GIGABYTE:g} is full of what other workers of this node are "
                        "reading; raise it, or run fewer trials at once"
                    )
                time.sleep(0.2)

    def _keys(self) -> list[str]:
        return [path.name for path in self._entries.root.iterdir() if path.name not in ("locks", "tmp", "quarantine")]

    def _bytes(self, key: str) -> int:
        return sum(path.stat().st_size for path in (self._entries.root / key).rglob("*") if path.is_file())

    def _evict(self, excess: int) -> bool:
        """Remove about `excess` bytes of unlocked entries, least recently used first; return True if any went."""
        gone = 0
        for key in sorted(self._keys(), key=self._last_use):
            if gone >= excess:
                break
            with suppress(BlockingIOError), self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                gone += self._bytes(key)
                moved = self._entries.root / "tmp" / uuid.uuid4().hex
                moved.parent.mkdir(exist_ok=True)
                (self._entries.root / key).rename(moved)
                shutil.rmtree(moved, ignore_errors=True)
        return gone > 0

    def _last_use(self, key: str) -> float:
        try:
            return (self._uses / key).stat().st_mtime
        except FileNotFoundError:
            return 0.0


@lru_cache
def _entries(root: Path) -> ContentStore:
    """Return the store of a folder; one per process, so that every entry is verified once."""
    return ContentStore(root)
