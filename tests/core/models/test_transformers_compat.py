"""What `uipe_core.models.transformers_compat` assumes of transformers, accelerate and peft, one test per assumption."""

import copy
import subprocess
import sys

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from uipe_core.models import transformers_compat as compat

SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
LORA = {"r": 2, "lora_alpha": 6.0, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
IDS = torch.tensor([[1, 2, 3, 4]])


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=0, **more)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


@pytest.fixture(scope="module")
def wrapped():
    return compat.wrap_adapter(llama(), LORA)


def test_importing_it_imports_none_of_the_heavy_libraries():
    code = (
        "import sys, uipe_core.models.transformers_compat\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_tied_weights_have_one_parameter_name_and_their_other_names_are_known():
    model = llama(tie_word_embeddings=True)
    names = dict(model.named_parameters())
    assert compat.tied_names(model, names) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in names
    assert compat.tied_names(llama(), dict(llama().named_parameters())) == {}


def test_buffers_and_old_rotary_frequencies_are_no_weights():
    model = llama()
    pattern = compat.no_weights(model)
    assert all(pattern.search(name) for name, _ in model.named_buffers())
    assert pattern.search("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not any(pattern.search(name) for name, _ in model.named_parameters())


def test_forward_takes_what_scoring_and_decoding_pass(wrapped):
    for model in (llama(), wrapped):
        expected = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
        assert expected <= compat.forward_parameters(model).keys()
        assert compat.accepts_logits_to_keep(model)
    with torch.no_grad():
        last = llama()(input_ids=IDS, logits_to_keep=1).logits
        torch.testing.assert_close(last, llama()(input_ids=IDS).logits[:, -1:])


def test_rwkv_halves_its_weights_when_evaluated_unless_told_not_to():
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=3, rescale_every=1)).eval()
    kept = copy.deepcopy(model)
    compat.keep_weights_as_loaded(kept)
    with torch.no_grad():
        # The same up to the epsilon of its norms.
        torch.testing.assert_close(model(input_ids=IDS).logits, kept(input_ids=IDS).logits, atol=2e-3, rtol=0)
    name = "rwkv.blocks.2.attention.output.weight"
    assert torch.equal(kept.get_parameter(name), 4 * model.get_parameter(name))


def test_rwkv_mixes_up_the_rows_of_a_batch_when_it_generates():
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, rescale_every=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    ids, settings = torch.tensor([[3, 4, 5], [6, 7, 8]]), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 0}
    together = model.generate(input_ids=ids, **settings)
    alone = torch.cat([model.generate(input_ids=row[None], **settings) for row in ids])
    assert compat.generates_alone(model) and not torch.equal(together, alone)


def test_rows_of_a_cache_can_be_chosen():
    model = llama()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2], [3, 4], [5, 6]]), past_key_values=cache, use_cache=True)
        compat.select_cache_rows(cache, torch.tensor([2]))
        chosen = model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits
        alone = model(input_ids=torch.tensor([[5, 6, 7]])).logits[:, -1:]
    torch.testing.assert_close(chosen, alone)


@pytest.mark.parametrize(
    ("model", "down"),
    [
        (llama, "mlp.down_proj.weight"),
        (lambda: PhiForCausalLM(PhiConfig(**SHAPE)), "mlp.fc2.weight"),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)), "mlp.dense_4h_to_h.weight"),
        (gpt2, "mlp.c_proj.weight"),
    ],
)
def test_decoder_layers_and_their_down_projections_are_found(model, down):
    model = model()
    layers = compat.find_decoder_layers(model)
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    assert [name for name, _ in layers[0].named_parameters() if compat.is_down_projection(name)] == [down]


def test_gpt2_stores_linear_weights_transposed_and_llama_does_not():
    layer = gpt2().transformer.h[0].mlp.c_fc
    assert compat.is_transposed(layer)
    assert tuple(layer.weight.shape) == (16, 64)
    assert not compat.is_transposed(llama().model.layers[0].mlp.up_proj)


def test_special_tokens_include_those_that_were_only_added():
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "word": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<end>", special=True), AddedToken("plain", special=False)])
    assert compat.special_tokens(tokenizer) == {"<unk>", "</s>", "<end>"}


def test_adapter_states_have_the_expected_names_and_no_embeddings(wrapped):
    state = compat.adapter_state(wrapped)
    module = f"{compat.ADAPTER_PREFIX}model.layers.0.self_attn.q_proj"
    assert {name for name in state if ".layers.0." in name} == {module + compat.LORA_A, module + compat.LORA_B}
    assert len(state) == 2 * SHAPE["num_hidden_layers"]
    assert compat.weight_name(module) in dict(llama().named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_in_fp32_to_be_trained_and_in_the_dtype_of_the_weights_else(dtype):
    for rounded, expected in ((False, torch.float32), (True, dtype)):
        state = compat.adapter_state(compat.wrap_adapter(llama().to(dtype), LORA, rounded=rounded))
        assert {tensor.dtype for tensor in state.values()} == {expected}


def test_merging_adds_the_product_of_the_factors_by_alpha_over_rank_for_linear_and_transposed_layers():
    for plain, target in ((llama, "q_proj"), (gpt2, "c_attn")):
        model = compat.wrap_adapter(plain(), {**LORA, "target_modules": [target]}).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        adapted = model(IDS).logits
        merged = compat.merge_adapter(model, lambda total, dtype: total.to(dtype))
        assert type(merged) is type(plain())
        torch.testing.assert_close(merged(IDS).logits, adapted)
        assert not torch.allclose(merged(IDS).logits, plain()(IDS).logits)


def test_plain_starts_leave_the_base_weights_and_the_defaults_are_lora_configs():
    before = llama().model.layers[0].self_attn.q_proj.weight
    for start in (True, False, "gaussian", "orthogonal"):
        assert start in compat.PLAIN_LORA_STARTS
        model = compat.wrap_adapter(llama(), {**LORA, "init_lora_weights": start}).get_base_model()
        assert torch.equal(model.model.layers[0].self_attn.q_proj.base_layer.weight, before)
    defaults = compat.lora_defaults()
    assert (defaults["r"], defaults["lora_alpha"], defaults["use_rslora"], defaults["bias"]) == (8, 8, False, "none")


def test_unloading_an_adapter_gives_the_plain_model_back():
    plain = llama()
    names = [name for name, _ in plain.named_parameters()]
    unloaded = compat.wrap_adapter(plain, LORA).unload()
    assert [name for name, _ in unloaded.named_parameters()] == names


def test_an_accelerator_leaves_threads_and_models_alone():
    threads = torch.get_num_threads()
    accelerator = compat.make_accelerator(torch.device("cpu"))
    assert torch.get_num_threads() == threads
    assert accelerator.mixed_precision == "no"
    model = llama()
    prepared = accelerator.prepare(model)
    assert accelerator.unwrap_model(prepared) is model
    assert next(model.parameters()).device.type == "cpu"


def test_attention_is_replaced_for_a_while_in_every_layer_and_then_as_before():
    for model in (llama(), gpt2(), compat.wrap_adapter(llama(), LORA)):
        named, seen = model.config._attn_implementation, []

        def attend(module, query, key, value, mask, seen=seen, **options):
            seen.append((tuple(query.shape), mask))
            everything = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
            return compat.scaled_dot_product_attention(module, query, key, value, everything, options).clone(), None

        with torch.inference_mode():
            expected = model(input_ids=IDS, use_cache=False).logits
            with compat.attention_by(model, attend):
                found = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(found, expected)
        assert seen == [((1, 2, 4, 8), None)] * model.config.num_hidden_layers
        assert model.config._attn_implementation == named


@pytest.mark.parametrize("places", [[1, 3], [0], [3, 1]])
def test_logits_are_kept_at_a_list_of_places(places):
    with torch.inference_mode():
        for model in (llama(), gpt2()):
            whole = model(input_ids=IDS).logits
            torch.testing.assert_close(model(input_ids=IDS, logits_to_keep=places).logits, whole[:, places])


def test_a_process_trains_in_one_precision_after_another():
    """Accelerate keeps one precision a process; a worker trains models of other dtypes one after another."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no instructions for bf16")
    cpu = torch.device("cpu")
    found = [compat.make_accelerator(cpu, half_precision=half).mixed_precision for half in (False, True, False)]
    assert found == ["no", "bf16", "no"]
