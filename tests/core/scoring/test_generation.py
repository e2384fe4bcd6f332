"""Text by draft and verify: token for token what `generate` gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from uipe_core.corpora.types import Corpus
from uipe_core.models.transformers_compat import wrap_adapter
from uipe_core.scoring import generation
from uipe_core.scoring.batch_sizes import BatchSize
from uipe_core.scoring.generation import GreedyText, complete, verify_drafts
from uipe_core.scoring.scorer import Scorer, ScoringConfig

LIMIT = 12


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 4), min_size=1, max_size=7), st.integers(1, 6))
def test_what_a_draft_tells_is_the_greedy_text_up_to_its_first_mistake(draft, best, limit):
    """A stand-in for a model: the most likely token after so many right tokens is that of `best`; 4 ends a text."""
    best = best[: len(draft) + 1]
    text = GreedyText([9], limit, [])
    text.verify(draft, best, stops=(4,))
    expected = []
    for place, token in enumerate(best):
        if token == 4 or len(expected) == limit:
            break
        expected.append(token)
        if place >= len(draft) or token != draft[place]:
            break
    assert text.tokens == expected
    ended = len(expected) < len(best) and best[len(expected)] == 4 and expected == draft[: len(expected)]
    assert text.finished == (ended or len(expected) == limit)


@pytest.fixture(scope="module")
def corpus(world):
    return Corpus("few", {name: items[::3] for name, items in world.sets.items()}, (), ())


@pytest.fixture
def moved(load_tiny):
    """The small model, its weights moved by random directions of so many times their own spread."""

    def make(scale, seed=0):
        loaded = load_tiny()
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=draws)
        return loaded

    return make


@torch.inference_mode()
def by_generate(loaded, prompt):
    ids = torch.tensor([prompt])
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LIMIT,
        do_sample=False,
        pad_token_id=loaded.prompts.pad_id,
        eos_token_id=loaded.prompts.stop_ids,
    )[0, len(prompt) :].tolist()
    ends = [place for place, token in enumerate(output) if token in loaded.prompts.stop_ids]
    return output[: ends[0]] if ends else output


@pytest.mark.parametrize("state", ["healthy", "half unlearned", "collapsed"])
def test_texts_are_those_of_generate_token_for_token(state, moved, corpus):
    loaded = moved({"healthy": 0.0, "half unlearned": 0.5, "collapsed": 3.0}[state])
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(16, LIMIT))
    scorer.score(loaded)
    expected = [by_generate(loaded, prompt) for prompt in scorer._prompts]
    assert scorer._drafts == expected
    # Now with the texts of a neighbour as drafts, and with drafts that are all wrong.
    scorer.score(loaded)
    assert scorer._drafts == expected
    scorer._drafts = [text[::-1] for text in expected]
    scorer.score(loaded)
    assert scorer._drafts == expected
    scorer.score(other := moved(0.4, seed=1))
    assert scorer._drafts == [by_generate(other, prompt) for prompt in scorer._prompts]


@torch.inference_mode()
def test_nothing_is_generated_that_the_drafts_have_told(moved, corpus):
    loaded = moved(0.5)
    scorer = Scorer(corpus, loaded.prompts, ScoringConfig(16, LIMIT))
    stops, pad = loaded.prompts.stop_ids, loaded.prompts.pad_id
    fresh = [GreedyText(prompt, LIMIT, []) for prompt in scorer._prompts]
    complete(loaded.model, fresh, stops, pad, BatchSize(8))
    again = [GreedyText(prompt, LIMIT, []) for prompt in scorer._prompts]
    verify_drafts(loaded.model, again, [text.tokens for text in fresh], stops, pad, BatchSize(8))
    assert [text.tokens for text in again] == [text.tokens for text in fresh]
    assert all(text.finished for text in again if text.tokens)


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 5, 100])
def test_the_models_own_generate_gives_the_same(moved, corpus, size):
    loaded = moved(0.5)
    prompts = [loaded.prompts.prompt_ids(item.question) for items in corpus.sets.values() for item in items][:30]
    stops, pad = loaded.prompts.stop_ids, loaded.prompts.pad_id
    ours, theirs = ([GreedyText(prompt, 3 + number % 9, []) for number, prompt in enumerate(prompts)] for _ in range(2))
    complete(loaded.model, ours, stops, pad, BatchSize(size))
    for start in range(0, len(theirs), size):
        generation._generate(loaded.model, theirs[start : start + size], stops, pad)
    assert [(text.tokens, text.finished) for text in ours] == [(text.tokens, text.finished) for text in theirs]
    assert all(text.finished for text in ours)


OWN_GENERATE = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
}
"""Model types that `_decode` cannot run."""


@torch.inference_mode()
def by_hand(model, prompt, stops):
    """Greedy text from whole forward passes."""
    tokens = []
    while len(tokens) < LIMIT:
        best = int(model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1].argmax())
        if best in stops:
            break
        tokens.append(best)
    return tokens


@pytest.mark.parametrize(
    "own",
    [
        {"suppress_tokens": list(range(10, 40))},
        {"bad_words_ids": [[token] for token in range(10, 40)]},
        {"sequence_bias": [[[token], -10.0] for token in range(10, 40)]},
        {"max_time": 1e-9},
        {"stop_strings": ["a"]},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 9.0, "num_beams": 3},
        {"forced_eos_token_id": 5, "min_new_tokens": 9},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("kind", OWN_GENERATE)
def test_greedy_text_does_not_follow_the_models_generation_config(kind, own, adapted):
    if adapted and (kind != "bloom" or "suppress_tokens" not in own):
        pytest.skip("an adapter is tried with one of them")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0, **OWN_GENERATE[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    if adapted:
        model = wrap_adapter(model, {"r": 2, "target_modules": ["dense"], "task_type": "CAUSAL_LM"}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    own = GenerationConfig(**own)
    model.generation_config = own
    assert not generation.forward_parameters(model).keys() >= generation.BY_HAND
    prompts = [[3, 4, 5], [6, 7, 8], [9, 3, 9]]
    texts = [GreedyText(prompt, LIMIT, []) for prompt in prompts]
    complete(model, texts, [2], 0, BatchSize(4))
    assert [text.tokens for text in texts] == [by_hand(model, prompt, [2]) for prompt in prompts]
    assert model.generation_config is own
