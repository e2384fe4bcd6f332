"""List the samplers a study may name. The names are readable without importing Optuna."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

_STARTUP = 8


def _tpe(seed: int) -> "BaseSampler":
    from optuna.samplers import TPESampler

    return TPESampler(multivariate=True, n_startup_trials=_STARTUP, seed=seed)


def _nsga2(seed: int) -> "BaseSampler":
    from optuna.samplers import NSGAIISampler

    # The default of 50 would spend a whole study on the first, random generation.
    return NSGAIISampler(population_size=12, seed=seed)


def _gp(seed: int) -> "BaseSampler":
    from optuna.samplers import GPSampler

    return GPSampler(n_startup_trials=_STARTUP, seed=seed)


def _random(seed: int) -> "BaseSampler":
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


@dataclass(frozen=True)
class SamplerEntry:
    """A sampler of Optuna and how a study runs it.

    Attributes:
        make: Build the Optuna sampler from a seed.
        sees_pruned: It learns from PRUNED trials. One that does not proposes pruned points again and again.
        fixed_points: Every point is known before the first trial (`search.problem.space.grid_points`); `make` is never asked.
        needs_inner_products: The Gaussian process over the Gram matrix proposes (`search.samplers.line`); `make` builds the
            fallback, used where there are no losses to model.
    """

    make: Callable[[int], "BaseSampler"]
    sees_pruned: bool = True
    fixed_points: bool = False
    needs_inner_products: bool = False


SAMPLERS: dict[str, SamplerEntry] = {
    "line": SamplerEntry(_tpe, needs_inner_products=True),
    "tpe": SamplerEntry(_tpe),
    "nsga2": SamplerEntry(_nsga2, sees_pruned=False),
    "gp": SamplerEntry(_gp, sees_pruned=False),
    "random": SamplerEntry(_random),
    "grid": SamplerEntry(_random, fixed_points=True),
}
"""Samplers by the name a study file gives (``search.sampler``)."""
