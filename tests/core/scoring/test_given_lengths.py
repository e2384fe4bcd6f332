"""Items of MUSE: texts of a given length, gold answers cut there too, ends of answers, ROUGE-L F1, Min-K% of whole texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from uipe_core.corpora.types import KNOWLEDGE, PRIVLEAK_SETS, Corpus, Item, item_set_hash
from uipe_core.errors import UserError
from uipe_core.logs.tofu import read_log, write_log
from uipe_core.metrics.composites import ROUGE_F1, Component, auc, composite, composite_bound, membership, privleak
from uipe_core.scoring.lengths import require_positions
from uipe_core.scoring.scorer import Scorer, ScoringConfig

LENGTH = 6
CONFIG = ScoringConfig(batch_size=3, generation_length=2)


@pytest.fixture(scope="module")
def corpus(world):
    """Continuations that go on for longer than is compared, questions whose answers end, and texts without a beginning."""
    known, others = world.sets["forget"], world.sets["retain"]
    forget = [
        Item(
            item.question,
            f" {item.answer} {other.answer}",
            None,
            (f" {other.answer} {item.answer}",),
            plain=True,
            length=LENGTH,
        )
        for item, other in zip(known[:4], known[4:8], strict=True)
    ]
    retain = [
        Item(f"{item.question} ", item.answer, None, (item.answer,), plain=True, length=12, stops=("zz", "a"))
        for item in others[:5]
    ]
    members = [Item("", item.answer, None, (item.answer,), plain=True) for item in known[:3]]
    strangers = [Item("", item.answer, None, (item.answer,), plain=True) for item in others[:4]]
    sets = {"forget": tuple(forget), "retain": tuple(retain), KNOWLEDGE: tuple(retain[::-1])}
    sets |= dict(zip(PRIVLEAK_SETS, (tuple(members), tuple(strangers)), strict=True))
    return Corpus("muse", sets, tuple(forget), tuple(retain))


@pytest.fixture
def loaded(load_tiny):
    return load_tiny()


@pytest.fixture
def report(loaded, corpus):
    return Scorer(corpus, loaded.prompts, CONFIG).score(loaded)


def greedy(loaded, prompt, count):
    ids = loaded.tokenizer(prompt)["input_ids"]
    found = loaded.model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=loaded.prompts.pad_id,
        eos_token_id=loaded.prompts.stop_ids,
    )  # fmt: skip
    return loaded.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def test_text_and_gold_answer_have_as_many_tokens(loaded, corpus, report):
    scores = report.sets["forget"]
    assert (scores.answer_tokens == LENGTH).all() and (scores.perturbed_tokens == LENGTH).all()
    f1 = RougeScorer(["rougeL"], use_stemmer=False)
    for row, item in enumerate(corpus.sets["forget"]):
        start, whole = (loaded.tokenizer(text)["input_ids"] for text in (item.question, item.question + item.answer))
        assert len(whole) > len(start) + LENGTH
        gold = loaded.tokenizer.decode(whole[len(start) : len(start) + LENGTH])
        text = greedy(loaded, item.question, LENGTH)
        assert (scores.answers[row], scores.generated[row]) == (gold, text)
        assert scores.rouge_l_f1[row] == f1.score(gold, text)["rougeL"].fmeasure


def test_an_answer_ends_before_the_first_stop(loaded, corpus, report):
    f1 = RougeScorer(["rougeL"], use_stemmer=False)
    cut = 0
    for row, item in enumerate(corpus.sets["retain"]):
        whole = greedy(loaded, item.question, 12)
        expected = whole.split("zz")[0].split("a")[0]
        cut += expected != whole
        for scores, place in ((report.sets["retain"], row), (report.sets[KNOWLEDGE], 4 - row)):
            assert scores.generated[place] == expected
            assert scores.rouge_l_f1[place] == f1.score(item.answer, expected)["rougeL"].fmeasure
    assert cut


def test_other_items_have_no_f1(loaded, world, report):
    assert report.sets["forget"].rouge_l_f1 is not None and report.sets[PRIVLEAK_SETS[0]].rouge_l_f1 is None
    assert Scorer(world, loaded.prompts, CONFIG).score(loaded).sets["forget"].rouge_l_f1 is None


def test_min_k_is_of_all_tokens_of_a_text(loaded, corpus, report):
    for name in PRIVLEAK_SETS:
        for row, item in enumerate(corpus.sets[name]):
            ids = torch.tensor([[loaded.tokenizer.eos_token_id, *loaded.tokenizer(item.answer)["input_ids"]]])
            with torch.inference_mode():
                logits = loaded.model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            own = np.sort(logits[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())
            assert report.sets[name].min_k[row] == pytest.approx(-own[: int(len(own) * 0.4)].mean(), abs=1e-4)
    assert report.sets["forget"].min_k is None


def test_numbers_follow_from_the_items(report):
    sets = report.sets
    memorised = Component("forget", ROUGE_F1, inverted=True)
    assert composite(report, [memorised], "tofu") == pytest.approx(1 - sets["forget"].rouge_l_f1.mean())
    unknown = replace(report, sets={"forget": replace(sets["forget"], rouge_l_f1=None)})
    assert composite_bound(unknown, [memorised], "tofu") == 1.0
    with pytest.raises(UserError, match="no rouge f1"):
        composite(unknown, [memorised], "tofu")
    own = auc(*(sets[name].min_k for name in PRIVLEAK_SETS))
    alone = membership(sets, None)
    assert alone["privleak_auc"] == own and alone["privleak"] == privleak(own)
    assert alone["privleak_privacy"] == pytest.approx(1 - abs(own - 0.5) / 0.5)
    against = membership(sets, sets)
    assert against["privleak"] == 0.0 and against["privleak_privacy"] == 1.0
    assert "privacy" not in against


def test_a_log_keeps_them(report, tmp_path):
    write_log(report, tmp_path / "log.json")
    read = read_log(tmp_path / "log.json")
    for name, scores in report.sets.items():
        for key in ("rouge_l_f1", "min_k"):
            one, two = getattr(scores, key), getattr(read.sets[name], key)
            assert (one is None and two is None) or np.array_equal(one, two)


def test_length_and_stops_are_part_of_an_item():
    item = Item("a", "b", plain=True, length=4, stops=("c",))
    others = [replace(item, length=5), replace(item, stops=()), replace(item, length=None, stops=())]
    assert len({item_set_hash([each]) for each in (item, *others)}) == 4
    assert item_set_hash([others[2]]) == item_set_hash([Item("a", "b", plain=True)])


def test_a_text_must_have_room(loaded, corpus):
    wide = Corpus("wide", {"retain": (replace(corpus.sets["retain"][0], length=400),)}, (), ())
    with pytest.raises(UserError, match=r"a text of 400 tokens take \d+ positions, and the model has 64"):
        require_positions(wide, loaded.prompts, CONFIG, 64, trains=False)
    require_positions(wide, loaded.prompts, CONFIG, 1000, trains=False)
