"""Stop a study when its budget is used up: decision rules, and the monitor that applies them."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from optuna.trial import TrialState

from search.problem.pareto import IncrementalFront, hypervolume
from search.problem.trial import INITIAL, OTHER_RETAIN, TrialSpec
from search.report.style import counted
from search.spec.runtime import BaseRunResources, Budget, TrialResources
from search.store.study_store import StudyStore

USAGE = ("hours", "cpu_hours", "gpu_hours")
"""What a study has used over all its runs: wall-clock time, and what its trials and base runs held, times hours."""

SAVE_SECONDS = 5.0
"""Least time between two writes of what was used: a write per trial would cost more than small trials do."""


MEMORY = "memory"
"""Not a budget of the study, but one of its machines that is used up."""

STARVED = 2
"""So many trials in a row, each tried on several workers, that found no memory end a run."""


@dataclass(frozen=True)
class Stop:
    """Why a study hands out no more trials.

    Attributes:
        budget: The key of the budget that is used up.
        reason: In words for people.
    """

    budget: str
    reason: str

    @property
    def scores_front(self) -> bool:
        """Return True if the front is still scored once more: there is time, the search has only stopped finding anything."""
        return self.budget == "plateau"

    @property
    def gave_up(self) -> bool:
        """Return True if this is a failure, and not what the user asked for."""
        return self.budget in ("failure_rate", MEMORY)


class BudgetMonitor:
    """Count hours and judges budgets, at a cost per trial that does not grow with the study.

    Args:
        store: The open study; what was used over all its runs is kept in ``record.usage``.
        budget: When to stop.
        say: Called with a message when the study stops.
    """

    def __init__(self, store: StudyStore, budget: Budget, say: Callable[[str], None]) -> None:
        self.stopped: Stop | None = None
        self._store, self._budget, self._say = store, budget, say
        self._used = {**dict.fromkeys(USAGE, 0.0), **(store.record.usage or {})}
        self._booked = self._saved = time.monotonic()
        # Of this run only: after the cause is corrected, the same command must not give up for what failed before.
        self._ends: deque[str | None] = deque(maxlen=FAILURE_WINDOW)
        self._starved: list[str] = []
        self._growth: FrontGrowth | None = None
        self._volumes: deque[float] = deque()
        if budget.plateau is not None:
            self._volumes = deque(maxlen=budget.plateau.trials + 1)
            self._look_back()

    def stop(self, settled: bool = True) -> Stop | None:
        """Why no more trials are handed out; None while the study goes on. Once it has stopped it stays so in this run.

        Args:
            settled: Whether all base runs are there. Before, a front that does not grow may still do so.
        """
        self._book()
        if self.stopped is None:
            budget = self._budget
            plateau = budget.plateau if settled else None
            found = {
                MEMORY: out_of_memory(self._starved),
                "failure_rate": too_many_failures(list(self._ends), budget.failure_rate),
                "hours": over_time(self._used["hours"], budget.hours),
                "gpu_hours": over_gpu_time(self._used["gpu_hours"], budget.gpu_hours),
                "plateau": None if plateau is None else on_plateau(list(self._volumes), plateau.trials, plateau.gain),
            }
            self.stopped = next((Stop(key, reason) for key, reason in found.items() if reason is not None), None)
            if self.stopped is not None:
                self._say(f"no more trials are started: {self.stopped.reason}")
        return self.stopped

    def failed(self, reason: str, again: bool = False) -> None:
        """A trial has failed; one that is run again counts only by what comes of that."""
        if not again:
            self._ends.append(reason)

    def starved(self, reason: str) -> None:
        """A trial's workers were ended for want of memory, as often as it is tried."""
        self._starved.append(reason)

    def scored(self, job: TrialSpec, evidence: Mapping[str, Any]) -> None:
        """A trial is complete."""
        self._starved.clear()
        self._ends.append(None)
        if self._growth is None:
            return
        if job.kind == OTHER_RETAIN and self._store.spec.hypervolume.forget_quality_cap is None:
            self._look_back()  # the noise ceiling may have come down
        elif not job.is_control or job.kind == INITIAL:
            self._note(job.kind, self._growth.add([evidence[objective.name] for objective in self._store.objectives]))

    def pruned(self) -> None:
        """A search trial is pruned: scored to its end it would have added nothing."""
        self._starved.clear()
        self._ends.append(None)
        if self._growth is not None and self._volumes:
            self._note("search", self._volumes[-1])

    def held(self, seconds: float, resources: TrialResources | BaseRunResources) -> None:
        """Something held resources for so long."""
        processes = resources.processes if isinstance(resources, BaseRunResources) else 1
        self._used["cpu_hours"] += seconds / 3600 * resources.cpus * processes
        self._used["gpu_hours"] += seconds / 3600 * resources.gpus * processes
        self._book()

    def close(self) -> None:
        """Write what was used."""
        self._book(save=True)

    def _book(self, save: bool = False) -> None:
        now = time.monotonic()
        self._used["hours"] += (now - self._booked) / 3600
        self._booked = now
        self._store.record.set_usage(self._used)
        if save or now - self._saved >= SAVE_SECONDS:
            self._saved = now
            self._store.save_record()

    def _note(self, kind: str, volume: float) -> None:
        """Growth is judged from the last point that was given: what the unlearned epochs add is none of the search's."""
        if kind == "search":
            self._volumes.append(volume)
        elif self._volumes:
            self._volumes[-1] = volume
        else:
            self._volumes.append(volume)

    def _look_back(self) -> None:
        """Take the growth so far from the study, by the time at which trials ended."""
        store = self._store
        names = [objective.name for objective in store.objectives]
        controls = store.controls_frame()
        cap = store.noise_ceiling(controls)
        point = store.reference_point()
        ceilings = [objective.ceiling(cap) for objective in store.objectives]
        self._growth = FrontGrowth([point[name] for name in names], ceilings)
        self._volumes.clear()
        self._volumes.append(0.0)
        if not controls.empty:
            for row in controls[controls["kind"] == INITIAL].to_dict("records"):
                self._note("initial", self._growth.add([row[name] for name in names]))
        done = store.trials((TrialState.COMPLETE, TrialState.PRUNED), ("kind",))
        for trial in sorted(done, key=lambda trial: trial.datetime_complete or datetime.max):
            volume = self._volumes[-1] if trial.state == TrialState.PRUNED else self._growth.add(trial.values)
            self._note(trial.user_attrs.get("kind", "search"), volume)


FAILURE_WINDOW = 20
"""How many of the last ended trials the failure rate is taken over."""

FAILURE_LEAST = 10
"""So many trials must have ended in a run before its failure rate means anything."""


def over_time(hours: float, allowed: float | None) -> str | None:
    """Return True if all runs of a study together have taken their hours.

    Args:
        hours: Wall-clock time, at least 0.
        allowed: The budget, above 0; None is no limit.
    """
    if allowed is None or hours < allowed:
        return None
    return f"its runs took {hours:.3g} hours of {allowed:g} (budget.hours)"


def over_gpu_time(gpu_hours: float, allowed: float | None) -> str | None:
    """Return True if base runs and trials have held GPUs for as many hours as they may.

    Args:
        gpu_hours: GPUs held, times hours; 0 on machines without GPUs, where the budget is never used up.
        allowed: The budget, above 0; None is no limit.
    """
    if allowed is None or gpu_hours < allowed:
        return None
    return f"it held GPUs for {gpu_hours:.3g} GPU-hours of {allowed:g} (budget.gpu_hours)"


def on_plateau(volumes: Sequence[float], trials: int, gain: float) -> str | None:
    """Return True if the hypervolume has stopped growing.

    Args:
        volumes: Hypervolume before the first search trial and after each complete one, in order; never decreasing. Only the
            last `trials` + 1 are looked at.
        trials: Over how many trials growth is judged, at least 1.
        gain: Least growth that goes on, as a share of the hypervolume before these trials, above 0.
    """
    if len(volumes) <= trials:
        return None
    before, now = volumes[-1 - trials], volumes[-1]
    growth = now - before
    # From nothing, any growth is more than every share of it.
    if growth > 0 and growth >= gain * before:
        return None
    share = growth / before if before > 0 else 0.0
    return f"its hypervolume grew by {share:.2%} over the last {trials} trials, less than {gain:.2%} (budget.plateau)"


def too_many_failures(reasons: Sequence[str | None], allowed: float) -> str | None:
    """Return True if so many of the last trials failed that going on makes no sense.

    Args:
        reasons: Of each trial that has ended in this run, in order: why it failed, or None for a complete one. Only the last
            `FAILURE_WINDOW` are looked at.
        allowed: Share of failures from which on the study gives up, in (0, 1]; 1 never does.
    """
    last = reasons[-FAILURE_WINDOW:]
    failed = [reason for reason in last if reason is not None]
    if allowed >= 1 or len(last) < FAILURE_LEAST or len(failed) < allowed * len(last):
        return None
    common = "; ".join(f"{count} x {reason}" for reason, count in counted(failed)[:3])
    return f"{len(failed)} of the last {len(last)} trials failed (budget.failure_rate: {allowed:g}): {common}"


def out_of_memory(starved: Sequence[str]) -> str | None:
    """Return why a run ends whose trials find no memory, however often they are tried; None while that may have been chance.

    Args:
        starved: Reasons of the trials without memory since the last trial that ended well.
    """
    return None if len(starved) < STARVED else f"{len(starved)} trials in a row found no memory: {starved[-1]}"


class FrontGrowth:
    """Track the hypervolume of a growing set of points; it is computed only when a point joins the front.

    Args:
        reference: (m,) the reference point.
        ceilings: (m,) values above which more counts for nothing; infinity where there is none.
    """

    def __init__(self, reference: ArrayLike, ceilings: ArrayLike) -> None:
        self._reference = np.asarray(reference, dtype=np.float64)
        self._ceilings = np.asarray(ceilings, dtype=np.float64)
        self._front = IncrementalFront(len(self._reference))
        self.volume = 0.0

    def add(self, point: ArrayLike) -> float:
        """Add a point of shape (m,), finite; return the hypervolume of all so far, which never falls."""
        if self._front.add(np.minimum(np.asarray(point, dtype=np.float64), self._ceilings), equal=False):
            self.volume = max(self.volume, hypervolume(self._front.points, self._reference))
        return self.volume
