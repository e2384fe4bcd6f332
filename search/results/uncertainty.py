"""How sure a study's front is: intervals, probabilities and groups, from the item scores that every trial keeps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.problem.objectives import Objective
from search.store.study_store import StudyStore
from uipe_core.corpora.types import MULTIPLE_CHOICE_SETS, UTILITY_SETS
from uipe_core.metrics.definitions import Definition, definition_named
from uipe_core.metrics.scores import FloatArray, set_scores
from uipe_core.metrics.tofu import item_components, quality_ratios
from uipe_core.metrics.uncertainty import (
    bootstrap_forget_quality,
    bootstrap_harmonic_mean,
    front_probability,
    group_weights,
    indistinguishable,
    intervals,
)

Arrays = Mapping[str, NDArray[Any]]
"""Item scores of a trial by ``set/measurement``."""

FEW_GROUPS = 5
"""With fewer groups to resample, intervals are rough."""


def certainty(store: StudyStore, trials: pd.DataFrame, retain: int | None) -> pd.DataFrame:
    """How sure every trial's objectives are, by resampling people or authors (1,000 draws, the same for all trials).

    Args:
        store: The open study.
        trials: Its complete trials, with ``on_front``.
        retain: Number of the control that holds the retain model's scores; None where it has not been scored.

    Returns:
        A row per trial whose item scores are kept: ``trial``, per objective ``<name>_low`` and ``<name>_high`` (95% percentile
        interval), ``front_probability`` (share of draws in which no other trial dominates it), and for front points ``alike``
        (a number from 1: points of one number cannot be told apart). Empty where forget quality lacks the retain model's
        item scores.
    """
    choices = store.spec.corpus.kind == "multiple_choice"
    reference = None if retain is None else store.items(retain, control=True)
    kept = {int(number): store.items(int(number)) for number in trials["trial"]}
    scores = {number: arrays for number, arrays in kept.items() if arrays is not None}
    if not scores or (reference is None and not choices):
        return pd.DataFrame(columns=["trial", "front_probability", "alike"])
    draws = _ChoiceDraws(store) if reference is None else _Draws(store, reference)
    values = np.stack([draws.of(arrays) for arrays in scores.values()], axis=1)
    low, high = intervals(values)
    table = pd.DataFrame({"trial": list(scores), "front_probability": front_probability(values)})
    for place, objective in enumerate(store.objectives):
        table[f"{objective.name}_low"], table[f"{objective.name}_high"] = low[:, place], high[:, place]
    order = [objective.name for objective in store.objectives]
    front = trials[trials["on_front"] & trials["trial"].isin(list(scores))].sort_values(order, ascending=False)
    rows = [list(scores).index(int(number)) for number in front["trial"]]
    alike = dict(zip(front["trial"], indistinguishable(values[:, rows]) + 1, strict=True))
    return table.assign(alike=table["trial"].map(alike))


def smallest_groups(store: StudyStore) -> int:
    """Fewest groups that any evaluation set has: what intervals rest on."""
    groups: dict[str, list[str | None]] = store.record["corpus"]["groups"]
    return min(len({name for name in of_set if name is not None} or of_set) for of_set in groups.values())


class _Draws:
    """The draws of a bootstrap, the same for every trial of a study."""

    def __init__(self, store: StudyStore, reference: Arrays) -> None:
        groups = store.record["corpus"]["groups"]
        self._objectives: tuple[Objective, ...] = store.objectives
        self._definition: Definition = definition_named(store.spec.scoring.definition)
        self._weights = {name: group_weights(of_set, store.spec.seed) for name, of_set in groups.items()}
        wanted = [str(objective.quality_of) for objective in self._objectives if objective.quality_of is not None]
        self._reference = {name: quality_ratios(set_scores(reference, name), self._definition) for name in wanted}

    def of(self, arrays: Arrays) -> FloatArray:
        """(d, m) the objectives of one trial in every draw."""
        columns = []
        for objective in self._objectives:
            if objective.quality_of is None:
                columns.append(self._utility(arrays))
            else:
                name = objective.quality_of
                ratios = quality_ratios(set_scores(arrays, name), self._definition)
                columns.append(bootstrap_forget_quality(ratios, self._reference[name], self._weights[name]))
        return np.stack(columns, axis=1)

    def _utility(self, arrays: Arrays) -> FloatArray:
        components, weights = {}, {}
        for name in UTILITY_SETS:
            for component, values in item_components(set_scores(arrays, name), name, self._definition).items():
                components[component], weights[component] = values, self._weights[name]
        return bootstrap_harmonic_mean(components, weights)


class _ChoiceDraws:
    """The draws of a bootstrap over multiple-choice questions."""

    def __init__(self, store: StudyStore) -> None:
        groups = store.record["corpus"]["groups"]
        self._weights = {name: group_weights(of_set, store.spec.seed) for name, of_set in groups.items()}

    def of(self, arrays: Arrays) -> FloatArray:
        """(d, 2) forgetting and utility of one trial in every draw."""
        accuracy = {name: self._mean(name, arrays[f"{name}/correct"]) for name in MULTIPLE_CHOICE_SETS}
        chance = self._mean("forget", 1.0 / arrays["forget/choices"])
        return np.stack([-np.maximum(0.0, accuracy["forget"] - chance), accuracy["utility"]], axis=1)

    def _mean(self, name: str, values: NDArray[Any]) -> FloatArray:
        weights = self._weights[name]
        return (weights @ values) / weights.sum(axis=1)
