"""Covariances of points from the Gram matrix of the update vectors, with errors of any size, and the fit of their settings."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpstrf
from scipy.optimize import minimize

FloatArray = NDArray[np.float64]

IntArray = NDArray[np.int64]

LOOKED_AT = 800
"""Most points that those are taken from."""

JITTER = 1e-6
"""Least variance of errors, as a share of the kernel's own; scores in single precision have about that."""

SHARES = JITTER + np.geomspace(1e-9, 1.0, 73)
"""Variances of errors that are looked at, as shares of the kernel's own."""

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
        """Minus the log likelihood of a group, for each variance of its errors; and the share with the most likely scale.

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
