"""Activations of decoder layers, on small random models of several architectures."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from uipe_core.errors import UserError
from uipe_core.models.transformers_compat import wrap_adapter
from uipe_core.unlearning.steering import control_direction, decoder_layer, model_depth, outputs_of, train_down_projections

SHAPE = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=4, n_head=2)),
    # As many experts as layers: the list of layers must not be taken for a list of experts.
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)),
}
DOWN_PROJECTION = {"llama": "down_proj", "phi": "fc2", "neox": "dense_4h_to_h", "gpt2": "c_proj", "mixtral": "down_proj"}
IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def model(architecture):
    torch.manual_seed(0)
    return ARCHITECTURES[architecture]().eval()


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 2])
def test_outputs_are_the_hidden_states_after_the_layer(index, model):
    with outputs_of(decoder_layer(model, index)) as outputs:
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states[index + 1]
    assert len(outputs) == 1
    assert torch.equal(outputs[0], expected)


@torch.no_grad()
def test_outputs_of_the_last_layer_come_before_the_final_norm(model):
    with outputs_of(decoder_layer(model, 3)) as outputs:
        normed = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    assert outputs[0].shape == normed.shape
    assert not torch.allclose(outputs[0], normed)


@torch.no_grad()
def test_nothing_is_collected_outside_the_context(model):
    with outputs_of(decoder_layer(model, 0)) as outputs:
        pass
    model(input_ids=IDS)
    assert outputs == []


def test_an_adapter_hides_no_layer():
    model = ARCHITECTURES["llama"]()
    layer = decoder_layer(model, 1)
    assert decoder_layer(wrap_adapter(model, {"r": 2, "target_modules": "all-linear"}), 1) is layer


@pytest.mark.parametrize(("index", "trained"), [(0, [0]), (1, [0, 1]), (3, [1, 2, 3])])
def test_trained_are_the_down_projections_of_the_layer_and_two_before_it(index, trained, architecture, model):
    train_down_projections(model, index)
    found = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(found) == len(trained)
    for name, layer in zip(found, trained, strict=True):
        assert f".{layer}." in name
        assert DOWN_PROJECTION[architecture] in name
        assert ".attn." not in name


@pytest.mark.parametrize("index", [4, 99])
def test_a_layer_out_of_range_is_named_with_the_choice(index, model):
    with pytest.raises(UserError, match=rf"layer: found {index}, but the model has 4 decoder layers, .* choose 0 to 3"):
        decoder_layer(model, index)


def test_layers_without_a_known_down_projection_are_refused():
    model = ARCHITECTURES["llama"]()
    for layer in model.model.layers:
        layer.mlp = torch.nn.Linear(8, 8)
    with pytest.raises(UserError, match="no down projection under a known name; use a LoRA adapter"):
        train_down_projections(model, 1)


def test_depth_is_read_from_a_saved_configuration(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    assert model_depth(str(tmp_path)) == 4


def test_depth_of_a_folder_without_configuration_is_unknown(tmp_path):
    assert model_depth(str(tmp_path)) is None


def test_the_direction_is_positive_of_length_one_and_follows_the_seed():
    direction = control_direction(64, seed=3)
    assert float(direction.norm()) == pytest.approx(1.0, abs=1e-6)
    assert (direction >= 0).all()
    assert torch.equal(direction, control_direction(64, seed=3))
    assert not torch.equal(direction, control_direction(64, seed=4))
