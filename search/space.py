"""From a study to what Optuna searches: one flat space (base, epoch, alpha) and its given points.

Flat, because samplers treat conditional parameters as independent draws.
"""

from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.spec import StudySpec


@dataclass(frozen=True)
class Point:
    """One place in the space: the update of base run `base` after `epoch`, walked by `alpha`."""

    base: str
    epoch: int
    alpha: float

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
    alpha = spec.search.alpha
    return {
        "base": CategoricalDistribution([run.label for run in spec.variants()]),
        "epoch": IntDistribution(1, spec.unlearning.epochs),
        "alpha": FloatDistribution(alpha.low, alpha.high),
    }


def given_points(spec: StudySpec) -> list[Point]:
    """Every epoch of every base run at alpha = 0, which the search has for free; none where alpha excludes 0."""
    if not spec.search.alpha.low <= 0 <= spec.search.alpha.high:
        return []
    return [Point(run.label, epoch, 0.0) for run in spec.variants() for epoch in range(1, spec.unlearning.epochs + 1)]
