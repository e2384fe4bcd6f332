"""The delta store: a base run is trained once, kept whole, and read back as it was."""

import json
import subprocess
import weakref

import pytest
import torch

from uipe_core.deltas.store import DeltaStore, EpochResult
from uipe_core.deltas.update_vectors import DENSE, LOW_RANK, UpdateVector
from uipe_core.errors import UserError
from uipe_core.storage.content_store import content_key

INPUTS = {"method": "npo", "learning_rate": 1e-3, "epochs": 3}
ADAPTER = {"r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"], "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def update(epoch, kind=DENSE):
    generator = torch.Generator().manual_seed(epoch)
    if kind == DENSE:
        return UpdateVector(DENSE, {name: torch.randn(20, 30, generator=generator) for name in ("a.weight", "b.weight")})
    names = ("m.lora_A.weight", "m.lora_B.weight")
    shapes = ((2, 8), (6, 2))
    return UpdateVector(LOW_RANK, {n: torch.randn(s, generator=generator) for n, s in zip(names, shapes, strict=True)}, ADAPTER)


def training(epochs=3, kind=DENSE):
    for epoch in range(1, epochs + 1):
        yield EpochResult(epoch, update(epoch, kind), loss=-0.5 * epoch)


def refused():
    raise AssertionError("trained a second time")
    yield


@pytest.fixture
def root(tmp_path):
    return tmp_path / "deltas"


@pytest.mark.parametrize("kind", [DENSE, LOW_RANK])
def test_a_run_is_trained_once_and_read_back_to_the_bit(kind, root):
    run = DeltaStore(root).get_or_train(INPUTS, training(kind=kind))
    again = DeltaStore(root).get_or_train(INPUTS, refused())
    assert again == run == DeltaStore(root).find(INPUTS)
    for epoch in (1, 2, 3):
        loaded, expected = again.load(epoch), update(epoch, kind)
        assert (loaded.kind, loaded.adapter) == (expected.kind, expected.adapter)
        assert loaded.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in loaded.tensors.items())


def test_epochs_are_recorded_with_loss_and_norm(root):
    run = DeltaStore(root).get_or_train(INPUTS, training())
    assert run.key == content_key(INPUTS)
    assert [record["epoch"] for record in run.epochs] == [1, 2, 3]
    assert [record["loss"] for record in run.epochs] == [-0.5, -1.0, -1.5]
    assert [record["norm"] for record in run.epochs] == pytest.approx([update(epoch).norm for epoch in (1, 2, 3)])


def test_other_inputs_are_another_run(root):
    store = DeltaStore(root)
    store.get_or_train(INPUTS, training())
    assert store.find({**INPUTS, "learning_rate": 2e-3}) is None
    assert store.get_or_train({**INPUTS, "learning_rate": 2e-3}, training(1)).epochs[-1]["epoch"] == 1


def test_an_entry_holds_safetensors_and_json_only(root):
    run = DeltaStore(root).get_or_train(INPUTS, training())
    names = {path.name for path in run.folder.rglob("*")}
    assert names == {"manifest.json", "run.json", *(f"epoch-{epoch:03d}.safetensors" for epoch in (1, 2, 3))}
    for path in run.folder.glob("*.json"):
        json.loads(path.read_text())


def test_a_run_that_fails_midway_publishes_nothing(root):
    def failing():
        yield from training(2)
        raise RuntimeError("diverged")

    store = DeltaStore(root)
    with pytest.raises(RuntimeError, match="diverged"):
        store.get_or_train(INPUTS, failing())
    assert store.find(INPUTS) is None
    assert list((root / "tmp").iterdir()) == []
    assert len(store.get_or_train(INPUTS, training()).epochs) == 3


def test_an_update_is_let_go_before_the_next_epoch_trains(root):
    def training_with_little_memory():
        for epoch in (1, 2, 3):
            tensors = update(epoch)
            alive = weakref.ref(tensors)
            result = EpochResult(epoch, tensors, loss=0.0)
            del tensors
            yield result
            del result
            assert alive() is None

    assert len(DeltaStore(root).get_or_train(INPUTS, training_with_little_memory()).epochs) == 3


def test_an_altered_update_is_never_loaded_but_trained_again(root, caplog):
    path = DeltaStore(root).get_or_train(INPUTS, training()).folder / "epoch-002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert DeltaStore(root).find(INPUTS) is None
    assert "epoch-002.safetensors does not match its checksum" in caplog.text
    run = DeltaStore(root).get_or_train(INPUTS, training())
    assert torch.equal(run.load(2).tensors["a.weight"], update(2).tensors["a.weight"])


def test_an_epoch_that_was_not_trained_cannot_be_loaded(root):
    run = DeltaStore(root).get_or_train(INPUTS, training(2))
    with pytest.raises(FileNotFoundError, match=r"epoch-003\.safetensors"):
        run.load(3)


def test_a_disk_that_fills_up_is_the_users_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system here")
    try:
        with pytest.raises(UserError, match="No space left on device; free some space or choose another folder"):
            DeltaStore(disk).get_or_train(INPUTS, training())
        assert DeltaStore(disk).find(INPUTS) is None
        assert list((disk / "tmp").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
