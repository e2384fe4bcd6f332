"""Inner products of update vectors: their Gram matrix, streamed, so that together they may be larger than memory.

Symbols: M update vectors, d_i the change of all weights by the i-th; G (M, M) with G_ij = <d_i, d_j>; of the M vectors the
first K have their inner products known already.
A low-rank vector changes a weight by s B A, with s = lora_alpha / r, B (out, r) and A (r, in). That product is never formed:
    <s B A, s' B' A'> = s s' sum((B^T B') o (A A'^T))        <D, s B A> = s sum(B o (D A^T))
where D (out, in) is a dense change and o the product entry by entry.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uipe_core.deltas.update_vectors import DENSE, UpdateVector, adapter_scale, factors

BLOCK = 1 << 23
"""Entries in double precision held at once, over all update vectors."""

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Factors:
    """What low-rank vectors change of one weight, side by side; R is the sum of their ranks.

    Attributes:
        a: (R, in) their factors A, one below the other.
        b: (out, R) their factors B, scaled, one beside the other.
        owner: (R,) whose each of the R is, as its place among all update vectors.
    """

    a: Tensor
    b: Tensor
    owner: Tensor

    def since(self, first: int) -> "_Factors":
        """Those of the vectors from a place on."""
        chosen = self.owner >= first
        return _Factors(self.a[chosen], self.b[:, chosen], self.owner[chosen])


def gram_matrix(updates: Sequence[UpdateVector], known: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """(M, M) inner products of update vectors over all weights of the model, summed in double precision.

    Dense vectors that stay in their files (`update_files.load_update`) are read once, the same rows of all of them at a time:
    beside `BLOCK` entries, memory holds what `weight_files.ShardReader` keeps mapped of each file. Low-rank vectors are in
    memory already.

    Args:
        updates: Of one model, dense and low-rank ones in any order. What only low-rank ones change (an output layer
            that is tied to the embeddings) is a weight of its own.
        known: (K, K) what a former call gave for the first K of them, K <= M: taken as it is, and only the products of the
            others, with all of them, are formed.

    Returns:
        A symmetric matrix, positive semi-definite up to rounding; its diagonal holds the squares of the norms.

    Raises:
        ValueError: If dense vectors differ in names or shapes, a factor does not fit a dense one's weight, or `known` is
            not square or larger than the result.
        UserError: If a file is gone or damaged.
    """
    count, first = len(updates), 0 if known is None else len(known)
    if known is not None and (known.shape != (first, first) or first > count):
        raise ValueError(f"known inner products have shape {known.shape}; they are of the first of {count} update vectors")
    total = torch.zeros(count, count, dtype=torch.float64)
    if first < count:
        dense = [place for place, update in enumerate(updates) if update.kind == DENSE]
        shapes = updates[dense[0]].shapes if dense else {}
        for place in dense:
            if updates[place].shapes != shapes:
                raise ValueError(f"update vectors {dense[0]} and {place} are of different models: names or shapes differ")
        low_rank = _by_weight(updates, shapes)
        for parts in low_rank.values():
            _add_low_rank(total, parts, first)
        for name, shape in shapes.items():
            _add_dense(total, name, shape, updates, dense, low_rank.get(name), first)
    gram = total.numpy()
    # Sums run over rows of vectors that are new; products with those known stand in one half only.
    gram[:first, first:] = gram[first:, :first].T
    if known is not None:
        gram[:first, :first] = known
    return gram


def _add_dense(
    total: Tensor,
    name: str,
    shape: tuple[int, ...],
    updates: Sequence[UpdateVector],
    dense: list[int],
    low_rank: _Factors | None,
    first: int,
) -> None:
    """Adds one weight's inner products of new vectors with dense ones, and of new dense ones with low-rank ones."""
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    step = max(1, BLOCK // (len(dense) * max(width, 1)))
    places = torch.tensor(dense)
    old = bisect_left(dense, first)
    new = places[old:]
    fresh = None if low_rank is None else low_rank.since(first)
    if not len(new) and (fresh is None or not len(fresh.owner)):
        return
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = torch.empty(len(dense), stop - start, width, dtype=torch.float64)
        for row, place in zip(block, dense, strict=True):
            tensor = updates[place].tensors[name]
            row.copy_(tensor.reshape(rows, width)[start:stop])
            # A view of its file: let go, so that the pages read of it can be.
            del tensor
        flat = block.flatten(1)
        total[new[:, None], places] += flat[old:] @ flat.T
        if low_rank is not None and fresh is not None:
            total[new] += _mixed(block[old:], low_rank, start, stop, len(total))
            total[:, places] += _mixed(block, fresh, start, stop, len(total)).T


def _mixed(block: Tensor, parts: _Factors, start: int, stop: int, count: int) -> Tensor:
    """(D, M) some rows' share in the inner products of D dense vectors with low-rank ones."""
    shares = ((block @ parts.a.T) * parts.b[start:stop]).sum(1)
    return torch.zeros(len(block), count, dtype=torch.float64).index_add_(1, parts.owner, shares)


def _add_low_rank(total: Tensor, parts: _Factors, first: int) -> None:
    """Adds one weight's inner products of new low-rank vectors with all low-rank ones."""
    new = parts.since(first)
    products = (new.b.T @ parts.b) * (new.a @ parts.a.T)
    rows = torch.zeros(len(total), products.shape[1], dtype=torch.float64).index_add_(0, new.owner, products)
    total += torch.zeros_like(total).index_add_(1, parts.owner, rows)


def _by_weight(updates: Sequence[UpdateVector], shapes: dict[str, tuple[int, ...]]) -> dict[str, _Factors]:
    """The factors of all low-rank vectors by the name of the weight they change, as it lies in the model."""
    found: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for place, update in enumerate(updates):
        if update.kind == DENSE:
            continue
        scale = adapter_scale(update)
        pairs = {f"{module.removeprefix(_PEFT_PREFIX)}.weight": pair for module, pair in factors(update).items()}
        lying = {name: _lies(a, b, shapes[name]) for name, (a, b) in pairs.items() if name in shapes}
        # GPT-2's weights are stored as (in, out). A square one does not show it, but then its fellows do.
        transposed = "transposed" in lying.values()
        for name, (a, b) in pairs.items():
            if lying.get(name) == "misfit":
                raise ValueError(f"{name}: factors {tuple(b.shape)} and {tuple(a.shape)} do not fit {shapes[name]}")
            left, right = (a.T, b.T) if lying.get(name) == "transposed" or (transposed and name in lying) else (b, a)
            found.setdefault(name, []).append((place, right.double(), left.double() * scale))
    return {
        name: _Factors(
            torch.cat([a for _, a, _ in parts]),
            torch.cat([b for _, _, b in parts], dim=1),
            torch.cat([torch.full((len(a),), place) for place, a, _ in parts]),
        )
        for name, parts in found.items()
    }


def _lies(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> str:
    product = (len(b), a.shape[1])
    if product == shape:
        return "straight"
    return "transposed" if product[::-1] == shape else "misfit"
