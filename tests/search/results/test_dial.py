"""`uipe dial`: which lines it looks at, what it asks for, and that its answer is made of really scored trials."""

import json

import pandas as pd
import pytest

from search.cli.goals import dial_facts, print_dial
from search.problem.trial import TrialSpec
from search.results.constrained import CROSSED, LINES, MOST, NEVER, OPEN, Dial, answer_of
from search.results.study_result import StudyResult
from uipe_core.errors import UserError


@pytest.fixture
def study(new_store, made_up_evidence):
    """A study whose epochs at alpha = 0 are scored: the further, the more forgotten, and the less useful."""
    store = new_store()
    score(store, TrialSpec("initial", model="initial"), made_up_evidence, -9.0, 0.8)
    for base, strength in (("grad_diff", 1.0), ("npo", 0.5)):
        for epoch in (1, 2):
            forgotten, lost = 3.0 * strength * epoch, 0.1 * epoch
            score(store, TrialSpec("alpha_zero", base, epoch, 0.0), made_up_evidence, -9.0 + forgotten, 0.8 - lost)
    return store


def score(store, job, evidence, forgetting, utility, **more):
    """Scores a job by hand; its trial."""
    if job.kind in ("alpha_zero", "search", "dial"):
        number, _ = store.ask_point(
            store.spec.search_space(), {"base": job.base, "epoch": job.epoch, "alpha": job.alpha}, job.kind
        )
    else:
        number = store.ask_control(job)
    floor = {} if job.floor is None else {"floor": job.floor}
    store.complete(job, number, evidence(job, forgetting, utility, **floor, **more))
    return number


def straight(job):
    """Objectives on straight lines through the points of the study above."""
    strength, walked = (1.0 if job.base == "grad_diff" else 0.5) * job.epoch, 1 + job.alpha
    return -9.0 + 3.0 * strength * walked, 0.8 - 0.1 * job.epoch * walked


def play(store, evidence, dial, rounds=20):
    """Answers what is asked, round by round; the number of points of each round."""
    counts = []
    while jobs := dial.jobs():
        counts.append(len(jobs))
        assert len(counts) <= rounds
        for job in jobs:
            score(store, job, evidence, *straight(job))
    return counts


def test_lines_of_most_promise_are_looked_at_and_closed_in_on(study, made_up_evidence):
    dial = Dial(study, 0.9)
    assert dial.question.floor == pytest.approx(0.72)
    first = dial.jobs()
    # npo takes twice the utility for the same forgetting: one of its epochs is left out.
    assert len(first) == LINES and {job.base for job in first[:2]} == {"grad_diff"}
    for job in first:
        score(study, job, made_up_evidence, *straight(job))
    assert max(play(study, made_up_evidence, dial)) <= LINES
    answer = answer_of(StudyResult.of(study), 0.9)
    assert [line.base for line in answer.lines[:2]] == ["grad_diff", "grad_diff"]
    for line in answer.lines:
        assert line.scores <= MOST
        assert line.standing.state == CROSSED
        assert line.standing.last_feasible.utility >= dial.question.floor > line.standing.first_infeasible.utility
    best = StudyResult.of(study).trial(answer.best)
    assert best["kind"] == "dial" and best["model_utility"] == pytest.approx(0.72, abs=0.01)
    assert best["log10_forget_quality"] == max(line.standing.best.forgetting for line in answer.lines)


def test_a_line_is_asked_within_its_methods_own_range(new_store, made_up_evidence):
    store = new_store(
        unlearning={"methods": {"task_vector": {}}}, search={"alpha_by_method": {"task_vector": {"low": -1, "high": 6}}}
    )
    score(store, TrialSpec("initial", model="initial"), made_up_evidence, -9.0, 0.8)
    score(store, TrialSpec("alpha_zero", "task_vector", 1, 0.0), made_up_evidence, -8.9, 0.799)
    dial = Dial(store, 0.9)
    asked = []
    while jobs := dial.jobs():
        asked += [job.alpha for job in jobs]
        for job in jobs:
            score(store, job, made_up_evidence, -9.0 + 0.1 * (1 + job.alpha), 0.8 - 0.001 * (1 + job.alpha))
    assert max(asked) == 6.0  # utility never falls under the floor


def test_asked_again_it_goes_on_where_it_was_and_then_asks_for_nothing(study, made_up_evidence):
    first = Dial(study, 0.9)
    for job in first.jobs():
        score(study, job, made_up_evidence, *straight(job))
    looked_at = {(line.base, line.epoch) for line in first.lines()}
    second = Dial(study, 0.9)
    play(study, made_up_evidence, second)
    assert {(line.base, line.epoch) for line in second.lines()} == looked_at
    assert Dial(study, 0.9).jobs() == []
    # Another floor is another question, and what is scored already helps it.
    assert Dial(study, 0.8).jobs() != []
    assert all(line.scores == 0 for line in Dial(study, 0.8).lines())


def test_a_line_has_six_scores_and_no_more(study, made_up_evidence):
    dial = Dial(study, 0.9)
    cliff = lambda job: (-8.0 + job.alpha, 0.8 if job.alpha < -0.987654 else 0.1)  # noqa: E731
    asked = []
    while jobs := dial.jobs():
        asked += jobs
        for job in jobs:
            score(study, job, made_up_evidence, *cliff(job))
    counts = {(job.base, job.epoch): 0 for job in asked}
    for job in asked:
        counts[job.base, job.epoch] += 1
    assert max(counts.values()) <= MOST and len(counts) == LINES


def test_a_point_that_cannot_be_scored_is_not_asked_for_again(study):
    dial = Dial(study, 0.9)
    assert dial.jobs()
    assert dial.jobs() == []
    assert [line.standing.state for line in dial.lines()] == [OPEN] * LINES


def test_collapsed_trials_are_no_answer(study, made_up_evidence):
    score(study, TrialSpec("search", "npo", 1, 1.5), made_up_evidence, -0.6, 0.79, collapsed="empty answers")
    assert answer_of(StudyResult.of(study), 0.9).best is None
    number = score(study, TrialSpec("search", "npo", 1, -0.5), made_up_evidence, -8.0, 0.75)
    assert answer_of(StudyResult.of(study), 0.9).best == number


def test_alpha_above_zero_only_may_leave_no_answer(new_store, made_up_evidence, capsys):
    store = new_store(search={"alpha": {"low": 0, "high": 2}})
    score(store, TrialSpec("initial", model="initial"), made_up_evidence, -9.0, 0.8)
    score(store, TrialSpec("alpha_zero", "npo", 1, 0.0), made_up_evidence, -3.0, 0.3)
    assert Dial(store, 0.95).jobs() == []
    result = StudyResult.of(store)
    answer = answer_of(result, 0.95)
    assert answer.best is None and [line.standing.state for line in answer.lines] == [NEVER]
    told = dial_facts(result, answer)
    assert told["export"] is None and json.loads(json.dumps(told)) == told
    print_dial(told)
    text = capsys.readouterr().out
    assert "the lowest alpha does not keep the floor" in text and "give a lower --floor" in text


@pytest.mark.parametrize(
    ("beats", "said"),
    [
        (True, "; it forgets more than the initial model beyond noise"),
        (False, "; within noise it forgets no more than the initial model"),
        (None, "utility 0.7500"),
    ],
)
def test_the_answer_says_whether_it_is_more_than_noise(study, made_up_evidence, capsys, beats, said):
    best = score(study, TrialSpec("search", "npo", 1, -0.5), made_up_evidence, -8.0, 0.75)
    result = StudyResult.of(study)
    result.certainty = pd.DataFrame({"trial": [best], "beats_initial": [beats]})
    told = dial_facts(result, answer_of(result, 0.9))
    assert told["best"]["trial"] == best and told["best"]["beats_initial"] is beats
    print_dial(told)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("strongest forgetting"))
    assert line.endswith(said)


@pytest.mark.parametrize("floor", [0, -0.5, 1.2, float("nan")])
def test_impossible_floors_are_told(study, floor):
    with pytest.raises(UserError, match=r"--floor: .* is not a share of the initial model's utility"):
        Dial(study, floor)


def test_a_study_without_scores_is_told(new_store):
    with pytest.raises(UserError, match="neither the initial model nor a trial has been scored yet"):
        Dial(new_store(), 0.9)


def test_the_command_tells_what_is_wrong_before_it_begins(call, copied):
    code, _, error = call("dial", copied, "--floor", 95)
    assert (code, "--floor: 95 is not a share" in error) == (2, True)
    code, _, error = call("dial", copied / "nowhere")
    assert code == 2


def test_where_everything_is_forgotten_already_nothing_is_scored(copied, call, monkeypatch):
    """The tiny study's model never knew enough: there is nothing to forget."""
    monkeypatch.setattr("search.execution.study_run.connected", lambda *_: pytest.fail("a cluster was started"))
    code, text, error = call("dial", copied, "--floor", 0.9)
    assert code == 0, error
    # All are above the noise ceiling, and so is the initial model: nothing is recommended.
    assert "forgetting is at its noise ceiling (0 scores)" in text
    assert "forgets more than the initial model: that one is at the noise ceiling itself" in text


@pytest.mark.slow
def test_dial_scores_trials_of_the_study_certifies_its_answer_and_does_nothing_twice(write_study, run_command, tmp_path):
    # Without a noise ceiling there is something to look for in so small a world.
    file = write_study(tmp_path / "tiny.yaml", hypervolume={"forget_quality_cap": 1})
    out = tmp_path / "out"
    run_command("run", file, "--out", out, "--trials", 2)
    before = StudyResult.open(out)
    floor = next(share / 100 for share in range(100, 30, -2) if Dial(before.store, share / 100).jobs())
    told = json.loads(run_command("dial", out, "--floor", floor, "--json"))
    result = StudyResult.open(out)
    dials = result.trials[result.trials["kind"] == "dial"]
    assert 1 <= len(dials) == len(result.trials) - len(before.trials) <= LINES * MOST
    assert sum(line["scores"] for line in told["lines"]) == len(dials)
    least = floor * result.control("initial")["model_utility"]
    assert told["least_utility"] == pytest.approx(least)
    feasible = result.trials[result.trials["model_utility"] >= least]
    assert told["best"]["log10_forget_quality"] == feasible["log10_forget_quality"].max()
    for line in told["lines"]:
        last, first = line["last_feasible"], line["first_infeasible"]
        if first is not None:
            assert last["model_utility"] >= least > first["model_utility"]
            assert first["model_utility_interval"][0] < first["model_utility_interval"][1]
    # What is dialled for is scored as everything else is, items and all; and its front is mirrored.
    assert all(result.store.items(int(number)) is not None for number in dials["trial"])
    assert set(result.held_out["trial"]) == set(result.front["trial"])
    assert json.loads(run_command("dial", out, "--floor", floor, "--json")) == told
    assert len(StudyResult.open(out).trials) == len(result.trials)
    # The search itself still has as many trials to come as before.
    run_command("run", file, "--out", out, "--trials", 3)
    assert (StudyResult.open(out).trials["kind"] == "search").sum() == 3
    run_command("export", out, "--trial", told["best"]["trial"], "--to", tmp_path / "exported", "--as", "recipe")
