"""What hypervolume is measured by: the corner it starts from, and the noise above which forget quality counts for nothing."""

import pandas as pd

from search.spec.study import StudySpec
from search.store.study_store import StudyStore
from uipe_core.errors import UserError
from uipe_core.metrics.tofu import log10_p_floor

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
