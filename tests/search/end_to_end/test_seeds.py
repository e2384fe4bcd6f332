"""A study whose base runs are trained from several seeds: its front at every seed, and what holds over them."""

import json

import numpy as np
import pandas as pd
import pytest

from search.problem.objectives import FORGET_QUALITY, MODEL_UTILITY
from search.results.finalists import over_seeds
from search.results.study_result import StudyResult
from search.spec.errors import StudyFileError
from search.spec.study import load_study

NAMES = (FORGET_QUALITY.name, MODEL_UTILITY.name)


@pytest.fixture(scope="module")
def several(place, run_command, write_study, tmp_path_factory):
    """The tiny study over two seeds; one of its base runs is that of `finished`."""
    folder = tmp_path_factory.mktemp("seeds")
    file = write_study(
        folder / "seeds.yaml", name="seeds", unlearning={"seeds": [0, 1], "methods": {"npo": {"beta": 1}}}, search={"trials": 3}
    )
    run_command("run", file, "--out", folder / "out", "--json")
    return file, folder / "out"


def test_base_runs_of_every_seed_are_base_runs_of_the_study(several):
    result = StudyResult.open(several[1])
    assert list(result.spec.base_epochs()) == ["npo@0", "npo@1"]
    assert set(result.trials.loc[result.trials["kind"] == "alpha_zero", "base"]) == {"npo@0", "npo@1"}
    keys = {run.delta for run in result.store.record.base_runs.values()}
    assert len(keys) == 2


def test_every_front_point_is_known_at_every_seed(several):
    result = StudyResult.open(several[1])
    table = result.over_seeds
    assert list(table["trial"]) == list(result.front["trial"]) and set(table["seeds"]) == {2}
    others = result.controls[result.controls["kind"] == "other_seed"]
    for row in table.to_dict("records"):
        other = {"npo@0": "npo@1", "npo@1": "npo@0"}[row["base"]]
        at = lambda frame: frame[(frame["base"] == other) & (frame["epoch"] == row["epoch"]) & (frame["alpha"] == row["alpha"])]  # noqa: E731, B023
        twin = pd.concat([at(result.trials), at(others)]).iloc[0]
        for name in NAMES:
            pair = np.array([row[name], twin[name]])
            assert row[f"{name}_mean"] == pytest.approx(pair.mean()) and row[f"{name}_spread"] == pytest.approx(
                pair.std(ddof=1)
            )
    # What was a trial already is not scored again.
    walked = set(zip(result.trials["base"], result.trials["epoch"], result.trials["alpha"], strict=True))
    assert walked.isdisjoint(zip(others["base"], others["epoch"], others["alpha"], strict=True))


def test_rules_choose_among_what_holds_and_say_so(several, call):
    result = StudyResult.open(several[1])
    holds = set(result.over_seeds.loc[result.over_seeds["holds"], "trial"])
    row, note = result.choose("knee")
    assert "over all seeds" in str(note)
    assert not holds or (int(row["trial"]) in holds and set(result.finalists(9)["trial"]) <= holds)
    code, output, _ = call("pareto", several[1])
    assert code == 0 and "hold over all 2 seeds: " in output
    code, output, _ = call("pareto", several[1], "--json")
    given = json.loads(output)
    assert code == 0 and given["attainment"].keys() == {"25%", "50%", "75%"}
    # Of two seeds half are one: whatever one of them attains.
    assert given["attainment"]["50%"] == given["attainment"]["25%"]
    assert {row["trial"] for row in given["over_seeds"]} == {row["trial"] for row in given["front"]}


def test_the_same_command_has_nothing_left_to_do_and_the_report_says_what_holds(several, call):
    file, out = several
    code, _, error = call("run", file, "--out", out, "--json")
    assert code == 0 and "starting Ray" not in error
    page = (out / "report" / "report.html").read_text()
    assert "Over the seeds of the study" in page and ">holds</th>" in page


def test_a_study_of_one_seed_says_nothing_of_seeds(result, call):
    assert result.over_seeds.empty and result.attainment == {}
    assert "Over the seeds" not in result.report_path.read_text()


def frame(*rows):
    return pd.DataFrame([dict(zip(("trial", "base", "epoch", "alpha", *NAMES, "collapsed"), row, strict=True)) for row in rows])


def test_a_point_holds_if_no_other_is_as_good_in_the_means():
    front = frame((0, "a@0", 1, 0.0, -1.0, 0.8, None), (1, "a@0", 2, 0.0, -2.0, 0.9, None), (2, "b@0", 1, 0.5, 0.0, 0.7, None))
    again = frame(
        (9, "a@1", 1, 0.0, -1.0, 0.8, None), (9, "a@1", 2, 0.0, -4.0, 0.5, None), (9, "b@1", 1, 0.5, 0.0, 0.7, "garbled")
    )
    siblings = lambda label: {seed: f"{label[0]}@{seed}" for seed in (0, 1)}  # noqa: E731
    table = over_seeds(front, pd.concat([front, again]), (FORGET_QUALITY, MODEL_UTILITY), siblings, np.array([-9.0, 0.85]))
    assert list(table["holds"]) == [True, False, False]  # the second in its means, the third collapsed at a seed
    assert table[f"{NAMES[0]}_mean"].tolist() == [-1.0, -3.0, 0.0]
    assert table[f"{NAMES[1]}_spread"].tolist() == pytest.approx([0.0, 0.4 / 2**0.5, 0.0])
    # Without the counterpart at the other seed nothing is known to hold.
    alone = over_seeds(front, front, (FORGET_QUALITY, MODEL_UTILITY), siblings, None)
    assert not alone["holds"].any() and set(alone["seeds"]) == {1}


@pytest.mark.parametrize(
    ("unlearning", "words"),
    [
        ({"seeds": [3]}, "a single seed is the study's own. Write seed: 3"),
        ({"seeds": [1, 1]}, "the values must differ from each other"),
        ({"seeds": [0, -1]}, "unlearning.seeds[1] (line 35): found -1; must be at least 0"),
        ({"seeds": ["a", "b"]}, "unlearning.seeds[0] (line 34): found 'a'; must be a whole number"),
        ({"seeds": list(range(100)), "learning_rate": [0.1 / (step + 1) for step in range(6)]}, "make 1200 base runs"),
    ],
)
def test_seeds_that_are_none_are_refused(write_study, tmp_path, unlearning, words):
    with pytest.raises(StudyFileError) as caught:
        load_study(write_study(tmp_path / "study.yaml", unlearning=unlearning))
    assert words in str(caught.value)


def test_studies_without_the_key_keep_their_fingerprint_and_labels(preparation):
    assert "seeds" not in preparation.spec.fingerprint_payload()["unlearning"]
    assert {run.seed for run in preparation.spec.variants()} == {0}
    assert preparation.spec.siblings("npo") == {}
