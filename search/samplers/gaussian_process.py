"""One Gaussian process over all items: kernel from the Gram matrix of the update vectors, fit, prediction."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.linalg.lapack import dpstrf
from scipy.optimize import minimize

FloatArray = NDArray[np.float64]

IntArray = NDArray[np.int64]

LOOKED_AT = 800
"""Most points that those are taken from."""

JITTER = 1e-6
"""Variance of what no smooth function of weights explains, as a share of the kernel's own; float32 scores have about that."""

SHARES = JITTER + np.geomspace(1e-9, 1.0, 73)
"""Variances of errors, as a share of the kernel's own, that are looked at."""
STEPS = 1e-2
"""Variance of what changes in steps, as a share of the kernel's own: text changes at once where losses change smoothly."""
ERRORS = np.geomspace(1e-4, 0.3, 41)
"""Relative errors of losses that are looked at."""

WORTH = 8.0
"""Independent items that all of them count as when settings are fitted: they go together, so hundreds tell little more."""

PRIOR_SD = 0.3
"""Of the logarithm of each setting, around its start: points at one alpha alone, as a study begins, show few of them."""

_STEPS = 40


@dataclass(frozen=True)
class Points:
    """Where points lie: theta_init + scale * (update vector number `vector`). Both arrays are (P,); scale is 1 + alpha."""

    vector: IntArray
    scale: FloatArray

    def __len__(self) -> int:
        return len(self.scale)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Points":
        """Some of the points."""
        return Points(self.vector[rows], self.scale[rows])

    def __add__(self, other: "Points") -> "Points":
        return Points(np.concatenate([self.vector, other.vector]), np.concatenate([self.scale, other.scale]))


class Geometry:
    """Inner products of points, in units of the median squared norm of the update vectors.

    Args:
        gram: (M, M) inner products of the update vectors.

    Raises:
        ValueError: It is not square, symmetric and finite, or every vector is zero.
    """

    def __init__(self, gram: FloatArray) -> None:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.isfinite(gram).all():
            raise ValueError(f"a Gram matrix is square and finite, got shape {gram.shape}")
        if not np.allclose(gram, gram.T, rtol=1e-6, atol=1e-9 * np.abs(gram).max()):
            raise ValueError("a Gram matrix is symmetric")
        squares = np.diag(gram)
        if not (squares > 0).any():
            raise ValueError("a Gram matrix of zero vectors has no directions")
        self._gram = gram / np.median(squares[squares > 0])

    def inner(self, a: Points, b: Points) -> FloatArray:
        """(P, P') inner products of two sets of points, theta_init being the origin."""
        return np.outer(a.scale, b.scale) * self._gram[np.ix_(a.vector, b.vector)]

    def squares(self, a: Points) -> FloatArray:
        """(P,) squared distances from theta_init."""
        return np.asarray(a.scale**2 * self._gram[a.vector, a.vector])


@dataclass(frozen=True)
class Kernel:
    """constant + linear <x, y> + quadratic <x, y>^2 + Matern-5/2 of |x - y| / length, whose variance is 1.

    Polynomials carry a walk beyond what was seen, the Matern part bends between what was seen. The defaults were chosen on one
    small world; what eight of them show by themselves does no better (docs/log.md).
    """

    constant: float = 0.3
    linear: float = 0.3
    quadratic: float = 0.02
    length: float = 1.2

    def bends(self, inner: FloatArray, a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The Matern part given inner products and squared norms, and its derivative by log length."""
        ratio = np.sqrt(np.maximum(a[:, None] + b[None, :] - 2.0 * inner, 0.0)) * (np.sqrt(5.0) / self.length)
        decay, rising = np.exp(-ratio), 1.0 + ratio
        square = ratio * ratio / 3.0
        return (rising + square) * decay, square * rising * decay

    def matrix(self, geometry: Geometry, a: Points, b: Points) -> FloatArray:
        """(P, P') covariances of two sets of points."""
        inner = geometry.inner(a, b)
        matern, _ = self.bends(inner, geometry.squares(a), geometry.squares(b))
        matern += self.constant + inner * (self.linear + self.quadratic * inner)
        return matern

    def diagonal(self, geometry: Geometry, a: Points) -> FloatArray:
        """(P,) variances."""
        squares = geometry.squares(a)
        return self.constant + self.linear * squares + self.quadratic * squares**2 + 1.0

    def logarithms(self) -> FloatArray:
        """Its settings as `fit` moves them."""
        return np.log([self.constant, self.linear, self.quadratic, self.length])


@dataclass(frozen=True)
class Spectrum:
    """A covariance of N points as D (U diag(L) U^T) D, D^2 its diagonal: then errors of any size cost no more than others.

    With errors of the share g of each point's variance, the inverse is A diag(1 / (L + g)) A^T.

    Attributes:
        values: (N,) L, at least 0.
        axes: (N, N) A = U / D.
        typical: Median of D^2.
        logarithm: Of the determinant of D^2.
    """

    values: FloatArray
    axes: FloatArray
    typical: float
    logarithm: float

    @staticmethod
    def of(covariance: FloatArray) -> "Spectrum":
        """The spectrum of a covariance with a positive diagonal."""
        variances = np.diag(covariance)
        root = np.sqrt(variances)
        values, vectors = np.linalg.eigh(covariance / np.outer(root, root))
        logarithm = float(np.log(variances).sum())
        return Spectrum(np.maximum(values, 0.0), vectors / root[:, None], float(np.median(variances)), logarithm)

    def losses(self, squares: FloatArray, n: int, variances: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Minus the log likelihood of a group, for each variance of its errors; and the share of the likeliest scale.

        Args:
            squares: (N,) sums over the n values of the group of (A^T y)^2.
            n: How many values it has.
            variances: (E,) of the errors of its values at a typical point.
        """
        damped = self.values + SHARES[:, None]
        quadratic, logarithm = (squares / damped).sum(axis=1), np.log(damped).sum(axis=1)
        scale = variances[:, None] / (self.typical * (SHARES - JITTER))
        losses = 0.5 * (n * (len(squares) * np.log(scale) + logarithm) + quadratic / scale)
        best = np.argmin(losses, axis=1)
        return losses[np.arange(len(variances)), best], SHARES[best]


def fit(geometry: Geometry, places: Points, products: list[tuple[FloatArray, int, float]], start: Kernel) -> Kernel:
    """The settings of greatest marginal likelihood, the scale of every group being the most likely for each setting.

    Args:
        geometry: Of the update vectors.
        places: N points.
        products: Y Y^T (N, N) of each group's values Y (N, n), and its n: all that the likelihood needs of them; and the
            variance of its errors as a share of the kernel's.
        start: Where to begin, and the centre of the prior.
    """
    inner, squares = geometry.inner(places, places), geometry.squares(places)
    count, items = len(places), sum(n for _, n, _ in products)
    centre = start.logarithms()

    def loss(logarithms: FloatArray) -> tuple[float, FloatArray]:
        kernel = _kernel(logarithms)
        matern, growth = kernel.bends(inner, squares, squares)
        polynomial = (np.full_like(inner, kernel.constant), kernel.linear * inner, kernel.quadratic * inner**2)
        spectrum = Spectrum.of(matern + sum(polynomial))
        value, slope = 0.0, np.zeros_like(inner)
        for product, n, share in products:
            kept = 1.0 / (spectrum.values + share)
            turned = spectrum.axes.T @ product @ spectrum.axes
            scale = max(float(kept @ np.diag(turned)), 1e-300) / (count * n)
            value += 0.5 * n * (count * np.log(scale) + spectrum.logarithm - np.log(kept).sum())
            own = spectrum.axes @ (np.diag(n * kept) - np.outer(kept, kept) * turned / scale) @ spectrum.axes.T
            own[np.diag_indices(count)] *= 1.0 + share
            slope += own
        gradient = np.array([0.5 * (slope * each).sum() for each in (*polynomial, growth)])
        away = (logarithms - centre) / PRIOR_SD
        worth = min(1.0, WORTH / items)
        return worth * value + 0.5 * float(away @ away), worth * gradient + away / PRIOR_SD

    bounds = [(-12.0, 12.0)] * 3 + [(-4.0, 4.0)]
    found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
    return _kernel(found.x)


def _kernel(logarithms: FloatArray) -> Kernel:
    return Kernel(*(float(value) for value in np.exp(logarithms)))


def choose(geometry: Geometry, kernel: Kernel, places: Points, most: int) -> IntArray:
    """At most so many points, each the one the others before it tell least of; all of them if they are few. In their order.

    Of more than `LOOKED_AT` points the first half and the last half of that are looked at.
    """
    rows = np.arange(len(places))
    if len(places) <= most:
        return rows
    if len(places) > LOOKED_AT:
        rows = np.concatenate([rows[: LOOKED_AT // 2], rows[-(LOOKED_AT // 2) :]])
    looked_at = places.take(rows)
    covariance = kernel.matrix(geometry, looked_at, looked_at)
    # As they are, points that are the same would end it early.
    covariance[np.diag_indices(len(rows))] *= 1.0 + JITTER
    _, pivots, _, _ = dpstrf(covariance, lower=1)
    return np.sort(rows[pivots[:most] - 1])


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
            self._train(rows, spectrum, own, shares)
            for (rows, _), spectrum, own in zip(parts, spectra, turned, strict=True)
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

    def predict(self, candidates: Points, pending: Points | None = None) -> Prediction:
        """Predict candidates; `pending` points count as scored at their mean, so that deviations shrink near them."""
        mean, deviation = {}, {}
        kernel, geometry = self.kernel, self._geometry
        for trained in self._trained:
            across = trained.spectrum.axes.T @ kernel.matrix(geometry, trained.places, candidates)
            kept = 1.0 / (trained.spectrum.values + JITTER)
            left = kernel.diagonal(geometry, candidates) - kept @ across**2
            if pending is not None and len(pending):
                ours = trained.spectrum.axes.T @ kernel.matrix(geometry, trained.places, pending)
                within = kernel.matrix(geometry, pending, pending)
                within[np.diag_indices(len(pending))] *= 1.0 + 2.0 * JITTER
                within -= ours.T @ (kept[:, None] * ours)
                between = kernel.matrix(geometry, pending, candidates) - ours.T @ (kept[:, None] * across)
                left -= (solve_triangular(cholesky(within, lower=True), between, lower=True) ** 2).sum(axis=0)
            spread = np.sqrt(np.maximum(left, 0.0))
            for name, weights in trained.weights.items():
                mean[name] = self._origin[name] + across.T @ weights
                deviation[name] = spread
        return Prediction(mean, deviation)

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
