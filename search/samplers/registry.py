"""The samplers a study may name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

_STARTUP = 8


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
    # The points of a grid are all known beforehand (`space.grid_points`); its sampler is never asked for any. Of `line` this is
    # what proposes where nothing is known of the lines (`line_sampler`).
    {"line": _tpe, "tpe": _tpe, "nsga2": _nsga2, "gp": _gp, "random": _random, "grid": _random}
)
"""Makers of samplers by the name a study gives."""

LEARN_FROM_COMPLETE = ("gp", "nsga2")
"""Samplers that see complete trials only: where trials were pruned they would propose again and again."""


def make_sampler(name: str, seed: int) -> BaseSampler:
    """The sampler of a study.

    Raises:
        KeyError: The name is not in `SAMPLERS`; a `StudySpec` has none such.
    """
    return SAMPLERS[name](seed)
