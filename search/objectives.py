"""What a study maximises, by role: forgetting first, utility second, and a third where the study asks for one."""

import math
from dataclasses import dataclass

from search.spec import StudySpec


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
    """

    name: str
    title: str
    head: str
    places: int
    quality_of: str | None = None
    p_value: str | None = None

    def ceiling(self, forget_quality_cap: float) -> float:
        """The value above which differences are noise, in this objective's unit; infinity where there is none."""
        return math.inf if self.quality_of is None else math.log10(forget_quality_cap)


FORGET_QUALITY = Objective("log10_forget_quality", "log10 forget quality", "log10\nFQ", 2, "forget", "forget_quality")
MODEL_UTILITY = Objective("model_utility", "model utility", "MU", 4)
RELATED_FORGET_QUALITY = Objective(
    "related_log10_forget_quality", "log10 forget quality of related facts (K2)", "log10\nFQ K2", 2, "related"
)

THIRD_OBJECTIVES = {objective.name: objective for objective in (RELATED_FORGET_QUALITY,)}
"""Objectives a study may add, by the name its file gives (``search.third_objective``)."""


def objectives_of(spec: StudySpec) -> tuple[Objective, ...]:
    """The objectives of a study: forgetting, utility, and its third one if it has one."""
    third = spec.search.third_objective
    return (FORGET_QUALITY, MODEL_UTILITY) if third is None else (FORGET_QUALITY, MODEL_UTILITY, THIRD_OBJECTIVES[third])
