"""Bracketing on lines with closed forms: how many scores it takes, and that what it certifies is so."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.results.constrained import ALWAYS, CEILING, CROSSED, NEVER, OPEN, PEAK, Constraint, ScoredPoint, promise, stand

ASK = Constraint(floor=0.7, low=-1.0, high=2.0)
INITIAL = ScoredPoint(-1.0, -13.0, 0.9)


def scored(alpha, forgetting, utility):
    return ScoredPoint(alpha, forgetting(alpha), utility(alpha), trial=0)


def searched(forgetting, utility, question=ASK, most=6, start=(0.0,)):
    """The line after at most so many scores, from the initial model and the given points on; and how many it took."""
    points = [INITIAL, *(scored(alpha, forgetting, utility) for alpha in start)]
    for count in range(most + 1):
        standing = stand(points, question)
        if standing.next is None or count == most:
            return standing, count, points
        assert question.low <= standing.next <= question.high
        assert all(abs(standing.next - point.alpha) > 1e-9 for point in points if point.trial is not None)
        points.append(scored(standing.next, forgetting, utility))
    raise AssertionError


def rising(alpha):
    return -13 + 12 * (alpha + 1) / 3


def falling(alpha):
    return 0.9 - 0.15 * (alpha + 1)


@settings(deadline=None)
@given(st.floats(0.55, 0.89), st.floats(0.3, 6))
def test_a_monotone_line_is_closed_in_on_within_six_scores(floor, bend):
    """Utility falls from 0.9 to 0.4 along a power of the way: straight, late or early."""
    utility = lambda alpha: 0.9 - 0.5 * ((alpha + 1) / 3) ** bend  # noqa: E731
    question = Constraint(floor, -1.0, 2.0)
    standing, count, _ = searched(rising, utility, question)
    truth = 3 * ((0.9 - floor) / 0.5) ** (1 / bend) - 1
    assert count <= 6
    assert standing.best == standing.last_feasible
    assert standing.last_feasible.utility >= floor > standing.first_infeasible.utility
    assert standing.last_feasible.alpha <= truth + 1e-9 and truth <= standing.first_infeasible.alpha + 1e-9
    # The best one is within a fifth of the range of the truth even for lines that are nothing like straight.
    assert truth - standing.best.alpha < 0.6


def test_a_straight_line_takes_three():
    standing, count, _ = searched(rising, falling)
    assert (standing.state, count <= 4) == (CROSSED, True)
    assert standing.best.alpha == pytest.approx(1 / 3, abs=0.03)


def test_what_always_keeps_the_floor_ends_at_the_highest_alpha():
    standing, count, _ = searched(rising, lambda alpha: 0.9 - 0.01 * (alpha + 1))
    assert (standing.state, standing.best.alpha, standing.first_infeasible) == (ALWAYS, 2.0, None)
    assert count <= 2


def test_what_never_keeps_the_floor_costs_one_score_at_the_lowest_alpha():
    question = Constraint(floor=0.7, low=0.0, high=2.0)
    standing, count, _ = searched(rising, lambda alpha: 0.5, question, start=(1.0,))
    assert (standing.state, standing.best, standing.last_feasible) == (NEVER, None, None)
    assert (count, standing.first_infeasible.alpha) == (1, 0.0)


def test_with_the_initial_model_in_range_something_is_always_feasible():
    standing, count, _ = searched(rising, lambda alpha: 0.9 if alpha == -1 else 0.1)
    assert standing.best == standing.last_feasible == INITIAL
    # Each score shortens the gap: the floor is known to lie next to the initial model.
    assert standing.first_infeasible.alpha < -0.97
    assert count <= 6


def test_a_line_that_is_not_monotone_keeps_what_was_really_scored():
    """Utility dips below the floor and comes back: the certificate is of the crossing at the best point."""
    utility = lambda alpha: 0.75 + 0.2 * math.cos(3 * (alpha + 1))  # noqa: E731
    standing, count, points = searched(rising, utility)
    assert count <= 6
    feasible = [point for point in points if point.utility >= 0.7]
    assert standing.best.forgetting == max(point.forgetting for point in feasible)
    if standing.first_infeasible is not None:
        assert standing.last_feasible.utility >= 0.7 > standing.first_infeasible.utility
        between = [p for p in points if standing.last_feasible.alpha < p.alpha < standing.first_infeasible.alpha]
        assert between == []


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-0.99, 2), st.floats(-13, 0), st.floats(0, 1)), max_size=8, unique_by=lambda p: round(p[0], 2))
)
def test_whatever_was_scored_the_answer_is_the_best_feasible_point_and_the_next_one_is_new(rows):
    points = [INITIAL, *(ScoredPoint(*row, trial=number) for number, row in enumerate(rows))]
    standing = stand(points, ASK)
    feasible = [point for point in points if point.utility >= 0.7]
    assert standing.best == max(feasible, key=lambda point: (point.forgetting, point.utility))
    if standing.first_infeasible is not None:
        assert standing.last_feasible in feasible and standing.first_infeasible not in feasible
        assert standing.last_feasible.alpha < standing.first_infeasible.alpha
    if standing.next is not None:
        assert -1 <= standing.next <= 2
        assert all(standing.next != point.alpha for point in points)
    assert (standing.state == OPEN) == (standing.next is not None)


def test_a_peak_before_the_floor_is_found():
    forgetting = lambda alpha: -(((alpha - 0.4) * 3) ** 2)  # noqa: E731
    standing, count, _ = searched(forgetting, lambda alpha: 0.9 - 0.02 * (alpha + 1), start=(0.0, 1.0))
    assert standing.best.alpha == pytest.approx(0.4, abs=0.1)
    assert standing.state in (PEAK, OPEN) and count <= 6


def test_the_noise_ceiling_ends_a_line():
    question = Constraint(0.7, -1.0, 2.0, ceiling=-0.5)
    standing, count, _ = searched(lambda alpha: min(-0.5, rising(alpha) + 12), falling, question)
    assert (standing.state, count) == (CEILING, 0)
    assert standing.best.alpha == 0.0


def test_a_collapsed_model_is_never_feasible():
    broken = ScoredPoint(1.0, -1.0, 0.89, sound=False, trial=1)
    standing = stand([INITIAL, ScoredPoint(0.0, -5.0, 0.85, trial=0), broken], ASK)
    assert (standing.best.alpha, standing.first_infeasible, standing.next) == (0.0, broken, 0.5)


def test_of_equally_forgetful_points_the_one_of_most_utility_is_best():
    points = [INITIAL, ScoredPoint(0.0, -13.0, 0.85, trial=0), ScoredPoint(0.5, -3.0, 0.6, trial=1)]
    standing = stand(points, ASK)
    assert standing.best == INITIAL
    # Yet the search goes on where forgetting begins.
    assert (standing.last_feasible.alpha, standing.first_infeasible.alpha) == (0.0, 0.5)
    assert 0.0 < standing.next < 0.5


def test_promise_is_what_curves_through_the_points_allow():
    good = [INITIAL, ScoredPoint(0.0, -2.0, 0.6, trial=0)]
    poor = [INITIAL, ScoredPoint(0.0, -12.0, 0.6, trial=1)]
    assert promise(good, ASK) > promise(poor, ASK) > (-np.inf, -np.inf)
    forgetting, utility = promise(good, ASK)
    assert -13 < forgetting < -2 and utility >= 0.7
    beyond = Constraint(0.7, 0.0, 2.0)
    assert promise(good, beyond) == (-np.inf, -np.inf)
    assert promise([INITIAL], ASK) == (-13.0, 0.9)
