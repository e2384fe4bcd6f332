"""Open a study on disk: its folder, its record, and its trials in Optuna. The driver is the only writer.

Points of the search space are trials of the study ``NAME``, controls of a second study, ``NAME.controls``: samplers and the
Pareto front of Optuna then see only what can be chosen.
"""

import contextlib
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock
from numpy.typing import NDArray
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from search.problem.hypervolume import forget_quality_cap, reference_point
from search.problem.objectives import Objective
from search.problem.space import in_flat_space, own_point
from search.problem.trial import TrialSpec, identity
from search.spec.errors import without_password
from search.spec.study import StudySpec
from search.store import optuna_compat
from search.store.ask_tell import InMemoryStudy
from search.store.folder import keep_traceback, take_folder
from search.store.item_scores import ITEMS_HASH, ItemFiles
from search.store.record import RECORD, StudyRecord, other_study, own_database, read_record, renewed_record, whole_storage
from search.store.sqlite_reading import SQLiteFile, open_to_read, storage_url
from search.store.trials import INTERRUPTED, TrialReader, TrialTable, evidence_table, is_interrupted
from uipe_core.errors import UserError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    from search.store.database import Database


class StudyStore:
    """One study's folder and storage.

    Use `create` to run a study (it takes the folder's lock) and `open` to read one. `source` is its open database.
    """

    def __init__(self, out: Path, record: StudyRecord, source: "Database | SQLiteFile", lock: FileLock | None = None) -> None:
        self.out = out
        self.record = record
        self.source = source
        self._items = ItemFiles(out)
        self._lock = lock
        self._proposer: InMemoryStudy | None = None
        self.least_utility: float | None = None
        """What the utility of a trial must reach to be feasible, where the study has a floor; a run sets it."""
        self.spec = record.study_spec
        self._methods = self.spec.methods()

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Objectives of the study, all maximised."""
        return self.spec.maximised

    @property
    def item_counts(self) -> dict[str, int]:
        """Number of items that trials are scored on, by evaluation set."""
        return self.record.corpus.items["select"]

    def reference_point(self) -> dict[str, float]:
        """Return the reference point of the hypervolume, by objective."""
        return reference_point(self.objectives, self.spec.hypervolume.reference_point.model_dump(), self.item_counts)

    def noise_ceiling(self, controls: pd.DataFrame) -> float:
        """Return the forget quality above which differences are noise (`search.problem.hypervolume.forget_quality_cap`)."""
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
        from search.store.database import STORAGE_ERRORS, explain_storage_error, open_storage

        lock = take_folder(out)
        try:
            record = read_record(out) if (out / RECORD).exists() else None
            if record is not None and record.fingerprint != identity:
                raise UserError(other_study(out, record, spec))
            if record is None and any(not path.name.startswith(".") for path in out.iterdir()):
                raise UserError(
                    f"output folder {out}: it is not empty and holds no study; choose another with --out or empty it"
                )
            url = own_database(out) if spec.storage is None else whole_storage(spec.storage)
            current = renewed_record(record, spec, identity, url, facts)
            # Before the database: a folder with a database and no record would be taken for another program's.
            current.save(out)
            try:
                database = open_storage(url)
                store = cls(out, current, database, lock)
                store._begin(database)
                if spec.storage is not None:
                    database.acquire_writer_lock(url, spec.name)
            except (UserError, *STORAGE_ERRORS) as error:
                if record is None:
                    (out / RECORD).unlink()
                said = (
                    f"storage {current.storage}: {explain_storage_error(error, url)}; `uipe doctor {out}` says what is damaged"
                )
                raise error if isinstance(error, UserError) else UserError(said) from None
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
        store = cls(out, record, open_to_read(out, record))
        _ = store.study_ids
        return store

    def flush(self) -> None:
        """Wait until all item scores are on the disk; raise OSError if some could not be written."""
        self._items.flush()

    def close(self) -> None:
        """Close the storage and release the folder."""
        self._items.close()
        self.source.close()
        if isinstance(self.source, SQLiteFile) and "_database" in self.__dict__:
            self._database.close()
        if self._lock is not None:
            self._lock.release()

    @cached_property
    def storage(self) -> "BaseStorage":
        """Optuna's storage of the trials."""
        return self._database.optuna

    @cached_property
    def study(self) -> "optuna.Study":
        """Optuna study of the points that can be chosen."""
        import optuna

        return optuna.load_study(study_name=self._titles()[0], storage=self.storage)

    @cached_property
    def controls(self) -> "optuna.Study":
        """Optuna study of the controls."""
        import optuna

        return optuna.load_study(study_name=self._titles()[1], storage=self.storage)

    def use_sampler(self, sampler: "BaseSampler") -> None:
        """Set the sampler that `ask_point` proposes with."""
        self._proposer = InMemoryStudy(self.study.directions, sampler, self.trials(names=()))

    def fail_orphaned_trials(self) -> int:
        """Fail the RUNNING and WAITING trials of an interrupted run; returns how many there were."""
        orphans = 0
        for table in self._tables:
            for trial in table.trials.read((TrialState.RUNNING, TrialState.WAITING), ()):
                table.end(trial.number, TrialState.FAIL, {"reason": INTERRUPTED})
                orphans += 1
        return orphans

    def end_running(self) -> None:
        """Fail the running trials of an interrupted run. Ask the database only once: the next run does it otherwise."""
        from search.store.database import STORAGE_ERRORS

        self._database.hurry()
        with contextlib.suppress(*STORAGE_ERRORS):
            self.fail_orphaned_trials()

    def ask_point(
        self, space: "dict[str, BaseDistribution]", params: Mapping[str, Any] | None = None, kind: str = "search"
    ) -> tuple[int, TrialSpec]:
        """Start a trial of a kind with given parameters; the sampler proposes the rest. Returns its number and what to score.

        Given parameters and jobs have the base run's own epoch and alpha; Optuna has those of the flat space
        (`search.problem.space.in_flat_space`).
        """
        if self._proposer is None:
            self.use_sampler(self.study.sampler)
        assert self._proposer is not None
        flat = self.spec.base_epochs(), self.spec.search.alpha.ends, self.spec.alpha_ranges()
        asked, trial = self._proposer.ask(space, None if params is None else in_flat_space(params, *flat))
        point = own_point(trial.params, *flat)
        # There and back alpha may differ in the last digit.
        alpha = point.alpha if params is None else params.get("alpha", point.alpha)
        job = TrialSpec(kind, point.base, point.epoch, alpha)
        trial.user_attrs = self.identity(job)
        number = self._tables[False].begin(asked, trial)
        if number != asked:
            self.use_sampler(self._proposer.sampler)
        return number, job

    def ask_control(self, job: TrialSpec) -> int:
        """Start a trial of the controls study; returns its number."""
        return self._tables[True].begin_next(self.identity(job))

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
        self._end(job.is_control, number, TrialState.COMPLETE, evidence, list(values.values()), items)
        return None

    def prune(self, job: TrialSpec, number: int, evidence: Mapping[str, Any], items: bytes | None = None) -> None:
        """End a trial as PRUNED: it has no values, and none is made up.

        Args:
            job: What was scored: a point that a rival dominates (`search.evaluation.pruning`), the bound under ``pruned``; or
                a control that measured something else than the objectives. The fronts of Optuna and its dashboard then hold
                no second copy of the model that it is about.
            number: The trial.
            evidence: All that is known of it.
            items: Item scores of the stages that were scored.
        """
        self._end(job.is_control, number, TrialState.PRUNED, evidence, items=items)

    def fail(self, job: TrialSpec, number: int, reason: str, traceback: str = "") -> None:
        """End a trial as FAIL with its reason, and with the name of the file that keeps its traceback, if there is one."""
        attributes = {"reason": reason}
        if traceback:
            name = f"{'control' if job.is_control else 'trial'}-{number}"
            attributes["traceback"] = keep_traceback(self.out, name, traceback)
        self._end(job.is_control, number, TrialState.FAIL, attributes)

    def items(self, number: int, control: bool = False, item_set: str | None = None) -> dict[str, NDArray[Any]] | None:
        """Return the per-item arrays of a complete trial by ``set/measurement``, of one set if it is named; None where it has
        none (older versions).

        A pruned trial has those of the stages that were scored. The set ``texts`` has a few answers of each set as text.
        """
        return self._items.read(number, control, item_set)

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
        return self._readers[controls].read(states, names)

    def counts(self) -> dict[str, int]:
        """Return the number of trials by state; those that the end of a run interrupted are counted apart from failures."""
        trials = list(self.trials(names=("reason",)))
        states = [trial.state for trial in trials]
        interrupted = sum(map(is_interrupted, trials))
        return {
            "complete": states.count(TrialState.COMPLETE),
            "pruned": states.count(TrialState.PRUNED),
            "failed": states.count(TrialState.FAIL) - interrupted,
            "interrupted": interrupted,
            "running": states.count(TrialState.RUNNING),
        }

    def failures(self) -> list[dict[str, Any]]:
        """Return number and reason of every failed trial, interrupted ones aside."""
        return [
            {"trial": trial.number, "reason": trial.user_attrs.get("reason", "unknown")}
            for trial in self.trials((TrialState.FAIL,), ("reason",))
            if not is_interrupted(trial)
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
        """Return a row per complete trial of the controls study, and per one that measured something else (`prune`)."""
        return self._evidence_table(controls=True)

    def _evidence_table(self, names: Collection[str] | None = None, controls: bool = False) -> pd.DataFrame:
        objectives = [objective.name for objective in self.objectives]
        states = (TrialState.COMPLETE, TrialState.PRUNED) if controls else (TrialState.COMPLETE,)
        return evidence_table(self.trials(states, names, controls), objectives, names, controls)

    @property
    def _place(self) -> str:  # a folder that was moved or copied is not where its record says
        return without_password(storage_url(self.out, self.record))

    def _titles(self) -> tuple[str, str]:
        return self.record.name, f"{self.record.name}.controls"

    @cached_property
    def study_ids(self) -> tuple[int, ...]:
        """Ids of the study and of its controls; a UserError where the storage lacks one."""
        found = {title: optuna_compat.find_study(self.source.rows, title) for title in self._titles()}
        for title, identifier in found.items():
            if identifier is None:
                raise UserError(f"{self.out}: its storage {self._place} holds no study {title!r}")
        return tuple(identifier for identifier in found.values() if identifier is not None)

    @cached_property
    def _readers(self) -> list[TrialReader]:
        return [TrialReader(self.source.rows, identifier) for identifier in self.study_ids]

    @cached_property
    def _tables(self) -> list[TrialTable]:
        return [TrialTable(self._database, identifier, self._place) for identifier in self.study_ids]

    @cached_property
    def _database(self) -> "Database":
        """The database as Optuna opens it; what only reads trials does without."""
        if not isinstance(self.source, SQLiteFile):
            return self.source
        from search.store.database import open_storage

        return open_storage(storage_url(self.out, self.record))

    def _end(
        self,
        control: bool,
        number: int,
        state: TrialState,
        attributes: Mapping[str, Any],
        values: list[float] | None = None,
        items: bytes | None = None,
    ) -> None:
        if items is not None:
            attributes = {**attributes, ITEMS_HASH: self._items.write(number, items, control)}
        missing = None
        if values is not None and not control and self.least_utility is not None:
            missing = self.least_utility - values[1]
        self._tables[control].end(number, state, attributes, values, missing)
        if not control and self._proposer is not None:
            self._proposer.end(number, state, values)

    def _begin(self, database: "Database") -> None:
        import optuna

        names = [objective.name for objective in self.objectives]
        for title in self._titles():
            study = optuna.create_study(
                study_name=title, storage=database.optuna, directions=["maximize"] * len(names), load_if_exists=True
            )
            identity = self.record.fingerprint
            if study.user_attrs.get("fingerprint", identity) != identity:
                raise UserError(f"storage {self.record.storage}: it holds another study named {title!r}; rename one")
            study.set_user_attr("fingerprint", identity)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                study.set_metric_names(names)
