"""The record of a study beside its trials: what it is, where it is kept, and what makes it another study."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from search.spec.redaction import HIDDEN, without_password
from search.spec.study import RUNNING_KEYS, StudySpec
from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import write_atomic

RECORD = "study.json"
RECORD_SCHEMA = 1


RECORD_KEYS = ("name", "fingerprint", "created", "seconds", "spec", "storage", "corpus", "models", "versions")


def fingerprint(spec: StudySpec, corpus_hash: str, models: Mapping[str, str]) -> str:
    """Identity of a study: what it searches, on which items and which weights; 32 hexadecimal digits."""
    parts = {"schema": RECORD_SCHEMA, "spec": spec.fingerprint_payload(), "corpus": corpus_hash, "models": dict(models)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def whole_storage(url: str) -> str:
    """A storage URL that can be opened: where its password is hidden, UIPE_STORAGE has the whole.

    Raises:
        UserError: If it has not.
    """
    if HIDDEN not in url:
        return url
    whole = os.environ.get("UIPE_STORAGE", "")
    if not whole:
        raise UserError(
            f"storage: the password of {url} is not in the study file; start Ray on the head node with the whole URL in the "
            "environment variable UIPE_STORAGE (docs/clusters.md)"
        )
    if without_password(whole) != url:
        raise UserError(
            f"storage: UIPE_STORAGE is the URL of another storage ({without_password(whole)}, not {url}); correct one"
        )
    return whole


def own_database(out: Path) -> str:
    """URL of the database in a study's folder; SQLAlchemy quotes the path, which may hold what means something in a URL."""
    return URL.create("sqlite", database=str((out / "study.db").resolve())).render_as_string()


def save_record(out: Path, record: Mapping[str, Any]) -> None:
    try:
        write_atomic(out / RECORD, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise UserError(f"output folder {out}: {error.strerror}; free some space or choose another") from error


def read_record(out: Path) -> dict[str, Any]:
    """The record of a study folder.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    path = out / RECORD
    if not path.is_file():
        raise UserError(f"{out}: not a study folder (no {RECORD}); give the folder that `uipe run` wrote")
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder that can be read") from error
    except ValueError:
        raise UserError(f"{path}: not JSON; the record is damaged, so run the study into another folder") from None
    missing = [key for key in RECORD_KEYS if key not in record] if isinstance(record, dict) else list(RECORD_KEYS)
    if missing:
        raise UserError(f"{path}: not a record of a study (no {', '.join(missing)}); run the study into another folder")
    try:
        StudySpec.recorded(record["spec"])
    except ValueError as error:
        problem = first_line(error)
        raise UserError(
            f"{path}: its study is damaged or of another version ({problem}); run the study into another folder"
        ) from None
    return record


def other_study(out: Path, record: Mapping[str, Any], spec: StudySpec) -> str:
    old = StudySpec.recorded(record["spec"]).model_dump(mode="json")
    new = spec.model_dump(mode="json")
    old["search"]["trials"] = new["search"]["trials"]
    differing = [key for key in new if key not in RUNNING_KEYS and old[key] != new[key]]
    what = f"they differ in {', '.join(differing)}" if differing else "its corpus, model or code differ"
    return (
        f"output folder {out}: it holds another study ({record['name']!r}): {what}; choose another folder with --out, or give "
        "the study file it was started with"
    )
