"""Read a study file into plain data with line numbers, and make its paths absolute."""

import copy
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from search.spec.corpora import path_sites
from search.spec.errors import KeyPath, Problem, StudyFileError, key_text, show
from search.spec.redaction import without_password
from uipe_core.corpora.files import SUFFIXES, TEXTS
from uipe_core.errors import first_line

if TYPE_CHECKING:
    from ruamel.yaml import YAML, Node

LineNumbers = dict[KeyPath, int]
"""Line of every key and list entry, counted from 1."""

MAX_BYTES = 2**20
"""A study file is a few kilobytes; the limit keeps a mistyped path to a weights file from being read whole."""

MAX_NODES = 100_000
"""Keys and values of a study with every alias written out: a few lines of aliases can stand for billions."""

_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)
"""What the parser raises where a value is not what its tag or its form promises: ``!!bool maybe``, ``2026-99-99``."""

_OTHER_INTEGER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*_[0-9_]*|[0-9][0-9_]*(:[0-5]?[0-9])+)")
"""Plain scalars that YAML 1.1 reads as another integer than YAML 1.2: octal, with underscores, in base 60."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


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


MODEL_FILES = {"initial": (".gguf",), "base": (".gguf",), "retain": (".json",), "never_finetuned": (".json",)}
"""Keys of section ``model`` that name a model, and the endings of files allowed there in place of a folder."""

PACKAGE = "package:"
"""Begins the place of a file that an installed Python package brings along: ``package:NAME/FILE``."""


def absolute_paths(data: Mapping[str, object], folder: Path) -> tuple[dict[str, object], list[tuple[KeyPath, str]]]:
    """Make the paths of a study absolute; return it with a message for each path that does not exist.

    A value of a key that names a model or a data set (`search.spec.corpora.path_sites`) is a path when it starts with
    ``./``, ``../``, ``/`` or ``~``, ends as a data file does, cannot be a hub name, or names what is next to the study
    file. ``package:NAME/FILE`` is a file of an installed package. Everything else is a hub name, which is not looked up. A
    cache is always a path, and need not exist. The studies of ``warm_start`` are always folders.
    Checkpoints are always folders; one that holds ``checkpoint-*`` folders of a trainer stands for these, in the order of
    their steps.

    Args:
        data: The study as read.
        folder: What relative paths are relative to: the folder of the study file.
    """
    result = dict(data)
    problems: list[tuple[KeyPath, str]] = []
    for key, model_endings in MODEL_FILES.items():
        value = _text_at(result, "model", key)
        if value is not None:
            local, problem = _located("model", value, folder, file_endings=model_endings)
            _replace(result, "model", key, local)
            problems += [(("model", key), problem)] if problem else []
    corpus = copy.deepcopy(result.get("corpus"))
    if isinstance(corpus, dict):
        result["corpus"] = corpus
        for parts, holder, endings in path_sites(corpus):
            name = str(parts[-1])
            local, problem = _located(str(corpus["kind"]), holder[name], folder, file_endings=endings)
            holder[name] = local
            problems += [(("corpus", *parts), problem)] if problem else []
    model = result.get("model")
    others = model.get("other_retain") if isinstance(model, dict) else None
    if isinstance(others, list) and all(isinstance(value, str) and value for value in others):
        located = [_located("model", value, folder, file_endings=(".json",)) for value in others]
        _replace(result, "model", "other_retain", [local for local, _ in located])
        problems += [(("model", "other_retain", place), text) for place, (_, text) in enumerate(located) if text]
    for key in ("models", "deltas"):
        value = _text_at(result, "cache", key)
        if value is not None and "://" not in value:
            _replace(result, "cache", key, str(_join(folder, value)))
    earlier = result.get("warm_start")
    if isinstance(earlier, str) and earlier:
        earlier = [earlier]
    if isinstance(earlier, list) and all(isinstance(value, str) and value for value in earlier):
        places = [_join(folder, value) for value in earlier]
        result["warm_start"] = [str(place) for place in places]
        remedy = "Correct the path (it is relative to the study file), or remove it."
        problems += [
            (("warm_start", number), without_password(f"found {earlier[number]!r}; there is no folder {place}. {remedy}"))
            for number, place in enumerate(places)
            if not _exists(place, file=False)
        ]
    given = result.get("checkpoints")
    if isinstance(given, dict):
        result["checkpoints"] = {label: _checkpoints(label, value, folder, problems) for label, value in given.items()}
    return result, problems


def _checkpoints(label: object, value: object, folder: Path, problems: list[tuple[KeyPath, str]]) -> object:
    """Make the checkpoints of a base run absolute paths or hub names; what is no text is left to later checks."""
    from uipe_core.deltas.checkpoints import checkpoint_folders  # torch comes with it, and most studies need none of it

    key: KeyPath = ("checkpoints", str(label))
    if isinstance(value, str) and value:
        path = _local_path(value, folder)
        if path is None:
            return [value]
        if not _exists(path, file=False):
            problems.append((key, _missing("checkpoints", value, path, "folder")))
            return [str(path)]
        # The folder of a trainer may hold the last model too, which is its last checkpoint over again.
        return [str(inner) for inner in checkpoint_folders(path)] or [str(path)]
    if not isinstance(value, list | tuple):
        return value
    found: list[object] = []
    for place, entry in enumerate(value):
        if not isinstance(entry, str) or not entry:
            found.append(entry)
            continue
        path = _local_path(entry, folder)
        if path is not None and not _exists(path, file=False):
            problems.append(((*key, place), _missing("checkpoints", entry, path, "folder")))
        found.append(entry if path is None else str(path))
    return found


def _text_at(data: Mapping[str, object], section: str, key: str) -> str | None:
    inner = data.get(section)
    value = inner.get(key) if isinstance(inner, dict) else None
    return value if isinstance(value, str) and value else None


def _located(section: str, value: str, folder: Path, file_endings: tuple[str, ...]) -> tuple[str, str]:
    """Make a value an absolute path, where it is a path; return it with what is wrong, or an empty text.

    A path is a folder, or a file where it ends in one of `file_endings`.
    """
    if value.startswith(PACKAGE):
        return _of_package(value)
    local = _local_path(value, folder)
    if local is None:
        return value, ""
    is_file = local.suffix in file_endings
    if _exists(local, file=is_file):
        return str(local), ""
    if file_endings and not is_file and _exists(local, file=True):
        allowed = f"files here end in {', '.join(file_endings)}"
        return str(local), without_password(f"found {show(value)}; {allowed}. Give such a file, or a folder.")
    return str(local), _missing(section, value, local, "file" if is_file else "folder")


def _of_package(value: str) -> tuple[str, str]:
    """Return the path of a file of an installed package, with what is wrong."""
    name, _, inner = value.removeprefix(PACKAGE).partition("/")
    try:
        # Found without importing it: what it needs to run may be missing.
        found = find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        return value, f"found {show(value)}; there is no installed package {name!r}. Install it with pip, or give a path."
    path = Path(found.origin).parent / inner
    if not inner or ".." in Path(inner).parts or not _exists(path, file=True):
        return value, f"found {show(value)}; the package {name} has no file {inner!r}. Install another version, or give a path."
    return str(path), ""


def _replace(data: dict[str, object], section: str, key: str, value: object) -> None:
    inner = data[section]
    if isinstance(inner, dict):
        data[section] = {**inner, key: value}


def _join(folder: Path, value: str) -> Path:
    try:
        return (folder / Path(value).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError):
        return folder.absolute() / value


def _exists(path: Path, *, file: bool) -> bool:
    try:
        return path.is_file() if file else path.is_dir()
    except (OSError, ValueError):
        return False


def _local_path(value: str, folder: Path) -> Path | None:
    path = _join(folder, value)
    marked = value.startswith(("./", "../", "/", "~")) or value.endswith((*SUFFIXES, *TEXTS, ".gguf"))
    is_path = marked or not _HUB_NAME.fullmatch(value) or _exists(path, file=False) or _exists(path, file=True)
    return path if is_path else None


def _missing(section: str, value: str, path: Path, what: str) -> str:
    remedy = "Correct the path (it is relative to the study file), or give a hub name."
    if section == "tofu":
        command = f"hf download locuslab/TOFU --repo-type dataset --local-dir {path}"
        remedy = f"Put the TOFU files there (`{command}`), correct the path, or write locuslab/TOFU to use the hub."
    return without_password(f"found {show(value)}; there is no {what} {path}. {remedy}")
