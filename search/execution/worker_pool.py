"""Watch the workers of a search: which started, which died and why; hold finished workers until a replacement has started."""

import time
from dataclasses import dataclass, replace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.execution.ray_compat import failure_cause, failure_text

DIED = "the worker died or was killed"

LESS_MEMORY = "end other programs there, or lower resources.max_concurrent, scoring.batch_size or unlearning.batch_size"
"""What helps where a machine is short of memory."""


@dataclass(frozen=True)
class WorkerFailure:
    """Why a trial's worker died.

    Attributes:
        reason: In words for people.
        timed_out: Whether the trial itself was too long at work; it would be again, so it is not to be run again by itself.
        short_of_memory: Whether Ray ended the worker because its machine ran out of memory.
    """

    reason: str
    timed_out: bool = False
    short_of_memory: bool = False
    details: str = ""
    """What Ray said of it."""


def worker_failure(text: str, seconds: float | None, minutes: float | None) -> WorkerFailure:
    """Return what ended a worker in the middle of a trial.

    A worker at its time limit ends itself where nothing but the clock can speak for it: a trial that hangs in C code, perhaps
    with Python's lock held, sends no word. So a death without another cause after that time is one of the limit.

    Args:
        text: Ray's message about the death; empty where it says nothing.
        seconds: How long the trial was at work; None if its worker had not started yet.
        minutes: The limit; None without one.
    """
    cause, more = failure_cause(text)
    if cause == "memory":
        amount = f" ({more})" if more else ""
        reason = f"{DIED}: its machine ran out of memory{amount}, so Ray ended it; {LESS_MEMORY}"
        return WorkerFailure(reason, short_of_memory=True)
    if cause == "node":
        return WorkerFailure(f"{DIED}: its machine died or left the cluster")
    if cause == "start":
        return WorkerFailure(f"the worker could not start: {more}")
    if minutes is not None and seconds is not None and seconds >= 60 * minutes:
        return WorkerFailure(f"ran past its time limit of {minutes:g} minutes (budget.trial_minutes)", timed_out=True)
    return WorkerFailure(f"{DIED}: exit code {more}" if cause == "exit" else DIED)


class WorkerPoolMonitor:
    """Keep count of workers between Tune's searcher, scheduler and callbacks.

    Args:
        trial_minutes: Longest a trial may take; None without a limit.
    """

    def __init__(self, trial_minutes: float | None) -> None:
        self._limit = trial_minutes
        self._waiting: dict[str, Trial] = {}
        self._working: dict[str, tuple[Trial, float]] = {}
        self._hold_until = 0.0

    def waits(self, trial: Trial) -> None:
        """Note that a trial waits for a worker."""
        self._waiting[trial.trial_id] = trial

    def begins(self, trial: Trial) -> None:
        """Note that a worker has started on a trial."""
        self._waiting.pop(trial.trial_id, None)
        self._working[trial.trial_id] = (trial, time.monotonic())

    def death(self, trial_id: str) -> WorkerFailure:
        """Why the worker of a trial died; to be asked before the trial has `ended`."""
        self._hold_until = time.monotonic() + HOLD_SECONDS
        trial, begun = self._working.get(trial_id, (self._waiting.get(trial_id), None))
        text = failure_text(trial)
        found = worker_failure(text, None if begun is None else time.monotonic() - begun, self._limit)
        return replace(found, details=text)

    def ended(self, trial_id: str) -> float:
        """A trial has ended; returns for how many seconds it was at work, the loading of its model included."""
        self._waiting.pop(trial_id, None)
        _, begun = self._working.pop(trial_id, (None, None))
        return 0.0 if begun is None else time.monotonic() - begun

    def holds(self) -> bool:
        """Return True if a worker that is done must wait for others to start."""
        return bool(self._waiting) and time.monotonic() < self._hold_until

    def callback(self) -> tune.Callback:
        """Tune's way to tell of workers that start."""
        return _NoteStarts(self)

    def scheduler(self) -> TrialScheduler:
        """Make the Tune scheduler that holds finished workers while others start."""
        self._hold_until = time.monotonic() + HOLD_SECONDS
        return _HoldFinished(self)


HOLD_SECONDS = 30.0
"""How long after a death, or after the start, workers that are done wait for others: a node that is gone may not come back."""


class _NoteStarts(tune.Callback):
    def __init__(self, pool: WorkerPoolMonitor) -> None:
        self._pool = pool

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._pool.begins(trial)


class _HoldFinished(FIFOScheduler):
    def __init__(self, pool: WorkerPoolMonitor) -> None:
        super().__init__()
        self._pool = pool

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._pool.waits(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(TrialScheduler.CONTINUE if self._pool.holds() else TrialScheduler.STOP)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """None: Tune starts what waits in the order it came. Its own schedulers look through all trials there ever were."""
        return None
