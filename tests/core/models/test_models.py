"""Models built here, loaded from folders, and known by their content."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from uipe_core.corpora.types import Item
from uipe_core.errors import UserError
from uipe_core.models.loading import ModelSource, cast_weights, check_model_folder, load_model, model_identity, resolve_device
from uipe_core.models.skeleton import open_initial
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model, tiny_model_inputs
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.files import cache_folder

FROZEN = Stage(epochs=1, learning_rate=0.0, batch_size=500)
SMALL = TinyModelConfig("word", None, 8, 1, 2, base=Stage(1, 1e-2, 100), finetune=FROZEN, seed=0)
BYTES = replace(SMALL, tokenizer="bpe", vocab_size=400)


def never(done, total):
    raise AssertionError("trained a second time")


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def store(tmp_path):
    return ContentStore(tmp_path / "models")


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the trained small model, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_a_tiny_model_is_trained_once(store, world):
    seen = []
    folder = tiny_model(SMALL, world, "base", store, lambda *step: seen.append(step))
    assert seen == [(done, 5) for done in range(1, 6)]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_model(SMALL, world, "base", ContentStore(store.root), never) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_the_same_tiny_model_made_elsewhere_has_the_same_weights(store, world, tmp_path):
    other = tiny_model(SMALL, world, "base", ContentStore(tmp_path / "elsewhere"))
    torch.rand(3)
    assert same_weights(weights(tiny_model(SMALL, world, "base", store)), weights(other))


@pytest.mark.parametrize("stage", ["full", "retain"])
def test_full_and_retain_start_from_base(stage, store, world):
    # With a learning rate of zero, fine-tuning ends where it starts.
    tuned = weights(tiny_model(SMALL, world, stage, store))
    assert same_weights(tuned, weights(tiny_model(SMALL, world, "base", store, never)))


def test_without_a_base_stage_models_start_from_scratch(store, world):
    config = replace(SMALL, base=None)
    full, retain = (weights(tiny_model(config, world, stage, store)) for stage in ("full", "retain"))
    assert same_weights(full, retain)
    assert not same_weights(full, weights(tiny_model(replace(config, seed=1), world, "full", store)))


def test_the_cache_tells_apart_whatever_determines_a_model(world):
    inputs = [
        tiny_model_inputs(SMALL, world, "full"),
        tiny_model_inputs(SMALL, world, "retain"),
        tiny_model_inputs(BYTES, world, "full"),
        tiny_model_inputs(replace(SMALL, finetune=replace(FROZEN, epochs=2)), world, "full"),
        tiny_model_inputs(SMALL, replace(world, build={**world.build, "full": (Item("a", "b"),)}), "full"),
    ]
    assert all(inputs[i] != inputs[j] for i in range(len(inputs)) for j in range(i))


def test_a_trained_model_knows_what_it_was_taught(load_tiny, world):
    loaded = load_tiny()
    right = 0
    for item in world.build["full"]:
        example = loaded.prompts.encode(item.question, item.answer)
        with torch.no_grad():
            best = loaded.model(input_ids=torch.tensor([example.input_ids])).logits[0].argmax(-1).tolist()
        right += best[example.prompt_length - 1 : -1] == list(example.input_ids[example.prompt_length :])
    assert right > 0.8 * len(world.build["full"])


@pytest.mark.parametrize("config", [SMALL, BYTES], ids=["word", "bpe"])
def test_tokenizers_give_every_text_of_the_corpus_back(config, store, world):
    prompts = load_model(str(tiny_model(config, world, "base", store)), device="cpu").prompts
    for items in world.sets.values():
        for item in items:
            for answer in (item.answer, item.paraphrase, *item.perturbed_answers):
                example = prompts.encode(item.question, answer)
                ids = list(example.input_ids)
                assert prompts.tokenizer.unk_token_id not in ids
                assert prompts.tokenizer.decode(ids[example.prompt_length :], skip_special_tokens=True) == answer
                assert ids[: example.prompt_length] == prompts.prompt_ids(item.question)
                assert (ids[0], ids[-1]) == (prompts.tokenizer.bos_token_id, prompts.eos_id)


def test_the_byte_tokenizer_gives_any_text_back(store, world):
    prompts = load_model(str(tiny_model(BYTES, world, "base", store)), device="cpu").prompts
    answer = "Zoë’s  naïve\tcafé: 42 × 日本 🙂.\n"
    example = prompts.encode("Wer?", answer)
    assert prompts.tokenizer.decode(example.input_ids[example.prompt_length : -1]) == answer


def test_a_saved_tokenizer_keeps_its_chat_template(load_tiny):
    assert load_tiny().prompts.prompt_text("Who?") == "<s>Who?\n"


def test_weights_are_loaded_as_stored_or_in_the_dtype_asked_for(load_tiny):
    assert load_tiny().model.dtype == torch.float32
    rounded = load_tiny("bfloat16").model
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}


def test_casting_weights_gives_the_model_that_loading_gives(load_tiny):
    cast, loaded = load_tiny().model, load_tiny("bfloat16").model
    cast_weights(cast, torch.bfloat16)
    assert same_weights(dict(cast.named_parameters()), dict(loaded.named_parameters()))
    assert same_weights(dict(cast.named_buffers()), dict(loaded.named_buffers()))
    assert cast.dtype == torch.bfloat16


def test_a_source_loads_in_its_own_dtype_or_another(tiny_folder):
    source = ModelSource(str(tiny_folder), "x", dtype="bfloat16", device="cpu", prompt_template="Q: {question}\n")
    assert source.load().model.dtype == torch.bfloat16
    assert source.load("auto").model.dtype == torch.float32
    assert source.load().prompts.prompt_text("Who?") == "Q: Who?\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "WordLevel"}}'),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("config.json", "[]"),
        ("config.json", "3"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", '{"model_type": 3}'),
    ],
)
def test_damaged_files_of_a_model_end_in_one_error(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=str(copy)):
        load_model(str(copy), device="cpu")
    if name == "config.json":
        with pytest.raises(UserError, match=str(copy)):
            open_initial(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_weights_are_not_finite_is_refused(copy, value):
    tensors = weights(copy)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight is not finite"):
        load_model(str(copy), device="cpu")


def test_loaded_models_do_not_drop_out(load_tiny):
    assert not load_tiny().model.training


def spoil_weights(change):
    def spoil(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def drop_a_weight(folder):
    tensors = weights(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_a_weight(folder):
    tensors = weights(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


SPOILT = {
    "weights truncated": (spoil_weights(lambda content: content[:-10]), "cannot be loaded"),
    "weights garbage": (spoil_weights(lambda content: b"x" * 100), "cannot be loaded"),
    "weights empty": (spoil_weights(lambda content: b""), "cannot be loaded"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "a weight missing": (drop_a_weight, "lack 1 weights, first model.norm.weight"),
    "a weight of another shape": (shrink_a_weight, "cannot be loaded"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config torn": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    "unknown architecture": (lambda folder: change_config(folder, model_type="nothing"), "nothing"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("*token*")] or (folder / "chat_template.jinja").unlink(),
        "cannot be loaded",
    ),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_the_users_error_and_names_the_model(case, copy):
    spoil, message = SPOILT[case]
    load_model(str(copy), device="cpu")
    spoil(copy)
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(copy), device="cpu")
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("act", [lambda name: load_model(name, device="cpu"), model_identity], ids=["load", "identity"])
def test_a_missing_folder_is_told_from_a_name_on_the_hub(act, tmp_path):
    for name in (str(tmp_path / "none"), "./none/here", "~/none-of-this-name"):
        with pytest.raises(UserError, match=f"model {name}: no such folder"):
            act(name)


@pytest.mark.parametrize("act", [lambda name: load_model(name, device="cpu"), model_identity], ids=["load", "identity"])
@pytest.mark.parametrize("name", ["nobody-here/no-such-model", "not a name at all"])
def test_a_name_unknown_offline_is_the_users_error(act, name):
    with pytest.raises(UserError, match=f"model {name}: cannot be"):
        act(name)


def test_an_unknown_dtype_is_refused(tiny_folder):
    with pytest.raises(UserError, match="'bf16' is unknown; use auto, float32, bfloat16, float16"):
        load_model(str(tiny_folder), dtype="bf16")


@pytest.mark.parametrize(("name", "message"), [("cuda:99", "this process sees"), ("gpu", "'gpu' is not a device")])
def test_a_device_that_is_not_there_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        resolve_device(name)


def test_a_device_is_found(load_tiny):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load_tiny().device == torch.device("cpu")


def test_identity_stays_with_the_content_and_not_with_the_place(copy, tiny_folder):
    assert model_identity(str(copy)) == model_identity(str(tiny_folder))
    (copy / "README.md").write_text("a card")
    assert model_identity(str(copy)) == model_identity(str(tiny_folder))


def flip_a_weight(folder):
    tensors = weights(folder)
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        flip_a_weight,
        lambda folder: change_config(folder, rms_norm_eps=1e-3),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "modeling_own.py").write_text("x = 1"),
    ],
    ids=["weights", "config", "chat template", "code"],
)
def test_identity_changes_with_what_the_model_does(change, copy, tiny_folder):
    change(copy)
    assert model_identity(str(copy)) != model_identity(str(tiny_folder))


def test_caches_lie_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("UIPE_CACHE", str(tmp_path))
    assert cache_folder("models") == tmp_path / "models"
    monkeypatch.delenv("UIPE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("models") == tmp_path / "home" / ".cache" / "uipe" / "models"


@pytest.mark.gpu
def test_a_model_is_put_on_the_device_asked_for(tiny_folder):
    assert load_model(str(tiny_folder), device="cuda").device.type == "cuda"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "said"), [("[]", "holds a list"), ("3", "holds a int"), ('{"a": ', "cannot be read"), ("", "cannot be read")]
)
def test_a_json_file_of_a_model_that_holds_no_object_is_named(tmp_path, name, content, said):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / name).write_text(content)
    for check in (lambda: check_model_folder(str(tmp_path), None, None), lambda: load_model(str(tmp_path))):
        with pytest.raises(UserError, match=f"its {name} {said}.*; save the model again"):
            check()


def test_the_whole_reason_why_a_tokenizer_cannot_be_loaded_is_given(tmp_path):
    LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"backend tokenizer from one of: \(1\) .*sentencepiece or tiktoken.*\); fetch or save"):
        check_model_folder(str(tmp_path), None, None)
