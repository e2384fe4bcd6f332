"""Estimate uncertainty: paired permutation, bootstrap over groups, probability of being on a front, power of forget quality.

Symbols: n items, d draws of a bootstrap, t trials, m objectives (all maximised).

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 15 (permutation tests); Field and Welsh,
"Bootstrapping clustered data", J. R. Statist. Soc. B 69, 2007 (resampling whole groups); Hesterberg, "What Teachers Should
Know About the Bootstrap", The American Statistician 69, 2015 (expanded percentile intervals); Westfall and Young,
"Resampling-Based Multiple Testing", 1993 (largest statistic over all pairs). ``benchmarks/coverage.py`` shows coverage and
false differences by simulation.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from uipe_core.metrics.scores import FloatArray
from uipe_core.metrics.tofu import harmonic_mean, log10_p_floor

LEVEL = 0.95
DRAWS = 1000
PERMUTATIONS = 9999


def paired_permutation(
    values: FloatArray, reference: FloatArray, seed: int, groups: Sequence[str | None] | None = None
) -> float:
    """Return the p-value of a paired permutation test of the mean difference, by random sign changes.

    The statistic is the absolute mean difference. Unlike a two-sample KS test, the test uses that both models answered the same
    items. scipy's `permutation_test` draws other signs, so other p-values for a seed, and takes 4 to 50 times as long (n = 10
    to 400).

    Args:
        values, reference: (n,) of the scored model and of the reference, on the same items in the same order.
        seed: Seed of the `PERMUTATIONS` sign changes; the smallest p-value is 1 / (1 + `PERMUTATIONS`).
        groups: (n,) group of each item, whose differences change sign together: answers on one author are not independent.
            None is a group of its own.

    Raises:
        ValueError: Other shapes, no items, or values that are not finite.
    """
    if values.shape != reference.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"paired samples of one length are needed, got {values.shape} and {reference.shape}")
    differences = values - reference
    if not np.isfinite(differences).all():
        raise ValueError("paired samples must be finite")
    if groups is not None:
        _, place = np.unique(_named(groups), return_inverse=True)
        differences = np.bincount(place, differences).astype(np.float64)
    observed = abs(differences.sum())
    signs = np.random.default_rng(seed).integers(0, 2, (PERMUTATIONS, len(differences)), dtype=np.int8) * 2.0 - 1.0
    # Rounding must not make the identity permutation smaller than the observed value.
    as_large = np.abs(signs @ differences) >= observed * (1 - 1e-12)
    return float((1 + np.count_nonzero(as_large)) / (1 + PERMUTATIONS))


def group_weights(groups: Sequence[str | None], seed: int, draws: int = DRAWS) -> FloatArray:
    """Return (d, n) how often each item occurs in each draw of groups with replacement.

    Sets of the same groups in the same order get the same draws, so a person's target and related facts are drawn together.

    Args:
        groups: (n,) group of each item; None is a group of its own.
        seed: Seed of the draws.
        draws: Number of draws.
    """
    names = _named(groups)
    distinct = list(dict.fromkeys(names))
    digest = hashlib.sha256("\n".join(distinct).encode()).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    counts = generator.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=draws)
    place = {name: number for number, name in enumerate(distinct)}
    return counts[:, [place[name] for name in names]].astype(np.float64)


def _named(groups: Sequence[str | None]) -> list[str]:
    return [group if group is not None else f"\0{row}" for row, group in enumerate(groups)]


def bootstrap_forget_quality(ratios: FloatArray, reference: FloatArray, weights: FloatArray) -> FloatArray:
    """Return (d,) log10 of the KS test's p-value in every draw, with the same items for model and reference.

    The p-value is exact for two samples of equal size (Gnedenko and Korolyuk 1951), clipped at the floor of the sample size.

    Args:
        ratios, reference: (n,) truth ratios, or their logarithms.
        weights: (d, n) of `group_weights`.
    """
    order = np.argsort(np.concatenate([ratios, reference]), kind="stable")
    values = np.concatenate([ratios, reference])[order]
    steps = np.concatenate([weights, -weights], axis=1)[:, order]
    # Compare the distribution functions only after the last of equal values.
    ends = np.append(values[1:] != values[:-1], True)
    distances = np.rint(np.abs(np.cumsum(steps, axis=1)[:, ends]).max(axis=1)).astype(int)
    sizes = np.rint(weights.sum(axis=1)).astype(int)
    return np.array([log10_p_table(size)[distance] for size, distance in zip(sizes, distances, strict=True)])


@cache
def log10_p_table(size: int) -> FloatArray:
    """Return (size + 1,) log10 p-values of the two-sided KS test of two samples of `size`, by size times the statistic."""

    def log_share(k: int, distance: int) -> float:
        below = size - k * distance
        return 2 * math.lgamma(size + 1) - math.lgamma(below + 1) - math.lgamma(2 * size - below + 1)

    table = np.zeros(size + 1)
    for distance in range(1, size + 1):
        terms = [
            (-1) ** (k - 1) * np.exp(log_share(k, distance) - log_share(1, distance)) for k in range(1, size // distance + 1)
        ]
        log10_p = (np.log(2.0 * sum(terms)) + log_share(1, distance)) / np.log(10.0)
        table[distance] = min(0.0, max(log10_p, log10_p_floor(size, size)))
    return table


def bootstrap_harmonic_mean(components: Mapping[str, FloatArray], weights: Mapping[str, FloatArray]) -> FloatArray:
    """Return (d,) harmonic means of the components' means in every draw, model utility; 0 if a component is 0.

    Args:
        components: (n,) per-item values by component.
        weights: (d, n) of `group_weights` by component.
    """
    means = np.stack([(weights[name] @ values) / weights[name].sum(axis=1) for name, values in components.items()])
    return harmonic_mean(means)


def bootstrap_auc(members: FloatArray, others: FloatArray, member_weights: FloatArray, other_weights: FloatArray) -> FloatArray:
    """Return (d,) AUCs (`uipe_core.metrics.composites.auc`) in every draw.

    Args:
        members, others: (m,) and (n,) scores.
        member_weights, other_weights: (d, m) and (d, n) of `group_weights`.
    """
    above = (others[None, :] > members[:, None]) + 0.5 * (others[None, :] == members[:, None])
    pairs = member_weights.sum(axis=1) * other_weights.sum(axis=1)
    return np.asarray(((member_weights @ above) * other_weights).sum(axis=1) / pairs)


def intervals(values: FloatArray, groups: int) -> FloatArray:
    """Return the expanded percentile interval over the first axis, the draws: (2, ...) lower and upper ends.

    Percentiles farther out make up for two things that shrink intervals of few groups: draws vary by the factor (g - 1) / g too
    little, and the spread itself is estimated. They become those of a Student t interval for a mean.

    Args:
        values: (d, ...) of the draws.
        groups: Groups that were drawn, at least 2.
    """
    outside = NormalDist().cdf(-_expanded(NormalDist().inv_cdf((1 + LEVEL) / 2), groups))
    return np.quantile(values, [outside, 1 - outside], axis=0)


def _expanded(deviations: float, groups: int) -> float:
    """Return what Student's t of g groups exceeds as often as a normal value does `deviations`, in deviations of the draws."""
    return math.sqrt(groups / (groups - 1)) * student_quantile(1 - NormalDist().cdf(-deviations), groups - 1)


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t for an integer number of degrees of freedom.

    There the distribution function is a finite sum (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4), which is inverted by
    bisection. Importing SciPy's `stdtrit` takes longer than a command that reads a study may.

    Args:
        probability: In [0.5, 1). The result is exact to 1e-12 or 1e-16 / (1 - probability) of itself, whichever is more.
        degrees: At least 1.
    """
    odd = degrees % 2
    exponents = np.arange(odd, degrees - 1, 2)
    factors = np.cumprod(np.concatenate([[1.0], (exponents + 1) / (exponents + 2)]))[: len(exponents)]

    def within(angle: float) -> float:
        """Return the probability that |t| is below sqrt(degrees) tan(angle)."""
        total = math.sin(angle) * float(factors @ math.cos(angle) ** exponents)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def front_probability(values: FloatArray) -> FloatArray:
    """Return (t,) share of draws in which no other trial dominates a trial; `values` is (d, t, m)."""
    share = np.zeros(values.shape[1])
    for trial in range(values.shape[1]):
        own = values[:, trial : trial + 1]
        beaten = np.all(values >= own, axis=2) & np.any(values > own, axis=2)
        share[trial] = 1 - np.mean(np.any(beaten, axis=1))
    return share


def indistinguishable(values: FloatArray, groups: int) -> NDArray[np.int64]:
    """Return (t,) group numbers of trials, from 0; trials of a group are indistinguishable.

    Two trials differ if their mean difference in an objective exceeds, in standard deviations, what the largest difference over
    all pairs and objectives exceeds in 5% of the draws: so among trials that are all alike, one difference is found in 5% of
    studies, however many pairs there are. A trial joins the group of its predecessor if it differs from no member.

    Args:
        values: (d, t, m) of the same draws for all trials, in the order of the front.
        groups: Groups that were drawn, at least 2.
    """
    trials = values.shape[1]
    size = np.zeros((trials, trials))
    largest = np.zeros(len(values))
    for trial in range(trials - 1):
        differences = values[:, trial + 1 :] - values[:, trial : trial + 1]
        means, spreads = differences.mean(axis=0), differences.std(axis=0)
        # The same draws may move two trials alike: then every difference is one.
        known = spreads > 1e-12 * (1 + np.abs(means))
        scale = np.where(known, spreads, np.inf)
        largest = np.maximum(largest, (np.abs(differences - means) / scale).max(axis=(1, 2)))
        certain = np.where(~known & (np.abs(means) > 1e-12), np.inf, 0.0)
        size[trial, trial + 1 :] = np.maximum(np.abs(means) / scale, certain).max(axis=1)
    limit = _expanded(float(np.quantile(largest, LEVEL)), groups)
    differ = np.maximum(size, size.T) > limit
    numbers = np.zeros(trials, dtype=np.int64)
    members: list[int] = []
    for trial in range(trials):
        if members and differ[trial, members].any():
            members = []
            numbers[trial:] += 1
        members.append(trial)
    return numbers


def exceeds(values: FloatArray, start: FloatArray, groups: int) -> NDArray[np.bool_]:
    """Return (t,) whether each trial's value is above the start's beyond noise.

    The mean difference must exceed, in its standard deviations, what the largest of all trials' exceeds in 5% of the draws: of
    trials that are all like the start, one is found above it in 5% of studies, however many there are.

    Args:
        values: (d, t) of the same draws for all trials.
        start: (d,) of these draws, for what the trials are compared with.
        groups: Groups that were drawn, at least 2.
    """
    differences = values - start[:, None]
    means, spreads = differences.mean(axis=0), differences.std(axis=0)
    known = spreads > 1e-12 * (1 + np.abs(means))
    scale = np.where(known, spreads, np.inf)
    largest = ((differences - means) / scale).max(axis=1, initial=0.0)
    limit = _expanded(float(np.quantile(largest, LEVEL)), groups)
    return np.where(known, means / scale > limit, means > 1e-12)


@cache
def detectable_shift(items: int, power: float = 0.9) -> tuple[float, float]:
    """Return the effect that forget quality sees (p < 0.05) in nine of ten draws of items: (shift, KS distance).

    The shift is that between two normal distributions of log truth ratios, in their standard deviation; the distance is the
    largest between their distribution functions, in [0, 1]. Found by simulation with 1,000 fixed draws of independent items, to
    0.01 of a standard deviation. Both are infinity and 1 where no difference is seen, as with fewer than four items.

    Args:
        items: Items that forget quality compares.
        power: Share of the draws.
    """
    seen = np.flatnonzero(log10_p_table(items) < np.log10(1 - LEVEL))
    if not len(seen):
        return math.inf, 1.0
    generator = np.random.default_rng(0)
    first, second = generator.normal(0, 1, (1000, items)), generator.normal(0, 1, (1000, items))

    def share(shift: float) -> float:
        order = np.argsort(np.concatenate([first, second + shift], axis=1), axis=1)
        distances = np.abs(np.cumsum(np.where(order < items, 1, -1), axis=1)).max(axis=1)
        return float(np.mean(distances >= seen[0]))

    low, high = 0.0, 8.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) >= power else (middle, high)
    return high, 2 * NormalDist().cdf(high / 2) - 1
