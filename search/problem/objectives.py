"""What a study maximises, by role: forgetting first, utility second, and a third where the study asks for one."""

import math
from dataclasses import dataclass

from search.spec.study import StudySpec


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
