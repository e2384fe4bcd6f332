"""What a worker does with one job: move the model, score it, and return the evidence. Knows nothing of Ray or Optuna."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.evaluation.pruning import bounds, certificate
from search.evaluation.task import Report, is_flagged, measure, scorer_of, suspicious_utility
from search.problem.trial import REPORTED_KINDS, TrialSpec, identity
from uipe_core.corpora.split import Rows, Split, take_items
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.initial_weights import pristine, saved_folder
from uipe_core.deltas.store import DeltaStore
from uipe_core.deltas.update_vectors import UpdateVector, random_direction
from uipe_core.metrics.collapse import collapse_reason
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.multiple_choice import ChoiceMetrics
from uipe_core.metrics.scores import ScoreReport
from uipe_core.metrics.tofu import Metrics, quality_ratios
from uipe_core.metrics.uncertainty import paired_permutation
from uipe_core.models.loading import DTYPES, LoadedModel, ModelSource, cast_weights, set_threads
from uipe_core.models.prompts import PromptFormat
from uipe_core.scoring.scorer import GENERATION, Scorer, ScoringConfig
from uipe_core.storage.remote_store import RemoteLocation


@dataclass(frozen=True)
class StudyContext:
    """Everything a worker needs to score any job of a study; travels to the workers once.

    Attributes:
        corpus: Evaluation sets.
        split: Which of their items are for selection and which for reporting.
        source: The initial model.
        deltas: Root of the delta store.
        methods: Method by base-run label.
        references: Scores of the models that are scored as they are, by name, on all items.
        scoring: Batch size and generation length.
        definition: Metric definition.
        seed: Seed of the random directions.
        threads: Torch threads per worker.
        trial_minutes: Longest a trial may take; None without a limit.
    """

    corpus: Corpus
    split: Split
    source: ModelSource
    deltas: Path | RemoteLocation
    methods: Mapping[str, str]
    references: Mapping[str, Report]
    scoring: ScoringConfig
    definition: str
    seed: int
    threads: int
    trial_minutes: float | None = None


def load_for_scoring(source: ModelSource) -> tuple[LoadedModel, Extrapolator]:
    """The initial model in the dtype it is scored in, and its walker, which starts from the weights as stored."""
    loaded = source.load(dtype="auto")
    initial = pristine(loaded.model, saved_folder(source.location, source.revision))
    if source.dtype != "auto":
        cast_weights(loaded.model, DTYPES[source.dtype])
    return loaded, Extrapolator(loaded.model, initial)


class _Half:
    """One half of the items: how they are scored, and what the reference models have on them."""

    def __init__(self, context: StudyContext, rows: Rows, prompts: PromptFormat) -> None:
        corpus = take_items(context.corpus, rows)
        self.scorer = scorer_of(corpus, prompts, context.scoring)
        self.references = {name: report.take(rows, corpus.set_hashes) for name, report in context.references.items()}
        self.suspicious_utility = suspicious_utility(self.references, context.definition)


class Evaluator:
    """Scores jobs one after another on one resident model.

    Args:
        context: The study's context.
    """

    def __init__(self, context: StudyContext) -> None:
        set_threads(context.threads)
        self.context = context
        self.loaded, self._walker = load_for_scoring(context.source)
        self._halves: dict[bool, _Half] = {}
        self._deltas = DeltaStore(context.deltas)
        self._last: tuple[tuple[tuple[str, ...], int], UpdateVector, float] | None = None

    def evaluate(self, job: TrialSpec) -> tuple[dict[str, Any], Report]:
        """Evidence of one job, flat and JSON-able with objectives under their metric names; and the scores behind it.

        Of a job that one of its rivals dominates whatever the rest may be, the evidence has the certificate of that under
        ``pruned`` in place of numbers, and the scores are those of the stages that were scored.

        Args:
            job: What to score.
        """
        started = time.perf_counter()
        half = self._half(job.kind in REPORTED_KINDS)
        report, norm, dominated = self._report(job, half)
        if dominated is None:
            metrics = measure(report, half.references.get("retain"), self.context.definition)
            found = {
                **evidence(job, metrics, report, half.references["initial"], self.context.methods),
                **self._paired(report, half),
                "flagged": is_flagged(metrics, half.suspicious_utility),
            }
        else:
            found = {**identity(job, self.context.methods), "definition": self.context.definition, "pruned": dominated}
        facts = {
            **found,
            "update_norm": None if norm is None else norm * abs(1.0 + (job.alpha or 0.0)),
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "device": self.loaded.device.type,
            "seconds": time.perf_counter() - started,
            "seconds_by_stage": dict(report.seconds),
        }
        size = half.scorer.batch_size
        return (facts if size in (None, self.context.scoring.batch_size) else {**facts, "batch_size": size}), report

    def _half(self, reported: bool) -> _Half:
        if reported not in self._halves:
            split = self.context.split
            rows = split.report if reported else split.select
            self._halves[reported] = _Half(self.context, rows, self.loaded.prompts)
        return self._halves[reported]

    def _report(self, job: TrialSpec, half: _Half) -> tuple[Report, float | None, dict[str, Any] | None]:
        """Scores, the norm of the update vector, and the certificate of a job that was not scored to its end."""
        if job.model is not None:
            return half.references[job.model], None, None
        if job.run is None or job.epoch is None or job.alpha is None:
            return half.scorer.score(self._on(self._walker.reset()), temperature=job.temperature), None, None
        update, norm = self._update(job.delta, job.epoch)
        if job.kind == "random_direction":
            update = random_direction(update, self.context.seed)
        applying = time.perf_counter()
        model = self._walker.apply(update, job.alpha)
        applied = time.perf_counter() - applying
        report, dominated = self._scored(job, half, self._on(model))
        return replace(report, seconds={"apply": applied, **report.seconds}), norm, dominated

    def _scored(self, job: TrialSpec, half: _Half, loaded: LoadedModel) -> tuple[Report, dict[str, Any] | None]:
        """The scores of a model, as far as they matter, and why not further. Letters have no stages yet."""
        if not job.rivals or not isinstance(half.scorer, Scorer):
            return half.scorer.score(loaded, temperature=job.temperature), None
        retain = half.references["retain"]
        assert isinstance(retain, ScoreReport)
        for report in half.scorer.stages(loaded, temperature=job.temperature):
            stage = list(report.seconds)[-1]
            if stage != GENERATION:
                bound = bounds(report, retain, self.context.definition, job.rivals[0]["values"])
                if (found := certificate(stage, bound, job.rivals)) is not None:
                    return report, found
        return report, None

    def _paired(self, report: Report, half: _Half) -> dict[str, float]:
        """p-value of the paired test between the truth ratios of a model and the retain model; nothing for multiple choice."""
        retain = half.references.get("retain")
        if not isinstance(report, ScoreReport) or not isinstance(retain, ScoreReport):
            return {}
        definition = definition_named(self.context.definition)
        ratios, expected = (quality_ratios(each.sets["forget"], definition) for each in (report, retain))
        return {"paired_p": paired_permutation(ratios, expected, self.context.seed)}

    def _on(self, model: Any) -> LoadedModel:
        return replace(self.loaded, model=model)

    def _update(self, delta: tuple[str, ...], epoch: int) -> tuple[UpdateVector, float]:
        """The update vector of a base epoch and its norm; the last one stays open, in memory where it is small."""
        if not delta:
            raise ValueError("a job of a base run comes with the entries of the delta store that hold it")
        if self._last is None or self._last[0] != (delta, epoch):
            self._last = None  # first: what it holds of the node's cache may be the room that the next one needs
            run = self._deltas.open(delta)
            # The norm as recorded: a walk of a large update reads it once, and taking its norm would be another reading.
            self._last = ((delta, epoch), run.load(epoch), run.epochs[epoch - 1]["norm"])
        return self._last[1:]


def evidence(
    job: TrialSpec, metrics: Metrics | ChoiceMetrics, report: Report, initial: Report, methods: Mapping[str, str]
) -> dict[str, Any]:
    """Everything a trial carries about its numbers."""
    scale = None
    if report.logit_scale is not None and initial.logit_scale:
        scale = report.logit_scale / initial.logit_scale
    return {
        **identity(job, methods),
        "logit_scale": scale,
        "collapsed": collapse_reason(report) if isinstance(report, ScoreReport) else None,
        **(metrics.as_dict() if isinstance(metrics, ChoiceMetrics) else _free_text(metrics)),
    }


def _free_text(metrics: Metrics) -> dict[str, Any]:
    quality = metrics.forget_quality
    if quality is None:
        raise ValueError("a trial is always scored against a reference")
    return {
        "definition": metrics.definition,
        "log10_forget_quality": quality.log10_p,
        "forget_quality": quality.p_value,
        "ks_statistic": quality.ks_statistic,
        "model_utility": metrics.model_utility,
        "components": dict(metrics.components),
        "forget_components": dict(metrics.forget),
        **{f"{name}_{key}": value for name, memorized in metrics.memorization.items() for key, value in memorized.items()},
        **{f"{name}_log10_forget_quality": related.log10_p for name, related in metrics.related.items()},
    }
