"""Multiple choice whose logits are not finite: a complete trial that has collapsed and wins nothing, and no failure."""

import json
from dataclasses import replace

import numpy as np
import pytest

from search.evaluation.metrics import trial_metrics
from search.evaluation.task import TASKS, Comparison
from search.problem.objectives import CHOICE_FORGETTING, CHOICE_UTILITY
from search.spec.corpora import MULTIPLE_CHOICE
from uipe_core.metrics.scores import ChoiceReport, ChoiceScores

TASK = TASKS[MULTIPLE_CHOICE]
COUNT = 20


def scores(right):
    table = np.full((COUNT, 4), -2.0)
    table[:right, 0], table[right:, 1] = -1.0, -1.0
    return ChoiceScores(table, np.zeros(COUNT, dtype=np.int64), np.full(COUNT, 4, dtype=np.int64), np.full(COUNT, 2.5))


SOUND = ChoiceReport({"forget": scores(15), "utility": scores(16)}, {"letters": 0.5})


class Scorer:
    """Yields given reports, one a call."""

    def __init__(self, *reports):
        self.reports = list(reports)

    def score(self, loaded, temperature):
        return self.reports.pop(0)


def broken(value, rows=slice(None), names=("forget", "utility")):
    def spoiled(values):
        values = values.copy()
        values[rows] = value
        return values

    sets = {
        name: replace(each, log_likelihood=spoiled(each.log_likelihood), logit_spread=spoiled(each.logit_spread))
        for name, each in SOUND.sets.items()
        if name in names
    }
    return replace(SOUND, sets={**SOUND.sets, **sets})


def trial(*reports):
    report, dominated = TASK.score(Scorer(*reports), None, Comparison({}, "letters", ()))
    assert dominated is None
    metrics = trial_metrics(TASK, report, Comparison({"initial": SOUND}, "letters", (CHOICE_FORGETTING, CHOICE_UTILITY)))
    return json.loads(json.dumps(metrics.as_dict(), allow_nan=False)), report


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_a_collapse_and_no_failure(value):
    evidence, report = trial(broken(value), broken(value))
    assert evidence["collapsed"] == (
        "logits that are not finite for 100% of forget; logits that are not finite for 100% of utility"
    )
    assert (evidence["forgetting_to_chance"], evidence["utility_accuracy"]) == (-0.75, 0.0)
    assert (evidence["below_chance"], evidence["flagged"]) == (False, False)
    assert all(np.isfinite(values).all() for values in report.arrays().values())


@pytest.mark.parametrize("names", [("forget",), ("utility",)])
def test_one_question_is_enough_and_no_number_gains_by_it(names):
    spoiled = broken(np.nan, 19, names)
    evidence, _ = trial(spoiled, spoiled)
    sound, _ = trial(SOUND)
    assert evidence["collapsed"] == f"logits that are not finite for 5% of {names[0]}"
    assert sound["collapsed"] is None
    assert evidence["forgetting_to_chance"] <= sound["forgetting_to_chance"]
    assert evidence["utility_accuracy"] <= sound["utility_accuracy"]


def test_a_slip_of_the_machine_is_scored_again():
    assert trial(broken(np.nan), SOUND)[0] == trial(SOUND)[0]


def test_draws_of_a_collapsed_trial_are_its_numbers():
    _, report = trial(broken(np.nan), broken(np.nan))
    weights = {name: np.ones((3, COUNT)) for name in report.sets}
    assert TASK.draws(report.arrays(), weights, None, (), "letters").tolist() == [[-0.75, 0.0]] * 3
