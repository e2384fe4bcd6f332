"""What a node keeps of entries at a URL: verified, bounded, the least recently used given up first.

A process that reads an entry holds a shared lock of the operating system on its file in ``uses``, which ends with the process;
who needs room gives up only entries that nobody holds. One process of a node fetches at a time.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from uipe_core.errors import UserError
from uipe_core.storage.content_store import ContentStore, content_key

ROOM_SECONDS = 600.0
"""How long to wait for others to let go of what fills the cache."""
GIGABYTE = 10**9


class NodeCache:
    """A bounded content store.

    Args:
        root: Its folder on this node's disk.
        limit: Bytes it may hold. What one process reads must fit beside what the others of the node are reading.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._root = root
        self._limit = limit
        self._entries = _entries(root / "entries")

    def hold(self, inputs: Mapping[str, Any], size: int, fetch: Callable[[Path], None]) -> tuple[Path, Callable[[], None]]:
        """Folder of an entry, which stays until the returned function is called or this process ends.

        Args:
            inputs: What determines it.
            size: Its bytes.
            fetch: Called with an empty folder to fill, if this node has no intact one.

        Raises:
            UserError: If it does not fit.
        """
        key = content_key(inputs)
        held = self._hold(key)
        try:
            folder = self._entries.find(key)
            if folder is None:
                with self._entries.locked("room"):
                    folder = self._entries.find(key)
                    if folder is None:
                        self._make_room(size)
                        folder = self._entries.get_or_make(inputs, fetch)
            os.utime(self._uses / key)
        except BaseException:
            os.close(held)
            raise

        def release() -> None:
            nonlocal held
            if held >= 0:
                os.close(held)
                held = -1

        return folder, release

    @property
    def _uses(self) -> Path:
        return self._root / "uses"

    def _hold(self, key: str) -> int:
        with self._entries.as_user_errors():
            self._uses.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._uses / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def _make_room(self, size: int) -> None:
        """Gives entries up until `size` more bytes fit; nobody else fetches meanwhile."""
        if size > self._limit:
            raise UserError(
                f"cache.node_gigabytes: {self._limit / GIGABYTE:g} is too little for an update vector of {size / GIGABYTE:.3g} "
                "GB; give at least that for every trial a node runs at once, and one more"
            )
        for name in ("quarantine", "tmp"):
            shutil.rmtree(self._entries.root / name, ignore_errors=True)
        ends = time.monotonic() + ROOM_SECONDS
        while (excess := self._held_bytes() + size - self._limit) > 0:
            if not self._give_up(excess):
                if time.monotonic() > ends:
                    raise UserError(
                        f"cache.node_gigabytes: {self._limit / GIGABYTE:g} is full of what other workers of this node are "
                        "reading; raise it, or run fewer trials at once"
                    )
                time.sleep(0.2)

    def _keys(self) -> list[str]:
        return [path.name for path in self._entries.root.iterdir() if path.name not in ("locks", "tmp", "quarantine")]

    def _held_bytes(self) -> int:
        folders = [self._entries.root / key for key in self._keys()]
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def _give_up(self, excess: int) -> bool:
        """Removes what was longest unused and nobody holds, about `excess` bytes of it; whether anything went."""
        gone = 0
        for key in sorted(self._keys(), key=self._last_use):
            if gone >= excess:
                break
            folder = self._entries.root / key
            descriptor = os.open(self._uses / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gone += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                aside = self._entries.root / "tmp" / uuid.uuid4().hex
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)
        return gone > 0

    def _last_use(self, key: str) -> float:
        try:
            return (self._uses / key).stat().st_mtime
        except FileNotFoundError:
            return 0.0


@lru_cache
def _entries(root: Path) -> ContentStore:
    """One per process, which then checks every entry once."""
    return ContentStore(root)
