"""Every causal language model that transformers builds, small: saved, taken as a checkpoint, walked to alpha = 0."""

import json
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from uipe_core.deltas.checkpoints import check_checkpoint, import_checkpoints
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.store import DeltaStore
from uipe_core.errors import UserError
from uipe_core.models.skeleton import open_initial

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])

SMALL = {
    64: "vocab_size max_position_embeddings n_positions max_seq_len model_max_length vocab_size_per_layer_input "
    "audio_vocab_size decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size shape_vocab_size "
    "ngram_vocab_size_base encoder_hash_byte_group_vocab mamba_d_ssm mamba_intermediate_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dense_intermediate_size "
    "intermediate_size_mlp",
    32: "hidden_size n_embd d_model embedding_size word_embed_proj_dim image_size out_hidden_size dim_ff emb_dim "
    "lru_width pronunciation_embed_dim shape_embed_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size kv_lora_rank q_lora_rank "
    "patch_size num_position_embeddings expert_ffn_hidden_size prompt_length dim_head",
    8: "head_dim qk_rope_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size state_size "
    "hidden_size_per_layer_input index_head_dim sliding_window chunk_size mamba_num_heads mamba_head_dim "
    "ssm_state_size swa_head_dim attention_head_dim",
    4: "num_attention_heads n_head n_heads num_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts decoder_attention_heads encoder_attention_heads linear_num_value_heads time_step_rank "
    "mamba_dt_rank rotary_dim zero_expert_num linear_num_heads swa_num_attention_heads",
    2: "num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_experts_per_tok moe_topk "
    "num_experts_per_token decoder_layers encoder_layers linear_num_key_heads type_vocab_size index_n_heads "
    "depth n_groups n_langs swa_num_key_value_heads moe_k",
    1: "topk_group n_group first_k_dense_replace n_shared_experts max_window_layers num_mem_blocks",
}  # fmt: skip
"""Sizes by the names that configurations give them."""
SIZE_OF = {name: size for size, names in SMALL.items() for name in names.split()}

HEADS = {"num_key_value_heads": 4}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}
SPECIAL = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), HEADS),
    **dict.fromkeys(("minicpm3", "youtu", "nemotron", "longcat_flash", "dots3_note_text"), HEADS),
    "deepseek_v2": {**HEADS, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), LINEAR_FIRST),
    **{kind: {"text_config": LINEAR_FIRST} for kind in ("qwen3_5", "qwen3_5_moe")},
    "qwen4_exp_text": {**LINEAR_FIRST, **INDEXER},
    "qwen4_exp": {"text_config": {**LINEAR_FIRST, **INDEXER}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "xlm": {"n_langs": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the sizes by name do not say."""

NOT_TRIED = {
    **dict.fromkeys(("emu3", "mllama"), "saved as the text model inside, for which transformers has no class of its own"),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody", "cohere_compass_text"), "transformers cannot build it from its configuration"
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model and cannot run alone"),
    **dict.fromkeys(("blt", "dots3_note"), "its configuration has no small form"),
}
"""Why a type cannot be tried."""


def small_values(sample):
    """Values that make a configuration small, and its sections too."""
    found = {}
    for field in fields(sample):
        name = field.name
        # Configurations whose layers differ refuse to be asked for one value.
        value = vars(sample).get(name)
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found[name] = {**small_values(value), "model_type": value.model_type}
        elif name == "is_decoder":
            found[name] = True
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in SIZE_OF:
            found[name] = SIZE_OF[name]
        elif name.endswith(("_token_id", "_token_index")):
            found[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(name, 60)
    return found


def small_model(kind):
    """A model of a type with random weights."""
    cls = CONFIG_MAPPING[kind]
    found = small_values(cls())
    for key, value in SPECIAL.get(kind, {}).items():
        found[key] = {**found[key], **value} if isinstance(value, dict) and isinstance(found.get(key), dict) else value
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cls(**found)).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**7, "a size of this configuration is not in SMALL"
    return moved(model, 0.2, 0)


@torch.no_grad()
def moved(model, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def walk_to_zero(kind, folder):
    """Assert that theta(0) of a checkpoint computes what the checkpoint computes."""
    model = small_model(kind)
    model.save_pretrained(folder / "initial")
    moved(model, 0.05, 1).save_pretrained(folder / "checkpoint")
    expected, start = logits(loaded(folder / "checkpoint")), loaded(folder / "initial")
    assert not torch.allclose(logits(start), expected, atol=1e-4)
    initial = open_initial(folder / "initial")
    check_checkpoint(initial, folder / "checkpoint")
    run = import_checkpoints(initial, [(folder / "checkpoint", {"checkpoint": kind})], DeltaStore(folder / "deltas"))
    torch.testing.assert_close(logits(Extrapolator(start).apply(run.load(1), 0.0)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mixtral", "gemma3", "llama", "mpt"])
def test_a_checkpoint_at_alpha_zero_computes_what_it_computes(kind, tmp_path):
    walk_to_zero(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_of_every_model_type_too(kind, tmp_path):
    if kind in NOT_TRIED:
        pytest.skip(NOT_TRIED[kind])
    try:
        walk_to_zero(kind, tmp_path)
    except ImportError as error:
        pytest.skip(f"needs another package: {error}")


def stored_names(folder):
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),
        ("gpt_neox", "embed_out.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("qwen2_moe", "model.layers.0.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_files_have_the_names_of_the_hub(kind, name, tmp_path):
    small_model(kind).save_pretrained(tmp_path)
    assert name in stored_names(tmp_path)
    assert set(open_initial(tmp_path).weights) == dict(small_model(kind).named_parameters()).keys()


def change_file(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.update({EXPERT: torch.ones(16, 8)}),
            r"8 tensors, first .*experts.0.w1.weight, cannot be made into .*gate_up_proj of model type mixtral",
        ),
        (lambda tensors: tensors.pop(EXPERT.replace("w1", "w2")), r"1 of another shape .*experts.down_proj \[3, 32, 48\]"),
        (lambda tensors: tensors.update({"model.layers.0.extra": torch.ones(2)}), r"1 unexpected .*; model type mixtral"),
        (lambda tensors: tensors.update({EXPERT: torch.ones(48, 32, dtype=torch.int8)}), "cannot be made|holds weights as I8"),
    ],
)
def test_experts_that_do_not_fit_are_refused_by_model_type(change, said, tmp_path):
    for name in ("initial", "checkpoint"):
        small_model("mixtral").save_pretrained(tmp_path / name)
    change_file(tmp_path / "checkpoint", change)
    with pytest.raises(UserError, match=said):
        check_checkpoint(open_initial(tmp_path / "initial"), tmp_path / "checkpoint")


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


def test_a_buffer_that_differs_is_no_update_and_is_refused(tmp_path):
    model = small_model("deepseek_v3")
    model.save_pretrained(tmp_path / "initial")
    moved(model, 0.05, 1).save_pretrained(tmp_path / "checkpoint")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert name in stored_names(tmp_path / "checkpoint")
    check_checkpoint(open_initial(tmp_path / "initial"), tmp_path / "checkpoint")
    change_file(tmp_path / "checkpoint", lambda tensors: tensors[name].add_(1))
    with pytest.raises(UserError, match=r"1 buffers are not those of the initial model \(.*e_score_correction_bias\)"):
        check_checkpoint(open_initial(tmp_path / "initial"), tmp_path / "checkpoint")


def test_weights_that_loading_keeps_in_fp32_start_there(tmp_path, monkeypatch):
    model = small_model("llama")
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules_strict", {"norm"})
    model.save_pretrained(tmp_path / "initial")
    moved(model, 0.05, 1).save_pretrained(tmp_path / "checkpoint")
    for name in ("initial", "checkpoint"):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    start, expected = loaded(tmp_path / "initial"), loaded(tmp_path / "checkpoint")
    assert (start.model.norm.weight.dtype, start.lm_head.weight.dtype) == (torch.float32, torch.bfloat16)
    wanted = [(tmp_path / "checkpoint", {"checkpoint": "x"})]
    run = import_checkpoints(open_initial(tmp_path / "initial"), wanted, DeltaStore(tmp_path / "deltas"))
    walked = Extrapolator(start).apply(run.load(1), 0.0)
    torch.testing.assert_close(walked.model.norm.weight, expected.model.norm.weight, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"fan_in_fan_out": True}, {"fan_in_fan_out": True, "use_rslora": True}], ids=str)
def test_a_gpt2_adapter_is_what_peft_makes_of_it(settings, tmp_path):
    small_model("gpt2").save_pretrained(tmp_path / "initial")
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=12, target_modules=["c_attn", "c_proj", "c_fc"], **settings)
    wrapped = get_peft_model(loaded(tmp_path / "initial"), config)
    moved(wrapped, 0.0, 0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    initial = open_initial(tmp_path / "initial")
    run = import_checkpoints(initial, [(tmp_path / "adapter", {"checkpoint": "a"})], DeltaStore(tmp_path / "deltas"))
    expected = PeftModel.from_pretrained(loaded(tmp_path / "initial"), tmp_path / "adapter").eval()
    walker = Extrapolator(loaded(tmp_path / "initial"))
    torch.testing.assert_close(logits(walker.apply(run.load(1), 0.0)), logits(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(expected), logits(loaded(tmp_path / "initial")), atol=1e-2)
