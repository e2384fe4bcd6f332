"""Choose a trial of the front by a rule, and give the reason in a line."""

import pandas as pd

from search.problem.objectives import Objective
from search.problem.pareto import RULES, knee, utility_floor
from uipe_core.errors import UserError


def chosen_row(
    front: pd.DataFrame, initial: pd.Series | None, objectives: tuple[Objective, ...], rule: str, floor: float
) -> int:
    """Return the row of the front that a rule chooses.

    Args:
        front: The front; the initial model beats no point of it.
        initial: The initial model as a control; None before it is scored.
        objectives: What the study maximises.
        rule: One of `RULES`.
        floor: For ``utility-floor``: share of the initial model's utility, above 0 and at most 1.

    Raises:
        UserError: The rule is unknown, the front is empty, or no point has so much utility and forgets more than the initial
            model.
    """
    if rule not in RULES:
        raise UserError(f"--rule: {rule!r} is unknown; choose one of {', '.join(RULES)}")
    if rule == "utility-floor" and not 0 < floor <= 1:
        raise UserError(f"--floor: {floor:g} is not a share of the initial model's utility; give a number above 0, up to 1")
    if front.empty:
        raise UserError("nothing to choose: the initial model is at least as good as every trial in every objective; run more")
    points = front[[objective.name for objective in objectives]].to_numpy(dtype=float)
    if rule == "knee":
        return knee(points)
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
