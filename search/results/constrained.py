"""How far to walk one line so that forgetting is strongest while utility stays above a floor: numbers in, the next alpha out.

Along a line, from the initial model at alpha = -1 on, utility falls and forgetting rises, mostly; where either does not, only
what was really scored counts. A line is settled when the floor lies between two close neighbours, or when forgetting has its
peak or reaches its noise ceiling before the floor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.interpolate import PchipInterpolator

CROSSED, PEAK, CEILING, ALWAYS, NEVER, OPEN = "crossed", "peak", "ceiling", "always", "never", "open"
"""How a line stands: the floor lies between two points; forgetting is strongest before it; forgetting is at its noise ceiling;
the highest alpha is feasible; the lowest is not; more scores are needed."""

CLOSE = 0.01
"""Share of the range of alpha below which two points are as good as one."""
INNER = 0.1
"""Share of a gap that a proposal keeps from its ends, so that each score shortens the gap."""


@dataclass(frozen=True)
class Scored:
    """A scored point of a line.

    Attributes:
        alpha: Where.
        forgetting, utility: Its objectives, both the more the better; forgetting capped at the noise ceiling.
        sound: Whether the model has not collapsed; one that has is never feasible.
        trial: Its number; None for the initial model.
    """

    alpha: float
    forgetting: float
    utility: float
    sound: bool = True
    trial: int | None = None


@dataclass(frozen=True)
class Question:
    """Strongest forgetting at utility of at least `floor`, for alpha from `low` to `high`; more than `ceiling` is noise."""

    floor: float
    low: float
    high: float
    ceiling: float = np.inf

    @property
    def close(self) -> float:
        """Distance in alpha below which two points are as good as one."""
        return CLOSE * (self.high - self.low)

    def feasible(self, point: Scored) -> bool:
        """Whether a point keeps enough utility."""
        return point.sound and point.utility >= self.floor


@dataclass(frozen=True)
class Standing:
    """What is known of a line.

    Attributes:
        state: One of the words above.
        best: Feasible point of strongest forgetting; of equal ones that of most utility.
        last_feasible, first_infeasible: Neighbours between which the floor is crossed, at the best point or beyond it; None
            where there are none.
        next: The alpha to score next; None where nothing is to be won.
    """

    state: str
    best: Scored | None
    last_feasible: Scored | None
    first_infeasible: Scored | None
    next: float | None


def stand(points: Sequence[Scored], question: Question) -> Standing:
    """Where a line stands and what to score next.

    Args:
        points: What is scored of it, the initial model among them, in any order.
        question: What is asked.
    """
    line = sorted(points, key=lambda point: point.alpha)
    inside = [point for point in line if point.alpha >= question.low]
    feasible = [point for point in inside if question.feasible(point)]
    if not feasible:
        first = inside[0] if inside else None
        known = first is not None and first.alpha - question.low < question.close
        return Standing(NEVER if known else OPEN, None, None, first, None if known else question.low)
    best = max(feasible, key=lambda point: (point.forgetting, point.utility))
    # Of equally forgetful ones, which a test's few p-values make frequent, the farthest one is nearest to more.
    edge = max(feasible, key=lambda point: (point.forgetting, point.alpha))
    before, after = _neighbours(line, edge)
    crossings = (pair for pair in pairwise(line) if question.feasible(pair[0]) and not question.feasible(pair[1]))
    last, first = next((pair for pair in crossings if pair[0].alpha >= edge.alpha), (None, None))
    if best.forgetting >= question.ceiling:
        return Standing(CEILING, best, last, first, None)
    if after is None:
        reached = question.high - edge.alpha < question.close
        return Standing(ALWAYS if reached else OPEN, best, last, first, None if reached else _farther(before, edge, question))
    falls = after.forgetting <= edge.forgetting
    if falls and before is not None:
        wanted = _peak(before, edge, after, question)
        return Standing(PEAK if wanted is None else OPEN, best, last, first, wanted)
    if after.alpha - edge.alpha <= question.close:
        return Standing(CROSSED, best, last, first, None)
    return Standing(OPEN, best, last, first, _crossing(edge, after, question.floor))


def promise(points: Sequence[Scored], question: Question) -> tuple[float, float]:
    """What a line may give, by curves through what is scored: strongest forgetting at the floor, and the utility there.

    Minus infinity where no place between scored points is feasible.
    """
    line = sorted({point.alpha: point for point in points}.values(), key=lambda point: point.alpha)
    where = np.array([point.alpha for point in line])
    if len(line) < 2:
        alphas, forgetting, utility = where, *(np.array([getattr(p, name) for p in line]) for name in ("forgetting", "utility"))
    else:
        alphas = np.linspace(where[0], where[-1], 301)
        forgetting, utility = (
            PchipInterpolator(where, [getattr(point, name) for point in line])(alphas) for name in ("forgetting", "utility")
        )
    allowed = (utility >= question.floor) & (alphas >= question.low)
    if not allowed.any():
        return -np.inf, -np.inf
    strongest = np.flatnonzero(allowed)[np.argmax(forgetting[allowed])]
    return float(forgetting[strongest]), float(utility[strongest])


def _neighbours(line: list[Scored], point: Scored) -> tuple[Scored | None, Scored | None]:
    place = line.index(point)
    return line[place - 1] if place else None, line[place + 1] if place + 1 < len(line) else None


def _farther(before: Scored | None, edge: Scored, question: Question) -> float:
    """Beyond the last point: half as far again as the floor seems to be, or to the end where utility does not fall."""
    if before is None or before.utility <= edge.utility:
        return question.high
    slope = (before.utility - edge.utility) / (edge.alpha - before.alpha)
    return min(question.high, edge.alpha + max(1.5 * (edge.utility - question.floor) / slope, 2 * question.close))


def _crossing(feasible: Scored, infeasible: Scored, floor: float) -> float:
    """Where the straight line crosses the floor; in the middle where the far end has collapsed."""
    drop = feasible.utility - infeasible.utility
    share = (feasible.utility - floor) / drop if infeasible.sound and drop > 0 else 0.5
    return feasible.alpha + min(max(share, INNER), 1 - INNER) * (infeasible.alpha - feasible.alpha)


def _peak(before: Scored, edge: Scored, after: Scored, question: Question) -> float | None:
    """Beside the strongest point, where a parabola through the three has its top; None where its neighbours are close."""
    left, right = (max(before.alpha, question.low), edge.alpha), (edge.alpha, after.alpha)
    rise = (edge.forgetting - before.forgetting) / (edge.alpha - before.alpha)
    fall = (edge.forgetting - after.forgetting) / (after.alpha - edge.alpha)
    share = rise / (rise + fall) if rise + fall > 0 else 0.5
    # The slope is `rise` half-way to the left and minus `fall` half-way to the right.
    top = (before.alpha + edge.alpha) / 2 + share * (after.alpha - before.alpha) / 2
    for start, end in (right, left) if top > edge.alpha else (left, right):
        if end - start > 2 * question.close:
            inner = INNER * (end - start)
            return min(max(top, start + inner), end - inner)
    return None
