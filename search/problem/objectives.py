"""Define what a study maximises, the reference point and the noise ceiling of its hypervolume."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uipe_core.errors import UserError
from uipe_core.metrics.tofu import log10_p_floor

if TYPE_CHECKING:
    import pandas as pd


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
        p_value: Key of the p-value behind it, shown next to it in the report's tables.
        companions: Further numbers shown with it: key and head of each. Sentences say the first in its place.
        worst: Its coordinate in the reference point of hypervolume, for an objective that an extension adds.
        from_items: A forget quality, or the utility of the task: the sampler ``line`` models it, and intervals resample it.
    """

    name: str
    title: str
    head: str
    places: int
    quality_of: str | None = None
    p_value: str | None = None
    companions: tuple[tuple[str, str], ...] = ()
    worst: float | None = None
    from_items: bool = False

    def ceiling(self, forget_quality_cap: float) -> float:
        """The value above which differences are noise, in this objective's unit; infinity where there is none."""
        return math.inf if self.quality_of is None else math.log10(forget_quality_cap)


FORGET_QUALITY = Objective(
    "log10_forget_quality", "log10 forget quality", "log10\nFQ", 2, "forget", "forget_quality", from_items=True
)

MODEL_UTILITY = Objective("model_utility", "model utility", "MU", 4, from_items=True)

RELATED_FORGET_QUALITY = Objective(
    "related_log10_forget_quality", "log10 forget quality of related facts (K2)", "log10\nFQ K2", 2, "related", from_items=True
)

CHOICE_FORGETTING = Objective(
    "forgetting_to_chance",
    "minus forget accuracy above chance",
    "− above\nchance",
    4,
    companions=(("forget_accuracy", "forget accuracy"), ("forget_accuracy_se", "± s.e.")),
    from_items=True,
)

CHOICE_UTILITY = Objective(
    "utility_accuracy", "utility accuracy", "utility\nacc.", 4, companions=(("utility_accuracy_se", "± s.e."),), from_items=True
)

THIRD_OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (RELATED_FORGET_QUALITY,)}
"""Objectives a study may add, by the name its file gives (``search.third_objective``)."""


@dataclass(frozen=True)
class Flag:
    """Why a point is marked as not to be believed at first sight: what holds of it, and what that may mean."""

    meaning: str
    caution: str


def flag_of(objectives: tuple[Objective, ...]) -> Flag:
    """Return what a flag says of the points of a study with these objectives."""
    if objectives[0] is CHOICE_FORGETTING:
        return Flag("forget accuracy below chance", "which takes knowing the answers and avoiding them: nothing was forgotten")
    return Flag("utility above both the initial and the retain model", "which sharper logits alone can bring about")


DEFAULT_CAP = 0.3
"""Noise ceiling of forget quality where the study was not asked to measure it, or could not."""


def forget_quality_cap(given: float | None, controls: "pd.DataFrame") -> float:
    """Return the noise ceiling of forget quality, in (0, 1].

    Args:
        given: The value the study file gives (``hypervolume.forget_quality_cap``), or None to measure it.
        controls: Scored controls. The lowest forget quality among retain models of other seeds is the ceiling; without any
            it is `DEFAULT_CAP`.
    """
    if given is not None:
        return given
    others = controls[controls["kind"] == "other_retain"] if "kind" in controls else controls
    return DEFAULT_CAP if others.empty else float(others["forget_quality"].min())


def reference_point(
    objectives: Sequence[Objective], given: Mapping[str, float | None], item_counts: Mapping[str, int]
) -> dict[str, float]:
    """Return the reference point of hypervolume, by objective.

    Args:
        objectives: The objectives of the study.
        given: Coordinates by objective from the study file; None for the lowest value that so many items can give.
        item_counts: Items by evaluation set.

    Raises:
        UserError: A coordinate follows from a set that the corpus lacks.
    """
    values = {objective.name: given.get(objective.name, objective.worst) for objective in objectives}
    for objective in objectives:
        if values[objective.name] is None and objective.quality_of is None:
            raise UserError(f"objective {objective.name}: it has no reference point; give `worst` where it is registered")
    sets = {objective.name: str(objective.quality_of) for objective in objectives}
    return {name: quality_floor(item_counts, sets[name]) if value is None else value for name, value in values.items()}


def quality_floor(item_counts: Mapping[str, int], name: str) -> float:
    """Return the lowest log10 forget quality that the items of an evaluation set can give.

    Raises:
        UserError: The corpus has no such items.
    """
    if name not in item_counts:
        raise UserError(f"search.third_objective: the corpus has no {name!r} items; leave it out")
    return log10_p_floor(item_counts[name], item_counts[name])
