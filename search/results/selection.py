"""Choose a trial of the front by a rule, and give the reason in a line."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd

from search.problem.objectives import TRUTH_RATIO, Objective
from search.problem.pareto import RULES, FloatArray, balance_at_chance, knee, utility_floor
from uipe_core.errors import UserError

KNEE_POINTS = 3
"""A knee is a point between the ends of a front."""


def chosen_row(
    front: pd.DataFrame,
    initial: pd.Series | None,
    objectives: tuple[Objective, ...],
    rule: str,
    floor: float,
    after_attacks: Mapping[int, float] = MappingProxyType({}),
) -> tuple[int, str | None]:
    """Return the row of the front that a rule chooses, and what is to be said of the choice.

    A front of fewer than three points has no knee: then the utility floor chooses, and where no point reaches it, the highest
    utility among those that forget more than the initial model.

    Args:
        front: The front; the initial model beats no point of it.
        initial: The initial model as a control; None before it is scored.
        objectives: What the study maximises.
        rule: One of `RULES`.
        floor: For ``utility-floor`` and ``robust``: share of the initial model's utility, above 0 and at most 1.
        after_attacks: Forgetting after the worst attack, by the number of each trial that was audited.

    Raises:
        UserError: The rule is unknown, the front is empty, or no point is what the rule asks for.
    """
    if rule not in RULES:
        raise UserError(f"--rule: {rule!r} is unknown; choose one of {', '.join(RULES)}")
    if front.empty:
        raise UserError("nothing to choose: the initial model is at least as good as every trial in every objective; run more")
    points = front[[objective.name for objective in objectives]].to_numpy(dtype=float)
    if rule == "utility-floor":
        return _at_floor(points, initial, objectives, floor), None
    if rule == "robust":
        return _robust(front, points, initial, objectives, floor, after_attacks)
    if rule == "chance":
        return _nearest_to_chance(front, initial, objectives), None
    if len(front) >= KNEE_POINTS:
        return knee(points), None
    have = f"a knee needs three points, and this front has {('one', 'two')[len(front) - 1]}"
    try:
        return _at_floor(points, initial, objectives, floor), f"{have}: chosen by utility-floor {floor:g}"
    except UserError:
        start = -np.inf if initial is None else float(initial[objectives[0].name])
        if not (points[:, 0] > start).any():
            raise
        best = int(np.where(points[:, 0] > start, points[:, 1], -np.inf).argmax())
        return best, f"{have}, none of them known to reach utility-floor {floor:g}: the one with the highest utility"


def measure_of_chance(objectives: tuple[Objective, ...]) -> Objective:
    """Return what the rule ``chance`` reads: the forgetting a study maximises if its chance is known, else the truth ratio."""
    return TRUTH_RATIO if objectives[0].chance is None else objectives[0]


def reason_of(
    row: pd.Series,
    initial: pd.Series | None,
    objectives: tuple[Objective, ...],
    rule: str,
    floor: float,
    beats_initial: bool | None,
    attacked: float | None = None,
) -> str:
    """Return why a rule chose a trial, in a line.

    Args:
        row: The trial.
        initial, objectives, rule, floor: As `chosen_row`.
        attacked: Its forgetting after the worst attack on its weights; None where it was not audited.
        beats_initial: Whether it forgets more than the initial model beyond noise; None where that is not known.
    """
    forgetting, utility = objectives[:2]
    if rule == "chance":
        forgetting = measure_of_chance(objectives)

    def shown(objective: Objective) -> str:
        start = "" if initial is None else f" (initial model {initial[objective.name]:.{objective.places}f})"
        return f"{objective.title} {row[objective.name]:z.{objective.places}f}{start}"

    if rule == "knee":
        reason = "bulges farthest beyond the line between the ends of the front"
    elif rule == "robust":
        reason = f"strongest forgetting after the worst attack, with {floor:g} or more of the initial {utility.title}"
    elif rule == "chance":
        reason = f"nearest to chance ({forgetting.chance:g}) at the {utility.title} it keeps"
    else:
        reason = f"strongest forgetting with {floor:g} or more of the initial {utility.title}"
    after = f", {attacked:z.{forgetting.places}f} after the attack" if rule == "robust" and attacked is not None else ""
    numbers = f"{shown(forgetting)}{after}, {shown(utility)}"
    return f"{reason}: {numbers}" + sureness(beats_initial)


def sureness(beats_initial: bool | None) -> str:
    """Say at the end of a sentence on a trial whether it forgets more than the initial model beyond noise; empty if unknown."""
    sure = {True: "; it forgets more than the initial model beyond noise", None: ""}
    return sure.get(beats_initial, "; within noise it forgets no more than the initial model")


def _robust(
    front: pd.DataFrame,
    points: FloatArray,
    initial: pd.Series | None,
    objectives: tuple[Objective, ...],
    floor: float,
    after_attacks: Mapping[int, float],
) -> tuple[int, str | None]:
    audited = np.flatnonzero(front["trial"].isin(list(after_attacks)).to_numpy())
    if not len(audited):
        raise UserError(
            "--rule robust: no point of the front was audited; run `uipe audit OUT --tests quantisation,relearning` first"
        )
    attacked = points[audited]
    attacked[:, 0] = [after_attacks[int(front["trial"].iloc[row])] for row in audited]
    chosen = int(audited[_at_floor(attacked, initial, objectives, floor)])
    note = (
        f"chosen from the {len(audited)} of {len(front)} front points that were audited" if len(audited) < len(front) else None
    )
    return chosen, note


def _nearest_to_chance(front: pd.DataFrame, initial: pd.Series | None, objectives: tuple[Objective, ...]) -> int:
    measure, utility = measure_of_chance(objectives), objectives[1]
    if initial is None:
        raise UserError("the initial model has not been scored yet; finish the study with `uipe run`")
    columns = [measure.name, utility.name]
    known = all(name in front and name in initial.index for name in columns)
    values = front[columns].to_numpy(dtype=float) if known else np.empty((0, 2))
    start = initial[columns].to_numpy(dtype=float) if known else np.empty(2)
    if not known or not np.isfinite(values).all() or not np.isfinite(start).all():
        raise UserError(f"--rule chance: {measure.title} is not known of every trial; choose by utility-floor or knee")
    return balance_at_chance(values[:, 0], values[:, 1], (float(start[0]), float(start[1])), float(measure.chance or 0.0))


def _at_floor(points: FloatArray, initial: pd.Series | None, objectives: tuple[Objective, ...], floor: float) -> int:
    if not 0 < floor <= 1:
        raise UserError(f"--floor: {floor:g} is not a share of the initial model's utility; give a number above 0, up to 1")
    if initial is None:
        raise UserError("the initial model has not been scored yet; finish the study with `uipe run`")
    forgetting, utility = (objective.name for objective in objectives[:2])
    row = utility_floor(points[:, 0], points[:, 1], floor * float(initial[utility]))
    if points[row, 0] <= initial[forgetting]:
        raise UserError(
            f"no trial with at least {floor:g} of the initial model's utility forgets more than the initial model; "
            "give a lower --floor"
        )
    return row
