"""Rows that hold several answers to one question: read as each answer alone, or not used."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from uipe_core.models.prompts import Example
from uipe_core.models.transformers_compat import accepts_logits_to_keep
from uipe_core.scoring.packing import (
    answer_logits,
    batched,
    collate,
    group_by_prompt,
    one_per_row,
    supports_packed_rows,
)

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.4}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **{**SIZES, **changes})).eval()


PROMPTS = st.lists(st.integers(1, 49), min_size=1, max_size=6).map(tuple)
ANSWERS = st.lists(st.lists(st.integers(1, 49), min_size=1, max_size=5).map(tuple), min_size=1, max_size=5)


@st.composite
def examples(draw):
    questions = draw(st.lists(st.tuples(PROMPTS, ANSWERS), min_size=1, max_size=5))
    found = [Example((*prompt, *answer), len(prompt)) for prompt, answers in questions for answer in answers]
    return draw(st.permutations(found))


@given(examples(), st.integers(1, 7))
def test_batches_hold_every_example_once_and_no_more_than_allowed(items, size):
    for groups in (group_by_prompt(items), one_per_row(items)):
        batches = list(batched(groups, size))
        assert sorted(number for batch in batches for group in batch for number in group) == list(range(len(items)))
        assert all(1 <= sum(map(len, batch)) <= size for batch in batches)
        for group in (group for batch in batches for group in batch):
            assert len({items[number].input_ids[: items[number].prompt_length] for number in group}) == 1


@settings(max_examples=40, deadline=None)
@given(examples())
@torch.inference_mode()
def test_packed_logits_are_those_of_each_answer_alone(items):
    model = llama()
    rows = collate(group_by_prompt(items), items, 0, CPU)
    logits = answer_logits(model, rows, keep=True).split(rows.lengths)
    for number, found in zip(rows.owners, logits, strict=True):
        example = items[number]
        alone = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        torch.testing.assert_close(found, alone[example.prompt_length - 1 : -1], rtol=1e-4, atol=1e-5)
    assert rows.targets.tolist() == [token for n in rows.owners for token in items[n].input_ids[items[n].prompt_length :]]


@pytest.fixture
def items():
    return [Example((*prompt, *answer, 49), 3) for prompt in ((1, 2, 3), (4, 5, 6)) for answer in ((7, 8), (9,), (10, 11, 12))]


@torch.inference_mode()
def test_a_model_is_asked_whether_it_takes_packed_rows(items):
    assert supports_packed_rows(llama(), items, 0, CPU) is True
    # Attention that is a matter of distance in the row, so that positions of ours change nothing.
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.4)).eval()
    assert supports_packed_rows(bloom, items, 0, CPU) is False


@torch.inference_mode()
@pytest.mark.parametrize(("window", "expected"), [(4, False), (64, True)])
def test_a_model_that_looks_back_only_so_far_keeps_its_own_mask(items, window, expected):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=50, sliding_window=window, num_key_value_heads=1, **SIZES)).eval()
    assert supports_packed_rows(model, items, 0, CPU) is expected


@torch.inference_mode()
def test_a_model_that_no_longer_listens_cannot_tell(items):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    assert supports_packed_rows(model, items, 0, CPU) is None


@torch.inference_mode()
def test_questions_with_one_answer_each_have_nothing_to_share(items):
    assert supports_packed_rows(llama(), items[::3], 0, CPU) is False
    assert accepts_logits_to_keep(llama())
