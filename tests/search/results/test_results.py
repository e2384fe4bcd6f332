"""Fronts, hypervolumes and selections of studies with made-up numbers in a real store."""

import json
import math
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest

from search.evaluation.controls import CONTROLS, Control, follow_up_trials
from search.problem.objectives import CHOICE_FORGETTING, CHOICE_UTILITY, TRUTH_RATIO
from search.problem.space import Point
from search.problem.trial import TrialSpec
from search.report.conclusions import choice, conclusions, next_step
from search.report.data import report_data
from search.report.display import print_front
from search.report.html import front_latex, write_report
from search.results.selection import chosen_row, measure_of_chance
from search.results.study_result import StudyResult
from search.spec.study import parse_study
from uipe_core.errors import UserError
from uipe_core.logs.tofu import write_log
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import log10_p_floor

ITEMS = 16
FLOOR = log10_p_floor(ITEMS, ITEMS)
CAP = math.log10(0.3)


def flat_report():
    """Scores of nothing in particular, on as many items as matter."""
    ones, counts = np.ones(ITEMS), np.ones(ITEMS, dtype=np.int64)
    scores = SetScores(ones, counts, ones, counts, np.ones((ITEMS, 2)), np.ones((ITEMS, 2), dtype=np.int64), ones, ones)
    return ScoreReport(dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), scores))


@pytest.fixture
def study(new_store, made_up_evidence):
    """Makes a study of given points: rows of (alpha, log10 forget quality, utility), and controls."""

    def make(points, controls=(), initial=(-6.0, 0.8), evidence=made_up_evidence, **changes):
        store = new_store(**changes)
        space = parse_study(store.record.spec).search_space()
        write_log(flat_report(), store.out / "logs" / "retain.json")
        store.record.note_base_run("npo", "0", [{"epoch": 1, "seconds": 1.0}])
        store.save_record()
        for alpha, strength, utility in points:
            if alpha == 0:
                number, job = store.ask_point(space, Point("npo", 1, 0.0).params, "alpha_zero")
            else:
                number, job = store.ask_point(space, {"base": "npo", "epoch": 1, "alpha": alpha}, "search")
            store.complete(job, number, evidence(job, strength, utility))
        known = [] if initial is None else [(TrialSpec("initial"), *initial)]
        for job, strength, utility in (*known, *controls):
            store.complete(job, store.ask_control(job), evidence(job, strength, utility))
        return StudyResult.open(store.out)

    return make


def area_by_brute_force(points, corner):
    """Cells of the grid through all points that some point dominates, added up."""
    points = [(min(strength, CAP), utility) for strength, utility in points]
    xs = sorted({corner[0], *(x for x, _ in points if x > corner[0])})
    ys = sorted({corner[1], *(y for _, y in points if y > corner[1])})
    area = 0.0
    for x0, x1 in pairwise(xs):
        for y0, y1 in pairwise(ys):
            if any(x >= x1 and y >= y1 for x, y in points):
                area += (x1 - x0) * (y1 - y0)
    return area


def random_points(seed, count=12):
    rng = np.random.default_rng(seed)
    alphas = np.where(rng.random(count) < 0.3, 0.0, rng.uniform(-1, 2, count))
    return [(float(a), float(rng.uniform(FLOOR, 0)), float(rng.uniform(0, 1))) for a in alphas]


@pytest.mark.parametrize("seed", range(5))
def test_hypervolumes_are_those_of_brute_force(study, seed):
    points, rng = random_points(seed), np.random.default_rng(100 + seed)
    randoms = [(float(rng.uniform(FLOOR, 0)), float(rng.uniform(0, 1))) for _ in range(2)]
    controls = [(TrialSpec("random_direction", "npo", 1, 0.5, of_trial=n), *point) for n, point in enumerate(randoms)]
    controls.append((TrialSpec("retain"), 0.0, 1.0))
    initial = (-6.0, 0.8)
    result = study(points, controls, initial)
    corner = (FLOOR, 0.0)
    expected = {
        "front": [point[1:] for point in points],
        "alpha_zero": [point[1:] for point in points if point[0] == 0],
        "extrapolation_only": [point[1:] for point in points if point[0] >= 0],
        "random_direction": [*(point[1:] for point in points if point[0] == 0), *randoms],
    }
    for name, chosen in expected.items():
        assert result.hypervolume[name] == pytest.approx(area_by_brute_force([*chosen, initial], corner)), name
    for name, key in (("all", "front"), ("extrapolation_only", "extrapolation_only"), ("random_direction", "random_direction")):
        assert result.gain[name] == pytest.approx(result.hypervolume[key] - result.hypervolume["alpha_zero"], abs=1e-12)
        assert result.gain[name] >= 0


def test_forget_quality_above_the_cap_wins_nothing(study):
    result = study([(0, CAP, 0.5), (0.5, -0.01, 0.5)])
    assert result.gain["all"] == pytest.approx(0.0)
    assert result.front["trial"].tolist() == [1]


def test_the_reference_point_of_the_spec_is_used(study):
    changes = {"hypervolume": {"reference_point": {"log10_forget_quality": -3.0, "model_utility": 0.25}}}
    result = study([(0, -2.0, 0.5)], initial=(-6.0, 0.8), **changes)
    assert result.reference_point() == {"log10_forget_quality": -3.0, "model_utility": 0.25}
    assert result.hypervolume["front"] == pytest.approx(1.0 * 0.25)


def test_the_floor_of_the_sample_is_the_reference_point_otherwise(study):
    result = study([(0, -2.0, 0.5)])
    assert result.store.item_counts["forget"] == ITEMS
    assert result.reference_point()["log10_forget_quality"] == pytest.approx(FLOOR)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_dominates_strongest_first(study, seed):
    points = random_points(seed)
    result = study(points, initial=None)
    best = {
        number
        for number, (_, x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for _, a, b in points)
    }
    assert set(result.front["trial"]) == best
    assert result.front["log10_forget_quality"].is_monotonic_decreasing
    assert {trial.number for trial in result.study.best_trials} == best


@pytest.mark.parametrize("seed", range(5))
def test_the_front_has_nothing_that_the_initial_model_beats(study, seed):
    points, start = random_points(seed), (-9.0, 0.6)
    best = {
        number
        for number, (_, x, y) in enumerate(points)
        if (x > start[0] or y > start[1]) and not any(a >= x and b >= y and (a > x or b > y) for _, a, b in points)
    }
    assert set(study(points, initial=start).front["trial"]) == best


def test_a_point_that_the_initial_model_beats_is_recommended_nowhere(study, call):
    # As much forgotten as by the initial model, with less utility; no other trial beats the first.
    result = study([(0, -6.0, 0.79), (0.5, -6.0, 0.7), (1.0, -7.0, 0.5)])
    assert result.front.empty and result.healthy_front.empty and result.finalists(3).empty
    for rule in ("knee", "utility-floor"):
        for allowed in (False, True):
            with pytest.raises(UserError, match="the initial model is at least as good as every trial"):
                result.select(rule, allow_collapsed=allowed)
    said = conclusions(result)
    assert said[0] == "Nothing was won: no trial forgets more than the initial model."
    assert any(words.startswith("1 trial that no other trial beats is not on it") for words in said)
    assert not any("strongest forgetting" in words or "Choosing alpha won" in words for words in said)
    assert write_report(result).is_file() and result.summary()["front"] == []
    assert [job.kind for job in follow_up_trials(result.store)] == []
    code, output, _ = call("pareto", result.out)
    assert code == 0 and "the initial model is at least as good as every trial" in " ".join(output.split())
    code, _, error = call("select", result.out)
    assert code == 2 and "nothing to choose" in error


def test_select_gives_its_reason_in_a_line(study, call):
    out = study([(0, -5.0, 0.79), (0.5, -3.0, 0.77), (1.0, -1.0, 0.3)]).out
    first = call("select", out)[1].splitlines()[0]
    assert first == (
        "trial 1: strongest forgetting with 0.95 or more of the initial model utility: log10 forget quality -3.00 "
        "(initial model -6.00), model utility 0.7700 (initial model 0.8000)"
    )
    knee = json.loads(call("select", out, "--rule", "knee", "--json")[1])
    assert knee["reason"].startswith("bulges farthest beyond the line between the ends of the front: log10 forget quality")


@pytest.mark.parametrize(("beats", "said"), [(True, "more than the initial model beyond noise"), (False, "within noise")])
def test_the_reason_says_whether_it_is_beyond_noise(study, monkeypatch, beats, said):
    result = study([(0, -5.0, 0.79), (0.5, -3.0, 0.77)])
    monkeypatch.setattr("search.results.study_result.beats_initial", lambda *_: {0: beats, 1: beats})
    assert said in result.reason(result.select("utility-floor"), "utility-floor")


def test_more_utility_alone_is_on_the_front_and_no_strongest_forgetting(study):
    result = study([(0, -6.5, 0.85), (0.5, -3.0, 0.4)])
    assert sorted(result.front["trial"]) == [0, 1]
    with pytest.raises(UserError, match=r"at least 0.95 .* forgets more than the initial model; give a lower --floor"):
        result.select("utility-floor")
    assert result.select("utility-floor", 0.5)["trial"] == 1
    assert "nothing was won at that floor" in " ".join(conclusions(result))


def test_a_front_of_one_point_serves_every_rule(study):
    result = study([(0, -1.0, 0.9), (0.5, -2.0, 0.7)])
    assert result.front["trial"].tolist() == [0]
    assert result.select("knee")["trial"] == result.select("utility-floor")["trial"] == 0
    assert write_report(result).is_file()


def test_utility_floor_takes_the_strongest_forgetting_that_keeps_enough(study):
    result = study([(0, -5.0, 0.79), (0.5, -3.0, 0.77), (1.0, -1.0, 0.6)])
    assert result.select("utility-floor", 0.95)["trial"] == 1
    assert result.select("utility-floor", 0.7)["trial"] == 2
    assert result.select("utility-floor")["trial"] == 1
    with pytest.raises(UserError, match="lower the floor"):
        result.select("utility-floor", 1.0)


def test_the_knee_bulges_farthest_from_the_chord(study):
    assert study([(0, -5.0, 0.8), (0.5, -1.5, 0.78), (1.0, -1.0, 0.4)]).select("knee")["trial"] == 1


def test_chance_reads_the_truth_ratio_of_points_on_the_front(study, made_up_evidence, call):
    """Of three front points it is neither the strongest nor the one with the highest utility."""
    truth = {-6.0: 0.3, -5.0: 0.32, -3.0: 0.45, -1.0: 0.9}

    def evidence(job, strength, utility):
        return made_up_evidence(job, strength, utility, one_minus_truth_share=truth[strength])

    result = study([(0, -5.0, 0.8), (0.5, -3.0, 0.7), (1.0, -1.0, 0.6)], evidence=evidence)
    assert result.select("chance")["trial"] == 1
    code, output, _ = call("select", result.out, "--rule", "chance")
    assert code == 0 and output.splitlines()[0] == (
        "trial 1: nearest to chance (0.5) at the model utility it keeps: 1 - truth ratio p / (p + q) (forget) 0.4500 "
        "(initial model 0.3000), model utility 0.7000 (initial model 0.8000)"
    )
    assert "chance" in [each["rule"] for each in report_data(result).summary["selections"]]


@pytest.mark.parametrize(("initial", "said"), [((-6.0, 0.8), "is not known of every trial"), (None, "has not been scored")])
def test_chance_says_what_it_lacks(study, initial, said):
    with pytest.raises(UserError, match=said):
        study([(0, -5.0, 0.8), (0.5, -3.0, 0.7)], initial=initial).select("chance")


def test_chance_goes_by_the_forgetting_of_the_study_where_its_chance_is_known():
    assert measure_of_chance((CHOICE_FORGETTING, CHOICE_UTILITY)) is CHOICE_FORGETTING
    assert measure_of_chance((TRUTH_RATIO, CHOICE_UTILITY)) is TRUTH_RATIO
    front = pd.DataFrame({"forgetting_to_chance": [-0.1, -0.4], "utility_accuracy": [0.7, 0.8]})
    initial = pd.Series({"forgetting_to_chance": -0.6, "utility_accuracy": 0.8})
    assert chosen_row(front, initial, (CHOICE_FORGETTING, CHOICE_UTILITY), "chance", 0.95) == (0, None)


@pytest.mark.parametrize(
    ("points", "chosen", "said"),
    [
        ([(0, -5.0, 0.79), (1.0, -1.0, 0.14)], 0, "this front has two: chosen by utility-floor 0.95"),
        (
            [(0, -5.0, 0.3), (1.0, -1.0, 0.14)],
            0,
            "none of them known to reach utility-floor 0.95: the one with the highest utility",
        ),
        ([(0, -1.0, 0.79)], 0, "this front has one: chosen by utility-floor 0.95"),
    ],
    ids=["two", "below the floor", "one"],
)
def test_a_front_of_fewer_than_three_points_has_no_knee_and_says_what_chose(study, points, chosen, said):
    result = study(points)
    row, note = result.choose("knee")
    assert row["trial"] == chosen and note.startswith("a knee needs three points") and said in note
    (selected,) = [each["rule"] for each in report_data(result).summary["selections"] if each["rule"].startswith("knee")]
    assert selected == f"knee ({note})"


@pytest.mark.parametrize(
    ("points", "named"),
    [
        ([(0, -5.0, 0.8), (0.5, -1.5, 0.78), (1.0, -1.0, 0.4)], "--rule utility-floor"),
        ([(0, -5.0, 0.7), (0.5, -1.5, 0.6), (1.0, -1.0, 0.4)], "--rule knee"),
        ([(0, -5.0, 0.79), (1.0, -1.0, 0.14)], "--rule utility-floor"),
        ([(0, -5.0, 0.3), (1.0, -1.0, 0.14)], "--rule knee"),
    ],
)
def test_the_last_line_of_a_run_names_a_rule_that_can_choose(study, points, named):
    assert named in next_step(study(points))


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_floor_that_is_no_share_is_refused(study, floor):
    with pytest.raises(UserError, match="--floor"):
        study([(0, -5.0, 0.8)]).select("utility-floor", floor)


def test_an_unknown_rule_is_refused_with_the_known_ones(study):
    with pytest.raises(UserError, match="utility-floor, knee"):
        study([(0, -5.0, 0.8)]).select("best")


def test_an_unknown_trial_is_refused_with_the_range(study):
    with pytest.raises(UserError, match="numbers go from 0 to 0"):
        study([(0, -5.0, 0.8)]).trial(7)


def test_without_any_control_there_is_still_a_front(study):
    result = study([(0, -5.0, 0.8), (0.5, -1.0, 0.6)], initial=None)
    assert result.gain["all"] > 0
    assert result.select("knee")["trial"] in (0, 1)
    with pytest.raises(UserError, match="initial model has not been scored"):
        result.select("utility-floor")
    assert write_report(result).is_file()


def test_an_alpha_range_without_zero_has_nothing_given(study):
    result = study([(0.5, -5.0, 0.7), (1.0, -1.0, 0.6)], search={"alpha": {"low": 0.25, "high": 1.5}})
    assert result.hypervolume["extrapolation_only"] == result.hypervolume["front"]
    assert result.hypervolume["alpha_zero"] == pytest.approx((-6.0 - FLOOR) * 0.8)
    assert write_report(result).is_file()
    json.dumps(result.summary(), allow_nan=False)


def test_a_study_without_searched_trials_can_be_reported(study):
    result = study([(0, -5.0, 0.8)], search={"trials": 0})
    assert result.gain["all"] == 0.0
    assert any("won nothing" in sentence for sentence in conclusions(result))
    assert write_report(result).is_file()


def test_no_complete_trial_is_an_error_that_gives_the_first_reason(new_store):
    store = new_store()
    with pytest.raises(UserError, match="no trial of this study is complete"):
        StudyResult.of(store)
    number, job = store.ask_point(parse_study(store.record.spec).search_space())
    store.fail(job, number, "the worker had no memory")
    with pytest.raises(UserError, match="1 failed, the first because: the worker had no memory"):
        StudyResult.of(store)


@pytest.mark.parametrize("scale", [math.nan, math.inf, None])
def test_a_logit_scale_that_is_no_number_is_null_in_json(study, made_up_evidence, scale):
    result = study([(0, -5.0, 0.8)])
    result.front["logit_scale"] = scale
    assert json.loads(json.dumps(result.rows(result.front), allow_nan=False))[0]["logit_scale"] is None


def test_front_rows_are_plain_json_values(study):
    result = study([(0.5, -5.0, 0.8)])
    row = result.rows(result.front)[0]
    assert type(row["trial"]) is int and type(row["alpha"]) is float and type(row["flagged"]) is bool
    assert row["walk"] == "extrapolation"


def test_random_directions_mirror_each_moved_front_point_once(study):
    mirror = TrialSpec("random_direction", "npo", 1, 0.5, of_trial=1)
    result = study([(0, -5.0, 0.8), (0.5, -3.0, 0.7), (1.0, -1.0, 0.6), (1.5, -2.0, 0.2)], [(mirror, -6.0, 0.8)])
    randoms = [job for job in follow_up_trials(result.store) if job.kind == "random_direction"]
    assert randoms == [TrialSpec("random_direction", "npo", 1, 1.0, of_trial=2)]


def test_a_control_that_scores_as_trials_do_scores_no_point_twice(study, monkeypatch):
    def fixed(kind, alpha):
        return Control(follow_up=lambda store, row, point: [TrialSpec(kind, **{**point, "alpha": alpha})])

    result = study([(0, -5.0, 0.8), (0.5, -3.0, 0.7)], [(TrialSpec("done", "npo", 1, 0.75, of_trial=0), -4.0, 0.7)])
    for kind, alpha in {"trial": 0.5, "done": 0.75, "new": 1.0}.items():
        monkeypatch.setitem(CONTROLS, kind, fixed(kind, alpha))
    monkeypatch.setitem(CONTROLS, "drawn", replace(fixed("drawn", 0.5), update=lambda update, seed: update))
    # Both front points ask for each of them; one with another update asks for its own.
    kinds = ("trial", "done", "new", "drawn")
    asked = [(job.kind, job.of_trial) for job in follow_up_trials(result.store) if job.kind in kinds]
    assert asked == [("new", 0), ("drawn", 0), ("drawn", 1)]


def test_missing_trials_are_said_in_the_report(study):
    result = study([(0, -5.0, 0.8), (0.5, -1.0, 0.6)], search={"trials": 5})
    assert "1 of 5 search trials are done" in " ".join(report_data(result).summary["notes"])


# Collapse


@pytest.fixture
def with_collapse(new_store, made_up_evidence):
    """A study whose points may have collapsed: rows of (log10 forget quality, utility, reason or None)."""

    def make(points):
        store = new_store()
        space = parse_study(store.record.spec).search_space()
        for index, (strength, utility, reason) in enumerate(points):
            number, job = store.ask_point(space, {"base": "npo", "epoch": 1, "alpha": 0.1 + index / 10}, "search")
            store.complete(job, number, made_up_evidence(job, strength, utility, collapsed=reason))
        store.complete(
            TrialSpec("initial"), store.ask_control(TrialSpec("initial")), made_up_evidence(TrialSpec("initial"), -6.0, 0.8)
        )
        return StudyResult.of(store)

    return make


@pytest.mark.parametrize("older", [False, True])
def test_the_table_shows_what_the_forget_set_still_gets_and_the_initial_model(study, made_up_evidence, capsys, older):
    def told(job, strength, utility, **more):
        numbers = (1.0, 0.875) if job.kind == "initial" else (0.25, 0.125)
        names = ("ROUGE Forget", "Prob Forget") if older else ("forget_rouge", "forget_probability")
        values = dict(zip(names, numbers, strict=True))
        values = {"forget_components": values} if older else values
        long = {f"{name}_log10_forget_quality": -3.0 for name in ("related", "unrelated")}
        return made_up_evidence(job, strength, utility, **long, **values, **more)

    result = study([(0, -5.0, 0.79), (0.5, -3.0, 0.77)], evidence=told)
    assert result.rows(result.front)[0]["forget_rouge"] == 0.25
    print_front(result)
    wide = capsys.readouterr().out
    last = next(line for line in wide.splitlines() if "initial model" in line).split()
    assert last == ["initial", "model", "-6.00", "1e-06", "0.8000", "1.000", "0.875", "1.000", "-3.00", "-3.00"]
    print_front(result, 80)
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    heads = narrow.splitlines()[3]
    assert "ROUGE" in heads and "prob." in heads and "0.8000" in narrow
    assert "left out, because the terminal is narrow: log10 FQ K0, log10 FQ K2, logit scale, walk" in narrow.replace("\n", " ")
    assert sum("npo" in line for line in narrow.splitlines()) == 2


def test_numbers_made_with_stand_ins_are_marked(study, capsys):
    result = study([(0, -5.0, 0.79)])
    assert result.store.record.corpus.stand_ins == {}
    print_front(result)
    assert "*" not in capsys.readouterr().out
    result.store.record.corpus.stand_ins = {"forget": ["perturbed"]}
    print_front(result)
    text = capsys.readouterr().out
    assert "FQ *" in text and "MU *" not in text
    assert "* made with stand-ins" in text and "answers of other items stand in" in " ".join(text.split())


def test_before_the_initial_model_is_scored_it_has_no_line(study, capsys):
    print_front(study([(0, -5.0, 0.79)], initial=None))
    assert "initial model  " not in capsys.readouterr().out


def test_no_rule_selects_a_collapsed_point_unless_told_to(with_collapse):
    result = with_collapse([(-5.0, 0.79, None), (-1.0, 0.78, "generations on retain: 100% empty"), (-3.0, 0.77, None)])
    assert result.front["trial"].tolist() == [1, 0]
    # The third is dominated by the collapsed one alone, so it can be chosen.
    assert result.select("utility-floor")["trial"] == 2
    assert result.select("utility-floor", allow_collapsed=True)["trial"] == 1
    assert result.select("knee")["trial"] in (0, 2)
    assert set(result.finalists(3)["trial"]) == {0, 2}
    assert result.select("knee", allow_collapsed=True)["trial"] in (0, 1)


def test_where_every_trial_has_collapsed_the_way_out_is_named(with_collapse):
    result = with_collapse([(-5.0, 0.79, "broken"), (-1.0, 0.78, "broken")])
    for rule in ("knee", "utility-floor"):
        with pytest.raises(UserError, match=r"every trial has collapsed; .*--allow-collapsed"):
            result.select(rule)
        assert result.select(rule, allow_collapsed=True)["collapsed"] == "broken"
    assert result.finalists(3).empty
    assert next_step(result).startswith("every trial has collapsed") and "--allow-collapsed" in next_step(result)


def test_rows_say_why_a_point_has_collapsed_and_name_the_definition(with_collapse):
    result = with_collapse([(-5.0, 0.79, None), (-1.0, 0.78, "broken")])
    rows = json.loads(json.dumps(result.rows(result.front), allow_nan=False))
    assert [row["collapsed"] for row in rows] == ["broken", None]
    assert {row["definition"] for row in rows} == {"tofu"}


def test_a_study_scored_before_collapse_was_looked_for_works_on(study):
    result = study([(0, -5.0, 0.79), (0.5, -3.0, 0.77)])
    assert "collapsed" not in result.study.trials[0].user_attrs
    assert result.select("utility-floor")["trial"] == 1
    assert [row["collapsed"] for row in result.rows(result.front)] == [None, None]


def test_the_command_line_marks_collapse_and_selects_around_it(with_collapse, call):
    reason = "mean loss of 31 nats per token on retain (limit 20)"
    out = with_collapse([(-5.0, 0.79, None), (-1.0, 0.78, reason)]).out
    code, output, _ = call("pareto", out)
    assert code == 0
    assert "1 x" in output and f"x trial 1 has collapsed ({reason}): no rule selects it" in " ".join(output.split())
    chosen = [json.loads(call("select", out, "--json", *more)[1]) for more in ((), ("--allow-collapsed",))]
    assert [(row["trial"], row["collapsed"]) for row in chosen] == [(0, None), (1, reason)]
    assert chosen[0]["definition"] == "tofu"
    code, output, _ = call("select", out)
    assert code == 0 and "definition tofu" in " ".join(output.split())


RELATED = {"search": {"third_objective": "related_log10_forget_quality"}}


def test_a_third_objective_counts_in_front_and_hypervolume(study, made_up_evidence):
    third = {0.5: -1.0, 1.0: -7.0, 1.5: -1.0}
    plain = {alpha: (strength, utility) for alpha, strength, utility in [(0.5, -2.0, 0.6), (1.0, -1.0, 0.7), (1.5, -5.0, 0.2)]}

    def three(job, strength, utility, **more):
        return made_up_evidence(job, strength, utility, related_log10_forget_quality=third.get(job.alpha, -7.0), **more)

    result = study([(a, *values) for a, values in plain.items()], evidence=three, **RELATED)
    assert [objective.name for objective in result.objectives][2] == "related_log10_forget_quality"
    assert result.study.metric_names == [objective.name for objective in result.objectives]
    # The first is worse than the second in both usual objectives, and on the front for its related facts.
    assert sorted(result.front["alpha"]) == [0.5, 1.0]
    corner = result.reference_point()
    assert corner["related_log10_forget_quality"] == FLOOR
    points = [(*plain[alpha], third[alpha]) for alpha in plain] + [(-6.0, 0.8, -7.0)]
    reference = np.array([FLOOR, 0.0, FLOOR])
    sizes = [np.array(point) - reference for point in points]
    # Inclusion and exclusion over all subsets of boxes that share a corner.
    volume = 0.0
    for size in range(1, len(sizes) + 1):
        for chosen in combinations(sizes, size):
            volume += (-1) ** (size + 1) * float(np.prod(np.min(chosen, axis=0)))
    assert result.hypervolume["front"] == pytest.approx(volume)
    page = write_report(result).read_text()
    assert "log10 forget quality of related facts (K2)" in page
    assert result.rows(result.front)[0].keys() >= {"related_log10_forget_quality"}


def test_the_front_is_a_table_of_latex_with_every_name_escaped(study, call):
    result = study([(0, -5.0, 0.79), (0.5, -3.0, 0.77), (1.0, -7.0, 0.2)])
    code, output, _ = call("pareto", result.out, "--latex")
    lines = output.splitlines()
    assert code == 0 and lines[0].startswith("% Pareto front of tiny") and lines[1] == r"\begin{tabular}{rlrrrrrr}"
    assert lines[3] == r"trial & base run & epoch & alpha & forget quality & log10 & model utility & logit scale \\"
    assert r"1 & npo & 1 & +0.500 & 0.001 & $-$3.00 & 0.7700 & 1.000 \\" in lines
    assert lines[-4:-2] == [r"\midrule", r" & initial model &  &  & $1.0\times10^{-6}$ & $-$6.00 & 0.8000 & 1.000 \\"]
    assert "either --json or --latex" in call("pareto", result.out, "--latex", "--json")[2]
    strange = "a_b & 5% $x$ #1 {y} ~ ^ \\ \x1b[31mred\n"
    result.trials["base"] = strange
    (row,) = [line for line in front_latex(result).splitlines() if line.startswith("1 & ")]
    escaped = r"a\_b \& 5\% \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{} red"
    assert row.startswith(f"1 & {escaped} & 1 & ")


def test_the_terminal_recommends_what_the_report_does(study):
    view = report_data(study([(0, -5.0, 0.8), (0.5, -1.5, 0.78), (1.0, -1.0, 0.4)]))
    recommended = view.summary["recommended"]
    assert choice(view) == f"trial {recommended['trial']}, by the rule {recommended['rule']}"


def test_the_terminal_recommends_nothing_where_the_initial_model_is_to_be_kept(study):
    assert choice(report_data(study([(0, -6.5, 0.79)]))) is None  # it forgets less than the initial model
