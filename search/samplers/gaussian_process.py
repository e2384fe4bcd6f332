"""One Gaussian process over all items: kernel from the Gram matrix of the update vectors, fit, prediction."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpstrf
from scipy.optimize import minimize

FloatArray = NDArray[np.float64]

IntArray = NDArray[np.int64]

LOOKED_AT = 800
"""Most points that those are taken from."""

JITTER = 1e-6
"""Variance of what no smooth function of weights explains, as a share of the kernel's own; float32 scores have about that."""

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

    Polynomials carry a walk beyond what was seen, the Matern part bends between what was seen. `nugget` is a share of the
    variance that is no function of the weights: text changes at once where losses change smoothly. The defaults were chosen
    on one small world; what eight of them show by themselves does no better (docs/log.md).
    """

    constant: float = 0.3
    linear: float = 0.3
    quadratic: float = 0.02
    length: float = 1.2
    nugget: float = JITTER

    def bends(self, inner: FloatArray, a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The Matern part given inner products and squared norms, and its derivative by log length."""
        ratio = np.sqrt(np.maximum(a[:, None] + b[None, :] - 2.0 * inner, 0.0)) * (np.sqrt(5.0) / self.length)
        decay, rising = np.exp(-ratio), 1.0 + ratio
        square = ratio * ratio / 3.0
        return (rising + square) * decay, square * rising * decay

    def matrix(self, geometry: Geometry, a: Points, b: Points) -> FloatArray:
        """(P, P') covariances of two sets of points, without the nugget."""
        inner = geometry.inner(a, b)
        matern, _ = self.bends(inner, geometry.squares(a), geometry.squares(b))
        matern += self.constant + inner * (self.linear + self.quadratic * inner)
        return matern

    def diagonal(self, geometry: Geometry, a: Points) -> FloatArray:
        """(P,) variances, without the nugget."""
        squares = geometry.squares(a)
        return self.constant + self.linear * squares + self.quadratic * squares**2 + 1.0

    def logarithms(self, noisy: bool) -> FloatArray:
        """Its settings as `fit` moves them."""
        values = [self.constant, self.linear, self.quadratic, self.length, *([self.nugget] if noisy else [])]
        return np.log(values)


def _kernel(logarithms: FloatArray) -> Kernel:
    return Kernel(*(float(value) for value in np.exp(logarithms)))


def fit(geometry: Geometry, places: Points, products: list[tuple[FloatArray, int]], start: Kernel, noisy: bool) -> Kernel:
    """The settings of greatest marginal likelihood, the scale of every group being the most likely for each setting.

    Args:
        geometry: Of the update vectors.
        places: N points.
        products: Y Y^T (N, N) of each group's values Y (N, n), and its n: all that the likelihood needs of them.
        start: Where to begin, and the centre of the prior.
        noisy: Whether the nugget is fitted too.
    """
    inner, squares = geometry.inner(places, places), geometry.squares(places)
    count, items = len(places), sum(n for _, n in products)
    centre = start.logarithms(noisy)

    def loss(logarithms: FloatArray) -> tuple[float, FloatArray]:
        kernel = _kernel(logarithms)
        matern, growth = kernel.bends(inner, squares, squares)
        polynomial = (np.full_like(inner, kernel.constant), kernel.linear * inner, kernel.quadratic * inner**2)
        covariance = matern + sum(polynomial)
        variances = np.diag(covariance).copy()
        try:
            factor = cholesky(with_nugget(covariance, kernel.nugget), lower=True)
        except np.linalg.LinAlgError:
            return 1e12, np.zeros_like(logarithms)
        inverse = cho_solve((factor, True), np.eye(count))
        value, slope = items * np.log(np.diag(factor)).sum(), items * inverse
        for product, n in products:
            scale = max(float((inverse * product).sum()), 1e-300) / (count * n)
            value += 0.5 * n * count * np.log(scale)
            slope -= inverse @ product @ inverse / scale
        derivatives = [*polynomial, growth]
        gradient = [
            0.5 * ((slope * each).sum() + kernel.nugget * (np.diag(slope) * np.diag(each)).sum()) for each in derivatives
        ]
        if noisy:
            gradient.append(0.5 * kernel.nugget * (np.diag(slope) * variances).sum())
        away = (logarithms - centre) / PRIOR_SD
        worth = min(1.0, WORTH / items)
        return worth * value + 0.5 * float(away @ away), worth * np.array(gradient) + away / PRIOR_SD

    bounds = [(-12.0, 12.0)] * 3 + [(-4.0, 4.0)] + ([(np.log(JITTER), 0.0)] if noisy else [])
    found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
    return _kernel(found.x)


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
    # Without the nugget points that are the same would end it early.
    _, pivots, _, _ = dpstrf(with_nugget(covariance, max(kernel.nugget, JITTER)), lower=1)
    return np.sort(rows[pivots[:most] - 1])


def with_nugget(covariance: FloatArray, nugget: float) -> FloatArray:
    """Covariances of points as they are scored: a share of its own variance comes to each."""
    return covariance + np.diag(nugget * np.diag(covariance))


FITTED_ON = 96
"""Most points that the kernel's settings are fitted on."""

TRAINED_ON = 160
"""Most points that predictions rest on; with more of them, those that tell most are taken."""


@dataclass(frozen=True)
class _Trained:
    """Hold what was learned from the points where some groups were scored: those groups share the factor of the covariance."""

    kernel: Kernel
    rows: IntArray
    places: Points
    factor: FloatArray
    white: Mapping[str, FloatArray]
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
        noisy: Groups that are no smooth functions of the weights: they share a second kernel, with a nugget.
        known: Kernels of an earlier model, to be kept (`kernels`); None fits them.
    """

    def __init__(
        self,
        geometry: Geometry,
        places: Points,
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

    def predict(self, candidates: Points, pending: Points | None = None) -> Prediction:
        """Predict candidates; `pending` points count as scored at their mean, so that deviations shrink near them."""
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


def _origin(places: Points, values: FloatArray) -> FloatArray:
    there = np.flatnonzero((places.scale == 0) & np.isfinite(values).all(axis=1))
    return values[there[0]] if len(there) else np.nanmean(values, axis=0)


def _by_scored(values: Mapping[str, FloatArray], names: set[str]) -> list[tuple[IntArray, list[str]]]:
    """Points and groups: groups that were scored at the same points together."""
    found: dict[bytes, tuple[IntArray, list[str]]] = {}
    for name in sorted(names):
        scored = np.isfinite(values[name]).all(axis=1)
        found.setdefault(scored.tobytes(), (np.flatnonzero(scored), []))[1].append(name)
    return list(found.values())
