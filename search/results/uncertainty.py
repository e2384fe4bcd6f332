"""How sure a study's front is: intervals, probabilities and groups, from the item scores that every trial keeps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.evaluation.task import TASKS
from search.problem.objectives import MADE_FROM, Objective
from search.problem.trial import INITIAL, RETAIN
from search.store.study_store import StudyStore
from uipe_core.metrics.scores import FloatArray
from uipe_core.metrics.uncertainty import (
    exceeds,
    front_probability,
    group_weights,
    indistinguishable,
    intervals,
)

FEW_GROUPS = 5
"""With fewer groups to resample, no interval covers the truth as often as it says (``benchmarks/coverage.py``)."""


def certainty(store: StudyStore, trials: pd.DataFrame, controls: pd.DataFrame) -> pd.DataFrame:
    """How sure every trial's objectives are, by resampling people or authors (1,000 draws, the same for all trials).

    Args:
        store: The open study.
        trials: Its complete trials, with ``on_front``.
        controls: Its scored controls, of which the initial and the retain model are compared with.

    Returns:
        A row per trial whose item scores are kept: ``trial``, per objective ``<name>_low`` and ``<name>_high`` (95% expanded
        percentile interval), ``front_probability`` (share of draws in which neither another trial nor the initial model
        dominates it), ``beats_initial`` (whether it forgets more than the initial model beyond noise; None where that one's
        item scores are not kept), and for front points ``alike`` (a number from 1: points of one number cannot be
        distinguished). Empty where forget quality lacks the retain model's item scores, and with fewer than `FEW_GROUPS` groups
        in a set.
    """
    drawn = _draw(store, trials, controls, store.objectives)
    if drawn is None:
        return pd.DataFrame(columns=["trial", "front_probability", "beats_initial", "alike"])
    scores, groups, every = drawn.trials, smallest_groups(store), drawn.values
    values = every[:, : len(scores)]
    low, high = intervals(values, groups)
    table = pd.DataFrame({"trial": scores, "front_probability": front_probability(every)[: len(scores)]})
    table["beats_initial"] = None if not drawn.with_initial else _exceed(store, controls, every[:, :, 0])
    for place, objective in enumerate(store.objectives):
        table[f"{objective.name}_low"], table[f"{objective.name}_high"] = low[:, place], high[:, place]
    order = [objective.name for objective in store.objectives]
    front = trials[trials["on_front"] & trials["trial"].isin(scores)].sort_values(order, ascending=False)
    rows = [scores.index(int(number)) for number in front["trial"]]
    if not rows:
        return table.assign(alike=None)
    alike = dict(zip(front["trial"], indistinguishable(values[:, rows], groups) + 1, strict=True))
    return table.assign(alike=table["trial"].map(alike))


def beats_initial(store: StudyStore, trials: pd.DataFrame, controls: pd.DataFrame) -> dict[int, bool]:
    """Say of every trial whether it forgets more than the initial model beyond noise, as `certainty` does; by trial number.

    Reads and resamples what the first objective is made of, and no other set. Empty where it is not known.
    """
    drawn = _draw(store, trials, controls, store.objectives[:1])
    if drawn is None or not drawn.with_initial:
        return {}
    return dict(zip(drawn.trials, map(bool, _exceed(store, controls, drawn.values[:, :, 0])), strict=True))


class _Drawn(NamedTuple):
    """Draws of a study's models: (d, t, m) over draws, trials and objectives; the initial model last, if it is there."""

    trials: list[int]
    values: FloatArray
    with_initial: bool


def _draw(store: StudyStore, trials: pd.DataFrame, controls: pd.DataFrame, objectives: Sequence[Objective]) -> _Drawn | None:
    """Return the draws of some of the study's objectives; None where `certainty` says that there are none."""
    task = TASKS[store.spec.corpus.task]
    sets = {name for objective in objectives for name in objective.scored_sets}
    only = sets.pop() if len(sets) == 1 else None
    reference, start = (_items_of(store, controls, kind, only) for kind in (RETAIN, INITIAL))
    kept = {int(number): store.items(int(number), item_set=only) for number in trials["trial"]}
    scores = {number: arrays for number, arrays in kept.items() if arrays is not None}
    resampled = all(objective.from_items for objective in store.objectives)
    compares = any(objective.needs_retain_model for objective in store.objectives)
    if not scores or not resampled or smallest_groups(store) < FEW_GROUPS or (reference is None and compares):
        return None
    weights = {name: group_weights(of_set, store.spec.seed) for name, of_set in store.record.corpus.groups.items()}
    weights |= {made: weights[name] for made, name in MADE_FROM.items() if name in weights}
    models = [*scores.values(), *([] if start is None else [start])]
    draws = [task.draws(arrays, weights, reference, objectives, store.spec.definition) for arrays in models]
    return _Drawn(list(scores), np.stack(draws, axis=1), start is not None)


def _exceed(store: StudyStore, controls: pd.DataFrame, forgetting: FloatArray) -> NDArray[np.bool_]:
    """Return (t,) whether each trial forgets more than the initial model, the last of (d, t + 1) draws, beyond noise."""
    capped = np.minimum(forgetting, store.objectives[0].ceiling(store.noise_ceiling(controls)))
    return exceeds(capped[:, :-1], capped[:, -1], smallest_groups(store))


def _items_of(store: StudyStore, controls: pd.DataFrame, kind: str, item_set: str | None) -> "dict[str, np.ndarray] | None":
    """Return the item scores of the first control of a kind."""
    rows = controls[controls["kind"] == kind] if "kind" in controls else controls
    return None if rows.empty else store.items(int(rows["trial"].iloc[0]), control=True, item_set=item_set)


def smallest_groups(store: StudyStore) -> int:
    """Fewest groups that any evaluation set has: what intervals rest on."""
    groups = store.record.corpus.groups
    return min(len({name for name in of_set if name is not None} or of_set) for of_set in groups.values())
