"""Run trials with Ray Tune: the searcher, worker replacement, the cause of a worker's death."""

import base64
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from search.evaluation.controls import is_audit
from search.evaluation.metrics import TrialMetrics
from search.evaluation.pruning import Rivals, prunes
from search.execution.base_runs import LOST, BaseRuns
from search.execution.budget import BudgetMonitor
from search.execution.ray_compat import every_loss_is_a_death, release_trial
from search.execution.worker_pool import WorkerPoolMonitor
from search.problem.trial import TrialSpec
from search.store.folder import keep_traceback
from search.store.study_store import StudyStore
from search.store.trials import searched
from uipe_core.errors import UserError, first_line

TIMES_AGAIN = 2
"""How often a job is run again whose worker died."""

IDLE_SECONDS = 120.0
"""How long warm workers are kept while there is nothing for them to do."""

TRIALS_A_PART = 2500
"""After so many trials Tune is ended and started again: it keeps about 10 kB of every trial, and its workers for that long."""


class StudySearcher(Searcher):
    """Hand out trials to Tune and store their ends.

    First the given trials as their base runs are published, then what the sampler proposes, then the rounds.

    Args:
        store: The open study; this object is its only writer while Tune runs.
        space: The search space.
        jobs: Given trials: controls, points at alpha = 0, points of a grid.
        proposals: How many points the sampler may still propose. Failed ones count, so that a study whose trials all fail
            ends.
        runs: The base runs. A trial waits for its base run, and fails with it.
        poll: Update `runs`.
        rounds: Trials to score each time everything before has ended; the last round is the controls of the front.
        finished: Called with each ended trial, the reason of its failure or None, and whether it is run again.
        pool: The workers: why one died, and for how long it ran.
        guard: The study's budget.
        track: Called with each ended trial, its number, ``complete``, ``pruned`` or ``failed``, and its evidence.

    Attributes:
        done: Nothing is left to hand out. While base runs are missing, Tune may get FINISHED without that, so that idle
            workers release their resources; start it again as soon as `has_work`.
        took: Seconds that the last trial took its worker; None if it failed or died.
        error: What the study's storage or folder raised; the search has then stopped, and its caller raises it.
    """

    def __init__(
        self,
        store: StudyStore,
        space: dict[str, BaseDistribution],
        jobs: Iterable[TrialSpec],
        proposals: int,
        runs: BaseRuns,
        poll: Callable[[], None],
        rounds: Iterator[list[TrialSpec]],
        finished: Callable[[TrialSpec, str | None, bool], None],
        pool: WorkerPoolMonitor,
        guard: BudgetMonitor,
        track: Callable[[TrialSpec, int, str, Mapping[str, Any]], None] = lambda *_: None,
    ) -> None:
        super().__init__()
        self._store = store
        self._space = space
        self._jobs = deque(jobs)
        self._proposals = proposals
        self._runs, self._poll = runs, poll
        self._rounds = rounds
        self._finished = finished
        self._pool, self._guard, self._track = pool, guard, track
        self._running: dict[str, tuple[int, TrialSpec]] = {}
        self._held: set[str] = set()
        self._deaths: Counter[TrialSpec] = Counter()
        self._proposed = _proposed(store)
        self._rivals = Rivals([objective.name for objective in store.objectives])
        for row in store.trials_frame(("alpha", "collapsed")).to_dict("records"):
            self._rivals.add(int(row["trial"]), {str(key): value for key, value in row.items()})
        self._idle_since: float | None = None
        self._handed_out = 0
        self.done = False
        self.took: float | None = None
        self.error: Exception | None = None

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Decline Tune's limiter, so that `suggest` is called at every step of Tune, and base runs are polled there."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial as a Tune configuration; None while running trials must end first."""
        if self.error is not None:
            return self.FINISHED
        try:
            return self._next(trial_id)
        except Exception as error:
            self.error = error
            return self.FINISHED

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """End the trial in the study; its worker may be held a while longer (`search.execution.worker_pool`)."""
        self.on_trial_complete(trial_id, result)
        self._held.add(trial_id)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """End the trial in the study: complete or pruned with its evidence, or failed with its reason."""
        self._held.discard(trial_id)
        if trial_id not in self._running:
            return
        try:
            self._end(trial_id, result, error)
        except Exception as problem:
            self.error = self.error or problem

    def has_work(self) -> bool:
        """Return True if Tune has something to do: a trial whose base run is published, or the end of the search."""
        self._heed_budget()
        if not self._runs.missing:
            return True
        ready = self._ready_job() is not None or self._base_to_propose() is not None
        return ready and self._runs.trials_at_once() > 0

    def _next(self, trial_id: str) -> dict[str, Any] | str | None:
        self._heed_budget()
        self._poll()
        self._end_jobs_without_base_run()
        capacity = len(self._running) + len(self._held) < self._runs.trials_at_once()
        if capacity and self._handed_out < TRIALS_A_PART and (asked := self._ask()) is not None:
            self._handed_out += 1
            self._running[trial_id] = asked
            self._idle_since = None
            job = asked[1]
            prunable = job.kind == "search" and prunes(self._store.spec)
            rivals = self._rivals.of(float(job.alpha or 0.0)) if prunable else ()
            handed = replace(job, delta=self._runs.published.get(str(job.run), ()), rivals=rivals)
            return {"job": handed.as_text()}
        if self._running or self._held:
            return None
        if self._handed_out >= TRIALS_A_PART:
            self._handed_out = 0
            return self.FINISHED
        if self._runs.missing:
            return self._idle()
        if (jobs := next(self._rounds, None)) is not None:
            self._jobs.extend(jobs)
            return self._next(trial_id)
        self.done = True
        return self.FINISHED

    def _ask(self) -> tuple[int, TrialSpec] | None:
        """Start the trial of the next job, if one can be run now."""
        job = self._ready_job()
        if job is not None:
            self._jobs.remove(job)
            return self._ask_for(job)
        base = self._base_to_propose()
        if base is None:
            return None
        self._proposals -= 1
        everything_is_there = not (self._runs.missing or self._runs.failed)
        asked = self._store.ask_point(self._space, None if everything_is_there else {"base": base})
        self._proposed[str(asked[1].base)] += 1
        return asked

    def _ask_for(self, job: TrialSpec) -> tuple[int, TrialSpec]:
        if job.is_control:
            return self._store.ask_control(job), job
        params = {"base": job.base, "epoch": job.epoch, "alpha": job.alpha}
        number, asked = self._store.ask_point(self._space, params, job.kind)
        return number, replace(asked, warm_start=job.warm_start, floor=job.floor)

    def _ready_job(self) -> TrialSpec | None:
        return next((job for job in self._jobs if job.run is None or job.run in self._runs.published), None)

    def _base_to_propose(self) -> str | None:
        """A base run that a point may be proposed for, the one with the fewest; None if there is none or enough was proposed.

        While some are missing, each that is there gets its equal share of the study's trials at most, so that the last to come
        finds some left.
        """
        if not self._proposals:
            return None
        bases = self._space["base"].choices  # type: ignore[attr-defined]
        there = [base for base in bases if base in self._runs.published]
        if self._runs.missing:
            share = max(self._store.spec.search.trials // len(bases), 1)
            there = [base for base in there if self._proposed[base] < share]
        return min(there, key=lambda base: self._proposed[base], default=None)

    def _idle(self) -> str | None:
        """Nothing can be handed out before another base run is there: for a while workers are kept warm.

        Not if a base run waits for the room they take; and not for ever, because what else holds a cluster is not known here.
        """
        now = time.monotonic()
        self._idle_since = now if self._idle_since is None else self._idle_since
        if self._runs.waiting or now - self._idle_since > IDLE_SECONDS:
            self._idle_since = None
            return self.FINISHED
        return None

    def _end_jobs_without_base_run(self) -> None:
        """End jobs whose base run failed, with that as their reason; of a grid nothing is asked that its alpha = 0 tells."""
        if not self._runs.failed:
            return
        for job in [job for job in self._jobs if job.run in self._runs.failed]:
            self._jobs.remove(job)
            if job.kind != "search":
                number, _ = self._ask_for(job)
                self._fail(job, number, self._runs.failed[str(job.run)], again=False)

    def _heed_budget(self) -> None:
        """Hand out and train nothing more when the budget is used up; what is at work ends by itself.

        A front that stopped growing is still scored once more. Whether it has is not asked before all base runs are there.
        """
        stop = self._guard.stop(settled=not self._runs.missing)
        if stop is None:
            return
        self._proposals = 0
        if stop.scores_front:
            # Points of a grid are proposals, too; those that died and come again are not.
            self._jobs = deque(job for job in self._jobs if job.kind != "search" or job in self._deaths)
        else:
            self._jobs.clear()
            self._runs.waiting.clear()
            self._rounds = iter(())

    def _end(self, trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        number, job = self._running.pop(trial_id)
        self.took = None
        if error or result is None:
            death = self._pool.death(trial_id)
            reason, again, details = death.reason, not death.timed_out and self._again(job), death.details
            if death.short_of_memory and not again:
                self._guard.starved(reason)
        else:
            reason, again, details = str(result.get("reason") or ""), False, str(result.get("traceback") or "")
        self._guard.held(self._pool.ended(trial_id), self._store.spec.resources.trial)
        if reason or result is None:
            self._guard.failed(reason, again)
            self._fail(job, number, reason, again, details)
            return
        metrics = TrialMetrics.from_text(result["metrics"])
        self.took = metrics.seconds
        evidence = {**self._store.identity(job), **metrics.as_dict()}
        items = base64.b64decode(result["items"]) if "items" in result else None
        if metrics.pruned is not None:
            self._store.prune(job, number, evidence, items)
            self._guard.pruned()
            self._track(job, number, "pruned", evidence)
            self._finished(job, None, False)
            return
        if is_audit(job) and any(objective.name not in evidence for objective in self._store.objectives):
            self._store.prune(job, number, evidence, items)
            self._guard.scored(job, evidence)
            self._track(job, number, "complete", evidence)
            self._finished(job, None, False)
            return
        incomplete = self._store.complete(job, number, evidence, items)
        if incomplete is None:
            self._guard.scored(job, evidence)
            if not job.is_control:
                self._rivals.add(number, evidence)
        else:
            self._guard.failed(incomplete)
        self._track(job, number, "complete" if incomplete is None else "failed", evidence)
        self._finished(job, incomplete, False)

    def _again(self, job: TrialSpec) -> bool:
        """Put a job back whose worker died; False if it has been put back often enough."""
        if self._deaths[job] >= TIMES_AGAIN:
            return False
        self._deaths[job] += 1
        self._jobs.appendleft(job)
        return True

    def _fail(self, job: TrialSpec, number: int, reason: str, again: bool, details: str = "") -> None:
        self._store.fail(job, number, reason, details)
        self._track(job, number, "failed", {**self._store.identity(job), "reason": reason})
        self._finished(job, reason, again)

    def save(self, checkpoint_path: str) -> None:
        """Write a note in place of a state: the study itself is the state, and the same command resumes it."""
        Path(checkpoint_path).write_text("The state of the search is its Optuna study.\n")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher with its results; an open database cannot and need not travel."""
        return {}


def _proposed(store: StudyStore) -> Counter[str]:
    """Points scored or pruned of each base run so far, those at alpha = 0 aside."""
    names = ("kind", "base")
    return Counter(base for frame in (store.trials_frame(names), store.pruned_frame(names)) for base in searched(frame)["base"])


class _ReleaseEnded(tune.Callback):
    """Keep the memory of a long study flat."""

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Called when the searcher has had the result."""
        release_trial(trial)


def run_trials(trainable: Any, searcher: StudySearcher, pool: WorkerPoolMonitor, at_once: int, folder: Path, name: str) -> None:
    """Let Tune run what a searcher hands out until it has nothing more at the moment.

    Args:
        trainable: What a worker runs for each job, with its resources.
        searcher: Where jobs come from and results go.
        pool: The workers.
        at_once: How many trials run at the same time at most.
        folder: Tune's own files go here, below `name`.
        name: Of this run of Tune, unique in the folder.

    Raises:
        UserError: Tune itself failed; what it was at work on is left open.
    """
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=pool.scheduler(),
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder.resolve()),
            verbose=0,
            callbacks=[pool.callback(), _ReleaseEnded()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        with every_loss_is_a_death():
            tuner.fit()
    except LOST:
        raise
    except Exception as error:
        if searcher.error is not None:
            return  # what it raised itself, and what Tune made of it
        kept = keep_traceback(folder.parent, name, traceback.format_exc())
        # A TuneError is made of a whole traceback.
        said = str(error).strip().splitlines()[-1] if isinstance(error, tune.TuneError) else first_line(error)
        what = f"Ray Tune ended the search ({said}; {folder.parent / kept})"
        raise UserError(f"{what}; the same command goes on from what was done") from error
