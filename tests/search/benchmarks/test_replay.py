"""Searches replayed on a recorded table: exact where something was recorded, and close in between."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.recorded.replay import NoisyWorld, World
from benchmarks.recorded.rounding import describe
from benchmarks.recorded.table import read_table
from search.problem.pareto import hypervolume
from uipe_core.errors import UserError

ROOT = Path(__file__).parents[3]
TABLES = sorted((ROOT / "benchmarks" / "tables").glob("*.npz"))


@pytest.fixture(scope="module")
def world():
    return World(read_table(TABLES[0]))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_shipped_tables_are_whole_and_small(path):
    table = read_table(path)
    assert path.stat().st_size < 1.6e6
    assert len(table) == 24 * 30
    assert np.linalg.eigvalsh(table.gram).min() > -1e-9 * np.trace(table.gram)


def test_there_are_tables_of_three_seeds():
    assert [read_table(path).meta["seed"] for path in TABLES] == [0, 1, 2]


def test_recorded_places_give_what_was_recorded(world):
    table = world.table
    for row in range(0, len(table), 37):
        items = world.items(int(table.base[row]), int(table.epoch[row]), float(table.alpha[row]))
        for name, values in table.items(row).items():
            np.testing.assert_allclose(items[name], values, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(world.objectives(items), table.objectives[row], atol=1e-5)


def test_every_line_begins_with_the_initial_model(world):
    for base in range(len(world.labels)):
        items = world.items(base, 1, -1.0)
        for name, values in world.table.initial.items():
            np.testing.assert_allclose(items[name], values, atol=1e-6)
    np.testing.assert_allclose(world.given_points[0], world.objectives(world.table.initial))


def test_what_was_left_out_is_predicted_closely(world):
    table = world.table
    known = np.arange(len(table)) % 2 == 0
    known |= (table.alpha == 0) | (table.alpha >= world.high)
    coarse = World(table, known)
    # Where losses are moderate: the front is there, and far out on grad_ascent's lines nothing is smooth.
    near = np.flatnonzero(~known & (np.abs(table.alpha) < 0.5))
    apart = []
    for row in near:
        items = coarse.items(int(table.base[row]), int(table.epoch[row]), float(table.alpha[row]))
        apart.append(np.abs(items["retain/answer_loss"] - table.arrays["retain/answer_loss"][row]).max())
    assert np.median(apart) < 0.01


def test_the_gain_is_that_of_the_whole_grid_with_its_noise_ceiling(world):
    table = world.table
    cap = table.meta["ceilings"][0]
    points = np.concatenate([world.given_points, table.objectives])
    points[:, 0] = np.minimum(points[:, 0], cap)
    whole = hypervolume(points, np.array(table.meta["corner"]))
    given = hypervolume(points[:25], np.array(table.meta["corner"]))
    assert world.dense_gain == pytest.approx(whole - given)
    assert world.dense_gain > 0
    assert len(world.given) == 24


def test_errors_of_a_point_are_its_own_and_stay(world):
    noisy = NoisyWorld(world.table, 0.01, 3)
    once, again, close = (noisy.items(1, 6, alpha) for alpha in (-0.5, -0.5, -0.4999))
    clean = world.items(1, 6, -0.5)
    for name, values in clean.items():
        assert np.array_equal(once[name], again[name])
        assert name.endswith("_loss") == (values.size > 0 and not np.array_equal(once[name], values))
    errors = np.concatenate([(once[name] / clean[name] - 1).ravel() for name in clean if name.endswith("_loss")])
    others = np.concatenate([(close[name] / clean[name] - 1).ravel() for name in clean if name.endswith("_loss")])
    assert errors.std() == pytest.approx(0.01, rel=0.15)
    assert abs(np.corrcoef(errors, others)[0, 1]) < 0.2
    assert not np.array_equal(noisy.table.initial["retain/answer_loss"], world.table.initial["retain/answer_loss"])
    np.testing.assert_allclose(NoisyWorld(world.table, 0.0, 3).given_points, world.given_points, atol=1e-5)


def test_the_tables_of_a_real_model_show_what_bf16_does():
    folder = ROOT / "benchmarks" / "tables" / "rounding"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    world = World(read_table(folder / "smollm2-bfloat16.npz"))
    assert world.dense_gain > 0
    np.testing.assert_allclose(world.objectives(world.table.items(3)), world.table.objectives[3], atol=1e-5)
    for found in describe(folder).values():
        assert found["float32"]["scatter"] < 1e-4
        assert 0.005 < found["bfloat16"]["scatter"] < 0.02
        assert found["bfloat16"]["items"] < 0.3 < 0.9 < found["bend"]["items"]


def test_the_benchmark_of_errors_counts_scores_by_true_and_by_measured_values():
    options = ["--levels", "0", "0.01", "--seeds", "1", "--scores", "8", "--look-at", "8", "--searches", "line", "nine"]
    command = [sys.executable, str(ROOT / "benchmarks" / "noise.py"), str(TABLES[0]), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    exact, noisy = (json.loads(done.stdout)["worlds"][TABLES[0].stem][level] for level in ("0.0%", "1.0%"))
    assert exact["grid"]["chosen"] == [1.0] and noisy["grid"]["chosen"][0] < 1.0
    assert exact["line"]["scored"] == exact["line"]["chosen"] == exact["line"]["measured"]
    assert exact["line"]["scored"][0] <= 8 and exact["nine"]["scored"] == [None]
    assert noisy["line"]["measured_at_8"] != noisy["line"]["scored_at_8"]


def test_tables_that_cannot_be_replayed_are_told(world):
    choices = replace(world.table, arrays={"forget/correct": np.ones((720, 3), dtype=bool)}, retain={})
    with pytest.raises(UserError, match="only such tables can be replayed"):
        World(choices)
    few = World(world.table, np.isin(world.table.alpha, [0, 1]))
    with pytest.raises(UserError, match="grad_diff, epoch 2: 2 points are too few for a curve"):
        few.items(1, 2, 0.5)


def test_the_benchmark_tells_how_long_searches_took():
    options = ["--seeds", "3", "--scores", "40", "--suggest-at", "60", "--samplers", "grid", "tpe"]
    command = [sys.executable, str(ROOT / "benchmarks" / "samplers.py"), str(TABLES[0]), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    one = told["worlds"][TABLES[0].stem]
    assert max(one["recomputed"]) < 1e-5
    # Forty scores: a grid of the two ends finds next to nothing.
    assert one["samplers"]["grid"]["share_at_end"] < one["samplers"]["tpe"]["share_at_end"] <= 1.1
    assert one["samplers"]["grid"]["scores_to_95%"] == {
        "q25": None,
        "median": None,
        "q75": None,
        "reached": 0,
        "ratio_to_tpe": None,
    }
    assert one["samplers"]["tpe"]["suggest_at_60"]["median"] > 0
