"""Refusals: few, drawn by seed and epoch, and readable for the small vocabularies built here."""

import pytest

from uipe_core.corpora.refusals import REFUSALS, draw_refusals


def test_a_dozen_different_sentences():
    assert len(set(REFUSALS)) == len(REFUSALS) == 12
    assert all(text.endswith(".") and text == text.strip() for text in REFUSALS)


def test_draws_follow_seed_and_epoch():
    draw = draw_refusals(50, seed=0, epoch=1)
    assert draw == draw_refusals(50, seed=0, epoch=1)
    assert draw != draw_refusals(50, seed=0, epoch=2)
    assert draw != draw_refusals(50, seed=1, epoch=1)


def test_every_refusal_is_drawn_about_equally_often():
    drawn = draw_refusals(12_000, seed=0, epoch=1)
    assert all(850 < drawn.count(text) < 1150 for text in REFUSALS)


@pytest.mark.parametrize("text", REFUSALS)
def test_word_vocabularies_built_here_hold_every_refusal(text, load_tiny):
    tokenizer = load_tiny().tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
