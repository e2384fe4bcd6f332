"""Compute effects, intervals and decisions over seeds: arrays in, numbers out.

A training curve is a method's trained epochs in order, epoch 0 being the initial model; between epochs it is a straight line.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

FloatArray = NDArray[np.float64]

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean of one effect over seeds.

    Attributes:
        mean: Arithmetic mean; NaN without values.
        error: Standard error of the mean (sample standard deviation over root n); NaN for fewer than two values.
        low, high: Student's 95% interval of the mean; infinite for fewer than two values.
        values: One per seed, those that are finite.
    """

    mean: float
    error: float
    low: float
    high: float
    values: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON: numbers that do not exist are null."""
        return {key: _json(value) for key, value in asdict(self).items()}


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if np.isfinite(value) else None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard error and Student's 95% interval; values that are not finite are left out.

    With three seeds the interval reaches 4.3 standard errors to each side, with five 2.8: two would be too sure of so few.
    """
    known = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    count = len(known)
    mean = float(known.mean()) if count else float("nan")
    if count < 2:
        return Estimate(mean, float("nan"), -np.inf, np.inf, tuple(known.tolist()))
    error = float(known.std(ddof=1) / np.sqrt(count))
    reach = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Estimate(mean, error, mean - reach, mean + reach, tuple(known.tolist()))


def finite_mean(values: Sequence[float]) -> float | None:
    """Return the mean; None without values, or where one is not finite."""
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None


def judge(effect: Estimate, least: float) -> str:
    """The rule: a claim holds where the whole interval of its effect is above `least`, does not where it is below."""
    if effect.low > least:
        return HOLDS
    return FAILS if effect.high < least else OPEN


def at(values: ArrayLike, position: float) -> float:
    """A quantity of a training curve at a fractional epoch in [0, n - 1]."""
    known = np.asarray(values, dtype=np.float64)
    return float(np.interp(position, np.arange(len(known)), known))


def first_reached(values: ArrayLike, level: float) -> float:
    """Fractional epoch at which a curve first climbs to a level; NaN if it never does.

    A curve that starts at or above the level has reached it at 0.
    """
    known = np.asarray(values, dtype=np.float64)
    reached = np.flatnonzero(known >= level)
    if not len(reached):
        return float("nan")
    end = int(reached[0])
    if end == 0:
        return 0.0
    before, after = known[end - 1], known[end]
    return float(end - 1 + (level - before) / (after - before))


def best_above(values: ArrayLike, utility: ArrayLike, floor: float) -> float:
    """Highest value along a training curve where utility is at least `floor`; NaN if it nowhere is.

    Both are straight between epochs, so the best is at an epoch or where utility crosses the floor.
    """
    known, kept = np.asarray(values, dtype=np.float64), np.asarray(utility, dtype=np.float64)
    found = list(known[kept >= floor])
    for left in range(len(known) - 1):
        low, high = kept[left], kept[left + 1]
        if (low >= floor) != (high >= floor):
            share = (floor - low) / (high - low)
            found.append(known[left] + share * (known[left + 1] - known[left]))
    return float(max(found)) if found else float("nan")


@dataclass(frozen=True)
class Match:
    """The place of a training curve that comes nearest to a point.

    Attributes:
        position: Fractional epoch.
        distance: Distance from the point, in units of the scales.
    """

    position: float
    distance: float


def nearest(curve: ArrayLike, point: ArrayLike, scales: ArrayLike) -> Match:
    """The place of a polyline nearest to a point.

    Args:
        curve: (n, m) vertices, n >= 1: n epochs, m quantities.
        point: (m,).
        scales: (m,) what counts as a distance of 1 in each quantity.
    """
    scale = np.asarray(scales, dtype=np.float64)
    vertices, target = np.asarray(curve, dtype=np.float64) / scale, np.asarray(point, dtype=np.float64) / scale
    if len(vertices) == 1:
        return Match(0.0, float(np.linalg.norm(target - vertices[0])))
    starts, steps = vertices[:-1], np.diff(vertices, axis=0)
    lengths = (steps**2).sum(axis=1)
    shares = np.divide(((target - starts) * steps).sum(axis=1), lengths, out=np.zeros(len(steps)), where=lengths > 0)
    shares = np.clip(shares, 0.0, 1.0)
    distances = np.linalg.norm(starts + shares[:, None] * steps - target, axis=1)
    segment = int(distances.argmin())
    return Match(segment + float(shares[segment]), float(distances[segment]))


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of two samples; NaN where one of them does not vary or there are fewer than two."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def stall_epoch(values: ArrayLike, share: float = 0.1) -> int:
    """The epoch at which a rising curve stalls: half of its rise is done, and one more epoch brings less than `share` of it.

    Args:
        values: (n,) by epoch from 0 on, n >= 2; the whole rise is from epoch 0 to the highest value.
        share: In (0, 1).

    Returns:
        The first such epoch from 1 on; n - 2, the last but one, if there is none.
    """
    known = np.asarray(values, dtype=np.float64)
    whole = known.max() - known[0]
    for epoch in range(1, len(known) - 1):
        if known[epoch] - known[0] >= whole / 2 and known[epoch + 1] - known[epoch] < share * whole:
            return epoch
    return max(1, len(known) - 2)


def first_below(values: ArrayLike, level: float) -> float:
    """Fractional epoch at which a curve first falls to a level; the last epoch if it never does."""
    known = -np.asarray(values, dtype=np.float64)
    fallen = first_reached(known, -level)
    return fallen if np.isfinite(fallen) else float(len(known) - 1)


def coefficient(values: ArrayLike, asked: ArrayLike, others: Sequence[ArrayLike]) -> float:
    """Return the coefficient of one column in a least-squares fit; NaN where the data cannot tell it from the others.

    Args:
        values: (n,) what is explained.
        asked: (n,) the column asked about.
        others: Columns of (n,), which include an intercept or what adds up to one.
    """
    column, rest = np.asarray(asked, dtype=np.float64), np.column_stack([np.asarray(each, dtype=np.float64) for each in others])
    if len(column) <= rest.shape[1] + 1:
        return float("nan")
    # Of what the others leave of it (Frisch and Waugh): nothing, where it is a sum of them.
    left = column - rest @ np.linalg.lstsq(rest, column, rcond=None)[0]
    if np.linalg.norm(left) <= 1e-9 * max(1.0, float(np.linalg.norm(column))):
        return float("nan")
    return float(left @ np.asarray(values, dtype=np.float64) / (left @ left))
