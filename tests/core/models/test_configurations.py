"""Keys of config.json: those that change what a model computes refuse a checkpoint, all others do not."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MptConfig, Qwen2Config

from uipe_core.models.configurations import differences
from uipe_core.models.skeleton import meta_model

SHARED = Path(os.environ.get("UIPE_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
KEYS = SHARED / "cases" / "small" / "config_keys.json"

SMALL = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SMALL)
GPT2 = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)
MPT = MptConfig(vocab_size=20, d_model=16, n_layers=1, n_heads=2, max_seq_len=32)
YARN = LlamaConfig(**SMALL, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})


def between(config, folder, **changes):
    """What is said of a checkpoint whose config.json differs from the initial model's by some keys."""
    AutoModelForCausalLM.from_config(config).config.save_pretrained(folder)
    model = meta_model(str(folder))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return differences(model, AutoConfig.from_pretrained(folder))


HARMLESS = [
    {"unsloth_version": "2025.3.1"},
    {"unsloth_fixed": True},
    {"_attn_implementation_autoset": True},
    {"attn_implementation": "eager"},
    {"tokenizer_class": "LlamaTokenizer"},
    {"model_name": "x"},
    {"finetuning_task": None},
    {"torchscript": True},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"max_position_embeddings": 32768},
    {"torch_dtype": "bfloat16"},
    {"trainable_params": {"a": [1]}},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_keys_that_compute_nothing_do_not_differ(changes, tmp_path):
    assert between(LLAMA, tmp_path, **changes) == []


@pytest.mark.skipif(not KEYS.exists(), reason="the shared cases are not here")
def test_keys_from_public_reports_do_not_differ(tmp_path):
    keys = {key: value for key, value in json.loads(KEYS.read_text()).items() if not key.startswith("_comment")}
    assert len(keys) > 5
    for number, (key, value) in enumerate(keys.items()):
        assert between(LLAMA, tmp_path / str(number), **{key: value}) == []


@pytest.mark.parametrize(
    ("config", "changes", "key"),
    [
        (LLAMA, {"num_attention_heads": 4}, "num_attention_heads"),
        (LLAMA, {"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        (YARN, {"max_position_embeddings": 32768}, "max_position_embeddings"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"n_positions": 64}, "n_positions"),
        (MPT, {"attn_config": {"alibi_bias_max": 4}}, "attn_config.alibi_bias_max"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_that_compute_something_differ(config, changes, key, tmp_path):
    found = between(config, tmp_path, **changes)
    assert [each.partition(":")[0] for each in found] == [key]


@pytest.mark.parametrize("config", [LLAMA, GPT2, MPT, YARN], ids=lambda config: config.model_type)
def test_a_model_does_not_differ_from_its_own_folder(config, tmp_path):
    assert between(config, tmp_path) == []


def test_a_key_that_the_model_reads_without_declaring_it_differs(tmp_path):
    """Qwen2 reads ``head_dim`` by getattr: no field of its configuration, and yet it sets shapes and angles."""
    assert "head_dim" not in vars(Qwen2Config(**SMALL))
    found = between(Qwen2Config(**SMALL, num_key_value_heads=2), tmp_path, head_dim=4)
    assert found == ["head_dim: 4, initial model None"]


def test_keys_of_trusted_code_all_count(tmp_path, monkeypatch):
    from transformers.utils import hub

    monkeypatch.setattr(hub, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    config = LlamaConfig(**SMALL)
    config.auto_map = {"AutoConfig": "modeling.StrangeConfig", "AutoModelForCausalLM": "modeling.StrangeLlama"}
    config.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "strange_llama"}
    (folder / "config.json").write_text(json.dumps(text))
    (folder / "modeling.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange_llama'\n"
        "class StrangeLlama(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    model = meta_model(str(folder), trust_remote_code=True)
    (folder / "config.json").write_text(json.dumps({**text, "secret_scale": 2}))
    theirs = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert differences(model, theirs) == ["secret_scale: 2, initial model None"]
    assert model.dtype == torch.float32
