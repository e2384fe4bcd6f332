"""Score one trial on a worker: move the model, score it, return its metrics. Knows no Ray and no Optuna."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search.evaluation.audits import Audit, AuditInputs, with_rounded_weights
from search.evaluation.controls import CONTROLS
from search.evaluation.harness import harness_accuracy
from search.evaluation.metrics import TrialMetrics, trial_metrics
from search.evaluation.task import Comparison, Report, Task, task_of
from search.problem.objectives import LM_EVAL, ROUNDED, Objective
from search.problem.trial import INITIAL, RETAIN, UNTESTED, TrialSpec
from search.spec.runtime import Audit as AuditSection
from search.spec.sections import Harness
from uipe_core.corpora.split import Rows, Split, take_items
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.initial_weights import read_initial_weights, saved_folder
from uipe_core.deltas.store import DeltaStore
from uipe_core.deltas.update_vectors import UpdateVector
from uipe_core.errors import UserError
from uipe_core.metrics.scores import ScoreReport
from uipe_core.models.loading import DTYPES, LoadedModel, ModelSource, cast_weights, set_threads
from uipe_core.models.prompts import PromptFormat
from uipe_core.scoring.scorer import ScoringConfig
from uipe_core.storage.remote_store import RemoteLocation


@dataclass(frozen=True)
class StudyContext:
    """Everything a worker needs to score any job of a study; travels to the workers once.

    Attributes:
        corpus: Evaluation sets.
        split: Which of their items are for selection and which for reporting.
        source: The initial model.
        deltas: Root of the delta store.
        references: Scores of the models that are scored as they are, by name, on all items.
        scoring: Batch size and generation length.
        definition: Metric definition.
        objectives: What the study maximises.
        harness: Section ``lm_eval``, the tasks of that objective; None where it is not maximised.
        retain: The retain model, for audits; None where there is none, or its evaluation log alone.
        audits: Section ``audit`` of the study, or its defaults.
        seed: Seed of the random directions.
        threads: Torch threads per worker.
        trial_minutes: Longest a trial may take; None without a limit.
    """

    corpus: Corpus
    split: Split
    source: ModelSource
    deltas: Path | RemoteLocation
    references: Mapping[str, Report]
    scoring: ScoringConfig
    definition: str
    objectives: tuple[Objective, ...]
    seed: int
    threads: int
    trial_minutes: float | None = None
    harness: Harness | None = None
    retain: ModelSource | None = None
    audits: AuditSection = field(default_factory=AuditSection)


def load_for_scoring(source: ModelSource) -> tuple[LoadedModel, Extrapolator]:
    """The initial model in the dtype it is scored in, and its walker, which starts from the weights as stored."""
    loaded = source.load(dtype="auto")
    initial = read_initial_weights(loaded.model, saved_folder(source.location, source.revision))
    if source.dtype != "auto":
        cast_weights(loaded.model, DTYPES[source.dtype])
    return loaded, Extrapolator(loaded.model, initial)


class _Half:
    """One half of the items: its scorer, and the scores of the reference models on it."""

    def __init__(self, context: StudyContext, task: Task, rows: Rows, prompts: PromptFormat) -> None:
        corpus = take_items(context.corpus, rows)
        self.scorer = task.scorer(corpus, prompts, context.scoring)
        self.comparison = Comparison(
            references={name: report.take(rows, corpus.set_hashes) for name, report in context.references.items()},
            definition=context.definition,
            objectives=context.objectives,
            seed=context.seed,
            groups={name: [item.group for item in items] for name, items in corpus.sets.items()},
        )


class Evaluator:
    """Score trials one after another on one resident model.

    Args:
        context: The study's context.
    """

    def __init__(self, context: StudyContext) -> None:
        set_threads(context.threads)
        self.context = context
        self.task = task_of(context.corpus)
        self.loaded, self._walker = load_for_scoring(context.source)
        self._halves: dict[bool, _Half] = {}
        self._deltas = DeltaStore(context.deltas)
        self._retain: LoadedModel | None = None
        self._last: tuple[tuple[tuple[str, ...], int], UpdateVector, float] | None = None

    def evaluate(self, job: TrialSpec) -> tuple[TrialMetrics, Report | None]:
        """Score one trial; return its metrics and the scores they are made of, None for an audit that scores nothing.

        A trial whose bound one of its rivals dominates is not scored to its end: its metrics have the bound in place of
        numbers, and the scores are those of the stages that were scored.
        """
        started = time.perf_counter()
        if job.is_control and (audit := CONTROLS[job.kind].audit) is not None:
            metrics, scores = self._audit(job, audit)
            return replace(metrics, seconds=time.perf_counter() - started), scores
        half = self._half(job.is_control and CONTROLS[job.kind].held_out)
        report, norm, dominated = self._report(job, half)
        if dominated is None:
            found = trial_metrics(self.task, report, half.comparison)
            if self.context.harness is not None:
                found = replace(found, numbers={**found.numbers, LM_EVAL.name: self._harness_accuracy(job)})
        else:
            found = TrialMetrics(self.context.definition, pruned=dominated)
        size = half.scorer.batch_size
        return replace(
            found,
            update_norm=None if norm is None else norm * abs(1.0 + (job.alpha or 0.0)),
            dtype=str(self.loaded.model.dtype).removeprefix("torch."),
            device=self.loaded.device.type,
            seconds=time.perf_counter() - started,
            seconds_by_stage=dict(report.seconds),
            batch_size=None if size == self.context.scoring.batch_size else size,
        ), report

    def _audit(self, job: TrialSpec, audit: Audit) -> tuple[TrialMetrics, Report | None]:
        """Audit a model; the scores are those of a model that an attack changed, None where numbers alone are measured."""
        half = self._half(False)
        scored = take_items(self.context.corpus, self.context.split.select)
        inputs = AuditInputs(
            self.context.corpus,
            scored,
            half.scorer,
            half.comparison.references[INITIAL],
            self.context.scoring.generation_length,
            self.context.scoring.unicode_rouge,
            self.context.audits,
            self.context.seed,
        )
        loaded = self._audited(job)
        try:
            if audit.measured is not None:
                return TrialMetrics(self.context.definition, dict(audit.measured(loaded, inputs))), None
            assert audit.changed is not None
            with audit.changed(loaded, self.context.corpus, self.context.audits, self.context.seed) as attacked:
                report, _ = self.task.score(half.scorer, attacked, half.comparison)
        except UserError as error:
            # Known for good, and no failure of the study: the table says it, and the other audits go on.
            return TrialMetrics(self.context.definition, {UNTESTED: str(error)}), None
        return trial_metrics(self.task, report, half.comparison), report

    def _audited(self, job: TrialSpec) -> LoadedModel:
        """Return the model that an audit is about: a reference model, or theta_init moved."""
        if job.model == RETAIN:
            assert self.context.retain is not None
            self._retain = self._retain or load_for_scoring(self.context.retain)[0]
            return self._retain
        self._retain = None
        if job.base is None or job.epoch is None or job.alpha is None:
            return self._on(self._walker.reset())
        return self._on(self._walker.apply(self._update(job.delta, job.epoch)[0], job.alpha))

    def _harness_accuracy(self, job: TrialSpec) -> float:
        """Return the accuracy of the model as it was just scored; reference models but the initial one are not loaded here."""
        assert self.context.harness is not None
        if job.model not in (None, INITIAL):
            raise ValueError(f"the harness runs on the initial model and what is made of it, not on {job.model}")
        model = self._walker.reset() if job.model == INITIAL else self.loaded.model
        return harness_accuracy(self._on(model), self.context.harness)

    def _half(self, held_out: bool) -> _Half:
        if held_out not in self._halves:
            split = self.context.split
            rows = split.report if held_out else split.select
            half = _Half(self.context, self.task, rows, self.loaded.prompts)
            if any(objective.compares_with_initial for objective in self.context.objectives):
                half.scorer.keep_initial(self._on(self._walker.reset()))
            self._halves[held_out] = half
        return self._halves[held_out]

    def _report(self, job: TrialSpec, half: _Half) -> tuple[Report, float | None, dict[str, Any] | None]:
        """Return the scores, the norm of the update vector, and the bound of a trial that was not scored to its end."""
        if job.model is not None:
            reference = half.comparison.references[job.model]
            return (self._rounded(reference, half) if job.model == INITIAL else reference), None, None
        if job.run is None or job.epoch is None or job.alpha is None:
            initial = self._on(self._walker.reset())
            return self.task.score(half.scorer, initial, half.comparison, job.temperature)[0], None, None
        update, norm = self._update(job.delta, job.epoch)
        if job.is_control and (changed := CONTROLS[job.kind].update) is not None:
            update = changed(update, self.context.seed)
        applying = time.perf_counter()
        model = self._walker.apply(update, job.alpha)
        applied = time.perf_counter() - applying
        report, dominated = self.task.score(half.scorer, self._on(model), half.comparison, job.temperature, job.rivals)
        if dominated is None:
            report = self._rounded(report, half, model)
        return replace(report, seconds={"apply": applied, **report.seconds}), norm, dominated

    def _rounded(self, report: Report, half: _Half, model: Any = None) -> Report:
        """Add the scores of the forget set by the model in NF4, where an objective is made of them; None is theta_init."""
        if not any(ROUNDED in objective.scored_sets for objective in self.context.objectives):
            return report
        assert isinstance(report, ScoreReport)
        began = time.perf_counter()
        with with_rounded_weights(self._on(self._walker.reset() if model is None else model), "nf4") as loaded:
            # Losses of the forget set are the first stage.
            first = next(iter(half.scorer.stages(loaded))).without_overflow()
        seconds = {**report.seconds, ROUNDED: time.perf_counter() - began}
        return replace(report, sets={**report.sets, ROUNDED: first.sets["forget"]}, seconds=seconds)

    def _on(self, model: Any) -> LoadedModel:
        return replace(self.loaded, model=model)

    def _update(self, delta: tuple[str, ...], epoch: int) -> tuple[UpdateVector, float]:
        """The update vector of a base epoch and its norm; the last one stays open, in memory where it is small."""
        if not delta:
            raise ValueError("a job of a base run comes with the entries of the delta store that hold it")
        if self._last is None or self._last[0] != (delta, epoch):
            self._last = None  # first: what it holds of the node's cache may be the space that the next one needs
            run = self._deltas.open(delta)
            # The norm as recorded: a walk of a large update reads it once, and taking its norm would be another reading.
            self._last = ((delta, epoch), run.load(epoch), run.epochs[epoch - 1]["norm"])
        return self._last[1:]
