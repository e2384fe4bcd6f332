"""One thing to score: what travels to a worker, and what its trial carries about it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from search.problem.space import Point

Rival = Mapping[str, Any]
"""A complete trial as it travels with a job: ``trial``, its number, and ``values``, its objectives by name."""

POINT_KINDS = ("alpha_zero", "search", "dial")
"""Points of the search space, trials of the study: given, proposed, and asked for by `search.results.constrained`."""

INITIAL, RETAIN, OTHER_RETAIN, NEVER_FINETUNED = "initial", "retain", "other_retain", "never_finetuned"
REFERENCE_KINDS = (INITIAL, RETAIN, OTHER_RETAIN, NEVER_FINETUNED)
"""Models scored as they are. Every kind of trial that is no point is a control (`search.evaluation.controls.CONTROLS`)."""

AUDITS: dict[str, tuple[str, ...]] = {
    "quantisation": ("int8", "int4", "nf4"),
    "relearning": ("relearn_forget", "relearn_few", "relearn_retain"),
    "membership": ("membership",),
    "prompts": ("prompts",),
    "sampling": ("sampling",),
    "fluency": ("fluency",),
}
"""Audits by the name that a study file or command line gives, and the kinds of control that each consists of."""

UNTESTED = "untested"
"""What a control carries in place of numbers where an audit could not be done: the reason."""


@dataclass(frozen=True)
class TrialSpec:
    """One thing to score.

    Attributes:
        kind: One of `POINT_KINDS`, or a control.
        base, epoch, alpha: Which update vector, walked how far; None where no vector is involved.
        temperature: Logits are divided by it.
        of_trial: For a control of a front point, that trial.
        model: Name of the reference model where no vector is involved; None for the initial one.
        seed: For a confirmation, the seed its base run was trained with.
        delta: Entries of the delta store that hold its base run. They travel with the job, because a base run may be published
            after a worker has started; they do not make it another job.
        warm_start: The earlier study on whose front the point was; that does not make it another job either.
        rivals: Complete trials; scoring ends early when one of them dominates whatever the trial may become
            (`search.evaluation.pruning`). They are those of the moment at which it is handed out.
        floor: The utility floor a point was asked for by (`search.results.constrained`), as a share; nor does that.
        settings: For an audit that has some, its settings as JSON: with others it is another job.
    """

    kind: str
    base: str | None = None
    epoch: int | None = None
    alpha: float | None = None
    temperature: float = 1.0
    of_trial: int | None = None
    model: str | None = None
    seed: int | None = None
    delta: tuple[str, ...] = field(default=(), compare=False)
    warm_start: str | None = field(default=None, compare=False)
    rivals: tuple[Rival, ...] = field(default=(), compare=False)
    floor: float | None = field(default=None, compare=False)
    settings: str | None = None

    @property
    def is_control(self) -> bool:
        """True for what points are compared with: it is a trial of the controls study."""
        return self.kind not in POINT_KINDS

    @property
    def run(self) -> str | None:
        """Its base run: the label, or `retrained` from another seed."""
        return self.base if self.seed is None else retrained(str(self.base), self.seed)

    def as_text(self) -> str:
        """As it travels: JSON, because Tune copies, formats and writes a configuration several times, value by value."""
        return json.dumps({each.name: getattr(self, each.name) for each in fields(self)})

    @staticmethod
    def from_text(text: str) -> "TrialSpec":
        """Return what `as_text` gave."""
        given = json.loads(text)
        return TrialSpec(**{**given, "delta": tuple(given["delta"]), "rivals": tuple(given["rivals"])})


def retrained(label: str, seed: int) -> str:
    """Name of a base run that was trained again from another seed, in place of the seed that its label may name."""
    return f"{label.partition('@')[0]}@{seed}"


def identity(job: TrialSpec, methods: Mapping[str, str]) -> dict[str, Any]:
    """Return what a trial carries about the job it is."""
    facts: dict[str, Any] = {
        "kind": job.kind,
        "base": job.base,
        "method": None if job.base is None else methods[job.base],
        "epoch": job.epoch,
        "alpha": job.alpha,
        "walk": _walk(job),
    }
    if job.temperature != 1.0:
        facts["temperature"] = job.temperature
    origin = ("of_trial", "model", "seed", "warm_start", "floor", "settings")
    facts.update({name: value for name in origin if (value := getattr(job, name)) is not None})
    return facts


def _walk(job: TrialSpec) -> str | None:
    if job.base is None or job.epoch is None or job.alpha is None:
        return None
    return Point(job.base, job.epoch, job.alpha).walk
