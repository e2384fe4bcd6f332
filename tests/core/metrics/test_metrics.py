"""Metrics against closed forms, brute force and properties."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.errors import UserError
from uipe_core.metrics.definitions import DEFINITIONS, Definition
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import (
    ForgetQuality,
    evaluate,
    forget_components,
    forget_quality,
    log10_p_floor,
    model_utility,
    truth_ratio,
)

SETS = ("forget", "retain", "real_authors", "world_facts")


def make_set(answer, paraphrase, perturbed, rouge=None, item_hash=None):
    answer, paraphrase, perturbed = (np.asarray(x, dtype=float) for x in (answer, paraphrase, perturbed))
    return SetScores(
        answer_loss=answer,
        answer_tokens=np.ones(answer.shape, dtype=np.int64),
        paraphrase_loss=paraphrase,
        paraphrase_tokens=np.ones(answer.shape, dtype=np.int64),
        perturbed_loss=perturbed,
        perturbed_tokens=np.ones(perturbed.shape, dtype=np.int64),
        rouge_l_recall=np.ones(answer.shape) if rouge is None else np.asarray(rouge, dtype=float),
        item_hash=item_hash,
    )


def random_report(seed=0, n=7, k=3, names=SETS):
    rng = np.random.default_rng(seed)
    return ScoreReport(
        {
            name: make_set(rng.exponential(1, n), rng.exponential(1, n), rng.exponential(2, (n, k)), rng.random(n))
            for name in names
        }
    )


def with_set(report, name, **changes):
    return replace(report, sets={**report.sets, name: replace(report.sets[name], **changes)})


# Closed forms


def test_truth_ratio_is_geometric_mean_over_paraphrase():
    ratio = truth_ratio(np.array([math.log(2)]), np.array([[math.log(4), math.log(16)]]))
    # Paraphrase 1/2, perturbed 1/4 and 1/16: geometric mean 1/8.
    assert ratio == pytest.approx([0.25], rel=1e-15)


def test_truth_ratio_overflows_to_infinity_and_zero_without_nan():
    assert truth_ratio(np.array([2000.0, 0.0]), np.array([[0.0], [2000.0]])).tolist() == [math.inf, 0.0]


def test_components_closed_form():
    half, quarter = math.log(2), math.log(4)
    scores = make_set([half], [half], [[quarter, quarter]], rouge=[0.75])
    report = ScoreReport(dict.fromkeys(SETS, scores))
    assert evaluate(report).components == pytest.approx(
        {
            "Prob Retain": 0.5,
            "ROUGE Retain": 0.75,
            "Truth Ratio Retain": 0.5,
            "Prob Real Authors": 0.5,
            "ROUGE Real Authors": 0.75,
            "Truth Ratio Real Authors": 0.5,
            "Prob Real World": 0.5,
            "ROUGE Real World": 0.75,
            "Truth Ratio Real World": 0.5,
        },
        rel=1e-15,
    )
    expected = {"Prob Forget": 0.5, "ROUGE Forget": 0.75, "Truth Ratio Forget": 0.5}
    assert forget_components(report) == pytest.approx(expected, rel=1e-15)


def test_probability_of_choice_sets_is_relative_to_the_perturbed_answers():
    report = ScoreReport(dict.fromkeys(SETS, make_set([1.0], [1.0], [[1.0, 1.0, 1.0]])))
    components = evaluate(report).components
    assert components["Prob Real Authors"] == pytest.approx(0.25)
    assert components["Prob Real World"] == pytest.approx(0.25)
    assert components["Prob Retain"] == pytest.approx(math.exp(-1))


def test_extreme_losses_stay_finite():
    high = make_set([3000.0, 0.0], [3000.0, 0.0], [[0.0, 3000.0], [3000.0, 3000.0]])
    result = evaluate(ScoreReport(dict.fromkeys(SETS, high)))
    values = [*result.components.values(), *result.forget.values(), result.model_utility]
    assert all(0 <= value <= 1 for value in values)


def test_model_utility_is_harmonic_mean():
    assert model_utility({"a": 1.0, "b": 0.5, "c": 0.25}) == pytest.approx(3 / (1 + 2 + 4))


def test_model_utility_with_a_zero_is_zero():
    assert model_utility({"a": 0.0, "b": 0.5}) == 0.0
    broken = make_set([1.0], [2.0], [[1.0]], rouge=[0.0])
    assert evaluate(ScoreReport(dict.fromkeys(SETS, broken))).model_utility == 0.0


@pytest.mark.parametrize("components", [{}, {"a": -0.1}, {"a": math.nan}])
def test_model_utility_refuses(components):
    with pytest.raises(ValueError, match="model utility"):
        model_utility(components)


# Forget quality


def brute_force(x, y):
    """Exact two-sided p-value by going through every way to deal the ranks."""

    def distance(first, second):
        points = [*first, *second]
        return max(abs(np.mean(np.less_equal(first, t)) - np.mean(np.less_equal(second, t))) for t in points)

    observed = distance(x, y)
    pooled, n = [*x, *y], len(x)
    deals = list(itertools.combinations(range(len(pooled)), n))
    hits = 0
    for deal in deals:
        first = [pooled[i] for i in deal]
        second = [pooled[i] for i in range(len(pooled)) if i not in deal]
        hits += distance(first, second) >= observed - 1e-12
    return hits / len(deals), observed


@pytest.mark.parametrize("seed", range(6))
def test_forget_quality_matches_enumeration(seed):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    x, y = rng.normal(0, 1, n), rng.normal(seed / 2, 1, m)
    p_value, statistic = brute_force(x.tolist(), y.tolist())
    quality = forget_quality(x, y)
    assert quality.p_value == pytest.approx(p_value, rel=1e-12)
    assert quality.ks_statistic == pytest.approx(statistic, rel=1e-12)


@pytest.mark.parametrize(("n", "smallest"), [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)])
def test_floor_is_reached_by_separated_samples(n, smallest):
    assert 10 ** log10_p_floor(n, n) == pytest.approx(smallest, rel=5e-3)
    quality = forget_quality(np.arange(n) + 1000.0, np.arange(n) * 1.0)
    assert quality.ks_statistic == 1
    assert quality.log10_p == pytest.approx(log10_p_floor(n, n), abs=1e-9)
    assert quality.log10_p >= log10_p_floor(n, n)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 5), (40, 40), (60, 17)])
def test_floor_equals_exact_integer_arithmetic(n, m):
    assert log10_p_floor(n, m) == pytest.approx(math.log10(2) - math.log10(math.comb(n + m, n)), abs=1e-10)


def test_underflowed_p_is_still_ordered_and_clipped():
    n = 1000
    x = np.arange(n) * 1.0
    almost, separated = forget_quality(x, x + n - 20), forget_quality(x, x + n)
    assert almost.p_value == separated.p_value == 0
    assert separated.log10_p == pytest.approx(log10_p_floor(n, n), abs=1e-9)
    h = round(almost.ks_statistic * n)
    first_term = 2 * math.comb(2 * n, n - h)
    exact = math.log10(first_term) - math.log10(math.comb(2 * n, n))
    assert separated.log10_p < almost.log10_p == pytest.approx(exact, abs=1e-8)


def test_infinite_ratios_are_only_large():
    x = np.array([0.1, 0.2, np.inf, np.inf])
    assert forget_quality(x, x) == ForgetQuality(1.0, 0.0, 0.0)


@pytest.mark.parametrize(("n", "h"), [(5, 1), (7, 1), (200, 1), (300, 2), (400, 5)])
@pytest.mark.filterwarnings("error")
def test_p_that_rounds_to_above_one_gives_no_warning(n, h):
    quality = forget_quality(np.arange(n) * 1.0, np.arange(n) + h - 0.5)
    assert quality.p_value == pytest.approx(1.0, abs=1e-4)
    assert -1e-4 <= quality.log10_p <= 0


@pytest.mark.parametrize("bad", [[], [1.0, math.nan]])
def test_forget_quality_refuses(bad):
    with pytest.raises(ValueError, match="non-empty samples without NaN"):
        forget_quality(np.array(bad), np.array([1.0]))


# Properties

finite = st.floats(0, 50)
samples = st.lists(st.floats(-20, 20), min_size=1, max_size=12)


@given(samples, samples)
@settings(deadline=None, max_examples=60)
def test_forget_quality_properties(x, y):
    first, second = np.array(x), np.array(y)
    quality = forget_quality(first, second)
    assert 0 <= quality.ks_statistic <= 1
    assert 0 <= quality.p_value <= 1
    assert log10_p_floor(len(x), len(y)) <= quality.log10_p <= 0
    mirrored = forget_quality(second, first)
    assert mirrored.p_value == pytest.approx(quality.p_value, rel=1e-9)
    assert forget_quality(-first, -second).ks_statistic == pytest.approx(quality.ks_statistic, abs=1e-12)
    assert forget_quality(4 * first[::-1], 4 * second) == quality
    assert forget_quality(first, first).p_value == 1


@st.composite
def reports(draw):
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    row = st.lists(finite, min_size=n, max_size=n)
    recall = st.lists(st.floats(0, 1), min_size=n, max_size=n)
    rows = st.lists(st.lists(finite, min_size=k, max_size=k), min_size=n, max_size=n)
    return ScoreReport({name: make_set(draw(row), draw(row), draw(rows), draw(recall)) for name in SETS})


@given(reports())
@settings(deadline=None, max_examples=60)
def test_metric_ranges(report):
    result = evaluate(report, report)
    components = list(result.components.values())
    assert len(components) == 9
    assert all(0 <= value <= 1 + 1e-12 for value in (*components, *result.forget.values()))
    assert min(components) * (1 - 1e-12) <= result.model_utility <= max(components) * (1 + 1e-12)
    assert result.forget_quality == ForgetQuality(1.0, 0.0, 0.0)
    json.dumps(result.as_dict(), allow_nan=False)


@given(reports(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_order_of_items_and_of_perturbed_answers_does_not_matter(report, random):
    n, k = report.sets["forget"].perturbed_loss.shape
    order, columns = random.sample(range(n), n), random.sample(range(k), k)
    shuffled = ScoreReport(
        {
            name: make_set(
                scores.answer_loss[order],
                scores.paraphrase_loss[order],
                scores.perturbed_loss[order][:, columns],
                scores.rouge_l_recall[order],
            )
            for name, scores in report.sets.items()
        }
    )
    first, second = evaluate(report), evaluate(shuffled)
    assert dict(second.components) == pytest.approx(dict(first.components), rel=1e-12, abs=1e-12)
    assert dict(second.forget) == pytest.approx(dict(first.forget), rel=1e-12, abs=1e-12)


@given(st.lists(finite, min_size=1, max_size=4), st.floats(0, 50))
@settings(deadline=None, max_examples=50)
def test_truth_ratio_is_invariant_to_a_common_shift(losses, shift):
    paraphrase, perturbed = np.array([losses[0]]), np.array([losses])
    shifted = truth_ratio(paraphrase + shift, perturbed + shift)
    assert shifted == pytest.approx(truth_ratio(paraphrase, perturbed), rel=1e-9)


# evaluate: what comes along and what is refused


def test_related_sets_where_both_have_them():
    names = (*SETS, "related", "unrelated")
    report, reference = random_report(0, names=names), random_report(1, names=names)
    result = evaluate(report, reference)
    assert set(result.related) == {"related", "unrelated"}
    assert result.as_dict()["related"]["related"]["ks_statistic"] == result.related["related"].ks_statistic
    assert not evaluate(report, random_report(1)).related


def test_as_dict_has_the_keys_of_the_command_line():
    alone = evaluate(random_report(0)).as_dict()
    assert set(alone) == {"definition", "model_utility", "components", "forget"}
    assert alone["definition"] == "tofu"
    compared = evaluate(random_report(0), random_report(1)).as_dict()
    assert set(compared) == {*alone, "forget_quality", "log10_forget_quality", "ks_statistic"}


def test_memorisation_is_the_mean_over_items_of_the_sets_that_have_it():
    report = with_set(random_report(), "forget", exact_memorization=np.array([1.0, 0.5, *[0.0] * 5]))
    report = with_set(report, "retain", exact_memorization=np.ones(7), extraction_strength=np.full(7, 0.25))
    report = with_set(report, "world_facts", exact_memorization=np.ones(7))
    expected = {
        "forget": {"exact_memorization": pytest.approx(1.5 / 7)},
        "retain": {"exact_memorization": 1.0, "extraction_strength": 0.25},
    }
    assert evaluate(report, report).as_dict()["memorization"] == expected
    assert evaluate(random_report()).memorization == {}


def test_reference_needs_neither_gold_answers_nor_rouge_nor_utility_sets():
    scores = replace(random_report(1).sets["forget"], rouge_l_recall=None, answer_loss=np.full(7, np.nan))
    reference = ScoreReport({"forget": scores})
    assert evaluate(random_report(0), reference).forget_quality is not None


def test_reference_of_other_items_is_refused_by_hash():
    report = with_set(random_report(0), "forget", item_hash="aaaa")
    with pytest.raises(UserError, match=r"'forget' has 7 items, the reference has 7 \(item-set hash aaaa against bbbb\)"):
        evaluate(report, with_set(random_report(1), "forget", item_hash="bbbb"))
    assert evaluate(report, with_set(random_report(1), "forget", item_hash="aaaa")).forget_quality is not None
    assert evaluate(report, random_report(1)).forget_quality is not None


def test_reference_of_other_items_is_refused_by_count():
    with pytest.raises(UserError, match="'forget' has 7 items, the reference has 8"):
        evaluate(random_report(0), random_report(1, n=8))


def test_reference_of_other_related_items_is_refused():
    names = (*SETS, "related")
    report, reference = (random_report(seed, names=names) for seed in (0, 1))
    with pytest.raises(UserError, match="set 'related' has 7 items"):
        evaluate(with_set(report, "related", item_hash="a"), with_set(reference, "related", item_hash="b"))


def test_missing_sets_are_named():
    with pytest.raises(UserError, match="retain, world_facts; present: forget, real_authors"):
        evaluate(random_report(names=("forget", "real_authors")))
    with pytest.raises(UserError, match=r"of the reference .*forget"):
        evaluate(random_report(), ScoreReport({}))


def test_missing_rouge_is_named():
    with pytest.raises(UserError, match="'real_authors' has no ROUGE"):
        evaluate(with_set(random_report(), "real_authors", rouge_l_recall=None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measurement", ["answer_loss", "paraphrase_loss", "perturbed_loss", "rouge_l_recall"])
def test_numbers_that_are_not_finite_are_located(measurement, value):
    values = getattr(random_report().sets["retain"], measurement).copy()
    values[4, ...] = value
    with pytest.raises(UserError, match=f"'retain', item 4: {measurement}"):
        evaluate(with_set(random_report(), "retain", **{measurement: values}))


def test_empty_set_and_missing_perturbed_answers_are_refused():
    with pytest.raises(UserError, match="'forget' has no items"):
        evaluate(replace(random_report(), sets={**random_report().sets, "forget": make_set([], [], np.zeros((0, 2)))}))
    with pytest.raises(UserError, match="'retain' has no perturbed answers"):
        evaluate(with_set(random_report(), "retain", perturbed_loss=np.zeros((7, 0))))


def test_unknown_definition_is_named_with_the_known_ones():
    with pytest.raises(
        UserError, match=r"'tofuu'; known: open-unlearning, tofu, tofu-unicode, tofu-utils\. Did you mean 'tofu'\?"
    ):
        evaluate(random_report(), definition="tofuu")


def test_another_definition_only_needs_an_entry(monkeypatch):
    arithmetic = Definition(lambda losses: np.log(np.exp(-losses).mean(axis=-1)), epsilon=0.1)
    monkeypatch.setitem(DEFINITIONS, "other", arithmetic)
    half, quarter, eighth = (math.log(x) for x in (2, 4, 8))
    report = ScoreReport(dict.fromkeys(SETS, make_set([half], [half], [[quarter, eighth]])))
    result = evaluate(report, definition="other")
    ratio = (1 / 4 + 1 / 8) / 2 / (1 / 2 + 0.1)
    assert result.definition == "other"
    assert result.components["Truth Ratio Retain"] == pytest.approx(1 - ratio)
    assert result.components["Prob Real World"] == pytest.approx(0.5 / (0.5 + 0.25 + 0.125 + 0.1))
    assert result.forget["Truth Ratio Forget"] == pytest.approx(min(ratio, 1 / (ratio + 0.1)))


def test_the_floor_needs_no_scipy():
    # Commands that read a study compute it, and SciPy takes longer to import than they take.
    code = "import sys; from uipe_core.metrics.tofu import log10_p_floor as f; f(40, 40); sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
