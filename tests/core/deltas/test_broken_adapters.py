"""Adapters broken at random: each is imported, or refused with its folder named; nothing else comes out."""

import json
import shutil

import pytest
import torch
from fuzzing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM

from uipe_core.deltas.checkpoints import check_checkpoint, checkpoint_identity, checkpoint_inputs, import_checkpoints
from uipe_core.deltas.store import DeltaStore
from uipe_core.errors import UserError
from uipe_core.models.skeleton import open_initial

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

VALUES = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 3, 2**31, 10**30, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "LORA",
        "3", "../..", "/", "\x1b[31m", "\ud800", "all-linear", [], ["q_proj"], [None], [[]], {}, {"q_proj": 1},
        {"a": {"b": [1]}},
    ]
) | st.text(max_size=8)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folder with a small model and an adapter of it, and the model opened."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sound")
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(root / "initial")
    settings = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    wrapped = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(root / "adapter")
    return root / "adapter", open_initial(root / "initial")


def broken_config(data, text):
    """The configuration with a key changed, removed or renamed, or a text that is none."""
    config = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(config)) | st.text(max_size=6)) if config else "r"
        how = data.draw(st.sampled_from(["value", "value", "value", "delete", "rename", "text", "whole"]))
        if how == "value":
            config[key] = data.draw(VALUES)
        elif how == "delete":
            config.pop(key, None)
        elif how == "rename":
            config[data.draw(st.sampled_from(["rank", "alpha", "lora_r", ""]))] = config.pop(key, None)
        elif how == "whole":
            return json.dumps(data.draw(VALUES)).encode()
        else:
            written = json.dumps(config).encode()
            return written[: data.draw(st.integers(0, len(written)))] + data.draw(st.binary(max_size=6))
    return json.dumps(config).encode()


def broken_tensors(data, content):
    """The weights with a tensor changed, removed or renamed, written anew."""
    tensors = load(content)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors))) if tensors else "x"
        how = data.draw(st.sampled_from(["delete", "rename", "shape", "dtype", "value", "more"]))
        tensor = tensors.pop(name, torch.zeros(1))
        if how == "rename":
            tensors[data.draw(st.sampled_from([name.upper(), f"x.{name}", name.replace("lora_A", "lora_B"), "", "a/../b"]))] = (
                tensor
            )
        elif how == "shape":
            tensors[name] = torch.ones(data.draw(st.lists(st.integers(0, 17), max_size=3)))
        elif how == "dtype":
            tensors[name] = tensor.to(
                data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]))
            )
        elif how == "value":
            filled = data.draw(st.sampled_from([0.0, float("nan"), float("inf"), 3e38]))
            tensors[name] = torch.full(tensor.shape, filled)
        elif how == "more":
            tensors |= {name: tensor, data.draw(st.text(max_size=6)): torch.ones(2, 2)}
    return save(tensors)


def broken_bytes(data, content):
    """The file with some bytes changed, most of them in its header, or cut off."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 7) | st.integers(8, 1500) | st.integers(0, len(content) - 1))
        content[min(place, len(content) - 1)] = data.draw(st.integers(0, 255))
    return bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])


@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_broken_adapter_is_imported_or_refused(sound, tmp_path_factory, data):
    adapter, initial = sound
    folder = tmp_path_factory.getbasetemp() / "broken-adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    config, weights = (adapter / CONFIG).read_text(), (adapter / WEIGHTS).read_bytes()
    what = data.draw(st.sampled_from(["config", "tensors", "bytes", "both"]))
    if what in ("config", "both"):
        (folder / CONFIG).write_bytes(broken_config(data, config))
    if what in ("tensors", "both"):
        (folder / WEIGHTS).write_bytes(broken_tensors(data, weights))
    elif what == "bytes":
        (folder / WEIGHTS).write_bytes(broken_bytes(data, weights))
    store = folder.with_name("broken-adapter-deltas")
    shutil.rmtree(store, ignore_errors=True)
    try:
        check_checkpoint(initial, folder)
        wanted = [(folder, checkpoint_inputs("initial", checkpoint_identity(folder)))]
        (update,) = [import_checkpoints(initial, wanted, DeltaStore(store)).load(1)]
    except UserError as error:
        assert str(folder) in str(error)
        str(error).encode()
        return
    assert all(torch.isfinite(tensor).all() for tensor in update.tensors.values())
