"""Runs a study on Ray: models and base runs as tasks, trials through Tune with warm, reused actors."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from optuna.exceptions import StorageInternalError
from ray import tune
from sqlalchemy.exc import OperationalError

from search.cluster import local_ray, worker_count
from search.evaluator import Job, StudyContext
from search.preparation import Preparation, prepare
from search.progress import Bars, Board
from search.ray_searcher import StudySearcher
from search.results import StudyResult, random_direction_jobs
from search.samplers import make_sampler
from search.space import distributions, given_points
from search.spec import StudySpec
from search.study_store import StudyStore
from search.workers import ScoringTrial, build_tiny, score_model, train_and_publish
from uipe_core.delta_store import BaseRun, DeltaStore
from uipe_core.errors import StudyInterrupted, UserError
from uipe_core.evaluation_log import read_log, write_log
from uipe_core.metrics import evaluate
from uipe_core.models import ModelSource
from uipe_core.score_report import ScoreReport
from uipe_core.training import DivergedError

POLL_SECONDS = 0.2


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
    with Bars(quiet) as bars:
        preparation = prepare(spec)
        store = StudyStore.create(folder, spec, preparation.fingerprint, preparation.facts())
        try:
            orphans = store.reconcile()
            if orphans:
                bars.say(f"resuming: {orphans} trials of an interrupted run were closed")
            _Run(preparation, store, bars).finish_all()
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
    _board: Any = field(default=None)

    def finish_all(self) -> None:
        """Does what the study still lacks; starts Ray only if there is something."""
        spec = self.preparation.spec
        done = _done_jobs(self.store)
        controls = [job for job in self._controls() if job not in done]
        given = [point for point in given_points(spec) if Job("alpha_zero", **point.params) not in done]
        missing = spec.search.trials - self._searched()
        if not (controls or given or missing > 0 or random_direction_jobs(self.store)):
            return
        with local_ray(spec, self.store.out, self.bars):
            self._board = ray.remote(num_cpus=0)(Board).remote()
            context = self._context()
            self._score(context, controls, given, max(missing, 0))

    def _searched(self) -> int:
        """Complete search trials; counted by number, because samplers may propose a point twice."""
        trials = self.store.trials_frame()
        return 0 if trials.empty else int((trials["kind"] == "search").sum())

    def _controls(self) -> list[Job]:
        spec = self.preparation.spec
        jobs = [Job("initial"), Job("retain")]
        jobs += [Job("temperature", temperature=value) for value in spec.scoring.temperatures]
        if self.preparation.trained_epochs > spec.unlearning.epochs:
            next_epoch = spec.unlearning.epochs + 1
            jobs += [Job("next_epoch", run.label, next_epoch, 0.0) for run in spec.variants()]
        return jobs

    def _context(self) -> StudyContext:
        spec = self.preparation.spec
        with self._stage("models"):
            initial, retain = self._models()
        with self._stage("base_runs"):
            runs, reports = self._base_runs_and_references(initial, retain)
        if self.preparation.retain_log is not None:
            _check_reference(reports, spec.scoring.definition)
        return StudyContext(
            corpus=self.preparation.corpus,
            source=initial,
            runs=runs,
            methods={run.label: run.method for run in spec.variants()},
            reference=reports["retain"],
            initial=reports["initial"],
            scoring=self.preparation.scoring,
            definition=spec.scoring.definition,
            seed=spec.seed,
            threads=spec.resources.threads_per_worker,
        )

    def _models(self) -> tuple[ModelSource, ModelSource | None]:
        """Sources of the initial and the retain model; tiny ones are built where the cache lacks them."""
        preparation, spec = self.preparation, self.preparation.spec
        if preparation.tiny is None:
            retain = None if preparation.retain_log is not None else preparation.source("retain")
            return preparation.source("initial"), retain
        stages = {"initial": "full", "retain": "retain"}
        store = preparation.model_store
        folders = {which: store.find(preparation.models[which]) for which in stages}
        if not all(folders.values()):
            arguments = (preparation.tiny, preparation.corpus, store.root, spec.resources.threads_per_worker, self._board)
            if preparation.tiny.base is not None:
                self._gather({"base": self._task(build_tiny, "base", *arguments)})
            tasks = {which: self._task(build_tiny, stage, *arguments) for which, stage in stages.items()}
            folders = self._gather(tasks)
        return preparation.source("initial", str(folders["initial"])), preparation.source("retain", str(folders["retain"]))

    def _base_runs_and_references(
        self, initial: ModelSource, retain: ModelSource | None
    ) -> tuple[dict[str, BaseRun], dict[str, ScoreReport]]:
        preparation, spec = self.preparation, self.preparation.spec
        threads = spec.resources.threads_per_worker
        deltas = DeltaStore(preparation.delta_root)
        tasks, found = {}, {}
        for run in spec.variants():
            inputs = preparation.base_run_inputs(run)
            known = deltas.find(inputs)
            if known is not None:
                found[run.label] = known
                continue
            config = preparation.unlearning(run)
            arguments = (initial, preparation.corpus, config, inputs, preparation.delta_root, threads, self._board, run.label)
            tasks[run.label] = self._task(train_and_publish, *arguments)
        reports: dict[str, ScoreReport] = {}
        for which, source in (("initial", initial), ("retain", retain)):
            log = self.store.out / "logs" / f"{which}.json" if source is not None else preparation.retain_log
            if log is not None and log.is_file():
                reports[which] = read_log(log)
            else:
                wanted = (source, preparation.corpus, preparation.scoring, threads, self._board, f"scoring: {which} model")
                tasks[which] = self._task(score_model, *wanted)
        results = self._gather(tasks)
        for which in ("initial", "retain"):
            if which in results:
                reports[which] = results.pop(which)
                write_log(reports[which], self.store.out / "logs" / f"{which}.json", {"study": spec.name, "model": which})
        runs = {**found, **results}
        self.store.record["base_runs"] = {label: {"delta": run.key, "epochs": list(run.epochs)} for label, run in runs.items()}
        self.store.save_record()
        return runs, reports

    def _score(self, context: StudyContext, controls: list[Job], given: list[Any], proposals: int) -> None:
        spec = self.preparation.spec
        space = distributions(spec)
        # A resumed study must not propose what it proposed before, so its length goes into the seed.
        scored = len(self.store.study.get_trials(deepcopy=False))
        self.store.use_sampler(make_sampler(spec.search.sampler, spec.seed + 1000003 * scored))
        tally = _Tally(self.bars, self.store, len(controls) + len(given), proposals)
        searcher = StudySearcher(
            self.store, space, controls, given, proposals, lambda: tally.mirrors(random_direction_jobs(self.store)), tally.ended
        )
        resources = {"cpu": spec.resources.cpus_per_worker, "gpu": spec.resources.gpus_per_worker}
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

    def _task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        resources = self.preparation.spec.resources
        options = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker, "max_retries": 2}
        return ray.remote(**options)(function).remote(*arguments)

    def _gather(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """Results by name, showing progress meanwhile. All tasks end before the first failure is raised."""
        names = {reference: name for name, reference in tasks.items()}
        waiting = list(names)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            self.bars.show_all(ray.get(self._board.read.remote()))
        results, failures = {}, []
        for reference, name in names.items():
            try:
                results[name] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                failures.append((name, error.cause if error.cause is not None else error))
        for name, cause in failures:
            if isinstance(cause, UserError | DivergedError):
                raise UserError(f"{name}: {cause}") from cause
            raise RuntimeError(f"{name} failed: {cause}") from cause
        return results

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.store.add_seconds(name, time.perf_counter() - started)


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
        """Announces the random directions that follow the search."""
        self._totals["trials"] += len(jobs)
        self._show("trials")
        return jobs

    def ended(self, job: Job, reason: str | None) -> None:
        stage = "trials" if job.kind in ("search", "random_direction") else "baselines"
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


def _check_reference(reports: Mapping[str, ScoreReport], definition: str) -> None:
    """Whether a given log will do, found out once here: in the workers it would fail every trial."""
    try:
        for which in ("initial", "retain"):
            evaluate(reports[which], reports["retain"], definition)
    except UserError as error:
        raise UserError(f"model.retain: {error}") from error


def _done_jobs(store: StudyStore) -> set[Job]:
    """Jobs that need not be done again."""
    done = set()
    for frame in (store.trials_frame(), store.controls_frame()):
        for row in frame.to_dict("records"):
            names = ("base", "epoch", "alpha", "of_trial")
            values = {name: None if _absent(row.get(name)) else row[name] for name in names}
            temperature = 1.0 if _absent(row.get("temperature")) else float(row["temperature"])
            done.add(Job(kind=row["kind"], temperature=temperature, **values))
    return done


def _absent(value: Any) -> bool:
    return value is None or value != value
