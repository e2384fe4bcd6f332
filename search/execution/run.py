"""Runs a study on Ray: models and base runs as tasks, trials through Tune with warm, reused actors."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.evaluation.controls import follow_up_trials, given_controls
from search.evaluation.evaluator import StudyContext
from search.evaluation.inputs import earlier_fronts
from search.evaluation.prepared import PreparedStudy, prepare
from search.evaluation.task import task_of
from search.execution.base_runs import LOST, BaseRunTasks, problem_of
from search.execution.budget import BudgetMonitor, Stop
from search.execution.capacity import ClusterCapacity, need_of
from search.execution.line_inputs import InnerProducts, line_sampler
from search.execution.prerequisites import Prerequisites
from search.execution.ray_cluster import IN_A_JOB, connected
from search.execution.study_run import StageProgress
from search.execution.tune import StudySearcher, WorkerPoolMonitor, run_trials
from search.execution.workers import ScoringTrial
from search.problem.trial import TrialSpec
from search.report.html import write_report
from search.report.progress import Bars, ProgressActor
from search.results.constrained import Answer, Dial, answer_of
from search.results.status import StatusLines
from search.results.study_result import StudyResult
from search.samplers.registry import SAMPLERS
from search.spec.runtime import Budget
from search.spec.study import StudySpec
from search.store.database import STORAGE_ERRORS, explain_storage_error
from search.store.mirror import working_folder
from search.store.study_store import StudyStore, searched
from uipe_core.errors import StudyInterrupted, UserError


def run_study(
    spec: StudySpec, out: Path | str | None = None, *, quiet: bool = False, address: str | None = None
) -> StudyResult:
    """Runs a study, or resumes or extends the one in its folder.

    Args:
        spec: The study (see `search.spec.study.load_study`).
        out: Output folder, or URL of one (`search.store.mirror`); None is ``runs/<study name>``.
        quiet: No progress bars.
        address: Ray cluster to run on (see `search.execution.ray_cluster.connected`); None is this machine.

    Returns:
        The finished study: front, tables, selection, export, report.

    Raises:
        UserError: Bad input; nothing is lost.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    with working_folder(Path("runs", spec.name) if out is None else out) as folder:
        return _at_work(spec, folder, quiet, address, _Run.finish_all)


def confirm_study(out: Path | str, top: int, seeds: int, *, quiet: bool = False, address: str | None = None) -> StudyResult:
    """Trains the base runs of a study's finalists from other seeds, and scores the finalists again on the items for reporting.

    Args:
        out: Folder of a finished study.
        top: How many finalists (`StudyResult.finalists`).
        seeds: How many other seeds: the study's own plus 1, 2, ...
        quiet, address: As `run_study`.

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
        TrialSpec("confirm", row["base"], int(row["epoch"]), float(row["alpha"]), of_trial=int(row["trial"]))
        for row in result.finalists(top).to_dict("records")
        if row["base"] not in spec.checkpoints
    ]
    if not jobs:
        raise UserError(f"{out}: its finalists walk from given checkpoints, which cannot be trained again from other seeds")
    others = [spec.seed + step for step in range(1, seeds + 1)]
    with working_folder(out) as folder:
        return _at_work(spec, folder, quiet, address, lambda run: run.confirm(jobs, others))


def dial_study(out: Path | str, floor: float, *, quiet: bool = False, address: str | None = None) -> tuple[StudyResult, Answer]:
    """Looks for the strongest forgetting that keeps a share of the initial model's utility, by scoring points for just that.

    Args:
        out: Folder of a study.
        floor: Least share of the initial model's utility, above 0 and at most 1.
        quiet, address: As `run_study`.

    Returns:
        The study, with the points among its trials, and what they say (`search.results.constrained`).

    Raises:
        UserError: As `run_study`; or an impossible floor.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    result = StudyResult.open(out)
    Dial(result.store, floor)  # tells what is wrong before anything is opened for writing
    spec = result.runnable_spec()
    with working_folder(out) as folder:
        result = _at_work(spec, folder, quiet, address, lambda run: run.dial(floor))
    return result, answer_of(result, floor)


def _at_work(spec: StudySpec, folder: Path, quiet: bool, address: str | None, work: Callable[["_Run"], None]) -> StudyResult:
    """Opens a study, does some work on it, and writes its report."""
    with Bars(quiet) as bars:
        preparation = prepare(spec)
        store = StudyStore.create(folder, spec, preparation.fingerprint, preparation.facts())
        try:
            orphans = store.fail_orphaned_trials()
            if orphans:
                bars.say(f"resuming: {orphans} trials of an interrupted run were closed")
            run = _Run(preparation, store, bars, address)
            with StatusLines(store, bars.under_way, IN_A_JOB in os.environ and bars.plain):
                try:
                    work(run)
                except KeyboardInterrupt:
                    store.end_running()  # before the last status is told
                    raise
            if run.stopped is not None and (run.stopped.gave_up or not store.counts()["complete"]):
                raise UserError(_without_result(folder, run.stopped, store))
            bars.say("writing the report ...")
            result = StudyResult.of(store)
            write_report(result)
            store.flush()
        except KeyboardInterrupt:
            raise StudyInterrupted(f"what was done is in {folder}; the same command resumes it") from None
        except LOST as error:
            raise problem_of(str(folder), error) from error
        except (OSError, *STORAGE_ERRORS) as error:
            # Not from the error: what a database says may hold what its URL must not show.
            said = explain_storage_error(error, spec.storage or "")
            raise UserError(
                f"output folder {folder} or storage {store.record.storage}: {said}; "
                "mend that (a full disk? lost rights? a database that is locked or gone?), then the same command resumes the "
                "study: what was done is kept, and what could not be written is done again"
            ) from None
        finally:
            store.close()
    return result


def _without_result(folder: Path, stop: Stop, store: StudyStore) -> str:
    """Why a study ended without what was asked for; what there is of it is in its report."""
    if store.counts()["complete"]:
        write_report(StudyResult.of(store))
    if stop.gave_up:
        return f"{folder}: the study gave up: {stop.reason}; mend the cause, then the same command goes on"
    return f"{folder}: no trial was complete when the study stopped: {stop.reason}; give it more and the same command goes on"


@dataclass
class _Run:
    """One run of a study: what is missing, and getting it done."""

    preparation: PreparedStudy
    store: StudyStore
    bars: Bars
    address: str | None = None
    stopped: Stop | None = None
    """Why it ended before everything was done, if it did."""

    def finish_all(self) -> None:
        """Does what the study still lacks; starts Ray only if there is something."""
        spec = self.preparation.spec
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
        besides = len(jobs) > len(searched_for) or bool(self._mirrors())
        if besides or searched_for or proposals:
            with self._guarded(spec.budget) as guard:
                stop = guard.stop()
                if stop is None or (stop.mirrored and besides):
                    with connected(spec, self.store.out, self.bars, self.address) as room:
                        ground = self._groundwork(room, guard)
                        self._score(ground, *ground.begin(), jobs, proposals)
        self._note_stop()

    def confirm(self, points: list[TrialSpec], seeds: Sequence[int]) -> None:
        """Trains the base runs of some points from other seeds and scores the points again, on the items for reporting."""
        done = _done_jobs(self.store)
        jobs = [job for point in points for seed in seeds if (job := replace(point, seed=seed)) not in done]
        if jobs:
            with self._asked_for() as ground:
                self._score(ground, *ground.begin(seeds, sorted({str(job.base) for job in jobs})), jobs, 0)

    def dial(self, floor: float) -> None:
        """Scores what `search.results.constrained` asks for, round by round."""
        dial = Dial(self.store, floor)
        jobs = dial.jobs()
        if jobs:
            with self._asked_for() as ground:
                self._score(ground, *ground.begin(), jobs, 0, iter(dial.jobs, []))

    @contextmanager
    def _asked_for(self) -> Iterator[Prerequisites]:
        """What is asked for by itself: only failures end it, and why the search stopped stays as it was."""
        budget = Budget(failure_rate=self.preparation.spec.budget.failure_rate)
        place = connected(self.preparation.spec, self.store.out, self.bars, self.address)
        with self._guarded(budget) as guard, place as room:
            yield self._groundwork(room, guard)

    @contextmanager
    def _guarded(self, budget: Budget) -> Iterator[BudgetMonitor]:
        guard = BudgetMonitor(self.store, budget, self.bars.say)
        try:
            yield guard
        finally:
            self.stopped = guard.stopped
            guard.close()

    def _note_stop(self) -> None:
        """Writes why the study ended before it had everything, or that it did not."""
        reason = None if self.stopped is None else self.stopped.reason
        if self.store.record.set_stopped(reason):
            self.store.save_record()

    def _groundwork(self, room: ClusterCapacity, guard: BudgetMonitor) -> Prerequisites:
        # On the driver's node: what ends that ends the study, too.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(ProgressActor).remote()
        return Prerequisites(self.preparation, self.store, self.bars, board, room, guard)

    def _mirrors(self) -> list[TrialSpec]:
        return follow_up_trials(self.store)

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

    def _rounds(self, tally: StageProgress, asked: Iterable[list[TrialSpec]]) -> Iterator[list[TrialSpec]]:
        """What is scored once everything before it has ended: what was asked for, then what the front lacks."""
        for jobs in asked:
            yield tally.more(jobs)
        yield tally.more(self._mirrors())

    def _score(
        self,
        ground: Prerequisites,
        context: StudyContext,
        base_runs: BaseRunTasks,
        jobs: list[TrialSpec],
        proposals: int,
        rounds: Iterable[list[TrialSpec]] = (),
    ) -> None:
        """Scores jobs and proposals as their base runs come, then round after round of others, then what the front lacks."""
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
            ground.poll(base_runs)
            if products is not None:
                products.poll()

        tally = StageProgress(self.bars, self.store, jobs, proposals)
        workforce = WorkerPoolMonitor(spec.budget.trial_minutes)
        searcher = StudySearcher(
            self.store,
            spec.search_space(),
            jobs,
            proposals,
            base_runs.runs,
            poll,
            self._rounds(tally, rounds),
            tally.ended,
            workforce,
            ground.guard,
        )
        resources = tune.PlacementGroupFactory([dict(need_of(spec.resources.trial))])
        trainable = tune.with_resources(tune.with_parameters(ScoringTrial, context=context), resources)
        # The searcher tells of every failure in one line; Tune would add a traceback, which it keeps in its folder anyway.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        try:
            for part in count(1):
                ground.wait(base_runs, searcher.has_work)
                base_runs.require_one()
                tally.begin()
                name = f"tune-{time.strftime('%Y%m%d-%H%M%S')}-{part}"
                run_trials(trainable, searcher, workforce, base_runs.runs.room.most, self.store.out / "ray", name)
                if searcher.error is not None:
                    raise searcher.error
                if searcher.done:
                    base_runs.require_one()
                    break
        finally:
            base_runs.cancel()
            if products is not None:
                products.cancel()
            tally.close()

    def _inner_products(self, context: StudyContext, base_runs: BaseRunTasks) -> InnerProducts | None:
        """What the sampler that knows the line needs; None, and a word about it, where there are no losses to follow."""
        if not task_of(context.corpus).has_item_curves:
            self.bars.say("sampler line: multiple choice has no losses to follow; tpe proposes in its place")
            return None
        epochs = self.preparation.spec.base_epochs()
        return InnerProducts(base_runs.runs, epochs, context.deltas, self.store.out, self.bars.say)


def _done_jobs(store: StudyStore) -> set[TrialSpec]:
    """Jobs that need not be done again."""
    done = set()
    names = ("base", "epoch", "alpha", "of_trial", "model", "seed")
    known = (*names, "kind", "temperature")
    for frame in (store.trials_frame(known), store.pruned_frame(known), store.controls_frame()):
        for row in frame.to_dict("records"):
            values: dict[str, Any] = {name: None if _absent(row.get(name)) else row[name] for name in names}
            temperature = 1.0 if _absent(row.get("temperature")) else float(row["temperature"])
            done.add(TrialSpec(kind=row["kind"], temperature=temperature, **values))
    return done


def _absent(value: Any) -> bool:
    return value is None or value != value
