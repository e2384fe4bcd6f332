"""bf16 and fp16 products by way of fp32: as exact as torch's own, and only where the processor has no instructions for them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from uipe_core.corpora.types import Corpus
from uipe_core.scoring import half_precision
from uipe_core.scoring.half_precision import FEW, fast_products, lacks_instructions
from uipe_core.scoring.scorer import Scorer, ScoringConfig

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def without_instructions(monkeypatch):
    monkeypatch.setattr(half_precision, "lacks_instructions", lambda dtype: dtype in HALVES)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, FEW, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_the_exact_one_rounded_once(dtype, rows, bias, without_instructions):
    torch.manual_seed(0)
    layer, values = torch.nn.Linear(64, 32, bias=bias).to(dtype), torch.randn(2, rows, 64).to(dtype)
    exact = F.linear(values.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with fast_products(dtype, CPU):
        found = layer(values)
    assert found.dtype == dtype
    # Half a unit in the last place, and what sums in fp32 lose.
    unit = torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-5).all()


def test_where_there_are_instructions_and_in_fp32_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(half_precision, "lacks_instructions", lambda dtype: False)
    torch.manual_seed(0)
    layer, values = torch.nn.Linear(64, 32).bfloat16(), torch.randn(40, 64).bfloat16()
    with fast_products(torch.bfloat16, CPU):
        assert torch.equal(layer(values), F.linear(values, layer.weight, layer.bias))
    assert not lacks_instructions(torch.float32)
    assert isinstance(lacks_instructions(torch.bfloat16), bool)


def test_a_bf16_model_is_scored_as_torch_multiplies_it_and_callers_are_left_alone(load_tiny, world, monkeypatch):
    corpus = Corpus("few", {name: items[::5] for name, items in world.sets.items()}, (), ())
    reports = []
    for lacks in (True, False):
        monkeypatch.setattr(half_precision, "lacks_instructions", lambda dtype, lacks=lacks: lacks)
        loaded, modes = load_tiny("bfloat16"), set()
        loaded.model.register_forward_pre_hook(
            lambda *_, m=modes: m.add(len(torch.overrides._get_current_function_mode_stack()))
        )
        stages = Scorer(corpus, loaded.prompts, ScoringConfig(16, 6)).stages(loaded)
        next(stages)
        # Between stages a caller's own products are torch's.
        assert not torch.overrides._get_current_function_mode_stack()
        reports.append(list(stages)[-1])
        # Every pass, also those that find out how the model can be read.
        assert modes == {int(lacks)}
    for name, scores in reports[0].sets.items():
        np.testing.assert_allclose(scores.answer_loss, reports[1].sets[name].answer_loss, rtol=0.05, atol=0.02)


def test_bfloat16_is_proposed_for_large_models_that_it_makes_clearly_faster(monkeypatch):
    assert half_precision.bfloat16_speed() > 0
    monkeypatch.setattr(half_precision, "bfloat16_speed", lambda: 2.25)
    assert half_precision.faster_in_bfloat16(half_precision.LARGE) == 2.25
    assert half_precision.faster_in_bfloat16(half_precision.LARGE - 1) is None
    monkeypatch.setattr(half_precision, "bfloat16_speed", lambda: 1.2)
    assert half_precision.faster_in_bfloat16(half_precision.LARGE) is None
