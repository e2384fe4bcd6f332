"""Compute inner products of update vectors, streamed: together they may be larger than memory.

Symbols: M update vectors, d_i the change of all weights by the i-th; G (M, M) with G_ij = <d_i, d_j>; the products of the first
K vectors are known already. A low-rank vector changes a weight by s B A, with s = lora_alpha / r, B (out, r) and A (r, in).
That product is never formed:
    <s B A, s' B' A'> = s s' sum((B^T B') o (A A'^T))        <D, s B A> = s sum(B o (D A^T))
where D (out, in) is a dense change and o the elementwise product.
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
from uipe_core.models.transformers_compat import weight_name

BLOCK = 1 << 23
"""Double-precision elements held at once, over all update vectors."""


@dataclass(frozen=True)
class _Factors:
    """Low-rank changes of one weight, concatenated; R is the sum of their ranks.

    Attributes:
        a: (R, in) factors A.
        b: (out, R) factors B, scaled.
        owner: (R,) index of the update vector of each rank.
    """

    a: Tensor
    b: Tensor
    owner: Tensor

    def since(self, first: int) -> "_Factors":
        """Return the factors of the vectors from index `first` on."""
        chosen = self.owner >= first
        return _Factors(self.a[chosen], self.b[:, chosen], self.owner[chosen])


def gram_matrix(updates: Sequence[UpdateVector], known: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Return (M, M) inner products of update vectors over all weights of the model, summed in double precision.

    Dense vectors in files are read once, the same rows of all of them at a time: memory holds `BLOCK` elements and the mapped
    pages of each file.

    Args:
        updates: Of one model, dense and low-rank in any order. A weight that only low-rank vectors change (an output layer tied
            to the embeddings) is a weight of its own.
        known: (K, K) result of an earlier call for the first K of them, K <= M; only products with the others are computed.

    Returns:
        A symmetric matrix, positive semi-definite up to rounding; its diagonal holds the squared norms.

    Raises:
        ValueError: If dense vectors differ in names or shapes, a factor does not fit a dense weight, or `known` has a wrong
            shape.
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
    # Only rows of new vectors were summed: mirror their products with known ones.
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
    """Add one weight's inner products of new vectors with dense ones, and of new dense ones with low-rank ones."""
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
            # No variable: a view of a file keeps its pages in memory.
            row.copy_(updates[place].tensors[name].reshape(rows, width)[start:stop])
        flat = block.flatten(1)
        total[new[:, None], places] += flat[old:] @ flat.T
        if low_rank is not None and fresh is not None:
            total[new] += _mixed(block[old:], low_rank, start, stop, len(total))
            total[:, places] += _mixed(block, fresh, start, stop, len(total)).T


def _mixed(block: Tensor, parts: _Factors, start: int, stop: int, count: int) -> Tensor:
    """Return (D, M) inner products of some rows of D dense vectors with low-rank ones."""
    shares = ((block @ parts.a.T) * parts.b[start:stop]).sum(1)
    return torch.zeros(len(block), count, dtype=torch.float64).index_add_(1, parts.owner, shares)


def _add_low_rank(total: Tensor, parts: _Factors, first: int) -> None:
    """Add one weight's inner products of new low-rank vectors with all low-rank ones."""
    new = parts.since(first)
    products = (new.b.T @ parts.b) * (new.a @ parts.a.T)
    rows = torch.zeros(len(total), products.shape[1], dtype=torch.float64).index_add_(0, new.owner, products)
    total += torch.zeros_like(total).index_add_(1, parts.owner, rows)


def _by_weight(updates: Sequence[UpdateVector], shapes: dict[str, tuple[int, ...]]) -> dict[str, _Factors]:
    """Return the factors of all low-rank vectors by weight, oriented as the weight is stored."""
    found: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for place, update in enumerate(updates):
        if update.kind == DENSE:
            continue
        scale = adapter_scale(update)
        pairs = {weight_name(module): pair for module, pair in factors(update).items()}
        products = {name: (len(b), a.shape[1]) for name, (a, b) in pairs.items() if name in shapes}
        # GPT-2 stores weights as (in, out). Square ones do not show it, the other weights do.
        transposed = any(product != shapes[name] == product[::-1] for name, product in products.items())
        for name, (a, b) in pairs.items():
            if name in products and shapes[name] not in (products[name], products[name][::-1]):
                raise ValueError(f"{name}: factors {tuple(b.shape)} and {tuple(a.shape)} do not fit {shapes[name]}")
            left, right = (a.T, b.T) if transposed and name in products else (b, a)
            found.setdefault(name, []).append((place, right.double(), left.double() * scale))
    return {
        name: _Factors(
            torch.cat([a for _, a, _ in parts]),
            torch.cat([b for _, _, b in parts], dim=1),
            torch.cat([torch.full((len(a),), place) for place, a, _ in parts]),
        )
        for name, parts in found.items()
    }
