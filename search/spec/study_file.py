"""Read a study file into plain data with line numbers, and settings of a command line in its place."""

import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.spec.errors import KeyPath, Problem, StudyFileError, key_text, show
from search.spec.paths import absolute_paths
from search.spec.sections import PACKAGE
from uipe_core.errors import UserError, first_line

if TYPE_CHECKING:
    from ruamel.yaml import YAML, Node

LineNumbers = dict[KeyPath, int]
"""Line of every key and list entry, counted from 1."""

NULL = object()
"""Null as the value of a setting; None as that of an option says that it was not given."""

MAX_BYTES = 2**20
"""A study file is a few kilobytes; the limit keeps a mistyped path to a weights file from being read whole."""

MAX_NODES = 100_000
"""Keys and values of a study with every alias written out: a few lines of aliases can stand for billions."""

_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)
"""What the parser raises where a value is not what its tag or its form promises: ``!!bool maybe``, ``2026-99-99``."""

_OTHER_INTEGER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*_[0-9_]*|[0-9][0-9_]*(:[0-5]?[0-9])+)")
"""Plain scalars that YAML 1.1 reads as another integer than YAML 1.2: octal, with underscores, in base 60."""


def read_study_file(path: Path) -> tuple[dict[str, object], LineNumbers]:
    """Return the content of a study file, and the line of each key.

    Raises:
        StudyFileError: The file is missing, unreadable, not text, not YAML, empty, not a mapping, or has a key twice.
    """
    # Here and below where it is used: commands that read a recorded study need no YAML.
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        data, lines, problems = _parse(_read_text(path))
    except RecursionError:
        problem = Problem("", "nested too deeply to be a study. Write it like studies/quickstart.yaml.")
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        problem = Problem("", f"not valid YAML: {what}. Correct it there or just before.", place)
    except (YAMLError, *_UNREADABLE) as error:
        reason = first_line(error)
        problem = Problem("", f"not valid YAML: {reason}. Correct or remove it.")
    except _UnusableFileError as error:
        problem = Problem("", str(error))
    else:
        if problems:
            raise StudyFileError(problems, str(path))
        return data, lines
    raise StudyFileError([problem], str(path))


def write_study_file(path: Path, content: Mapping[str, object]) -> None:
    """Write plain data so that `read_study_file` reads the same: a text such as 1e5 gets its quotes."""
    from ruamel.yaml import YAML

    yaml = YAML(pure=True)
    yaml.width = 1000
    yaml.dump(content, path)


class _UnusableFileError(Exception):
    """A file without any YAML in it."""


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise _UnusableFileError("this is a folder. Give the study file inside it (*.yaml).")
        if not path.exists():
            raise _UnusableFileError("there is no such file. Check the path; shipped studies are in the folder studies.")
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise _UnusableFileError(f"not a text file of at most {MAX_BYTES} bytes. Give a study file (*.yaml).")
        raw = path.read_bytes()
    except OSError as error:
        raise _UnusableFileError(f"cannot be read ({error.strerror}). Check the path and its permissions.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"not a text file: byte {error.start + 1} is not UTF-8. Give a study file (*.yaml)."
        raise _UnusableFileError(message) from error


def _parse(text: str) -> tuple[dict[str, object], LineNumbers, list[Problem]]:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True  # ruamel stops at the first; `_problems` names them all
    node = yaml.compose(text)
    if node is None:
        raise _UnusableFileError("the file is empty. Start from a copy of studies/quickstart.yaml.")
    lines: LineNumbers = {}
    problems = list(_problems(yaml, node, (), lines, ()))
    if problems:
        return {}, lines, problems
    data = yaml.constructor.construct_document(node)
    if not isinstance(data, dict):
        message = f"found {show(data)}; a study is a mapping (lines of `key: value`). Start from studies/quickstart.yaml."
        raise _UnusableFileError(message)
    return data, lines, []


def _problems(yaml: "YAML", node: "Node", path: KeyPath, lines: LineNumbers, above: tuple[int, ...]) -> Iterator[Problem]:
    """Note the lines of keys; yield a problem per repeated key, unreadable value and alias that contains itself."""
    from ruamel.yaml import MappingNode, ScalarNode, SequenceNode
    from ruamel.yaml.error import YAMLError

    place = f"line {node.start_mark.line + 1}"
    if id(node) in above:
        yield Problem(key_text(path), "this alias contains itself. Write the value out.", place)
        return
    if len(lines) > MAX_NODES:
        raise _UnusableFileError(
            f"it stands for more than {MAX_NODES} values, by aliases that repeat each other. Write out what you need."
        )
    lines.setdefault(path, node.start_mark.line + 1)
    above = (*above, id(node))
    if isinstance(node, ScalarNode) and node.style is None and _OTHER_INTEGER.fullmatch(node.value):
        yield Problem(key_text(path), _two_readings(node.value), place)
    # A tag without a constructor is an error of the whole file, with a place of its own.
    if isinstance(node, ScalarNode) and node.tag in yaml.constructor.yaml_constructors:
        try:
            yaml.constructor.construct_object(node)
        except (YAMLError, *_UNREADABLE):
            message = f"found {show(node.value)}, which is not what its form or its tag ({node.tag}) promises. "
            yield Problem(key_text(path), f"{message}Correct it, or put it in quotes to have it as a text.", place)
    if isinstance(node, SequenceNode):
        for index, inner in enumerate(node.value):
            yield from _problems(yaml, inner, (*path, index), lines, above)
    if isinstance(node, MappingNode):
        first: dict[str, int] = {}
        for key, inner in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                yield Problem(
                    key_text(path), "a key here is a list or a mapping. Write a text before the colon.", f"line {line}"
                )
                continue
            name = str(key.value)
            if name in first:
                message = f"this key stands twice, first on line {first[name]}. Keep one of them."
                yield Problem(key_text((*path, name)), message, f"line {line}")
            first.setdefault(name, line)
            lines[(*path, name)] = line
            yield from _problems(yaml, inner, (*path, name), lines, above)


def _two_readings(value: str) -> str:
    """Say what YAML 1.2 reads where 1.1, which many other programs read, has another integer."""
    digits = value.lstrip("+-")
    if digits.isdigit():
        reading = f"the number {int(value)}"
        remedy = f"Write {int(value)}"
    else:
        reading = "a text"
        plain = "" if ":" in value else f" ({int(value.replace('_', ''))})"
        remedy = f"Write the number as digits alone{plain}"
    return f"found {value}: YAML 1.2 reads {reading}, YAML 1.1 another number. {remedy}, or put a text in quotes."


def read_settings(texts: Sequence[str]) -> dict[str, object]:
    """Return the values of ``--set KEY=VALUE``, by key; values are YAML, as in a study file, and `NULL` for its null.

    A path is relative to the current directory where it starts with ``./``, ``../`` or ``~``.

    Raises:
        UserError: A text without a key, or whose value is no YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(part.isidentifier() for part in key.strip().split(".")):
            raise UserError(f"--set {text!r}: write KEY=VALUE with a key of the study file, for example search.trials=10")
        try:
            read = YAML(typ="safe", pure=True).load(value)
        except (YAMLError, RecursionError, *_UNREADABLE) as error:
            raise UserError(f"--set {text!r}: its value is not valid YAML ({first_line(error)}); put it in quotes") from error
        if isinstance(read, str) and read.startswith(("./", "../", "~")):
            read = str(Path(read).expanduser().resolve())
        found[key.strip()] = NULL if read is None else read
    return found


def with_settings(data: Mapping[str, object], given: Mapping[KeyPath, object]) -> dict[str, object]:
    """Return the content of a study file with other values of some keys."""
    result = dict(data)
    for path, value in given.items():
        holder = result
        for part in path[:-1]:
            inner = holder.get(str(part))
            # What is no section is reported by the checks, with its own key.
            if inner is not None and not isinstance(inner, Mapping):
                break
            holder[str(part)] = section = dict(inner or {})
            holder = section
        else:
            holder[str(path[-1])] = None if value is NULL else value
    return result


def line_of(parts: KeyPath, lines: LineNumbers) -> int:
    """Return the line of a key, or of the nearest section around it that is in the file."""
    return lines[parts] if parts in lines else line_of(parts[:-1], lines) if parts else 0


def place_of(parts: KeyPath, lines: LineNumbers, given: Mapping[KeyPath, object]) -> str:
    """Return where a key was given: the line, ``command line``, or an empty text."""
    if any(parts[:length] in given for length in range(1, len(parts) + 1)):  # a list or a section may be given, too
        return "command line"
    line = line_of(parts, lines)
    return f"line {line}" if line else ""


def travelling_content(data: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """Return what a study file contains with absolute paths; files of installed packages keep their names.

    Args:
        data: What the file contains.
        folder: What relative paths are relative to.
    """
    content, _ = absolute_paths(data, folder)
    given, model = data.get("model"), content.get("model")
    if isinstance(given, Mapping) and isinstance(model, dict):
        # Another machine has the package elsewhere.
        model |= {key: value for key, value in given.items() if isinstance(value, str) and value.startswith(PACKAGE)}
    return content


def quickstart_path() -> Path:
    """Return the quickstart study: in the checkout, else where an installed wheel puts its data files.

    Raises:
        UserError: It is in neither.
    """
    checkout = Path(__file__).resolve().parents[2] / "studies"
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = [Path(sysconfig.get_path("data", scheme)) / "share" / "uipe" / "studies" for scheme in schemes]
    for folder in (checkout, *installed):
        if (folder / "quickstart.yaml").is_file():
            return folder / "quickstart.yaml"
    raise UserError("The quickstart study is not installed. Give the path of a study file.")
