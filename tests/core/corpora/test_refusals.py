"""Refusals: few, drawn by seed and epoch, and readable for the small vocabularies built here."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from uipe_core.corpora.types import REFUSALS, draw_refusals
from uipe_core.errors import UserError
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model_inputs
from uipe_core.unlearning.loss_inputs import encode_substitutes

TINY = TinyModelConfig("word", None, 32, 1, 2, None, Stage(1, 1e-2, 16), seed=0)


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


def test_a_vocabulary_without_the_words_is_refused(world, load_tiny):
    loaded = load_tiny()
    words = loaded.tokenizer.get_vocab()
    del words["know"]
    plain = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = loaded.tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(UserError, match=r"vocabulary lacks words of the refusal 'I do not know\.'"):
        encode_substitutes(replace(loaded, tokenizer=tokenizer), world, epochs=1, seed=0, method="idk_nll")
    assert encode_substitutes(replace(loaded, tokenizer=tokenizer), world, epochs=0, seed=0, method="idk_nll") == []


def test_only_extra_texts_change_the_vocabulary_and_the_key_of_a_small_model(world):
    plain, extended = replace(TINY, extra_texts=()), replace(TINY, extra_texts=REFUSALS)
    assert "extra_texts" not in tiny_model_inputs(plain, world, "full")["config"]
    assert tiny_model_inputs(extended, world, "full")["config"]["extra_texts"] == REFUSALS
