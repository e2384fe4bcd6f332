"""One Gaussian process over all items: errors of the scores, fit, prediction.

Scores of a model in bf16 lie off their smooth curve by a percent or so, the same amount whenever that point is scored: no draws
to average, but for the process they are the same. One number describes them, the relative error of every loss. What that is in
the values of a group follows from how they are made of losses (`OutcomeModel.units`), so that all groups tell of it together:
by itself a group could not tell errors from a curve that bends.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from search.samplers.kernels import JITTER, FloatArray, Geometry, IntArray, Kernel, Points, Spectrum, choose, fit

ERRORS = np.geomspace(1e-4, 0.3, 41)
"""Relative errors of losses that are looked at; the least is as good as none."""

STEPS = 1e-2
"""Variance of what changes in steps, as a share of the kernel's own: text changes at once where losses change smoothly."""

FITTED_ON = 96
"""Most points that the kernel's settings are fitted on."""

TRAINED_ON = 160
"""Most points that predictions rest on; with more of them, those that tell most are taken."""


@dataclass(frozen=True)
class _Trained:
    """Hold what was learned from the points where some groups were scored: those groups share the covariance."""

    rows: IntArray
    places: Points
    spectrum: Spectrum
    shares: Mapping[str, float]
    weights: Mapping[str, FloatArray]
    missed: Mapping[str, FloatArray]


@dataclass(frozen=True)
class Prediction:
    """Hold what is expected of C candidates: per group (C, n) means, (C,) standard deviations in units of the draws' spread."""

    mean: Mapping[str, FloatArray]
    deviation: Mapping[str, FloatArray]

    def take(self, rows: NDArray[np.int64]) -> "Prediction":
        """Of some of the candidates."""
        return Prediction({k: v[rows] for k, v in self.mean.items()}, {k: v[rows] for k, v in self.deviation.items()})


class MultiOutputGP:
    """The process, given the points scored so far.

    Args:
        geometry: Of the update vectors.
        places: (P,) points.
        values: (P, n) by group; a row of NaN where a point was not scored on that group. Every group has one row at least.
        units: Variance that a relative error of 1 in every loss would give the values of a group, by group. Groups that are not
            in it are no smooth functions of the weights, they change in steps.
        known: Kernel of an earlier model, to be kept (`kernel`); None fits it.

    Attributes:
        kernel: Of all groups.
        error: Relative error of the losses, the one that makes the values of all groups together the most likely.
    """

    def __init__(
        self,
        geometry: Geometry,
        places: Points,
        values: Mapping[str, FloatArray],
        units: Mapping[str, float],
        known: Kernel | None = None,
    ) -> None:
        self._geometry, self._places, self._units = geometry, places, units
        # theta_init's values are the origin where they are known, so that groups start from there and not from zero.
        origin = {name: _origin(places, each) for name, each in values.items()}
        self._origin = origin
        centred = {name: each - origin[name] for name, each in values.items()}
        self.kernel = known or self._fit(centred)
        parts = []
        for scored, group in _by_scored(centred):
            rows = scored[choose(geometry, self.kernel, places.take(scored), TRAINED_ON)]
            parts.append((rows, {name: centred[name][rows] for name in group}))
        spectra = [self._spectrum(self.kernel, rows) for rows, _ in parts]
        turned = [{name: each.axes.T @ of for name, of in own.items()} for each, (_, own) in zip(spectra, parts, strict=True)]
        self.error, shares = self._errors(list(zip(spectra, turned, strict=True)))
        self._trained = [
            self._train(rows, spectrum, own, shares) for (rows, _), spectrum, own in zip(parts, spectra, turned, strict=True)
        ]

    def _spectrum(self, kernel: Kernel, rows: IntArray) -> Spectrum:
        places = self._places.take(rows)
        return Spectrum.of(kernel.matrix(self._geometry, places, places))

    def _errors(self, parts: list[tuple[Spectrum, dict[str, FloatArray]]]) -> tuple[float, dict[str, float]]:
        """The relative error of the losses, and what share of the kernel's variance it is, by group."""
        total, shares = np.zeros(len(ERRORS)), {}
        for spectrum, turned in parts:
            for name, each in turned.items():
                if self._units.get(name, 0.0) > 0 and np.any(each):
                    variances = self._units[name] * ERRORS**2
                    loss, shares[name] = spectrum.losses((each**2).sum(axis=1), each.shape[1], variances)
                    total += loss
        best = int(np.argmin(total))
        return float(ERRORS[best]), {
            name: float(shares[name][best]) if name in shares else JITTER if name in self._units else STEPS
            for _, turned in parts
            for name in turned
        }

    def _fit(self, values: Mapping[str, FloatArray]) -> Kernel:
        # The points that most groups were scored at; those of pruned trials come in again when predictions are made.
        start = Kernel()
        scored, group = max(_by_scored(values), key=lambda each: (len(each[0]) * len(each[1]), each[1]))
        rows = scored[choose(self._geometry, start, self._places.take(scored), FITTED_ON)]
        chosen = {name: values[name][rows] for name in group if np.any(values[name][rows])}
        spectrum = self._spectrum(start, rows)
        _, shares = self._errors([(spectrum, {name: spectrum.axes.T @ each for name, each in chosen.items()})])
        products = [(each @ each.T, each.shape[1], shares[name]) for name, each in chosen.items()]
        return fit(self._geometry, self._places.take(rows), products, start) if products else start

    def _train(self, rows: IntArray, spectrum: Spectrum, turned: dict[str, FloatArray], shares: dict[str, float]) -> _Trained:
        weights, missed = {}, {}
        for name, each in turned.items():
            kept = 1.0 / (spectrum.values + shares[name])
            weights[name] = kept[:, None] * each
            # Equation 5.12 of Rasmussen and Williams: what a point misses when the others predict it, over the deviation.
            missed[name] = spectrum.axes @ weights[name] / np.sqrt(spectrum.axes**2 @ kept)[:, None]
        return _Trained(rows, self._places.take(rows), spectrum, {name: shares[name] for name in turned}, weights, missed)

    def expect(self, candidates: Points) -> dict[str, FloatArray]:
        """(C, n) means by group."""
        found: dict[str, FloatArray] = {}
        for trained in self._trained:
            found |= self._means(trained, self._across(trained, candidates))
        return found

    def predict(self, candidates: Points, pending: Points | None = None) -> Prediction:
        """Predict candidates; `pending` points count as scored at their mean, so that deviations shrink near them."""
        mean: dict[str, FloatArray] = {}
        deviation: dict[str, FloatArray] = {}
        for trained in self._trained:
            across = self._across(trained, candidates)
            mean |= self._means(trained, across)
            shares = sorted({*trained.shares.values()})
            spreads = self._spreads(trained, np.array(shares), candidates, across, pending)
            deviation |= {name: spreads[shares.index(share)] for name, share in trained.shares.items()}
        return Prediction(mean, deviation)

    def _means(self, trained: _Trained, across: FloatArray) -> dict[str, FloatArray]:
        return {name: self._origin[name] + across.T @ weights for name, weights in trained.weights.items()}

    def _across(self, trained: _Trained, points: Points) -> FloatArray:
        """(N, C) covariances with other points, along the axes."""
        return trained.spectrum.axes.T @ self.kernel.matrix(self._geometry, trained.places, points)

    def _spreads(
        self, trained: _Trained, shares: FloatArray, candidates: Points, across: FloatArray, pending: Points | None
    ) -> FloatArray:
        """(G, C) standard deviations, by share of errors; of what differs from theta_init, where that is less.

        Errors leave theta_init's own values unsure, and those of points close to it by as much: such points promise no gain.
        """
        kernel, geometry = self.kernel, self._geometry
        kept = 1.0 / (trained.spectrum.values + shares[:, None])
        left = kernel.diagonal(geometry, candidates) - kept @ across**2
        start = np.flatnonzero(trained.places.scale == 0)[:1]
        if len(start):
            origin = trained.places.take(start)
            own = self._across(trained, origin)[:, 0]
            unsure = kernel.diagonal(geometry, origin) - kept @ own**2
            common = kernel.matrix(geometry, origin, candidates) - (kept * own) @ across
            left = np.minimum(left, left + unsure[:, None] - 2.0 * common)
        if pending is not None and len(pending):
            ours, between = self._across(trained, pending), kernel.matrix(geometry, pending, candidates)
            for row, share in enumerate(shares):
                within = kernel.matrix(geometry, pending, pending)
                within[np.diag_indices(len(pending))] *= 1.0 + share + JITTER
                damped = kept[row][:, None] * ours
                factor = cholesky(within - ours.T @ damped, lower=True)
                left[row] -= (solve_triangular(factor, between - damped.T @ across, lower=True) ** 2).sum(axis=0)
        return np.sqrt(np.maximum(left, 0.0))

    def errors(self, generator: np.random.Generator, draws: int) -> dict[str, FloatArray]:
        """(S, n) by group: joint draws of what predictions may miss, for a deviation of 1.

        What the items of each scored point miss when all others predict them, mixed at random: items that went together go
        together, and the size is the one that was seen.
        """
        mixes = generator.standard_normal((draws, len(self._places)))
        return {
            name: mixes[:, trained.rows] @ missed / np.sqrt(len(trained.rows))
            for trained in self._trained
            for name, missed in trained.missed.items()
        }


def _origin(places: Points, values: FloatArray) -> FloatArray:
    there = np.flatnonzero((places.scale == 0) & np.isfinite(values).all(axis=1))
    return values[there[0]] if len(there) else np.nanmean(values, axis=0)


def _by_scored(values: Mapping[str, FloatArray]) -> list[tuple[IntArray, list[str]]]:
    """Points and groups: groups that were scored at the same points together."""
    found: dict[bytes, tuple[IntArray, list[str]]] = {}
    for name in sorted(values):
        scored = np.isfinite(values[name]).all(axis=1)
        found.setdefault(scored.tobytes(), (np.flatnonzero(scored), []))[1].append(name)
    return list(found.values())
