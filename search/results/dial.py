"""Strongest forgetting at a floor of utility, asked directly: which lines to look at, what to score of them, the answer.

A line is one base epoch, walked by any alpha. Its points are ordinary trials of the study, of the kind ``dial``.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd

from search.problem.trial import Job
from search.problem.yardstick import forget_quality_cap
from search.results.constrained import Question, Scored, Standing, promise, stand
from search.results.study_result import StudyResult
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

LINES = 3
"""How many base epochs are looked at, those of most promise first."""
MOST = 6
"""Points scored of each, at most."""


@dataclass(frozen=True)
class Line:
    """A base epoch that was looked at: how it stands, and how many points were scored for it."""

    base: str
    epoch: int
    standing: Standing
    scores: int


@dataclass(frozen=True)
class Answer:
    """What came out.

    Attributes:
        floor: Least share of the initial model's utility.
        question: The same as a number, with the range of alpha and the noise ceiling.
        best: The trial of strongest forgetting among all that keep so much utility and have not collapsed; None without any.
        lines: What was looked at, best first.
    """

    floor: float
    question: Question
    best: int | None
    lines: tuple[Line, ...]


class Dial:
    """Asks a study for points, round by round: one of each line at a time.

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
        ceiling = self._forgetting.ceiling(forget_quality_cap(store.spec, controls))
        start = initial.iloc[0]
        alpha = store.spec.search.alpha
        self.question = Question(floor * float(start[self._utility]), alpha.low, alpha.high, ceiling)
        self._start = Scored(-1.0, min(float(start[self._forgetting.name]), ceiling), float(start[self._utility]))
        self._places: list[tuple[str, int]] | None = None
        self._asked: set[Job] = set()

    def jobs(self) -> list[Job]:
        """What to score next: nothing for a line that is settled, has had its scores, or whose point could not be scored."""
        wanted = []
        for line in self.lines():
            if line.standing.next is None or line.scores >= MOST:
                continue
            job = Job("dial", line.base, line.epoch, round(line.standing.next, 4), floor=self.floor)
            if job not in self._asked:
                wanted.append(job)
        self._asked.update(wanted)
        return wanted

    def lines(self) -> list[Line]:
        """The lines that are looked at: those that were before, asked for the same floor, and others of most promise."""
        trials = self._store.trials_frame()
        points = self._points(trials)
        asked = trials[(trials["kind"] == "dial") & (trials["floor"] == self.floor)] if "floor" in trials else trials.iloc[:0]
        counts = Counter((str(row["base"]), int(row["epoch"])) for row in asked.to_dict("records"))
        if self._places is None:
            ranked = sorted(points, key=lambda place: promise(points[place], self.question), reverse=True)
            self._places = list(dict.fromkeys([*counts, *ranked]))[: max(LINES, len(counts))]
        return [Line(*place, stand(points[place], self.question), counts[place]) for place in self._places]

    def best(self) -> int | None:
        """The strongest of all trials that keep enough utility, looked at or not."""
        scored = [point for points in self._points(self._store.trials_frame()).values() for point in points[1:]]
        feasible = [point for point in scored if self.question.feasible(point)]
        return None if not feasible else max(feasible, key=lambda point: (point.forgetting, point.utility)).trial

    def _points(self, trials: pd.DataFrame) -> dict[tuple[str, int], list[Scored]]:
        """What is scored of each base epoch, the initial model first."""
        found: dict[tuple[str, int], list[Scored]] = {}
        for row in trials.to_dict("records"):
            found.setdefault((str(row["base"]), int(row["epoch"])), [self._start]).append(self._point(row))
        return found

    def _point(self, row: dict[Any, Any]) -> Scored:
        forgetting = min(float(row[self._forgetting.name]), self.question.ceiling)
        # A column that some trials lack has NaN there.
        sound = not isinstance(row.get("collapsed"), str)
        return Scored(float(row["alpha"]), forgetting, float(row[self._utility]), sound, int(row["trial"]))


def answer_of(result: StudyResult, floor: float) -> Answer:
    """The answer a study has now."""
    dial = Dial(result.store, floor)

    def strength(line: Line) -> tuple[float, float]:
        best = line.standing.best
        return (float("-inf"), 0.0) if best is None else (best.forgetting, best.utility)

    return Answer(floor, dial.question, dial.best(), tuple(sorted(dial.lines(), key=strength, reverse=True)))
