"""Update vectors and initial weights that stay in their files: the same bits as in memory, and no more memory than they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.files import load_update, save_update
from uipe_core.deltas.initial_weights import read_initial_weights, saved_folder
from uipe_core.deltas.update_vectors import DENSE, UpdateVector, random_direction, snapshot
from uipe_core.errors import UserError
from uipe_core.models.loading import DTYPES, cast_weights
from uipe_core.storage.safetensors_files import LazyTensors, parts

ALPHAS = st.one_of(st.sampled_from([-1.0, 0.0]), st.floats(-3, 5, allow_nan=False))


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    """Models of some kilobytes are then handled like large ones."""
    monkeypatch.setattr("uipe_core.deltas.files.RESIDENT", 0)
    monkeypatch.setattr("uipe_core.deltas.initial_weights.RESIDENT", 0)
    monkeypatch.setattr("uipe_core.storage.safetensors_files.PART", 50)
    monkeypatch.setattr("uipe_core.storage.safetensors_files.MAPPED", 3000)


def llama(tied=False, seed=0, dtype="float32"):
    # Not above: the children that measure memory do without, and start in half the time.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=21,
        hidden_size=12,
        intermediate_size=27,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype])


def saved(folder, stored="float32", tied=False, shard_size="5GB"):
    llama(tied, dtype=stored).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def reload(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype="auto")


def change_of(model, folder, seed=1):
    """An update of the model and its file."""
    generator = torch.Generator().manual_seed(seed)
    shapes = sorted((name, parameter.shape) for name, parameter in model.named_parameters())
    tensors = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes}
    save_update(UpdateVector(DENSE, tensors), folder / "update.safetensors")
    return tensors, folder / "update.safetensors"


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name in expected:
        assert weights[name].dtype == expected[name].dtype, name
        assert torch.equal(weights[name], expected[name]), name


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of initial models: how they are stored."""
    root = tmp_path_factory.mktemp("initial")
    kinds = {
        "one file": {},
        "shards": {"shard_size": "4KB"},
        "tied": {"tied": True},
        "bf16 in shards": {"stored": "bfloat16", "shard_size": "2KB"},
    }
    folders = {kind: saved(root / kind.replace(" ", "-"), **settings) for kind, settings in kinds.items()}
    assert len(list(folders["shards"].glob("*.safetensors"))) > 2
    return folders


@pytest.mark.parametrize("scored", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["one file", "shards", "tied", "bf16 in shards"])
def test_a_streamed_walk_is_the_one_in_memory_to_the_bit(kind, scored, places, tmp_path):
    model = reload(places[kind])
    start = snapshot(model)
    initial = read_initial_weights(model, places[kind])
    change, path = change_of(model, tmp_path)
    update = load_update(path)
    assert isinstance(initial, LazyTensors) and isinstance(update.tensors, LazyTensors)
    assert_same(dict(initial), start)
    cast_weights(model, DTYPES[scored])
    pristine_weights = snapshot(model)
    walker = Extrapolator(model, initial)

    @given(ALPHAS)
    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def same(alpha):
        expected = {name: torch.add(start[name].float(), change[name], alpha=1.0 + alpha).to(DTYPES[scored]) for name in start}
        assert_same(snapshot(walker.apply(update, alpha)), expected)

    same()
    assert_same(snapshot(walker.apply(update, -1.0)), pristine_weights)
    walker.apply(update, 2.0)
    assert_same(snapshot(walker.reset()), pristine_weights)
    if kind == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parts_are_views_that_make_up_the_tensor():
    for shape in ((), (0, 3), (7,), (200,), (3, 200), (120, 7), (1, 500), (13, 5, 3)):
        tensor = torch.randn(shape)
        cut = parts(tensor)
        assert torch.equal(torch.cat(cut) if tensor.dim() else cut[0], tensor)
        for part in cut:
            part.zero_()
        assert not tensor.any()


def touch(folder):
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(1, 1))


def readable(weights):
    """Names whose weight can be had though the files changed: those that are in memory."""
    found = set()
    for name in weights:
        try:
            weights[name]
            found.add(name)
        except UserError as error:
            assert "changed since the model was loaded; put it back" in str(error)
    return found


@pytest.mark.parametrize("kind", ["tied", "bf16 in shards"])
def test_nothing_that_the_files_hold_is_copied_and_a_changed_file_is_refused(kind, places):
    initial = read_initial_weights(reload(places[kind]), places[kind])
    touch(places[kind])
    assert readable(initial) == set()


def test_weights_under_the_other_name_of_a_tie_are_found(tmp_path):
    folder = saved(tmp_path / "model", tied=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = reload(folder)
    start = snapshot(model)
    initial = read_initial_weights(model, folder)
    assert_same(dict(initial), start)
    touch(folder)
    assert readable(initial) == set()


def test_what_the_files_do_not_hold_to_the_bit_is_copied(tmp_path):
    folder = saved(tmp_path / "model")
    model = reload(folder)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nextafter(model.lm_head.weight[3, 4], torch.tensor(1.0))
        model.model.norm.weight[0] = -0.0
    start = snapshot(model)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 0.0
    weights["renamed"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].T.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    initial = read_initial_weights(model, folder)
    assert_same(dict(initial), start)
    touch(folder)
    copied = {"lm_head.weight", "model.norm.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))}
    assert readable(initial) == copied
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(initial["lm_head.weight"], start["lm_head.weight"])


def test_weights_loaded_in_another_dtype_than_stored_are_walked_from_as_loaded(tmp_path):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    model = reload(folder)
    assert model.dtype == torch.bfloat16
    start = snapshot(model)
    initial = read_initial_weights(model, folder)
    assert_same(dict(initial), start)
    touch(folder)
    assert readable(initial) == set()


def test_a_model_without_files_of_its_own_is_copied(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder in (None, tmp_path / "adapter"):
        model = llama()
        initial = read_initial_weights(model, folder)
        assert not isinstance(initial, LazyTensors)
        assert_same(dict(initial), snapshot(llama()))


def test_a_small_model_and_a_small_update_are_kept(monkeypatch, places, tmp_path):
    monkeypatch.setattr("uipe_core.deltas.files.RESIDENT", 1 << 26)
    monkeypatch.setattr("uipe_core.deltas.initial_weights.RESIDENT", 1 << 26)
    model = reload(places["one file"])
    _, path = change_of(model, tmp_path)
    assert not isinstance(read_initial_weights(model, places["one file"]), LazyTensors)
    assert not isinstance(load_update(path).tensors, LazyTensors)


def test_the_folder_of_a_model_is_its_own_or_the_hubs_copy(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some--model" / "snapshots" / commit
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert saved_folder("some/model", commit) == cached
    assert saved_folder("some/other") is None
    assert saved_folder(str(cached)) == cached


@pytest.mark.parametrize("seed", [0, 5])
def test_a_streamed_random_direction_has_the_numbers_of_one_drawn_at_once(seed, places, tmp_path):
    change, path = change_of(reload(places["one file"]), tmp_path)
    generator, expected = torch.Generator().manual_seed(seed), {}
    for name, tensor in change.items():
        noise = torch.randn(tensor.shape, generator=generator)
        expected[name] = noise * (float(tensor.double().norm()) / float(noise.double().norm()))
    drawn = random_direction(load_update(path), seed)
    out_of_turn = [*reversed(list(change)), *change]
    for name in out_of_turn:
        assert torch.allclose(drawn.tensors[name], expected[name], rtol=1e-6, atol=0), name
    in_memory = random_direction(UpdateVector(DENSE, change), seed)
    assert_same(dict(drawn.tensors), dict(in_memory.tensors))
    walked = Extrapolator(reload(places["one file"])).apply(drawn, 0.5)
    assert_same(
        snapshot(walked), snapshot(Extrapolator(reload(places["one file"])).apply(UpdateVector(DENSE, expected_of(drawn)), 0.5))
    )


def expected_of(update):
    return {name: update.tensors[name] for name in reversed(list(update.tensors))}


def test_asking_for_a_tensor_that_is_not_there_is_a_key_error(places, tmp_path):
    _, path = change_of(reload(places["one file"]), tmp_path)
    for tensors in (load_update(path).tensors, random_direction(load_update(path), 0).tensors):
        assert "stranger" not in tensors
        with pytest.raises(KeyError, match="stranger"):
            tensors["stranger"]


@pytest.mark.parametrize("left", [3, 200, -4])
def test_a_file_that_was_cut_off_is_refused_by_name(left, places, tmp_path):
    _, path = change_of(reload(places["one file"]), tmp_path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"update\.safetensors: damaged or cut off .*; run the same command again"):
        load_update(path)


def test_a_file_of_weights_is_no_update_vector(places):
    with pytest.raises(UserError, match=r"model\.safetensors: no update vector \(kind None\)"):
        load_update(places["one file"] / "model.safetensors")


def test_a_file_that_is_cut_off_in_the_middle_of_a_study_says_so_and_the_next_walk_is_whole(places, tmp_path):
    model = reload(places["one file"])
    start = snapshot(model)
    walker = Extrapolator(model, read_initial_weights(model, places["one file"]))
    _, path = change_of(model, tmp_path)
    update, content = load_update(path), path.read_bytes()
    expected = snapshot(walker.apply(update, 0.3))
    path.unlink()
    path.write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"update\.safetensors: damaged or cut off .*; run the same command again"):
        walker.apply(update, 0.4)
    path.write_bytes(content)
    assert_same(snapshot(walker.apply(update, 0.3)), expected)
    assert_same(snapshot(walker.reset()), start)


def test_a_refused_update_of_another_model_is_not_read(places, tmp_path):
    change, path = change_of(reload(places["one file"]), tmp_path)
    save_update(UpdateVector(DENSE, {**change, "stranger": torch.ones(2)}), path)
    model = reload(places["one file"])
    start = snapshot(model)
    with pytest.raises(ValueError, match="the model has not, first 'stranger'"):
        Extrapolator(model).apply(load_update(path), 0.5)
    assert_same(snapshot(model), start)


class Large(nn.Module):
    """100 MB of weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList(torch.full((1600, 2000), 0.5 + number) for number in range(8))


MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_walk_holds_neither_the_update_nor_the_initial_weights(tmp_path):
    torch.manual_seed(0)
    model = Large()
    save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    save_update(UpdateVector(DENSE, dict(model.named_parameters())), tmp_path / "update.safetensors")
    peaks = {}
    for way in ("streamed", "whole"):
        done = subprocess.run(
            [sys.executable, __file__, tmp_path, way], capture_output=True, text=True, check=True, timeout=300
        )
        peaks[way] = json.loads(done.stdout)
    # What is measured can tell: 98 MiB each of initial weights, update (mapped from its file) and random direction.
    assert peaks["whole"]["walk"]["anonymous"] > 90 * MIB
    assert peaks["whole"]["walk"]["resident"] > 180 * MIB
    assert peaks["whole"]["random_direction"]["anonymous"] > 180 * MIB
    # A tensor has 12 MiB (24 in double precision for its norm), and a file is mapped anew when 16 MiB of it were read.
    assert peaks["streamed"]["walk"]["anonymous"] < 40 * MIB
    assert peaks["streamed"]["walk"]["resident"] < 100 * MIB
    assert peaks["streamed"]["random_direction"]["anonymous"] < 50 * MIB
    # Weights cast to bf16 take up 49 MiB beside the fp32 ones that they replace one by one.
    assert peaks["streamed"]["bf16"]["anonymous"] < 90 * MIB


def watched(action):
    """Peaks of anonymous and of resident memory while something runs, in bytes over what they were before."""
    import threading

    def now():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"anonymous": 1024 * int(lines["RssAnon"].split()[0]), "resident": 1024 * int(lines["VmRSS"].split()[0])}

    before, over = now(), threading.Event()
    highest = dict(before)

    def sample():
        while not over.wait(0.001):
            for kind, found in now().items():
                highest[kind] = max(highest[kind], found)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        kept = action()
    finally:
        over.set()
        sampler.join()
    del kept
    return {kind: highest[kind] - before[kind] for kind in before}


def child(folder, way):
    torch.set_num_threads(1)
    model = Large()

    def walk(direction=False, dtype=torch.float32):
        initial = read_initial_weights(model, folder) if way == "streamed" else snapshot(model)
        cast_weights(model, dtype)
        update = load_update(folder / "update.safetensors")
        if direction:
            update = random_direction(update, 0)
        if way == "whole":
            update = UpdateVector(DENSE, dict(update.tensors))
        walker = Extrapolator(model, initial)
        for alpha in (0.5, -0.5, -1.0):
            walker.apply(update, alpha)
        return walker, update

    # A first walk of the model alone warms up what torch allocates once.
    Extrapolator(nn.Linear(2, 2)).reset()
    actions = {"walk": walk, "random_direction": lambda: walk(direction=True), "bf16": lambda: walk(dtype=torch.bfloat16)}
    print(json.dumps({name: watched(action) for name, action in actions.items()}))


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2])
