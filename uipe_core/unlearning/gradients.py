"""How facts hang together in the weights: gradient cosine, and how far an update walks along a related gradient.

UIPE (arXiv 2503.04693) argues that an update which makes a model forget one fact also moves it along the gradient of related
facts, the more the closer the two gradients point, and that a longer walk moves it further by the same factor.

Symbols, for P weights: g1 and g2 are (P,) gradients of the losses of a target fact (K1) and of another fact (K2, K0) at
theta_init, delta is the (P,) update vector. Unlearning K1 climbs its loss, so delta points along g1 where the argument holds.
Gradients are made one at a time: no more than a few vectors of P weights are in memory, however many facts are compared.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from uipe_core.corpora.types import Item
from uipe_core.deltas.update_vectors import DENSE, UpdateVector, adapter_scale, factors
from uipe_core.metrics.scores import FloatArray
from uipe_core.models.likelihood import mean_answer_nll
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import pad_batch

_PEFT_PREFIX = "base_model.model."
_BLOCK = 1 << 24


def moved_weights(update: UpdateVector) -> tuple[str, ...]:
    """Names of the weights an update moves, sorted: all of a dense one, those of the adapted modules of a low-rank one."""
    if update.kind == DENSE:
        return tuple(sorted(update.tensors))
    return tuple(sorted(_weight_name(module) for module in factors(update)))


def flat_update(update: UpdateVector) -> Tensor:
    """The update as one vector, (P,) fp32, its weights in the order of `moved_weights`; B A of low-rank ones multiplied out."""
    if update.kind == DENSE:
        tensors = dict(update.tensors)
    else:
        scale = adapter_scale(update)
        tensors = {_weight_name(module): scale * (b.float() @ a.float()) for module, (a, b) in factors(update).items()}
    return torch.cat([tensors[name].float().reshape(-1) for name in moved_weights(update)])


def item_gradient(loaded: LoadedModel, item: Item, weights: Sequence[str]) -> Tensor:
    """Gradient of one fact's loss (mean negative log-likelihood per answer token, nats), (P,) fp32.

    Args:
        loaded: The model at the weights to differentiate at; it is put into evaluation mode, so dropout is off.
        item: Its question and gold answer make the loss.
        weights: Names of the weights to differentiate by, in this order.

    Raises:
        KeyError: If the model lacks one of the weights.
    """
    model = loaded.model.eval()
    named = dict(model.named_parameters())
    batch = pad_batch([loaded.prompts.encode(item.question, item.answer)], loaded.prompts.pad_id, loaded.device)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return flat_gradient(mean_answer_nll(logits, batch.labels), [named[name] for name in weights])


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Gradient of a scalar loss as one vector, (P,) fp32; 0 where the loss does not depend on a parameter."""
    parts = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
    return torch.cat([part.float().reshape(-1) for part in parts])


def mean_gradient(loaded: LoadedModel, items: Sequence[Item], weights: Sequence[str]) -> Tensor:
    """Mean over facts of their gradients, (P,) fp32: every fact counts the same, however long its answer is.

    Raises:
        ValueError: If there are no items.
    """
    if not items:
        raise ValueError("the mean gradient of no items")
    total = item_gradient(loaded, items[0], weights)
    for item in items[1:]:
        total += item_gradient(loaded, item, weights)
    return total / len(items)


def pair_cosines(loaded: LoadedModel, pairs: Sequence[tuple[Item, Item]], weights: Sequence[str]) -> FloatArray:
    """Equation 2: cosine between the gradients of two facts, for each pair of facts.

    The gradient of a first fact is kept while pairs with the same first fact follow one another, so sorted pairs cost
    little more than one gradient each.

    Returns:
        (n,) in [-1, 1] for n pairs; NaN where a gradient is zero.
    """
    return np.array(list(_cosines(loaded, pairs, weights)), dtype=np.float64)


def _cosines(loaded: LoadedModel, pairs: Sequence[tuple[Item, Item]], weights: Sequence[str]) -> Iterator[float]:
    kept: tuple[Item, Tensor] | None = None
    for first, second in pairs:
        if kept is None or kept[0] != first:
            kept = (first, item_gradient(loaded, first, weights))
        yield cosine(kept[1], item_gradient(loaded, second, weights))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors, both (P,), in double precision; NaN if one of them is zero."""
    norms = norm(a) * norm(b)
    return dot(a, b) / norms if norms > 0 else float("nan")


def projection(delta: Tensor, gradient: Tensor, alpha: float = 0.0) -> float:
    """Equations 4 and 6, measured: length of (1 + alpha) * delta along a gradient, in units of weights.

    Above 0 the walk climbs that fact's loss, to first order. Equation 4 is alpha = 0, equation 6 the amplified update.

    Args:
        delta: (P,) update vector.
        gradient: (P,) gradient of the related fact.
        alpha: Extrapolation coefficient.

    Returns:
        (1 + alpha) <delta, g2> / |g2|; NaN if the gradient is zero.
    """
    length = norm(gradient)
    return (1.0 + alpha) * dot(delta, gradient) / length if length > 0 else float("nan")


def predicted_projection(update_norm: float, gradient_cosine: float, alpha: float = 0.0) -> float:
    """Equations 4 and 6, predicted: (1 + alpha) |delta| cos(g1, g2), the projection if delta points exactly along g1."""
    return (1.0 + alpha) * update_norm * gradient_cosine


def first_order_rise(delta: Tensor, gradient: Tensor, alpha: float = 0.0) -> float:
    """Rise of a fact's loss that its gradient predicts for the walk: (1 + alpha) <delta, g2>, in nats per answer token."""
    return (1.0 + alpha) * dot(delta, gradient)


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two (P,) vectors, summed in double precision block by block: their copies stay small."""
    blocks = zip(a.split(_BLOCK), b.to(a.device).split(_BLOCK), strict=True)
    return float(sum(torch.dot(x.double(), y.double()) for x, y in blocks))


def norm(a: Tensor) -> float:
    """Euclidean norm of a (P,) vector in double precision."""
    return dot(a, a) ** 0.5


def _weight_name(module: str) -> str:
    return f"{module.removeprefix(_PEFT_PREFIX)}.weight"
