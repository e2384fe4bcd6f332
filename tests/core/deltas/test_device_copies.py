"""One pass over theta_init and update, the same bits as a copy and a sum; and the same weights on a GPU as on the CPU."""

import gc

import pytest
import torch

from uipe_core.deltas import device_copies
from uipe_core.deltas import extrapolation as extrapolator
from uipe_core.deltas.device_copies import HostToDeviceCopier
from uipe_core.deltas.extrapolation import Extrapolator, extrapolate
from uipe_core.deltas.update_vectors import DENSE, UpdateVector, snapshot
from uipe_core.storage import safetensors_files as weight_files

ALPHAS = (-1.0, -0.4, 0.0, 0.3, 2.0)
SHAPES = ((), (0,), (7,), (33, 5), (4, 3, 2))


def in_two_steps(initial, delta, alpha, dtype):
    return initial.float().add_(delta, alpha=1.0 + alpha).to(dtype)


def same_bits(one, other):
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [2, 1 << 22])
def test_one_pass_gives_the_bits_of_a_copy_and_a_sum(dtype, part, monkeypatch):
    monkeypatch.setattr(weight_files, "PART", part)
    monkeypatch.setattr(extrapolator, "PIECE", part)
    draws = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        initial = torch.randn(shape, generator=draws).to(dtype)
        delta = 1e-2 * torch.randn(shape, generator=draws)
        for alpha in ALPHAS:
            target = torch.full(shape, 9.0, dtype=dtype)
            extrapolate(target, initial, delta, alpha)
            assert same_bits(target, in_two_steps(initial, delta, alpha, dtype))
            wide = torch.full(shape, 9.0)  # a model that is scored wider than it is stored
            extrapolate(wide, initial, delta, alpha)
            assert same_bits(wide, in_two_steps(initial, delta, alpha, torch.float32))
        extrapolate(target, initial, delta, -1.0)
        assert torch.equal(target, initial)


def test_weights_that_do_not_lie_in_one_piece_are_moved_too():
    draws = torch.Generator().manual_seed(0)
    initial, delta = torch.randn(6, 4, generator=draws).bfloat16().T, torch.randn(4, 6, generator=draws)
    target = torch.empty(6, 4, dtype=torch.bfloat16).T
    extrapolate(target, initial, delta, 0.3)
    assert torch.equal(target, in_two_steps(initial, delta, 0.3, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_while_reading_as_on_a_gpu_gives_the_same_bits(dtype):
    draws = torch.Generator().manual_seed(0)
    initial, delta = torch.randn(1000, generator=draws).to(dtype), 1e-2 * torch.randn(1000, generator=draws)
    for alpha in ALPHAS:
        target = torch.empty(1000, dtype=dtype)
        torch.add(initial, delta, alpha=1.0 + alpha, out=target)
        assert same_bits(target, in_two_steps(initial, delta, alpha, dtype))


def test_on_the_cpu_nothing_is_copied_or_kept(load_tiny):
    model = load_tiny().model
    parameters = dict(model.named_parameters())
    initial = snapshot(model)
    assert HostToDeviceCopier().copy_all(initial, parameters) is initial
    assert HostToDeviceCopier().copy(initial["lm_head.weight"], torch.device("cpu")) is initial["lm_head.weight"]
    walker = Extrapolator(model)
    walker.apply(UpdateVector(DENSE, {name: 0.1 * tensor for name, tensor in initial.items()}), 1.0)
    gc.collect()
    assert walker._resident is None


def walked(model, update):
    """The weights at every alpha, and after going back."""
    walker = Extrapolator(model)
    found = []
    for alpha in ALPHAS:
        walker.apply(update, alpha)
        found.append(snapshot(model))
    walker.reset()
    return [*found, snapshot(model)], walker


@pytest.mark.gpu
@pytest.mark.parametrize("room", [0.0, 2 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_walks_to_the_same_weights_streamed_and_kept(load_tiny, monkeypatch, room, dtype):
    monkeypatch.setattr(device_copies, "ROOM", room)
    monkeypatch.setattr(weight_files, "PART", 512)
    draws = torch.Generator().manual_seed(0)
    here, there = load_tiny().model.to(dtype), load_tiny().model.to(dtype).cuda()
    shapes = {name: parameter.shape for name, parameter in here.named_parameters()}
    update = UpdateVector(DENSE, {name: 1e-2 * torch.randn(shape, generator=draws) for name, shape in shapes.items()})
    expected, _ = walked(here, update)
    found, walker = walked(there, update)
    assert (walker._resident is not None) is (room > 0)
    for alpha, one, other in zip((*ALPHAS, -1.0), expected, found, strict=True):
        for name in one:
            if alpha in (-1.0, 0.0):
                assert same_bits(one[name], other[name])
            else:
                torch.testing.assert_close(one[name], other[name])
