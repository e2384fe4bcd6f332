"""What `uipe validate` knows of a study's model: the names of its modules, its positions, its adapters."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


@pytest.fixture
def pretrained(llama3, tmp_path):
    """Folder of a small GPT-2 or Llama with a tokenizer of bytes, and the model section that names it."""

    def make(kind, **shape):
        torch.manual_seed(0)
        tokenizer = llama3.of_bytes(["Who is it?", "It is a name."], 400)
        if kind == "gpt2":
            config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, **shape)
            model = GPT2LMHeadModel(config)
        else:
            size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **shape))
        folder = tmp_path / kind
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {"kind": "pretrained", "initial": str(folder), "retain": str(folder), "prompt_template": "{question} "}

    return make


def with_targets(*names):
    methods = {"grad_diff": {}}
    return {"methods": methods, "epochs": 1, "learning_rate": 0.001, "adapter": {"target_modules": list(names)}}


def test_target_modules_of_relearning_are_checked_too(write_study, call, tmp_path):
    audit = {"relearning": {"adapter": {"target_modules": ["q_projj"]}}}
    code, _, error = call("validate", write_study(tmp_path / "study.yaml", audit=audit))
    assert code == 2
    assert "audit.relearning.adapter.target_modules: 'q_projj' is no module of it. Did you mean 'q_proj'?" in error


def test_target_modules_that_a_tiny_model_has_not_are_named(write_study, call, tmp_path):
    file = write_study(tmp_path / "study.yaml", unlearning=with_targets("q_projj", "v_proj", "embed_tokens"))
    code, _, error = call("validate", file)
    assert code == 2
    assert "unlearning.adapter.target_modules: 'q_projj' is no module of it. Did you mean 'q_proj'?" in error
    assert "'embed_tokens' is a Embedding, not a linear layer" in error
    assert "'v_proj'" not in error
    assert call("validate", write_study(tmp_path / "study.yaml", unlearning=with_targets("q_proj", "mlp.up_proj")))[0] == 0


def test_target_modules_of_a_saved_model_are_its_own(pretrained, write_study, call, tmp_path):
    model = pretrained("gpt2")
    code, _, error = call("validate", write_study(tmp_path / "a.yaml", model=model, unlearning=with_targets("q_proj")))
    assert code == 2
    assert "'q_proj' is no module of it" in error
    assert "are c_attn, c_proj, c_fc, lm_head; choose from these, or write all-linear" in error
    code, _, error = call("validate", write_study(tmp_path / "b.yaml", model=model, unlearning=with_targets("c_attn")))
    assert code == 0, error


def test_items_longer_than_the_models_positions_are_named(pretrained, write_study, call, tmp_path):
    model = pretrained("gpt2", n_positions=40)
    code, _, error = call("validate", write_study(tmp_path / "a.yaml", model=model))
    assert code == 2
    assert "tokens with its answer, and the model has 40 positions; shorten or leave out the item" in error
    # The same items, with room for them and not for a text of 600 tokens.
    model = pretrained("gpt2", n_positions=600)
    file = write_study(tmp_path / "b.yaml", model=model, scoring={"max_new_tokens": 600})
    code, _, error = call("validate", file)
    assert code == 2
    assert "scoring.max_new_tokens: the prompt of" in error and "the model has 600 positions; set it to " in error
    code, _, error = call("validate", write_study(tmp_path / "c.yaml", model=model))
    assert code == 0, error


def test_an_adapter_of_another_model_gets_a_note(pretrained, write_study, call, tmp_path):
    model = pretrained("llama")
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(model["initial"]), LoraConfig(target_modules=["q_proj"]))
    torch.nn.init.ones_(wrapped.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    wrapped.save_pretrained(tmp_path / "adapter")
    file = write_study(tmp_path / "a.yaml", model=model, unlearning=None, checkpoints={"given": str(tmp_path / "adapter")})
    code, output, error = call("validate", file)
    assert code == 0, error
    assert "was trained on" not in output
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "meta-llama/Llama-2-7b"}))
    code, output, _ = call("validate", file)
    assert code == 0
    assert "by its adapter_config.json it was trained on meta-llama/Llama-2-7b, and model.initial is" in output
