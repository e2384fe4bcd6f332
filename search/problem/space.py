"""From a study to what Optuna searches: one flat space (base, epoch, alpha) and its given points.

Flat, because samplers treat conditional parameters as independent draws.
"""

from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.spec.study import StudySpec


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
        """What alpha means here: from the initial model (-1) over the unlearned epoch (0) to extrapolation."""
        if self.alpha == -1:
            return "initial model"
        if self.alpha < 0:
            return "interpolation"
        return "unlearned epoch" if self.alpha == 0 else "extrapolation"

    @property
    def params(self) -> dict[str, Any]:
        """The point as Optuna's parameters."""
        return {"base": self.base, "epoch": self.epoch, "alpha": self.alpha}


def distributions(spec: StudySpec) -> dict[str, BaseDistribution]:
    """The search space, in the form of ``study.ask(fixed_distributions=...)``."""
    alpha, epochs = spec.search.alpha, spec.base_epochs()
    return {
        "base": CategoricalDistribution(list(epochs)),
        "epoch": IntDistribution(1, max(epochs.values())),
        "alpha": FloatDistribution(alpha.low, alpha.high),
    }


def given_points(spec: StudySpec) -> list[Point]:
    """Every epoch of every base run at alpha = 0, which the search has for free; none where alpha excludes 0."""
    if not spec.search.alpha.low <= 0 <= spec.search.alpha.high:
        return []
    return [Point(base, epoch, 0.0) for base, count in spec.base_epochs().items() for epoch in range(1, count + 1)]


def grid_points(spec: StudySpec) -> list[Point]:
    """Every epoch of every base run at alphas spread evenly from the lowest to the highest, as many as the trials allow.

    A point at alpha = 0 among them is left out, because `given_points` has it.
    """
    bases = [(base, epoch) for base, count in spec.base_epochs().items() for epoch in range(1, count + 1)]
    steps = spec.search.trials // len(bases)
    low, high = spec.search.alpha.low, spec.search.alpha.high
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
