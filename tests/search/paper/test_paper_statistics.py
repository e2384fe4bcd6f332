"""The arithmetic behind the claims against closed forms."""

import math

import numpy as np
import pytest

from search.paper.statistics import (
    FAILS,
    HOLDS,
    OPEN,
    at,
    best_above,
    correlation,
    estimate,
    first_below,
    first_reached,
    judge,
    nearest,
    stall_epoch,
)


def test_mean_error_and_interval_of_three_values():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    # Student's 97.5% quantile with two degrees of freedom is 4.3027.
    assert found.high - found.mean == found.mean - found.low == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_one_value_has_no_error_and_decides_nothing():
    found = estimate([5.0])
    assert found.mean == 5.0
    assert math.isnan(found.error)
    assert judge(found, 0.0) == OPEN
    assert found.as_dict() == {"mean": 5.0, "error": None, "low": None, "high": None, "values": [5.0]}


def test_values_that_do_not_exist_are_left_out():
    assert estimate([1.0, math.nan, 3.0, math.inf]).values == (1.0, 3.0)
    nothing = estimate([math.nan])
    assert math.isnan(nothing.mean)
    assert nothing.as_dict()["mean"] is None
    assert judge(nothing, 0.0) == OPEN


@pytest.mark.parametrize(
    ("values", "least", "verdict"),
    [
        ([1.0, 1.1, 0.9], 0.5, HOLDS),
        ([1.0, 1.1, 0.9], 1.5, FAILS),
        ([1.0, 1.1, 0.9], 1.1, OPEN),
        ([-1.0, -1.1, -0.9], 0.0, FAILS),
        # Two standard errors would call this decided; with three seeds it is not.
        ([0.2, 1.0, 1.8], 0.0, OPEN),
        ([2.0, 2.0, 2.0], 1.0, HOLDS),
    ],
)
def test_rule_compares_the_whole_interval_with_the_threshold(values, least, verdict):
    assert judge(estimate(values), least) == verdict


def test_curves_are_straight_between_epochs():
    assert [at([0, 10, 30], position) for position in (0, 0.5, 1.25, 2)] == [0, 5, 15, 30]


@pytest.mark.parametrize(("level", "place"), [(-40, 0.0), (-36, 0.0), (-30, 0.5), (-24, 1.0), (-4, 2.5)])
def test_a_level_is_reached_where_the_straight_line_crosses_it_first(level, place):
    assert first_reached([-36, -24, -8, 0, -20, 0], level) == place


def test_a_level_that_is_never_reached():
    assert math.isnan(first_reached([-3, -2, -1], 0))
    assert first_below([1.0, 0.9, 0.8], 0.5) == 2.0
    assert first_below([1.0, 0.9, 0.7], 0.8) == pytest.approx(1.5)


def test_best_above_a_floor_counts_the_crossing():
    forgetting, utility = [-30, -20, -10, 0], [1.0, 1.0, 0.8, 0.2]
    assert best_above(forgetting, utility, 0.9) == -15
    assert best_above(forgetting, utility, 0.1) == 0
    assert math.isnan(best_above(forgetting, utility, 1.1))
    # Utility that comes back is utility kept.
    assert best_above([-30, -20, -10], [1.0, 0.5, 1.0], 0.75) == -10


def test_nearest_place_of_a_polyline():
    curve = [[0.0, 0.0], [10.0, 0.0], [10.0, 1.0]]
    on_edge = nearest(curve, [4.0, 0.5], [1.0, 0.25])
    assert (on_edge.position, on_edge.distance) == (0.4, 2.0)
    beyond = nearest(curve, [12.0, 2.0], [1.0, 1.0])
    assert (beyond.position, beyond.distance) == (2.0, pytest.approx(math.sqrt(5)))
    assert nearest([[1.0, 1.0], [1.0, 1.0]], [1.0, 3.0], [1.0, 1.0]).distance == 2.0
    assert nearest([[1.0]], [4.0], [1.0]).position == 0.0


def test_nearest_agrees_with_a_fine_search():
    rng = np.random.default_rng(0)
    curve, point, scales = rng.normal(size=(6, 2)), rng.normal(size=2), np.array([1.0, 0.3])
    places = np.linspace(0, 5, 50_001)
    along = np.stack([np.interp(places, np.arange(6), curve[:, column]) for column in (0, 1)], axis=1)
    distances = np.linalg.norm((along - point) / scales, axis=1)
    found = nearest(curve, point, scales)
    assert found.distance == pytest.approx(distances.min(), abs=1e-6)
    assert found.position == pytest.approx(places[distances.argmin()], abs=1e-3)


def test_correlation_of_lines_and_of_constants():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(correlation([1], [1]))


@pytest.mark.parametrize(
    ("values", "epoch"),
    [
        # A warm-up that brings little is not a stall.
        ([-36, -35, -33, -20, -8, -6, -5.5], 4),
        ([-36, -30, -24, -18, -12], 3),
        ([-10, 0, 0], 1),
        ([-10, -10], 1),
    ],
)
def test_a_curve_stalls_after_half_of_its_rise(values, epoch):
    assert stall_epoch(values) == epoch
