"""List the controls of a study: what trials are compared with, so that a gain can be distinguished from damage.

One entry of `CONTROLS` says everything about a kind of control: when it is scored, on which items, with which update, and
how tables and figures show it. Titles, purposes and markers of the report come from here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from search.evaluation.audits import AUDITS, Audit
from search.evaluation.task import TASKS, task_of
from search.problem.trial import INITIAL, NEVER_FINETUNED, OTHER_RETAIN, RETAIN, TrialSpec
from search.store.trials import on_front

if TYPE_CHECKING:
    from search.evaluation.models import ReferenceModel
    from search.evaluation.prepared import PreparedStudy
    from search.store.study_store import StudyStore
    from uipe_core.deltas.update_vectors import UpdateVector


@dataclass(frozen=True)
class Marker:
    """How figures draw a kind of control.

    Attributes:
        shape: Matplotlib's marker.
        label: Its name in legends.
        size: Area in points squared, for a reference model, which is named in the figure; None for every other control.
        dashes: Line style of its utility level in the curves over alpha; None for no such line.
    """

    shape: str
    label: str
    size: float | None = None
    dashes: tuple[int, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Control:
    """A kind of control.

    Attributes:
        title, purpose: Its name and reason in the report. One without a title is shown with the front point it belongs to.
        marker: How figures draw it; None for not at all.
        given: Trials that follow from the study alone, scored first.
        follow_up: The trials that a point of the finished front asks for; gets the point as a row of
            `StudyStore.trials_frame`, as `base`, `epoch`, `alpha` and `of_trial` of a `TrialSpec`.
        held_out: Scored on the items kept for reporting; every other trial is scored on those for selection.
        update: Replaces the update vector before it is applied; gets the update and the study's seed.
        audit: The attack that the model is held against (`search.evaluation.audits`); None for every other control.
    """

    title: str = ""
    purpose: str = ""
    marker: Marker | None = None
    given: "Callable[[PreparedStudy], list[TrialSpec]] | None" = None
    follow_up: "Callable[[StudyStore, Mapping[str, Any], dict[str, Any]], list[TrialSpec]] | None" = None
    held_out: bool = False
    update: "Callable[[UpdateVector, int], UpdateVector] | None" = None
    audit: Audit | None = None


def _scored(prepared: "PreparedStudy", model: "ReferenceModel") -> bool:
    """Return whether the scores of a reference model have every objective: those of its log, since workers hold no other model
    than the initial one."""
    if model.name == INITIAL:
        return True
    logged = all(objective.scored_on_reference_models for objective in prepared.spec.maximised)
    # Min-K% is in no log but the study's own.
    given = model.log is not None and any(objective.membership for objective in prepared.spec.maximised)
    return logged and prepared.spec.lm_eval is None and not given


def _reference(kind: str) -> "Callable[[PreparedStudy], list[TrialSpec]]":
    def given(prepared: "PreparedStudy") -> list[TrialSpec]:
        models = [model for model in prepared.models.references() if model.kind == kind and _scored(prepared, model)]
        return [TrialSpec(model.kind, model=model.name) for model in models]

    return given


def _held_out_references(prepared: "PreparedStudy") -> list[TrialSpec]:
    if prepared.spec.split is None:
        return []
    models = [model for model in prepared.models.references() if model.name in (INITIAL, RETAIN) and _scored(prepared, model)]
    return [TrialSpec("held_out", model=model.name) for model in models]


def _temperatures(prepared: "PreparedStudy") -> list[TrialSpec]:
    values = prepared.spec.scoring.temperatures if task_of(prepared.corpus).reads_logits else ()
    return [TrialSpec("temperature", temperature=value) for value in values]


def _next_epochs(prepared: "PreparedStudy") -> list[TrialSpec]:
    unlearning = prepared.spec.unlearning
    if unlearning is None or prepared.trained_epochs == unlearning.epochs:
        return []
    return [TrialSpec("next_epoch", run.label, unlearning.epochs + 1, 0.0) for run in prepared.spec.variants()]


def _random_direction(store: "StudyStore", row: Mapping[str, Any], point: dict[str, Any]) -> list[TrialSpec]:
    return [TrialSpec("random_direction", **point)] if row["alpha"] != 0 else []


def _held_out(store: "StudyStore", row: Mapping[str, Any], point: dict[str, Any]) -> list[TrialSpec]:
    return [] if store.spec.split is None else [TrialSpec("held_out", **point)]


def _matched_scale(store: "StudyStore", row: Mapping[str, Any], point: dict[str, Any]) -> list[TrialSpec]:
    scale = row.get("logit_scale")
    if not TASKS[store.spec.corpus.task].reads_logits or scale is None or not np.isfinite(scale) or scale <= 0:
        return []
    return [TrialSpec("matched_scale", **point, temperature=float(scale))]


def _other_seeds(store: "StudyStore", row: Mapping[str, Any], point: dict[str, Any]) -> list[TrialSpec]:
    siblings = store.spec.siblings(str(row["base"])).values()
    return [TrialSpec("other_seed", **{**point, "base": label}) for label in siblings if label != row["base"]]


def _randomised(update: "UpdateVector", seed: int) -> "UpdateVector":
    from uipe_core.deltas.update_vectors import random_direction

    return random_direction(update, seed)


CONTROLS: dict[str, Control] = {
    INITIAL: Control(
        "Initial model",
        "Still knows everything: where every walk starts, and the utility worth keeping.",
        Marker("D", "initial model", 62.0, (0, (6, 3))),
        given=_reference(INITIAL),
    ),
    RETAIN: Control(
        "Retain model",
        "Never saw the forget set: what perfect forgetting looks like, by definition.",
        Marker("*", "retain model", 150.0, (0, (1, 1.5))),
        given=_reference(RETAIN),
    ),
    OTHER_RETAIN: Control(
        "Retain models of other seeds",
        "Perfect forgetting again, from other seeds: how far forget quality varies where there is nothing to choose.",
        Marker("*", "control: retain model of another seed"),
        given=_reference(OTHER_RETAIN),
    ),
    NEVER_FINETUNED: Control(
        "Never fine-tuned",
        "The model before it learned any of this: forget quality alone would choose it, and its utility says why not.",
        Marker("P", "control: never fine-tuned"),
        given=_reference(NEVER_FINETUNED),
    ),
    "next_epoch": Control(
        "Next epoch",
        "One more epoch of plain training: a longer walk must beat what training on would have given.",
        Marker("+", "control: next epoch of training"),
        given=_next_epochs,
    ),
    "random_direction": Control(
        "Random direction",
        "Same norm in every tensor, same alpha, drawn at random: what the size of a step does without its direction.",
        Marker("x", "control: random direction"),
        follow_up=_random_direction,
        update=_randomised,
    ),
    "temperature": Control(
        "Logit temperature",
        "The initial model with scaled logits: how much utility sharper probabilities give with nothing learned.",
        Marker("1", "control: logit temperature"),
        given=_temperatures,
    ),
    # Shown with the front point they belong to: the point on the held-out items, with its logits at the initial model's
    # scale, walked from the base runs of the study's other seeds, and from further seeds (`uipe confirm`).
    "held_out": Control(given=_held_out_references, follow_up=_held_out, held_out=True),
    "matched_scale": Control(follow_up=_matched_scale),
    "other_seed": Control(follow_up=_other_seeds),
    "confirm": Control(held_out=True),
    **{kind: Control(audit=audit) for kind, audit in AUDITS.items()},
}
"""Controls by kind (`TrialSpec.kind`), in the order of the report."""


def is_audit(job: TrialSpec) -> bool:
    """Return True for an attack on a model (`search.evaluation.audits`)."""
    return job.is_control and CONTROLS[job.kind].audit is not None


def given_controls(prepared: "PreparedStudy") -> list[TrialSpec]:
    """List the controls that follow from the study alone."""
    return [trial for control in CONTROLS.values() if control.given is not None for trial in control.given(prepared)]


def _scored_as_trials(kind: str, temperature: float) -> bool:
    """Return True for a control that scores its point as a trial of the search would: same update, items and logits."""
    control = CONTROLS.get(kind)  # of an extension that is not installed here nothing is known
    if control is None or control.update is not None or control.held_out or control.audit is not None:
        return False
    return temperature == 1.0 or math.isnan(temperature)  # tables have no number where it is 1


def follow_up_trials(store: "StudyStore") -> list[TrialSpec]:
    """List the controls that the front asks for and that have not been scored.

    A control that scores its point as trials are scored is left out where a trial, or another control, did so already.
    """
    trials = store.trials_frame()
    if trials.empty:
        return []
    controls = store.controls_frame()
    known = controls[controls["of_trial"].notna()].to_dict("records") if "of_trial" in controls else []
    done = {(row["kind"], int(row["of_trial"]), row["base"]) for row in known}
    plain = [row for row in known if _scored_as_trials(row["kind"], float(row.get("temperature", math.nan)))]
    scored = {(row["base"], row["epoch"], row["alpha"]) for row in [*trials.to_dict("records"), *plain]}
    front = trials[on_front(trials, controls, [objective.name for objective in store.objectives])]
    found = []
    for row in front.to_dict("records"):
        point = {"base": row["base"], "epoch": int(row["epoch"]), "alpha": float(row["alpha"]), "of_trial": int(row["trial"])}
        for control in CONTROLS.values():
            asked = [] if control.follow_up is None else control.follow_up(store, {str(key): row[key] for key in row}, point)
            for job in asked:
                place = (job.base, job.epoch, job.alpha)
                plainly = _scored_as_trials(job.kind, job.temperature)
                if (job.kind, job.of_trial, job.base) in done or (plainly and place in scored):
                    continue
                found.append(job)
                scored |= {place} if plainly else set()
    return found
