"""A folder at a URL: an object store or a mounted file system, through pyarrow, which Ray brings along.

Credentials come from where pyarrow looks for them (environment, instance), never from the URL. While a store is out of reach it
is asked again for a minute.
"""

import errno
import hashlib
import logging
import re
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from uipe_core.errors import UserError, first_line
from uipe_core.storage.content_store import UNWRITABLE
from uipe_core.storage.files import write_atomic

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

BLOCK = 8 * 2**20
"""Bytes copied at a time."""
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")
PATIENCE_SECONDS = 60.0
"""How long a store may be out of reach before what needs it gives up."""
LONGEST_PAUSE_SECONDS = 8.0
OPTIONS = {
    "s3": "allow_delayed_open=true",  # a small file is one request, not three
    "gs": "retry_limit_seconds=60",  # pyarrow's own limit is a quarter of an hour
    "gcs": "retry_limit_seconds=60",
}
"""What is asked of pyarrow unless the URL says otherwise."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
LASTING = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|PERMISSION|UNAUTHENTICATED|Unauthorized|Forbidden|"
    r"bucket (does not exist|.* not found)|Could not load credentials|status (401|403)",
    re.IGNORECASE,
)
"""What object stores say that no waiting changes."""


class RemoteFolder:
    """A folder at a URL; paths are relative to it.

    Args:
        url: As pyarrow has it: ``s3://bucket/folder?region=eu-west-1``, ``gs://...``, ``file:///mnt/folder``.

    Raises:
        UserError: If it is none that pyarrow can open; from every method, if the store refuses or stays out of reach.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = open_url(url)

    def read(self, path: str) -> bytes | None:
        """Content of a small file; None where there is none."""

        def read() -> bytes | None:
            try:
                with self._fs.open_input_stream(self._at(path)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return with_retry(self.url, read)

    def write(self, path: str, content: bytes) -> None:
        """Write a small file atomically: readers see it whole or not at all."""

        def write() -> None:
            target = self._at(path)
            if self._is_local:
                write_atomic(Path(target), content)
                return
            # An object appears when it is complete.
            with self._fs.open_output_stream(target) as stream:
                stream.write(content)

        with_retry(self.url, write)

    def upload(self, source: Path, path: str) -> None:
        """Copies a file of this machine there."""

        def copy() -> None:
            self._make_parent(self._at(path))
            with source.open("rb") as stream, self._fs.open_output_stream(self._at(path)) as out:
                while block := stream.read(BLOCK):
                    out.write(block)

        with_retry(self.url, copy)

    def download(self, path: str, target: Path) -> str | None:
        """Copies a file to this machine; returns its SHA-256, None where there is none."""

        def copy() -> str | None:
            digest = hashlib.sha256()
            try:
                opened = self._fs.open_input_stream(self._at(path))
            except FileNotFoundError:
                return None
            with opened as stream, target.open("wb") as out:
                while block := stream.read(BLOCK):
                    digest.update(block)
                    out.write(block)
            return digest.hexdigest()

        target.parent.mkdir(parents=True, exist_ok=True)
        return with_retry(self.url, copy, this_machine=FULL)

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each file; None for what is no file."""
        found = with_retry(self.url, partial(self._fs.get_file_info, [self._at(path) for path in paths]))
        return [info.size if info.is_file else None for info in found]

    def delete(self, path: str) -> None:
        """Removes a file; one that is not there is as good as removed."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._fs.delete_file(self._at(path))

        with_retry(self.url, delete)

    def discard(self, folder: str) -> None:
        """Removes a folder if that can be done; nothing depends on it."""
        with suppress(OSError):
            self._fs.delete_dir(self._at(folder))

    @property
    def _is_local(self) -> bool:
        return bool(self._fs.type_name == "local")

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _make_parent(self, target: str) -> None:
        # In an object store folders are but names.
        if self._is_local:
            self._fs.create_dir(target.rpartition("/")[0], recursive=True)


def open_url(url: str) -> tuple[Any, str]:
    """pyarrow's file system of a URL, and the path in it.

    Raises:
        UserError: If it cannot be opened.
    """
    from pyarrow import fs

    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise UserError(f"{url}: {scheme}:// is no store that can be used; give one of {', '.join(SCHEMES)}")
    option = OPTIONS.get(scheme)
    asked = f"{url}{'&' if '?' in url else '?'}{option}" if option and option.partition("=")[0] not in url else url
    try:
        system, path = with_retry(url, lambda: fs.FileSystem.from_uri(asked))
    except (ValueError, NotImplementedError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{url}: {first_line(error)}; write it as pyarrow has it, for example s3://bucket/folder") from None
    return system, path.rstrip("/")


def with_retry(url: str, action: Callable[[], Result], this_machine: Container[int] = ()) -> Result:
    """Does something at a URL, again and again while the store is out of reach.

    Args:
        url: Of the store, for messages.
        action: What is done.
        this_machine: Numbers of errors that are not the store's but of the disk here, and are raised as they are.

    Raises:
        UserError: If it stays so for `PATIENCE_SECONDS`, or if the store refuses.
    """
    ends = time.monotonic() + PATIENCE_SECONDS
    pause = 0.2
    while True:
        try:
            return action()
        except OSError as error:
            if error.errno in this_machine:
                raise
            said = first_line(error)
            if error.errno in UNWRITABLE or LASTING.search(str(error)):
                raise UserError(
                    f"store {url}: {said}; give a place that can be read and written (room, rights, credentials in the "
                    "environment)"
                ) from None
            if time.monotonic() + pause > ends:
                raise UserError(
                    f"store {url}: {said}; out of reach for {PATIENCE_SECONDS:.0f} s. What was done is kept: mend that, and "
                    "run the same command again"
                ) from None
            logger.warning("store %s: %s; trying again", url, said)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
