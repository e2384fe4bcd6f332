"""Pareto arithmetic against brute force on small integer grids, where every answer can be counted."""

import itertools
import math
import warnings

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.problem.pareto import (
    attainment_surface,
    balance_at_chance,
    dominates,
    hypervolume,
    knee,
    non_dominated,
    non_dominated_from,
    utility_floor,
)
from uipe_core.errors import UserError

SIDE = 5


@st.composite
def integer_points(draw, objectives=(2, 3, 4), max_size=8, min_size=0):
    m = draw(st.sampled_from(objectives))
    rows = draw(st.lists(st.tuples(*[st.integers(-1, SIDE)] * m), min_size=min_size, max_size=max_size))
    return np.array(rows, dtype=float).reshape(len(rows), m)


def counted_cells(points):
    """Unit cells of the grid above the origin whose upper corner some point reaches."""
    m = points.shape[1]
    positive = [p for p in points if all(p > 0)]
    cells = itertools.product(range(1, SIDE + 1), repeat=m)
    return sum(any(all(p >= cell) for p in positive) for cell in cells)


def beats(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@given(integer_points(min_size=1))
def test_a_start_takes_what_it_beats_or_equals_by_brute_force(points):
    start, others = points[0], points[1:]
    expected = [not any(beats(other, point) for other in others) and not all(point <= start) for point in others]
    assert non_dominated_from(others, start).tolist() == expected
    assert non_dominated_from(others, None).tolist() == non_dominated(others).tolist()


@given(integer_points(min_size=2))
def test_dominance_by_brute_force(points):
    assert dominates(points[0], points[1]) == beats(points[0], points[1])
    assert not dominates(points[0], points[0])
    expected = [not any(beats(other, point) for other in points) for point in points]
    assert non_dominated(points).tolist() == expected


def test_all_copies_of_a_front_point_are_kept():
    assert non_dominated([[1, 2], [1, 2], [0, 1], [2, 1]]).tolist() == [True, True, False, True]


@given(integer_points())
@settings(deadline=None)
def test_hypervolume_counts_cells(points):
    assert hypervolume(points, np.zeros(points.shape[1])) == pytest.approx(counted_cells(points))


@given(integer_points(min_size=1), st.randoms(use_true_random=False))
def test_hypervolume_ignores_order_and_dominated_points(points, random):
    reference = np.zeros(points.shape[1])
    shuffled = points[random.sample(range(len(points)), len(points))]
    volume = hypervolume(points, reference)
    assert hypervolume(shuffled, reference) == pytest.approx(volume)
    assert hypervolume(points[non_dominated(points)], reference) == pytest.approx(volume)


@given(integer_points(min_size=1))
def test_hypervolume_never_falls_with_another_point(points):
    reference = np.zeros(points.shape[1])
    assert hypervolume(points, reference) >= hypervolume(points[1:], reference) - 1e-12


@given(integer_points(min_size=1), st.integers(-3, 3), st.sampled_from([0.5, 2.0]))
def test_hypervolume_moves_with_shift_and_scale(points, shift, scale):
    m = points.shape[1]
    expected = hypervolume(points, np.zeros(m)) * scale**m
    assert hypervolume(points * scale + shift, np.full(m, float(shift))) == pytest.approx(expected)


def test_hypervolume_agrees_with_optuna():
    """Optuna shows its hypervolume in public only as the curve of a picture."""
    points = np.random.default_rng(0).uniform([-16, 0], [0, 1], (30, 2))
    study = optuna.create_study(directions=["maximize", "maximize"])
    scale = {name: optuna.distributions.FloatDistribution(-100, 100) for name in "ab"}
    study.add_trials(
        [
            optuna.trial.create_trial(params={"a": x, "b": y}, distributions=scale, values=[float(x), float(y)])
            for x, y in points
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = optuna.visualization.matplotlib.plot_hypervolume_history(study, [-17.0, 0.1])
    drawn = axes.get_lines()[0].get_ydata()
    ours = [hypervolume(points[: n + 1], [-17.0, 0.1]) for n in range(len(points))]
    np.testing.assert_allclose(drawn, ours, rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_no_numbers_are_refused(bad):
    for call in (
        lambda: non_dominated([[bad, 1]]),
        lambda: hypervolume([[1, bad]], [0, 0]),
        lambda: hypervolume([[1, 1]], [0, bad]),
        lambda: knee([[bad, 1]]),
        lambda: utility_floor([bad], [1], 0),
        lambda: utility_floor([1], [1], bad),
    ):
        with pytest.raises(ValueError, match="finite"):
            call()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="shape"):
        hypervolume([[1, 2]], [0, 0, 0])
    with pytest.raises(ValueError, match="shape"):
        non_dominated([1, 2])
    with pytest.raises(ValueError, match="shape"):
        utility_floor([1, 2], [1], 0)


def test_knee_takes_the_bulge_whatever_the_units():
    points = np.array([[0, 10], [8, 9], [9, 4], [10, 0], [1, 1]], dtype=float)
    assert knee(points) == 1
    assert knee(points * [1e-3, 50.0] + [7, -2]) == 1


def test_knee_of_few_points():
    assert knee([[3, 1]]) == 0
    assert knee([[0, 1], [1, 0]]) == 1
    assert knee([[2, 2], [2, 2]]) == 0
    assert knee([[0, 4], [1, 1], [4, 0]]) == 2
    with pytest.raises(UserError, match="complete trial"):
        knee(np.empty((0, 2)))


@given(integer_points(min_size=1), st.randoms(use_true_random=False))
def test_knee_is_on_the_front_and_ignores_order(points, random):
    chosen = knee(points)
    assert non_dominated(points)[chosen]
    if points.shape[1] == 2:
        shuffled = points[random.sample(range(len(points)), len(points))]
        assert shuffled[knee(shuffled)].tolist() == points[chosen].tolist()


def test_utility_floor_rule():
    forgetting, utility = [-1.0, -2.0, -1.0, -0.1], [0.7, 0.8, 0.75, 0.2]
    assert utility_floor(forgetting, utility, 0.7) == 2
    assert utility_floor(forgetting, utility, 0.8) == 1
    assert utility_floor(forgetting, utility, 0.0) == 3
    with pytest.raises(UserError, match=r"best there is has 0\.8"):
        utility_floor(forgetting, utility, 0.9)
    with pytest.raises(UserError, match="no complete trial"):
        utility_floor([], [], 0.5)


def test_no_points_no_volume():
    assert hypervolume(np.empty((0, 2)), [0, 0]) == 0.0
    assert hypervolume([[0, 5], [-1, 9]], [0, 0]) == 0.0


def test_chance_takes_what_is_nearest_at_the_utility_it_keeps():
    # Shares of the way 0.5, 1, 0.5 (overshot by as much); of the utility 1, 0.4, 1.
    forgetting, utility, initial = [0.3, 0.5, 0.7], [0.9, 0.36, 0.95], (0.1, 0.9)
    assert balance_at_chance(forgetting[:2], utility[:2], initial, 0.5) == 0
    assert balance_at_chance(forgetting, utility, initial, 0.5) == 2  # equal products: the stronger forgetting
    assert balance_at_chance(forgetting, [0.9, 0.5, 0.9], initial, 0.5) == 1
    assert balance_at_chance([-0.5, -0.05, 0.4], [0.9, 0.9, 0.9], (-0.6, 0.9), 0.0) == 1


@pytest.mark.parametrize(
    ("forgetting", "utility", "initial", "message"),
    [
        ([0.3], [0.9], (0.5, 0.9), "must be below chance"),
        ([0.3], [0.9], (0.1, 0.0), "have some utility"),
        ([0.1, 0.9], [0.9, 0.9], (0.1, 0.9), "no point is nearer to chance"),
        ([0.3], [0.0], (0.1, 0.9), "no point is nearer to chance"),
        ([], [], (0.1, 0.9), "run more trials"),
    ],
)
def test_chance_refuses_where_there_is_no_way_to_it(forgetting, utility, initial, message):
    with pytest.raises(UserError, match=message):
        balance_at_chance(forgetting, utility, initial, 0.5)


@given(
    st.lists(st.tuples(st.integers(1, 15), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 64),
    st.integers(-5, 5),
    st.integers(1, 64),
    st.randoms(use_true_random=False),
)
def test_chance_ignores_units_and_order_and_beats_every_other_product(points, unit, zero, scale, random):
    forgetting, utility = np.array(points, dtype=float).T
    chosen = balance_at_chance(forgetting, utility, (0.0, 20.0), 8.0)
    product = (8 - np.abs(8 - forgetting)) * utility
    moved = balance_at_chance(forgetting * unit + zero, utility * scale, (float(zero), 20.0 * scale), 8.0 * unit + zero)
    assert moved == chosen
    order = random.sample(range(len(points)), len(points))
    again = balance_at_chance(forgetting[order], utility[order], (0.0, 20.0), 8.0)
    assert points[order[again]] == points[chosen]
    assert product[chosen] == product.max()


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), min_size=1, max_size=12))
def test_short_of_chance_its_choice_is_on_the_front(points):
    values = np.array(points, dtype=float)
    chosen = balance_at_chance(*values.T, (0.0, 20.0), 8.0)
    # Up to chance and up to the initial utility both shares grow, so no other point can be better in both.
    assert non_dominated(values)[chosen]


@given(st.lists(integer_points(objectives=(2,), max_size=6), min_size=1, max_size=5), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_an_attainment_surface_encloses_what_enough_runs_attain(runs, share):
    surface = attainment_surface(runs, share)
    for point in itertools.product(range(-1, SIDE + 1), repeat=2):
        attained = sum(any(a >= point[0] and b >= point[1] for a, b in run) for run in runs)
        enclosed = any(a >= point[0] and b >= point[1] for a, b in surface)
        assert enclosed == (attained >= share * len(runs))
    assert non_dominated(surface).all() and list(surface[:, 0]) == sorted(set(surface[:, 0]), reverse=True)
