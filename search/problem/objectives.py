"""Define what a study maximises, the reference point and the noise ceiling of its hypervolume."""

import math
from dataclasses import dataclass

import pandas as pd

from search.spec.study import StudySpec
from search.store.study_store import StudyStore
from uipe_core.errors import UserError
from uipe_core.metrics.tofu import log10_p_floor


@dataclass(frozen=True)
class Objective:
    """One number of a trial, maximised.

    Attributes:
        name: Its key in a trial's evidence, column of the tables, and metric name in Optuna.
        title: Its name on axes and in sentences.
        head: Its name at the head of a narrow column; two lines at most.
        places: Decimal places in tables.
        quality_of: The evaluation set whose log10 forget quality it is: then it is never below what so many items can give,
            and differences above the noise ceiling mean nothing. None for every other number.
        p_value: Key of the p-value behind it, shown beside it in the report's tables.
        beside: Further numbers shown beside it: key and head of each. The first is what sentences say in its place.
    """

    name: str
    title: str
    head: str
    places: int
    quality_of: str | None = None
    p_value: str | None = None
    beside: tuple[tuple[str, str], ...] = ()

    def ceiling(self, forget_quality_cap: float) -> float:
        """The value above which differences are noise, in this objective's unit; infinity where there is none."""
        return math.inf if self.quality_of is None else math.log10(forget_quality_cap)


FORGET_QUALITY = Objective("log10_forget_quality", "log10 forget quality", "log10\nFQ", 2, "forget", "forget_quality")

MODEL_UTILITY = Objective("model_utility", "model utility", "MU", 4)

RELATED_FORGET_QUALITY = Objective(
    "related_log10_forget_quality", "log10 forget quality of related facts (K2)", "log10\nFQ K2", 2, "related"
)

CHOICE_FORGETTING = Objective(
    "forgetting_to_chance",
    "minus forget accuracy above chance",
    "− above\nchance",
    4,
    beside=(("forget_accuracy", "forget accuracy"), ("forget_accuracy_se", "± s.e.")),
)

CHOICE_UTILITY = Objective(
    "utility_accuracy", "utility accuracy", "utility\nacc.", 4, beside=(("utility_accuracy_se", "± s.e."),)
)

THIRD_OBJECTIVES = {objective.name: objective for objective in (RELATED_FORGET_QUALITY,)}
"""Objectives a study may add, by the name its file gives (``search.third_objective``)."""


def objectives_of(spec: StudySpec) -> tuple[Objective, ...]:
    """The objectives of a study: forgetting, utility, and its third one if it has one."""
    if spec.corpus.kind == "multiple_choice":
        return CHOICE_FORGETTING, CHOICE_UTILITY
    third = spec.search.third_objective
    return (FORGET_QUALITY, MODEL_UTILITY) if third is None else (FORGET_QUALITY, MODEL_UTILITY, THIRD_OBJECTIVES[third])


@dataclass(frozen=True)
class Flag:
    """Why a point is marked as not to be believed at first sight: what holds of it, and what that may mean."""

    meaning: str
    caution: str


def flag_of(objectives: tuple[Objective, ...]) -> Flag:
    """What a flag says of the points of a study with these objectives."""
    if objectives[0] is CHOICE_FORGETTING:
        return Flag("forget accuracy below chance", "which takes knowing the answers and avoiding them: nothing was forgotten")
    return Flag("utility above both the initial and the retain model", "which sharper logits alone can bring about")


DEFAULT_CAP = 0.3
"""Noise ceiling of forget quality where the study was not asked to measure it, or could not."""


def forget_quality_cap(spec: StudySpec, controls: pd.DataFrame) -> float:
    """The noise ceiling: the spec's, or the lowest forget quality among retain models of other seeds (0.3 without any)."""
    given = spec.hypervolume.forget_quality_cap
    if given is not None:
        return given
    others = controls[controls["kind"] == "other_retain"] if "kind" in controls else controls
    return DEFAULT_CAP if others.empty else float(others["forget_quality"].min())


def reference_point(store: StudyStore) -> dict[str, float]:
    """The corner by objective: the spec's, or the lowest forget quality the number of items can give."""
    given = store.spec.hypervolume.reference_point.model_dump()
    corner = {}
    for objective in store.objectives:
        value = given[objective.name]
        corner[objective.name] = quality_floor(store, str(objective.quality_of)) if value is None else value
    return corner


def quality_floor(store: StudyStore, name: str) -> float:
    """Lowest log10 forget quality the items of an evaluation set can give that trials are scored on.

    Raises:
        UserError: If the corpus has no such items.
    """
    items = store.record["corpus"]["items"]["select"].get(name)
    if items is None:
        raise UserError(f"{store.out}: its corpus has no {name!r} items; leave search.third_objective out")
    return log10_p_floor(items, items)
