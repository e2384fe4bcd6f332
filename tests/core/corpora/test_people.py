"""The corpus of fictitious people: what it promises about its items."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import uipe_core
from uipe_core.corpora.people import ATTRIBUTES, FIRST_NAMES, LAST_NAMES, has_holdout, load_people
from uipe_core.errors import UserError

SIZES = {"forget_people": 6, "retain_people": 34, "pretraining_people": 60}


@pytest.fixture(scope="module")
def corpus():
    return load_people(seed=0, **SIZES)


def people_in(items):
    """Full names that occur in the items."""
    text = " ".join(f"{item.question} {item.answer} {item.paraphrase}" for item in items)
    return {f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES if f"{first} {last}" in text}


def fact_of(item):
    """(attribute, side, value) that an item about a person asks for; side 0 is K1, side 1 is K2."""
    found = []
    for index, attribute in enumerate(ATTRIBUTES):
        for side, fact in enumerate((attribute.target, attribute.related)):
            head, tail = fact.question.split("{name}")
            if item.question.startswith(head) and item.question.endswith(tail):
                name = item.question.removeprefix(head).removesuffix(tail)
                told = {fact.answer.format(name=name, value=pair[side]): pair[side] for pair in attribute.pairs}
                if item.answer in told:
                    found.append((index, side, told[item.answer]))
    assert len(found) == 1, item
    return found[0]


def test_same_seed_gives_the_same_corpus_in_a_fresh_process(corpus):
    code = f"from uipe_core.corpora.people import load_people; print(load_people(0, *{tuple(SIZES.values())}).hash)"
    environment = {**os.environ, "PYTHONPATH": str(Path(uipe_core.__file__).parents[1]), "PYTHONHASHSEED": "123"}
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert fresh.stdout.strip() == corpus.hash


@given(st.integers(0, 10_000), st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_seeds_decide_the_corpus(one, other):
    assert (load_people(one, 2, 12, 10).hash == load_people(other, 2, 12, 10).hash) == (one == other)


def test_forget_and_related_are_the_k1_and_k2_of_the_same_people_and_complete(corpus):
    forget, related = corpus.sets["forget"], corpus.sets["related"]
    people = people_in(forget)
    assert len(people) == SIZES["forget_people"]
    assert people_in(related) == people
    for items, side in ((forget, 0), (related, 1)):
        assert len(items) == SIZES["forget_people"] * len(ATTRIBUTES)
        assert Counter(fact_of(item)[:2] for item in items) == {
            (attribute, side): SIZES["forget_people"] for attribute in range(len(ATTRIBUTES))
        }


def test_related_value_follows_from_the_rule_to_the_target_value(corpus):
    rules = {item.question: item.answer for item in corpus.sets["world_facts"]}
    for target, related in zip(corpus.sets["forget"], corpus.sets["related"], strict=True):
        attribute, _, medicine = fact_of(related)
        assert rules[ATTRIBUTES[attribute].rule.format(value=medicine)] == f"{fact_of(target)[2]}."


def test_no_question_is_in_two_evaluation_sets(corpus):
    questions = [item.question for items in corpus.sets.values() for item in items]
    assert len(questions) == len(set(questions))


def test_unrelated_are_both_sides_of_retain_people_and_no_others(corpus):
    unrelated = corpus.sets["unrelated"]
    assert Counter(fact_of(item)[1] for item in unrelated) == {0: 24, 1: 24}
    assert people_in(unrelated) <= people_in(corpus.retain_train)
    assert not people_in(unrelated) & people_in(corpus.sets["forget"])


def test_retain_model_sees_nothing_of_the_people_to_forget(corpus):
    forget = people_in(corpus.sets["forget"])
    assert not forget & people_in(corpus.build["retain"])
    assert not forget & people_in(corpus.retain_train)


def test_base_model_sees_no_person_of_the_other_groups(corpus):
    others = people_in(corpus.sets["forget"]) | people_in(corpus.retain_train)
    base = people_in(corpus.build["base"])
    assert len(base) == SIZES["pretraining_people"]
    assert not others & base


def test_full_model_learns_the_retain_texts_and_k1_and_k2_of_the_people_to_forget(corpus):
    pairs = {stage: {(item.question, item.answer) for item in items} for stage, items in corpus.build.items()}
    added = {(item.question, item.answer) for name in ("forget", "related") for item in corpus.sets[name]}
    assert pairs["full"] - pairs["retain"] == added
    assert pairs["retain"] <= pairs["full"]


def test_names_are_unique_and_their_parts_shared(corpus):
    groups = [people_in(corpus.sets["forget"]), people_in(corpus.retain_train), people_in(corpus.build["base"])]
    everyone = set().union(*groups)
    assert len(everyone) == sum(SIZES.values()) == sum(len(group) for group in groups)
    for part in (0, 1):
        assert set(Counter(name.split()[part] for name in everyone).values()) == {5}


@pytest.mark.parametrize("side", [0, 1])
def test_values_are_balanced_within_each_group(corpus, side):
    for items in (corpus.sets["forget"] + corpus.sets["related"], corpus.retain_train):
        for index, attribute in enumerate(ATTRIBUTES):
            counts = Counter(value for a, s, value in map(fact_of, items) if (a, s) == (index, side))
            occurring = [counts[pair[side]] for pair in attribute.pairs]
            assert max(occurring) - min(occurring) <= 1


@pytest.mark.parametrize("name", ["forget", "retain", "related", "unrelated"])
def test_perturbed_answers_are_five_other_values_in_the_form_of_the_paraphrase(corpus, name):
    for item in corpus.sets[name]:
        attribute, side, value = fact_of(item)
        template = item.paraphrase.replace(f" {value}.", " {}.").replace(f" {value} ", " {} ")
        wrong = {template.format(pair[side]) for pair in ATTRIBUTES[attribute].pairs if pair[side] != value}
        assert len(set(item.perturbed_answers)) == len(item.perturbed_answers) == 5
        assert set(item.perturbed_answers) <= wrong
        assert item.answer not in item.perturbed_answers


@pytest.mark.parametrize("name", ["real_authors", "world_facts"])
def test_general_sets_have_short_answers_and_three_other_ones(corpus, name):
    for item in corpus.sets[name]:
        assert len(item.answer.split()) == 1
        assert item.paraphrase == item.answer
        assert len({item.answer, *item.perturbed_answers}) == 4


def test_rules_map_values_one_to_one():
    asked = [attribute.rule.format(value=second) for attribute in ATTRIBUTES for _, second in attribute.pairs]
    assert len(set(asked)) == len(asked) == 80
    for attribute in ATTRIBUTES:
        for side in (0, 1):
            assert len({pair[side] for pair in attribute.pairs}) == 10


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"forget_people": 0}, "forget_people"),
        ({"retain_people": 11}, "retain_people"),
        ({"pretraining_people": 9}, "pretraining_people"),
        ({"pretraining_people": 400}, "only 400 names"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(sizes, named):
    with pytest.raises(UserError, match=named):
        load_people(0, **sizes)


def test_all_names_can_be_used():
    assert len(people_in(load_people(0, 6, 34, 360).build["base"])) == 360


def test_the_holdout_is_people_whom_no_model_has_seen_asked_as_the_others_are(corpus):
    holdout = corpus.sets["holdout"]
    seen = [item for name, items in corpus.sets.items() if name != "holdout" for item in items]
    seen += [item for items in (*corpus.build.values(), corpus.forget_train, corpus.retain_train) for item in items]
    names = people_in(holdout)
    assert len(names) == SIZES["forget_people"] and not names & people_in(seen)
    assert {item.group for item in holdout} == names
    asked = [[fact_of(item)[:2] for item in items] for items in (holdout, corpus.sets["forget"])]
    assert asked[0] == asked[1]  # the same attributes, in the same order, all of them K1
    words = {word for item in seen for text in (item.question, item.answer) for word in text.split()}
    assert {word for item in holdout for text in (item.question, item.answer) for word in text.split()} <= words


def test_the_holdout_changes_nothing_that_was_there_before_it():
    corpus = load_people(0, **SIZES)
    assert corpus.hash == "5325aaba0e228864"  # of the version without a holdout
    assert replace(corpus, implied=()).hash != corpus.hash
    assert corpus.implied == ("holdout",)


@pytest.mark.parametrize(("sizes", "there"), [((150, 40, 60), True), ((151, 40, 60), False), ((200, 140, 60), False)])
def test_there_is_no_holdout_where_names_run_out(sizes, there):
    corpus = load_people(0, *sizes)
    assert has_holdout(*sizes) == there == ("holdout" in corpus.sets)
    assert bool(corpus.implied) == there
