"""Define the search space: one flat space (base, epoch, alpha), and the points that are known beforehand.

Flat, because samplers treat conditional parameters as independent draws. Throughout, `epochs` maps every base run to the
number of its epochs, and `ranges` to both ends of its alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


Range = tuple[float, float]
"""Lowest and highest alpha."""

_DIGITS = 9
"""Digits of an alpha that is stretched from the flat space."""


@dataclass(frozen=True)
class Point:
    """One place in the space: the update of base run `base` after `epoch`, walked by `alpha`.

    Attributes:
        base, epoch, alpha: The place.
        warm_start: The earlier study whose front it was on; None for a point at alpha = 0 given anyway.
    """

    base: str
    epoch: int
    alpha: float
    warm_start: str | None = field(default=None, compare=False)

    @property
    def walk(self) -> str:
        """Return what alpha means here: from the initial model (-1) over the unlearned epoch (0) to extrapolation."""
        if self.alpha == -1:
            return "initial model"
        if self.alpha < 0:
            return "interpolation"
        return "unlearned epoch" if self.alpha == 0 else "extrapolation"

    @property
    def params(self) -> dict[str, Any]:
        """The point as Optuna's parameters."""
        return {"base": self.base, "epoch": self.epoch, "alpha": self.alpha}


def distributions(epochs: Mapping[str, int], whole: Range) -> "dict[str, BaseDistribution]":
    """Build the search space in the form of ``study.ask(fixed_distributions=...)``; `whole` is the sampled range of alpha."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    return {
        "base": CategoricalDistribution(list(epochs)),
        "epoch": IntDistribution(1, max(epochs.values())),
        "alpha": FloatDistribution(*whole),
    }


def given_points(epochs: Mapping[str, int], ranges: Mapping[str, Range]) -> list[Point]:
    """List every epoch of every base run at alpha = 0, which costs no search; none where its alpha excludes 0."""
    there = [base for base in epochs if ranges[base][0] <= 0 <= ranges[base][1]]
    return [Point(base, epoch, 0.0) for base in there for epoch in range(1, epochs[base] + 1)]


def grid_points(epochs: Mapping[str, int], ranges: Mapping[str, Range], trials: int) -> list[Point]:
    """List every epoch of every base run at evenly spaced values of alpha, as many as `trials` allows.

    Points at alpha = 0 are left out, because `given_points` has them.
    """
    bases = [(base, epoch) for base, count in epochs.items() for epoch in range(1, count + 1)]
    steps = trials // len(bases)

    def alpha(base: str, step: int) -> float:
        low, high = ranges[base]
        # Rounded, so that 0 is 0; the ends stay what they are.
        return {0: low, steps - 1: high}.get(step, round(low + (high - low) * step / (steps - 1), _DIGITS))

    points = [Point(base, epoch, alpha(base, step)) for step in range(steps) for base, epoch in bases]
    return [point for point in points if point.alpha != 0]


def own_alpha(sampled: float, whole: Range, own: Range) -> float:
    """Return the alpha of a base run that a sampled one stands for: the flat space's range stretched onto the base run's own.

    Args:
        sampled: Within `whole`.
        whole: The sampled range.
        own: The base run's.
    """
    if own == whole:
        return sampled
    share = (sampled - whole[0]) / (whole[1] - whole[0])
    return min(max(round(own[0] + share * (own[1] - own[0]), _DIGITS), own[0]), own[1])


def sampled_alpha(alpha: float, whole: Range, own: Range) -> float:
    """Return the sampled alpha that stands for a base run's own; `own_alpha` of it is `alpha`, to nine digits."""
    if own == whole:
        return alpha
    share = (alpha - own[0]) / (own[1] - own[0])
    return min(max(whole[0] + share * (whole[1] - whole[0]), whole[0]), whole[1])


def own_epoch(sampled: int, longest: int, count: int) -> int:
    """The epoch of a base run that a sampled one stands for.

    The space stays flat where base runs differ in length: each has its epochs spread evenly over those of the longest.

    Args:
        sampled: From 1 to `longest`.
        longest: Epochs of the longest base run.
        count: Epochs of this one, from 1 to `longest`.
    """
    return -(-sampled * count // longest)


def sampled_epoch(own: int, longest: int, count: int) -> int:
    """The last sampled epoch that stands for an epoch of a base run; `own_epoch` of it is `own`."""
    return own * longest // count


def in_flat_space(
    params: Mapping[str, Any], epochs: Mapping[str, int], whole: Range, ranges: Mapping[str, Range]
) -> dict[str, Any]:
    """Return parameters with a base run's own epoch and alpha, those that are there, as samplers have them."""
    found = dict(params)
    if "epoch" in params:
        found["epoch"] = sampled_epoch(params["epoch"], max(epochs.values()), epochs[params["base"]])
    if "alpha" in params:
        found["alpha"] = sampled_alpha(params["alpha"], whole, ranges[params["base"]])
    return found


def own_point(params: Mapping[str, Any], epochs: Mapping[str, int], whole: Range, ranges: Mapping[str, Range]) -> Point:
    """Return the point that a sampler's parameters stand for."""
    base = params["base"]
    epoch = own_epoch(params["epoch"], max(epochs.values()), epochs[base])
    return Point(base, epoch, own_alpha(params["alpha"], whole, ranges[base]))
