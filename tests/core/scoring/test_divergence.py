"""Divergence of a model from the initial one, against the sum over the whole vocabulary."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from uipe_core.corpora.types import Corpus
from uipe_core.models.loading import LoadedModel
from uipe_core.scoring import divergence
from uipe_core.scoring.scorer import Scorer, ScoringConfig

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def corpus(world):
    return Corpus("few", {name: world.sets[name][:7] for name in ("forget", "retain")}, (), ())


@pytest.fixture
def pair(load_tiny):
    """An initial model, and the same moved at random."""
    tiny = load_tiny()
    torch.manual_seed(3)
    initial = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny.tokenizer), initializer_range=0.4, **SHAPE)).eval()
    moved = copy.deepcopy(initial)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return tuple(LoadedModel(model, tiny.tokenizer, tiny.prompts) for model in (initial, moved))


def whole_sum(initial, moved, item):
    """KL over the whole vocabulary, the answer read alone, in double precision."""
    example = initial.prompts.encode_answer(item, item.answer)
    with torch.inference_mode():
        one, other = (
            each.model(input_ids=torch.tensor([example.input_ids])).logits[0, example.prompt_length - 1 : -1].double()
            for each in (initial, moved)
        )
    expected = one.log_softmax(-1)
    return float((expected.exp() * (expected - other.log_softmax(-1))).sum(-1).mean())


def measured(initial, moved, corpus):
    scorer = Scorer(corpus, initial.prompts, ScoringConfig(batch_size=5, generation_length=2))
    scorer.keep_initial(initial)
    return scorer.score(moved)


def test_it_is_the_sum_over_the_vocabulary_where_all_of_it_is_kept(pair, corpus, monkeypatch):
    monkeypatch.setattr(divergence, "KEPT_TOKENS", len(pair[0].tokenizer))
    found = measured(*pair, corpus).sets["retain"].initial_kl
    expected = [whole_sum(*pair, item) for item in corpus.sets["retain"]]
    assert min(expected) > 1e-3
    assert found == pytest.approx(expected, rel=1e-4)


def test_it_is_a_lower_bound_that_grows_with_the_tokens_kept(pair, corpus, monkeypatch):
    expected = np.array([whole_sum(*pair, item) for item in corpus.sets["retain"]])
    found = []
    for kept in (1, 4, 64):
        monkeypatch.setattr(divergence, "KEPT_TOKENS", kept)
        found.append(measured(*pair, corpus).sets["retain"].initial_kl)
    assert all((fewer <= more + 1e-9).all() for fewer, more in zip(found, [*found[1:], expected], strict=True))


def test_of_the_initial_model_itself_it_is_0(pair, corpus):
    report = measured(pair[0], pair[0], corpus)
    assert report.sets["retain"].initial_kl == pytest.approx(0.0, abs=1e-6)
    assert (report.compared_with_itself(["retain"]).sets["retain"].initial_kl == 0).all()


def test_other_numbers_and_sets_are_untouched(pair, corpus):
    report = measured(*pair, corpus)
    plain = Scorer(corpus, pair[0].prompts, ScoringConfig(batch_size=5, generation_length=2)).score(pair[1])
    assert plain.sets["retain"].initial_kl is None
    assert report.sets["forget"].initial_kl is None
    assert np.array_equal(report.sets["retain"].answer_loss, plain.sets["retain"].answer_loss)
    assert report.sets["retain"].generated == plain.sets["retain"].generated


def test_logits_that_overflow_give_a_collapsed_model_and_no_nan(pair, corpus):
    initial, moved = pair
    with torch.no_grad():
        moved.model.lm_head.weight.fill_(float("inf"))
    report = measured(initial, moved, corpus)
    assert not report.is_finite
    bounded = report.without_overflow()
    assert np.isfinite(bounded.sets["retain"].initial_kl).all()
    assert (bounded.sets["retain"].initial_kl > 100).all()
    assert replace(bounded.sets["retain"]).is_finite
