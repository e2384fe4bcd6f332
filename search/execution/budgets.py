"""When a study stops before it has all its trials: judgements about plain numbers. None of them reads a clock.

Each returns the reason to stop, as a person reads it, or None.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from search.problem.pareto import hypervolume

FAILURE_WINDOW = 20
"""How many of the last ended trials the failure rate is taken over."""
FAILURE_LEAST = 10
"""So many trials must have ended in a run before its failure rate means anything."""
LONGEST_REASON = 160
"""Characters of a reason that are shown where reasons are counted."""


def over_time(hours: float, allowed: float | None) -> str | None:
    """Whether all runs of a study together have taken their hours.

    Args:
        hours: Wall-clock time, at least 0.
        allowed: The budget, above 0; None is no limit.
    """
    if allowed is None or hours < allowed:
        return None
    return f"its runs took {hours:.3g} hours of {allowed:g} (budget.hours)"


def over_gpu_time(gpu_hours: float, allowed: float | None) -> str | None:
    """Whether base runs and trials have held GPUs for as many hours as they may.

    Args:
        gpu_hours: GPUs held, times hours; 0 on machines without GPUs, where the budget is never used up.
        allowed: The budget, above 0; None is no limit.
    """
    if allowed is None or gpu_hours < allowed:
        return None
    return f"it held GPUs for {gpu_hours:.3g} GPU-hours of {allowed:g} (budget.gpu_hours)"


def on_plateau(volumes: Sequence[float], trials: int, gain: float) -> str | None:
    """Whether the hypervolume has stopped growing.

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
    """Whether so many of the last trials failed that going on makes no sense.

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


def counted(reasons: Iterable[str]) -> list[tuple[str, int]]:
    """Reasons of failure, each cut to a line, and how often each came; the commonest first, equal ones as they came."""
    lines = (reason.strip().partition("\n")[0] for reason in reasons)
    return Counter(line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 4]} ..." for line in lines).most_common()


class FrontGrowth:
    """The hypervolume of a growing set of points, computed anew only when a point joins the front.

    Args:
        reference: (m,) the corner hypervolume is measured from.
        ceilings: (m,) values above which more counts for nothing; infinity where there is none.
    """

    def __init__(self, reference: ArrayLike, ceilings: ArrayLike) -> None:
        self._reference = np.asarray(reference, dtype=np.float64)
        self._ceilings = np.asarray(ceilings, dtype=np.float64)
        self._front = np.empty((0, len(self._reference)))
        self.volume = 0.0

    def add(self, point: ArrayLike) -> float:
        """Adds a point of shape (m,), finite, and returns the hypervolume of all so far, which never falls."""
        new = np.minimum(np.asarray(point, dtype=np.float64), self._ceilings)
        if np.all(self._front >= new, axis=1).any():
            return self.volume
        self._front = np.vstack([self._front[~np.all(new >= self._front, axis=1)], new])
        self.volume = max(self.volume, hypervolume(self._front, self._reference))
        return self.volume
