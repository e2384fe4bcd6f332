"""What the driver knows of its workers: which are still starting, how long each has been at work, and why one died.

Tune gives a waiting trial to the first worker that is free and cancels the new worker that was on its way for it. Where trials
are shorter than a worker's start, one dead worker is then never replaced: each of the others takes the trial the replacement
was meant for. So for a while after a death, as after the start, a worker that is done is held until the new ones have started.
"""

import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.execution.trial_limits import Death, cause_of_death

PATIENCE_SECONDS = 30.0
"""How long after a death, or after the start, workers that are done wait for others: a node that is gone may not come back."""


class Workforce:
    """Keeps count of workers between Tune's searcher, scheduler and callbacks.

    Args:
        trial_minutes: Longest a trial may take; None without a limit.
    """

    def __init__(self, trial_minutes: float | None) -> None:
        self._limit = trial_minutes
        self._waiting: dict[str, Trial] = {}
        self._working: dict[str, tuple[Trial, float]] = {}
        self._patient_until = 0.0

    def waits(self, trial: Trial) -> None:
        """A trial waits for a worker from now on."""
        self._waiting[trial.trial_id] = trial

    def begins(self, trial: Trial) -> None:
        """A worker has started on a trial."""
        self._waiting.pop(trial.trial_id, None)
        self._working[trial.trial_id] = (trial, time.monotonic())

    def death(self, trial_id: str) -> Death:
        """Why the worker of a trial died; to be asked before the trial has `ended`."""
        self._patient_until = time.monotonic() + PATIENCE_SECONDS
        trial, begun = self._working.get(trial_id, (self._waiting.get(trial_id), None))
        told = None if trial is None else trial.error_file
        # Tune tells its searcher that a worker died, but not why: that it writes into the trial's own folder.
        text = Path(told).read_text() if told is not None and Path(told).is_file() else ""
        return cause_of_death(text, None if begun is None else time.monotonic() - begun, self._limit)

    def ended(self, trial_id: str) -> float:
        """A trial has ended; returns for how many seconds it was at work, the loading of its model included."""
        self._waiting.pop(trial_id, None)
        _, begun = self._working.pop(trial_id, (None, None))
        return 0.0 if begun is None else time.monotonic() - begun

    def holds(self) -> bool:
        """Whether a worker that is done must wait for others to start."""
        return bool(self._waiting) and time.monotonic() < self._patient_until

    def callback(self) -> tune.Callback:
        """Tune's way to tell of workers that start."""
        return _Watch(self)

    def scheduler(self) -> TrialScheduler:
        """Tune's way to ask what becomes of a worker that is done; workers start from now on."""
        self._patient_until = time.monotonic() + PATIENCE_SECONDS
        return _Patience(self)


class _Watch(tune.Callback):
    def __init__(self, workforce: Workforce) -> None:
        self._workforce = workforce

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._workforce.begins(trial)


class _Patience(FIFOScheduler):
    def __init__(self, workforce: Workforce) -> None:
        super().__init__()
        self._workforce = workforce

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._workforce.waits(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(TrialScheduler.CONTINUE if self._workforce.holds() else TrialScheduler.STOP)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """None: Tune starts what waits in the order it came. Its own schedulers look through all trials there ever were."""
        return None
