"""Where a study begins: the fronts of earlier studies, scored first as points of its search."""

from dataclasses import dataclass
from pathlib import Path

from search.problem.objectives import objectives_of
from search.problem.pareto import non_dominated
from search.problem.space import Point
from search.spec.study import StudySpec
from search.store.study_store import StudyStore
from uipe_core.errors import UserError


@dataclass(frozen=True)
class EarlierFronts:
    """What earlier studies offer.

    Attributes:
        points: Front points that exist in this study too, in the order of `warm_start`, each once.
        notes: What was left out, and why.
    """

    points: tuple[Point, ...]
    notes: tuple[str, ...]


def earlier_fronts(spec: StudySpec) -> EarlierFronts:
    """The fronts of the studies that `spec.warm_start` names, as points of this study.

    Numbers are not taken over: corpus, model or definition may be others here, so every point is scored again.

    Raises:
        UserError: If a folder holds no study or no trial, or its study maximises something else.
    """
    points: dict[Point, None] = {}
    notes: list[str] = []
    for place, folder in enumerate(spec.warm_start):
        name, front = _front_of(spec, f"warm_start[{place}]: ", Path(folder))
        for point in front:
            reason = _misfit(spec, point)
            if reason is not None:
                where = f"{point.base}, epoch {point.epoch}, alpha {point.alpha:.4g}"
                notes.append(f"warm_start: {where} of {name} is left out: {reason}")
            else:
                points.setdefault(point)
    return EarlierFronts(tuple(points), tuple(notes))


def _front_of(spec: StudySpec, where: str, folder: Path) -> tuple[str, list[Point]]:
    """Name of the study in a folder, and its front."""
    try:
        store = StudyStore.open(folder)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    ours = [objective.name for objective in objectives_of(spec)]
    theirs = [objective.name for objective in store.objectives]
    if ours != theirs:
        raise UserError(
            f"{where}{folder}: its study maximises {', '.join(theirs)}, this one {', '.join(ours)}; give studies with the same "
            "objectives, or remove it"
        )
    trials = store.trials_frame()
    store.close()
    if trials.empty:
        raise UserError(f"{where}{folder}: no trial of this study is complete yet; finish it, or remove it")
    name = str(store.record["name"])
    front = trials[non_dominated(trials[ours].to_numpy())]
    return name, [
        Point(str(row["base"]), int(row["epoch"]), float(row["alpha"]), warm_start=name) for row in front.to_dict("records")
    ]


def _misfit(spec: StudySpec, point: Point) -> str | None:
    """Why a point is none of this study's search, or None."""
    epochs, alpha = spec.base_epochs(), spec.search.alpha
    if point.base not in epochs:
        return f"this study has no base run {point.base} (it has {', '.join(epochs)})"
    if point.epoch > epochs[point.base]:
        return f"{point.base} has {epochs[point.base]} epochs here"
    if not alpha.low <= point.alpha <= alpha.high:
        return f"search.alpha goes from {alpha.low:g} to {alpha.high:g}"
    return "it is scored anyway" if point.alpha == 0 else None
