"""Texts (plain items) are scored as running text: no prompt format, no end token, as many tokens as there are to compare."""

import numpy as np
import pytest
import torch

from uipe_core.corpora.types import Corpus, Item
from uipe_core.errors import UserError
from uipe_core.scoring.lengths import require_positions
from uipe_core.scoring.scorer import Scorer, ScoringConfig


@pytest.fixture
def texts(world):
    """Continuations of texts, in words the model knows."""
    items = [
        Item(item.question, f" {item.answer}", perturbed_answers=(f" {other.answer}", f" {third.answer}"), plain=True)
        for item, other, third in zip(
            world.sets["forget"][:4], world.sets["forget"][4:8], world.sets["forget"][8:12], strict=True
        )
    ]
    return Corpus("texts", {"forget": tuple(items), "retain": tuple(items[::-1])}, tuple(items), tuple(items))


def test_losses_and_texts_are_those_of_running_text(load_tiny, texts):
    loaded = load_tiny()
    report = Scorer(texts, loaded.prompts, ScoringConfig(batch_size=3, generation_length=2)).score(loaded)
    for row, item in enumerate(texts.sets["forget"]):
        start = loaded.tokenizer(item.question)["input_ids"]
        whole = loaded.tokenizer(item.question + item.answer)["input_ids"]
        ids = torch.tensor([whole])
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids).logits[0].double()
        nll = torch.nn.functional.cross_entropy(logits[len(start) - 1 : -1], ids[0, len(start) :])
        assert report.sets["forget"].answer_loss[row] == pytest.approx(float(nll), abs=1e-5)
        count = len(whole) - len(start)
        assert report.sets["forget"].answer_tokens[row] == count
        found = loaded.model.generate(
            torch.tensor([start]), max_new_tokens=count, do_sample=False, pad_token_id=loaded.prompts.pad_id
        )[0, len(start) :]
        assert report.sets["forget"].generated[row] == loaded.tokenizer.decode(found, skip_special_tokens=True)
        hits = logits[len(start) - 1 : -1].argmax(dim=-1) == ids[0, len(start) :]
        assert report.sets["forget"].exact_memorization[row] == pytest.approx(float(hits.double().mean()))
    assert np.isfinite(report.sets["retain"].perturbed_loss).all()


def test_a_text_needs_no_room_for_more_than_its_continuation(load_tiny, texts):
    prompts = load_tiny().prompts
    longest = max(len(prompts.encode_answer(item, text).input_ids) for item in texts.sets["forget"]
                  for text in (item.answer, *item.perturbed_answers))  # fmt: skip
    config = ScoringConfig(batch_size=3, generation_length=500)
    require_positions(texts, prompts, config, longest, trains=False)
    with pytest.raises(UserError, match="nothing is truncated"):
        require_positions(texts, prompts, config, longest - 2, trains=False)


def test_a_text_without_a_beginning_follows_the_end_token(load_tiny, world):
    loaded = load_tiny()
    item = Item("", world.sets["forget"][0].answer, plain=True)
    corpus = Corpus("texts", {"forget": (item,), "retain": (item,)}, (item,), (item,))
    report = Scorer(corpus, loaded.prompts, ScoringConfig(batch_size=3, generation_length=2)).score(loaded)
    answer = loaded.tokenizer(item.answer)["input_ids"]
    ids = torch.tensor([[loaded.tokenizer.eos_token_id, *answer]])
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids).logits[0].double()
    nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    assert loaded.prompts.item_prompt_ids(item) == [loaded.tokenizer.eos_token_id]
    assert report.sets["forget"].answer_loss[0] == pytest.approx(float(nll), abs=1e-5)
