"""Rounded weights: grids against independent computations, properties, which layers, and that all comes back to the bit."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from uipe_core.audits import quantisation
from uipe_core.audits.quantisation import GRIDS, NF4_LEVELS, round_weights, rounded, rounded_names
from uipe_core.deltas.extrapolation import merge
from uipe_core.errors import UserError

QLORA = """
-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0
"""
"""As printed in appendix E of QLoRA."""


def drawn(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gpt2(**settings):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, **settings)).eval()


def test_levels_are_the_published_ones():
    assert [float(level) for level in QLORA.split(",")] == list(NF4_LEVELS)


def test_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA's construction: quantiles of 8 positive and 7 negative halves, divided by the largest."""
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0.0, *negative]) / positive.max()
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=2e-7)


def brute_nf4(weight):
    flat, result = weight.numpy().reshape(-1), []
    levels = np.array(NF4_LEVELS, dtype=np.float32)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = np.abs(block).max()
        for value in block:
            share = np.float32(value / scale) if scale else np.float32(0)
            distances = [abs(float(share) - float(level)) for level in levels]
            result.append(levels[int(np.argmin(distances))] * scale)
    return np.array(result, dtype=np.float32).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(3, 64), (5, 50), (1, 1), (7, 13)])
def test_nf4_takes_the_nearest_level_of_each_block(shape):
    weight = drawn(shape)
    np.testing.assert_array_equal(quantisation.to_nf4(weight).numpy(), brute_nf4(weight))


def brute_steps(weight, group, largest):
    rows = []
    for row in weight.numpy():
        parts = [row[start : start + group] for start in range(0, len(row), group)]
        steps = [np.abs(part).max() / np.float32(largest) for part in parts]
        rows.append(np.concatenate([np.round(part / step) * step for part, step in zip(parts, steps, strict=True)]))
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("inputs", [1, 100, 128, 129, 300])
def test_int4_rounds_groups_of_128_inputs(inputs):
    weight = drawn((4, inputs))
    np.testing.assert_array_equal(quantisation.to_int4(weight).numpy(), brute_steps(weight, 128, 7))


@pytest.mark.parametrize("inputs", [1, 64, 300])
def test_int8_is_torchs_own_to_the_bit(inputs):
    weight = drawn((32, inputs))
    steps = weight.abs().amax(dim=1) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still the independent computation
        torchs = torch.quantize_per_channel(weight, steps, torch.zeros(32, dtype=torch.long), 0, torch.qint8).dequantize()
    found = quantisation.to_int8(weight)
    assert torch.equal(found, torchs)
    assert torch.equal(found, torch.from_numpy(brute_steps(weight, inputs, 127)))


values = st.floats(-100, 100, width=32).map(lambda value: value if abs(value) > 1e-20 else 0.0)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 140))


@st.composite
def weights(draw):
    rows, inputs = draw(shapes)
    chosen = draw(st.lists(values, min_size=1, max_size=12))
    order = np.random.default_rng(draw(st.integers(0, 99))).integers(len(chosen), size=rows * inputs)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return torch.tensor(chosen, dtype=torch.float32)[order].view(rows, inputs).to(dtype)


GAP = {"int8": 1 / 254, "int4": 1 / 14, "nf4": (1 - 0.6961928009986877) / 2}
"""Largest error as a share of absmax: half the widest step."""


@pytest.mark.parametrize("grid", GRIDS)
@settings(deadline=None, max_examples=60)
@given(weight=weights())
def test_rounding_keeps_absmax_stays_within_half_a_step_and_twice_is_once(grid, weight):
    once = GRIDS[grid](weight.float()).to(weight.dtype)
    assert torch.equal(GRIDS[grid](once.float()).to(weight.dtype), once)
    largest = weight.float().abs().max()
    torch.testing.assert_close(once.float().abs().max(), largest, rtol=1.2e-7, atol=1e-12)
    eps = torch.finfo(weight.dtype).eps
    assert float((once.float() - weight.float()).abs().max()) <= float(largest) * (GAP[grid] * (1 + 1e-5) + eps) + 1e-7
    assert len(once.unique()) <= {"int8": 255, "int4": 15, "nf4": 16}[grid] * weight.numel()


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_stay_zeros(grid):
    assert torch.equal(GRIDS[grid](torch.zeros(3, 70)), torch.zeros(3, 70))
    assert torch.equal(GRIDS[grid](torch.full((2, 3), 1e-44)).isfinite(), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
def test_weights_come_back_to_the_bit(load_tiny, grid, dtype):
    model = load_tiny().model.to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with rounded(model, grid) as held:
        changed = {name for name, parameter in held.named_parameters() if not torch.equal(parameter, before[name])}
        assert {parameter.dtype for parameter in held.parameters()} == {dtype}
    assert changed == set(rounded_names(model))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_weights_come_back_after_an_error(load_tiny):
    model = load_tiny().model
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), rounded(model, "nf4"):
        raise ZeroDivisionError
    assert all(map(torch.equal, model.parameters(), before))


def test_head_and_embeddings_stay(load_tiny):
    model = load_tiny().model
    names = rounded_names(model)
    assert names
    assert all(".layers." in name for name in names)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_stays_whether_it_is_tied_or_not(tied):
    names = rounded_names(gpt2(tie_word_embeddings=tied))
    assert names == [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_conv1d_is_rounded_as_its_transpose():
    layer = Conv1D(6, 200)  # 6 outputs, 200 inputs, stored as (in, out)
    original = layer.weight.detach().clone()
    holder = nn.Sequential(layer)
    for grid, rounding in GRIDS.items():
        with rounded(holder, grid):
            assert torch.equal(layer.weight, rounding(original.T.contiguous()).T)


def test_a_shared_weight_is_rounded_once():
    one, other = nn.Linear(70, 5, bias=False), nn.Linear(70, 5, bias=False)
    other.weight = one.weight
    model = nn.Sequential(one, other)
    assert rounded_names(model) == ["0.weight"]
    expected = GRIDS["int8"](one.weight.detach().clone())
    round_weights(model, "int8")
    assert torch.equal(other.weight, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_changes(load_tiny, bad):
    model = load_tiny().model
    name = rounded_names(model)[-1]
    with torch.no_grad():
        dict(model.named_parameters())[name][0, 0] = bad
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(UserError, match=f"quantisation: {name} is not finite"):
        round_weights(model, "int4")
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(model.parameters(), before, strict=True))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="has no linear layer"):
        round_weights(nn.Sequential(nn.Embedding(4, 4)), "nf4")


def test_an_adapter_must_be_merged_first(load_tiny):
    from uipe_core.models.transformers_compat import wrap_adapter

    model = wrap_adapter(load_tiny().model, {"r": 2, "target_modules": ["q_proj"]})
    with pytest.raises(UserError, match="merge it first"):
        round_weights(model, "nf4")
    round_weights(merge(model), "nf4")


def test_an_unknown_grid_is_named(load_tiny):
    with pytest.raises(UserError, match=r"'nf5' is unknown; known: int8, int4, nf4. Did you mean 'nf4'"):
        round_weights(load_tiny().model, "nf5")
