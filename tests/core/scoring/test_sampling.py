"""Sampling: in proportion to probabilities, the same every time, whatever the batch."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from uipe_core.audits.texts import judge
from uipe_core.errors import UserError
from uipe_core.models.loading import LoadedModel
from uipe_core.scoring.batch_sizes import BatchSize
from uipe_core.scoring.generation import GreedyText, complete
from uipe_core.scoring.sampling import SampledText, sampler, samples, write_texts


def prompts_of(loaded, world, count=4):
    return [loaded.prompts.item_prompt_ids(item) for item in world.sets["forget"][:count]]


def text_of(draws, tokens=()):
    return SampledText([0], len(draws), list(tokens), draws=draws)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion(temperature):
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, float("-inf")]])
    draws = ((np.arange(20_000) + 0.5) / 20_000).tolist()
    chosen = sampler(temperature)(logits.expand(len(draws), -1), [text_of([draw]) for draw in draws], 0)
    shares = torch.bincount(chosen, minlength=5) / len(draws)
    torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), atol=1e-4, rtol=0)
    assert shares[4] == 0


def test_each_token_has_a_draw_of_its_own():
    logits = torch.zeros(2, 4)
    texts = [text_of([0.1, 0.9, 0.3]), text_of([0.1, 0.9, 0.3], tokens=[1])]
    assert sampler()(logits, texts, 0).tolist() == [0, 3]
    assert sampler()(logits, texts, 1).tolist() == [3, 1]
    assert sampler()(logits, texts, 9).tolist() == [1, 1]


def test_samples_are_the_same_in_any_batch_and_more_samples_begin_alike(load_tiny, world):
    loaded = load_tiny()
    prompts = prompts_of(loaded, world)
    expected = samples(loaded, prompts, 5, 8, temperature=2.0, size=BatchSize(1))
    assert [len(texts) for texts in expected] == [5] * len(prompts)
    assert samples(loaded, prompts, 5, 8, temperature=2.0, size=BatchSize(7)) == expected
    assert samples(loaded, prompts, 2, 8, temperature=2.0) == [texts[:2] for texts in expected]
    assert samples(loaded, prompts, 5, 8, temperature=2.0, seed=1) != expected
    assert len({text for texts in expected for text in texts}) > 5


def test_sampling_leaves_the_global_random_state_alone(load_tiny, world):
    loaded = load_tiny()
    before = torch.get_rng_state()
    samples(loaded, prompts_of(loaded, world, 1), 2, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_low_temperature_gives_greedy_text(load_tiny, world):
    loaded = load_tiny()
    prompts = prompts_of(loaded, world)
    greedy = write_texts(loaded, [GreedyText(prompt, 8, []) for prompt in prompts])
    assert samples(loaded, prompts, 1, 8, temperature=1e-3) == [[text] for text in greedy]


def test_samples_follow_the_models_own_probabilities(load_tiny, world):
    """The first token of many samples against the softmax of one pass."""
    loaded = load_tiny()
    (prompt,) = prompts_of(loaded, world, 1)
    with torch.no_grad():
        expected = (loaded.model(torch.tensor([prompt])).logits[0, -1] / 3).softmax(-1)
    texts = [text_of([draw]) for draw in ((np.arange(2000) + 0.5) / 2000).tolist()]
    for text in texts:
        text.prompt = prompt
    with torch.inference_mode():
        complete(loaded.model, texts, [], loaded.prompts.pad_id, BatchSize(256), sampler(3.0))
    counts = torch.bincount(torch.tensor([text.tokens[0] for text in texts]), minlength=len(expected))
    torch.testing.assert_close(counts / len(texts), expected, atol=2e-3, rtol=0)


OWN_GENERATE = {
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
}


@torch.inference_mode()
@pytest.mark.parametrize("kind", OWN_GENERATE)
def test_models_with_a_generation_of_their_own_take_the_same_draws(kind):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0, **OWN_GENERATE[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    draws = torch.rand((3, 6), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [SampledText([5, 6, 7], 6, [], draws=own) for own in draws]
    complete(model, texts, [2], 0, BatchSize(1), sampler(2.0))
    choose = sampler(2.0)
    for text, own in zip(texts, draws, strict=True):
        again = SampledText([5, 6, 7], 6, [], draws=own)
        while not again.finished:
            logits = model(input_ids=torch.tensor([[*again.prompt, *again.tokens]]), use_cache=False).logits[:, -1]
            again.add(int(choose(logits, [again], 0)), [2])
        assert text.tokens == again.tokens


def test_more_samples_leak_no_less(load_tiny, world):
    loaded = load_tiny()
    items = world.sets["forget"]
    prompts = [loaded.prompts.item_prompt_ids(item) for item in items]
    scores = judge([item.answer for item in items], samples(loaded, prompts, 4, 16, temperature=1.0))
    highest = [scores.recall[:, :count].max(axis=1).mean() for count in range(1, 5)]
    assert highest == sorted(highest)
    assert highest[-1] == pytest.approx(scores.mean_highest_recall)
    assert highest[-1] > 0.5
    assert scores.contained_share >= scores.contained.mean()


def test_what_cannot_be_sampled_is_said(load_tiny, world):
    loaded = load_tiny()
    prompts = prompts_of(loaded, world, 1)
    with pytest.raises(UserError, match="ask for at least 1"):
        samples(loaded, prompts, 0, 4)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="is not above 0"):
            samples(loaded, prompts, 1, 4, temperature=temperature)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    with pytest.raises(UserError, match="the model has 16 positions"):
        samples(LoadedModel(model, loaded.tokenizer, loaded.prompts), [[1, 2, 3]], 1, 15)
