"""Bound what a trial's objectives can still become, and find complete trials that dominate the bound.

A trial that is dominated whatever the rest of its scores may be can be on no front. It ends as PRUNED, with its bound:
the stage of scoring after which that was known, the bound on each objective, and a trial that dominates them. That one is
complete, so the bound stays valid however the front moves on.

Results are read from three fronts: of all trials; of those that have not collapsed, which selection goes by; and of those at
alpha >= 0, the paper's setting. A rival must be on each of them that the trial could be on, or the trial would be missed there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from search.problem.objectives import Objective
from search.problem.pareto import IncrementalFront, dominates
from search.problem.trial import Rival
from search.samplers.registry import SAMPLERS
from search.spec.study import StudySpec
from uipe_core.metrics.composites import composite_bound, membership
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import ScoreReport
from uipe_core.metrics.tofu import quality_of_set

MOST = 100
"""Rivals that travel with a job, at most: any subset gives valid bounds, and fronts are smaller than that."""


def bounds(
    report: ScoreReport, reference: ScoreReport | None, definition: str, objectives: Iterable[Objective]
) -> dict[str, float]:
    """Upper bounds on the objectives of a model that is scored in part; those that are known are their own bound.

    Args:
        report: What is known of the model.
        reference: Scores of the retain model; None where no objective compares with them.
        definition: Metric definition.
        objectives: Of a study of free text. An objective that is no forget quality, composite or privacy has no bound.

    Raises:
        UserError: Losses that are not finite.
    """
    chosen = definition_named(definition)

    def bound(objective: Objective) -> float:
        if objective.components:
            return composite_bound(report, objective.components, definition)
        if objective.membership:
            known = membership(report.sets, None if reference is None else reference.sets)
            return known.get(objective.name, math.inf)
        name = objective.quality_of
        if name is None or reference is None:
            return math.inf
        return quality_of_set(report, reference, name, chosen).log10_p if name in report.sets else 0.0

    return {objective.name: bound(objective) for objective in objectives}


def dominating_rival(stage: str, bound: Mapping[str, float], rivals: Iterable[Rival]) -> dict[str, Any] | None:
    """Find a rival that dominates a trial's bound, so that the trial need not be scored further.

    None dominates an infinite bound, which an objective has that nothing is known of before its last stage.

    Returns:
        ``stage``, the last that was scored; ``bound`` by objective; ``trial`` and ``values`` of the rival. None without one.
    """
    if not all(math.isfinite(value) for value in bound.values()):
        return None
    for rival in rivals:
        if dominates([rival["values"][name] for name in bound], list(bound.values())):
            return {"stage": stage, "bound": dict(bound), **rival}
    return None


class Rivals:
    """The complete trials that others are held against: two fronts, kept up to date as trials end.

    Args:
        names: The objectives.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._any = IncrementalFront(len(self._names))
        self._extrapolated = IncrementalFront(len(self._names))

    def add(self, number: int, evidence: Mapping[str, Any]) -> None:
        """Record a complete trial of the search space, unless it has collapsed."""
        # As a table has it, where NaN is no reason either.
        if isinstance(evidence.get("collapsed"), str):
            return
        values = {name: float(evidence[name]) for name in self._names}
        rival = {"trial": number, "values": values}
        self._any.add(list(values.values()), rival)
        if evidence["alpha"] >= 0:
            self._extrapolated.add(list(values.values()), rival)

    def of(self, alpha: float) -> tuple[Rival, ...]:
        """The front that a trial at this alpha is held against; of a large one `MOST`, spread over it."""
        return _spread(self._extrapolated if alpha >= 0 else self._any, MOST)


def _spread(front: IncrementalFront, most: int) -> tuple[Rival, ...]:
    """Return all rivals of a front, or so many evenly along the first objective."""
    if len(front.labels) <= most:
        return tuple(front.labels)
    order = np.argsort(front.points[:, 0], kind="stable")
    return tuple(front.labels[row] for row in order[np.linspace(0, len(order) - 1, most).round().astype(int)])


def pruned_table(trials: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Pruned trials as tables show them: the point, ``stage``, ``dominated_by`` (a trial) and per objective ``<name>_bound``.

    Args:
        trials: As `StudyStore.pruned_frame` gives them.
        names: The objectives.
    """
    point = ["trial", "base", "method", "epoch", "alpha", "walk"]
    bound = [f"{name}_bound" for name in names]
    if trials.empty:
        return pd.DataFrame(columns=[*point, "stage", "dominated_by", *bound])
    found = [
        {"stage": each["stage"], "dominated_by": each["trial"], **{f"{name}_bound": each["bound"][name] for name in names}}
        for each in trials["pruned"]
    ]
    return pd.concat([trials[point].reset_index(drop=True), pd.DataFrame(found)], axis=1)


def savings(pruned: pd.DataFrame, complete: pd.DataFrame) -> dict[str, Any] | None:
    """Return what pruning saved; None where nothing was pruned.

    Args:
        pruned: As `StudyStore.pruned_frame` gives them.
        complete: Complete trials, whose median seconds by stage say what a stage that was not scored would have taken.

    Returns:
        ``trials``; ``stages``: how many trials ended after which stage; ``seconds`` of scoring saved, and their ``share`` of
        what the pruned trials would have taken.
    """
    if pruned.empty:
        return None
    usual = pd.DataFrame([each for each in complete.get("seconds_by_stage", []) if isinstance(each, Mapping)]).median()
    spent = [dict(each) for each in pruned["seconds_by_stage"]]
    saved = sum(float(usual.drop(list(each), errors="ignore").sum()) for each in spent)
    whole = saved + sum(sum(each.values()) for each in spent)
    stages: dict[str, int] = {}
    for each in pruned["pruned"]:
        stages[each["stage"]] = stages.get(each["stage"], 0) + 1
    share = saved / whole if whole > 0 else 0.0
    return {"trials": len(pruned), "stages": stages, "seconds": round(saved, 3), "share": round(share, 3)}


def prunes(spec: StudySpec) -> bool:
    """Return whether a study ends trials early whose bounds are dominated.

    Where the study file leaves it open (``search.prune: null``), only with samplers that learn from pruned trials.
    """
    wanted = spec.search.prune
    return SAMPLERS[spec.search.sampler].sees_pruned if wanted is None else wanted
