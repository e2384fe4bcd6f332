"""The three metric definitions: closed forms, collapse, and parity with numbers computed independently from real logs."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.logs.tofu import read_log
from uipe_core.metrics.definitions import DEFINITIONS, log_arithmetic_mean, log_geometric_mean
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import evaluate, truth_ratio

SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
LOGS = SHARED / "tofu_logs"
SETS = ("forget", "retain", "real_authors", "world_facts")


def set_of(answer, paraphrase, perturbed):
    answer, paraphrase, perturbed = (np.asarray(values, dtype=float) for values in (answer, paraphrase, perturbed))
    counts = np.ones(len(answer), dtype=np.int64)
    return SetScores(
        answer_loss=answer,
        answer_tokens=counts,
        paraphrase_loss=paraphrase,
        paraphrase_tokens=counts,
        perturbed_loss=perturbed,
        perturbed_tokens=np.ones(perturbed.shape, dtype=np.int64),
        rouge_l_recall=np.ones(len(answer)),
    )


def test_those_of_the_page_are_there():
    assert set(DEFINITIONS) == {"tofu", "tofu-utils", "open-unlearning", "tofu-unicode"}


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        # Paraphrase 1/2, perturbed 1/4 and 1/16: geometric mean 1/8, arithmetic mean 5/32.
        ("tofu", 1 / 4),
        ("tofu-utils", 5 / 16),
        ("open-unlearning", (1 / 8) / (1 / 2 + 1e-10)),
    ],
)
def test_truth_ratio_closed_form(definition, expected):
    perturbed = np.array([[math.log(4), math.log(16)]])
    assert truth_ratio(np.array([math.log(2)]), perturbed, definition) == pytest.approx([expected], rel=1e-14)


def test_epsilon_stands_in_every_denominator_of_open_unlearning():
    # Probabilities of the order of the epsilon itself: 1e-10 for gold and paraphrase, 4e-10 for both perturbed answers.
    scores = set_of([-math.log(1e-10)], [-math.log(1e-10)], [[-math.log(4e-10)] * 2])
    found = evaluate(ScoreReport(dict.fromkeys(SETS, scores)), definition="open-unlearning")
    ratio = 4 / (1 + 1)
    assert found.components["Prob Real World"] == pytest.approx(1 / (1 + 4 + 4 + 1), rel=1e-9)
    assert found.components["Prob Retain"] == pytest.approx(1e-10, rel=1e-9)
    assert found.components["Truth Ratio Retain"] == max(0, 1 - ratio)
    assert found.forget["Truth Ratio Forget"] == pytest.approx(1 / ratio, rel=1e-9)


def test_a_collapsed_model_shows_what_the_epsilon_does():
    """Above about 20 nats the epsilon lifts the utility truth ratio to 1, which without it says what it should."""
    broken = ScoreReport(dict.fromkeys(SETS, set_of([60.0] * 3, [60.0] * 3, [[60.0, 61.0]] * 3)))
    lifted, plain = (evaluate(broken, definition=name).components["Truth Ratio Retain"] for name in ("open-unlearning", "tofu"))
    assert lifted == pytest.approx(1.0)
    assert plain == pytest.approx(1 - math.exp(-0.5))


losses = st.lists(st.floats(0, 3000), min_size=1, max_size=5)


@given(losses)
@settings(deadline=None, max_examples=60)
def test_means_are_finite_and_ordered_in_log_space(values):
    row = np.array([values])
    low, high = log_geometric_mean(row)[0], log_arithmetic_mean(row)[0]
    assert np.isfinite([low, high]).all()
    # Arithmetic mean at least geometric mean, and at most the largest value.
    assert low <= high + 1e-9 * max(1, abs(high))
    assert high <= -min(values) + 1e-9


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_extreme_losses_stay_finite(definition):
    scores = set_of([3000.0, 0.0], [3000.0, 0.0], [[0.0, 3000.0], [3000.0, 3000.0]])
    report = ScoreReport(dict.fromkeys(SETS, scores))
    found = evaluate(report, report, definition)
    values = [*found.components.values(), *found.forget.values(), found.model_utility, found.forget_quality.p_value]
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_forget_quality_compares_geometric_ratios_in_every_definition(definition):
    """locuslab/tofu's utils.py averages probabilities for utility, but losses for forget quality."""
    # All geometric ratios are equal; the arithmetic ones of the second model are all larger.
    first = set_of([1.0] * 6, [1.0] * 6, [[2.0, 2.0]] * 6)
    second = replace(first, perturbed_loss=np.array([[0.5, 3.5]] * 6))
    model, reference = (ScoreReport({**dict.fromkeys(SETS, first), "forget": forget}) for forget in (first, second))
    found = evaluate(model, reference, definition)
    assert found.definition == definition
    assert found.forget_quality.ks_statistic == 0
    assert found.forget_quality.p_value == 1
    separated = truth_ratio(second.paraphrase_loss, second.perturbed_loss, "tofu-utils")
    assert (separated > truth_ratio(first.paraphrase_loss, first.perturbed_loss, "tofu-utils")).all()


# Parity


@pytest.fixture(scope="module")
def real():
    """The expected values and both logs, read once."""
    if not LOGS.is_dir():
        pytest.skip(f"no TOFU logs beside the checkout ({LOGS.name}) or in UIPE_SHARED_DATA")
    names = ("phi_full.json", "phi_retain90.json")
    return json.loads((LOGS / "expected.json").read_text()), {name: read_log(LOGS / name) for name in names}


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("name", ["phi_full.json", "phi_retain90.json"])
def test_parity_of_components_and_utility(real, name, definition):
    expected, logs = real
    result = evaluate(logs[name], definition=definition)
    found = {**result.components, **result.forget, "Model Utility": result.model_utility}
    # The logs hold their ROUGE already, and tofu-unicode differs from tofu only in how texts become tokens.
    of = "tofu" if definition == "tofu-unicode" else definition
    assert found == pytest.approx(expected["model_utility"][name][of], rel=1e-9)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_parity_of_forget_quality(real, definition):
    expected, logs = real
    values = expected["forget_quality"]["phi_full.json vs phi_retain90.json"]
    # The file has no values of their own for those whose forget quality is that of tofu.
    value = values["tofu" if definition in ("tofu-utils", "tofu-unicode") else definition]
    quality = evaluate(logs["phi_full.json"], logs["phi_retain90.json"], definition).forget_quality
    assert quality.p_value == pytest.approx(value["p"], rel=1e-9)
    assert quality.log10_p == pytest.approx(value["log10p"], rel=1e-9)
    assert quality.ks_statistic == pytest.approx(value["D"], rel=1e-9)
