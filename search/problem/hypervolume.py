"""Set reference point and noise ceiling of a study's hypervolume."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from search.problem.objectives import Objective
from uipe_core.errors import UserError
from uipe_core.metrics.tofu import log10_p_floor

if TYPE_CHECKING:
    import pandas as pd

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
