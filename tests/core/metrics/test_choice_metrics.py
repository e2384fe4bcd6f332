"""Accuracy, chance and the flag below it, against closed forms; and results written and read."""

import json
import math

import numpy as np
import pytest

from uipe_core.errors import UserError
from uipe_core.logs.multiple_choice import read_choice_log, write_choice_log
from uipe_core.metrics.collapse import choice_collapse_reason
from uipe_core.metrics.multiple_choice import evaluate_choices
from uipe_core.metrics.scores import ChoiceReport, ChoiceScores


def scores(right, wrong, choices=4, item_hash="h"):
    """A set in which so many questions are answered right and so many wrong; the right letter is always the first."""
    table = np.full((right + wrong, choices), -2.0)
    table[:right, 0], table[right:, 1] = -1.0, -1.0
    n = right + wrong
    return ChoiceScores(table, np.zeros(n, dtype=np.int64), np.full(n, choices, dtype=np.int64), np.full(n, 2.5), item_hash)


def report(forget, utility=None):
    return ChoiceReport({"forget": forget, "utility": utility or scores(6, 2)}, {"letters": 0.5})


def test_accuracy_chance_and_standard_error():
    metrics = evaluate_choices(report(scores(30, 10), scores(9, 11, choices=2)))
    assert metrics.forget.accuracy == 0.75
    assert metrics.forget.chance == 0.25
    assert metrics.forget.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert metrics.forgetting_to_chance == -0.5
    assert metrics.utility.accuracy == pytest.approx(0.45)
    assert metrics.utility.chance == 0.5
    assert not metrics.below_chance


def test_probability_of_the_right_answer_is_relative_to_the_letters_of_its_question():
    table = np.array([[math.log(0.2), math.log(0.1), math.log(0.1)], [math.log(0.03), math.log(0.01), -np.inf]])
    mixed = ChoiceScores(table, np.array([0, 1]), np.array([3, 2]), np.ones(2))
    metrics = evaluate_choices(report(mixed))
    assert metrics.forget.answer_probability == pytest.approx((0.5 + 0.25) / 2)
    assert metrics.forget.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert list(mixed.correct) == [True, False]


def test_below_chance_earns_nothing_and_is_flagged_where_guessing_would_not_get_there():
    at_chance, little_below = evaluate_choices(report(scores(10, 30))), evaluate_choices(report(scores(9, 31)))
    far_below = evaluate_choices(report(scores(2, 38)))
    assert at_chance.forgetting_to_chance == little_below.forgetting_to_chance == far_below.forgetting_to_chance == 0.0
    assert math.copysign(1, far_below.forgetting_to_chance) == 1
    assert [metrics.below_chance for metrics in (at_chance, little_below, far_below)] == [False, False, True]
    exact = sum(math.comb(40, k) * 0.25**k * 0.75 ** (40 - k) for k in range(3))
    assert far_below.forget.below_chance_p == pytest.approx(exact)


def test_few_questions_prove_nothing():
    metrics = evaluate_choices(report(scores(0, 5)))
    assert metrics.forgetting_to_chance == 0.0
    assert not metrics.below_chance


def test_the_binomial_bounds_questions_with_different_numbers_of_choices():
    # Exact distribution of the count of right guesses over 20 questions with two choices and 20 with five, by convolution.
    exact = np.array([1.0])
    for p in [0.5] * 20 + [0.2] * 20:
        exact = np.convolve(exact, [1 - p, p])
    for right in range(13):
        table = np.full((40, 5), -2.0)
        table[:right, 0], table[right:, 1] = -1.0, -1.0
        table[:20, 2:] = -np.inf
        mixed = ChoiceScores(table, np.zeros(40, dtype=np.int64), np.array([2] * 20 + [5] * 20), np.ones(40))
        forget = evaluate_choices(report(mixed)).forget
        assert forget.chance == pytest.approx(0.35)
        assert forget.below_chance_p >= exact[: right + 1].sum()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    broken = scores(3, 3)
    broken.log_likelihood[4, 2] = value
    with pytest.raises(UserError, match=r"set 'forget', question 4: the log-likelihood of choice 2 is"):
        evaluate_choices(report(broken))
    with pytest.raises(UserError, match="not finite"):
        write_choice_log(report(broken), "nowhere.json")


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_questions_whose_logits_overflowed_count_against_the_model_alone(value):
    forget, utility = scores(3, 5), scores(6, 2, choices=2)
    forget.log_likelihood[[0, 6], [2, 0]] = value
    utility.log_likelihood[[1, 7], [1, 1]] = value
    broken = report(forget, utility)
    bounded = broken.without_overflow()
    assert bounded.is_finite and not broken.is_finite
    assert list(bounded.sets["forget"].correct) == [True] * 3 + [False] * 3 + [True, False]
    assert list(bounded.sets["utility"].correct) == [True, False, *[True] * 4, False, False]
    assert list(np.flatnonzero(bounded.sets["forget"].overflowed)) == [0, 6]
    assert choice_collapse_reason(bounded) == (
        "logits that are not finite for 25% of forget; logits that are not finite for 25% of utility"
    )
    rest = [1, 2, 3, 4, 5, 7]
    assert np.array_equal(bounded.sets["forget"].log_likelihood[rest], forget.log_likelihood[rest])


def test_choices_that_a_question_has_not_are_no_overflow():
    table = np.array([[-1.0, -2.0, -3.0], [-0.1, -0.25, -np.inf]])
    sound = report(ChoiceScores(table, np.array([2, 0]), np.array([3, 2]), np.array([0.5, 0.7])))
    assert sound.without_overflow() is sound
    assert choice_collapse_reason(sound) is None


def test_results_without_the_spread_of_logits_are_read_as_they_were_written(tmp_path):
    forget = scores(2, 2)
    forget.logit_spread[0] = np.nan
    before = report(forget).without_overflow()
    assert before.sets["forget"].logit_spread is None
    write_choice_log(before, tmp_path / "log.json")
    assert read_choice_log(tmp_path / "log.json").sets["forget"].logit_spread is None


def test_a_missing_or_empty_set_is_refused():
    with pytest.raises(UserError, match=r"multiple-choice set 'utility' has no scores; there are: forget"):
        evaluate_choices(ChoiceReport({"forget": scores(1, 1)}))
    with pytest.raises(UserError, match="set 'forget' has no scores"):
        evaluate_choices(report(scores(0, 0)))


def test_results_are_read_as_they_were_written(tmp_path):
    table = np.array([[-1.0, -2.0, -3.0], [-0.1, -0.25, -np.inf]])
    before = report(
        ChoiceScores(table, np.array([2, 0]), np.array([3, 2]), np.array([0.5, 0.7]), "abc"), scores(3, 1, item_hash=None)
    )
    path = tmp_path / "new" / "log.json"
    write_choice_log(before, path, {"model": "m"})
    after = read_choice_log(path)
    assert (after.logit_scale, dict(after.seconds)) == (2.5, {"letters": 0.5})
    for name, expected in before.sets.items():
        found = after.sets[name]
        assert np.array_equal(found.log_likelihood, expected.log_likelihood)
        assert np.array_equal(found.answers, expected.answers)
        assert np.array_equal(found.choices, expected.choices)
        assert np.array_equal(found.logit_spread, expected.logit_spread)
        assert found.item_hash == expected.item_hash
    content = json.loads(path.read_text())
    assert content["definition"] == "letters"
    assert content["sets"]["forget"]["correct"] == [False, True]
    assert content["metadata"] == {"model": "m"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("sets"), "sets is missing"),
        (lambda c: c.update(sets=[1]), "sets is missing"),
        (lambda c: c["sets"]["utility"]["logit_spread"].pop(), "sets/utility/logit_spread is not a list of 8 finite numbers"),
        (lambda c: c.update(seconds=[]), "seconds is no object"),
        (lambda c: c["sets"].update(forget=3), "sets/forget is no object"),
        (lambda c: c["sets"]["forget"].pop("log_likelihood"), "sets/forget/log_likelihood is missing"),
        (lambda c: c["sets"]["forget"]["log_likelihood"].__setitem__(1, [-1.0]), "log_likelihood/1 is not a list"),
        (lambda c: c["sets"]["forget"]["log_likelihood"].__setitem__(1, [-1.0, True]), "log_likelihood/1 is not a list"),
        (lambda c: c["sets"]["forget"]["answers"].pop(), "sets/forget/answers is not a list of 4 indexes"),
        (lambda c: c["sets"]["forget"]["answers"].__setitem__(2, 4), "answers/2 is 4, expected an index from 0 to 3"),
        (lambda c: c["sets"]["utility"].update(item_hash=7), "sets/utility/item_hash is 7"),
    ],
)
def test_damaged_results(tmp_path, change, message):
    path = tmp_path / "log.json"
    write_choice_log(report(scores(2, 2)), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"log\.json: .*{message}.*uipe score"):
        read_choice_log(path)


def test_results_that_are_no_json_or_not_there(tmp_path):
    path = tmp_path / "log.json"
    with pytest.raises(UserError, match=r"log\.json: cannot be read"):
        read_choice_log(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"log\.json: not JSON"):
        read_choice_log(path)
    with pytest.raises(UserError, match=r"cannot write .*give a file in a writable folder"):
        write_choice_log(report(scores(1, 1)), path / "below" / "a.json")


def test_some_questions_of_a_report_are_a_report():
    whole = report(scores(30, 10), scores(9, 11, choices=2))
    part = whole.take({"forget": (0, 1, 39), "utility": (5,)}, {"forget": "some"})
    assert evaluate_choices(part).forget.accuracy == pytest.approx(2 / 3)
    assert (part.sets["forget"].item_hash, part.sets["utility"].item_hash) == ("some", None)
    arrays = part.arrays()
    assert arrays["forget/log_likelihood"].shape == (3, 4)
    assert list(arrays["forget/correct"]) == [True, True, False]
    assert whole.logit_scale == part.logit_scale == 2.5
