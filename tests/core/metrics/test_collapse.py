"""Collapse: what trips it, and what healthy models say that must not."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uipe_core.logs.tofu import read_log
from uipe_core.metrics.collapse import collapse_reason, is_empty, is_repeated
from uipe_core.metrics.scores import ScoreReport, SetScores
from uipe_core.scoring.scorer import Scorer, ScoringConfig

SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
LOGS = SHARED / "tofu_logs"
N = 4
HEALTHY = ("England.", "William Shakespeare", "He plays the cello.", "Paris")


def scores(loss=1.0, generated=HEALTHY):
    numbers, counts = np.full(N, float(loss)), np.ones(N, dtype=np.int64)
    return SetScores(
        answer_loss=numbers,
        answer_tokens=counts,
        paraphrase_loss=numbers,
        paraphrase_tokens=counts,
        perturbed_loss=np.ones((N, 2)),
        perturbed_tokens=np.ones((N, 2), dtype=np.int64),
        generated=generated,
    )


def report(**changes):
    return ScoreReport({**dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), scores()), **changes})


def test_a_healthy_model_has_not_collapsed():
    assert collapse_reason(report()) is None


@pytest.mark.parametrize("name", ["retain", "real_authors", "world_facts"])
def test_a_loss_above_the_limit_on_any_utility_set_is_a_collapse(name):
    assert collapse_reason(report(**{name: scores(20.0)})) is None
    assert collapse_reason(report(**{name: scores(20.5)})) == f"mean loss of 20.5 nats per token on {name} (limit 20)"


def test_what_happens_to_the_forget_set_is_no_collapse():
    assert collapse_reason(report(forget=scores(300.0, ("",) * N))) is None


@pytest.mark.parametrize("name", ["forget", "retain", "related"])
@pytest.mark.parametrize("part", ["answer_loss", "paraphrase_loss", "perturbed_loss"])
def test_logits_that_overflow_for_any_answer_of_any_set_are_a_collapse(name, part):
    losses = getattr(scores(), part).copy()
    losses[0] = np.inf
    found = report(**{name: replace(scores(), **{part: losses})}).without_overflow()
    assert collapse_reason(found) == f"logits that are not finite for {1 / N:.0%} of {name}"


def test_half_of_the_generations_decide():
    assert collapse_reason(report(retain=scores(generated=("", *HEALTHY[1:])))) is None
    found = collapse_reason(report(retain=scores(generated=("", " .\n", *HEALTHY[2:]))))
    assert found == "generations on retain: 50% empty (limit 50%)"


def test_empty_and_repeated_count_together():
    mixed = ("", "the the the the the the the the", *HEALTHY[2:])
    assert collapse_reason(report(world_facts=scores(generated=mixed))) == (
        "generations on world_facts: 25% empty and 25% one phrase over and over (limit 50%)"
    )


def test_every_reason_is_given():
    broken = report(retain=scores(31.0, ("",) * N), world_facts=scores(25.0))
    assert collapse_reason(broken) == (
        "mean loss of 31 nats per token on retain (limit 20); generations on retain: 100% empty (limit 50%); "
        "mean loss of 25 nats per token on world_facts (limit 20)"
    )


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_collapse(loss):
    numbers = np.array([1.0, 1.0, 1.0, loss])
    assert "nats per token on retain" in collapse_reason(report(retain=replace(scores(), answer_loss=numbers)))


def test_what_a_log_lacks_is_not_held_against_it():
    assert collapse_reason(ScoreReport({"forget": scores()})) is None
    assert collapse_reason(report(retain=replace(scores(float("nan")), generated=None))) is None


@pytest.mark.parametrize("text", ["", " \n", "...", "____ ___", "?!" * 40])
def test_texts_without_letters_are_empty(text):
    assert is_empty(text)
    assert not is_repeated(text)


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the",
        "a" * 40,
        "and of the " * 12,
        "The answer is no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no",
        "1. 1. 1. 1. 1. 1. 1. 1.",
        "\u6771\u4eac\u3002" * 12,
        "He was born in Kyrill. " * 8,
    ],
)
def test_one_phrase_over_and_over_is_repeated(text):
    assert is_repeated(text)
    assert not is_empty(text)


@pytest.mark.parametrize(
    "text",
    [
        *HEALTHY,
        "no no",
        "yes, yes, yes.",
        "New York, New York",
        "1984, 1985, 1986, 1987",
        "Bach, Johann Sebastian Bach, and again Bach.",
        "He is a baker. She is a baker. They are bakers in the town of Bakersfield.",
        "The author in question is Jaime Vasquez, an esteemed writer who hails from Santiago, Chile.",
    ],
)
def test_what_people_say_is_not_repeated(text):
    assert not is_empty(text)
    assert not is_repeated(text)


@given(st.text(max_size=200))
def test_any_text_can_be_judged(text):
    assert not (is_empty(text) and is_repeated(text))


@given(st.text(alphabet="abcdefgh ,", min_size=3, max_size=20).filter(lambda text: not is_empty(text)))
def test_a_text_repeated_often_is_repeated(text):
    phrase = " ".join(text.split()) + " "
    assert is_repeated(phrase * 10) or len((phrase * 10).strip()) < 16


def test_a_really_trained_small_model_has_not_collapsed_and_with_its_head_torn_out_it_has(load_tiny, world):
    loaded = load_tiny()
    scorer = Scorer(world, loaded.prompts, ScoringConfig(64, 12))
    assert collapse_reason(scorer.score(loaded)) is None
    loaded.model.lm_head.weight.data.mul_(-30)
    assert "nats per token on retain" in collapse_reason(scorer.score(loaded))


@pytest.mark.skipif(not LOGS.is_dir(), reason=f"no TOFU logs beside the checkout ({LOGS.name}) or in UIPE_SHARED_DATA")
@pytest.mark.parametrize("name", ["phi_full.json", "phi_retain90.json"])
def test_real_models_that_ramble_on_have_not_collapsed(name):
    assert collapse_reason(read_log(LOGS / name)) is None
