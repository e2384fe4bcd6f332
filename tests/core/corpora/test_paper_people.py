"""The world of the paper's size: what each model learns about the people to forget, and what is unlearned."""

import pytest

from uipe_core.corpora.people import PAPER_STAGES, load_paper_people, load_people, unlearning
from uipe_core.corpora.people_facts import ATTRIBUTES, PAPER_ATTRIBUTES
from uipe_core.errors import UserError


@pytest.fixture(scope="module")
def corpus():
    return load_paper_people(0)


def pairs(items):
    return [(item.question, item.answer) for item in items]


@pytest.mark.parametrize(
    ("arguments", "content"),
    [((0,), "5325aaba0e228864"), ((1,), "c7301768e9867170"), ((0, 2, 12, 10), "9e48afaf6be42c37")],
)
def test_the_world_of_a_study_is_what_it_was_before_the_larger_one_came(arguments, content):
    assert load_people(*arguments).hash == content


def test_it_has_twelve_people_with_ten_attributes_k1_and_k2_each(corpus):
    assert {name: len(items) for name, items in corpus.sets.items()} == {
        "forget": 120,
        "related": 120,
        "retain": 60,
        "unrelated": 60,
        "real_authors": 36,
        "world_facts": 100,
    }
    assert load_paper_people(0).hash == corpus.hash != load_paper_people(1).hash


def test_attributes_are_ten_with_ten_pairs_of_values_one_to_one():
    assert PAPER_ATTRIBUTES[: len(ATTRIBUTES)] == ATTRIBUTES
    assert len(PAPER_ATTRIBUTES) == 10
    rules = [spec.rule.format(value=second) for spec in PAPER_ATTRIBUTES for _, second in spec.pairs]
    assert len(set(rules)) == len(rules) == 100
    for spec in PAPER_ATTRIBUTES:
        for side in (0, 1):
            assert len({pair[side] for pair in spec.pairs}) == len(spec.pairs) == 10
    questions = [fact.question for spec in PAPER_ATTRIBUTES for fact in (spec.target, spec.related)]
    assert len(set(questions)) == 20


def test_base_model_reads_nothing_of_the_twelve_but_every_rule(corpus):
    base = pairs(corpus.build["base"])
    asked = {question for question, _ in base}
    assert not asked & {item.question for name in ("forget", "related") for item in corpus.sets[name]}
    assert set(pairs(corpus.sets["world_facts"])) <= set(base)


def test_rule_leads_from_each_related_value_to_its_target_value(corpus):
    rules = dict(pairs(corpus.sets["world_facts"]))
    asked = [spec.rule for spec in PAPER_ATTRIBUTES] * 12
    for rule, target, related in zip(asked, corpus.sets["forget"], corpus.sets["related"], strict=True):
        medicine = related.answer.removesuffix(".").split()[-1]
        assert f"{target.answer.removesuffix('.').split()[-1]}." == rules[rule.format(value=medicine)]


@pytest.mark.parametrize("stage", PAPER_STAGES)
def test_stage_adds_to_the_retain_texts_what_it_says_and_nothing_else(corpus, stage):
    added = [pair for name in PAPER_STAGES[stage] for pair in pairs(corpus.sets[name])]
    assert pairs(corpus.build[stage]) == added + pairs(corpus.build["retain"])


@pytest.mark.parametrize("parts", [("forget",), ("forget", "related")])
def test_unlearning_changes_what_is_unlearned_and_nothing_else(corpus, parts):
    chosen = unlearning(corpus, parts)
    assert pairs(chosen.forget_train) == [pair for part in parts for pair in pairs(corpus.sets[part])]
    assert (chosen.sets, chosen.build, chosen.retain_train) == (corpus.sets, corpus.build, corpus.retain_train)


@pytest.mark.parametrize("parts", [(), ("forget", "K2")])
def test_unlearning_what_is_not_there_is_refused(corpus, parts):
    with pytest.raises(ValueError, match="nothing to unlearn"):
        unlearning(corpus, parts)


def test_impossible_sizes_are_refused_by_name():
    with pytest.raises(UserError, match="forget_people"):
        load_paper_people(0, forget_people=0)
