"""Work out what a study lacks and get it done: one run of a study, and its progress by stage."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import ray
from optuna.trial import TrialState
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.evaluation.controls import follow_up_trials, given_controls, is_audit
from search.evaluation.evaluator import StudyContext
from search.evaluation.inputs import earlier_fronts
from search.evaluation.prepared import PreparedStudy
from search.evaluation.task import task_of
from search.execution.base_runs import BaseRunTasks
from search.execution.budget import BudgetMonitor, Stop
from search.execution.capacity import ClusterCapacity, need_of
from search.execution.line_inputs import InnerProducts, line_sampler
from search.execution.prerequisites import Prerequisites, find_base_runs
from search.execution.ray_cluster import connected
from search.execution.tune import StudySearcher, run_trials
from search.execution.worker_pool import WorkerPoolMonitor
from search.execution.workers import ScoringTrial
from search.problem.trial import TrialSpec
from search.report.progress import Bars, ProgressActor
from search.results.constrained import Dial
from search.results.study_result import StudyResult
from search.samplers.registry import SAMPLERS
from search.spec.runtime import Budget
from search.store.study_store import StudyStore
from search.store.trials import searched
from uipe_core.errors import UserError

TITLES = {
    "given": "scoring: given points, controls",
    "trials": "searching: (method, epoch, alpha)",
    "audits": "auditing: attacks on finalists",
}
"""Stages of scoring, and how progress names them."""


class StageProgress:
    """Show the progress of trials and book their time to the stage they belong to.

    Attributes:
        trains: Base runs were missing at some time since the last trial ended; set from outside.
    """

    def __init__(self, bars: Bars, store: StudyStore, jobs: Iterable[TrialSpec], proposals: int) -> None:
        self._bars, self._store = bars, store
        self._totals = Counter({"trials": proposals}) + Counter(_stage(job) for job in jobs)
        self._done: Counter[str] = Counter()
        self._seconds = {"training": 0.0, **dict.fromkeys(TITLES, 0.0)}
        self._stage = "given"
        self.trains = False
        self.begin()
        for stage in TITLES:
            self._show(stage)

    def begin(self) -> None:
        """Time counts from now."""
        self._since = time.perf_counter()

    def more(self, jobs: list[TrialSpec]) -> list[TrialSpec]:
        """Add trials to the total and return them."""
        self._totals.update(_stage(job) for job in jobs)
        for stage in {_stage(job) for job in jobs}:
            self._show(stage)
        return jobs

    def ended(self, job: TrialSpec, reason: str | None, again: bool, took: float | None = None) -> None:
        """Count a job, unless it is run again, and book the time since the last one ended.

        Trials overlap, so that time goes to the job's stage. Where base runs were missing meanwhile, what it is longer than the
        job took is training.
        """
        self._stage = _stage(job)
        self._done[self._stage] += not again
        if reason is not None:
            where = " ".join(str(part) for part in (job.kind, job.base, job.epoch, job.alpha) if part is not None)
            self._bars.say(f"failed: {where}: {reason}{'; it is run again' if again else ''}")
        self._show(self._stage)
        self._count(took)

    def close(self) -> None:
        """Book the time, also of a run that was interrupted."""
        self._count()
        for stage, seconds in self._seconds.items():
            if seconds or stage != "audits":  # most studies have none
                self._store.add_seconds(stage, seconds)

    def _count(self, took: float | None = None) -> None:
        now = time.perf_counter()
        passed = now - self._since
        trained = max(passed - took, 0.0) if self.trains and took is not None else 0.0
        self._seconds["training"] += trained
        self._seconds[self._stage] += passed - trained
        self._since, self.trains = now, False

    def _show(self, stage: str) -> None:
        if self._totals[stage]:
            self._bars.show(TITLES[stage], self._done[stage], self._totals[stage])


def _stage(job: TrialSpec) -> str:
    if is_audit(job):
        return "audits"
    return "trials" if job.kind in ("search", "dial") else "given"


@dataclass
class StudyRun:
    """One run of a study: what is missing, and getting it done."""

    preparation: PreparedStudy
    store: StudyStore
    bars: Bars
    address: str | None = None
    stopped: Stop | None = None
    """Why it ended before everything was done, if it did."""
    track: Callable[[TrialSpec, int, str, Mapping[str, Any]], None] = lambda *_: None
    """Called with each ended trial (`search.execution.tune.StudySearcher`)."""

    def finish_all(self) -> None:
        """Do what the study still lacks; starts Ray only if there is something."""
        spec = self.preparation.spec
        self._recall_base_runs()
        done = _done_jobs(self.store)
        jobs = [job for job in given_controls(self.preparation) if job not in done]
        jobs += [job for point in spec.given_points() if (job := TrialSpec("alpha_zero", **point.params)) not in done]
        if SAMPLERS[spec.search.sampler].fixed_points:
            scored = {(job.base, job.epoch, job.alpha) for job in done if not job.is_control}
            jobs += [
                TrialSpec("search", **point.params) for point in spec.grid_points() if (*point.params.values(),) not in scored
            ]
            proposals = 0
        else:
            proposals = max(spec.search.trials - self._searched(), 0)
            earlier = self._earlier(done)[:proposals]
            jobs, proposals = jobs + earlier, proposals - len(earlier)
        searched_for = [job for job in jobs if job.kind == "search"]
        controls_missing = len(jobs) > len(searched_for) or bool(follow_up_trials(self.store) or self._audits())
        if controls_missing or searched_for or proposals:
            with self._guarded(spec.budget) as guard:
                stop = guard.stop()
                if stop is None or (stop.scores_front and controls_missing):
                    with connected(spec, self.store.out, self.bars, self.address, self.store.end_running) as capacity:
                        prerequisites = self._prerequisites(capacity, guard)
                        self._score(prerequisites, *prerequisites.begin(), jobs, proposals)
        self._note_stop()

    def _recall_base_runs(self) -> None:
        """Note the base runs of trials that were in the database before this folder: the one they were made in is lost."""
        bases = {str(trial.user_attrs.get("base")) for trial in self.store.trials((TrialState.COMPLETE,), ("base",))}
        recorded = self.store.record.base_runs
        labels = [label for label in self.preparation.spec.base_epochs() if label in bases and label not in recorded]
        for label, run in find_base_runs(self.preparation, labels).items():
            self.store.record.note_base_run(label, run.key, run.epochs)
        if labels:
            self.store.save_record()

    def confirm(self, points: list[TrialSpec], seeds: Sequence[int]) -> None:
        """Train the base runs of some points from other seeds and score the points again, on the items for reporting."""
        done = _done_jobs(self.store)
        jobs = [job for point in points for seed in seeds if (job := replace(point, seed=seed)) not in done]
        if jobs:
            with self._asked_for() as prerequisites:
                self._score(prerequisites, *prerequisites.begin(seeds, sorted({str(job.base) for job in jobs})), jobs, 0)

    def audit(self, jobs: list[TrialSpec]) -> None:
        """Score what audits ask for and what is not known yet."""
        done = _done_jobs(self.store)
        missing = [job for job in jobs if job not in done]
        if missing:
            with self._asked_for() as prerequisites:
                self._score(prerequisites, *prerequisites.begin(), missing, 0)

    def dial(self, floor: float) -> None:
        """Score what `search.results.constrained` asks for, round by round."""
        dial = Dial(self.store, floor)
        jobs = dial.jobs()
        if jobs:
            with self._asked_for() as prerequisites:
                self._score(prerequisites, *prerequisites.begin(), jobs, 0, iter(dial.jobs, []))

    @contextmanager
    def _asked_for(self) -> Iterator[Prerequisites]:
        """Yield prerequisites for work asked for explicitly (confirm, dial): only failures end it."""
        budget = Budget(failure_rate=self.preparation.spec.budget.failure_rate)
        store, spec = self.store, self.preparation.spec
        place = connected(spec, store.out, self.bars, self.address, store.end_running)
        with self._guarded(budget) as guard, place as capacity:
            yield self._prerequisites(capacity, guard)

    @contextmanager
    def _guarded(self, budget: Budget) -> Iterator[BudgetMonitor]:
        guard = BudgetMonitor(self.store, budget, self.bars.say)
        try:
            yield guard
        finally:
            self.stopped = guard.stopped
            guard.close()

    def _note_stop(self) -> None:
        """Write why the study ended before it had everything, or that it did not."""
        reason = None if self.stopped is None else self.stopped.reason
        if self.store.record.set_stopped(reason):
            self.store.save_record()

    def _prerequisites(self, capacity: ClusterCapacity, guard: BudgetMonitor) -> Prerequisites:
        # On the driver's node: what ends that ends the study, too.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(ProgressActor).remote()
        return Prerequisites(self.preparation, self.store, self.bars, board, capacity, guard)

    def _earlier(self, done: set[TrialSpec]) -> list[TrialSpec]:
        """Points of earlier studies' fronts that have not been scored here."""
        fronts = earlier_fronts(self.preparation.spec)
        for note in fronts.notes:
            self.bars.say(note)
        jobs = [TrialSpec("search", **point.params, warm_start=point.warm_start) for point in fronts.points]
        return [job for job in jobs if job not in done]

    def _searched(self) -> int:
        """Search trials that are decided; counted by number, because samplers may propose a point twice."""
        return sum(len(searched(frame)) for frame in (self.store.trials_frame(("kind",)), self.store.pruned_frame(("kind",))))

    def _rounds(self, progress: StageProgress, asked: Iterable[list[TrialSpec]]) -> Iterator[list[TrialSpec]]:
        """Yield what is scored once everything before has ended: what was asked for, then what the front lacks."""
        for jobs in asked:
            yield progress.more(jobs)
        yield progress.more(follow_up_trials(self.store))
        yield progress.more(self._audits())

    def _audits(self) -> list[TrialSpec]:
        """List the audits that the study asks for by itself and that are not done, once its front is known."""
        if self.preparation.spec.audit is None or not any(self.store.trials((TrialState.COMPLETE,), ())):
            return []
        done = _done_jobs(self.store)
        try:
            return [job for job in StudyResult.of(self.store).audit_jobs((), None, ()) if job not in done]
        except UserError:  # nothing on the front, which the report says
            return []

    def _score(
        self,
        prerequisites: Prerequisites,
        context: StudyContext,
        base_runs: BaseRunTasks,
        jobs: list[TrialSpec],
        proposals: int,
        rounds: Iterable[list[TrialSpec]] = (),
    ) -> None:
        """Score jobs and proposals as their base runs come, then round after round of others, then what the front lacks."""
        spec = self.preparation.spec
        # A resumed study must not propose what it proposed before, so its length goes into the seed.
        scored = sum(self.store.counts().values())
        seed = spec.seed + 1000003 * scored
        sampler = SAMPLERS[spec.search.sampler].make(seed)
        products = (
            self._inner_products(context, base_runs)
            if SAMPLERS[spec.search.sampler].needs_inner_products and proposals
            else None
        )
        if products is not None:
            sampler = line_sampler(self.store, context, products.lines, sampler, seed, self.bars.say)
        self.store.use_sampler(sampler)

        def poll() -> None:
            progress.trains |= bool(base_runs.runs.missing)
            prerequisites.poll(base_runs)
            if products is not None:
                products.poll()

        progress = StageProgress(self.bars, self.store, jobs, proposals)
        pool = WorkerPoolMonitor(spec.budget.trial_minutes)
        searcher = StudySearcher(
            self.store,
            spec.search_space(),
            jobs,
            proposals,
            base_runs.runs,
            poll,
            self._rounds(progress, rounds),
            lambda job, reason, again: progress.ended(job, reason, again, searcher.took),
            pool,
            prerequisites.guard,
            self.track,
        )
        resources = tune.PlacementGroupFactory([dict(need_of(spec.resources.trial))])
        trainable = tune.with_resources(tune.with_parameters(ScoringTrial, context=context), resources)
        # The searcher tells of every failure in one line; Tune would add a traceback, which it keeps in its folder anyway.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        try:
            for part in count(1):
                prerequisites.wait(base_runs, searcher.has_work)
                base_runs.require_one()
                progress.begin()
                name = f"tune-{time.strftime('%Y%m%d-%H%M%S')}-{part}"
                run_trials(trainable, searcher, pool, base_runs.runs.capacity.most, self.store.out / "ray", name)
                if searcher.error is not None:
                    raise searcher.error
                if searcher.done:
                    base_runs.require_one()
                    break
        finally:
            base_runs.cancel()
            if products is not None:
                products.cancel()
            progress.close()

    def _inner_products(self, context: StudyContext, base_runs: BaseRunTasks) -> InnerProducts | None:
        """Return the inputs of the sampler `line`; None, with a message, where it has no item scores to model."""
        modelled = all(objective.from_items for objective in self.store.objectives)
        if not (task_of(context.corpus).has_item_curves and modelled):
            what = "an objective is not made of item scores" if not modelled else "multiple choice has no losses to follow"
            self.bars.say(f"sampler line: {what}; tpe proposes in its place")
            return None
        epochs = self.preparation.spec.base_epochs()
        return InnerProducts(base_runs.runs, epochs, context.deltas, self.store.out, self.bars.say)


def _done_jobs(store: StudyStore) -> set[TrialSpec]:
    """Jobs that need not be done again."""
    done = set()
    names = ("base", "epoch", "alpha", "of_trial", "model", "seed", "settings")
    known = (*names, "kind", "temperature")
    for frame in (store.trials_frame(known), store.pruned_frame(known), store.controls_frame()):
        for row in frame.to_dict("records"):
            values: dict[str, Any] = {name: None if _absent(row.get(name)) else row[name] for name in names}
            temperature = 1.0 if _absent(row.get("temperature")) else float(row["temperature"])
            done.add(TrialSpec(kind=row["kind"], temperature=temperature, **values))
    return done


def _absent(value: Any) -> bool:
    return value is None or value != value
