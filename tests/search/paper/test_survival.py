"""What survives attacks: effects against closed forms and simulated truth, rules, verdicts, the page."""

import json
import math

import numpy as np
import pytest

from search.paper import survival
from search.paper.attacks import ATTACKS
from search.paper.page import write_page
from search.paper.statistics import FAILS, HOLDS, OPEN, coefficient, estimate
from search.paper.survival import NOT_TESTED, ONE_SEED, STRONGEST, WORST, Attacked
from search.problem.objectives import MODEL_UTILITY
from uipe_core.errors import UserError

BOTH = ("forgetting", "utility")


def test_coefficient_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    asked, other, values = rng.normal(size=(3, 40))
    ones = np.ones(40)
    expected = np.linalg.lstsq(np.column_stack([ones, asked, other]), values, rcond=None)[0][1]
    assert coefficient(values, asked, [ones, other]) == pytest.approx(expected)
    # Columns that say the same twice are no harm among the others, and no answer where they are asked about.
    assert coefficient(values, asked, [ones, other, 2 * other]) == pytest.approx(expected)
    assert math.isnan(coefficient(values, 2 * other - 1, [ones, other]))
    assert math.isnan(coefficient(values[:3], asked[:3], [ones[:3], other[:3]]))


def test_interval_of_the_coefficient_covers_the_truth_as_often_as_it_says():
    rng, truth, covered = np.random.default_rng(1), 0.1, 0
    repeats, seeds, points = 600, 3, 30
    for _ in range(repeats):
        found = []
        for _ in range(seeds):
            above = rng.integers(0, 2, points).astype(float)
            forgetting = 0.3 * above + rng.uniform(0, 1, points)  # walks above 0 forget more, as they do
            own = truth + rng.normal(0, 0.05)  # a seed has an effect of its own around the true one
            share = 0.5 + own * above - 0.4 * forgetting + rng.normal(0, 0.1, points)
            found.append(coefficient(share, above, [np.ones(points), forgetting]))
        interval = estimate(found)
        covered += interval.low <= truth <= interval.high
    # Binomial: two standard deviations of 600 draws at 95% are 0.018.
    assert covered / repeats == pytest.approx(0.95, abs=0.027)


@pytest.mark.parametrize("share", [*ATTACKS, survival.BITS])
def test_walks_on_the_training_curve_gain_nothing_over_it(made_up_parts, share):
    world = Attacked(made_up_parts(0))
    for group in ("alpha above 0", "alpha below 0"):
        gains = survival.over_training(world, share, group, BOTH)
        assert gains == pytest.approx([0.0] * len(gains), abs=1e-9)
        assert gains
        assert survival.by_regression(world, share, group, BOTH) == pytest.approx(0.0, abs=1e-9)


def test_known_effects_are_found_where_training_matches(made_up_parts):
    world = Attacked(made_up_parts(0, above=0.07, below=0.2, pushed=0.03))
    # Of each method epochs 1 and 2 at 0.5 and 1 are within training's four epochs; epoch 1 at -0.5 is below its first.
    assert survival.over_training(world, "nf4", "alpha above 0", BOTH) == pytest.approx([0.07] * 8)
    assert survival.over_training(world, "nf4", "alpha below 0", BOTH) == pytest.approx([-0.2] * 4)
    assert survival.by_regression(world, "nf4", "alpha above 0", BOTH) == pytest.approx(-0.07)
    assert survival.by_regression(world, "nf4", "alpha below 0", BOTH) == pytest.approx(0.2)
    assert survival.as_far(world, "nf4") == pytest.approx([0.07] * 8)
    assert survival.pushed_over(world, "nf4", 0.0) == pytest.approx([0.03] * 6)


def test_a_walk_against_a_random_step_as_far(made_up_parts):
    world = Attacked(made_up_parts(0, above=0.07))
    # As far as two epochs for each, the walk has lost 0.1 of its share for each epoch more.
    assert survival.pushed_over(world, "nf4", 1.0) == pytest.approx([-0.07 - 0.1 * epoch for epoch in (1, 2, 3)] * 2)


def test_points_that_collapsed_or_were_not_attacked_are_left_out(made_up_parts):
    parts = made_up_parts(0)
    whole = len(Attacked(parts).rows("walk"))
    points = [dict(point) for point in parts[0]["points"]]
    points[0]["collapsed"] = "mean loss of 30 nats"
    points[1]["after"] = dict.fromkeys(ATTACKS)
    points[2]["after"] = {**points[2]["after"], "nf4": None}
    world = Attacked([{**parts[0], "points": points}, parts[1]])
    assert len(world.rows("walk")) == whole - 2
    assert [len(world.curves(attack)["grad_diff"]) for attack in ("nf4", "int4")] == [1, 2]
    assert not world.front[0]


def test_rules_choose_from_the_front_and_are_held_against_it(made_up_parts):
    world = Attacked(made_up_parts(0, bases=("npo",)))
    front = world.points[world.front]
    assert len(front) == 13  # forgetting and utility change places along one line: every walk is on it
    chosen = survival.chosen(world, MODEL_UTILITY)
    assert chosen[STRONGEST]["distance"] == 6
    # 95% of the initial 0.8 is kept up to 0.8 epochs.
    assert chosen["utility-floor"]["distance"] == 0.5
    # Chance, a truth ratio of 0.5, is 6 epochs away; the product with the utility left is largest earlier than at the end.
    assert 0 < chosen["chance"]["distance"] <= 6
    shares = front[WORST].mean()
    assert survival.fragility(world, MODEL_UTILITY, STRONGEST) == pytest.approx([-0.1 - shares])
    assert survival.fragility(world, MODEL_UTILITY, "utility-floor") == pytest.approx([0.45 - shares])


def answers(settings, parts_of_seeds):
    worlds = [Attacked(parts) for parts in parts_of_seeds]
    return {row["key"]: row for row in survival.answered(settings, worlds)}


@pytest.mark.parametrize(
    ("lifts", "verdict"), [((0.05, 0.06, 0.07), HOLDS), ((-0.05, -0.06, -0.07), FAILS), ((-0.05, 0.06, 0.01), OPEN)]
)
def test_verdict_follows_the_seeds(attack_settings, made_up_parts, lifts, verdict):
    rows = answers(attack_settings, [made_up_parts(seed, above=lift, below=lift) for seed, lift in enumerate(lifts)])
    for key in ("relearn_forget_above", "relearn_forget_below", "four_bits_above"):
        assert rows[key]["verdict"] == verdict
        assert rows[key]["mean"] == pytest.approx(sum(lifts) / 3) == rows[key]["regression"]["mean"]
        assert rows[key]["values"] == pytest.approx(lifts)


def test_one_seed_says_so_and_what_was_not_compared_says_that(attack_settings, made_up_parts):
    parts = made_up_parts(0)
    rows = answers(attack_settings, [parts])
    assert rows["relearn_few_above"]["verdict"] == ONE_SEED
    assert rows["relearn_few_above"]["error"] is None
    walked = [{**part, "points": [point for point in part["points"] if point["alpha"] >= 0]} for part in parts]
    assert answers(attack_settings, [walked])["relearn_few_below"]["verdict"] == NOT_TESTED


def test_a_method_that_diverged_is_left_out_and_named(attack_settings, made_up_parts):
    parts = made_up_parts(0)
    parts[1] = {**parts[1], "initial": None, "points": [], "problem": "the loss is not finite in epoch 1"}
    worlds, found = survival.summarise(attack_settings, parts)
    assert found["problems"] == ["seed 0, npo: the loss is not finite in epoch 1"]
    assert set(worlds[0].points["base"]) == {"grad_diff"}


def test_no_method_left_is_an_error_with_the_remedy(attack_settings, made_up_parts):
    parts = [{**part, "initial": None, "points": [], "problem": "diverged"} for part in made_up_parts(0)]
    with pytest.raises(UserError, match=r"unlearning.methods: no method is left.*diverged; give a lower learning_rate"):
        survival.summarise(attack_settings, parts)


def test_page_of_attacks_alone_has_figure_and_answers(attack_settings, made_up_parts, tmp_path):
    parts = [part for seed in (0, 1, 2) for part in made_up_parts(seed, below=0.1 + 0.01 * seed)]
    page, summary = write_page(tmp_path, attack_settings, parts)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1
    for row in summary["survival"]["answers"]:
        assert f'id="answer-{row["key"]}"' in text
    assert "0.110 ± 0.006" in text
    assert "UIPE's experiments" not in text
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["survival"] == summary["survival"]
    assert len(content["attacked_points"]) == 6
