"""Equations 2, 4 and 6 measured on a model and the updates of its base runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from search.paper.statistics import correlation
from uipe_core.corpora.people import fact_pairs
from uipe_core.corpora.types import RELATED_SETS, Corpus
from uipe_core.deltas.update_vectors import UpdateVector
from uipe_core.models.loading import LoadedModel
from uipe_core.unlearning.gradients import (
    cosine,
    dot,
    first_order_rise,
    flat_update,
    item_gradient,
    mean_gradient,
    moved_weights,
    norm,
    pair_cosines,
    predicted_projection,
)

FloatArray = NDArray[np.float64]
Place = tuple[str, int]
"""A method and an epoch."""


def measure_cosines(loaded: LoadedModel, corpus: Corpus, weights: Sequence[str], seed: int) -> dict[str, list[float]]:
    """Equation 2: cosine of the gradients of each K1 fact and another fact, by how the two hang together."""
    kinds = fact_pairs(corpus, seed)
    # Pairs of one K1 fact lie together, so that its gradient is made once.
    found = pair_cosines(loaded, [pair for row in zip(*kinds.values(), strict=True) for pair in row], weights)
    return {kind: found[place :: len(kinds)].tolist() for place, kind in enumerate(kinds)}


@dataclass(frozen=True)
class Projections:
    """Hold what the gradients at theta_init say about every update.

    Attributes:
        norms: |delta| by place.
        alignments: Cosine of delta and the mean K1 gradient by place: 1 is what equations 4 and 6 presume.
        cosines: (n,) cosine of the mean K1 gradient and each item's gradient, by set.
        lengths: (n,) norm of each item's gradient, by set.
        dots: (n,) <delta, gradient of item>, by set and place.
    """

    norms: Mapping[Place, float]
    alignments: Mapping[Place, float]
    cosines: Mapping[str, FloatArray]
    lengths: Mapping[str, FloatArray]
    dots: Mapping[tuple[str, Place], FloatArray]


def measure_projections(loaded: LoadedModel, corpus: Corpus, updates: Mapping[Place, UpdateVector]) -> Projections:
    """One pass over the gradients of K1, K2 and K0 facts, held against every update."""
    weights = moved_weights(next(iter(updates.values())))
    deltas: dict[Place, Tensor] = {place: flat_update(update) for place, update in updates.items()}
    target = mean_gradient(loaded, corpus.sets["forget"], weights)
    cosines, lengths = {}, {}
    dots: dict[tuple[str, Place], FloatArray] = {}
    for name in RELATED_SETS:
        rows = []
        for item in corpus.sets[name]:
            gradient = item_gradient(loaded, item, weights)
            along = [first_order_rise(delta, gradient) for delta in deltas.values()]
            rows.append([cosine(target, gradient), norm(gradient), *along])
        table = np.array(rows, dtype=np.float64)
        cosines[name], lengths[name] = table[:, 0], table[:, 1]
        dots.update({(name, place): table[:, 2 + column] for column, place in enumerate(deltas)})
    return Projections(
        norms={place: norm(delta) for place, delta in deltas.items()},
        alignments={place: dot(delta, target) / (norm(delta) * norm(target)) for place, delta in deltas.items()},
        cosines=cosines,
        lengths=lengths,
        dots=dots,
    )


def projection_rows(found: Projections, rises: Mapping[tuple[Place, float], Mapping[str, FloatArray]]) -> list[dict[str, Any]]:
    """Predicted against measured, a row per place, alpha and set.

    Args:
        found: The projections at alpha = 0; equation 6 multiplies both sides by 1 + alpha.
        rises: (n,) measured rise of each item's loss (nats per answer token) since theta_init, by place and alpha, by set.

    Returns:
        Rows of ``method``, ``epoch``, ``alpha``, ``set``; means over items of the ``predicted`` and ``measured``
        projection, in units of weights, and their ``correlation`` over items; mean ``first_order`` and measured ``rise`` of
        the loss in nats, and their ``rise_correlation``; ``norm`` of (1 + alpha) delta, and its ``alignment`` with the
        mean K1 gradient (a cosine).
    """
    rows = []
    for (place, alpha), by_set in rises.items():
        for name, rise in by_set.items():
            dots = (1.0 + alpha) * found.dots[name, place]
            measured = dots / found.lengths[name]
            predicted = predicted_projection(found.norms[place], 1.0, alpha) * found.cosines[name]
            rows.append(
                {
                    "method": place[0],
                    "epoch": place[1],
                    "alpha": alpha,
                    "set": name,
                    "norm": (1.0 + alpha) * found.norms[place],
                    "alignment": found.alignments[place],
                    "predicted": float(predicted.mean()),
                    "measured": float(measured.mean()),
                    "correlation": correlation(predicted, measured),
                    "first_order": float(dots.mean()),
                    "rise": float(rise.mean()),
                    "rise_correlation": correlation(dots, rise),
                }
            )
    return rows
