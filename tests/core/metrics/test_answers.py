"""ROUGE of the field's tokens, and of words of any script."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.metrics.answers import has_latin_word, rouge_l_f1, rouge_recall, unicode_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Красный дом, 12!", ["красный", "дом", "12"]),
        ("Straße", ["strasse"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("東京は首都", ["東", "京", "は", "首", "都"]),
        ("GPT4 在北京", ["gpt4", "在", "北", "京"]),
        ("abc北def", ["abc", "北", "def"]),
        ("מה שלומך?", ["מה", "שלומך"]),
        ("\uff21\uff22 \u0301", ["ab", "\u0301"]),
        ("?! - …", []),
    ],
)
def test_words_of_any_script(text, words):
    assert unicode_words(text) == words


@settings(deadline=None)
@given(st.text())
def test_a_text_is_remembered_whole_if_it_has_a_word(text):
    recall = rouge_recall(text, text, unicode=True)
    assert recall == ((1.0, 1.0) if unicode_words(text) else (0.0, 0.0))
    assert all(word and not word.isspace() for word in unicode_words(text))


def test_the_fields_tokens_see_nothing_in_other_scripts():
    assert rouge_recall("Красный дом", "Красный дом") == (0.0, 0.0)
    assert rouge_recall("Красный дом у реки", "синий дом у моря", unicode=True) == (0.5, 0.5)
    assert not has_latin_word("Красный дом")
    assert has_latin_word("дом 7")


def test_latin_words_count_as_before():
    assert rouge_recall("The houses are red", "a red house") == (0.25, 0.5)  # stems: house, red; in order only one
    assert rouge_l_f1("one two", "one three") == 0.5
