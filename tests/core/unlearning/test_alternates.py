"""Alternate answers: sampled from the initial model, given in files, drawn for every epoch."""

import json
from dataclasses import replace

import pytest

from uipe_core.corpora.types import Item
from uipe_core.errors import UserError
from uipe_core.unlearning import alternates
from uipe_core.unlearning.alternates import draw_alternates, given_alternates, is_alternate, sample_alternates
from uipe_core.unlearning.training import UnlearningConfig, train_base_run

ITEMS = (Item("Where does Ann live?", "In Rome."), Item("Where does Bob live?", "In Oslo."))


@pytest.fixture
def write(tmp_path):
    def rows(*content):
        path = tmp_path / "alternates.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(path)

    return rows


@pytest.mark.parametrize("text", ["", "  ", "In Rome.", " in  rome", "IN ROME!"])
def test_empty_texts_and_the_answer_are_no_alternates(text):
    assert not is_alternate(text, "In Rome.")
    assert is_alternate("In Lima.", "In Rome.")


def test_given_alternates_belong_to_their_items(write):
    ann, bob = ITEMS
    path = write(
        {"question": bob.question, "answer": bob.answer, "alternate": "In Lima."},
        {"question": ann.question, "alternate": ["In Bonn.", "In Kyiv."], "more": 1},
        {"question": bob.question, "answer": bob.answer, "alternate": "In Nice."},
        {"question": "Another?", "alternate": "Yes."},
    )
    assert given_alternates(path, ITEMS) == (("In Bonn.", "In Kyiv."), ("In Lima.", "In Nice."))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": ITEMS[0].question, "alternate": "In Bonn."}], "no alternate of the forget item 'Where does Bob"),
        ([{"question": item.question, "alternate": " "} for item in ITEMS], "'Where does Ann live\\?' is empty; give another"),
        ([{"question": item.question, "alternate": "in oslo"} for item in ITEMS], "Bob live\\?' is the answer itself"),
        ([{"question": ITEMS[0].question, "alternate": 3}], "line 1: alternate must be a text or a list of texts"),
        ([{"question": ITEMS[0].question}], "line 1: alternate must be"),
        ([{"quest": "x", "alternate": "y"}], "field 'question' is missing"),
    ],
)
def test_what_is_wrong_with_given_alternates_is_said(rows, said, write):
    with pytest.raises(UserError, match=said):
        given_alternates(write(*rows), ITEMS)


def test_alternates_are_drawn_by_seed_and_epoch():
    some = tuple(tuple(f"{item} {number}" for number in range(5)) for item in range(40))
    first = draw_alternates(some, 0, 1)
    assert first == draw_alternates(some, 0, 1)
    assert first not in (draw_alternates(some, 0, 2), draw_alternates(some, 1, 1))
    assert all(text in own for text, own in zip(first, some, strict=True))


def test_sampled_alternates_are_answers_of_the_model_and_the_same_every_time(load_tiny, world):
    items = world.forget_train[:4]
    found = sample_alternates(load_tiny(), items)
    assert found == sample_alternates(load_tiny(), items)
    assert len(found) == 4
    for item, own in zip(items, found, strict=True):
        assert 1 <= len(own) == len(set(own)) <= alternates.COUNT
        assert all(is_alternate(text, item.answer) for text in own)


@pytest.mark.parametrize("written", ["", "the answer"])
def test_items_without_an_alternate_are_named(written, load_tiny, world, monkeypatch):
    items = world.forget_train[:3]

    def samples(loaded, prompts, count, limit, *, temperature):
        texts = [[written and item.answer] * count for item in items]
        return texts[:1] if len(prompts) == 1 else [["Something else."] * count if place else texts[0] for place in range(3)]

    monkeypatch.setattr(alternates, "samples", samples)
    with pytest.raises(UserError, match=r"1 of 3 forget items have no alternate answer") as caught:
        sample_alternates(load_tiny(), items)
    assert items[0].question in str(caught.value) and "corpus.alternates" in str(caught.value)


def test_the_instruction_is_given_to_models_that_know_its_words(load_tiny, monkeypatch):
    loaded, asked = load_tiny(), []

    def samples(loaded, prompts, count, limit, *, temperature):
        asked.extend(prompts)
        return [["Something else."]] * len(prompts)

    monkeypatch.setattr(alternates, "samples", samples)
    sample_alternates(loaded, ITEMS[:1])
    monkeypatch.setattr(alternates, "PROMPT", "{question} {answer}")
    sample_alternates(loaded, ITEMS[:1])
    assert asked[0] == loaded.prompts.prompt_ids(ITEMS[0].question)
    assert asked[1] == loaded.prompts.prompt_ids(f"{ITEMS[0].question} {ITEMS[0].answer}")


def test_alt_po_without_alternates_ends_before_training(load_tiny, world):
    steps = []
    settings = UnlearningConfig("alt_po", {}, epochs=1, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"alt_po: the corpus has alternate answers of 0 of \d+ forget items"):
        list(train_base_run(load_tiny(), world, settings, lambda *step: steps.append(step)))
    assert steps == []


def test_alternates_are_part_of_a_corpus_only_where_there_are_some(world):
    given = replace(world, alternates=(("another",),) * len(world.forget_train))
    assert given.hash != world.hash
    assert given.training_hash == world.training_hash
    assert replace(given, alternates=()).hash == world.hash
