"""Compare studies with each other, and with published numbers: which published models do a study's trials match?"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from search.problem.pareto import hypervolume, non_dominated
from search.problem.trial import INITIAL, RETAIN
from search.results.study_result import StudyResult
from search.store.trials import collapsed
from uipe_core.errors import UserError, did_you_mean
from uipe_core.storage.files import read_regular

MODELS = {"unlearned": None, "initial": INITIAL, "retain": RETAIN}
"""What a published row may be, with the control that it is compared with."""

P_VALUE, QUALITY = "forget_quality", "log10_forget_quality"


@dataclass(frozen=True)
class PublishedModel:
    """A published model.

    Attributes:
        name: What the source calls it.
        model: One of `MODELS`.
        source: Where its numbers stand.
        numbers: By name of the study's numbers; forget quality as its log10.
    """

    name: str
    model: str
    source: str
    numbers: Mapping[str, float]


def read_published(path: Path, known: list[str], definition: str) -> list[PublishedModel]:
    """Read a CSV file of published numbers.

    Args:
        path: Columns ``name``, ``model`` (`MODELS`), ``source``, perhaps ``definition``, and numbers of the study; an empty
            cell was not published. ``forget_quality`` may stand for its log10. Lines that begin with # are comments.
        known: Numbers that the study's trials have.
        definition: Metric definition of the study; rows of another one are refused.

    Raises:
        UserError: All that is wrong with the file, with its lines.
    """
    text = read_regular(path).decode("utf-8-sig", errors="replace")
    rows = list(csv.reader(text.splitlines()))
    lines = [
        (number, [cell.strip() for cell in row]) for number, row in enumerate(rows, 1) if any(cell.strip() for cell in row)
    ]
    lines = [(number, row) for number, row in lines if not row[0].startswith("#")]
    if len(lines) < 2:
        raise UserError(f"{path}: no published numbers; give a line of names (name,model,source,...) and one for each model")
    head, faults, found = lines[0][1], [], []
    faults += [f"line {lines[0][0]}: no column {name!r}" for name in ("name", "model", "source") if name not in head]
    for name in head:
        if name not in ("name", "model", "source", "definition", P_VALUE, *known):
            faults.append(f"line {lines[0][0]}: the study has no number {name!r}.{did_you_mean(name, [*known, P_VALUE])}")
    if repeated := sorted({name for name in head if head.count(name) > 1}):
        faults.append(f"line {lines[0][0]}: columns given twice: {', '.join(repeated)}")
    for number, row in lines[1:] if not faults else []:
        try:
            found.append(_model(head, row, definition))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        raise UserError(f"{path}: " + "\n".join(faults))
    return found


def _model(head: list[str], row: list[str], definition: str) -> PublishedModel:
    """Return the model of a line; raise ValueError with what is wrong."""
    if len(row) != len(head):
        raise ValueError(f"{len(row)} cells, and {len(head)} columns")
    cells = dict(zip(head, row, strict=True))
    name, model, source = (cells.pop(key) for key in ("name", "model", "source"))
    theirs = cells.pop("definition", "")
    if theirs and theirs != definition:
        raise ValueError(
            f"definition {theirs!r}: the study's numbers are those of {definition!r}; run it with scoring.definition: {theirs} "
            "or take the line out"
        )
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; give {', '.join(MODELS)}")
    numbers = {}
    for key, cell in cells.items():
        if not cell:
            continue
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"{key}: {cell!r} is no number; leave the cell empty for what was not published") from None
        if not math.isfinite(value) or (key == P_VALUE and not 0 < value <= 1):
            raise ValueError(f"{key}: {cell} is no {'p-value above 0, up to 1' if key == P_VALUE else 'finite number'}")
        numbers[QUALITY if key == P_VALUE else key] = math.log10(value) if key == P_VALUE else value
    return PublishedModel(name, model, source, numbers)


def compare_published(result: StudyResult, path: Path) -> dict[str, Any]:
    """Set the models of a file next to the study's.

    A published model is matched by a trial that is at least as good in the first two objectives; what is above the noise
    ceiling counts as the ceiling. Of several the one with the most utility is shown, else the trial that comes nearest:
    the one whose largest shortfall, as a share of the way from the reference point to the best published value, is smallest.

    Returns:
        JSON-able: ``study``, ``definition``, ``objectives``, ``trainings``, ``scorings``, ``matched``, ``published`` (of
        unlearned models with both objectives), ``models`` (rows: ``name``, ``model``, ``source``, ``numbers``, ``ours`` (trial,
        base, epoch, alpha, numbers; null if there is none), ``matched`` (null where not both objectives are published)).

    Raises:
        UserError: As `read_published`.
    """
    sound = result.trials[~collapsed(result.trials)]
    published = read_published(path, _numbers(result.trials), result.spec.definition)
    names = [objective.name for objective in result.objectives[:2]]
    ceilings = {objective.name: objective.ceiling(result.forget_quality_cap) for objective in result.objectives[:2]}
    compared = [each for each in published if each.model == "unlearned" and each.numbers.keys() >= set(names)]
    corner = result.reference_point()
    best = {name: max([min(each.numbers[name], ceilings[name]) for each in compared], default=math.nan) for name in names}
    rows = []
    for each in published:
        ours: pd.Series | None = None
        matched = None
        if (kind := MODELS[each.model]) is not None:
            ours = result.control(kind)
        elif each in compared and len(sound):
            points = np.minimum(sound[names].to_numpy(dtype=float), [ceilings[name] for name in names])
            aim = np.minimum([each.numbers[name] for name in names], [ceilings[name] for name in names])
            lengths = [max(best[name] - corner[name], 1e-12) for name in names]
            short = ((aim - points) / lengths).clip(min=0).max(axis=1)
            matched = bool((short == 0).any())
            ours = sound.iloc[max(np.flatnonzero(short == short.min()), key=lambda place: points[place, 1])]
        rows.append(
            {"name": each.name, "model": each.model, "source": each.source, "numbers": dict(each.numbers), "matched": matched}
            | {"ours": None if ours is None else _point(ours, kind is None, list(each.numbers))}
        )
    return {
        "study": result.store.record.name,
        "definition": result.spec.definition,
        "objectives": names,
        "trainings": len(result.spec.variants()),
        "scorings": len(result.trials),
        "matched": sum(row["matched"] is True for row in rows),
        "published": len(compared),
        "models": rows,
    }


def _numbers(trials: pd.DataFrame) -> list[str]:
    """Return the columns of trials that hold numbers a paper may give."""
    numeric = trials.select_dtypes("number").columns
    return [name for name in numeric if name not in ("trial", "epoch", "alpha", "of_trial", "seconds")]


def _point(row: pd.Series, trial: bool, names: list[str]) -> dict[str, Any]:
    numbers = {name: float(row[name]) for name in names if name in row and pd.notna(row[name])}
    where: dict[str, Any] = {"trial": None}
    if trial:
        where = {"trial": int(row["trial"]), "base": str(row["base"]), "epoch": int(row["epoch"]), "alpha": float(row["alpha"])}
    return {**where, "numbers": numbers}


def compare_studies(results: Sequence[StudyResult]) -> dict[str, Any]:
    """Compare the fronts of studies in their first two objectives, on a common reference point and noise ceiling.

    Args:
        results: Two studies or more.

    Returns:
        JSON-able: ``objectives``, ``definition``, ``reference_point``, ``ceilings``, ``studies`` (rows: ``out``, ``study``,
        ``trainings``, ``scorings``, ``hours``, ``hypervolume``, ``given`` (that of the initial model and trained epochs),
        ``points`` (of the front: trial, base, epoch, alpha, objectives), ``joint`` (how many of them are on the front of all
        studies)), ``notes`` (what speaks against the comparison).

    Raises:
        UserError: Studies of other objectives or another metric definition.
    """
    first = results[0]
    names = [objective.name for objective in first.objectives[:2]]
    for other in results[1:]:
        theirs = [objective.name for objective in other.objectives[:2]]
        if theirs != names:
            raise UserError(
                f"{other.out}: its objectives are {' and '.join(theirs)}, those of {first.out} {' and '.join(names)}"
            )
        if other.spec.definition != first.spec.definition:
            raise UserError(
                f"{other.out}: its numbers are defined as {other.spec.definition} has them, those of {first.out} as "
                f"{first.spec.definition} has them; score one again with scoring.definition of the other"
            )
    corner = np.array([min(result.reference_point()[name] for result in results) for name in names])
    ceilings = np.array(
        [min(each.objectives[place].ceiling(each.forget_quality_cap) for each in results) for place in range(len(names))]
    )

    def points(table: pd.DataFrame) -> "np.ndarray[Any, np.dtype[np.float64]]":
        return np.minimum(table[names].to_numpy(dtype=float), ceilings)

    fronts = [result.healthy_front for result in results]
    joint = non_dominated(np.concatenate([points(front) for front in fronts]))
    rows, start = [], 0
    for result, front in zip(results, fronts, strict=True):
        initial = result.controls[result.controls["kind"] == INITIAL]
        given = pd.concat([initial[names], result.trials.loc[result.trials["alpha"] == 0, names]])
        rows.append(
            {
                "out": str(result.out),
                "study": result.store.record.name,
                "trainings": len(result.spec.variants()),
                "scorings": len(result.trials),
                "hours": (result.store.record.usage or {}).get("hours"),
                "hypervolume": float(hypervolume(points(pd.concat([initial[names], front[names]])), corner)),
                "given": float(hypervolume(points(given), corner)),
                "points": [
                    {**_point(row, True, names), "joint": bool(joint[start + n])} for n, (_, row) in enumerate(front.iterrows())
                ],
                "joint": int(joint[start : start + len(front)].sum()),
            }
        )
        start += len(front)
    finite = {name: float(ceiling) if math.isfinite(ceiling) else None for name, ceiling in zip(names, ceilings, strict=True)}
    return {
        "objectives": names,
        "definition": first.spec.definition,
        "reference_point": dict(zip(names, map(float, corner), strict=True)),
        "ceilings": finite,
        "studies": rows,
        "notes": _differences(results),
    }


def _differences(results: Sequence[StudyResult]) -> list[str]:
    """Return what of two studies differs that makes their numbers other things."""
    first, notes = results[0], []
    for other in results[1:]:
        ours, theirs = first.store.record, other.store.record
        if ours.corpus.sets != theirs.corpus.sets or ours.corpus.items.get("select") != theirs.corpus.items.get("select"):
            notes.append(f"{other.out} scores other items than {first.out}: differences may be those of the items")
        elif ours.models.get(INITIAL) != theirs.models.get(INITIAL):
            notes.append(f"{other.out} starts from another initial model than {first.out}")
        elif first.objectives[0].needs_retain_model and ours.models.get(RETAIN) != theirs.models.get(RETAIN):
            notes.append(f"{other.out} compares with another retain model than {first.out}")
    return notes
