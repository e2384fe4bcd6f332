"""Bundle a study for a cluster: its file and the small local inputs it names. Never weights, never a password."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.evaluation.inputs import check_inputs
from search.spec.corpora import path_sites
from search.spec.errors import without_password
from search.spec.sections import is_local
from search.spec.study import StudySpec, load_study
from search.spec.study_file import read_study_file, travelling_content, write_study_file
from uipe_core.errors import UserError

LIMIT_BYTES = 20 * 2**20
"""Upload limit. Ray keeps the upload in the head's memory, and refuses 100 MiB."""
STUDY_FILE = "study.yaml"
DIGITS = 8


@dataclass(frozen=True)
class JobBundle:
    """A study ready to be sent to a cluster.

    Attributes:
        spec: The study, with local paths.
        folder: The files to upload.
        identity: Hash of what identifies the study, its local inputs included.
        notes: Warnings for the user.
    """

    spec: StudySpec
    folder: Path
    identity: str
    notes: list[str]


def build_bundle(study: Path, folder: Path) -> JobBundle:
    """Check a study and its local inputs, and copy what must be uploaded into a folder.

    Logs of retain models (``*.json``), corpus files and corpus folders travel. Model folders, checkpoints, caches and earlier
    studies do not: they must be where they are on every node that needs them.

    Args:
        study: The study file.
        folder: An empty folder.

    Raises:
        UserError: If the study or an input is broken, a secret would travel, or it would be too much.
    """
    spec = load_study(study)
    notes = check_inputs(spec)
    data, _ = read_study_file(study)
    for where, text in _texts(data, ""):
        if where != "storage" and without_password(text) != text:
            raise UserError(f"{where}: a password would travel in this URL; give it to the nodes by their environment")
    content = travelling_content(data, study.resolve().parent)
    inputs = [(holder, key) for holder, key in _sources(content) if is_local(str(holder[key])) and _travels(holder[key])]
    _check_size({str(holder[key]) for holder, key in inputs})
    moved: dict[str, str] = {}
    for holder, key in inputs:
        value = str(holder[key])
        if value not in moved:
            place = folder / "inputs" / f"{len(moved)}-{Path(value).name}"
            _copy(Path(value), place)
            moved[value] = f"./{place.relative_to(folder)}"
        holder[key] = moved[value]
    notes += [f"{key}: {value} does not travel; every node must see it there" for key, value in _staying(content)]
    notes += _hide_storage(content)
    write_study_file(folder / STUDY_FILE, content)
    # Caches and earlier studies may change from run to run.
    stays = sorted(entry for entry in _staying(content) if entry[0].startswith(("model.", "checkpoints.")))
    parts = {"study": spec.fingerprint_payload(), "inputs": _hashes(folder / "inputs"), "stays": stays}
    return JobBundle(spec, folder, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), notes)


def submission_id(bundle: JobBundle, out: str) -> str:
    """Return the id of the study's first job, which follows from the study and its output folder."""
    return f"{bundle.spec.name}-{hashlib.sha256(f'{bundle.identity} {out}'.encode()).hexdigest()[:DIGITS]}"


def _sources(content: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where a study's content names files or folders that may travel: the holder and its key."""
    corpus, model = content["corpus"], content["model"]
    for parts, holder, _ in path_sites(corpus):
        yield holder, parts[-1]
    for key in ("retain", "never_finetuned"):
        if isinstance(model.get(key), str):  # of a model that is fine-tuned, `retain` is a switch
            yield model, key
    others = model.get("other_retain") or []
    for place in range(len(others)):
        yield others, place


def _travels(value: Any) -> bool:
    """Return True for local inputs that are small by their kind: all but models."""
    path = Path(str(value))
    return path.is_file() or not (path / "config.json").is_file()


def _staying(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return keys and paths of inputs that are not uploaded."""
    model, cache = content["model"], content.get("cache") or {}
    named = [(f"model.{key}", model.get(key)) for key in ("initial", "base", "retain", "never_finetuned")]
    named += [(f"model.other_retain[{place}]", value) for place, value in enumerate(model.get("other_retain") or [])]
    named += [(f"cache.{key}", cache.get(key)) for key in ("models", "deltas")]
    for label, folders in (content.get("checkpoints") or {}).items():
        named += [(f"checkpoints.{label}[{place}]", value) for place, value in enumerate(folders)]
    named += [(f"warm_start[{place}]", value) for place, value in enumerate(content.get("warm_start") or [])]
    return [(key, str(value)) for key, value in named if value and Path(str(value)).is_absolute()]


def _hide_storage(content: dict[str, Any]) -> list[str]:
    url = content.get("storage")
    if url is None:
        return []
    content["storage"] = without_password(url)
    if content["storage"] == url:
        return []
    return [
        "storage: its password stays here; pass the whole URL with --pass-env UIPE_STORAGE, or the head node needs it in its "
        "environment (docs/clusters.md says how)"
    ]


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{index}]")


def _files(path: Path) -> Iterator[Path]:
    """Yield the files of a folder, in order; or the file itself."""
    if not path.is_dir():
        yield path
        return
    for folder, names, files in os.walk(path, followlinks=True):
        names.sort()
        yield from (Path(folder, name) for name in sorted(files))


def _copy(source: Path, place: Path) -> None:
    try:
        place.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copyfile(source, place)
    except OSError as error:
        raise UserError(
            f"{source}: cannot be copied to travel ({type(error).__name__}: {error}); correct its permissions"
        ) from error


def _check_size(places: set[str]) -> None:
    """Refuse inputs that are too large, before anything is copied."""
    sizes = {}
    for place in sorted(places):
        total = 0
        for path in _files(Path(place)):
            total += path.stat().st_size
            if total > LIMIT_BYTES:
                break
        sizes[place] = total
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = max(sizes, key=lambda place: sizes[place])
        raise UserError(
            f"{largest}: with it more than {LIMIT_BYTES // 2**20} MiB would travel to the cluster; name a hub data set, or put "
            "the data on the head node and start the study there with `uipe run --address auto`"
        )


def _hashes(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder)}
