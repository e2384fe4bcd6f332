"""Runs a study on Ray: models and base runs as tasks, trials through Tune with warm, reused actors."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from optuna.exceptions import StorageInternalError
from ray import tune
from sqlalchemy.exc import OperationalError

from search.cluster import local_ray, worker_count
from search.evaluator import Job, StudyContext
from search.finalists import mirror_jobs
from search.groundwork import Groundwork
from search.preparation import Preparation, prepare
from search.progress import Bars, Board
from search.ray_searcher import StudySearcher
from search.results import StudyResult
from search.samplers import make_sampler
from search.space import distributions, given_points
from search.spec import StudySpec
from search.study_store import StudyStore
from search.workers import ScoringTrial
from uipe_core.errors import StudyInterrupted, UserError


def run_study(spec: StudySpec, out: Path | str | None = None, *, quiet: bool = False) -> StudyResult:
    """Runs a study, or resumes or extends the one in its folder.

    Args:
        spec: The study (see `search.spec.load_study`).
        out: Output folder; None is ``runs/<study name>``.
        quiet: No progress bars.

    Returns:
        The finished study: front, tables, selection, export, report.

    Raises:
        UserError: Bad input; nothing is lost.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    folder = Path("runs", spec.name) if out is None else Path(out)
    return _at_work(spec, folder, quiet, _Run.finish_all)


def confirm_study(out: Path | str, top: int, seeds: int, *, quiet: bool = False) -> StudyResult:
    """Trains the base runs of a study's finalists from other seeds, and scores the finalists again on the items for reporting.

    Args:
        out: Folder of a finished study.
        top: How many finalists (`StudyResult.finalists`).
        seeds: How many other seeds: the study's own plus 1, 2, ...

    Returns:
        The study, with the confirmations among its controls (`StudyResult.confirmations`).

    Raises:
        UserError: As `run_study`; or fewer than one finalist or seed, or finalists that are all given checkpoints.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    for name, value in (("--top", top), ("--seeds", seeds)):
        if value < 1:
            raise UserError(f"{name}: {value} is too few; give at least 1")
    result = StudyResult.open(out)
    spec = result.runnable_spec()
    jobs = [
        Job("confirm", row["base"], int(row["epoch"]), float(row["alpha"]), of_trial=int(row["trial"]))
        for row in result.finalists(top).to_dict("records")
        if row["base"] not in spec.checkpoints
    ]
    if not jobs:
        raise UserError(f"{out}: its finalists walk from given checkpoints, which cannot be trained again from other seeds")
    others = [spec.seed + step for step in range(1, seeds + 1)]
    return _at_work(spec, Path(out), quiet, lambda run: run.confirm(jobs, others))


def _at_work(spec: StudySpec, folder: Path, quiet: bool, work: Callable[["_Run"], None]) -> StudyResult:
    """Opens a study, does some work on it, and writes its report."""
    with Bars(quiet) as bars:
        preparation = prepare(spec)
        store = StudyStore.create(folder, spec, preparation.fingerprint, preparation.facts())
        try:
            orphans = store.reconcile()
            if orphans:
                bars.say(f"resuming: {orphans} trials of an interrupted run were closed")
            work(_Run(preparation, store, bars))
            bars.say("writing the report ...")
            result = StudyResult.of(store)
            result.report()
        except KeyboardInterrupt:
            store.reconcile()
            raise StudyInterrupted(f"what was done is in {folder}; the same command resumes it") from None
        except (OSError, StorageInternalError, OperationalError) as error:
            cause = error.__cause__ or error
            raise UserError(
                f"output folder {folder} or storage {store.record['storage']}: {str(cause).splitlines()[0]}; mend that (a full "
                "disk? lost rights?), then the same command resumes the study: what was done is kept"
            ) from error
        finally:
            store.close()
    return result


@dataclass
class _Run:
    """One run of a study: what is missing, and getting it done."""

    preparation: Preparation
    store: StudyStore
    bars: Bars

    def finish_all(self) -> None:
        """Does what the study still lacks; starts Ray only if there is something."""
        spec = self.preparation.spec
        done = _done_jobs(self.store)
        controls = [job for job in self._controls() if job not in done]
        given = [point for point in given_points(spec) if Job("alpha_zero", **point.params) not in done]
        missing = spec.search.trials - self._searched()
        if not (controls or given or missing > 0 or self._mirrors()):
            return
        with local_ray(spec, self.store.out, self.bars):
            context = self._groundwork().context()
            self._score(context, controls, given, max(missing, 0))

    def confirm(self, points: list[Job], seeds: Sequence[int]) -> None:
        """Trains the base runs of some points from other seeds and scores the points again, on the items for reporting."""
        done = _done_jobs(self.store)
        jobs = [job for point in points for seed in seeds if (job := replace(point, seed=seed)) not in done]
        if not jobs:
            return
        with local_ray(self.preparation.spec, self.store.out, self.bars):
            context = self._groundwork().context(seeds, sorted({str(job.base) for job in jobs}))
            self._score(context, jobs, [], 0)

    def _groundwork(self) -> Groundwork:
        return Groundwork(self.preparation, self.store, self.bars, ray.remote(num_cpus=0)(Board).remote())

    def _mirrors(self) -> list[Job]:
        return mirror_jobs(self.store)

    def _searched(self) -> int:
        """Complete search trials; counted by number, because samplers may propose a point twice."""
        trials = self.store.trials_frame()
        return 0 if trials.empty else int((trials["kind"] == "search").sum())

    def _controls(self) -> list[Job]:
        spec = self.preparation.spec
        jobs = [Job(model.kind, model=model.name) for model in self.preparation.references]
        if spec.split is not None:
            kept = ("initial", "retain")
            jobs += [Job("held_out", model=model.name) for model in self.preparation.references if model.name in kept]
        # Which letter is likeliest does not depend on the temperature.
        temperatures = () if self.preparation.corpus.choices else spec.scoring.temperatures
        jobs += [Job("temperature", temperature=value) for value in temperatures]
        # Only what is trained here can be trained on.
        if spec.unlearning is not None and self.preparation.trained_epochs > spec.unlearning.epochs:
            next_epoch = spec.unlearning.epochs + 1
            jobs += [Job("next_epoch", run.label, next_epoch, 0.0) for run in spec.variants()]
        return jobs

    def _score(self, context: StudyContext, controls: list[Job], given: list[Any], proposals: int) -> None:
        spec = self.preparation.spec
        space = distributions(spec)
        # A resumed study must not propose what it proposed before, so its length goes into the seed.
        scored = len(self.store.study.get_trials(deepcopy=False))
        self.store.use_sampler(make_sampler(spec.search.sampler, spec.seed + 1000003 * scored))
        tally = _Tally(self.bars, self.store, len(controls) + len(given), proposals)
        searcher = StudySearcher(
            self.store, space, controls, given, proposals, lambda: tally.mirrors(self._mirrors()), tally.ended
        )
        trial = spec.resources.trial
        resources = {"cpu": trial.cpus, "gpu": trial.gpus, **trial.custom}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(ScoringTrial, context=context), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=-1, max_concurrent_trials=worker_count(spec), reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}",
                storage_path=str((self.store.out / "ray").resolve()),
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        # The searcher tells of every failure in one line; Tune would add a traceback, which it keeps in its folder anyway.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        try:
            tuner.fit()
            if searcher.error is not None:
                raise searcher.error
        finally:
            tally.close()


class _Tally:
    """Shows the progress of trials and books their time to the stage they belong to."""

    def __init__(self, bars: Bars, store: StudyStore, baselines: int, proposals: int) -> None:
        self._bars, self._store = bars, store
        self._totals = {"baselines": baselines, "trials": proposals}
        self._done = {"baselines": 0, "trials": 0}
        self._booked = time.perf_counter()
        for stage in ("baselines", "trials"):
            self._show(stage)

    def mirrors(self, jobs: list[Job]) -> list[Job]:
        """Announces what of the front is scored once more after the search."""
        self._totals["trials"] += len(jobs)
        self._show("trials")
        return jobs

    def ended(self, job: Job, reason: str | None) -> None:
        stage = "trials" if job.kind == "search" or job.of_trial is not None else "baselines"
        self._done[stage] += 1
        if reason is not None:
            where = " ".join(str(part) for part in (job.kind, job.base, job.epoch, job.alpha) if part is not None)
            self._bars.say(f"failed: {where}: {reason}")
        self._show(stage)
        if stage == "baselines" and self._done[stage] == self._totals[stage]:
            self._book(stage)

    def close(self) -> None:
        """Books what is left, also of a run that was interrupted."""
        self._book("trials" if self._done["baselines"] == self._totals["baselines"] else "baselines")

    def _book(self, stage: str) -> None:
        now = time.perf_counter()
        self._store.add_seconds(stage, now - self._booked)
        self._booked = now

    def _show(self, stage: str) -> None:
        names = {"baselines": "scoring: alpha = 0 and controls", "trials": "searching: (method, epoch, alpha)"}
        if self._totals[stage]:
            self._bars.show(names[stage], self._done[stage], self._totals[stage])


def _done_jobs(store: StudyStore) -> set[Job]:
    """Jobs that need not be done again."""
    done = set()
    for frame in (store.trials_frame(), store.controls_frame()):
        for row in frame.to_dict("records"):
            names = ("base", "epoch", "alpha", "of_trial", "model", "seed")
            values = {name: None if _absent(row.get(name)) else row[name] for name in names}
            temperature = 1.0 if _absent(row.get("temperature")) else float(row["temperature"])
            done.add(Job(kind=row["kind"], temperature=temperature, **values))
    return done


def _absent(value: Any) -> bool:
    return value is None or value != value
