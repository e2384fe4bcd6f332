"""Read data sets of the hub, folders and files row by row; errors name file and line."""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uipe_core.errors import UserError, closest, did_you_mean, first_line
from uipe_core.storage.files import parse_json, require_regular

MOST_BYTES = 4 * 2**30
"""What a table may unpack to: a few megabytes of a file that was made for it can stand for any amount."""

SUFFIXES = (".parquet", ".jsonl", ".json")
"""File types; JSON has one object per line."""


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Row:
    """One object of a data file with its position: ``FILE, line 3`` (``row 3`` of a parquet file), from 1."""

    fields: Mapping[str, Any]
    where: str

    def get(self, name: str) -> Any:
        """Return the value of a field; raise UserError if it is missing."""
        if name not in self.fields:
            close = closest(name, self.fields)
            hint = f" Did you mean {name!r} by {close!r}?" if close else ""
            raise UserError(f"{self.where}: field {name!r} is missing; found: {', '.join(self.fields) or 'none'}.{hint}")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return the text of a field; raise UserError if it is missing, not a text, or blank."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, value, "give a text that is not blank")
        return value

    def error(self, name: str, value: object, remedy: str) -> UserError:
        """Return a UserError for a field with a wrong value."""
        return UserError(f"{self.where}: field {name!r} is {value!r}; {remedy}")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file; blank lines of a JSON file are skipped.

    Raises:
        UserError: The file cannot be read, is not of the type its name says, or holds no row.
    """
    count = 0
    try:
        require_regular(path)
        for row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
            count += 1
            yield row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not count:
        raise UserError(f"{path}: holds no items; give one JSON object a line")


def _json_rows(path: Path) -> Iterator[Row]:
    start = 0
    with path.open("rb") as lines:
        # Bytes, because only "\n" ends a line: JSON strings may hold U+2028 and others unescaped.
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                place = start + error.start
                raise UserError(f"{path}: not UTF-8 text (byte {place}); save it as UTF-8, one object a line") from error
            start += len(raw)
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                fields = parse_json(line)
            except ValueError as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                raise UserError(f"{where}: not valid JSON ({why}); give one object a line") from error
            if not isinstance(fields, dict):
                raise UserError(f"{where}: is a JSON {type(fields).__name__}; give one object a line")
            _require_whole_characters(fields, raw, where)
            yield Row(fields, where)


def _require_whole_characters(fields: Mapping[str, Any], raw: bytes, where: str) -> None:
    """Refuse texts with half of a surrogate pair: JSON can write it, but no tokenizer takes it."""
    if _SURROGATE.search(raw) is None:
        return
    for name, value in fields.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(f"{where}: field {name!r} has {half}, half of a character; write the whole character") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        size = _unpacked_bytes(file)
        batches = file.iter_batches(batch_size=256)
        number = unpacked = 0
        for batch in batches:
            # A value that repeats takes next to no room in the file, and says nothing of its size there.
            unpacked += batch.nbytes
            if max(size, unpacked) > MOST_BYTES:
                raise UserError(f"{path}: unpacks to more than {MOST_BYTES >> 30} GiB; give a table of fewer or shorter rows")
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file that can be read ({first_line(error)}); fetch it again") from error


def _unpacked_bytes(file: Any) -> int:
    """Return the bytes of all columns of a parquet file, before any is read."""
    return sum(file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups))


def is_hub_name(source: str) -> bool:
    """Return True if a source, neither file nor folder, has the form ``owner/name`` of the hub."""
    owner, _, _ = source.partition("/")
    # "data/tofu" could be either; if "data" is a local folder, a misspelt folder is more likely.
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(owner).is_dir()


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub, a folder with the same layout, or a single file.

    Attributes:
        source: Name on the hub, folder, or file (one of `SUFFIXES`; the other attributes are then ignored).
        subsets: Folders inside it, the hub's configurations; empty if it has none.
        split: ``test``, ``train`` or another; file names of a split begin with it.
    """

    source: str
    subsets: tuple[str, ...] = ()
    split: str = "test"

    def __str__(self) -> str:
        parts = [self.source, *([",".join(self.subsets)] if self.subsets else []), self.split]
        return self.source if Path(self.source).suffix in SUFFIXES else ":".join(parts)

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield every row with the name of its subset (empty if there are none), in the order of subsets and files.

        Raises:
            UserError: The data set, a subset or its split is missing or cannot be fetched, or a file is broken.
        """
        for subset, path in self._files():
            for row in read_rows(path):
                yield subset, row

    def _files(self) -> Iterator[tuple[str, Path]]:
        path = Path(self.source).expanduser()
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise UserError(f"{path}: a data file ends in {', '.join(SUFFIXES)}; give such a file, or a folder")
            yield "", path
            return
        if not path.is_dir() and not is_hub_name(self.source):
            raise UserError(f"data set {self.source!r}: no such file or folder, and no name of a data set on the hub")
        folder = path if path.is_dir() else self._download()
        for subset in self.subsets or ("",):
            for file in self._split_files(folder, subset):
                yield subset, file

    def _split_files(self, folder: Path, subset: str) -> list[Path]:
        place = folder / subset
        if not place.is_dir():
            present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
            raise UserError(f"data set {self.source}: no subset {subset!r}; it has {_choice(subset, present)}")
        # The hub puts a single subset into a folder "data"; converted sets have a folder per split.
        folders = [each for each in (place, place / "data", place / self.split) if each.is_dir()]
        files = [file for each in folders for file in sorted(each.iterdir()) if file.suffix in SUFFIXES]
        named = re.compile(rf"{re.escape(self.split)}([-._].*)?")
        found = [file for file in files if file.parent.name == self.split or named.fullmatch(file.stem)]
        if not found:
            present = sorted({re.split(r"[-._]", file.stem)[0] for file in files})
            raise UserError(f"data set {place}: no file of split {self.split!r}; it has {_choice(self.split, present)}")
        return found

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download

        folders = [f"{subset}/" for subset in self.subsets] or ["", "data/"]
        wanted = [f"{folder}{self.split}{rest}" for folder in folders for rest in ("*", "/*")]
        try:
            return Path(snapshot_download(self.source, repo_type="dataset", allow_patterns=wanted))
        # The hub client's errors have no common base class.
        except Exception as error:
            raise UserError(
                f"cannot get the data set {self.source} from the hub ({first_line(error)}); check name, network and, where the "
                "data set wants it, your access; or give a folder or file that holds it"
            ) from error


def _choice(name: str, present: list[str]) -> str:
    return f"{', '.join(present) or 'none'}.{did_you_mean(name, present)}"
