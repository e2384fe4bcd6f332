"""Update vectors: exact ends, arithmetic in fp32, no drift, low-rank without merging."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from uipe_core.deltas.extrapolation import Extrapolator, merge, scaled_factors
from uipe_core.deltas.files import load_update, save_update
from uipe_core.deltas.update_vectors import (
    DENSE,
    LOW_RANK,
    UpdateVector,
    adapter_scale,
    factors,
    random_direction,
    snapshot,
    take_update,
)
from uipe_core.models.transformers_compat import LORA_A, LORA_B, adapter_state, wrap_adapter

ALPHAS = st.floats(-1, 5, allow_nan=False)
SEEDS = st.integers(0, 2**31)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
QV = {"r": 3, "lora_alpha": 12.0, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


class Toy(nn.Module):
    def __init__(self, seed, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(scale * torch.randn(7, 5, generator=generator))
        self.vector = nn.Parameter(scale * torch.randn(11, generator=generator))


def trained(model, seed, scale):
    """Moves the weights as training would, by tiny and by large amounts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator) ** 3)


def dense_update(model, seed=1, scale=1e-2):
    """The update of a moved copy of the model."""
    moved = copy.deepcopy(model)
    initial = snapshot(moved)
    trained(moved, seed, scale)
    return take_update(moved, initial)


def llama(tied=False, hidden=16, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=hidden,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
    ).eval()


def low_rank_update(adapter=QV, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_state(wrap_adapter(llama(), adapter))
    tensors = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}
    return UpdateVector(LOW_RANK, tensors, adapter)


def merged(update, alpha):
    """The model with W + (1 + alpha) * scale * B A written into its weights."""
    model = llama()
    with torch.no_grad():
        for module, (a, b) in factors(update).items():
            weight = model.get_submodule(module.removeprefix("base_model.model.")).weight
            weight += (1 + alpha) * adapter_scale(update) * (b @ a)
    return model


def base_weights(model):
    """Weights of the model proper, whether or not it is wrapped."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


@given(SEEDS, st.sampled_from([1e-9, 1e-3, 1.0, 1e4]), st.sampled_from([1e-6, 1e-2, 1.0]))
@settings(max_examples=60, deadline=None)
def test_alpha_zero_is_the_trained_model_and_minus_one_the_initial_to_the_bit(seed, change, scale):
    model = Toy(seed, scale)
    pristine = snapshot(model)
    trained(model, seed + 1, change)
    before = snapshot(model)
    update = take_update(model, pristine)
    # Taking the update may move a weight, by the rounding of one sum and no more.
    for name, parameter in model.named_parameters():
        largest = torch.maximum(pristine[name].abs(), before[name].abs())
        assert (parameter - before[name]).abs().le(2.4e-7 * largest).all()

    walker = Extrapolator(Toy(seed, scale))
    assert_same(snapshot(walker.apply(update, 0.0)), snapshot(model))
    assert_same(snapshot(walker.apply(update, -1.0)), pristine)


@given(SEEDS, ALPHAS)
@settings(max_examples=60, deadline=None)
def test_weights_are_linear_in_alpha(seed, alpha):
    initial = Toy(seed)
    update = dense_update(initial, seed + 1, scale=0.3)
    moved = snapshot(Extrapolator(Toy(seed)).apply(update, alpha))
    for name, start in snapshot(initial).items():
        expected = start.double() + (1 + alpha) * update.tensors[name].double()
        size = start.double().abs() + (1 + alpha) * update.tensors[name].double().abs()
        assert (moved[name].double() - expected).abs().le(1.5e-7 * size + 1e-30).all()


@given(SEEDS, st.lists(ALPHAS, min_size=5, max_size=30), ALPHAS)
@settings(max_examples=20, deadline=None)
def test_a_walk_of_any_length_leaves_no_trace(seed, path, last):
    updates = [dense_update(Toy(seed), seed + shift, scale=1.0) for shift in (1, 2)]
    walker = Extrapolator(Toy(seed))
    for step, alpha in enumerate(path):
        walker.apply(updates[step % 2], alpha)
    assert_same(snapshot(walker.apply(updates[0], last)), snapshot(Extrapolator(Toy(seed)).apply(updates[0], last)))
    assert_same(snapshot(walker.reset()), snapshot(Toy(seed)))


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 1.0, 3.0])
def test_a_bf16_model_gets_the_fp32_sum_cast_once(alpha):
    stored = snapshot(Toy(0))
    update = dense_update(Toy(0), scale=3e-3)
    moved = snapshot(Extrapolator(Toy(0).bfloat16(), stored).apply(update, alpha))
    summed_in_bf16 = 0
    for name, start in stored.items():
        expected = (start.float() + (1 + alpha) * update.tensors[name]).bfloat16()
        assert moved[name].dtype == torch.bfloat16
        assert torch.equal(moved[name], expected)
        naive = start.bfloat16() + (1 + alpha) * update.tensors[name].bfloat16()
        summed_in_bf16 += int((naive != expected).sum())
    assert alpha == -1.0 or summed_in_bf16 > 0


def test_update_of_bf16_weights_trained_in_fp32_is_not_rounded():
    model = Toy(0).bfloat16()
    initial = snapshot(model)
    model.float()
    trained(model, 1, 1e-4)
    update = take_update(model, initial)
    assert all(tensor.dtype == torch.float32 for tensor in update.tensors.values())
    assert not torch.equal(update.tensors["matrix"], update.tensors["matrix"].bfloat16().float())
    assert_same(snapshot(Extrapolator(Toy(0).bfloat16().float(), initial).apply(update, 0.0)), snapshot(model))


def test_tied_weights_are_one_tensor_and_stay_tied():
    model = llama(tied=True)
    update = dense_update(model)
    assert "lm_head.weight" not in update.tensors
    moved = Extrapolator(model).apply(update, 1.0)
    assert moved.lm_head.weight.data_ptr() == moved.model.embed_tokens.weight.data_ptr()
    expected = llama(tied=True).model.embed_tokens.weight + 2 * update.tensors["model.embed_tokens.weight"]
    assert torch.equal(moved.lm_head.weight, expected)


def change_of(update, **changes):
    return UpdateVector(update.kind, {**update.tensors, **changes}, update.adapter)


def without(update, name):
    return UpdateVector(update.kind, {n: t for n, t in update.tensors.items() if n != name}, update.adapter)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda update: change_of(update, stranger=torch.ones(2)), "the model has not, first 'stranger'"),
        (lambda update: change_of(update, vector=torch.ones(2)), "vector: update has shape"),
        (lambda update: without(update, "vector"), "lacks 1 weights of the model, first 'vector'"),
    ],
)
def test_a_dense_update_of_another_model_is_refused_and_leaves_the_model_alone(spoil, message):
    walker = Extrapolator(Toy(0))
    with pytest.raises(ValueError, match=message):
        walker.apply(spoil(dense_update(Toy(0))), 0.5)
    assert_same(snapshot(walker.model), snapshot(Toy(0)))


LAST_A = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda update: change_of(update, stranger=torch.ones(2)), "the model has not, first 'stranger'"),
        (lambda update: change_of(update, **{LAST_A: torch.ones(3, 5)}), "update has shape"),
        (lambda update: without(update, LAST_A), "lacks 1 weights of the model"),
    ],
)
def test_a_low_rank_update_of_another_model_is_refused_and_the_next_one_works(spoil, message):
    walker, update = Extrapolator(llama()), low_rank_update()
    with pytest.raises(ValueError, match=message):
        walker.apply(spoil(update), 0.5)
    assert torch.equal(logits(walker.apply(update, 0.5)), logits(Extrapolator(llama()).apply(update, 0.5)))


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.7, 3.0])
def test_low_rank_equals_the_explicitly_merged_model(alpha):
    update = low_rank_update()
    moved = logits(Extrapolator(llama()).apply(update, alpha))
    assert torch.allclose(moved, logits(merged(update, alpha)), atol=1e-4)
    assert not torch.allclose(moved, logits(llama()), atol=1e-1)


def test_low_rank_never_touches_the_weights_and_ends_at_the_initial_model_to_the_bit():
    walker, update = Extrapolator(llama()), low_rank_update()
    for alpha in (0.0, 2.5, -0.3, -1.0):
        model = walker.apply(update, alpha)
        assert_same(base_weights(model), snapshot(llama()))
    assert torch.equal(logits(model), logits(llama()))
    walker.apply(update, 1.0)
    assert torch.equal(logits(walker.reset()), logits(llama()))


def test_low_rank_walk_leaves_no_trace():
    updates = [low_rank_update(seed=seed) for seed in (1, 2)]
    walker = Extrapolator(llama())
    for step in range(20):
        walker.apply(updates[step % 2], 0.1 * step)
    assert torch.equal(logits(walker.apply(updates[0], 0.3)), logits(Extrapolator(llama()).apply(updates[0], 0.3)))


@pytest.mark.parametrize(
    "other",
    [{**QV, "lora_alpha": 3.0}, {**QV, "r": 2}, {**QV, "target_modules": ["o_proj"]}],
    ids=["scale", "rank", "modules"],
)
def test_updates_with_different_adapters_can_follow_each_other(other):
    first, second = low_rank_update(QV), low_rank_update(other)
    walker = Extrapolator(llama())
    walker.apply(first, 0.5)
    assert torch.allclose(logits(walker.apply(second, 0.5)), logits(merged(second, 0.5)), atol=1e-4)
    assert torch.allclose(logits(walker.apply(first, 0.5)), logits(merged(first, 0.5)), atol=1e-4)


def test_dense_and_low_rank_updates_can_follow_each_other():
    dense, low_rank = dense_update(llama(), scale=0.1), low_rank_update()
    walker = Extrapolator(llama())
    walker.apply(dense, 0.5)
    assert torch.equal(logits(walker.apply(low_rank, 0.5)), logits(Extrapolator(llama()).apply(low_rank, 0.5)))
    assert_same(snapshot(walker.apply(dense, 0.5)), snapshot(Extrapolator(llama()).apply(dense, 0.5)))
    assert_same(snapshot(walker.reset()), snapshot(llama()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.0, 0.7])
def test_a_saved_adapter_has_the_numbers_of_the_walk_to_the_bit(tmp_path, dtype, alpha):
    """transformers rounds factors to the dtype of the weights, so the walk does: its adapter is scored as it is loaded."""
    update = low_rank_update()
    llama().to(dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    before = logits(base)
    model = Extrapolator(base).apply(update, alpha)
    walked = logits(model)
    state = adapter_state(model)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in scaled_factors(update, alpha).items())
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype).eval()
    assert torch.equal(logits(again), walked)
    assert torch.equal(walked, before) == (alpha == -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_weight_is_the_sum_rounded_once_and_at_random_to_one_of_its_neighbours(dtype):
    update, module = low_rank_update(), "model.layers.0.self_attn.q_proj"
    start = llama().to(dtype).get_submodule(module).weight
    name = f"base_model.model.{module}"
    a, b = (scaled_factors(update, 0.5)[name + end].to(dtype).double() for end in (LORA_A, LORA_B))
    total = start.double() + adapter_scale(update) * (b @ a)
    merges = {
        seed: merge(Extrapolator(llama().to(dtype)).apply(update, 0.5), seed).get_submodule(module).weight
        for seed in (None, 1, 2)
    }
    assert torch.equal(merges[None], total.to(dtype))
    assert not torch.equal(merges[1], merges[2])
    gap = 2 * torch.finfo(dtype).eps * total.abs()
    assert all(((weight.double() - total).abs() <= gap).all() for weight in merges.values())
    assert torch.equal(merge(Extrapolator(llama().to(dtype)).apply(update, -1.0), 1).get_submodule(module).weight, start)


def test_low_rank_norm_is_that_of_the_explicit_product():
    update = low_rank_update()
    scale = QV["lora_alpha"] / QV["r"]
    products = {module: scale * float((b.double() @ a.double()).norm()) for module, (a, b) in factors(update).items()}
    assert len(products) == 4
    assert update.norms == pytest.approx(products, rel=1e-6)
    assert update.norm == pytest.approx(sum(norm**2 for norm in products.values()) ** 0.5)


def test_dense_norm_is_summed_in_double_precision():
    # In single precision the squares of the first would vanish.
    tensors = {"a": torch.full((1, 30), 1e-25), "b": torch.full((4,), 2.0)}
    update = UpdateVector(DENSE, tensors)
    assert update.norms["a"] == pytest.approx(30**0.5 * 1e-25, rel=1e-6, abs=0)
    assert update.norm == pytest.approx(4.0)


@pytest.mark.parametrize("make", [lambda: dense_update(llama()), low_rank_update], ids=[DENSE, LOW_RANK])
def test_random_direction_has_the_same_norms_and_is_decided_by_its_seed(make):
    update = make()
    drawn, again, other = (random_direction(update, seed) for seed in (7, 7, 8))
    assert drawn.norms == pytest.approx(update.norms, rel=1e-5)
    assert drawn.tensors.keys() == update.tensors.keys()
    assert_same(dict(again.tensors), dict(drawn.tensors))
    assert not any(torch.equal(other.tensors[name], tensor) for name, tensor in drawn.tensors.items())
    # Independent directions in high dimension are nearly orthogonal.
    pairs = [(drawn.tensors[name].flatten(), tensor.flatten()) for name, tensor in update.tensors.items()]
    cosines = [float(torch.cosine_similarity(one, two, dim=0)) for one, two in pairs if one.numel() >= 256]
    assert all(abs(cosine) < 0.3 for cosine in cosines)
    Extrapolator(llama()).apply(drawn, 1.0)


def test_random_direction_of_nothing_is_nothing():
    update = UpdateVector(DENSE, {"a": torch.zeros(5)})
    assert torch.equal(random_direction(update, 0).tensors["a"], torch.zeros(5))


def test_random_direction_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_direction(dense_update(Toy(0)), 1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("make", [lambda: dense_update(llama(tied=True)), low_rank_update], ids=[DENSE, LOW_RANK])
def test_a_saved_update_comes_back_to_the_bit(make, tmp_path):
    update = make()
    save_update(update, tmp_path / "update.safetensors")
    loaded = load_update(tmp_path / "update.safetensors")
    assert (loaded.kind, loaded.adapter) == (update.kind, update.adapter)
    assert_same(dict(loaded.tensors), dict(update.tensors))


def test_a_dense_update_has_no_adapter_scale():
    with pytest.raises(ValueError, match="no adapter"):
        adapter_scale(dense_update(Toy(0)))
