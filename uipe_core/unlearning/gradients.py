"""Compare facts by their gradients: cosines, and projections of an update on a related gradient.

UIPE (arXiv 2503.04693) argues that an update that makes a model forget one fact also moves it along the gradient of related
facts, the more the smaller the angle between the two gradients, and that a longer walk scales this movement.

Symbols, for P weights: g1 and g2 are (P,) gradients of the losses of a target fact (K1) and of another fact (K2, K0) at
theta_init; delta is the (P,) update vector. Unlearning K1 raises its loss, so delta points along g1 if the argument holds.
Gradients are computed one at a time: memory holds a few vectors of P weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from uipe_core.corpora.types import Item
from uipe_core.deltas.update_vectors import DENSE, UpdateVector, adapter_scale, factors
from uipe_core.metrics.scores import FloatArray
from uipe_core.models.likelihood import answer_logits, mean_answer_nll
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import pad_batch
from uipe_core.models.transformers_compat import weight_name

_BLOCK = 1 << 24


def moved_weights(update: UpdateVector) -> tuple[str, ...]:
    """Return the names of the weights an update changes, sorted: all of a dense one, adapted modules of a low-rank one."""
    if update.kind == DENSE:
        return tuple(sorted(update.tensors))
    return tuple(sorted(map(weight_name, factors(update))))


def flat_update(update: UpdateVector) -> Tensor:
    """Return the update as one vector, (P,) fp32, in the order of `moved_weights`; B A of low-rank ones multiplied out."""
    if update.kind == DENSE:
        tensors = dict(update.tensors)
    else:
        scale = adapter_scale(update)
        tensors = {weight_name(module): scale * (b.float() @ a.float()) for module, (a, b) in factors(update).items()}
    return torch.cat([tensors[name].float().reshape(-1) for name in moved_weights(update)])


def item_gradient(loaded: LoadedModel, item: Item, weights: Sequence[str]) -> Tensor:
    """Return the gradient of one fact's loss (mean negative log-likelihood per answer token, nats), (P,) fp32.

    Args:
        loaded: The model at the weights to differentiate at; set to evaluation mode, so dropout is off.
        item: Question and gold answer.
        weights: Names of the weights to differentiate by, in this order; KeyError if the model lacks one.
    """
    model = loaded.model.eval()
    named = dict(model.named_parameters())
    batch = pad_batch([loaded.prompts.encode(item.question, item.answer)], loaded.prompts.pad_id, loaded.device)
    return flat_gradient(mean_answer_nll(*answer_logits(model, batch)), [named[name] for name in weights])


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a scalar loss as one vector, (P,) fp32; 0 for parameters it does not depend on."""
    parts = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
    return torch.cat([part.float().reshape(-1) for part in parts])


def mean_gradient(loaded: LoadedModel, items: Sequence[Item], weights: Sequence[str]) -> Tensor:
    """Return the mean of the gradients of facts, (P,) fp32, each fact with equal weight; raise ValueError without items."""
    if not items:
        raise ValueError("the mean gradient of no items")
    total = item_gradient(loaded, items[0], weights)
    for item in items[1:]:
        total += item_gradient(loaded, item, weights)
    return total / len(items)


def pair_cosines(loaded: LoadedModel, pairs: Sequence[tuple[Item, Item]], weights: Sequence[str]) -> FloatArray:
    """Return (n,) the cosine between the gradients of each of n pairs of facts, in [-1, 1]; NaN if one is zero. Equation 2.

    The gradient of a first fact is reused for consecutive pairs with it, so sort pairs by their first fact.
    """
    found, kept = [], None
    for first, second in pairs:
        if kept is None or kept[0] != first:
            kept = (first, item_gradient(loaded, first, weights))
        found.append(cosine(kept[1], item_gradient(loaded, second, weights)))
    return np.array(found, dtype=np.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two (P,) vectors in double precision; NaN if one of them is zero."""
    norms = norm(a) * norm(b)
    return dot(a, b) / norms if norms > 0 else float("nan")


def projection(delta: Tensor, gradient: Tensor, alpha: float = 0.0) -> float:
    """Return (1 + alpha) <delta, g2> / |g2|, the length of the walk along a gradient, in units of weights; NaN for a zero
    gradient.

    Equations 4 (alpha = 0) and 6 (the amplified update), measured. Above 0 the walk raises that fact's loss, to first order.

    Args:
        delta: (P,) update vector.
        gradient: (P,) gradient of the related fact.
        alpha: Extrapolation coefficient.
    """
    length = norm(gradient)
    return (1.0 + alpha) * dot(delta, gradient) / length if length > 0 else float("nan")


def predicted_projection(update_norm: float, gradient_cosine: float, alpha: float = 0.0) -> float:
    """Return (1 + alpha) |delta| cos(g1, g2), the projection if delta points along g1. Equations 4 and 6, predicted."""
    return (1.0 + alpha) * update_norm * gradient_cosine


def first_order_rise(delta: Tensor, gradient: Tensor, alpha: float = 0.0) -> float:
    """Return the rise of a fact's loss predicted by its gradient: (1 + alpha) <delta, g2>, in nats per answer token."""
    return (1.0 + alpha) * dot(delta, gradient)


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two (P,) vectors, summed in double precision block by block, which keeps copies small."""
    blocks = zip(a.split(_BLOCK), b.to(a.device).split(_BLOCK), strict=True)
    return float(sum(torch.dot(x.double(), y.double()) for x, y in blocks))


def norm(a: Tensor) -> float:
    """Return the Euclidean norm of a (P,) vector in double precision."""
    return dot(a, a) ** 0.5
