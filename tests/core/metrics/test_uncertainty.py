"""Uncertainty by closed form and brute force."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit
from scipy.stats import ks_2samp, norm

from search.problem.pareto import non_dominated
from uipe_core.metrics.composites import auc
from uipe_core.metrics.tofu import forget_quality, log10_p_floor
from uipe_core.metrics.uncertainty import (
    bootstrap_auc,
    bootstrap_forget_quality,
    bootstrap_harmonic_mean,
    detectable_shift,
    exceeds,
    front_probability,
    group_weights,
    indistinguishable,
    intervals,
    paired_permutation,
    student_quantile,
)


def test_permutation_p_is_that_of_all_sign_changes():
    differences = np.array([0.5, -0.1, 0.4, 0.3, 0.2, -0.05, 0.6, 0.1])
    means = [abs(np.mean(signs * differences)) for signs in product([1, -1], repeat=8)]
    exact = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    reference = np.linspace(-1, 1, 8)
    assert paired_permutation(reference + differences, reference, seed=0) == pytest.approx(exact, abs=0.01)


def test_trials_like_the_start_rarely_exceed_it_and_better_ones_do():
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        items = generator.normal(0, 1, (21, 60))  # the start and twenty trials that are no better
        draws = generator.multinomial(60, np.full(60, 1 / 60), 400) @ items.T / 60
        found += exceeds(draws[:, 1:], draws[:, 0], 60).any()
    assert found / 200 < 0.1
    above = exceeds(draws[:, 1:] + np.where(np.arange(20) == 3, 2.0, 0.0), draws[:, 0], 60)
    assert np.flatnonzero(above).tolist() == [3]


def test_a_difference_without_any_spread_is_certain():
    draws = np.random.default_rng(0).normal(0, 1, 100)
    values = np.stack([draws, draws + 0.5, draws - 0.5], axis=1)
    assert exceeds(values, draws, 10).tolist() == [False, True, False]
    assert exceeds(np.empty((100, 0)), draws, 10).tolist() == []


def test_permutation_sees_what_a_ks_test_does_not():
    reference = np.random.default_rng(0).normal(0, 3, 48)
    moved = reference + 0.2
    assert ks_2samp(moved, reference).pvalue > 0.9
    assert paired_permutation(moved, reference, seed=0) == pytest.approx(1e-4)


def test_equal_samples_have_p_one_and_bad_ones_are_refused():
    values = np.arange(5.0)
    assert paired_permutation(values, values, seed=0) == 1.0
    for bad in (np.arange(4.0), np.array([0, 1, 2, 3, np.inf])):
        with pytest.raises(ValueError, match="paired samples"):
            paired_permutation(bad, values, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_without_resampling_the_bootstrap_is_the_test_itself(n, seed):
    rng = np.random.default_rng(seed)
    ratios, reference = np.round(rng.normal(0, 1, n), 2), np.round(rng.normal(rng.choice([0, 1, 9]), 1, n), 2)
    # Where the exact p is 1, scipy may give up and answer with its asymptotic value, 4e-5 below.
    expected = forget_quality(ratios, reference).log10_p
    assert bootstrap_forget_quality(ratios, reference, np.ones((1, n)))[0] == pytest.approx(expected, abs=1e-4)


def test_a_draw_is_the_test_on_the_items_drawn():
    rng = np.random.default_rng(1)
    ratios, reference = rng.normal(0, 1, 12), rng.normal(1, 1, 12)
    weights = group_weights([f"g{row // 3}" for row in range(12)], seed=3, draws=40)
    found = bootstrap_forget_quality(ratios, reference, weights)
    for value, weight in zip(found, weights, strict=True):
        rows = np.repeat(np.arange(12), weight.astype(int))
        assert value == pytest.approx(forget_quality(ratios[rows], reference[rows]).log10_p, abs=1e-6)
    assert (found >= log10_p_floor(12, 12)).all()


def test_groups_are_drawn_whole_and_alike_in_sets_of_the_same_groups():
    groups = ["a", "a", "b", "b", "b", None]
    weights = group_weights(groups, seed=0, draws=500)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 2] == weights[:, 4]).all()
    assert (weights[:, [0, 2, 5]].sum(axis=1) == 3).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(6), abs=0.15)
    one, other = group_weights(["x", "y"], 0, 50), group_weights(["x", "x", "y"], 0, 50)
    assert (one == other[:, [0, 2]]).all()
    assert (one != group_weights(["x", "z"], 0, 50)).any()


def test_utility_of_a_draw_is_the_harmonic_mean_of_weighted_means():
    components = {"a": np.array([0.2, 0.4, 0.9]), "b": np.array([0.5, 1.0])}
    weights = {"a": np.array([[1.0, 1, 1], [0, 0, 3]]), "b": np.array([[1.0, 1], [2, 0]])}
    found = bootstrap_harmonic_mean(components, weights)
    assert found == pytest.approx([2 / (1 / 0.5 + 1 / 0.75), 2 / (1 / 0.9 + 1 / 0.5)])
    assert bootstrap_harmonic_mean({**components, "c": np.zeros(2)}, {**weights, "c": weights["b"]}) == pytest.approx([0, 0])


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = rng.normal(0.5, 0.1, 40)
        ends = intervals(bootstrap_harmonic_mean({"a": sample}, {"a": group_weights([None] * 40, trial, 400)}), 40)
        covered += ends[0] <= 0.5 <= ends[1]
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("groups", [5, 10, 20])
def test_intervals_of_a_mean_over_few_groups_are_students(groups):
    """Half a width of t times the standard error, where the draws of a mean are normal."""
    rng = np.random.default_rng(groups)
    sample = rng.normal(0, 1, groups)
    draws = rng.normal(sample.mean(), sample.std() / np.sqrt(groups), 200_000)
    low, high = intervals(draws, groups)
    expected = stdtrit(groups - 1, 0.975) * sample.std(ddof=1) / np.sqrt(groups)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)


def test_front_probability_by_brute_force():
    values = np.random.default_rng(2).normal(0, 1, (60, 9, 3))
    expected = np.mean([non_dominated(draw) for draw in values], axis=0)
    assert front_probability(values) == pytest.approx(expected)


def test_trials_that_differ_by_chance_form_a_group():
    noise = np.random.default_rng(0).normal(0, 1, (500, 5, 2))
    centres = np.array([[0, 9], [0.1, 9], [0, 9.1], [9, 0], [9, 0.1]])
    assert indistinguishable(noise + centres, 40).tolist() == [0, 0, 0, 1, 1]
    # The same noise in all of them shows even small differences.
    assert indistinguishable(noise[:, :1] + centres, 40).tolist() == [0, 1, 2, 3, 4]
    assert indistinguishable(noise[:, :1], 40).tolist() == [0]
    same = np.repeat(noise[:, :1], 3, axis=1)
    assert indistinguishable(same, 40).tolist() == [0, 0, 0]


def test_equal_trials_are_rarely_told_apart_however_many_pairs_there_are():
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        means = rng.normal(0, 1, (1, 8, 2))  # eight trials of one truth, each measured with the spread its draws have
        found += len(set(indistinguishable(means + rng.normal(0, 1, (400, 8, 2)), 40))) > 1
    assert found / 200 <= 0.1


def test_signs_change_by_group():
    """Two authors with ten items each have four sign changes, two of them as large as what was seen."""
    groups = ["a"] * 10 + ["b"] * 10
    differences = np.full(20, 0.3)
    assert paired_permutation(differences, np.zeros(20), seed=0, groups=groups) == pytest.approx(0.5, abs=0.02)
    assert paired_permutation(differences, np.zeros(20), seed=0) < 1e-3
    alone = paired_permutation(differences, np.zeros(20), seed=0, groups=[None] * 20)
    assert alone == pytest.approx(paired_permutation(differences, np.zeros(20), seed=0), abs=1e-3)


@pytest.mark.parametrize("items", [20, 100])
def test_the_shift_that_is_seen_is_seen_in_nine_of_ten_other_draws(items):
    shift, distance = detectable_shift(items)
    rng = np.random.default_rng(99)
    seen = [ks_2samp(rng.normal(0, 1, items), rng.normal(shift, 1, items)).pvalue < 0.05 for _ in range(400)]
    assert 0.85 < np.mean(seen) < 0.95
    grid = np.linspace(-6, 8, 4001)
    assert distance == pytest.approx(np.max(norm.cdf(grid) - norm.cdf(grid - shift)), abs=1e-3)


def test_three_items_see_nothing():
    assert detectable_shift(3) == (math.inf, 1.0)


def test_drawn_aucs_are_those_of_the_drawn_items():
    rng = np.random.default_rng(2)
    members, others = rng.integers(0, 5, 9).astype(float), rng.integers(1, 6, 6).astype(float)
    weights = [group_weights([f"p{row // 2}" for row in range(size)], seed=3, draws=20) for size in (9, 6)]
    found = bootstrap_auc(members, others, *weights)
    for drawn, one, two in zip(found, *weights, strict=True):
        taken = [np.repeat(values, own.astype(int)) for values, own in ((members, one), (others, two))]
        assert drawn == pytest.approx(auc(*taken), abs=1e-12)
    ones = [np.ones((1, size)) for size in (9, 6)]
    assert bootstrap_auc(members, others, *ones) == pytest.approx([float(auc(members, others))])


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 19, 20, 399, 4000])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.999, 1 - 1e-6])
def test_students_quantile_is_scipys(probability, degrees):
    assert student_quantile(probability, degrees) == pytest.approx(stdtrit(degrees, probability), rel=1e-9, abs=1e-12)
