"""Search for the strongest forgetting at a utility floor by bracketing alpha."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from search.problem.trial import TrialSpec
from search.results.study_result import StudyResult
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

CROSSED, PEAK, CEILING, ALWAYS, NEVER, OPEN = "crossed", "peak", "ceiling", "always", "never", "open"
"""State of a bracket: the floor is between two points; forgetting is strongest before it; forgetting is at its noise ceiling;
the highest alpha is feasible; the lowest is not; more scores are needed."""

CLOSE = 0.01
"""Share of the range of alpha below which two points are as good as one."""

INNER = 0.1
"""Share of a gap that a proposal keeps from its ends, so that each score shortens the gap."""


@dataclass(frozen=True)
class ScoredPoint:
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
class Constraint:
    """Strongest forgetting at utility of at least `floor`, for alpha from `low` to `high`; more than `ceiling` is noise."""

    floor: float
    low: float
    high: float
    ceiling: float = np.inf

    @property
    def close(self) -> float:
        """Distance in alpha below which two points are as good as one."""
        return CLOSE * (self.high - self.low)

    def feasible(self, point: ScoredPoint) -> bool:
        """Return True if a point keeps enough utility."""
        return point.sound and point.utility >= self.floor


@dataclass(frozen=True)
class BracketState:
    """Hold what is known of a line.

    Attributes:
        state: One of the words above.
        best: Feasible point of strongest forgetting; of equal ones that of most utility.
        last_feasible, first_infeasible: Neighbours between which the floor is crossed, at the best point or beyond it; None
            where there are none.
        next: The alpha to score next; None where nothing is to be won.
    """

    state: str
    best: ScoredPoint | None
    last_feasible: ScoredPoint | None
    first_infeasible: ScoredPoint | None
    next: float | None


def stand(points: Sequence[ScoredPoint], question: Constraint) -> BracketState:
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
        return BracketState(NEVER if known else OPEN, None, None, first, None if known else question.low)
    best = max(feasible, key=lambda point: (point.forgetting, point.utility))
    # Of equally forgetful ones, which a test's few p-values make frequent, the farthest one is nearest to more.
    edge = max(feasible, key=lambda point: (point.forgetting, point.alpha))
    before, after = _neighbours(line, edge)
    crossings = (pair for pair in pairwise(line) if question.feasible(pair[0]) and not question.feasible(pair[1]))
    last, first = next((pair for pair in crossings if pair[0].alpha >= edge.alpha), (None, None))
    if best.forgetting >= question.ceiling:
        return BracketState(CEILING, best, last, first, None)
    if after is None:
        reached = question.high - edge.alpha < question.close
        return BracketState(
            ALWAYS if reached else OPEN, best, last, first, None if reached else _farther(before, edge, question)
        )
    falls = after.forgetting <= edge.forgetting
    if falls and before is not None:
        wanted = _peak(before, edge, after, question)
        return BracketState(PEAK if wanted is None else OPEN, best, last, first, wanted)
    if after.alpha - edge.alpha <= question.close:
        return BracketState(CROSSED, best, last, first, None)
    return BracketState(OPEN, best, last, first, _crossing(edge, after, question.floor))


def promise(points: Sequence[ScoredPoint], question: Constraint) -> tuple[float, float]:
    """Return what a line may give, by curves through what is scored: strongest forgetting at the floor, and the utility there.

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


def _neighbours(line: list[ScoredPoint], point: ScoredPoint) -> tuple[ScoredPoint | None, ScoredPoint | None]:
    place = line.index(point)
    return line[place - 1] if place else None, line[place + 1] if place + 1 < len(line) else None


def _farther(before: ScoredPoint | None, edge: ScoredPoint, question: Constraint) -> float:
    """Beyond the last point: half as far again as the floor seems to be, or to the end where utility does not fall."""
    if before is None or before.utility <= edge.utility:
        return question.high
    slope = (before.utility - edge.utility) / (edge.alpha - before.alpha)
    return min(question.high, edge.alpha + max(1.5 * (edge.utility - question.floor) / slope, 2 * question.close))


def _crossing(feasible: ScoredPoint, infeasible: ScoredPoint, floor: float) -> float:
    """Where the straight line crosses the floor; in the middle where the far end has collapsed."""
    drop = feasible.utility - infeasible.utility
    share = (feasible.utility - floor) / drop if infeasible.sound and drop > 0 else 0.5
    return feasible.alpha + min(max(share, INNER), 1 - INNER) * (infeasible.alpha - feasible.alpha)


def _peak(before: ScoredPoint, edge: ScoredPoint, after: ScoredPoint, question: Constraint) -> float | None:
    """Return, near the strongest point, where a parabola through the three has its top; None where its neighbours are close."""
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


LINES = 3
"""How many base epochs are looked at, those of most promise first."""

MOST = 6
"""Points scored of each, at most."""


@dataclass(frozen=True)
class AlphaSweep:
    """A base epoch that was looked at: how it stands, and how many points were scored for it."""

    base: str
    epoch: int
    standing: BracketState
    scores: int


@dataclass(frozen=True)
class Answer:
    """Hold what came out.

    Attributes:
        floor: Least share of the initial model's utility.
        question: The same as a number, with the general range of alpha and the noise ceiling.
        best: The trial of strongest forgetting among all that keep so much utility, have not collapsed and forget more than the
            initial model; None without any.
        lines: What was looked at, best first.
    """

    floor: float
    question: Constraint
    best: int | None
    lines: tuple[AlphaSweep, ...]


class Dial:
    """Ask a study for points, round by round: one of each line at a time.

    Args:
        store: The open study.
        floor: Least share of the initial model's utility, above 0 and at most 1.

    Raises:
        UserError: Another floor, or a study that has not scored its initial model or any trial yet.
    """

    def __init__(self, store: StudyStore, floor: float) -> None:
        if not 0 < floor <= 1:
            raise UserError(f"--floor: {floor:g} is not a share of the initial model's utility; give a number above 0, up to 1")
        controls = store.controls_frame()
        initial = controls[controls["kind"] == "initial"] if "kind" in controls else controls
        if initial.empty or store.trials_frame().empty:
            raise UserError(f"{store.out}: neither the initial model nor a trial has been scored yet; run it with `uipe run`")
        self._store, self.floor = store, floor
        self._forgetting, self._utility = store.objectives[0], store.objectives[1].name
        ceiling = self._forgetting.ceiling(store.noise_ceiling(controls))
        start = initial.iloc[0]
        self.question = Constraint(floor * float(start[self._utility]), *store.spec.search.alpha.ends, ceiling)
        self._ranges = store.spec.alpha_ranges()
        self._start = ScoredPoint(-1.0, min(float(start[self._forgetting.name]), ceiling), float(start[self._utility]))
        self._places: list[tuple[str, int]] | None = None
        self._asked: set[TrialSpec] = set()

    def jobs(self) -> list[TrialSpec]:
        """Return the trials to score next: none for a base epoch whose bracket is closed or whose point failed."""
        wanted = []
        for line in self.lines():
            if line.standing.next is None or line.scores >= MOST:
                continue
            job = TrialSpec("dial", line.base, line.epoch, round(line.standing.next, 4), floor=self.floor)
            if job not in self._asked:
                wanted.append(job)
        self._asked.update(wanted)
        return wanted

    def lines(self) -> list[AlphaSweep]:
        """The lines that are looked at: those that were before, asked for the same floor, and others of most promise."""
        trials = self._store.trials_frame()
        points = self._points(trials)
        asked = trials[(trials["kind"] == "dial") & (trials["floor"] == self.floor)] if "floor" in trials else trials.iloc[:0]
        counts = Counter((str(row["base"]), int(row["epoch"])) for row in asked.to_dict("records"))
        if self._places is None:
            ranked = sorted(points, key=lambda place: promise(points[place], self._asked_of(place)), reverse=True)
            self._places = list(dict.fromkeys([*counts, *ranked]))[: max(LINES, len(counts))]
        return [AlphaSweep(*place, stand(points[place], self._asked_of(place)), counts[place]) for place in self._places]

    def _asked_of(self, place: tuple[str, int]) -> Constraint:
        """Return the question within the range of alpha of a base run."""
        low, high = self._ranges[place[0]]
        return replace(self.question, low=low, high=high)

    def best(self) -> int | None:
        """The strongest of all trials that keep enough utility, looked at or not; None if it forgets no more than the start."""
        scored = [point for points in self._points(self._store.trials_frame()).values() for point in points[1:]]
        feasible = [point for point in scored if self.question.feasible(point) and point.forgetting > self._start.forgetting]
        return None if not feasible else max(feasible, key=lambda point: (point.forgetting, point.utility)).trial

    def _points(self, trials: pd.DataFrame) -> dict[tuple[str, int], list[ScoredPoint]]:
        """Return what is scored of each base epoch, the initial model first."""
        found: dict[tuple[str, int], list[ScoredPoint]] = {}
        for row in trials.to_dict("records"):
            found.setdefault((str(row["base"]), int(row["epoch"])), [self._start]).append(self._point(row))
        return found

    def _point(self, row: dict[Any, Any]) -> ScoredPoint:
        forgetting = min(float(row[self._forgetting.name]), self.question.ceiling)
        # A column that some trials lack has NaN there.
        sound = not isinstance(row.get("collapsed"), str)
        return ScoredPoint(float(row["alpha"]), forgetting, float(row[self._utility]), sound, int(row["trial"]))


def answer_of(result: StudyResult, floor: float) -> Answer:
    """The answer a study has now."""
    dial = Dial(result.store, floor)

    def strength(line: AlphaSweep) -> tuple[float, float]:
        best = line.standing.best
        return (float("-inf"), 0.0) if best is None else (best.forgetting, best.utility)

    return Answer(floor, dial.question, dial.best(), tuple(sorted(dial.lines(), key=strength, reverse=True)))
