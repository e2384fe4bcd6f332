"""What is done about a front once it is found: on really scored points, and by hand on made-up ones."""

import json

import numpy as np
import pandas as pd
import pytest

from search.evaluation.controls import follow_up_trials
from search.problem.objectives import FORGET_QUALITY, MODEL_UTILITY
from search.problem.pareto import hypervolume
from search.results.finalists import best_first, confirmations, held_out, matched_scale
from search.results.study_result import StudyResult
from search.results.uncertainty import beats_initial, smallest_groups
from uipe_core.logs.tofu import read_log
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.tofu import evaluate, quality_ratios
from uipe_core.metrics.uncertainty import paired_permutation

OBJECTIVES = (FORGET_QUALITY, MODEL_UTILITY)


def test_every_front_point_is_scored_on_the_items_for_reporting_and_at_matched_scale(result):
    controls = result.controls
    for kind in ("held_out", "matched_scale"):
        mirrored = controls[(controls["kind"] == kind) & controls["of_trial"].notna()]
        assert set(mirrored["of_trial"].astype(int)) == set(result.front["trial"])
    assert follow_up_trials(result.store) == []
    matched = controls[controls["kind"] == "matched_scale"]
    assert matched["logit_scale"].to_numpy(dtype=float) == pytest.approx(1.0, rel=1e-4)
    assert set(controls[(controls["kind"] == "held_out") & controls["of_trial"].isna()]["model"]) == {"initial", "retain"}


def test_held_out_numbers_stand_beside_those_selected_by(result):
    table = result.held_out.set_index("trial")
    assert set(table.index) == set(result.front["trial"])
    for row in result.controls[result.controls["kind"] == "held_out"].dropna(subset=["of_trial"]).to_dict("records"):
        mine = table.loc[int(row["of_trial"])]
        assert mine["model_utility_held_out"] == row["model_utility"]
        assert mine["model_utility_difference"] == pytest.approx(row["model_utility"] - mine["model_utility"])


def test_trials_are_scored_on_the_selecting_half(result, preparation):
    rows = preparation.split.select
    counts = result.store.item_counts
    assert counts["forget"] == len(rows["forget"]) == 8
    retain = read_log(result.out / "logs" / "retain.json")
    assert len(retain.sets["forget"]) == 16
    arrays = result.store.items(int(result.trials["trial"].iloc[0]))
    assert len(arrays["forget/answer_loss"]) == 8


def test_other_retain_models_and_the_one_never_fine_tuned_are_scored(result):
    kinds = result.controls.set_index("kind")
    assert kinds.loc["other_retain", "forget_quality"] < 1
    assert kinds.loc["never_finetuned", "model_utility"] < kinds.loc["initial", "model_utility"]


def test_paired_p_is_that_of_the_kept_item_scores(result):
    definition = definition_named("tofu")
    from uipe_core.metrics.scores import set_scores

    retain = result.store.items(int(result.control("retain")["trial"]), control=True)
    reference = quality_ratios(set_scores(retain, "forget"), definition)
    groups = result.store.record.corpus.groups["forget"]
    for row in result.trials.head(3).to_dict("records"):
        ratios = quality_ratios(set_scores(result.store.items(row["trial"]), "forget"), definition)
        assert row["paired_p"] == paired_permutation(ratios, reference, result.spec.seed, groups)


def test_intervals_of_two_people_are_withheld(result):
    assert smallest_groups(result.store) == 2
    assert result.certainty.empty


def test_certainty_of_really_scored_trials(result, monkeypatch):
    monkeypatch.setattr("search.results.uncertainty.FEW_GROUPS", 2)
    table = StudyResult.of(result.store).certainty.set_index("trial")
    trials = result.trials.set_index("trial")
    assert set(table.index) == set(trials.index)
    for name in ("log10_forget_quality", "model_utility"):
        assert (table[f"{name}_low"] <= table[f"{name}_high"]).all()
        inside = (table[f"{name}_low"] - 1e-9 <= trials[name]) & (trials[name] <= table[f"{name}_high"] + 1e-9)
        assert inside.mean() > 0.7
    assert table["front_probability"].between(0, 1).all()
    assert (
        table.loc[trials["on_front"], "front_probability"].mean() > table.loc[~trials["on_front"], "front_probability"].mean()
    )
    assert table.loc[trials["on_front"], "alike"].notna().all()
    assert table.loc[~trials["on_front"], "alike"].isna().all()


def test_trials_are_held_against_the_initial_model_beyond_noise(result, monkeypatch):
    monkeypatch.setattr("search.results.uncertainty.FEW_GROUPS", 2)
    store, real = result.store, result.store.items
    initial = int(result.control("initial")["trial"])
    table = StudyResult.of(store).certainty
    assert not table["beats_initial"].any()  # nothing above the noise ceiling beats what is above it
    monkeypatch.setattr(store, "noise_ceiling", lambda controls: 1.0)
    # A trial with the initial model's own scores is no better; one with the retain model's is.
    same, forgotten = (int(number) for number in result.trials["trial"].iloc[:2])
    retain = int(result.control("retain")["trial"])
    others = {(same, False): (initial, True), (forgotten, False): (retain, True)}
    monkeypatch.setattr(
        store, "items", lambda n, control=False, **given: real(*others.get((n, control), (n, control)), **given)
    )
    again = StudyResult.of(store)
    beats = again.certainty.set_index("trial")["beats_initial"]
    assert not beats[same]
    # The sentence of a selection reads the forget set alone, and says the same.
    assert beats_initial(store, again.trials, again.controls) == beats.to_dict()
    monkeypatch.setattr(
        store, "items", lambda n, control=False, **given: None if (n, control) == (initial, True) else real(n, control, **given)
    )
    again = StudyResult.of(store)
    assert again.certainty["beats_initial"].isna().all()
    assert beats_initial(store, again.trials, again.controls) == {}


def test_without_item_scores_there_is_no_certainty(copied, monkeypatch):
    monkeypatch.setattr("search.results.uncertainty.FEW_GROUPS", 2)
    (copied / "items" / "trials" / "00000.npz").unlink()
    result = StudyResult.open(copied)
    assert 0 not in set(result.certainty["trial"])
    retain = int(result.control("retain")["trial"])
    (copied / "items" / "controls" / f"{retain:05d}.npz").unlink()
    assert StudyResult.open(copied).certainty.empty


def test_damaged_item_scores_are_named(copied, call):
    path = copied / "items" / "trials" / "00001.npz"
    path.write_bytes(path.read_bytes()[:100])
    code, _, error = call("report", copied)
    assert code == 2
    assert "00001.npz" in error and "damaged" in error


def frame(rows):
    return pd.DataFrame(rows, columns=["trial", "base", "epoch", "alpha", "log10_forget_quality", "model_utility"])


def test_finalists_go_by_what_only_they_add():
    front = frame([(0, "a", 1, 0, -1.0, 0.5), (1, "a", 1, 1, -1.1, 0.9), (2, "a", 1, 2, -5.0, 0.91)])
    corner = np.array([-6.0, 0.0])
    points = front[["log10_forget_quality", "model_utility"]].to_numpy()
    adds = [hypervolume(points, corner) - hypervolume(np.delete(points, n, 0), corner) for n in range(3)]
    order = best_first(front, OBJECTIVES, corner, [0.0, 1.0])
    assert order == [int(n) for n in np.argsort(adds)[::-1]]
    # Above the ceiling the first point is worth no more than its neighbour.
    assert best_first(front, OBJECTIVES, corner, [-1.1, 1.0])[-1] == 0


def test_confirmations_are_means_over_all_seeds():
    trials = frame([(4, "npo", 2, 0.5, -1.0, 0.7)])
    controls = pd.DataFrame(
        [
            {"kind": "held_out", "of_trial": 4, "log10_forget_quality": -2.0, "model_utility": 0.6},
            {"kind": "confirm", "of_trial": 4, "seed": 1, "log10_forget_quality": -3.0, "model_utility": 0.5},
            {"kind": "confirm", "of_trial": 4, "seed": 2, "log10_forget_quality": -4.0, "model_utility": 0.7},
        ]
    )
    row = confirmations(trials, controls, OBJECTIVES).iloc[0]
    assert (row["trial"], row["seeds"], row["log10_forget_quality"]) == (4, 2, -2.0)
    assert row["log10_forget_quality_mean"] == pytest.approx(-3.0)
    assert row["model_utility_spread"] == pytest.approx(0.1)
    assert confirmations(trials, controls[controls["kind"] == "held_out"], OBJECTIVES).empty


def test_no_split_means_nothing_is_held_out():
    front = frame([(4, "npo", 2, 0.5, -1.0, 0.7)])
    empty = pd.DataFrame(columns=["kind", "of_trial", "log10_forget_quality", "model_utility"])
    assert held_out(front, empty, OBJECTIVES).empty
    assert matched_scale(front, empty, OBJECTIVES).empty


@pytest.mark.slow
def test_confirm_trains_from_other_seeds_and_is_not_done_twice(copied, launch):
    driver = launch("confirm", copied, "--top", 1, "--seeds", 1, "--json")
    assert driver.wait() == 0, driver.stderr
    confirmed = json.loads(driver.stdout)["confirmed"]
    assert len(confirmed) == 1 and confirmed[0]["seeds"] == 1
    result = StudyResult.open(copied)
    control = result.controls[result.controls["kind"] == "confirm"].iloc[0]
    assert (control["seed"], control["of_trial"]) == (1, confirmed[0]["trial"])
    assert control["update_norm"] != pytest.approx(result.trial(confirmed[0]["trial"])["update_norm"], rel=1e-6)
    assert "Confirmed with other seeds" in (copied / "report" / "report.html").read_text()
    again = launch("confirm", copied, "--top", 1, "--seeds", 1, "--json")
    assert again.wait() == 0 and json.loads(again.stdout)["confirmed"] == confirmed
    assert "starting Ray" not in again.stderr


@pytest.mark.parametrize(
    ("option", "value", "wrong"),
    [("--top", 0, "few"), ("--seeds", -1, "few"), ("--top", 1001, "many"), ("--seeds", 10**18, "many")],
)
def test_confirm_refuses_too_few_and_too_many(copied, call, option, value, wrong):
    code, _, error = call("confirm", copied, option, value)
    assert code == 2
    assert f"{option}: {value} is too {wrong}; give at least 1 and at most 1000" in error


def test_evaluating_a_half_of_a_log_is_evaluating_that_half(result, preparation):
    rows = preparation.split.select
    hashes = {row["kind"]: row for row in result.controls.to_dict("records")}
    reports = {name: read_log(result.out / "logs" / f"{name}.json") for name in ("initial", "retain")}
    taken = {name: report.take(rows, {}) for name, report in reports.items()}
    assert evaluate(taken["initial"], taken["retain"]).model_utility == hashes["initial"]["model_utility"]
