"""Gram matrices of update vectors: the naive products, whichever kinds are mixed, and no more memory than they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uipe_core.deltas.files import load_update, save_update
from uipe_core.deltas.gram import gram_matrix
from uipe_core.deltas.update_vectors import DENSE, LOW_RANK, UpdateVector
from uipe_core.errors import UserError

SHAPES = {"up.weight": (6, 4), "square.weight": (5, 5), "norm.weight": (7,)}
SEEDS = st.integers(0, 2**31)
KINDS = st.lists(st.sampled_from(["dense", "low_rank"]), min_size=1, max_size=5)


def dense(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return UpdateVector(DENSE, {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def low_rank(seed, rank=2, modules=("up", "square"), transposed=False, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        out, into = shapes[f"{module}.weight"][:: -1 if transposed else 1]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return UpdateVector(LOW_RANK, tensors, {"r": rank, "lora_alpha": 3.0 * rank + 1})


def made(kinds, seed):
    return [dense(seed + step) if kind == "dense" else low_rank(seed + step, 1 + step % 3) for step, kind in enumerate(kinds)]


def whole(update, transposed=False, shapes=SHAPES):
    """All weights' changes, one behind the other, in double precision."""
    changes = {name: np.zeros(shape) for name, shape in shapes.items()}
    if update.kind == DENSE:
        changes = {name: tensor.double().numpy() for name, tensor in update.tensors.items()}
    else:
        scale = update.adapter["lora_alpha"] / update.adapter["r"]
        for name, a in update.tensors.items():
            if name.endswith("lora_A.weight"):
                product = update.tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
                weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                changes[weight] = scale * (product.T if transposed else product).numpy()
    return np.concatenate([change.ravel() for change in changes.values()])


def naive(updates, **how):
    vectors = np.stack([whole(update, **how) for update in updates])
    return vectors @ vectors.T


@settings(deadline=None)
@given(KINDS, SEEDS, st.sampled_from([1, 13, 1 << 23]))
def test_it_is_the_naive_product_in_blocks_of_any_size(kinds, seed, block):
    updates = made(kinds, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uipe_core.deltas.gram.BLOCK", block)
        np.testing.assert_allclose(gram_matrix(updates), naive(updates), rtol=1e-12, atol=1e-9)


@settings(deadline=None)
@given(KINDS, SEEDS)
def test_it_is_symmetric_and_positive_semi_definite_and_its_diagonal_has_the_norms(kinds, seed):
    updates = made(kinds, seed)
    gram = gram_matrix(updates)
    np.testing.assert_allclose(gram, gram.T, rtol=1e-14, atol=1e-12)
    assert np.linalg.eigvalsh(gram).min() >= -1e-10 * np.trace(gram)
    np.testing.assert_allclose(np.sqrt(np.diag(gram)), [update.norm for update in updates], rtol=1e-10)


@settings(deadline=None)
@given(KINDS, SEEDS, st.floats(1e-4, 1e4))
def test_it_grows_with_the_square_of_the_scale(kinds, seed, scale):
    updates = made(kinds, seed)
    # Powers of two scale fp32 tensors exactly.
    factor = float(2 ** round(np.log2(scale)))
    scaled = [
        UpdateVector(
            each.kind,
            {name: tensor if "lora_A" in name else factor * tensor for name, tensor in each.tensors.items()},
            each.adapter,
        )
        for each in updates
    ]
    np.testing.assert_allclose(gram_matrix(scaled), factor**2 * gram_matrix(updates), rtol=1e-12)


@settings(deadline=None)
@given(KINDS, SEEDS, st.integers(0, 5), st.sampled_from([1, 1 << 23]))
def test_what_is_known_is_taken_and_the_rest_is_the_naive_product(kinds, seed, first, block):
    updates = made(kinds, seed)
    first = min(first, len(updates))
    # Of no vectors at all, so that a product formed again would show.
    known = np.arange(first)[:, None] * 10.0 + np.arange(first)[None, :] * 10.0 + 1e6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uipe_core.deltas.gram.BLOCK", block)
        gram = gram_matrix(updates, known)
    np.testing.assert_array_equal(gram[:first, :first], known)
    expected = naive(updates)
    np.testing.assert_allclose(gram[first:], expected[first:], rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(gram[:first, first:], expected[:first, first:], rtol=1e-12, atol=1e-9)


class Unreadable(dict):
    """Tensors that tell when one is asked for."""

    def __getitem__(self, name):
        raise AssertionError(f"{name} was read")


def test_nothing_is_read_where_all_is_known():
    updates = [UpdateVector(DENSE, Unreadable(dense(seed).tensors)) for seed in range(2)]
    np.testing.assert_array_equal(gram_matrix(updates, np.eye(2)), np.eye(2))
    with pytest.raises(AssertionError, match="was read"):
        gram_matrix(updates, np.eye(1))


@pytest.mark.parametrize("shape", [(3, 3), (2, 1), (1,)])
def test_what_is_known_of_other_vectors_is_refused(shape):
    told = re.escape(f"known inner products have shape {shape}; they are of the first of 2")
    with pytest.raises(ValueError, match=told):
        gram_matrix([dense(0), dense(1)], np.ones(shape))


def test_small_differences_of_large_vectors_survive():
    """Two neighbouring epochs share almost everything; summed in single precision their distance would be lost."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2000, 500, generator=generator)
    updates = [UpdateVector(DENSE, {"w": common + 1e-4 * step}) for step in range(2)]
    gram = gram_matrix(updates)
    distance = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]
    exact = float((updates[1].tensors["w"].double() - updates[0].tensors["w"].double()).square().sum())
    assert distance == pytest.approx(exact, rel=1e-4)
    single = torch.stack([update.tensors["w"].flatten() for update in updates])
    single = (single @ single.T).double()
    assert abs(float(single[0, 0] + single[1, 1] - 2 * single[0, 1]) - exact) > 10 * exact


def test_weights_stored_as_in_by_out_are_turned_square_ones_too():
    updates = [dense(0), low_rank(1, transposed=True)]
    np.testing.assert_allclose(gram_matrix(updates), naive(updates, transposed=True), rtol=1e-12)


def test_what_only_low_rank_vectors_change_is_a_weight_of_its_own():
    shapes = {**SHAPES, "head.weight": (3, 4)}
    tied = [low_rank(seed, modules=("up", "head"), shapes=shapes) for seed in (1, 2)]
    updates = [dense(0), *tied]
    expected = np.zeros((3, 3))
    expected[1:, 1:] = naive(tied, shapes=shapes)
    expected[0, 1:] = expected[1:, 0] = [whole(dense(0)) @ whole(each, shapes=shapes)[: len(whole(dense(0)))] for each in tied]
    expected[0, 0] = whole(dense(0)) @ whole(dense(0))
    np.testing.assert_allclose(gram_matrix(updates), expected, rtol=1e-12)


def test_a_scalar_weight_and_no_vectors_at_all():
    assert gram_matrix([]).shape == (0, 0)
    scalars = [UpdateVector(DENSE, {"gate": torch.tensor(value)}) for value in (2.0, -3.0)]
    np.testing.assert_array_equal(gram_matrix(scalars), [[4, -6], [-6, 9]])


def test_vectors_of_other_models_are_refused():
    other = UpdateVector(DENSE, {"up.weight": torch.ones(6, 4)})
    with pytest.raises(ValueError, match="0 and 1 are of different models"):
        gram_matrix([dense(0), other])
    wrong = low_rank(1, modules=("up",), shapes={"up.weight": (6, 3)})
    with pytest.raises(ValueError, match=r"up\.weight: factors \(6, 2\) and \(2, 3\) do not fit \(6, 4\)"):
        gram_matrix([dense(0), wrong])


def test_files_are_read_to_the_same_numbers_and_a_damaged_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("uipe_core.deltas.files.RESIDENT", 0)
    monkeypatch.setattr("uipe_core.storage.safetensors_files.MAPPED", 0)
    updates, opened = made(["dense", "low_rank", "dense"], 5), []
    for number, update in enumerate(updates):
        save_update(update, tmp_path / f"{number}.safetensors")
        opened.append(load_update(tmp_path / f"{number}.safetensors"))
    np.testing.assert_array_equal(gram_matrix(opened), gram_matrix(updates))
    (tmp_path / "2.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"2\.safetensors: damaged or cut off"):
        gram_matrix(opened)


MEASURE = """
import resource, sys
import numpy as np, torch, uipe_core.deltas.gram, uipe_core.deltas.files
from pathlib import Path
from uipe_core.deltas.gram import gram_matrix
from uipe_core.deltas.files import load_update, save_update
from uipe_core.deltas.update_vectors import DENSE, UpdateVector

torch.set_num_threads(1)
folder, paths = Path(sys.argv[1]), []
for number in range(8):
    paths.append(folder / f"{number}.safetensors")
    generator = torch.Generator().manual_seed(number)
    save_update(UpdateVector(DENSE, {"w": torch.rand(5000, 1000, generator=generator) - 0.5}), paths[-1])
    load_update(paths[-1]).norm
uipe_core.deltas.files.RESIDENT = 0
uipe_core.deltas.gram.BLOCK = 1 << 20
gram_matrix([UpdateVector(DENSE, {"w": torch.ones(1024, 1024)}) for _ in range(2)])
resident = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
Path("/proc/self/clear_refs").write_text("5")
before = resident()
gram = gram_matrix([load_update(path) for path in paths])
print(resident() - before)
print(np.abs(gram * 12 / 5e6 - np.eye(8)).max())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_vectors_together_larger_than_what_is_held_of_them(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[3])
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    peak, error = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    # 160 MB of vectors. BLOCK is 8 MB here; the rest is pages of the files, which the system reads in runs of its own.
    assert int(peak) < 80e6
    assert float(error) < 5e-3
