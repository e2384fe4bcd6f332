"""Other ways to ask: which prompts they make, and that a model that knows the answer gives it away."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.audits.prompts import BEGINNING, SMALL_TALK, WAYS, answers, ask, choose_shots, reverse_answers
from uipe_core.audits.texts import judge
from uipe_core.corpora.types import Item
from uipe_core.errors import UserError
from uipe_core.metrics.answers import contains_answer, rouge_recall
from uipe_core.models.prompts import PromptFormat
from uipe_core.scoring.batch_sizes import BatchSize


@pytest.fixture
def plain_prompts(load_tiny):
    return PromptFormat(load_tiny().tokenizer, "Q: {question} A:")


def test_every_way_has_the_question_and_none_the_answer(load_tiny, world):
    loaded = load_tiny()
    items = world.sets["forget"][:3]
    shots = choose_shots(world.sets["retain"])
    usual = [loaded.prompts.item_prompt_ids(item) for item in items]
    for way in WAYS:
        prompts = ask(loaded.prompts, items, way, shots)
        assert len(prompts) == len(items)
        assert not any(map(list.__eq__, prompts, usual)), way
        for item, ids in zip(items, prompts, strict=True):
            text = loaded.tokenizer.decode(ids)
            # The tiny tokenizer knows no words but those of its corpus.
            assert contains_answer(loaded.tokenizer.decode(loaded.tokenizer(item.question)["input_ids"]), text)
            assert not contains_answer(item.answer, text)


def test_a_begun_prompt_ends_with_the_beginning(plain_prompts, world):
    item = world.sets["forget"][0]
    (ids,) = ask(plain_prompts, [item], "begun")
    start = plain_prompts.item_prompt_ids(item)
    assert ids[: len(start)] == start
    assert ids[len(start) :] == plain_prompts.tokenizer(BEGINNING, add_special_tokens=False)["input_ids"]


def test_shots_and_small_talk_stand_before_the_question(plain_prompts, world):
    item = world.sets["forget"][0]
    shots = choose_shots(world.sets["retain"], 2)
    for way, turns in (("few_shot", shots), ("conversation", SMALL_TALK)):
        expected = "".join(f"Q: {question} A:{answer}\n\n" for question, answer in turns) + f"Q: {item.question} A:"
        assert ask(plain_prompts, [item], way, shots) == [plain_prompts.tokenizer(expected)["input_ids"]]


def test_shots_are_of_the_items_given_and_the_same_every_time(world):
    retain = world.sets["retain"]
    shots = choose_shots(retain, 5, seed=1)
    assert shots == choose_shots(retain, 5, seed=1)
    assert len(set(shots)) == 5
    assert set(shots) <= {(item.question, item.answer) for item in retain}
    assert choose_shots([Item("a", "b", plain=True)]) == []


def test_what_cannot_be_asked_is_said(load_tiny, world):
    prompts = load_tiny().prompts
    items = world.sets["forget"][:1]
    with pytest.raises(UserError, match=r"'fewshot' is unknown; .* Did you mean 'few_shot'"):
        ask(prompts, items, "fewshot")
    with pytest.raises(UserError, match="needs questions with answers of the retain set"):
        ask(prompts, items, "few_shot")
    with pytest.raises(UserError, match="plain texts have no question"):
        ask(prompts, [Item("a", "b", plain=True)], "please")


def test_a_model_that_knows_gives_its_answers_away(load_tiny, world):
    loaded = load_tiny()
    items = world.sets["forget"]
    found = answers(loaded, items, ["begun", "conversation"], 16)
    assert len(found) == len(items)
    assert {len(texts) for texts in found} == {2}
    scores = judge([item.answer for item in items], found)
    assert 0.3 < scores.mean_highest_recall <= 1.0


def test_texts_do_not_depend_on_the_batch(load_tiny, world):
    loaded = load_tiny()
    items = world.sets["forget"][:4]
    ways, shots = list(WAYS), choose_shots(world.sets["retain"])
    expected = answers(loaded, items, ways, 8, shots, BatchSize(1))
    assert answers(loaded, items, ways, 8, shots) == expected
    assert [text[0] for text in expected] == [text[0] for text in answers(loaded, items, ["begun"], 8)]


def test_scores_are_those_of_each_text():
    gold = ["She was born in Lima.", "木村"]
    texts = [["In Oslo.", "I think she was born in LIMA!"], ["木村です", "川村"]]
    scores = judge(gold, texts, unicode=True)
    expected = [[rouge_recall(answer, text, True)[0] for text in own] for answer, own in zip(gold, texts, strict=True)]
    np.testing.assert_array_equal(scores.recall, expected)
    np.testing.assert_array_equal(scores.contained, [[False, True], [True, False]])
    np.testing.assert_array_equal(scores.highest_recall, [1.0, 1.0])
    assert scores.contained_share == 1.0


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("Lima", "In Lima, Peru.", True),
        ("Lima", "Limassol", False),
        ("born in Lima", "born in, LIMA", True),
        ("born in Lima", "born Lima in", False),
        ("+", "1 + 1", True),
        ("", "anything", False),
        ("  ", "any thing  ", False),
        ("Straße", "STRASSE 1", True),
        ("a b", "a", False),
    ],
)
def test_an_answer_is_contained_word_for_word(gold, text, expected):
    assert contains_answer(gold, text) is expected


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)


@settings(deadline=None)
@given(gold=words.filter(bool), before=words, after=words)
def test_an_answer_between_other_words_is_contained(gold, before, after):
    text = f"{before} {gold} {after}"
    assert contains_answer(gold, text)
    assert contains_answer(gold, text.upper())
    assert rouge_recall(gold, text, True)[0] == pytest.approx(1.0)


def test_no_texts_are_said():
    with pytest.raises(UserError, match="there are no texts"):
        judge([], [])
    with pytest.raises(UserError, match="there are no texts"):
        judge(["a"], [[]])


def test_questions_are_asked_the_other_way_round_where_the_corpus_has_them(load_tiny, world):
    items = world.sets["forget"]
    loaded = load_tiny()
    gold, texts = reverse_answers(loaded, [*items, replace(items[0], reverse=None)], 8)
    assert len(gold) == len(texts) == len(items)
    assert items[0].reverse == ("Who" + items[0].answer.removeprefix(items[0].group).removesuffix(".") + "?", gold[0])
    assert gold == [f"{item.group}." for item in items]
    prompt = loaded.prompts.prompt_ids(items[0].reverse[0])
    tokens = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert texts[0] == [loaded.prompts.tokenizer.decode(tokens, skip_special_tokens=True)]
    assert reverse_answers(loaded, [replace(items[0], reverse=None)], 8) == ([], [])
    assert replace(items[0], reverse=None) == items[0]  # so that hashes and corpora are as they were
