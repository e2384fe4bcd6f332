"""Keep content-addressed entries at a URL, read through the node's cache.

Layout: ``<key>/<upload>/<file>`` and, written last, ``<key>/manifest.json`` with the name of the upload, sizes and checksums.
Object stores cannot rename and have no locks, so every upload has its own folder. If two publish one key at the same time, the
last manifest wins as a whole; readers of the other upload keep reading it.
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
    """URL of a store and the cache limit of a node; sent to the nodes.

    Attributes:
        url: Of a folder in pyarrow's form: ``s3://bucket/deltas?region=eu-west-1``, ``gs://...``, ``file:///mnt/deltas``.
        node_bytes: Limit of a node's cache.
    """

    url: str
    node_bytes: int

    @property
    def node_root(self) -> Path:
        """Folder of this node's cache: one for all URLs, because entries are named by their content."""
        return cache_folder("node")


@dataclass(frozen=True)
class RemoteEntry:
    """A published entry.

    Attributes:
        place: Its store.
        key: Its content address.
        upload: The upload its manifest named; reads stay with it if another one replaces it.
        files: Size and SHA-256 of each file by name.
    """

    place: RemoteLocation
    key: str
    upload: str
    files: Mapping[str, Mapping[str, Any]]

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        with self.reading(name) as folder:
            return (folder / name).read_bytes()

    @contextmanager
    def reading(self, *names: str) -> Iterator[Path]:
        """Yield a folder on this node with the given files, fetched if needed; they stay until the block ends.

        Raises:
            BrokenEntryError: If the stored files do not match their manifest; the entry is then withdrawn.
            UserError: If the store is out of reach, or this node has no room.
        """
        path, release = self.hold(*names)
        try:
            yield path
        finally:
            release()

    def hold(self, *names: str) -> tuple[Path, Callable[[], None]]:
        """Like `reading`, but return the folder and a function that releases it."""
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
    """Publish entries at a URL and find them there; raise UserError if pyarrow cannot open the URL."""

    def __init__(self, place: RemoteLocation) -> None:
        self.place = place
        self._folder = RemoteFolder(place.url)

    def find(self, key: str) -> RemoteEntry | None:
        """Return the entry, or None. A torn, altered or foreign entry is logged, withdrawn, and counts as missing.

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
        """Return the entry for `inputs`; if there is none, call `make(empty_folder)` and publish its files.

        Callers on one machine wait for the first. An entry that was made but not published stays on this machine's disk and is
        published by the next call.

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
        """Download files of an entry into a folder; raise BrokenEntryError if one is missing or does not match its checksum."""
        for name, facts in files.items():
            digest = self._folder.download(f"{entry.key}/{entry.upload}/{name}", folder / name)
            if digest is None:
                raise BrokenEntryError(f"{name} is missing")
            if digest != facts["sha256"]:
                raise BrokenEntryError(f"{name} does not match its checksum")

    def withdraw(self, key: str, reason: str, upload: str | None) -> None:
        """Move the manifest of a broken entry to quarantine, so that the entry no longer counts as published."""
        path = f"{key}/{MANIFEST}"
        text = self._folder.read(path)
        if text is None or (upload is not None and upload.encode() not in text):
            return  # replaced by another upload meanwhile
        try:
            self._folder.write(f"quarantine/{key}.{uuid.uuid4().hex[:8]}.json", text)
            self._folder.delete(path)
        except UserError as error:
            logger.warning("%s, %s: %s; skipped, its manifest cannot be moved (%s)", self.place.url, key, reason, error)
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
