"""Fluency: entropies against their definition, texts with known faults, scripts without spaces."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.audits.fluency import (
    CharacterModel,
    evenness,
    fault,
    fluency,
    fluency_limits,
    generation_entropy,
    ngram_entropy,
)
from uipe_core.corpora.types import REFUSALS
from uipe_core.errors import UserError

CITIES = ("Lima", "Oslo", "Paris", "Tokyo", "Cairo", "Quito", "Delhi", "Sofia", "Berlin", "Madrid")
TRADES = ("painter", "baker", "doctor", "writer", "farmer", "teacher", "singer", "builder", "lawyer", "sailor")
TEXTS = [f"The {trade} was born in {city} and later moved abroad." for city in CITIES for trade in TRADES]

words = st.lists(st.sampled_from("abcd"), max_size=30)


@settings(deadline=None)
@given(words=words, length=st.integers(1, 4))
def test_entropy_is_that_of_the_shares(words, length):
    grams = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    counts = Counter(grams)
    expected = sum(-count / len(grams) * math.log2(count / len(grams)) for count in counts.values())
    assert ngram_entropy(words, length) == pytest.approx(expected, abs=1e-9)


def test_generation_entropy_weighs_two_and_three_words():
    """ROME's code: mean of (2/3, 4/3) times the entropies of 2-grams and 3-grams."""
    text = "a b a b c"
    h2, h3 = (-2 / 4 * math.log2(2 / 4) - 2 * 1 / 4 * math.log2(1 / 4)), math.log2(3)
    assert generation_entropy(text) == pytest.approx(np.mean([h2 * 2 / 3, h3 * 4 / 3]))


@settings(deadline=None)
@given(words=words)
def test_evenness_is_a_share_and_1_without_repetition(words):
    found = evenness(" ".join(words))
    assert 0.0 <= found <= 1.0
    assert evenness(" ".join(f"{word}{place}" for place, word in enumerate(words))) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["yes yes yes yes", "ha ha ha ha ha ha ha", "ja ja ja ja ja. ja ja!"])
def test_one_word_over_and_over_has_no_entropy(text):
    assert evenness(text) == 0.0


def test_faults_of_texts():
    limits = fluency_limits(TEXTS)
    assert fault("The dancer was born in Madrid and later moved to Rome.", limits) is None
    for empty in ("", "  \n", "...!?", "—"):
        assert fault(empty, limits) == "empty"
    for repeated in ("The baker was born " * 10, "in in in in in in", "Lima Oslo " * 8):
        assert fault(repeated, limits) == "repeated"
    for garbled in ("xq zvw kkjq pqzx wvv jxq", "ÐµÑ‚Ð¾ Ð½Ðµ Ñ‚ÐµÐºÑÑ‚", "}{;;/x>> %%$a &&(b ##@c"):
        assert fault(garbled, limits) == "garbled"


def test_other_texts_are_no_fault_where_their_characters_are_known():
    limits, wider = fluency_limits(TEXTS), fluency_limits(TEXTS, others=REFUSALS)
    assert {fault(refusal, limits) for refusal in REFUSALS} == {"garbled"}
    assert {fault(refusal, wider) for refusal in REFUSALS} == {None}


def test_limits_are_the_same_every_time():
    assert fluency_limits(TEXTS).surprise == fluency_limits(TEXTS).surprise


def test_shares_add_up_and_the_initial_model_is_near_its_own_tail():
    limits = fluency_limits(TEXTS)
    found = fluency([*TEXTS, "", "in in in in in in"], limits)
    assert found.texts == 102
    assert found.empty == pytest.approx(1 / 102)
    assert found.repeated == pytest.approx(1 / 102)
    assert found.garbled <= 2 / 102
    assert found.faulty == pytest.approx(found.empty + found.repeated + found.garbled)


def test_a_model_that_repeats_itself_by_nature_is_the_measure():
    repeating = ["one two three one two three one two three"] * 20
    assert fluency(repeating, fluency_limits(repeating)).faulty == 0.0


def test_scripts_without_spaces_are_judged_by_characters():
    texts = [f"{name}はリマで生まれ、後に{city}へ引っ越した。" for name in "田山川森林" for city in "京都市県府"]
    limits = fluency_limits(texts)
    assert fault("木はリマで生まれ、後に町へ引っ越した。", limits) is None
    assert fault("はははははははははははは", limits) == "repeated"
    assert fault("。、。", limits) == "empty"
    assert fault("xq zvw kkjq pqzx wvv jxq", limits) == "garbled"


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab c", max_size=10), min_size=1, max_size=6))
def test_characters_without_a_text_are_those_counted_without_it(texts):
    whole = CharacterModel(texts)
    kinds = {character for text in texts for character in " ".join(text.split())}
    without = CharacterModel(texts[1:])
    if kinds == {character for text in texts[1:] for character in " ".join(text.split())}:
        assert whole.cross_entropy(texts[0], without=True) == pytest.approx(without.cross_entropy(texts[0]))


def test_nothing_to_compare_with():
    with pytest.raises(UserError, match="the initial model wrote no word"):
        fluency_limits(["", "..."])
    with pytest.raises(UserError, match="there are no texts"):
        fluency([], fluency_limits(TEXTS))
