"""A tree of answers in one row: read as each answer alone, or not used."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from uipe_core.models.prompts import Example
from uipe_core.models.transformers_compat import accepts_logits_to_keep
from uipe_core.scoring import packing
from uipe_core.scoring.packing import (
    batched,
    group_by_prompt,
    one_per_row,
    plain_rows,
    predicting_logits,
    reads_trees,
    tree_row,
)

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.4}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **{**SIZES, **changes})).eval()


# Few different tokens, so that prompts and answers often begin alike.
TOKENS = st.one_of(st.integers(1, 3), st.integers(1, 49))
PROMPTS = st.lists(TOKENS, min_size=1, max_size=6).map(tuple)
ANSWERS = st.lists(st.lists(TOKENS, min_size=1, max_size=5).map(tuple), min_size=1, max_size=5)


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


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("keep", [True, False])
@settings(max_examples=30, deadline=None)
@given(items=examples())
@torch.inference_mode()
def test_the_logits_of_trees_and_of_padded_rows_are_those_of_each_answer_alone(items, heads, keep):
    model = llama(num_key_value_heads=heads)
    numbers = list(range(len(items)))[::-1]
    for rows in (tree_row(numbers, items, CPU), plain_rows(numbers, items, 0, CPU)):
        logits = predicting_logits(model, rows, keep)[rows.which].split(rows.lengths)
        for number, found in zip(rows.owners, logits, strict=True):
            example = items[number]
            alone = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            # Logits are up to 5, and those of this model in fp32 and in fp64 differ by up to 8e-5.
            torch.testing.assert_close(found, alone[example.prompt_length - 1 : -1], rtol=1e-4, atol=1e-4)
        targets = [token for n in rows.owners for token in items[n].input_ids[items[n].prompt_length :]]
        assert rows.targets.tolist() == targets


@given(examples())
def test_a_tree_holds_every_beginning_once_and_predicts_from_each_place_once(items):
    rows = tree_row(range(len(items)), items, CPU)
    beginnings = {example.input_ids[:end] for example in items for end in range(1, len(example.input_ids))}
    assert rows.input_ids.shape == (1, len(beginnings))
    predicting = {e.input_ids[:end] for e in items for end in range(e.prompt_length, len(e.input_ids))}
    assert len(set(rows.column.tolist())) == len(rows.column) == len(predicting)


@given(examples(), st.sampled_from([1, 2, 3, 32]))
def test_a_token_of_a_tree_sees_its_own_sequence_so_far(items, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", block)
        rows = tree_row(range(len(items)), items, CPU)
    tokens, ids, positions = rows.input_ids.shape[1], rows.input_ids[0].tolist(), rows.position_ids[0].tolist()
    heard = {}
    for own, seen, mask in zip(rows.tree.own.tolist(), rows.tree.seen.tolist(), rows.tree.mask[:, 0].tolist(), strict=True):
        for place, visible in zip(own, mask, strict=True):
            heard.setdefault(place, []).append([other for other, yes in zip(seen, visible, strict=True) if yes])
    assert set(heard) == set(range(tokens))
    beginnings = set()
    for place, found in heard.items():
        (path,) = {tuple(each) for each in found}
        assert path[-1] == place
        assert [positions[other] for other in path] == list(range(len(path)))
        beginnings.add(tuple(ids[other] for other in path))
    assert beginnings == {example.input_ids[:end] for example in items for end in range(1, len(example.input_ids))}


@torch.inference_mode()
def test_a_model_attends_as_before_after_it_has_read_a_tree(items):
    model, ids = llama(), torch.tensor([[1, 2, 3, 4]])
    before, named = model(input_ids=ids).logits, model.config._attn_implementation
    predicting_logits(model, tree_row(range(len(items)), items, CPU), True)
    assert model.config._attn_implementation == named
    assert torch.equal(model(input_ids=ids).logits, before)
    model.model.layers[0].self_attn.q_proj.weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        predicting_logits(model, tree_row(range(len(items)), items, CPU), True)
    assert model.config._attn_implementation == named


@pytest.fixture
def items():
    return [Example((*prompt, *answer, 49), 3) for prompt in ((1, 2, 3), (4, 5, 6)) for answer in ((7, 8), (9,), (10, 11, 12))]


GPT = {"vocab_size": 50, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
OTHERS = {
    # Attention that is a matter of distance in the row, so that positions of ours change nothing.
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=16, **GPT)),
    # Attention that cannot be replaced.
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(n_embd=16, rotary_dim=4, **GPT)),
    # An option that our attention does not know.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=50, attn_logit_softcapping=0.5, **GEMMA, **SIZES)),
    # No attention.
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)),
}


@torch.inference_mode()
def test_a_model_is_asked_whether_it_reads_trees(items):
    assert reads_trees(llama(), items, 0, CPU) is True


@torch.inference_mode()
def test_only_the_shortest_groups_are_read_to_find_that_out(items):
    model, fed = llama(), []
    model.register_forward_pre_hook(lambda _, __, given: fed.append(given["input_ids"].shape), with_kwargs=True)
    short = [*items, *(Example((12, 13, 14, answer, 49), 3) for answer in (7, 8))]
    long = [Example((*range(40), answer, 49), 40) for answer in (7, 8)]
    assert reads_trees(model, short, 0, CPU) is True
    alone, fed[:] = fed.copy(), []
    assert reads_trees(model, [*long, *short, *long], 0, CPU) is True
    assert fed == alone


@torch.inference_mode()
@pytest.mark.parametrize("name", OTHERS)
def test_models_that_do_not_attend_as_told_are_found_out(name, items):
    torch.manual_seed(0)
    assert reads_trees(OTHERS[name]().eval(), items, 0, CPU) is False


@torch.inference_mode()
@pytest.mark.parametrize(("window", "expected"), [(4, False), (64, True)])
def test_a_model_that_looks_back_only_so_far_keeps_its_own_mask(items, window, expected):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=50, sliding_window=window, num_key_value_heads=1, **SIZES)).eval()
    assert reads_trees(model, items, 0, CPU) is expected


@torch.inference_mode()
def test_a_model_that_no_longer_listens_cannot_tell(items):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    assert reads_trees(model, items, 0, CPU) is None


@torch.inference_mode()
def test_questions_with_one_answer_each_have_nothing_to_share(items):
    assert reads_trees(llama(), items[::3], 0, CPU) is False
    assert accepts_logits_to_keep(llama())
