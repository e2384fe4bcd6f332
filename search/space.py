"""From a study to what Optuna searches: one flat space (base, epoch, alpha), its given points, and the samplers.

Flat, because samplers treat conditional parameters as independent draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

if TYPE_CHECKING:
    from search.spec import StudySpec

_STARTUP = 8


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


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(multivariate=True, n_startup_trials=_STARTUP, seed=seed)


def _nsga2(seed: int) -> BaseSampler:
    # The default of 50 would spend a whole study on the first, random generation.
    return NSGAIISampler(population_size=12, seed=seed)


def _gp(seed: int) -> BaseSampler:
    return GPSampler(n_startup_trials=_STARTUP, seed=seed)


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = MappingProxyType(
    {"tpe": _tpe, "nsga2": _nsga2, "gp": _gp, "random": _random}
)
"""Makers of samplers by the name a study gives."""


def make_sampler(name: str, seed: int) -> BaseSampler:
    """The sampler of a study.

    Raises:
        KeyError: The name is not in `SAMPLERS`; a `StudySpec` has none such.
    """
    return SAMPLERS[name](seed)
