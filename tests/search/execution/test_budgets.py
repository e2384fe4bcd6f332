"""When a study stops, as judgements about numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.execution.budget import FAILURE_LEAST, FAILURE_WINDOW, FrontGrowth, on_plateau, over_gpu_time, over_time
from search.execution.budget import too_many_failures as gave_up
from search.problem.pareto import hypervolume
from search.report.style import counted

unit = st.floats(0.0, 1.0, allow_nan=False)
points = st.lists(st.tuples(unit, unit), max_size=25)


@pytest.mark.parametrize(("used", "allowed", "over"), [(0.0, None, False), (5.0, None, False), (0.99, 1, False), (1, 1, True)])
def test_hours_are_used_up_when_they_are_reached(used, allowed, over):
    assert (over_time(used, allowed) is not None) is over
    assert (over_gpu_time(used, allowed) is not None) is over


def test_reasons_name_their_key():
    assert over_time(2.0, 1.5) == "its runs took 2 hours of 1.5 (budget.hours)"
    assert over_gpu_time(12.34, 12) == "it held GPUs for 12.3 GPU-hours of 12 (budget.gpu_hours)"
    assert on_plateau([1.0, 1.0], 1, 0.01).endswith("less than 1.00% (budget.plateau)")


@pytest.mark.parametrize(
    ("volumes", "trials", "gain", "stops"),
    [
        ([], 5, 0.01, False),
        ([1.0], 5, 0.01, False),
        ([1.0] * 5, 5, 0.01, False),  # four trials after the start
        ([1.0] * 6, 5, 0.01, True),
        ([1.0] * 5 + [1.02], 5, 0.01, False),
        ([1.0] * 5 + [1.005], 5, 0.01, True),
        ([1.0] * 5 + [1.02] * 5, 5, 0.01, False),
        ([1.0] * 5 + [1.02] * 6, 5, 0.01, True),
        ([0.0] * 6, 5, 0.01, True),
        ([0.0] * 5 + [1e-9], 5, 0.5, False),  # more than any share of nothing
    ],
)
def test_plateau(volumes, trials, gain, stops):
    assert (on_plateau(volumes, trials, gain) is not None) is stops


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=40), st.integers(1, 12), st.floats(0.001, 0.5))
def test_a_plateau_depends_on_its_trials_only_and_on_no_unit(steps, trials, gain):
    volumes = list(np.cumsum(steps))
    found = on_plateau(volumes, trials, gain) is not None
    assert found is (on_plateau(volumes[-1 - trials :], trials, gain) is not None)
    assert found is (on_plateau([8.0 * volume for volume in volumes], trials, gain) is not None)
    # Who asks for more growth stops no later.
    assert not found or on_plateau(volumes, trials, min(0.99, 2 * gain)) is not None


@given(st.lists(st.sampled_from([None, "a", "b"]), max_size=60), st.floats(0.01, 1.0))
def test_the_failure_rate_is_that_of_the_last_trials(reasons, allowed):
    last = reasons[-FAILURE_WINDOW:]
    share = sum(reason is not None for reason in last) / max(len(last), 1)
    expected = allowed < 1 and len(last) >= FAILURE_LEAST and share >= allowed
    assert (gave_up(reasons, allowed) is not None) is expected


def test_the_commonest_reasons_are_counted():
    reasons = ["a", "b\nand its traceback", "b", "c", "d", None] + ["b"] * 5
    assert gave_up(reasons, 0.5) == "10 of the last 11 trials failed (budget.failure_rate: 0.5): 7 x b; 1 x a; 1 x c"
    assert gave_up(["x"] * 9, 0.1) is None
    assert gave_up(["x"] * 20, 1) is None
    assert counted(["z" * 500]) == [("z" * 156 + " ...", 1)]
    assert counted([]) == []


@given(points)
def test_growth_is_the_hypervolume_of_all_points_so_far(coordinates):
    growth = FrontGrowth([0.2, 0.1], [0.8, math.inf])
    seen = []
    for point in coordinates:
        seen.append(np.minimum(point, [0.8, np.inf]))
        assert growth.add(point) == pytest.approx(hypervolume(seen, [0.2, 0.1]), abs=1e-12)
    assert growth.volume == pytest.approx(hypervolume(seen, [0.2, 0.1]) if seen else 0.0, abs=1e-12)


def test_growth_in_three_objectives():
    growth = FrontGrowth([0, 0, 0], [math.inf] * 3)
    assert growth.add([1, 1, 1]) == 1
    assert growth.add([0.5, 1, 1]) == 1
    assert growth.add([2, 1, 0.5]) == pytest.approx(1.5)
