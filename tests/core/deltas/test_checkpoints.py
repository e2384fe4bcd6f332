"""Anyone's checkpoints as update vectors: equal to subtracting whole models; a folder that will not do is refused by name."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from uipe_core.deltas.adapters import other_base
from uipe_core.deltas.checkpoints import (
    check_checkpoint,
    checkpoint_folders,
    checkpoint_identity,
    checkpoint_inputs,
    find_checkpoints,
    import_checkpoints,
)
from uipe_core.deltas.extrapolation import Extrapolator, extrapolate
from uipe_core.deltas.files import load_update, save_streamed
from uipe_core.deltas.store import DeltaStore
from uipe_core.deltas.update_vectors import DENSE, LOW_RANK
from uipe_core.errors import UserError
from uipe_core.models.loading import load_model
from uipe_core.models.skeleton import open_initial

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SHARDS = "5KB"


def llama(tied=False, hidden=16, seed=0, **more):
    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **more}, initializer_range=0.3, tie_word_embeddings=tied)).eval()


@torch.no_grad()
def unlearned(model, seed=1, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def imported(initial, *checkpoints, root):
    wanted = [(folder, checkpoint_inputs("initial", checkpoint_identity(folder))) for folder in checkpoints]
    return import_checkpoints(open_initial(initial), wanted, DeltaStore(root))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a small model and of a changed copy, each as one file and in shards."""
    root = tmp_path_factory.mktemp("pair")
    for name, model in (("initial", llama()), ("checkpoint", unlearned(llama()))):
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name}-sharded", max_shard_size=SHARDS)
    assert len(list((root / "checkpoint-sharded").glob("*.safetensors"))) > 3
    return root


@pytest.fixture
def checkpoint(pair, tmp_path):
    """A copy of the changed model's folder, to be damaged."""
    return shutil.copytree(pair / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture
def sharded(pair, tmp_path):
    return shutil.copytree(pair / "checkpoint-sharded", tmp_path / "sharded")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved_adapter(tmp_path_factory.mktemp("adapter") / "a")


def saved_adapter(folder, model=None, **settings):
    settings = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings}
    wrapped = get_peft_model(model or llama(), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


def change_tensors(folder, change):
    path = folder / ("adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("ours", ["initial", "initial-sharded"])
@pytest.mark.parametrize("theirs", ["checkpoint", "checkpoint-sharded"])
def test_the_update_is_the_difference_of_the_whole_models(pair, tmp_path, ours, theirs):
    update = imported(pair / ours, pair / theirs, root=tmp_path).load(1)
    before, after = (dict(loaded(pair / name).named_parameters()) for name in (ours, theirs))
    assert update.kind == DENSE
    assert update.tensors.keys() == before.keys()
    assert all(torch.equal(update.tensors[name], after[name] - before[name]) for name in before)


def test_of_a_really_trained_model_too(tiny_folder, load_tiny, tmp_path):
    unlearned(load_tiny().model).save_pretrained(tmp_path / "after", max_shard_size="30KB")
    run = imported(tiny_folder, tmp_path / "after", root=tmp_path / "deltas")
    before, after = (dict(loaded(folder).named_parameters()) for folder in (tiny_folder, tmp_path / "after"))
    differences = {name: after[name].detach() - before[name].detach() for name in before}
    assert all(torch.equal(tensor, differences[name]) for name, tensor in run.load(1).tensors.items())
    norm = sum(float(tensor.double().square().sum()) for tensor in differences.values()) ** 0.5
    assert run.epochs[0]["norm"] == pytest.approx(norm, rel=1e-9)
    assert run.epochs[0]["norm"] == pytest.approx(run.load(1).norm, rel=1e-12)


@pytest.mark.parametrize("form", ["once", "twice", "other name"])
def test_tied_weights_are_one_tensor_whatever_the_file_calls_them(tmp_path, form):
    llama(tied=True).save_pretrained(tmp_path / "initial")
    unlearned(llama(tied=True)).save_pretrained(tmp_path / "checkpoint")

    def change(tensors):
        if form == "twice":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        elif form == "other name":
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    change_tensors(tmp_path / "checkpoint", change)
    update = imported(tmp_path / "initial", tmp_path / "checkpoint", root=tmp_path / "deltas").load(1)
    assert "lm_head.weight" not in update.tensors
    moved = Extrapolator(loaded(tmp_path / "initial")).apply(update, 0.0)
    assert moved.lm_head.weight.data_ptr() == moved.model.embed_tokens.weight.data_ptr()
    assert torch.allclose(logits(moved), logits(loaded(tmp_path / "checkpoint")), atol=1e-5)


def test_tied_weights_that_were_trained_apart_are_refused(tmp_path):
    llama(tied=True).save_pretrained(tmp_path / "initial")
    unlearned(llama(tied=True)).save_pretrained(tmp_path / "checkpoint")
    change_tensors(tmp_path / "checkpoint", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match=r"tied by config\.json but differ.*tie_word_embeddings: false"):
        check_checkpoint(open_initial(tmp_path / "initial"), tmp_path / "checkpoint")


def test_buffers_are_neither_updates_nor_errors(pair, checkpoint, tmp_path):
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    change_tensors(checkpoint, lambda tensors: tensors.update({name: torch.ones(4) for name in names}))
    update = imported(pair / "initial", checkpoint, root=tmp_path / "deltas").load(1)
    assert update.tensors.keys() == dict(llama().named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_checkpoints_come_back_to_the_bit(tmp_path, dtype):
    llama().to(dtype).save_pretrained(tmp_path / "initial")
    unlearned(llama()).to(dtype).save_pretrained(tmp_path / "checkpoint", max_shard_size=SHARDS)
    update = imported(tmp_path / "initial", tmp_path / "checkpoint", root=tmp_path / "deltas").load(1)
    assert all(tensor.dtype == torch.float32 for tensor in update.tensors.values())
    moved, expected = Extrapolator(loaded(tmp_path / "initial")).apply(update, 0.0), loaded(tmp_path / "checkpoint")
    assert moved.dtype == expected.dtype == dtype
    assert all(torch.equal(weight, expected.get_parameter(name)) for name, weight in moved.named_parameters())


FINITE = st.floats(-1e4, 1e4, width=16)


@pytest.mark.parametrize(("dtype", "shrunk"), [(torch.bfloat16, 2.0**-15), (torch.float16, 2.0**-12)], ids=str)
@given(st.lists(st.tuples(FINITE, FINITE, st.integers(-30, 30)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_alpha_zero_is_as_exact_as_promised(dtype, shrunk, pairs):
    start = torch.tensor([one for one, _, _ in pairs]).to(dtype)
    end = torch.tensor([other * 2.0**power for _, other, power in pairs]).clamp(-6e4, 6e4).to(dtype)
    back = torch.empty(start.shape)
    extrapolate(back, start, end.float() - start.float(), 0.0)
    large = (end == 0) | (end.abs().double() >= shrunk * start.abs().double())
    assert torch.equal(back.to(dtype)[large], end[large])
    assert ((back.double() - end.double()).abs() <= 2.0**-23 * torch.maximum(start.abs(), end.abs()).double()).all()


def test_epochs_are_the_checkpoints_in_order_and_nothing_is_read_twice(pair, adapter, tmp_path):
    folders = [
        shutil.copytree(pair / "checkpoint", tmp_path / "one"),
        tmp_path / "two",
        shutil.copytree(adapter, tmp_path / "a"),
    ]
    unlearned(llama(), seed=2).save_pretrained(folders[1])
    run = imported(pair / "initial", *folders, root=tmp_path / "deltas")
    assert [record["epoch"] for record in run.epochs] == [1, 2, 3]
    assert [run.load(epoch).kind for epoch in (1, 2, 3)] == [DENSE, DENSE, LOW_RANK]
    assert not torch.equal(run.load(1).tensors["lm_head.weight"], run.load(2).tensors["lm_head.weight"])
    store = DeltaStore(tmp_path / "deltas")
    inputs = [checkpoint_inputs("initial", checkpoint_identity(folder)) for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)
    assert find_checkpoints(store, inputs) == run
    seen = []
    again = import_checkpoints(
        open_initial(pair / "initial"), list(zip(folders, inputs, strict=True)), store, lambda *at: seen.append(at)
    )
    assert again == run
    assert seen[-1] == (300, 300)
    other_way = find_checkpoints(store, [inputs[1], inputs[0]])
    assert other_way.key != run.key
    assert torch.equal(other_way.load(2).tensors["lm_head.weight"], run.load(1).tensors["lm_head.weight"])


def test_a_lost_entry_is_imported_again_or_its_folder_asked_for(pair, checkpoint, tmp_path):
    run = imported(pair / "initial", checkpoint, root=tmp_path / "deltas")
    # Copies, because what was loaded is still mapped to the file that is torn here.
    before = {name: tensor.clone() for name, tensor in run.load(1).tensors.items()}
    (run.folder / "epoch-001.safetensors").write_bytes(b"torn")
    again = imported(pair / "initial", checkpoint, root=tmp_path / "deltas")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.load(1).tensors.items())
    wanted = [(checkpoint, checkpoint_inputs("initial", checkpoint_identity(checkpoint)))]
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=f"{checkpoint}: no such folder; put it back"):
        import_checkpoints(open_initial(pair / "initial"), wanted, DeltaStore(tmp_path / "empty"))


def test_a_checkpoint_is_known_by_what_it_holds(pair, checkpoint, sharded, tmp_path):
    identity = checkpoint_identity(checkpoint)
    assert identity == checkpoint_identity(shutil.copytree(checkpoint, tmp_path / "moved"))
    (checkpoint / "trainer_state.json").write_text("{}")
    assert checkpoint_identity(checkpoint) == identity
    change_tensors(checkpoint, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert checkpoint_identity(checkpoint) != identity
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    before, content = checkpoint_identity(sharded), bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert checkpoint_identity(sharded) != before


def test_a_trainers_checkpoints_are_taken_by_number(tmp_path):
    for name in ("checkpoint-10", "checkpoint-2", "checkpoint-100", "checkpoint-best", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-10", "checkpoint-100"]
    assert checkpoint_folders(tmp_path / "none") == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\.self_attn\.[qv]_proj"},
        {"layers_to_transform": [1], "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_an_adapter_is_what_peft_makes_of_it(tmp_path, settings):
    llama().save_pretrained(tmp_path / "initial")
    folder = saved_adapter(tmp_path / "adapter", **settings)
    update = imported(tmp_path / "initial", folder, root=tmp_path / "deltas").load(1)
    assert update.kind == LOW_RANK
    expected = PeftModel.from_pretrained(loaded(tmp_path / "initial"), folder).eval()
    walker = Extrapolator(loaded(tmp_path / "initial"))
    assert torch.allclose(logits(walker.apply(update, 0.0)), logits(expected), atol=1e-6)
    assert torch.equal(logits(walker.apply(update, -1.0)), logits(loaded(tmp_path / "initial")))
    assert not torch.allclose(logits(expected), logits(loaded(tmp_path / "initial")), atol=1e-2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, r"use_dora \(True\) is more than a low-rank update vector can say; merge it"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, r"bias \('all'\)"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "moves the weights underneath"),
        ({"peft_type": "IA3"}, "of the type IA3, not LORA"),
        ({"r": 4}, r"not of rank 4"),
        ({"r": "three"}, "not the configuration of an adapter"),
        ({"r": True}, "r is True, and must be a whole number of at least 1"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', and must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_dropout": "no"}, "lora_dropout is 'no', and must be a number from 0 to 1"),
    ],
    ids=str,
)
def test_an_adapter_that_is_more_than_lora_is_refused_with_the_reason(pair, adapter, tmp_path, values, said):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change_json(folder / "adapter_config.json", **values)
    with pytest.raises(UserError, match=said) as caught:
        check_checkpoint(open_initial(pair / "initial"), folder)
    assert str(folder) in str(caught.value)


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(A), "1 of 4 modules do not fit the initial model, first .*q_proj: one of its two factors"),
        (lambda tensors: tensors.update({A: torch.ones(3, 5)}), r"update of shape \[16, 5\], weight \[16, 16\]"),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            "holds 1 tensors, first ",
        ),
        (lambda tensors: tensors.update({A: torch.ones(3, 16, dtype=torch.int8)}), "holds weights as I8"),
        (lambda tensors: tensors.clear(), "it is empty"),
        (lambda tensors: tensors[A].fill_(float("nan")), "q_proj.lora_A.weight is not finite; it diverged"),
    ],
)
def test_an_adapter_whose_tensors_do_not_fit_is_refused(pair, adapter, tmp_path, change, said):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change_tensors(folder, change)
    with pytest.raises(UserError, match=said):
        check_checkpoint(open_initial(pair / "initial"), folder)


def test_an_adapter_that_names_another_model_is_known(pair, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    for base in (None, "", "meta-llama/Llama-3.2-1B", "/models/llama-3.2-1b/"):
        change_json(folder / "adapter_config.json", base_model_name_or_path=base)
        assert other_base(folder, "/here", "somebody/Llama-3.2-1B") is None
    assert other_base(folder, "/here", "somebody/Llama-3.2-3B") == "/models/llama-3.2-1b/"


def test_a_whole_model_beside_a_left_over_adapter_config_is_a_whole_model(pair, checkpoint, adapter, tmp_path):
    shutil.copy(adapter / "adapter_config.json", checkpoint)
    check_checkpoint(open_initial(pair / "initial"), checkpoint)
    run = imported(pair / "initial", checkpoint, root=tmp_path / "deltas")
    assert run.load(1).kind == DENSE
    assert checkpoint_identity(checkpoint) == checkpoint_identity(pair / "checkpoint")
    with pytest.raises(UserError, match="transformers would load the adapter's base model in its place; move adapter_config"):
        load_model(str(checkpoint), prompt_template="{question}")
    shutil.copy(adapter / "adapter_model.safetensors", checkpoint)
    with pytest.raises(UserError, match="it holds a whole model and an adapter; keep one of them there"):
        check_checkpoint(open_initial(pair / "initial"), checkpoint)


def test_an_adapter_of_another_model_is_refused(pair, tmp_path):
    wider = saved_adapter(tmp_path / "wider", llama(hidden=32))
    with pytest.raises(UserError, match=r"4 of 4 modules do not fit .* first model\.layers\.0\.mlp\.down_proj: update"):
        check_checkpoint(open_initial(pair / "initial"), wider)
    deeper = saved_adapter(tmp_path / "deeper", llama(num_hidden_layers=3))
    with pytest.raises(UserError, match=r"2 of 6 modules .* first model\.layers\.2\.mlp\.down_proj: no such module"):
        check_checkpoint(open_initial(pair / "initial"), deeper)
    embedding = saved_adapter(tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="apart from LoRA factors of linear layers"):
        check_checkpoint(open_initial(pair / "initial"), embedding)


def renamed(tensors):
    tensors["transformer.other"] = tensors.pop("model.norm.weight")


def reshaped(tensors):
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        tensors[name] = tensors[name][:20].clone()


def halved(tensors):
    for name in [name for name in tensors if "layers.1" in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, r"1 missing \(model.norm.weight\), 1 unexpected \(transformer.other\)"),
        (reshaped, r"2 of another shape \(model.layers.0.mlp.up_proj.weight \[20, 16\], the initial model has \[24, 16\]; "),
        (halved, r"9 missing \(model.layers.1.input_layernorm.weight, .*, and 6 more\)"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}), "holds weights as I8"),
    ],
)
def test_a_mismatch_is_told_by_names_shapes_and_counts(pair, checkpoint, tmp_path, change, said):
    change_tensors(checkpoint, change)
    with pytest.raises(UserError, match=said) as caught:
        check_checkpoint(open_initial(pair / "initial"), checkpoint)
    assert str(checkpoint) in str(caught.value)
    with pytest.raises(UserError, match=said):
        imported(pair / "initial", checkpoint, root=tmp_path / "deltas")


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "no such folder"),
        (
            lambda folder: (folder / "config.json").unlink(),
            r"no config\.json and no adapter_config\.json; give a folder that save_",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"no model\.safetensors and no model\.safetensors\.index\.json",
        ),
        (only_pickles, r"are pickles \(pytorch_model\.bin\).*save them again with save_pretrained"),
        (cut_off, "damaged or cut off"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged or cut off"),
        (lambda folder: change_json(folder / "config.json", model_type="qwen2"), "model_type: 'qwen2', initial model 'llama'"),
        (lambda folder: change_json(folder / "config.json", num_attention_heads=4), "num_attention_heads: 4, initial model 2"),
        (lambda folder: change_json(folder / "config.json", tie_word_embeddings=True), "tie_word_embeddings: True"),
    ],
)
def test_a_folder_that_is_no_such_checkpoint_is_refused(pair, checkpoint, damage, said):
    damage(checkpoint)
    with pytest.raises(UserError, match=said) as caught:
        check_checkpoint(open_initial(pair / "initial"), checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_settings_without_effect_may_differ(pair, checkpoint):
    change_json(checkpoint / "config.json", use_cache=False, pad_token_id=3, transformers_version="4.0", attention_dropout=0.1)
    check_checkpoint(open_initial(pair / "initial"), checkpoint)


def test_a_trainers_folder_is_told_from_its_checkpoints(pair, tmp_path):
    shutil.copytree(pair / "checkpoint", tmp_path / "run" / "checkpoint-5")
    with pytest.raises(UserError, match="give its folders, first checkpoint-5"):
        check_checkpoint(open_initial(pair / "initial"), tmp_path / "run")


def missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (missing_shard, r"1 of \d+ shards are missing, first model-00002"),
        (cut_shard, "model-00002.*damaged or cut off"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "index.json: damaged"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "names no shard"),
    ],
)
def test_broken_shards_are_refused(pair, sharded, damage, said):
    damage(sharded)
    with pytest.raises(UserError, match=said):
        check_checkpoint(open_initial(pair / "initial"), sharded)


def test_a_checkpoint_that_changed_nothing_or_diverged_leaves_no_entry(pair, checkpoint, adapter, tmp_path):
    store = tmp_path / "deltas"
    with pytest.raises(UserError, match="its weights are those of the initial model"):
        imported(pair / "initial", pair / "initial-sharded", root=store)
    still = shutil.copytree(adapter, tmp_path / "adapter")
    change_tensors(still, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])
    with pytest.raises(UserError, match="its weights are those of the initial model"):
        imported(pair / "initial", still, root=store)
    change_tensors(still, lambda tensors: tensors[A].fill_(float("inf")))
    with pytest.raises(UserError, match="is not finite"):
        imported(pair / "initial", still, root=store)
    change_tensors(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match=r"model\.norm\.weight is not finite"):
        imported(pair / "initial", checkpoint, root=store)
    assert {path.name for path in store.iterdir()} <= {"locks", "tmp"}


def test_an_initial_model_that_will_not_do_is_refused(pair, tmp_path):
    folder = shutil.copytree(pair / "initial", tmp_path / "initial")
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"its own configuration asks for: 1 missing \(model\.norm\.weight\)"):
        open_initial(folder)
    change_json(folder / "config.json", model_type="vit")
    with pytest.raises(UserError, match="makes no causal language model"):
        open_initial(folder)


def test_a_streamed_update_is_like_any_other(tmp_path):
    tensors = {"a": torch.randn(3, 4), "scalar": torch.tensor(2.0), "none": torch.empty(0, 5), "b": torch.randn(7)}
    norm = save_streamed(tmp_path / "u", {name: tensor.shape for name, tensor in tensors.items()}, tensors.items())
    update = load_update(tmp_path / "u")
    assert (update.kind, update.adapter) == (DENSE, None)
    assert update.tensors.keys() == tensors.keys()
    assert all(torch.equal(update.tensors[name], tensor) for name, tensor in tensors.items())
    assert norm == pytest.approx(update.norm)


@pytest.mark.parametrize(
    "tensors",
    [
        [("b", torch.ones(2)), ("a", torch.ones(2))],
        [("a", torch.ones(3)), ("b", torch.ones(2))],
        [("a", torch.ones(2).double()), ("b", torch.ones(2))],
        [("a", torch.ones(2))],
        [("a", torch.ones(2)), ("b", torch.ones(2)), ("c", torch.ones(2))],
    ],
)
def test_a_stream_that_is_not_what_was_announced_is_refused(tmp_path, tensors):
    with pytest.raises(ValueError, match="expected"):
        save_streamed(tmp_path / "u", {"a": (2,), "b": (2,)}, tensors)
