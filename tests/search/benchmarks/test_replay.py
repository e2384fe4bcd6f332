"""Searches replayed on a recorded table: exact where something was recorded, and close in between."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.recorded.replay import World
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
