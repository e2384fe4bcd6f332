"""Relearning: what comes back, on which items, from an unchanged model, and what is said when it fails."""

import numpy as np
import pytest
import torch

from uipe_core.audits import relearning
from uipe_core.audits.relearning import (
    KINDS,
    RelearningConfig,
    relearn,
    relearning_items,
    training_steps,
    unseen,
)
from uipe_core.audits.token_scores import read_token_scores
from uipe_core.corpora.types import Corpus, Item
from uipe_core.errors import UserError
from uipe_core.models.transformers_compat import wrap_adapter
from uipe_core.unlearning.training import AdapterConfig

FAST = {"learning_rate": 1e-2, "epochs": 3, "batch_size": 8}
FEW = 8
FORGOTTEN = 2.0
"""Nats per token at which gradient ascent ends."""
LORA = AdapterConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))


def config_of(kind, **changes):
    """Return settings of one short training; a few items where that is its kind."""
    few = FEW if kind == "few" else None
    return RelearningConfig(kind, **{"items": few, "epochs": 1, "learning_rate": 2e-5, "batch_size": 16, **changes})


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def mean_loss(loaded, items):
    return float(np.mean([-scores.log_probabilities.mean() for scores in read_token_scores(loaded, items)]))


@pytest.fixture
def unlearned(load_tiny, world):
    """The small model after gradient ascent on the forget set."""
    from uipe_core.models.likelihood import answer_logits, mean_answer_nll
    from uipe_core.models.prompts import pad_batch

    loaded = load_tiny()
    batch = pad_batch([loaded.prompts.encode_item(item) for item in world.forget_train], loaded.prompts.pad_id)
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.05)
    while (loss := mean_answer_nll(*answer_logits(loaded.model, batch))) < FORGOTTEN:
        (-loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loaded


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_the_forgotten_comes_back_and_the_model_itself_stays(unlearned, load_tiny, world, adapter):
    before = bits(unlearned.model)
    result = relearn(unlearned, world, config_of("forget", adapter=adapter, **FAST))
    assert result.problem is None
    assert result.items == world.forget_train
    assert result.steps == training_steps(len(result.items), config_of("forget", **FAST))
    assert all(torch.equal(parameter, before[name]) for name, parameter in unlearned.model.named_parameters())
    assert bits(result.loaded.model).keys() == before.keys()
    assert result.loaded.model.dtype == unlearned.model.dtype
    forgotten, after, initial = (mean_loss(loaded, world.forget_train) for loaded in (unlearned, result.loaded, load_tiny()))
    assert (forgotten - after) / (forgotten - initial) > 0.1  # the share that came back


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_settings_give_the_same_weights(unlearned, world, kind):
    config = config_of(kind, items=6, seed=3, **FAST)
    one, other = (relearn(unlearned, world, config) for _ in range(2))
    assert one.items == other.items
    assert all(map(torch.equal, one.loaded.model.parameters(), other.loaded.model.parameters()))


def test_a_single_step_trains(unlearned, world):
    found = relearn(unlearned, world, config_of("few", items=5, batch_size=8, learning_rate=1e-3))
    assert found.steps == 1
    before, after = bits(unlearned.model), bits(found.loaded.model)
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_half_precision_stays(load_tiny, world):
    loaded = load_tiny(dtype="bfloat16")
    before = bits(loaded.model)
    result = relearn(loaded, world, config_of("few", **FAST))
    assert result.loaded.model.dtype == torch.bfloat16
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())


def test_items_are_those_of_their_kind(world):
    assert relearning_items(world, config_of("forget")) == world.forget_train
    assert relearning_items(world, config_of("benign")) == world.retain_train
    few = relearning_items(world, config_of("few"))
    assert len(few) == FEW
    assert set(few) < set(world.forget_train)
    assert few == relearning_items(world, config_of("few"))
    assert few != relearning_items(world, config_of("few", seed=1))
    assert len(relearning_items(world, config_of("benign", items=5))) == 5
    assert relearning_items(world, config_of("few", items=10**6)) == world.forget_train


def test_items_not_trained_on_are_known(world):
    few = relearning_items(world, config_of("few"))
    left = unseen(world.forget_train, few)
    assert len(left) == len(world.forget_train) - len(few)
    assert not {world.forget_train[place].question for place in left} & {item.question for item in few}
    texts = (Item("", "one", plain=True), Item("", "two", plain=True))
    assert unseen(texts, texts[:1]) == [1]


def test_what_cannot_be_trained_on_is_said(unlearned, world):
    with pytest.raises(UserError, match=r"'benin' is unknown; known: forget, few, benign. Did you mean 'benign'"):
        relearn(unlearned, world, config_of("benin"))
    with pytest.raises(UserError, match="one has no retain items to train on; leave out benign"):
        relearn(unlearned, Corpus("one", {}, world.forget_train, ()), config_of("benign"))


@pytest.mark.parametrize("rate", [1e30, float("inf")])
def test_divergence_is_a_word_and_no_error(unlearned, world, rate):
    before = bits(unlearned.model)
    result = relearn(unlearned, world, config_of("forget", learning_rate=rate, epochs=4, batch_size=4))
    assert result.loaded is None
    assert result.problem.startswith("diverged: its ")
    assert result.steps >= 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in unlearned.model.named_parameters())


def test_a_last_step_that_ruins_the_weights_is_seen(unlearned, world, monkeypatch):
    def ruin(loaded, items, settings, progress):
        progress(1, 1)
        with torch.no_grad():
            next(loaded.model.parameters())[0, 0] = float("nan")

    monkeypatch.setattr(relearning, "finetune", ruin)
    result = relearn(unlearned, world, config_of("forget"))
    assert (result.loaded, result.steps, result.problem) == (None, 1, "diverged: its weights are not finite")


def test_memory_that_runs_out_is_a_word(unlearned, world, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(relearning, "finetune", full)
    result = relearn(unlearned, world, config_of("forget"))
    assert result.loaded is None
    assert result.problem.startswith("memory ran out")


def test_other_errors_are_raised(unlearned, world, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(relearning, "finetune", broken)
    with pytest.raises(ZeroDivisionError):
        relearn(unlearned, world, config_of("forget"))


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_an_adapter_is_merged_into_the_copy_only(load_tiny, world, adapter):
    loaded = load_tiny()
    names = bits(loaded.model).keys()
    loaded.model = wrap_adapter(loaded.model, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False})
    before = bits(loaded.model)
    result = relearn(loaded, world, config_of("few", adapter=adapter, **FAST))
    assert bits(result.loaded.model).keys() == names
    assert bits(loaded.model).keys() == before.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())
    assert mean_loss(result.loaded, result.items) < mean_loss(loaded, result.items)
