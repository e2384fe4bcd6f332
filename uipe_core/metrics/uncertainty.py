"""Estimate uncertainty: paired permutation, bootstrap over groups, probability of being on a front.

Symbols: n items, d draws of a bootstrap, t trials, m objectives (all maximised).

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 (percentile intervals) and 15 (permutation
tests); Field and Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69, 2007 (resampling whole groups).
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from uipe_core.metrics.scores import FloatArray
from uipe_core.metrics.tofu import harmonic_mean, log10_p_floor

LEVEL = 0.95
DRAWS = 1000
PERMUTATIONS = 9999


def paired_permutation(values: FloatArray, reference: FloatArray, seed: int, permutations: int = PERMUTATIONS) -> float:
    """Return the p-value of a paired permutation test of the mean difference, by random sign changes.

    The statistic is the absolute mean difference. Unlike a two-sample KS test, the test uses that both models answered the same
    items. scipy's `permutation_test` draws other signs, so other p-values for a seed, and takes 4 to 50 times as long (n = 10
    to 400).

    Args:
        values, reference: (n,) of the scored model and of the reference, on the same items in the same order.
        seed: Seed of the sign changes.
        permutations: Number of sign changes; the smallest p-value is 1 / (1 + permutations).

    Raises:
        ValueError: Other shapes, no items, or values that are not finite.
    """
    if values.shape != reference.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"paired samples of one length are needed, got {values.shape} and {reference.shape}")
    differences = values - reference
    if not np.isfinite(differences).all():
        raise ValueError("paired samples must be finite")
    observed = abs(differences.mean())
    signs = np.random.default_rng(seed).integers(0, 2, (permutations, len(differences)), dtype=np.int8) * 2.0 - 1.0
    # Rounding must not make the identity permutation smaller than the observed value.
    as_large = np.abs(signs @ differences) / len(differences) >= observed * (1 - 1e-12)
    return float((1 + np.count_nonzero(as_large)) / (1 + permutations))


def group_weights(groups: Sequence[str | None], seed: int, draws: int = DRAWS) -> FloatArray:
    """Return (d, n) how often each item occurs in each draw of groups with replacement.

    Sets of the same groups in the same order get the same draws, so a person's target and related facts are drawn together.

    Args:
        groups: (n,) group of each item; None is a group of its own.
        seed: Seed of the draws.
        draws: Number of draws.
    """
    names = [group if group is not None else f"\0{row}" for row, group in enumerate(groups)]
    distinct = list(dict.fromkeys(names))
    digest = hashlib.sha256("\n".join(distinct).encode()).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    counts = generator.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=draws)
    place = {name: number for number, name in enumerate(distinct)}
    return counts[:, [place[name] for name in names]].astype(np.float64)


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
    from scipy.special import gammaln

    def log_share(k: int, distance: int) -> float:
        below = size - k * distance
        return float(2 * gammaln(size + 1) - gammaln(below + 1) - gammaln(2 * size - below + 1))

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


def intervals(values: FloatArray, level: float = LEVEL) -> FloatArray:
    """Return the percentile interval over the first axis, the draws: (2, ...) lower and upper ends."""
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)


def front_probability(values: FloatArray) -> FloatArray:
    """Return (t,) share of draws in which no other trial dominates a trial; `values` is (d, t, m)."""
    share = np.zeros(values.shape[1])
    for trial in range(values.shape[1]):
        own = values[:, trial : trial + 1]
        beaten = np.all(values >= own, axis=2) & np.any(values > own, axis=2)
        share[trial] = 1 - np.mean(np.any(beaten, axis=1))
    return share


def indistinguishable(values: FloatArray, level: float = LEVEL) -> NDArray[np.int64]:
    """Return (t,) group numbers of trials, from 0; trials of a group are indistinguishable.

    A trial joins the group of its predecessor if the interval of its difference to every member holds 0 in every objective;
    else it starts the next group.

    Args:
        values: (d, t, m) of the same draws for all trials, in the order of the front.
        level: Level of the intervals.
    """
    numbers = np.zeros(values.shape[1], dtype=np.int64)
    members: list[int] = []
    for trial in range(values.shape[1]):
        ends = intervals(values[:, members] - values[:, trial : trial + 1], level) if members else np.zeros((2, 0, 1))
        if members and not ((ends[0] <= 0) & (ends[1] >= 0)).all():
            members = []
            numbers[trial:] += 1
        members.append(trial)
    return numbers
