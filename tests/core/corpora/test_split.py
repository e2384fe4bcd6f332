"""Halves of a corpus, and the neighbours of a set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uipe_core.corpora.people import load_people
from uipe_core.corpora.split import split_corpus, take_items
from uipe_core.corpora.tofu import nearest_rows
from uipe_core.corpora.types import Corpus, Item, item_set_hash
from uipe_core.errors import UserError
from uipe_core.metrics.scores import ScoreReport, SetScores


def grouped(sizes):
    return tuple(Item(f"q{g} {n}", f"a{g} {n}", group=f"g{g}") for g, size in enumerate(sizes) for n in range(size))


def corpus_of(items):
    return Corpus("test", {"forget": items}, (), ())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.floats(0.05, 0.95), st.integers(0, 9))
def test_halves_are_a_partition_with_the_asked_share(sizes, share, seed):
    items = grouped(sizes)
    taken = round(share * len(items))
    if not 0 < taken < len(items):
        with pytest.raises(UserError, match=r"split\.select"):
            split_corpus(corpus_of(items), share, seed)
        return
    split = split_corpus(corpus_of(items), share, seed)
    assert sorted(split.select["forget"] + split.report["forget"]) == list(range(len(items)))
    assert len(split.select["forget"]) == taken


def test_every_person_is_in_both_halves():
    corpus = load_people(0)
    split = split_corpus(corpus, 0.5, 3)
    for rows in (split.select, split.report):
        assert {corpus.sets["forget"][row].group for row in rows["forget"]} == {i.group for i in corpus.sets["forget"]}


def test_related_facts_are_split_like_the_facts_they_belong_to():
    split = split_corpus(load_people(0), 0.5, 0)
    assert split.select["related"] == split.select["forget"]


def test_another_seed_splits_otherwise_and_the_same_seed_the_same():
    corpus = load_people(0)
    assert split_corpus(corpus, 0.5, 1) == split_corpus(corpus, 0.5, 1) != split_corpus(corpus, 0.5, 2)


def test_no_split_takes_all_items_for_both():
    corpus = load_people(0)
    split = split_corpus(corpus, None, 0)
    assert split.select == split.report
    assert take_items(corpus, split.select).set_hashes == corpus.set_hashes


def test_groups_are_no_part_of_what_items_say():
    one, other = Item("q", "a", group="x"), Item("q", "a", group="y")
    assert one == other
    assert item_set_hash((one,)) == item_set_hash((other,))


def test_scores_of_some_items():
    scores = SetScores(
        answer_loss=np.array([0.1, 0.2, 0.3]),
        answer_tokens=np.array([1, 2, 3]),
        paraphrase_loss=np.array([1.0, 2.0, 3.0]),
        paraphrase_tokens=np.array([1, 1, 1]),
        perturbed_loss=np.arange(6.0).reshape(3, 2),
        perturbed_tokens=np.ones((3, 2), dtype=np.int64),
        questions=("a", "b", "c"),
        item_hash="whole",
    )
    report = ScoreReport({"forget": scores}, logit_scale=2.0)
    taken = report.take({"forget": (2, 0), "retain": (1,)}, {"forget": "part"})
    assert taken.sets.keys() == {"forget"}
    part = taken.sets["forget"]
    assert part.answer_loss.tolist() == [0.3, 0.1]
    assert part.perturbed_loss.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert (part.questions, part.item_hash, part.generated) == (("c", "a"), "part", None)
    assert set(report.arrays()) >= {"forget/answer_loss", "forget/perturbed_tokens"}


def test_neighbours_are_the_nearest_by_group_and_by_text():
    items = (
        Item("red apple", "tree", group="fruit"),
        Item("red cherry", "tree", group="fruit"),
        Item("fast car", "road", group="cars"),
        Item("slow car", "apple", group="cars"),
        Item("deep sea", "fish", group="sea"),
        Item("cold sea", "whale", group="sea"),
    )
    to = (Item("green apple", "tree", group="mine"), Item("sweet cherry", "tree", group="mine"))
    assert nearest_rows(items, to, 2)[0] == 0
    assert nearest_rows(items, to, 4) == (0, 1, 2, 3) or nearest_rows(items, to, 4)[:3] == (0, 1, 3)
    assert nearest_rows(items, to, 9) == tuple(range(6))


def test_neighbours_by_brute_force():
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(12)]
    items = tuple(Item(" ".join(rng.choice(words, 5)), words[n % 12]) for n in range(20))
    to = tuple(Item(" ".join(rng.choice(words, 5)), words[n]) for n in range(3))
    texts = [f"{i.question} {i.answer}".split() for i in (*items, *to)]
    weights = {w: np.log(len(texts) / sum(w in t for t in texts)) for w in words if any(w in t for t in texts)}

    def cosine(a, b):
        first, second = (np.array([t.count(w) * weights[w] for w in weights]) for t in (a, b))
        return first @ second / np.linalg.norm(first) / np.linalg.norm(second)

    best = [max(cosine(t, o) for o in texts[20:]) for t in texts[:20]]
    # Without groups each item is one of its own, so both halves go by the same similarity.
    assert set(nearest_rows(items, to, 6)) == set(np.argsort(best)[::-1][:6].tolist())
