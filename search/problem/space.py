"""Define the search space: one flat space (base, epoch, alpha), and the points that are known beforehand.

Flat, because samplers treat conditional parameters as independent draws. Throughout, `epochs` maps every base run to the
number of its epochs, and `low` and `high` bound alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


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


def distributions(epochs: Mapping[str, int], low: float, high: float) -> "dict[str, BaseDistribution]":
    """Build the search space in the form of ``study.ask(fixed_distributions=...)``."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    return {
        "base": CategoricalDistribution(list(epochs)),
        "epoch": IntDistribution(1, max(epochs.values())),
        "alpha": FloatDistribution(low, high),
    }


def given_points(epochs: Mapping[str, int], low: float, high: float) -> list[Point]:
    """List every epoch of every base run at alpha = 0, which costs no search; none where alpha excludes 0."""
    if not low <= 0 <= high:
        return []
    return [Point(base, epoch, 0.0) for base, count in epochs.items() for epoch in range(1, count + 1)]


def grid_points(epochs: Mapping[str, int], low: float, high: float, trials: int) -> list[Point]:
    """List every epoch of every base run at evenly spaced values of alpha, as many as `trials` allows.

    Points at alpha = 0 are left out, because `given_points` has them.
    """
    bases = [(base, epoch) for base, count in epochs.items() for epoch in range(1, count + 1)]
    steps = trials // len(bases)
    # Rounded, so that 0 is 0; the ends stay what they are.
    inner = [round(low + (high - low) * step / (steps - 1), 9) for step in range(1, steps - 1)]
    alphas = [low, *inner, high]
    return [Point(base, epoch, alpha) for alpha in alphas if alpha != 0 for base, epoch in bases]


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
