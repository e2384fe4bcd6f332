"""What a worker does with one job: move the model, score it, and return the evidence. Knows nothing of Ray or Optuna."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from search.space import Point
from uipe_core.corpora.types import Corpus
from uipe_core.delta_store import BaseRun
from uipe_core.metrics import Metrics, evaluate
from uipe_core.models import DTYPES, LoadedModel, ModelSource, cast_weights, set_threads
from uipe_core.score_report import ScoreReport
from uipe_core.scoring import Scorer, ScoringConfig
from uipe_core.update_vectors import Extrapolator, UpdateVector, random_direction, snapshot

POINT_KINDS = ("alpha_zero", "search")
"""Points of the search space: trials of the study."""

CONTROL_KINDS = ("initial", "retain", "next_epoch", "temperature", "random_direction")
"""What the trials are compared with: trials of the controls study."""


@dataclass(frozen=True)
class Job:
    """One thing to score.

    Attributes:
        kind: One of `POINT_KINDS` or `CONTROL_KINDS`.
        base, epoch, alpha: Which update vector, walked how far; None where no vector is involved.
        temperature: Logits are divided by it.
        of_trial: For a random direction, the trial whose base, epoch and alpha it mirrors.
    """

    kind: str
    base: str | None = None
    epoch: int | None = None
    alpha: float | None = None
    temperature: float = 1.0
    of_trial: int | None = None


@dataclass(frozen=True)
class StudyContext:
    """Everything a worker needs to score any job of a study; travels to the workers once.

    Attributes:
        corpus: Evaluation sets.
        source: The initial model.
        runs: Finished base runs by label.
        methods: Method by base-run label.
        reference: Scores of the retain model.
        initial: Scores of the initial model.
        scoring: Batch size and generation length.
        definition: Metric definition.
        seed: Seed of the random directions.
        threads: Torch threads per worker.
    """

    corpus: Corpus
    source: ModelSource
    runs: Mapping[str, BaseRun]
    methods: Mapping[str, str]
    reference: ScoreReport
    initial: ScoreReport
    scoring: ScoringConfig
    definition: str
    seed: int
    threads: int


def load_for_scoring(source: ModelSource) -> tuple[LoadedModel, Extrapolator]:
    """The initial model in the dtype it is scored in, and its walker, which starts from the weights as stored."""
    loaded = source.load(dtype="auto")
    initial = snapshot(loaded.model)
    if source.dtype != "auto":
        cast_weights(loaded.model, DTYPES[source.dtype])
    return loaded, Extrapolator(loaded.model, initial)


class Evaluator:
    """Scores jobs one after another on one resident model.

    Args:
        context: The study's context.
    """

    def __init__(self, context: StudyContext) -> None:
        set_threads(context.threads)
        self.context = context
        self.loaded, self._walker = load_for_scoring(context.source)
        self._scorer = Scorer(context.corpus, self.loaded.prompts, context.scoring)
        self._utility_initial = evaluate(context.initial, context.reference, context.definition).model_utility
        self._utility_retain = evaluate(context.reference, context.reference, context.definition).model_utility
        self._last: tuple[tuple[str, int], UpdateVector] | None = None

    def evaluate(self, job: Job) -> dict[str, Any]:
        """Evidence of one job: flat, JSON-able; objectives under their metric names."""
        started = time.perf_counter()
        report, norm = self._report(job)
        metrics = evaluate(report, self.context.reference, self.context.definition)
        return {
            **evidence(job, metrics, report, self.context.initial, self.context.methods),
            "flagged": metrics.model_utility > max(self._utility_initial, self._utility_retain),
            "update_norm": None if norm is None else norm * abs(1.0 + (job.alpha or 0.0)),
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "device": self.loaded.device.type,
            "seconds": time.perf_counter() - started,
            "seconds_by_stage": dict(report.seconds),
        }

    def _report(self, job: Job) -> tuple[ScoreReport, float | None]:
        if job.kind == "initial":
            return self.context.initial, None
        if job.kind == "retain":
            return self.context.reference, None
        if job.base is None or job.epoch is None or job.alpha is None:
            return self._scorer.score(self._on(self._walker.reset()), temperature=job.temperature), None
        update = self._update(job.base, job.epoch)
        if job.kind == "random_direction":
            update = random_direction(update, self.context.seed)
        applying = time.perf_counter()
        model = self._walker.apply(update, job.alpha)
        applied = time.perf_counter() - applying
        report = self._scorer.score(self._on(model), temperature=job.temperature)
        return replace(report, seconds={"apply": applied, **report.seconds}), update.norm

    def _on(self, model: Any) -> LoadedModel:
        return replace(self.loaded, model=model)

    def _update(self, base: str, epoch: int) -> UpdateVector:
        """The update vector of a base epoch; the last one stays in memory."""
        if self._last is None or self._last[0] != (base, epoch):
            self._last = ((base, epoch), self.context.runs[base].load(epoch))
        return self._last[1]


def evidence(
    job: Job, metrics: Metrics, report: ScoreReport, initial: ScoreReport, methods: Mapping[str, str]
) -> dict[str, Any]:
    """Everything a trial carries about its numbers."""
    quality = metrics.forget_quality
    if quality is None:
        raise ValueError("a trial is always scored against a reference")
    scale = None
    if report.logit_scale is not None and initial.logit_scale:
        scale = report.logit_scale / initial.logit_scale
    facts: dict[str, Any] = {
        "kind": job.kind,
        "base": job.base,
        "method": None if job.base is None else methods[job.base],
        "epoch": job.epoch,
        "alpha": job.alpha,
        "walk": _walk(job),
        "definition": metrics.definition,
        "log10_forget_quality": quality.log10_p,
        "forget_quality": quality.p_value,
        "ks_statistic": quality.ks_statistic,
        "model_utility": metrics.model_utility,
        "components": dict(metrics.components),
        "forget_components": dict(metrics.forget),
        "logit_scale": scale,
    }
    for name, related in metrics.related.items():
        facts[f"{name}_log10_forget_quality"] = related.log10_p
    if job.temperature != 1.0:
        facts["temperature"] = job.temperature
    if job.of_trial is not None:
        facts["of_trial"] = job.of_trial
    return facts


def _walk(job: Job) -> str | None:
    if job.base is None or job.epoch is None or job.alpha is None:
        return None
    return Point(job.base, job.epoch, job.alpha).walk
