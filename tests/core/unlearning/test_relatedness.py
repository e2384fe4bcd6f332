"""Gradient cosine and projections against closed forms of a linear model and against backward passes of a real one."""

import numpy as np
import pytest
import torch

from uipe_core.corpora.types import Item
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.update_vectors import DENSE, UpdateVector
from uipe_core.models.likelihood import mean_answer_nll
from uipe_core.models.prompts import pad_batch
from uipe_core.unlearning.gradients import (
    cosine,
    dot,
    first_order_rise,
    flat_gradient,
    flat_update,
    item_gradient,
    mean_gradient,
    moved_weights,
    pair_cosines,
    predicted_projection,
    projection,
)
from uipe_core.unlearning.training import AdapterConfig, UnlearningConfig, train_base_run

LORA = AdapterConfig(rank=2, alpha=8, target_modules=("q_proj", "v_proj"))


def linear_gradients():
    """Facts (x, y) of a linear model with squared loss (w.x - y)^2 / 2: the gradient is (w.x - y) x."""
    w = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    facts = [(torch.tensor([2.0, 0.0, 1.0]), 0.5), (torch.tensor([1.0, 1.0, 0.0]), 3.0)]
    found = [flat_gradient((w @ x - y) ** 2 / 2, [w]) for x, y in facts]
    expected = [(float(w.detach() @ x) - y) * x for x, y in facts]
    return found, expected


def test_gradient_of_a_linear_model_in_closed_form():
    found, expected = linear_gradients()
    for gradient, known in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, known)


def test_cosine_and_projection_of_a_linear_model_in_closed_form():
    (g1, g2), _ = linear_gradients()
    # g1 = 2 (2, 0, 1), g2 = -4 (1, 1, 0): cosine -2 / (sqrt 5 sqrt 2).
    known = -2 / np.sqrt(10)
    assert cosine(g1, g2) == pytest.approx(known)
    delta = 0.3 * g1
    assert projection(delta, g2) == pytest.approx(0.3 * 2 * np.sqrt(5) * known)
    # An update exactly along g1 is the case the prediction is about, at any alpha.
    for alpha in (0.0, 0.7, 2.0):
        length = 0.3 * 2 * np.sqrt(5)
        assert projection(delta, g2, alpha) == pytest.approx(predicted_projection(length, cosine(g1, g2), alpha))
        assert first_order_rise(delta, g2, alpha) == pytest.approx((1 + alpha) * 0.3 * float(g1 @ g2))


def test_parameter_without_influence_has_gradient_zero():
    w, idle = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    assert flat_gradient(w.sum() * 2, [w, idle]).tolist() == [2, 2, 0, 0, 0]


def test_zero_gradients_have_no_direction():
    assert np.isnan(cosine(torch.zeros(3), torch.ones(3)))
    assert np.isnan(projection(torch.ones(3), torch.zeros(3)))


def test_dot_needs_vectors_of_one_length():
    with pytest.raises((ValueError, RuntimeError)):
        dot(torch.ones(3), torch.ones(4))


def backward_gradient(loaded, item, weights):
    """The same gradient by a plain backward pass."""
    loaded.model.zero_grad()
    batch = pad_batch([loaded.prompts.encode(item.question, item.answer)], loaded.prompts.pad_id)
    mean_answer_nll(loaded.model(input_ids=batch.input_ids).logits, batch.labels).backward()
    named = dict(loaded.model.named_parameters())
    return torch.cat([named[name].grad.reshape(-1) for name in weights])


@pytest.mark.parametrize("part", ["all", "q_proj"])
def test_item_gradient_is_that_of_a_backward_pass(world, load_tiny, part):
    loaded = load_tiny()
    weights = [name for name, _ in loaded.model.named_parameters() if part in ("all", *name.split("."))]
    item = world.sets["forget"][3]
    torch.testing.assert_close(item_gradient(loaded, item, weights), backward_gradient(loaded, item, weights))


def test_unknown_weight_is_named(world, load_tiny):
    with pytest.raises(KeyError, match="nowhere"):
        item_gradient(load_tiny(), world.sets["forget"][0], ["nowhere.weight"])


def test_pair_cosines_are_those_of_all_pairs_by_brute_force(world, load_tiny):
    loaded = load_tiny()
    weights = [name for name, _ in loaded.model.named_parameters()]
    items = [*world.sets["forget"][:2], *world.sets["related"][:2]]
    pairs = [(a, b) for a in items for b in items]
    rows = torch.stack([backward_gradient(loaded, item, weights) for item in items]).double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    expected = (unit @ unit.T).reshape(-1).numpy()
    np.testing.assert_allclose(pair_cosines(loaded, pairs, weights), expected, atol=1e-6)


def test_mean_gradient_counts_every_fact_the_same(world, load_tiny):
    loaded = load_tiny()
    weights = ["model.layers.0.self_attn.v_proj.weight"]
    items = [*world.sets["forget"][:2], Item("Where was the author Eco born?", "Italy.")]
    rows = torch.stack([item_gradient(loaded, item, weights) for item in items])
    torch.testing.assert_close(mean_gradient(loaded, items, weights), rows.mean(dim=0))
    with pytest.raises(ValueError, match="no items"):
        mean_gradient(loaded, [], weights)


def trained(world, loaded, adapter):
    config = UnlearningConfig("grad_ascent", {}, 1, 1e-3, weight_decay=0.0, adapter=adapter)
    (result,) = train_base_run(loaded, world, config)
    return result.update


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_flat_update_is_what_walking_changes_in_the_weights_it_names(world, load_tiny, adapter):
    update = trained(world, load_tiny(), adapter)
    names = moved_weights(update)
    before, walked = dict(load_tiny().model.named_parameters()), load_tiny().model
    moved = Extrapolator(walked).apply(update, 0.5)
    if adapter is not None:
        moved = moved.merge_and_unload()
    after = dict(moved.named_parameters())
    changed = torch.cat([(after[name] - before[name]).detach().reshape(-1) for name in names])
    torch.testing.assert_close(1.5 * flat_update(update), changed, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - set(names))
    if adapter is not None:
        assert {name.split(".")[-2] for name in names} == {"q_proj", "v_proj"}


def test_small_step_along_a_gradient_raises_the_loss_as_first_order_says(world, load_tiny):
    loaded = load_tiny()
    item = world.sets["related"][0]
    parameters = dict(loaded.model.named_parameters())
    weights = sorted(parameters)
    gradient = item_gradient(loaded, item, weights)
    step = 1e-3 / float(gradient.norm())
    pieces = (step * gradient).split([parameters[name].numel() for name in weights])
    tensors = {name: piece.reshape(parameters[name].shape) for name, piece in zip(weights, pieces, strict=True)}
    update = UpdateVector(DENSE, tensors)

    def loss():
        batch = pad_batch([loaded.prompts.encode(item.question, item.answer)], loaded.prompts.pad_id)
        return float(mean_answer_nll(loaded.model(input_ids=batch.input_ids).logits, batch.labels).detach())

    start = loss()
    Extrapolator(loaded.model).apply(update, 1.0)
    predicted = first_order_rise(flat_update(update), gradient, 1.0)
    assert predicted > 0
    assert loss() - start == pytest.approx(predicted, rel=0.05)
