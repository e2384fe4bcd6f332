"""Reference models that make a study pointless are found before anything is trained."""

from dataclasses import replace

import numpy as np
import pytest

from search.evaluation.inputs import check_references
from search.problem.objectives import FORGET_QUALITY, RETAIN_UTILITY
from uipe_core.errors import UserError
from uipe_core.metrics.scores import ScoreReport, SetScores

OBJECTIVES = (FORGET_QUALITY, RETAIN_UTILITY.on(("forget", "retain")))


def scores(probability, extraction=0.5, rouge=0.9, seed=0):
    """Four items answered with about this probability."""
    ones, noise = np.ones(4, dtype=np.int64), 0.01 * np.random.default_rng(seed).random(4)
    loss = -np.log(probability) + noise
    perturbed = np.stack([loss + 1, loss + 2], axis=1)
    return SetScores(
        loss, ones, loss, ones, perturbed, np.ones((4, 2), dtype=np.int64), rouge_l_recall=np.full(4, rouge),
        extraction_strength=np.full(4, extraction), exact_memorization=np.full(4, extraction),
    )  # fmt: skip


def found(initial, retain=None, kept=0.8, identities=None, rouge=0.9):
    references = {"initial": ScoreReport({"forget": initial, "retain": scores(kept, rouge=rouge)})}
    if retain is not None:
        references["retain"] = ScoreReport({"forget": retain})
    return check_references(references, identities or {"initial": "a", "retain": "b"}, OBJECTIVES, "tofu")


def test_sound_models_are_not_warned_about():
    assert found(scores(0.9), scores(0.1, seed=1)) == []
    assert found(scores(0.9)) == []


def test_nothing_to_unlearn():
    (warning,) = found(scores(0.001, extraction=0.0))
    assert "does not know the forget set (mean answer probability 0.001, extraction strength 0.000)" in warning


def test_retain_models_that_know_the_forget_set():
    (exchanged,) = found(scores(0.3), scores(0.9, seed=1))
    assert "better than the initial model (mean answer probability 0.89" in exchanged
    (as_well,) = found(scores(0.9), scores(0.88, seed=1))
    assert "nearly as well" in as_well


def test_nothing_to_keep():
    (warning,) = found(scores(0.9), kept=0.001, rouge=0.0)
    assert "the retain utility of the initial model is 0.000" in warning


def test_the_same_model_twice_is_refused():
    with pytest.raises(UserError, match=r"model\.retain: it is the initial model"):
        found(scores(0.9), scores(0.9))
    with pytest.raises(UserError, match=r"model\.retain: it is the initial model"):
        found(scores(0.9), scores(0.1, seed=1), identities={"initial": "a", "retain": "a"})


def test_logs_without_losses_of_gold_answers_are_no_ground_for_a_warning():
    log = replace(scores(0.1, seed=1), answer_loss=np.full(4, np.nan))
    assert found(scores(0.9), log) == []
