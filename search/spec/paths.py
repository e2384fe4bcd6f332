"""Make the paths of a study absolute, and find those that lead nowhere."""

import copy
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from search.spec.corpora import path_sites
from search.spec.errors import KeyPath, show, without_password
from search.spec.sections import PACKAGE
from uipe_core.corpora.files import SUFFIXES, TEXTS

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")

MODEL_FILES = {"initial": (".gguf",), "base": (".gguf",), "retain": (".json",), "never_finetuned": (".json",)}
"""Keys of section ``model`` that name a model, and the endings of files allowed there in place of a folder."""


def absolute_paths(data: Mapping[str, object], folder: Path) -> tuple[dict[str, object], list[tuple[KeyPath, str]]]:
    """Make the paths of a study absolute; return it with a message for each path that does not exist.

    A value of a key that names a model or a data set (`search.spec.corpora.path_sites`) is a path when it starts with
    ``./``, ``../``, ``/`` or ``~``, ends as a data file does, cannot be a hub name, or names what is next to the study
    file. ``package:NAME/FILE`` is a file of an installed package. Everything else is a hub name, which is not looked up. A
    cache is always a path, and need not exist. The studies of ``warm_start`` are always folders.
    An address of MLflow without a colon is a path.
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
    tasks = _text_at(result, "lm_eval", "include_path")
    if tasks is not None:
        _replace(result, "lm_eval", "include_path", str(_join(folder, tasks)))
    for key in ("models", "deltas"):
        value = _text_at(result, "cache", key)
        if value is not None and "://" not in value:
            _replace(result, "cache", key, str(_join(folder, value)))
    tracking = result.get("tracking")
    if isinstance(tracking, dict) and (uri := _text_at(tracking, "mlflow", "uri")) is not None and ":" not in uri:
        result["tracking"] = tracking = dict(tracking)
        _replace(tracking, "mlflow", "uri", uri if uri == "databricks" else str(_join(folder, uri)))
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
        return value, ""  # another machine may have it: `search.spec.models.model_place` refuses it where it is needed
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
