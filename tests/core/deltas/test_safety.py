"""Nothing that is read can run code: no pickles, no code of models, no names that lead out of a folder."""

import ast
import hashlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from uipe_core.deltas.adapters import adapter_weights
from uipe_core.deltas.checkpoints import check_checkpoint, checkpoint_identity
from uipe_core.deltas.store import DeltaStore, EpochResult
from uipe_core.deltas.update_vectors import DENSE, UpdateVector
from uipe_core.errors import UserError
from uipe_core.logs.tofu import read_log
from uipe_core.models.loading import check_model_folder, load_model
from uipe_core.models.skeleton import meta_model, open_initial
from uipe_core.storage.content_store import MANIFEST, BrokenEntryError, ContentStore, _canonical, content_key
from uipe_core.storage.safetensors_files import weight_files
from uipe_core.unlearning.steering import model_depth

PACKAGES = [Path(__file__).parents[3] / name for name in ("uipe_core", "search")]

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader",
    "pandas.read_pickle", "pd.read_pickle", "eval", "exec", "os.system", "joblib.load",
}  # fmt: skip


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source):
    """What of a source text may unpickle, run or trust what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name, given = dotted(node.func), {word.arg: word.value for word in node.keywords}
            if name in FORBIDDEN_CALLS:
                yield name
            allow = given.get("allow_pickle")
            if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
                yield f"{name}(allow_pickle)"
            weights_only = given.get("weights_only")
            if name == "torch.load" and not (isinstance(weights_only, ast.Constant) and weights_only.value is True):
                yield name
            trusted = given.get("trust_remote_code")
            if isinstance(trusted, ast.Constant) and trusted.value is not False:
                yield f"{name}(trust_remote_code={trusted.value})"
            if name.endswith("AutoModelForCausalLM.from_pretrained") and "use_safetensors" not in given:
                yield f"{name} without use_safetensors"
            # transformers asks on the terminal where nothing is said.
            if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
                spread = any(word.arg is None for word in node.keywords)
                if trusted is None and not spread:
                    yield f"{name} without trust_remote_code"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_code_of_ours_unpickles_or_trusts(package):
    files = list(package.rglob("*.py"))
    assert len(files) > 20
    found = [f"{path.name}: {what}" for path in files for what in offences(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)", "yaml.load(t, Loader=yaml.Loader)", "eval(t)",
        "AutoModelForCausalLM.from_pretrained(p, trust_remote_code=False)", "AutoTokenizer.from_pretrained(p)",
        "AutoConfig.from_pretrained(p, trust_remote_code=True)", "pd.read_pickle(p)",
    ],
)  # fmt: skip
def test_each_of_these_would_be_noticed(source):
    assert list(offences(source))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def bomb(tmp_path):
    """A pickle that leaves a mark when it is loaded, and where that mark would be."""
    mark = tmp_path / "executed"
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)
    assert mark.exists(), "the bomb works"
    mark.unlink()
    yield content
    assert not mark.exists()


@pytest.fixture
def config_folder(tmp_path):
    """A model folder without weights."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "model"
    config = LlamaConfig(vocab_size=20, **shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(config_folder, llama3):
    """A small Llama with its tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(meta_model(str(config_folder)).config)
    model.save_pretrained(config_folder)
    llama3.of_words(["a", "b"]).save_pretrained(config_folder)
    return config_folder


def test_pickled_weights_are_refused_everywhere(config_folder, model_folder, bomb):
    (model_folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (model_folder / name).write_bytes(bomb)
    with pytest.raises(UserError, match="safetensors"):
        check_model_folder(str(model_folder), None, "llama3")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(model_folder), prompt_format="llama3", device="cpu")
    with pytest.raises(UserError, match="pickles"):
        checkpoint_identity(model_folder)
    with pytest.raises(UserError, match="pickles"):
        open_initial(model_folder)


def test_a_pickle_by_the_name_of_safetensors_is_damaged(model_folder, bomb):
    (model_folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(model_folder), prompt_format="llama3", device="cpu")
    with pytest.raises(UserError, match="damaged or cut off"):
        open_initial(model_folder)


def test_pickled_adapters_are_refused(model_folder, tmp_path, bomb):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    (adapter / "adapter_model.bin").write_bytes(bomb)
    initial = open_initial(model_folder)
    with pytest.raises(UserError, match="pickles"):
        check_checkpoint(initial, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(bomb)
    with pytest.raises(UserError, match="damaged"):
        adapter_weights(adapter, initial.skeleton)


@pytest.fixture
def delta_store(tmp_path):
    """A store with one base run, and the folder of its entry."""
    store = DeltaStore(tmp_path / "deltas")
    update = UpdateVector(DENSE, {"w": torch.ones(3)})
    run = store.get_or_train({"run": 1}, [EpochResult(1, update, 0.5)])
    return tmp_path / "deltas", run.folder


def reseal(folder, change):
    """Writes a manifest that agrees with itself again after a change, as somebody with bad intentions would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("checksum")
    change(manifest)
    manifest["checksum"] = hashlib.sha256(_canonical(manifest)).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_pickle_in_place_of_a_delta_is_quarantined(delta_store, bomb):
    root, folder = delta_store
    (folder / "epoch-001.safetensors").write_bytes(bomb)
    assert DeltaStore(root).find({"run": 1}) is None
    assert not folder.exists()


def test_a_pickle_with_a_manifest_to_match_is_no_update_vector(delta_store, bomb):
    root, folder = delta_store
    (folder / "epoch-001.safetensors").write_bytes(bomb)
    digest = hashlib.sha256(bomb).hexdigest()
    reseal(folder, lambda manifest: manifest["files"].update({"epoch-001.safetensors": {"bytes": len(bomb), "sha256": digest}}))
    found = DeltaStore(root).find({"run": 1})
    assert found is not None
    with pytest.raises(Exception, match=r"[Hh]eader"):
        found.load(1)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", ".."])
def test_a_manifest_that_names_files_elsewhere_is_broken(delta_store, name):
    root, folder = delta_store
    outside = root / "outside"
    outside.write_text("mine")
    facts = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    reseal(folder, lambda manifest: manifest["files"].update({name: facts}))
    assert "outside its entry" in str(ContentStore(root).flaw(folder.name))
    assert DeltaStore(root).find({"run": 1}) is None
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("files", [None, [], {"x": 3}, {"x": {}}, "text"])
def test_a_manifest_without_sense_is_broken(delta_store, files):
    root, folder = delta_store
    reseal(folder, lambda manifest: manifest.update(files=files))
    assert ContentStore(root).flaw(folder.name) == "manifest does not say what files there are"
    with pytest.raises(BrokenEntryError):
        ContentStore(root)._verify(folder.name)


def test_keys_of_entries_are_hexadecimal_digits_whatever_their_inputs(tmp_path):
    for inputs in ({"model": "../../x"}, {"../x": "/etc"}, {"a": "\0"}):
        assert len(content_key(inputs)) == 32 and int(content_key(inputs), 16) >= 0


def test_a_pickle_is_no_evaluation_log(tmp_path, bomb):
    (tmp_path / "log.json").write_bytes(bomb)
    with pytest.raises(UserError, match=r"not a text file|not valid JSON"):
        read_log(tmp_path / "log.json")


def test_numpy_archives_with_objects_are_not_loaded(tmp_path, bomb):
    content = io.BytesIO()
    array = np.empty(1, dtype=object)
    array[0] = Bomb(tmp_path / "executed")
    np.save(content, array, allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "items.npz", "w") as archive:
        archive.writestr("forget/answer_loss.npy", content.getvalue())
    with pytest.raises(ValueError, match="allow_pickle"), np.load(tmp_path / "items.npz") as archive:
        archive["forget/answer_loss"]


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/shard.safetensors"])
def test_an_index_that_names_shards_elsewhere_is_refused(model_folder, tmp_path, shard):
    content = (model_folder / "model.safetensors").read_bytes()
    (model_folder / "model.safetensors").unlink()
    (tmp_path / "outside.safetensors").write_bytes(content)
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": shard}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (weight_files, open_initial, checkpoint_identity, lambda f: load_model(str(f), prompt_format="llama3")):
        with pytest.raises(UserError, match="not a file of its folder"):
            read(model_folder)


@pytest.fixture
def folder_with_code(model_folder, tmp_path):
    """A model folder that brings code of its own, which leaves a mark when it is imported."""
    mark = tmp_path / "imported"
    config = json.loads((model_folder / "config.json").read_text())
    config["model_type"] = "strange_llama"
    config["architectures"] = ["StrangeLlama"]
    config["auto_map"] = {"AutoConfig": "modeling.StrangeConfig", "AutoModelForCausalLM": "modeling.StrangeLlama"}
    (model_folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model_folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "modeling.StrangeTokenizer"]}
    tokenizer["tokenizer_class"] = "StrangeTokenizer"
    (model_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (model_folder / "modeling.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange_llama'\n"
        "class StrangeLlama(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
        "class StrangeTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return model_folder, mark


def test_code_of_a_model_does_not_run_unless_it_is_trusted(folder_with_code, monkeypatch, tmp_path):
    folder, mark = folder_with_code
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody must be asked"))
    from transformers.utils import hub

    monkeypatch.setattr(hub, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for read in (
        lambda: load_model(str(folder), prompt_format="llama3", device="cpu"),
        lambda: check_model_folder(str(folder), None, "llama3"),
        lambda: open_initial(folder),
        lambda: meta_model(str(folder)),
    ):
        with pytest.raises(UserError):
            read()
        assert not mark.exists()
    assert model_depth(str(folder)) is None
    assert not mark.exists()
    # The same folder, trusted, does run its code: the refusals above are no accident of a folder that nothing could load.
    meta_model(str(folder), trust_remote_code=True)
    assert mark.exists()


def test_safetensors_are_read_by_these_tests_too(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
