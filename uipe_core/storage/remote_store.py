"""Content-addressed entries at a URL: an object store or a mounted file system, read through the node's cache.

Layout below the URL: ``<key>/<upload>/<file>`` and, written last, ``<key>/manifest.json``, which names the upload, sizes and
checksums. Object stores cannot rename and have no locks, so every upload has a folder of its own: of two that publish the same
key at the same time the last manifest wins as a whole, and who has read the other one keeps reading that.
"""

import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uipe_core.errors import UserError
from uipe_core.storage.content_store import (
    MANIFEST,
    BrokenEntryError,
    ContentStore,
    check_manifest,
    content_key,
    manifest_of,
    read_manifest,
)
from uipe_core.storage.files import cache_folder
from uipe_core.storage.node_cache import NodeCache
from uipe_core.storage.remote_folder import RemoteFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteLocation:
    """Where entries are, and how much of them a node may keep; travels to the nodes.

    Attributes:
        url: Of a folder, as pyarrow has it: ``s3://bucket/deltas?region=eu-west-1``, ``gs://...``, ``file:///mnt/deltas``.
        node_bytes: Bound of the cache of a node.
    """

    url: str
    node_bytes: int

    @property
    def node_root(self) -> Path:
        """The cache of the node this is called on: one for all URLs, because what is in it is named by its content."""
        return cache_folder("node")


@dataclass(frozen=True)
class RemoteEntry:
    """A published entry.

    Attributes:
        place: Its store.
        key: Its content address.
        upload: Which upload of it the manifest named; what is read stays the same if another one replaces it.
        files: Size and SHA-256 of each file by name.
    """

    place: RemoteLocation
    key: str
    upload: str
    files: Mapping[str, Mapping[str, Any]]

    def read(self, name: str) -> bytes:
        """Content of a small file."""
        with self.reading(name) as folder:
            return (folder / name).read_bytes()

    @contextmanager
    def reading(self, *names: str) -> Iterator[Path]:
        """A folder on this node with the given files, fetched if it has them not; they stay for the length of the block.

        Raises:
            BrokenEntryError: If what is stored does not match its manifest; the entry then no longer counts as published.
            UserError: If the store is out of reach, or this node has no room.
        """
        path, release = self.hold(*names)
        try:
            yield path
        finally:
            release()

    def hold(self, *names: str) -> tuple[Path, Callable[[], None]]:
        """As `reading`, until the returned function is called."""
        wanted = {name: dict(self.files[name]) for name in names}
        size = sum(facts["bytes"] for facts in wanted.values())
        store = RemoteStore(self.place)
        cache = NodeCache(self.place.node_root, self.place.node_bytes)
        try:
            return cache.hold({"files": wanted}, size, lambda folder: store.download(self, wanted, folder))
        except BrokenEntryError as error:
            store.withdraw(self.key, str(error), self.upload)
            raise


class RemoteStore:
    """Publishes entries at a URL, and finds them there.

    Args:
        place: Where.

    Raises:
        UserError: If the URL is none that pyarrow can open.
    """

    def __init__(self, place: RemoteLocation) -> None:
        self.place = place
        self._folder = RemoteFolder(place.url)

    def find(self, key: str) -> RemoteEntry | None:
        """The entry, or None. What is torn, altered or foreign is reported, put aside, and counts as missing.

        Sizes are checked here, checksums when a node fetches a file.
        """
        text = self._folder.read(f"{key}/{MANIFEST}")
        if text is None:
            return None
        upload = None
        try:
            manifest = read_manifest(text)
            check_manifest(manifest, key)
            upload = manifest.get("upload")
            if not isinstance(upload, str) or not re.fullmatch(r"[0-9a-f]{32}", upload):
                raise BrokenEntryError("manifest names no upload")
            entry = RemoteEntry(self.place, key, upload, manifest["files"])
            self._require_files(entry)
        except BrokenEntryError as error:
            self.withdraw(key, str(error), upload)
            return None
        return entry

    def get_or_make(self, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> RemoteEntry:
        """The entry for `inputs`; calls `make(empty_folder)` and publishes what it wrote when there is none yet.

        Callers on one machine wait for the first. What was made and could not be published stays on this machine's disk, and
        is published by the next call.

        Raises:
            UserError: If the store or this machine's disk cannot be written, or the store is out of reach.
        """
        key = content_key(inputs)
        found = self.find(key)
        if found is not None:
            return found
        staging = ContentStore(self.place.node_root / "staging")
        with staging.locked(f"{key}.publish"):
            found = self.find(key)
            if found is None:
                folder = staging.get_or_make(inputs, make)
                found = self._publish(key, inputs, folder)
            shutil.rmtree(staging.root / key, ignore_errors=True)
            return found

    def download(self, entry: RemoteEntry, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Writes files of an entry into a folder of this machine.

        Raises:
            BrokenEntryError: If one is missing or is not what the manifest says.
        """
        for name, facts in files.items():
            digest = self._folder.download(f"{entry.key}/{entry.upload}/{name}", folder / name)
            if digest is None:
                raise BrokenEntryError(f"{name} is missing")
            if digest != facts["sha256"]:
                raise BrokenEntryError(f"{name} does not match its checksum")

    def withdraw(self, key: str, reason: str, upload: str | None) -> None:
        """Puts the manifest of a broken entry aside, so that it no longer counts as published."""
        path = f"{key}/{MANIFEST}"
        text = self._folder.read(path)
        if text is None or (upload is not None and upload.encode() not in text):
            return  # another upload has taken its place meanwhile
        try:
            self._folder.write(f"quarantine/{key}.{uuid.uuid4().hex[:8]}.json", text)
            self._folder.delete(path)
        except UserError as error:
            logger.warning("%s, %s: %s; it cannot be put aside (%s), so it is passed over", self.place.url, key, reason, error)
            return
        logger.warning("%s, %s: %s; its manifest is now in quarantine, it will be made again", self.place.url, key, reason)

    def _publish(self, key: str, inputs: Mapping[str, Any], folder: Path) -> RemoteEntry:
        upload = uuid.uuid4().hex
        files = read_manifest((folder / MANIFEST).read_bytes())["files"]
        entry = RemoteEntry(self.place, key, upload, files)
        try:
            for name in files:
                self._folder.upload(folder / name, f"{key}/{upload}/{name}")
            self._require_files(entry)
            faster = self.find(key)
            if faster is not None:
                self._folder.discard(f"{key}/{upload}")
                return faster
            manifest = manifest_of(key, inputs, files, upload=upload)
            self._folder.write(f"{key}/{MANIFEST}", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        except BaseException:
            self._folder.discard(f"{key}/{upload}")
            raise
        return entry

    def _require_files(self, entry: RemoteEntry) -> None:
        sizes = self._folder.sizes([f"{entry.key}/{entry.upload}/{name}" for name in entry.files])
        for (name, facts), size in zip(entry.files.items(), sizes, strict=True):
            if size is None:
                raise BrokenEntryError(f"{name} is missing")
            if size != facts["bytes"]:
                raise BrokenEntryError(f"{name} has {size} bytes, expected {facts['bytes']}")
