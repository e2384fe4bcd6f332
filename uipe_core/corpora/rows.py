"""Read the rows of a data file: JSON lines, a JSON array, CSV, parquet or a text; errors name file and line."""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from uipe_core.errors import UserError, closest, first_line
from uipe_core.storage.files import parse_json, require_regular

MOST_BYTES = 4 * 2**30
"""What a table may unpack to: a few megabytes of a file that was made for it can stand for any amount."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


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


Report = Callable[[UserError], None]
"""Takes an error in a data file; reading goes on behind it if this returns."""

_Rows = Iterator[Row | UserError]
"""Rows, and the errors of broken ones."""


def stop(error: UserError) -> None:
    """Raise the error: reading ends at the first."""
    raise error


def read_rows(path: Path, report: Report = stop) -> Iterator[Row]:
    """Yield the rows of a data file, one at a time; blank lines are skipped.

    Args:
        path: A file with one of the endings in `READERS`.
        report: Called with every error. Broken rows are left out if it returns.

    Raises:
        UserError: By `report`: the file cannot be read, is not of the type its name says, or holds no row.
    """
    found = 0
    try:
        require_regular(path)
        for row in READERS[path.suffix](path):
            found += 1
            if isinstance(row, UserError):
                report(row)
            else:
                yield row
    except OSError as error:
        return report(UserError(f"{path}: cannot be read ({error.strerror or error})"))
    return None if found else report(UserError(f"{path}: holds no items; give one row at least"))


def _json_rows(path: Path) -> _Rows:
    with path.open("rb") as file:
        is_array = path.suffix == ".json" and file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return _array_rows(path) if is_array else _line_rows(path)


def _line_rows(path: Path) -> _Rows:
    start = 0
    with path.open("rb") as lines:
        # Bytes, because only "\n" ends a line: JSON strings may hold U+2028 and others unescaped.
        for number, raw in enumerate(lines, start=1):
            where, start = f"{path}, line {number}", start + len(raw)
            try:
                line = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
                if line.strip():
                    yield _checked(parse_json(line), where, line)
            except UnicodeDecodeError as error:
                place = start - len(raw) + error.start
                yield UserError(f"{where}: not UTF-8 text (byte {place} of the file); save it as UTF-8, one object a line")
            except ValueError as error:
                yield _not_json(where, error, "give one object a line")


def _array_rows(path: Path) -> _Rows:
    """Yield the elements of a JSON array: its text is in memory as a whole, its objects are not."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield UserError(f"{path}: not UTF-8 text (byte {error.start} of the file); save it as UTF-8")
        return
    decoder, line, seen = json.JSONDecoder(), 1, 0
    place = _after_space(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        line, seen = line + text.count("\n", seen, place), place
        where = f"{path}, line {line}"
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:
            yield _not_json(where, ValueError("nested too deeply"), "correct it")
            return
        except ValueError as error:
            yield _not_json(where, error, "give objects between [ and ], with commas between them")
            return
        yield _checked(value, where, text, place, end)
        place = _after_space(text, end)
        if text[place : place + 1] == ",":
            place = _after_space(text, place + 1)
        elif text[place : place + 1] != "]":
            yield _not_json(f"{where}, after this object", ValueError("no comma and no ]"), "add what is missing")
            return
    if _after_space(text, place + 1) != len(text):
        yield _not_json(str(path), ValueError("text behind the last ]"), "give a single array")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _not_json(where: str, error: ValueError, remedy: str) -> UserError:
    why = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
    return UserError(f"{where}: not valid JSON ({why}); {remedy}")


def _checked(fields: object, where: str, text: str, start: int = 0, end: int | None = None) -> Row | UserError:
    """Return the row of a JSON value, or the error if it is no object or has half of a surrogate pair.

    JSON can write such halves, but no tokenizer takes them.
    """
    if not isinstance(fields, dict):
        return UserError(f"{where}: is a JSON {type(fields).__name__}; give one object a line")
    if _SURROGATE.search(text, start, len(text) if end is None else end) is not None:
        for name, value in fields.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                return UserError(f"{where}: field {name!r} has {half}, half of a character; write the whole character")
    return Row(fields, where)


def _csv_rows(path: Path) -> _Rows:
    """Yield the rows of a CSV file with a header; spreadsheets separate by semicolons or tabs in some countries."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        line = 1
        try:
            separator = max(",;\t", key=lines.readline().count)
            lines.seek(0)
            reader = csv.reader(lines, delimiter=separator, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                yield UserError(f"{path}, line 1: two columns have the same name ({', '.join(names)}); rename one of them")
                return
            line = reader.line_num + 1
            for values in reader:
                where, line = f"{path}, line {line}", reader.line_num + 1
                if len(values) == len(names):
                    yield Row(dict(zip(names, values, strict=True)), where)
                elif values:
                    remedy = f"put texts with {separator!r} or line breaks between double quotes"
                    yield UserError(f"{where}: has {len(values)} values, and the header has {len(names)}; {remedy}")
        except UnicodeDecodeError:
            yield UserError(f"{path}, line {line} or after: not UTF-8 text; save it as UTF-8 (in a spreadsheet: CSV UTF-8)")
        except csv.Error as error:
            # Python's limit for a field is 131072 characters, and it can be raised for the whole process only.
            yield UserError(f"{path}, line {line}: not valid CSV ({error}); correct the quotes, or save it as JSON lines")


def _parquet_rows(path: Path) -> _Rows:
    import pyarrow
    from pyarrow import parquet

    number, unpacked = count(1), 0
    try:
        file = parquet.ParquetFile(path)
        # Bytes of all columns, before any is read.
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        for batch in file.iter_batches(batch_size=256):
            # A value that repeats takes next to no room in the file, and says nothing of its size there.
            unpacked += batch.nbytes
            if max(size, unpacked) > MOST_BYTES:
                yield UserError(f"{path}: unpacks to more than {MOST_BYTES >> 30} GiB; give a table of fewer or shorter rows")
                return
            for fields in batch.to_pylist():
                yield Row(fields, f"{path}, row {next(number)}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield UserError(f"{path}: not a parquet file that can be read ({first_line(error)}); fetch it again")


def _text_rows(path: Path) -> _Rows:
    try:
        yield Row({"text": path.read_text(encoding="utf-8-sig")}, str(path))
    except UnicodeDecodeError as error:
        yield UserError(f"{path}: not UTF-8 text (byte {error.start} of the file); save it as UTF-8")


READERS: dict[str, Callable[[Path], _Rows]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".txt": _text_rows,
    ".md": _text_rows,
}
"""Readers by the ending of a file; ``.json`` has one object a line, or an array of objects."""
