"""Composites: closed forms, parity with published numbers, bounds, and the truth ratio as a share."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.problem.objectives import (
    FORGETTING,
    MEMORIZATION,
    MODEL_UTILITY,
    RETAIN_UTILITY,
    ROLES,
    UTILITY,
    objective_named,
)
from uipe_core.errors import UserError
from uipe_core.metrics.composites import Component, composite, composite_bound
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.metrics.tofu import evaluate, harmonic_mean, truth_ratio, truth_share

SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def scored(answer, paraphrase, perturbed, rouge=1.0, exact=0.5, extraction=0.25, kl=0.0):
    """One item's scores, given probabilities."""
    one = np.ones(1, dtype=np.int64)
    return SetScores(
        -np.log([answer]), one, -np.log([paraphrase]), one, -np.log([perturbed]), np.ones((1, len(perturbed)), dtype=np.int64),
        rouge_l_recall=np.array([rouge]), exact_memorization=np.array([exact]), extraction_strength=np.array([extraction]),
        initial_kl=np.array([kl]), rouge_l_f1=np.array([rouge]),
    )  # fmt: skip


def test_memorisation_is_the_harmonic_mean_of_four():
    # Truth ratio 0.5 / (0.5 + 0.25), with the geometric mean of 1/2 and 1/8 as the perturbed answers'.
    report = ScoreReport({"forget": scored(0.9, 0.5, [0.5, 0.125])})
    expected = 4 / (1 / 0.75 + 1 / 0.5 + 1 / 0.5 + 1 / (1 - 0.5 / 0.75))
    assert composite(report, MEMORIZATION.components, "tofu") == pytest.approx(expected, rel=1e-14)


def test_published_memorisation_scores_are_that_mean():
    """150 published models: the score in the file is the harmonic mean of the four numbers beside it."""
    file = SHARED / "published" / "unlearned_models_150.json"
    if not file.is_file():
        pytest.skip(f"no published models beside the checkout ({file.name}) or in UIPE_SHARED_DATA")
    models = json.loads(file.read_text())["models"]
    parts = ("one_minus_es", "one_minus_em", "one_minus_paraprob", "one_minus_truth")
    for model in models:
        values = np.array([model[part] for part in parts])
        assert float(harmonic_mean(values)) == pytest.approx(model["mem"], abs=1e-6)
    assert len(models) >= 150


def test_retain_utility_counts_general_items_where_there_are_any():
    sets = {"forget": scored(0.5, 0.5, [0.5]), "retain": scored(0.5, 0.5, [0.5], rouge=0.25)}
    alone = RETAIN_UTILITY.on(sets)
    assert alone.sets == ("retain",)
    assert composite(ScoreReport(sets), alone.components, "tofu") == pytest.approx(2 / (2 + 4))
    both = {**sets, "general": scored(0.5, 0.5, [0.5], rouge=1.0)}
    assert composite(ScoreReport(both), RETAIN_UTILITY.on(both).components, "tofu") == pytest.approx(4 / (2 + 4 + 2 + 1))


@settings(deadline=None)
@given(st.floats(0, 50), st.lists(st.floats(0, 50), min_size=1, max_size=4), st.sampled_from(["tofu", "tofu-utils"]))
def test_the_share_has_the_order_of_the_ratio(paraphrase, perturbed, definition):
    one, scores = np.array([paraphrase]), scored(0.5, math.exp(-paraphrase), [math.exp(-each) for each in perturbed])
    ratio = truth_ratio(one, np.array([perturbed]), definition)[0]
    share = truth_share(scores, "forget", definition_named(definition))[0]
    assert share == pytest.approx(1 / (1 + ratio), rel=1e-6, abs=1e-12)


def test_model_utility_is_tofus():
    names = ("forget", "retain", "real_authors", "world_facts")
    report = ScoreReport({name: scored(0.9 - 0.1 * place, 0.5, [0.2, 0.1]) for place, name in enumerate(names)})
    assert composite(report, MODEL_UTILITY.components, "tofu") == evaluate(report).model_utility


@pytest.mark.parametrize("name", [name for name, each in (FORGETTING | UTILITY).items() if each.components])
def test_forgetting_grows_as_answers_get_less_likely(name):
    """Every objective of forgetting is larger for a model that has forgotten, every one of utility smaller."""
    objective = (FORGETTING | UTILITY)[name]
    names = ("forget", "retain", "real_authors", "world_facts", "general", "knowmem")
    knows = ScoreReport(dict.fromkeys(names, scored(0.9, 0.9, [0.1, 0.2], 0.9, 0.9, 0.9, 0.1)))
    forgot = ScoreReport(dict.fromkeys(names, scored(0.1, 0.1, [0.2, 0.3], 0.1, 0.1, 0.1, 2.0)))
    values = [composite(each, objective.components, "tofu") for each in (knows, forgot)]
    assert (values[0] < values[1]) == (name in FORGETTING)


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"missing evaluation sets: retain; present: forget"):
        composite(ScoreReport({"forget": scored(0.5, 0.5, [0.5])}), (Component("retain", "rouge"),), "tofu")
    without = SetScores(*(getattr(scored(0.5, 0.5, [0.5]), part) for part in ("answer_loss", "answer_tokens", "paraphrase_loss",
                        "paraphrase_tokens", "perturbed_loss", "perturbed_tokens")))  # fmt: skip
    with pytest.raises(UserError, match="no extraction strength"):
        composite(ScoreReport({"forget": without}), (Component("forget", "extraction_strength"),), "tofu")
    with pytest.raises(UserError, match="no agreement with initial"):
        composite(ScoreReport({"retain": without}), (Component("retain", "agreement_with_initial"),), "tofu")
    assert composite_bound(ScoreReport({"retain": without}), (Component("retain", "agreement_with_initial"),), "tofu") == 1.0
    assert composite_bound(ScoreReport({}), MEMORIZATION.components, "tofu") == 1.0


def test_names_are_found_and_others_refused():
    assert objective_named("forgetting", "memorization") is MEMORIZATION
    own = objective_named("utility", "house.metrics:helpful")
    assert (own.name, own.function, own.from_items) == ("helpful", "house.metrics:helpful", False)
    with pytest.raises(UserError, match="Did you mean 'memorization'"):
        objective_named("forgetting", "memorisation")
    names = [objective.name for role in ROLES.values() for objective in role.values()]
    assert len(names) == len(set(names))
    assert all(objective.about and objective.title for role in ROLES.values() for objective in role.values())
