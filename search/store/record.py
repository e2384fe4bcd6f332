"""The record of a study next to its trials (``study.json``): what it is, where it is kept, and what its runs used."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.spec.errors import HIDDEN, without_password
from search.spec.study import RUNNING_KEYS, StudySpec
from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import read_json, write_atomic

RECORD = "study.json"
RECORD_SCHEMA = 1
STAGES = ("models", "references", "training", "given", "trials")
"""Stages of a run whose time is recorded."""

RECORD_KEYS = ("name", "fingerprint", "created", "seconds", "spec", "storage", "corpus", "models", "versions")
"""Keys that every record has."""


class _Part(BaseModel):
    """Part of a record. Keys that it does not know are kept, so that newer versions' records survive."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)


class CorpusRecord(_Part):
    """Record of the corpus.

    Attributes:
        name, hash: Of the corpus.
        sets: Item-set hash by evaluation set.
        items: Number of items by half (``select``, ``report``) and evaluation set.
        groups: Per evaluation set, the person or author of each item; None where it has none.
        stand_ins: What evaluation sets lack, so that something else stands in (`search.problem.stand_ins`).
    """

    name: str = ""
    hash: str = ""
    sets: dict[str, str] = Field(default_factory=dict)
    items: dict[str, dict[str, int]] = Field(default_factory=dict)
    groups: dict[str, list[str | None]] = Field(default_factory=dict)
    stand_ins: dict[str, list[str]] = Field(default_factory=dict)


class BaseRunRecord(_Part):
    """Record of a base run: its key in the delta store, and the numbers of each epoch."""

    delta: str
    epochs: list[dict[str, Any]]


class StudyRecord(_Part):
    """The record of a study.

    Attributes:
        name, fingerprint, created: Its name, its identity, when it began (ISO 8601).
        seconds: Time that each stage has taken over all runs. Older records have ``base_runs`` and ``baselines``, in which
            scoring and training are mixed.
        spec: The study file as it was checked (`study_spec`).
        storage: URL of its database, without password.
        corpus: The corpus.
        models: Identity of each model by name.
        checkpoints: Identities of given checkpoints by label.
        versions: Of Python and packages.
        base_runs: Finished base runs by label.
        failed_base_runs: Reasons by label.
        usage: What all runs together used; None before the first has ended.
        stopped: Why the last run ended early; None if it did not.
    """

    schema_version: int = Field(RECORD_SCHEMA, alias="schema")
    name: str
    fingerprint: str
    created: str
    seconds: dict[str, float]
    spec: dict[str, Any]
    storage: str
    corpus: CorpusRecord = Field(default_factory=CorpusRecord)
    models: dict[str, str] = Field(default_factory=dict)
    checkpoints: dict[str, list[str]] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    base_runs: dict[str, BaseRunRecord] = Field(default_factory=dict)
    failed_base_runs: dict[str, str] = Field(default_factory=dict)
    usage: dict[str, float] | None = None
    stopped: str | None = None

    @cached_property
    def study_spec(self) -> StudySpec:
        """The study's spec, validated once."""
        return StudySpec.recorded(self.spec)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values: what was read or set, and no more."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def save(self, out: Path) -> None:
        """Write the record into a study's folder, atomically.

        Raises:
            UserError: If it cannot be written.
        """
        try:
            write_atomic(out / RECORD, json.dumps(self.as_dict(), indent=1).encode())
        except OSError as error:
            raise UserError(f"output folder {out}: {error.strerror}; free some space or choose another") from error

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage has taken over all runs."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 3)

    def note_base_run(self, label: str, delta: str, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Record a finished base run."""
        run = BaseRunRecord(delta=delta, epochs=[dict(epoch) for epoch in epochs])
        self.base_runs = {**self.base_runs, label: run}
        self.failed_base_runs = {name: reason for name, reason in self.failed_base_runs.items() if name != label}

    def note_failed_base_run(self, label: str, reason: str) -> None:
        """Record why a base run failed."""
        self.failed_base_runs = {**self.failed_base_runs, label: reason}

    def set_usage(self, usage: Mapping[str, float]) -> None:
        """Record what all runs together used."""
        self.usage = {name: round(value, 6) for name, value in usage.items()}

    def set_stopped(self, reason: str | None) -> bool:
        """Record why the study ended early, None if it did not; returns whether that is news."""
        changed = reason != self.stopped
        if changed:
            self.stopped = reason
        return changed


def fingerprint(spec: StudySpec, corpus_hash: str, models: Mapping[str, str]) -> str:
    """Return the identity of a study: what it searches, on which items and weights; 32 hexadecimal digits."""
    parts = {"schema": RECORD_SCHEMA, "spec": spec.fingerprint_payload(), "corpus": corpus_hash, "models": dict(models)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def whole_storage(url: str) -> str:
    """Return a storage URL that can be opened: the one in UIPE_STORAGE where its password is hidden.

    Raises:
        UserError: If UIPE_STORAGE is not set or names another storage.
    """
    if HIDDEN not in url:
        return url
    whole = os.environ.get("UIPE_STORAGE", "")
    if not whole:
        raise UserError(
            f"storage: the password of {url} is not in the study file; submit it with --pass-env UIPE_STORAGE, or start Ray "
            "on the head node with the whole URL in that variable (docs/clusters.md)"
        )
    if without_password(whole) != url:
        raise UserError(
            f"storage: UIPE_STORAGE is the URL of another storage ({without_password(whole)}, not {url}); correct one"
        )
    return whole


def renewed_record(
    record: StudyRecord | None, spec: StudySpec, identity: str, url: str, facts: Mapping[str, Any]
) -> StudyRecord:
    """Return the record of a run: a new one, or the earlier run's with this run's spec, storage and facts.

    Args:
        record: The earlier run's.
        spec: The study.
        identity: Its fingerprint.
        url: Its storage, with the password, which is not recorded.
        facts: Recorded next to the spec (corpus, models, versions).
    """
    fresh = {
        "schema": RECORD_SCHEMA,
        "name": spec.name,
        "fingerprint": identity,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": dict.fromkeys(STAGES, 0.0),
    }
    kept = fresh if record is None else record.as_dict()
    # Every hyperparameter is named: a default may change, a study may not.
    changing = {"spec": spec.continuing(None).model_dump(mode="json"), "storage": without_password(url), **facts}
    changing["spec"]["storage"] = None if spec.storage is None else without_password(spec.storage)
    return StudyRecord.model_validate({**kept, **changing})


def own_database(out: Path) -> str:
    """Return the URL of the database in a study's folder, with its path quoted."""
    # As SQLAlchemy renders it; its import would take a third of the time of a status.
    return f"sqlite:///{quote(str((out / 'study.db').resolve()), safe=' +/')}"


def read_record(out: Path) -> StudyRecord:
    """Read the record of a study folder.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    path = out / RECORD
    if not path.is_file():
        raise UserError(f"{out}: not a study folder (no {RECORD}); give the folder that `uipe run` wrote")
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder that can be read") from error
    except ValueError:
        raise UserError(f"{path}: not JSON; the record is damaged, so run the study into another folder") from None
    missing = [key for key in RECORD_KEYS if key not in content] if isinstance(content, dict) else list(RECORD_KEYS)
    if missing:
        raise UserError(f"{path}: not a record of a study (no {', '.join(missing)}); run the study into another folder")
    try:
        record = StudyRecord.model_validate(content)
    except ValidationError as error:
        wrong = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(
            f"{path}: {wrong}: {error.errors()[0]['msg']}; the record is damaged, so run the study into another folder"
        ) from None
    try:
        _ = record.study_spec
    except ValidationError as error:
        raise UserError(
            f"{path}: its study is damaged or of another version ({first_line(error)}); run the study into another folder"
        ) from None
    return record


def other_study(out: Path, record: StudyRecord, spec: StudySpec) -> str:
    """Return the refusal of a folder that holds another study, with the sections that differ."""
    old = record.study_spec.model_dump(mode="json")
    new = spec.model_dump(mode="json")
    old["search"]["trials"] = new["search"]["trials"]
    differing = [key for key in new if key not in RUNNING_KEYS and old[key] != new[key]]
    what = f"they differ in {', '.join(differing)}" if differing else "its corpus, model or code differ"
    return (
        f"output folder {out}: it holds another study ({record.name!r}): {what}; choose another folder with --out, or give "
        "the study file it was started with"
    )
