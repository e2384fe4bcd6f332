"""A recorded table played back: any place of the search space answered from the curves of its items, without a model.

Between recorded alphas, losses follow a cubic spline through all points of their curve, which begins with the initial model at
alpha = -1; measures of text jump where a word changes and follow the straight line between their two neighbours.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.interpolate import CubicSpline

from search.problem.objectives import FORGET_QUALITY, MEMORIZATION, MODEL_UTILITY, THIRD_OBJECTIVES, Objective
from search.problem.pareto import hypervolume
from uipe_core.errors import UserError
from uipe_core.metrics.composites import PARAPHRASE, Component, composite
from uipe_core.metrics.scores import ScoreReport, set_scores
from uipe_core.metrics.tofu import evaluate

from .table import ScoreTable

Items = Mapping[str, NDArray[Any]]
"""Item scores by ``set/measurement``."""

RETAIN_PROBABILITY = Objective(
    "retain_probability",
    "retain answer probability",
    "retain\nprob.",
    4,
    worst=0.0,
    from_items=True,
    components=(Component("retain", PARAPHRASE),),
)
"""Utility of a table of losses, where the answer itself stands in for its paraphrase."""

OBJECTIVES = {
    each.name: each for each in (FORGET_QUALITY, MODEL_UTILITY, MEMORIZATION, RETAIN_PROBABILITY, *THIRD_OBJECTIVES.values())
}
"""What a table may have been recorded for."""

LEAST = 4
"""Points a curve needs, the initial model among them: a cubic has four coefficients."""


class World:
    """A table as the study that a search sees. Symbols as in `ScoreTable`.

    Args:
        table: The recorded scores, of free text.
        used: (P,) which of its points are known; all when left out.

    Attributes:
        labels: Base runs.
        low, high: Range of alpha.
        corner, ceilings: (m,) where hypervolume begins, and above what more counts for nothing.

    Raises:
        UserError: A table of multiple choice; later, a curve that is too short.
    """

    def __init__(self, table: ScoreTable, used: NDArray[np.bool_] | None = None) -> None:
        self.table = table
        self.labels = list(table.epochs)
        self.low, self.high = table.meta["alpha"]["low"], table.meta["alpha"]["high"]
        self._used = np.ones(len(table), dtype=bool) if used is None else used
        self._varying = {name: values for name, values in table.arrays.items() if name not in table.meta["constant"]}
        self._smooth = [name for name in self._varying if name.endswith("_loss")]
        self._curves: dict[tuple[int, int], tuple[NDArray[np.float64], CubicSpline, Items]] = {}
        ceilings = [np.inf if ceiling is None else ceiling for ceiling in table.meta["ceilings"]]
        self._objectives = [OBJECTIVES[name] for name in table.meta["objectives"]]
        compared = any(each.needs_retain_model for each in self._objectives)
        if "retain/paraphrase_loss" not in table.arrays or (compared and not table.retain):
            raise UserError(f"the table of {table.meta['study']} is none of free text; only such tables can be replayed")
        self.ceilings, self.reference = np.array(ceilings), np.array(table.meta["corner"])

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """As `search.problem.space.distributions`."""
        return {
            "base": CategoricalDistribution(self.labels),
            "epoch": IntDistribution(1, max(self.table.epochs.values())),
            "alpha": FloatDistribution(self.low, self.high),
        }

    def items(self, base: int, epoch: int, alpha: float) -> dict[str, NDArray[Any]]:
        """Item scores at a place."""
        alphas, spline, steps = self._curve(base, epoch)
        flat, start = spline(alpha), 0
        items = {name: self.table.arrays[name] for name in self.table.meta["constant"]}
        for name in self._smooth:
            shape = self._varying[name].shape[1:]
            items[name] = flat[start : start + int(np.prod(shape))].reshape(shape)
            start += int(np.prod(shape))
        after = int(np.clip(np.searchsorted(alphas, alpha), 1, len(alphas) - 1))
        share = np.clip((alpha - alphas[after - 1]) / (alphas[after] - alphas[after - 1]), 0, 1)
        for name, values in steps.items():
            items[name] = (1 - share) * values[after - 1] + share * values[after]
        return items

    def objectives(self, items: Items) -> NDArray[np.float64]:
        """(m,) objectives of item scores, by the study's own metrics."""
        report, definition = report_of(items), self.table.meta["definition"]
        if not any(each.needs_retain_model for each in self._objectives):
            return np.array([composite(report, each.components, definition) for each in self._objectives])
        metrics = evaluate(report, self._retain, definition)
        quality, related = metrics.forget_quality, metrics.related.get("related")
        values = {"model_utility": metrics.model_utility}
        values |= {} if quality is None else {"log10_forget_quality": quality.log10_p}
        values |= {} if related is None else {"related_log10_forget_quality": related.log10_p}
        return np.array([values[name] for name in self.table.meta["objectives"]])

    def volume(self, points: NDArray[np.float64]) -> float:
        """Hypervolume, with forget quality capped at the noise ceiling."""
        return hypervolume(np.minimum(points, self.ceilings), self.reference)

    @cached_property
    def given(self) -> list[tuple[int, int, Items, NDArray[np.float64]]]:
        """Base, epoch, items and objectives of every epoch at alpha = 0."""
        table = self.table
        rows = [row for row in range(len(table)) if table.alpha[row] == 0]
        return [(int(table.base[row]), int(table.epoch[row]), table.items(row), table.objectives[row]) for row in rows]

    @cached_property
    def given_points(self) -> NDArray[np.float64]:
        """(1 + M, m) objectives of what is given: the initial model and every epoch at alpha = 0."""
        return np.array([self.objectives(self.table.initial), *(each[3] for each in self.given)])

    @cached_property
    def dense_gain(self) -> float:
        """Hypervolume of the whole grid over that of the given points."""
        return self.volume(np.concatenate([self.given_points, self.table.objectives])) - self.volume(self.given_points)

    @cached_property
    def _retain(self) -> ScoreReport:
        return report_of(self.table.retain)

    def _curve(self, base: int, epoch: int) -> tuple[NDArray[np.float64], CubicSpline, Items]:
        """Alphas, all smooth items side by side, and the others, of one update vector; it begins with the initial model."""
        if (base, epoch) not in self._curves:
            table = self.table
            rows = np.flatnonzero((table.base == base) & (table.epoch == epoch) & self._used)
            alphas = np.array([-1.0, *table.alpha[rows]])
            if len(alphas) < LEAST:
                where = f"{self.labels[base]}, epoch {epoch}"
                raise UserError(f"{where}: {len(alphas) - 1} points are too few for a curve; record at {LEAST} values of alpha")
            known = {
                name: np.concatenate([table.initial[name][None], values[rows]]).astype(np.float64)
                for name, values in self._varying.items()
            }
            flat = np.concatenate([known[name].reshape(len(alphas), -1) for name in self._smooth], axis=1)
            steps = {name: values for name, values in known.items() if name not in self._smooth}
            self._curves[base, epoch] = (alphas, CubicSpline(alphas, flat), steps)
        return self._curves[base, epoch]


class NoisyWorld(World):
    """A world whose losses were rounded: each scored point has an error of its own, the same whenever it is scored again.

    Args:
        table: The recorded scores, which count as the truth.
        level: Standard deviation of the relative error of every loss, each drawn by itself.
        seed: Of the errors.

    Attributes:
        truth: The same world without errors.
    """

    def __init__(self, table: ScoreTable, level: float, seed: int) -> None:
        self.truth, self._level, self._noise_seed = World(table), level, seed
        super().__init__(replace(table, initial=self._with_errors(table.initial, (0, 0, -1.0))))

    def items(self, base: int, epoch: int, alpha: float) -> dict[str, NDArray[Any]]:
        """Item scores at a place, errors included."""
        return self._with_errors(self.truth.items(base, epoch, alpha), (base, epoch, alpha))

    @cached_property
    def given(self) -> list[tuple[int, int, Items, NDArray[np.float64]]]:
        """Base, epoch, items and objectives of every epoch at alpha = 0, errors included."""
        found = [(base, epoch, self.items(base, epoch, 0.0)) for base, epoch, _, _ in self.truth.given]
        return [(base, epoch, items, self.objectives(items)) for base, epoch, items in found]

    def _with_errors(self, items: Items, place: tuple[int, int, float]) -> dict[str, NDArray[Any]]:
        base, epoch, alpha = place
        generator = np.random.default_rng([self._noise_seed, base, epoch, round(1e6 * (alpha + 1.0))])
        found = dict(items)
        for name in sorted(items):
            if name.endswith("_loss"):
                found[name] = items[name] * (1.0 + self._level * generator.standard_normal(items[name].shape))
        return found


def report_of(items: Items) -> ScoreReport:
    """Return recorded arrays of items as the scores of a model."""
    names = dict.fromkeys(name.partition("/")[0] for name in items)
    return ScoreReport({name: set_scores(items, name) for name in names})
