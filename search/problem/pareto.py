"""Pareto arithmetic: dominance, hypervolume, and the rules that pick one point of a front.

Every objective is maximised. `points` is a float array of shape (n, m): n points, m objectives.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from uipe_core.errors import UserError

FloatArray = NDArray[np.float64]

RULES = ("utility-floor", "knee", "chance", "robust")
"""Rules that pick one point of a front, by the name users give."""

DEFAULT_FLOOR = 0.95
"""Share of the initial model's utility that a selection keeps by default."""


def dominates(a: ArrayLike, b: ArrayLike) -> bool:
    """Return True if `a` is at least as good as `b` everywhere and better somewhere; both have shape (m,)."""
    first, second = _finite(a, "a"), _finite(b, "b")
    return bool(np.all(first >= second) and np.any(first > second))


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """The points that no other point dominates.

    Args:
        points: shape (n, m), n may be 0.

    Returns:
        A mask of shape (n,). Equal points do not dominate each other, so all copies of a front point are kept.

    Raises:
        ValueError: a value is NaN or infinite, or the shape is not (n, m).
    """
    values = _as_points(points)
    mask = np.ones(len(values), dtype=bool)
    # One row at a time keeps the memory at n * m instead of n * n * m.
    for row, point in enumerate(values):
        mask[row] = not np.any(np.all(values >= point, axis=1) & np.any(values > point, axis=1))
    return mask


def non_dominated_from(points: ArrayLike, start: ArrayLike | None) -> NDArray[np.bool_]:
    """The points that no other point dominates, and that are better than a starting point somewhere.

    Args:
        points: shape (n, m), n may be 0.
        start: shape (m,), what was there before any of them; None for nothing to compare with.

    Returns:
        A mask of shape (n,). A point equal to the start is left out, because it is no way from it.
    """
    mask = non_dominated(points)
    return mask if start is None else mask & np.any(_as_points(points) > _finite(start, "start"), axis=1)


class IncrementalFront:
    """A Pareto front that is kept up to date as points are added; a thousand points are compared at once.

    Args:
        objectives: Number of objectives.

    Attributes:
        points: (n, m) the front, in the order its points came.
        labels: What was added with each point.
    """

    def __init__(self, objectives: int) -> None:
        self.points = np.empty((0, objectives))
        self.labels: list[Any] = []

    def add(self, point: ArrayLike, label: Any = None, *, equal: bool = True) -> bool:
        """Add a point of shape (m,), and drop the points it dominates.

        Args:
            point: Finite values.
            label: Kept with it.
            equal: Keep points that are equal; otherwise only the first, or the one that replaces it, stays.

        Returns:
            True if the point joined the front.
        """
        new = np.asarray(point, dtype=np.float64)
        better = np.all(self.points >= new, axis=1)
        if (better & np.any(self.points > new, axis=1)).any() or (not equal and better.any()):
            return False
        stays = ~(np.all(new >= self.points, axis=1) & np.any(new > self.points, axis=1))
        self.labels = [*(each for each, kept in zip(self.labels, stays, strict=True) if kept), label]
        self.points = np.vstack([self.points[stays], new])
        return True


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Exact volume dominated by the points and bounded below by the reference point.

    Two objectives take one sweep. More are sliced along the last objective: between two neighbouring levels the cross
    section is the hypervolume, in one dimension less, of the points at or above the upper level. The time grows as n to
    the power of m - 1, which is harmless for the two or three objectives and hundreds of points of a study.

    Source: Zitzler and Thiele, "Multiobjective optimization using evolutionary algorithms", PPSN V, 1998 (the measure).

    Args:
        points: shape (n, m). A point that is not above the reference in every objective contributes nothing.
        reference: shape (m,), worse than the points of interest.

    Returns:
        The volume in the product of the units of the objectives, at least 0.

    Raises:
        ValueError: a value is NaN or infinite, or the shapes disagree.
    """
    values, origin = _as_points(points), _finite(reference, "reference")
    if origin.shape != (values.shape[1],):
        raise ValueError(f"reference must have shape ({values.shape[1]},) like the points, got {origin.shape}")
    above = values[np.all(values > origin, axis=1)] - origin
    return _volume(above)


def attainment_surface(fronts: Sequence[ArrayLike], share: float) -> FloatArray:
    """The boundary of what at least a share of several runs attain: its corners, (k, 2), best in the first objective first.

    A run attains a point if one of its own is at least as good in both objectives.

    Sources: Fonseca and Fleming, "On the performance assessment and comparison of stochastic multiobjective optimizers",
    PPSN IV, 1996; Lopez-Ibanez, Paquete and Stuetzle, "Exploratory analysis of stochastic local search algorithms in
    biobjective optimization", 2010 (quantiles).

    Args:
        fronts: (n, 2) points of each run; n may be 0, which attains nothing.
        share: Above 0 and at most 1.
    """
    runs = [_as_points(points) for points in fronts if len(np.asarray(points))]
    needed = math.ceil(share * len(fronts) - 1e-9)
    if len(runs) < needed:
        return np.empty((0, 2))
    across = np.unique(np.concatenate(runs)[:, 0])
    # Of each run, the best second objective at this value of the first or a better one.
    reached = [[run[run[:, 0] >= value, 1].max(initial=-np.inf) for value in across] for run in runs]
    up = np.sort(np.array(reached), axis=0)[-needed]
    corners = np.column_stack([across, up])[np.isfinite(up)]
    return np.unique(corners[non_dominated(corners)], axis=0)[::-1]


def knee(points: ArrayLike) -> int:
    """The front point that bulges farthest beyond the chord between the ends of the front.

    Each objective is scaled to [0, 1] over the front. With two objectives its ends then lie at (0, 1) and (1, 0), and
    the signed distance from the chord grows with the sum of the scaled objectives; with more, the sum measures the
    distance from the simplex of the unit vectors. A front that nowhere bulges beyond its chord, and one of two points,
    has an end as its knee: ties go to the larger first objective, then to the lower index.

    Source: Das, "On characterizing the knee of the Pareto curve based on normal-boundary intersection", Structural
    Optimization 18, 1999.

    Args:
        points: shape (n, m), n at least 1; dominated points are passed over.

    Returns:
        An index into `points`.

    Raises:
        UserError: there is no point.
        ValueError: a value is NaN or infinite, or the shape is not (n, m).
    """
    values = _as_points(points)
    if len(values) == 0:
        raise UserError("no point to take the knee of: the study has no complete trial; run more trials first")
    front = np.flatnonzero(non_dominated(values))
    low, high = values[front].min(axis=0), values[front].max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    # Rounding lets points on a straight front tie, so that their order does not hang on the last bit.
    bulge = np.round(((values[front] - low) / span).sum(axis=1), 12)
    best = np.lexsort((front, -values[front, 0], -bulge))[0]
    return int(front[best])


def utility_floor(forgetting: ArrayLike, utility: ArrayLike, floor: float) -> int:
    """The strongest forgetting among the points that keep enough utility.

    Args:
        forgetting: shape (n,), larger is stronger (log10 forget quality).
        utility: shape (n,), in the unit of `floor`.
        floor: least utility allowed, inclusive.

    Returns:
        An index; equal forgetting goes to the higher utility, then to the lower index.

    Raises:
        UserError: no point reaches the floor; the message gives the best utility there is.
        ValueError: a value is NaN or infinite, or the shapes disagree.
    """
    strength, kept = _finite(forgetting, "forgetting"), _finite(utility, "utility")
    if strength.ndim != 1 or strength.shape != kept.shape:
        raise ValueError(f"forgetting and utility must both have shape (n,), got {strength.shape} and {kept.shape}")
    if not np.isfinite(floor):
        raise ValueError(f"floor must be a finite number, got {floor}")
    enough = np.flatnonzero(kept >= floor)
    if len(enough) == 0:
        found = f"the best there is has {kept.max():.6g}; lower the floor" if len(kept) else "there is no complete trial"
        raise UserError(f"no point has a utility of at least {floor:.6g}: {found} or run more trials")
    return int(enough[np.lexsort((enough, -kept[enough], -strength[enough]))[0]])


def balance_at_chance(forgetting: ArrayLike, utility: ArrayLike, initial: tuple[float, float], chance: float) -> int:
    """The point nearest to chance at the utility it keeps.

    Two shares in [0, 1] are multiplied. One is how much of the way from the initial model's forgetting to chance is gone,
    where what is overshot counts as not gone. The other is the share of the initial model's utility, at most 1.
    `benchmarks/selection_regret.py` compares it with other rules on published models.

    Args:
        forgetting: shape (n,), larger is stronger.
        utility: shape (n,).
        initial: The initial model's forgetting, below chance, and its utility, above 0.
        chance: What a model has that cannot tell true answers from false ones.

    Returns:
        An index; equal products go to the stronger forgetting, then to the lower index.

    Raises:
        UserError: no product is above 0, or the initial model leaves no way to chance or has no utility.
        ValueError: a value is NaN or infinite, or the shapes disagree.
    """
    strength, kept = _finite(forgetting, "forgetting"), _finite(utility, "utility")
    start, whole, target = _finite([*initial, chance], "initial and chance")
    if strength.ndim != 1 or strength.shape != kept.shape:
        raise ValueError(f"forgetting and utility must both have shape (n,), got {strength.shape} and {kept.shape}")
    if start >= target or whole <= 0:
        raise UserError(
            f"the initial model must be below chance and have some utility: it has {start:.6g} (chance {target:.6g}) and a "
            f"utility of {whole:.6g}; choose by another rule"
        )
    gone = np.maximum(0.0, 1 - np.abs(target - strength) / (target - start))
    # Rounding lets points tie that are equal but for the unit they are given in.
    product = np.round(gone * np.clip(kept / whole, 0.0, 1.0), 12)
    if not np.any(product > 0):
        raise UserError("no point is nearer to chance than the initial model and keeps some utility; run more trials")
    return int(np.lexsort((np.arange(len(product)), -strength, -product))[0])


def _volume(heights: FloatArray) -> float:
    """Volume between the origin and points with positive coordinates, shape (n, m)."""
    if len(heights) == 0:
        return 0.0
    if heights.shape[1] == 1:
        return float(heights.max())
    levels = heights[np.argsort(-heights[:, -1], kind="stable")]
    depths = levels[:, -1] - np.append(levels[1:, -1], 0.0)
    if heights.shape[1] == 2:
        return float(np.maximum.accumulate(levels[:, 0]) @ depths)
    return float(sum(_volume(levels[: row + 1, :-1]) * depth for row, depth in enumerate(depths) if depth > 0))


def _as_points(points: ArrayLike) -> FloatArray:
    values = _finite(points, "points")
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"points must have shape (n, m) with m of at least 1, got {values.shape}")
    return values


def _finite(numbers: ArrayLike, name: str) -> FloatArray:
    values = np.asarray(numbers, dtype=np.float64)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite, got NaN or infinity in {np.count_nonzero(~np.isfinite(values))} places")
    return values
