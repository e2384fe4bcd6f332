"""Round the weights of linear layers to 8 or 4 bits and back, in place, so that a rounded model is scored as any other.

Shows whether what was forgotten comes back when a model is shipped in low precision: 4 bits brought retained knowledge from
21% back to 83% (Zhang et al., ICLR 2025, arXiv 2410.16454). Cannot show what methods do that look at data (GPTQ, AWQ), rounded
activations, or products in low precision: only the weights are rounded here. Costs one more scoring for each grid.

Rounded are the weights of linear layers (``nn.Linear``, and transformers' ``Conv1D`` as its transpose), as bitsandbytes does by
default: not the output head, nor a layer that shares its weight with an embedding. Biases, norms and embeddings stay, and so do
experts that are stacked in one parameter.

Sources: int8 by rows as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) without outliers; int4 round to nearest in
groups as in ZeroQuant (arXiv 2206.01861); NF4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uipe_core.errors import UserError, did_you_mean
from uipe_core.models.transformers_compat import has_adapter, is_transposed

INT4_GROUP = 128
"""Weights along the input dimension that share a step."""

NF4_BLOCK = 64
"""Weights, in the order of storage by rows, that share a scale."""

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 levels of NF4: appendix E of QLoRA."""


def _to_steps(groups: Tensor, largest: int) -> Tensor:
    """Round (g, n) fp32 values to whole steps of absmax / `largest` of their group."""
    step = groups.abs().amax(dim=1, keepdim=True) / largest
    # Of zeros alone, or so small that a step is not a normal number.
    none = step < torch.finfo(torch.float32).tiny
    return torch.where(none, 0.0, (groups / step.masked_fill(none, 1.0)).round() * step)


def to_int8(weight: Tensor) -> Tensor:
    """Round a (out, in) fp32 weight to 255 steps from -absmax to absmax of each output channel."""
    return _to_steps(weight, 127)


def to_int4(weight: Tensor) -> Tensor:
    """Round a (out, in) fp32 weight to 15 steps from -absmax to absmax of each group of `INT4_GROUP` inputs.

    The last group of a row may be shorter.
    """
    rows, inputs = weight.shape
    groups = -(-inputs // INT4_GROUP)
    padded = F.pad(weight, (0, groups * INT4_GROUP - inputs)).view(rows * groups, INT4_GROUP)
    return _to_steps(padded, 7).view(rows, -1)[:, :inputs]


def to_nf4(weight: Tensor) -> Tensor:
    """Round a (out, in) fp32 weight to the nearest NF4 level of each block of `NF4_BLOCK`, in units of the block's absmax.

    Absmax stays in fp32 (no double quantisation); the last block may be shorter. Halfway between two levels the lower is taken,
    as in bitsandbytes.
    """
    flat = weight.reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scale.masked_fill(scale == 0, 1.0), middles, out_int32=True)
    return (levels[nearest] * scale).view(-1)[: len(flat)].view(weight.shape)


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {"int8": to_int8, "int4": to_int4, "nf4": to_nf4}
"""Rounding of a (out, in) fp32 weight, by the name of the grid."""


def _layers(model: Any) -> dict[str, nn.Module]:
    """Return the linear layers whose weights are rounded, by the name of the weight; a shared weight once."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    seen = embedded | ({id(head.weight)} if head is not None else set())
    found = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or is_transposed(module)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{name}.weight".removeprefix(".")] = module
    return found


def rounded_names(model: Any) -> list[str]:
    """Return the names of the weights that are rounded.

    Raises:
        UserError: The model has none, or carries an adapter.
    """
    if has_adapter(model):
        raise UserError("quantisation: the model carries an adapter, which is rounded with its weights; merge it first")
    names = list(_layers(model))
    if not names:
        raise UserError(
            f"quantisation: {type(model).__name__} has no linear layer other than its output head, so nothing can be rounded; "
            "leave out this audit"
        )
    return names


@torch.no_grad()
def round_weights(model: Any, grid: str) -> None:
    """Round the weights of a model in place; only one tensor at a time is widened to fp32.

    Nothing is kept: where a model is moved along update vectors, the next move sets all weights again. `rounded` restores
    others.

    Args:
        model: A transformers model in fp32, bf16 or fp16, on any device; the result is cast to its dtype.
        grid: Key of `GRIDS`.

    Raises:
        UserError: The grid is unknown, a weight is not finite (the model is then unchanged), or as `rounded_names`.
    """
    if grid not in GRIDS:
        raise UserError(f"quantisation: {grid!r} is unknown; known: {', '.join(GRIDS)}.{did_you_mean(grid, GRIDS)}")
    rounded_names(model)
    layers = _layers(model)
    for name, layer in layers.items():
        # The largest absolute value is NaN where one is; a mask of the whole tensor would be as large as the tensor.
        weight: Any = layer.weight
        if not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise UserError(f"quantisation: {name} is not finite; the model diverged or is damaged, and cannot be rounded")
    for layer in layers.values():
        weight = layer.weight
        wide = weight.detach().float()
        weight.copy_(GRIDS[grid](wide.T.contiguous()).T if is_transposed(layer) else GRIDS[grid](wide))


@contextmanager
def rounded(model: Any, grid: str) -> Iterator[Any]:
    """Round the weights of a model inside the block, and restore them to the bit after it, also after an error.

    The weights that are rounded are kept meanwhile: once more their memory, where the model is. Arguments and errors as in
    `round_weights`.

    Yields:
        The model.
    """
    rounded_names(model)
    kept = {layer: layer.weight.detach().clone() for layer in _layers(model).values()}  # type: ignore[operator]
    try:
        round_weights(model, grid)
        yield model
    finally:
        with torch.no_grad():
            for layer, weight in kept.items():
                layer.weight.copy_(weight)  # type: ignore[operator]
