"""Access a folder at a URL, an object store or a mounted file system, through pyarrow.

Credentials come from the places pyarrow reads (environment, instance), never from the URL. Requests are retried for a minute
while the store cannot be reached.
"""

import errno
import hashlib
import logging
import re
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from uipe_core.errors import UserError, first_line
from uipe_core.storage.content_store import UNWRITABLE
from uipe_core.storage.files import write_atomic

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

BLOCK = 8 * 2**20
"""Bytes per read."""
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")
PATIENCE_SECONDS = 60.0
"""How long requests are retried."""
LONGEST_PAUSE_SECONDS = 8.0
OPTIONS = {
    "s3": "allow_delayed_open=true",  # a small file is one request, not three
    "gs": "retry_limit_seconds=60",  # pyarrow's own limit is a quarter of an hour
    "gcs": "retry_limit_seconds=60",
}
"""Options added to a URL unless it sets them."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
LASTING = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|PERMISSION|UNAUTHENTICATED|Unauthorized|Forbidden|"
    r"bucket (does not exist|.* not found)|Could not load credentials|status (401|403)",
    re.IGNORECASE,
)
"""Messages of object stores that a retry does not change."""


class RemoteFolder:
    """A folder at a URL; paths are relative to it.

    Args:
        url: In pyarrow's form: ``s3://bucket/folder?region=eu-west-1``, ``gs://...``, ``file:///mnt/folder``.

    Raises:
        UserError: If pyarrow cannot open it. Every method: if the store refuses, or stays out of reach.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = open_url(url)

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file, None if there is none."""

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
        """Copy a file of this machine there."""

        def copy() -> None:
            self._make_parent(self._at(path))
            with source.open("rb") as stream, self._fs.open_output_stream(self._at(path)) as out:
                while block := stream.read(BLOCK):
                    out.write(block)

        with_retry(self.url, copy)

    def download(self, path: str, target: Path) -> str | None:
        """Copy a file to this machine; return its SHA-256, None if there is no such file."""

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
        """Return the bytes of each file; None for a path that is no file."""
        found = with_retry(self.url, partial(self._fs.get_file_info, [self._at(path) for path in paths]))
        return [info.size if info.is_file else None for info in found]

    def delete(self, path: str) -> None:
        """Remove a file; a missing one is no error."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._fs.delete_file(self._at(path))

        with_retry(self.url, delete)

    def discard(self, folder: str) -> None:
        """Try to remove a folder; a failure is ignored, since nothing depends on it."""
        with suppress(OSError):
            self._fs.delete_dir(self._at(folder))

    @property
    def _is_local(self) -> bool:
        return bool(self._fs.type_name == "local")

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _make_parent(self, target: str) -> None:
        # Object stores have no folders.
        if self._is_local:
            self._fs.create_dir(target.rpartition("/")[0], recursive=True)


def open_url(url: str) -> tuple[Any, str]:
    """Return pyarrow's file system of a URL and the path in it; raise UserError if it cannot be opened."""
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
    """Run a request, repeated with exponential pauses while the store is out of reach.

    Args:
        url: Of the store, for messages.
        action: The request.
        this_machine: Error numbers of the local disk, raised as they are.

    Raises:
        UserError: If the store refuses, or stays out of reach for `PATIENCE_SECONDS`.
    """

    def refused(error: OSError) -> bool:
        return error.errno in UNWRITABLE or LASTING.search(str(error)) is not None

    def out_of_reach(error: BaseException) -> bool:
        return isinstance(error, OSError) and error.errno not in this_machine and not refused(error)

    def warn(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        logger.warning("store %s: %s; trying again", url, first_line(state.outcome.exception()))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(out_of_reach),
        wait=tenacity.wait_exponential(multiplier=0.2, max=LONGEST_PAUSE_SECONDS),
        stop=tenacity.stop_before_delay(PATIENCE_SECONDS),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(action)
    except OSError as error:
        if error.errno in this_machine:
            raise
        if refused(error):
            raise UserError(
                f"store {url}: {first_line(error)}; give a place that can be read and written (room, rights, credentials in "
                "the environment)"
            ) from None
        raise UserError(
            f"store {url}: {first_line(error)}; out of reach for {PATIENCE_SECONDS:.0f} s. Finished work is kept: restore "
            "access, and run the same command again"
        ) from None
