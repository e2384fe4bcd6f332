"""One Gaussian process for all items at once, over where a model lies in weight space.

All items share the kernel (`search.samplers.gaussian_process`), so epochs, methods and theta_init inform each other; one factorisation serves
all items, and each has a scale of its own, which its data give.

Symbols: P points, N of them trained on, C candidates, S draws, n items of a group.

Sources: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, chapters 2 (prediction), 5 (leaving one out);
Bonilla, Chai and Williams, "Multi-task Gaussian process prediction", NeurIPS 2007 (items that share a kernel).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

from search.samplers.gaussian_process import JITTER, FloatArray, Geometry, IntArray, Kernel, Places, choose, fit, with_nugget

FITTED_ON = 96
"""Most points that the kernel's settings are fitted on."""
TRAINED_ON = 160
"""Most points that predictions rest on; with more of them, those that tell most are taken."""


@dataclass(frozen=True)
class _Trained:
    """What was learned from the points where some groups were scored: those groups share the factor of the covariance."""

    kernel: Kernel
    rows: IntArray
    places: Places
    factor: FloatArray
    white: Mapping[str, FloatArray]
    missed: Mapping[str, FloatArray]


@dataclass(frozen=True)
class Prediction:
    """What is expected of C candidates: per group (C, n) means, (C,) standard deviations in units of the draws' spread."""

    mean: Mapping[str, FloatArray]
    deviation: Mapping[str, FloatArray]

    def take(self, rows: NDArray[np.int64]) -> "Prediction":
        """Of some of the candidates."""
        return Prediction({k: v[rows] for k, v in self.mean.items()}, {k: v[rows] for k, v in self.deviation.items()})


class LineModel:
    """The process, given the points scored so far.

    Args:
        geometry: Of the update vectors.
        places: (P,) points.
        values: (P, n) by group; a row of NaN where a point was not scored on that group. Every group has one row at least.
        noisy: Groups that are no smooth functions of the weights: they share a second kernel, with a nugget.
        known: Kernels of an earlier model, to be kept (`kernels`); None fits them.
    """

    def __init__(
        self,
        geometry: Geometry,
        places: Places,
        values: Mapping[str, FloatArray],
        noisy: frozenset[str] = frozenset(),
        known: tuple[Kernel, Kernel] | None = None,
    ) -> None:
        self._geometry, self._places = geometry, places
        # theta_init's values are the origin where they are known, so that groups start from there and not from zero.
        origin = {name: _origin(places, each) for name, each in values.items()}
        self._origin = origin
        centred = {name: each - origin[name] for name, each in values.items()}
        self.kernels = known or self._fit(centred, noisy)
        self._trained: dict[str, _Trained] = {}
        for kernel, names in zip(self.kernels, (set(values) - noisy, set(values) & noisy), strict=True):
            for scored, group in _by_scored(centred, names):
                self._train(kernel, scored, {name: centred[name] for name in group})

    def _fit(self, values: Mapping[str, FloatArray], noisy: frozenset[str]) -> tuple[Kernel, Kernel]:
        found = []
        start = Kernel()
        for names in (set(values) - noisy, set(values) & noisy):
            if names:
                # The points that most groups were scored at; those of pruned trials come in again when predictions are made.
                scored, group = max(_by_scored(values, names), key=lambda each: (len(each[0]) * len(each[1]), each[1]))
                rows = scored[choose(self._geometry, start, self._places.take(scored), FITTED_ON)]
                chosen = [values[name][rows] for name in group]
                products = [(each @ each.T, each.shape[1]) for each in chosen if np.any(each)]
                is_noisy = names <= noisy
                begin = Kernel(start.constant, start.linear, start.quadratic, start.length, 1e-3) if is_noisy else start
                start = fit(self._geometry, self._places.take(rows), products, begin, is_noisy) if products else begin
            found.append(start)
        return found[0], found[1]

    def _train(self, kernel: Kernel, scored: IntArray, values: Mapping[str, FloatArray]) -> None:
        rows = scored[choose(self._geometry, kernel, self._places.take(scored), TRAINED_ON)]
        places = self._places.take(rows)
        factor = cholesky(with_nugget(kernel.matrix(self._geometry, places, places), kernel.nugget), lower=True)
        white = {name: solve_triangular(factor, each[rows], lower=True) for name, each in values.items()}
        inverse = cho_solve((factor, True), np.eye(len(rows)))
        # Equation 5.12 of Rasmussen and Williams: what a point misses when the others predict it, over the deviation.
        once = inverse / np.sqrt(np.diag(inverse))[:, None]
        missed = {name: once @ each[rows] for name, each in values.items()}
        trained = _Trained(kernel, rows, places, factor, white, missed)
        self._trained.update(dict.fromkeys(values, trained))

    def predict(self, candidates: Places, pending: Places | None = None) -> Prediction:
        """What is expected of candidates; `pending` points count as scored just as expected, so deviations shrink near them."""
        mean, deviation = {}, {}
        for trained in {id(each): each for each in self._trained.values()}.values():
            kernel, geometry = trained.kernel, self._geometry
            across = solve_triangular(trained.factor, kernel.matrix(geometry, trained.places, candidates), lower=True)
            left = kernel.diagonal(geometry, candidates) - (across**2).sum(axis=0)
            if pending is not None and len(pending):
                ours = solve_triangular(trained.factor, kernel.matrix(geometry, trained.places, pending), lower=True)
                within = with_nugget(kernel.matrix(geometry, pending, pending), kernel.nugget) - ours.T @ ours
                jitter = JITTER * np.diag(kernel.matrix(geometry, pending, pending))
                between = kernel.matrix(geometry, pending, candidates) - ours.T @ across
                left -= (solve_triangular(cholesky(within + np.diag(jitter), lower=True), between, lower=True) ** 2).sum(axis=0)
            spread = np.sqrt(np.maximum(left, 0.0))
            for name, white in trained.white.items():
                mean[name] = self._origin[name] + across.T @ white
                deviation[name] = spread
        return Prediction(mean, deviation)

    def errors(self, generator: np.random.Generator, draws: int) -> dict[str, FloatArray]:
        """(S, n) by group: joint draws of what predictions may miss, for a deviation of 1.

        What the items of each scored point miss when all others predict them, mixed at random: items that went together go
        together, and the size is the one that was seen.
        """
        mixes = generator.standard_normal((draws, len(self._places)))
        return {
            name: mixes[:, trained.rows] @ trained.missed[name] / np.sqrt(len(trained.rows))
            for name, trained in self._trained.items()
        }


def _origin(places: Places, values: FloatArray) -> FloatArray:
    there = np.flatnonzero((places.scale == 0) & np.isfinite(values).all(axis=1))
    return values[there[0]] if len(there) else np.nanmean(values, axis=0)


def _by_scored(values: Mapping[str, FloatArray], names: set[str]) -> list[tuple[IntArray, list[str]]]:
    """Points and groups: groups that were scored at the same points together."""
    found: dict[bytes, tuple[IntArray, list[str]]] = {}
    for name in sorted(names):
        scored = np.isfinite(values[name]).all(axis=1)
        found.setdefault(scored.tobytes(), (np.flatnonzero(scored), []))[1].append(name)
    return list(found.values())
