"""Hold a front against what is given, and tabulate what was scored of its points afterwards (other items, scales, seeds)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from search.problem.objectives import Objective
from search.problem.pareto import attainment_surface, hypervolume, non_dominated_from
from search.problem.trial import INITIAL

ATTAINED = (0.25, 0.5, 0.75)
"""Shares of the seeds whose attainment surfaces are shown."""


def best_first(
    front: pd.DataFrame, objectives: tuple[Objective, ...], reference: np.ndarray, ceilings: list[float]
) -> list[int]:
    """Trials of a front by the hypervolume that only they add, largest first; equal ones keep their order.

    Args:
        front: Rows of the front.
        objectives: What is maximised.
        reference: (m,) the reference point.
        ceilings: Value of each objective above which more counts for nothing.
    """
    points = np.minimum(front[[objective.name for objective in objectives]].to_numpy(dtype=float), ceilings)
    whole = hypervolume(points, reference)
    adds = [whole - hypervolume(np.delete(points, row, axis=0), reference) for row in range(len(points))]
    return [int(front["trial"].iloc[row]) for row in np.argsort(-np.array(adds), kind="stable")]


def volumes(
    trials: pd.DataFrame,
    controls: pd.DataFrame,
    objectives: tuple[Objective, ...],
    reference: np.ndarray,
    ceilings: list[float],
) -> dict[str, float]:
    """Return the hypervolume of all trials, and of what they are held against, by name; each with the initial model.

    Arguments are those of `best_first`, with all trials and controls.
    """
    names = [objective.name for objective in objectives]
    initial = controls[controls["kind"] == INITIAL]
    given = trials[trials["alpha"] == 0]

    def volume(*frames: pd.DataFrame) -> float:
        points = np.concatenate([frame[names].to_numpy(dtype=float) for frame in (*frames, initial)])
        return float(hypervolume(np.minimum(points, ceilings), reference))

    return {
        "front": volume(trials),
        "alpha_zero": volume(given),
        "extrapolation_only": volume(trials[trials["alpha"] >= 0]),
        "random_direction": volume(given, controls[controls["kind"] == "random_direction"]),
    }


def held_out(front: pd.DataFrame, controls: pd.DataFrame, objectives: tuple[Objective, ...]) -> pd.DataFrame:
    """A row per front point with its objectives on the items for selection and on those for reporting, and their difference.

    Columns: trial, base, epoch, alpha, and per objective its name, ``<name>_held_out`` and ``<name>_difference``; no rows where
    nothing was scored on the items for reporting.
    """
    names = [objective.name for objective in objectives]
    return _joined(front, controls, "held_out", names, "held_out")


def matched_scale(front: pd.DataFrame, controls: pd.DataFrame, objectives: tuple[Objective, ...]) -> pd.DataFrame:
    """A row per front point with its utility as it is and with its logits at the initial model's scale."""
    return _joined(front, controls, "matched_scale", [objectives[1].name], "matched")


def _joined(front: pd.DataFrame, controls: pd.DataFrame, kind: str, names: list[str], suffix: str) -> pd.DataFrame:
    again = controls[(controls["kind"] == kind) & controls["of_trial"].notna()]
    columns = ["trial", "base", "epoch", "alpha", *names]
    if again.empty:
        return pd.DataFrame(columns=[*columns, *(f"{name}_{suffix}" for name in names)])
    scored = again.assign(trial=again["of_trial"].astype(int))[["trial", *names]]
    table = front[columns].merge(scored, on="trial", suffixes=("", f"_{suffix}"))
    return table.assign(**{f"{name}_difference": table[f"{name}_{suffix}"] - table[name] for name in names})


def confirmations(trials: pd.DataFrame, controls: pd.DataFrame, objectives: tuple[Objective, ...]) -> pd.DataFrame:
    """A row per confirmed trial: its objectives over base runs trained from several seeds, on the items for reporting.

    Columns: trial, base, epoch, alpha, seeds (how many further ones), and per objective ``<name>`` (of the study's own seed,
    same items), ``<name>_mean`` and ``<name>_spread`` (standard deviation, n - 1) over all seeds, the own among them.
    """
    retrained = controls[controls["kind"] == "confirm"]
    own = controls[controls["kind"] == "held_out"]
    rows: list[dict[str, Any]] = []
    for trial, group in retrained.groupby("of_trial", sort=True):
        point = trials[trials["trial"] == trial].iloc[0]
        mine = own[own["of_trial"] == trial]
        # Without a split the items for reporting are those the trial itself was scored on.
        start = point if mine.empty else mine.iloc[0]
        row: dict[str, Any] = {key: point[key] for key in ("trial", "base", "epoch", "alpha")}
        row["seeds"] = len(group)
        for objective in objectives:
            values = np.array([start[objective.name], *group[objective.name]], dtype=float)
            row[objective.name] = values[0]
            row[f"{objective.name}_mean"] = values.mean()
            row[f"{objective.name}_spread"] = values.std(ddof=1)
        rows.append(row)
    return pd.DataFrame(rows)


def over_seeds(
    front: pd.DataFrame,
    scored: pd.DataFrame,
    objectives: tuple[Objective, ...],
    siblings: Callable[[str], Mapping[int, str]],
    initial: np.ndarray | None,
) -> pd.DataFrame:
    """A row per front point: its objectives over the study's seeds, the same epoch and alpha of base runs trained from each.

    A point holds over the seeds if it was scored at every seed and collapsed at none, and no other such point, nor the initial
    model, is at least as good in the means of all objectives.

    Columns: trial, base, epoch, alpha, seeds (at how many it was scored), holds, and per objective ``<name>``, ``<name>_mean``
    and ``<name>_spread`` (standard deviation, n - 1). No rows in a study of one seed.

    Args:
        front: Rows of the front.
        scored: All trials, and the controls of kind ``other_seed``.
        objectives: What is maximised.
        siblings: Gives the base runs that differ from one in their seed only, by seed.
        initial: (m,) objectives of the initial model; None before it is scored.
    """
    names = [objective.name for objective in objectives]
    by_point = {(row["base"], row["epoch"], row["alpha"]): row for row in scored.to_dict("records")}
    rows: list[dict[str, Any]] = []
    for point in front.to_dict("records"):
        labels = siblings(point["base"])
        found = [by_point.get((label, point["epoch"], point["alpha"])) for label in labels.values()]
        known = [row for row in found if row is not None]
        if not labels:
            continue
        values = np.array([[row[name] for name in names] for row in known], dtype=float)
        means, spreads = values.mean(axis=0), values.std(axis=0, ddof=1) if len(known) > 1 else np.full(len(names), np.nan)
        row = {**{key: point[key] for key in ("trial", "base", "epoch", "alpha", *names)}, "seeds": len(known)}
        row["holds"] = len(known) == len(labels) and not any(isinstance(row.get("collapsed"), str) for row in known)
        row |= {f"{name}_mean": mean for name, mean in zip(names, means, strict=True)}
        rows.append(row | {f"{name}_spread": spread for name, spread in zip(names, spreads, strict=True)})
    table = pd.DataFrame(rows)
    if not table.empty and table["holds"].any():
        means = table.loc[table["holds"], [f"{name}_mean" for name in names]].to_numpy(dtype=float)
        table.loc[table["holds"], "holds"] = non_dominated_from(means, initial)
    return table


def holding(front: pd.DataFrame, seeds: pd.DataFrame) -> tuple[pd.DataFrame, str | None]:
    """Return the points of a front that hold over the seeds, or all where none does; and what is to be said of it.

    Args:
        front: Rows of the front.
        seeds: `over_seeds`; without rows nothing is asked.
    """
    if seeds.empty:
        return front, None
    holds = front[front["trial"].isin(seeds.loc[seeds["holds"], "trial"])]
    if holds.empty:
        return front, "no point of the front holds over all seeds: chosen from all"
    return holds, f"chosen from the {len(holds)} of {len(front)} front points that hold over all seeds"


def attainment(scored: pd.DataFrame, names: list[str], seeds: Mapping[str, int]) -> dict[str, list[list[float]]]:
    """Return the corners of what shares of the seeds attain (`search.problem.pareto.attainment_surface`), by share: ``25%``.

    Args:
        scored: All trials, and the controls of kind ``other_seed``.
        names: The two objectives.
        seeds: Seed by base run; none in a study of one seed, which has no surfaces.
    """
    of_seed = scored["base"].map(dict(seeds))
    fronts = [scored.loc[of_seed == seed, names].to_numpy(dtype=float) for seed in sorted(set(seeds.values()))]
    return {f"{share:.0%}": attainment_surface(fronts, share).tolist() for share in ATTAINED} if seeds else {}
