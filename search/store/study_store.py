"""Open a study on disk: its folder, its record, and its trials in Optuna. The driver is the only writer.

Points of the search space are trials of the study ``NAME``, controls of a second study, ``NAME.controls``: samplers and the
Pareto front of Optuna then see only what can be chosen.
"""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url

from search.problem.objectives import Objective, forget_quality_cap, reference_point
from search.problem.space import own_epoch, sampled_epoch
from search.problem.trial import TrialSpec, identity
from search.spec.redaction import without_password
from search.spec.study import StudySpec
from search.store.ask_tell import InMemoryStudy
from search.store.database import STORAGE_ERRORS, Database, open_storage, sqlite_file
from search.store.item_scores import ItemFiles
from search.store.record import (
    RECORD,
    RECORD_SCHEMA,
    StudyRecord,
    other_study,
    own_database,
    read_record,
    whole_storage,
)
from search.store.tracebacks import keep_traceback
from search.store.trials import TrialTable, evidence_table
from uipe_core.errors import UserError
from uipe_core.storage.files import is_free

STAGES = ("models", "base_runs", "baselines", "trials")
LOCK = ".lock"
LOCK_SECONDS = 1
"""How long a run waits for its folder: longer than a status command holds the lock."""

INTERRUPTED = "interrupted: the run that started this trial ended before it finished"


class StudyStore:
    """One study's folder and storage.

    Use `create` to run a study (it takes the folder's lock) and `open` to read one.
    """

    def __init__(self, out: Path, record: StudyRecord, database: Database, lock: FileLock | None = None) -> None:
        self.out = out
        self.record = record
        self.storage = database.optuna
        self._database = database
        self._items = ItemFiles(out)
        self._lock = lock
        self._points: TrialTable | None = None
        self._controls: TrialTable | None = None
        self._proposer: InMemoryStudy | None = None
        self.spec = record.study_spec
        self._methods = self.spec.methods()

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Objectives of the study, all maximised."""
        return self.spec.objectives

    @property
    def item_counts(self) -> dict[str, int]:
        """Number of items that trials are scored on, by evaluation set."""
        return self.record.corpus.items["select"]

    def reference_point(self) -> dict[str, float]:
        """Return the reference point of the hypervolume, by objective."""
        return reference_point(self.objectives, self.spec.hypervolume.reference_point.model_dump(), self.item_counts)

    def noise_ceiling(self, controls: pd.DataFrame) -> float:
        """Return the forget quality above which differences are noise (`search.problem.objectives.forget_quality_cap`)."""
        return forget_quality_cap(self.spec.hypervolume.forget_quality_cap, controls)

    @classmethod
    def create(cls, out: Path, spec: StudySpec, identity: str, facts: Mapping[str, Any]) -> "StudyStore":
        """Open the study in `out` to run it, or start it there.

        Args:
            out: Output folder; made if missing.
            spec: The study.
            identity: Its `fingerprint`.
            facts: Recorded next to the spec (corpus, models, versions).

        Raises:
            UserError: If the folder holds another study, is used by another driver, or cannot be written.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"output folder {out}: {error.strerror}; choose another with --out") from error
        lock = FileLock(out / LOCK)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(f"output folder {out}: another run of this study is under way; wait for it or stop it") from None
        try:
            record = read_record(out) if (out / RECORD).exists() else None
            if record is not None and record.fingerprint != identity:
                raise UserError(other_study(out, record, spec))
            if record is None and any(not path.name.startswith(".") for path in out.iterdir()):
                raise UserError(
                    f"output folder {out}: it is not empty and holds no study; choose another with --out or empty it"
                )
            url = own_database(out) if spec.storage is None else whole_storage(spec.storage)
            fresh = {
                "schema": RECORD_SCHEMA,
                "name": spec.name,
                "fingerprint": identity,
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "seconds": dict.fromkeys(STAGES, 0.0),
            }
            kept = fresh if record is None else record.as_dict()
            changing = {"spec": spec.model_dump(mode="json"), "storage": without_password(url), **facts}
            changing["spec"]["storage"] = None if spec.storage is None else without_password(spec.storage)
            current = StudyRecord.model_validate({**kept, **changing})
            # Before the database: a folder with a database and no record would be taken for another program's.
            current.save(out)
            try:
                store = cls(out, current, open_storage(url), lock)
                store._attach(create=True)
                if spec.storage is not None:
                    store._database.acquire_writer_lock(url, spec.name)
            except UserError:
                if record is None:
                    (out / RECORD).unlink()
                raise
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def open(cls, out: Path) -> "StudyStore":
        """Open a study to read it.

        The password of a storage URL is not recorded; give the whole URL in the environment variable UIPE_STORAGE.

        Raises:
            UserError: If the folder holds no study or its storage cannot be opened.
        """
        record = read_record(out)
        if record.spec.get("storage") is None:
            url = own_database(out)  # not the recorded place: the folder may have been moved or copied
        else:
            url = os.environ.get("UIPE_STORAGE") or record.storage
        database = sqlite_file(make_url(url)) if url.startswith("sqlite") else None
        if database is not None and not database.is_file():
            raise UserError(f"{out}: its trials ({database}) are missing; restore the file or run the study again")
        store = cls(out, record, open_storage(url))
        store._attach(create=False)
        return store

    def flush(self) -> None:
        """Wait until all item scores are on the disk.

        Raises:
            OSError: If some could not be written.
        """
        self._items.flush()

    def close(self) -> None:
        """Close the storage and release the folder."""
        self._items.close()
        self._database.close()
        if self._lock is not None:
            self._lock.release()

    @property
    def study(self) -> optuna.Study:
        """Optuna study of the points that can be chosen."""
        return self._table().study

    @property
    def controls(self) -> optuna.Study:
        """Optuna study of the controls."""
        return self._table(controls=True).study

    def use_sampler(self, sampler: optuna.samplers.BaseSampler) -> None:
        """Set the sampler that `ask_point` proposes with."""
        self._proposer = InMemoryStudy(self.study.directions, sampler, self.trials(names=()))

    def fail_orphaned_trials(self) -> int:
        """Fail the RUNNING and WAITING trials of an interrupted run; returns how many there were."""
        orphans = 0
        for table in (self._table(), self._table(controls=True)):
            for trial in table.read((TrialState.RUNNING, TrialState.WAITING), ()):
                table.end(trial.number, TrialState.FAIL, {"reason": INTERRUPTED})
                orphans += 1
        return orphans

    def end_running(self) -> None:
        """Fail the running trials of an interrupted run. Ask the database only once: the next run does it otherwise."""
        self._database.hurry()
        with contextlib.suppress(*STORAGE_ERRORS):
            self.fail_orphaned_trials()

    def ask_point(
        self, space: dict[str, BaseDistribution], params: Mapping[str, Any] | None = None, kind: str = "search"
    ) -> tuple[int, TrialSpec]:
        """Start a trial of a kind with given parameters; the sampler proposes the rest. Returns its number and what to score.

        Given parameters and jobs have the base run's own epoch; Optuna has the one of the flat space (`space.own_epoch`).
        """
        if self._proposer is None:
            self.use_sampler(self.study.sampler)
        assert self._proposer is not None
        counts = self.spec.base_epochs()
        longest = max(counts.values())
        given = None if params is None else dict(params)
        if given is not None and "epoch" in given:
            given["epoch"] = sampled_epoch(given["epoch"], longest, counts[given["base"]])
        asked, trial = self._proposer.ask(space, given)
        base = trial.params["base"]
        job = TrialSpec(kind, base, own_epoch(trial.params["epoch"], longest, counts[base]), trial.params["alpha"])
        trial.user_attrs = self.identity(job)
        number = self._table().begin(asked, trial)
        if number != asked:
            self.use_sampler(self._proposer.sampler)
        return number, job

    def ask_control(self, job: TrialSpec) -> int:
        """Start a trial of the controls study; returns its number."""
        return self._table(controls=True).begin_next(self.identity(job))

    def identity(self, job: TrialSpec) -> dict[str, Any]:
        """Return what a trial carries about what it is: kind, base run, method, epoch, alpha and the like."""
        return {name: value for name, value in identity(job, self._methods).items() if value is not None}

    def complete(self, job: TrialSpec, number: int, evidence: Mapping[str, Any], items: bytes | None = None) -> str | None:
        """Write item scores and evidence, then end the trial as COMPLETE with its values: none is complete without them.

        If an objective is missing or not finite, fail the trial instead and return the reason.
        """
        given = {objective.name: evidence.get(objective.name) for objective in self.objectives}
        values = {name: math.nan if value is None else float(value) for name, value in given.items()}
        if not all(math.isfinite(value) for value in values.values()):
            reason = f"objectives are not finite: {values}"
            self.fail(job, number, reason)
            return reason
        if items is not None:
            self._items.write(number, items, job.is_control)
        self._end(job.is_control, number, TrialState.COMPLETE, evidence, list(values.values()))
        return None

    def prune(self, number: int, evidence: Mapping[str, Any], items: bytes | None = None) -> None:
        """End a search trial as PRUNED, with the bound that pruned it (`search.evaluation.pruning`) and without values.

        Args:
            number: The trial.
            evidence: All that is known of it, the bound under ``pruned``.
            items: Its item scores of the stages that were scored.
        """
        if items is not None:
            self._items.write(number, items)
        self._end(False, number, TrialState.PRUNED, evidence)

    def fail(self, job: TrialSpec, number: int, reason: str, traceback: str = "") -> None:
        """End a trial as FAIL with its reason, and with the name of the file that keeps its traceback, if there is one."""
        control = job.is_control
        attributes = {"reason": reason}
        if traceback:
            attributes["traceback"] = keep_traceback(self.out, f"{'control' if control else 'trial'}-{number}", traceback)
        self._end(control, number, TrialState.FAIL, attributes)

    def items(self, number: int, control: bool = False) -> dict[str, NDArray[Any]] | None:
        """Return the per-item arrays of a complete trial by ``set/measurement``; None where it has none (older versions).

        A pruned trial has those of the stages that were scored.
        """
        return self._items.read(number, control)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage has taken over all runs, and save the record."""
        self.record.add_seconds(stage, seconds)
        self.save_record()

    def save_record(self) -> None:
        """Write the record atomically."""
        self.record.save(self.out)

    def trials(
        self,
        states: Collection[TrialState] | None = None,
        names: Collection[str] | None = None,
        controls: bool = False,
    ) -> Iterator[FrozenTrial]:
        """Yield trials by number, evidence among their user attributes; some hundred are in memory at a time.

        Args:
            states: Only those in these states.
            names: Only their user attributes of these names.
            controls: Those of the controls study.
        """
        return self._table(controls).read(states, names)

    def counts(self) -> dict[str, int]:
        """Return the number of trials by state."""
        states = [trial.state for trial in self.trials(names=())]
        names = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        return {**{name: states.count(state) for name, state in names.items()}, "running": states.count(TrialState.RUNNING)}

    def failures(self) -> list[dict[str, Any]]:
        """Return number and reason of every failed trial."""
        return [
            {"trial": trial.number, "reason": trial.user_attrs.get("reason", "unknown")}
            for trial in self.trials((TrialState.FAIL,), ("reason",))
        ]

    def trials_frame(self, names: Collection[str] | None = None) -> pd.DataFrame:
        """Return a row per complete trial with its objectives and its evidence; `names` limits the evidence."""
        return self._evidence_table(names)

    def pruned_frame(self, names: Collection[str] | None = None) -> pd.DataFrame:
        """Return a row per pruned trial with its evidence; ``pruned`` is the bound that pruned it."""
        names = None if names is None else {*names, "pruned"}
        pruned = self.trials((TrialState.PRUNED,), names)
        # Trials that another program pruned in a shared database have no bound.
        return pd.DataFrame([{"trial": trial.number, **trial.user_attrs} for trial in pruned if "pruned" in trial.user_attrs])

    def controls_frame(self) -> pd.DataFrame:
        """Return a row per complete trial of the controls study."""
        return self._evidence_table(controls=True)

    def _evidence_table(self, names: Collection[str] | None = None, controls: bool = False) -> pd.DataFrame:
        objectives = [objective.name for objective in self.objectives]
        return evidence_table(self.trials((TrialState.COMPLETE,), names, controls), objectives)

    def _table(self, controls: bool = False) -> TrialTable:
        table = self._controls if controls else self._points
        assert table is not None
        return table

    def _end(
        self,
        control: bool,
        number: int,
        state: TrialState,
        attributes: Mapping[str, Any],
        values: list[float] | None = None,
    ) -> None:
        self._table(control).end(number, state, attributes, values)
        if not control and self._proposer is not None:
            self._proposer.end(number, state, values)

    def _attach(self, create: bool) -> None:
        name, identity = self.record.name, self.record.fingerprint
        names = [objective.name for objective in self.objectives]
        opened = []
        for title in (name, f"{name}.controls"):
            try:
                if create:
                    study = optuna.create_study(
                        study_name=title,
                        storage=self.storage,
                        directions=["maximize"] * len(names),
                        load_if_exists=True,
                    )
                    if study.user_attrs.get("fingerprint", identity) != identity:
                        raise UserError(f"storage {self.record.storage}: it holds another study named {title!r}; rename one")
                    study.set_user_attr("fingerprint", identity)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", ExperimentalWarning)
                        study.set_metric_names(names)
                else:
                    study = optuna.load_study(study_name=title, storage=self.storage)
            except KeyError:
                raise UserError(f"{self.out}: its storage {self.record.storage} holds no study {title!r}") from None
            opened.append(TrialTable(self._database, study, self.record.storage))
        self._points, self._controls = opened


def is_running(out: Path) -> bool:
    """Return True if a driver is at work in a study's folder: it holds the folder's lock."""
    lock = out / LOCK
    try:
        return lock.exists() and not is_free(lock)
    except OSError:
        return False  # a folder that may only be read
