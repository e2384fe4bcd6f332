"""Score models by task: free text or multiple choice. One class each says how, and everything that follows from it.

`task_of` finds the class. Scorers and logs are imported where they are used, because commands that only read a study need
none of them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from search.evaluation.metrics import METRICS, TrialMetrics
from search.evaluation.pruning import bounds, dominating_rival
from search.problem.objectives import Objective
from search.problem.trial import INITIAL, REFERENCE_KINDS, RETAIN, Rival
from search.spec.corpora import FREE_TEXT, MULTIPLE_CHOICE
from uipe_core.corpora.types import MULTIPLE_CHOICE_SETS, UTILITY_SETS, Corpus
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import ChoiceReport, FloatArray, ScoreReport, set_scores

if TYPE_CHECKING:
    from uipe_core.metrics.multiple_choice import ChoiceMetrics
    from uipe_core.metrics.tofu import Metrics
    from uipe_core.models.loading import LoadedModel
    from uipe_core.models.prompts import PromptFormat
    from uipe_core.scoring.multiple_choice import ChoiceScorer
    from uipe_core.scoring.scorer import Scorer, ScoringConfig

Report = ScoreReport | ChoiceReport
Groups = Sequence[str | None] | None
"""Person or author of each forget item; None where nothing is grouped."""

References = Mapping[str, Report]
"""Scores of the reference models by name, on the items in question."""
Arrays = Mapping[str, np.ndarray]
"""Item scores of a trial by ``set/measurement``."""


class Task(Protocol):
    """Hold what a study needs to know of its task.

    Attributes:
        reference_kinds: Kinds of reference models that trials are compared with.
        reads_logits: Numbers depend on the scale of the logits: temperatures and matched scale are worth scoring.
        has_item_curves: Item scores follow smooth curves in alpha, which the sampler ``line`` models.
        resamples_groups: Intervals resample what an item is about (a person, an author); otherwise the items themselves.
        compares_items: Uncertainty needs the item scores of the retain model.
        checked: The numbers an export must reproduce: one of forgetting, one of utility.
    """

    reference_kinds: tuple[str, ...]
    reads_logits: bool
    has_item_curves: bool
    resamples_groups: bool
    compares_items: bool
    checked: tuple[str, str]

    def scorer(self, corpus: Corpus, prompts: "PromptFormat", config: "ScoringConfig") -> Any:
        """Make the scorer of a corpus."""

    def read_log(self, path: Path) -> Any:
        """Read the scores in an evaluation log."""

    def write_log(self, report: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write scores as an evaluation log."""

    def evaluate(self, report: Any, reference: Any, definition: str) -> Any:
        """Compute the metrics of scores, against the retain model's where the task needs one."""

    def numbers(self, metrics: Any) -> dict[str, Any]:
        """Return the metrics as a trial carries them, flat and ready for JSON."""

    def highest_utility(self, references: References, definition: str) -> float:
        """Return the utility above which a point is flagged; infinity where the task has no such limit."""

    def flagged(self, metrics: Any, highest_utility: float) -> bool:
        """Return True if a point is suspicious for the reason `search.problem.objectives.flag_of` gives."""

    def extra(self, report: Any, references: References, definition: str, seed: int, groups: Groups) -> dict[str, Any]:
        """Compute numbers that no objective is made of: collapse, paired test."""

    def score(
        self,
        scorer: Any,
        loaded: "LoadedModel",
        temperature: float,
        rivals: Sequence[Rival],
        references: References,
        definition: str,
    ) -> tuple[Any, dict[str, Any] | None]:
        """Score a model, stage by stage as far as its rivals leave it a chance.

        Returns:
            The scores, and None; or those of the stages that were scored, and the bound a rival dominates.
        """

    def draws(
        self,
        arrays: Arrays,
        weights: Mapping[str, FloatArray],
        reference: Arrays | None,
        objectives: Sequence[Objective],
        definition: str,
    ) -> FloatArray:
        """Compute the (d, m) objectives of a trial in each of d bootstrap draws; `weights` are (d, n) by evaluation set."""

    def card_rows(self, metrics: Any) -> dict[str, str]:
        """Return the rows of a model card: metric and value."""


class FreeText:
    """Answers are texts: losses of given answers, greedy generations, comparison with a retain model."""

    reference_kinds: tuple[str, ...] = REFERENCE_KINDS
    reads_logits = True
    has_item_curves = True
    resamples_groups = True
    compares_items = True
    checked: tuple[str, str] = ("ks_statistic", "model_utility")

    def scorer(self, corpus: Corpus, prompts: "PromptFormat", config: "ScoringConfig") -> "Scorer":
        from uipe_core.scoring.scorer import Scorer

        return Scorer(corpus, prompts, config)

    def read_log(self, path: Path) -> ScoreReport:
        from uipe_core.logs.tofu import read_log

        return read_log(path)

    def write_log(self, report: ScoreReport, path: Path, metadata: Mapping[str, Any]) -> None:
        from uipe_core.logs.tofu import write_log

        write_log(report, path, metadata)

    def evaluate(self, report: ScoreReport, reference: ScoreReport | None, definition: str) -> "Metrics":
        from uipe_core.metrics.tofu import evaluate

        if reference is None:
            raise ValueError("forget quality needs the scores of a retain model")
        return evaluate(report, reference, definition)

    def numbers(self, metrics: "Metrics") -> dict[str, Any]:
        quality = metrics.forget_quality
        if quality is None:
            raise ValueError("a trial is always scored against a reference")
        return {
            "log10_forget_quality": quality.log10_p,
            "forget_quality": quality.p_value,
            "ks_statistic": quality.ks_statistic,
            "model_utility": metrics.model_utility,
            "components": dict(metrics.components),
            "forget_components": dict(metrics.forget),
            **{f"{name}_{key}": value for name, each in metrics.memorization.items() for key, value in each.items()},
            **{f"{name}_log10_forget_quality": related.log10_p for name, related in metrics.related.items()},
        }

    def highest_utility(self, references: References, definition: str) -> float:
        known = [self.evaluate(references[name], references[RETAIN], definition) for name in (INITIAL, RETAIN)]  # type: ignore[arg-type]
        return max(each.model_utility for each in known)

    def flagged(self, metrics: "Metrics", highest_utility: float) -> bool:
        return metrics.model_utility > highest_utility

    def extra(self, report: ScoreReport, references: References, definition: str, seed: int, groups: Groups) -> dict[str, Any]:
        from uipe_core.metrics.collapse import collapse_reason
        from uipe_core.metrics.tofu import quality_ratios
        from uipe_core.metrics.uncertainty import paired_permutation

        chosen = definition_named(definition)
        scores, expected = (quality_ratios(each.sets["forget"], chosen) for each in (report, references[RETAIN]))  # type: ignore[arg-type]
        return {"collapsed": collapse_reason(report), "paired_p": paired_permutation(scores, expected, seed, groups)}

    def score(
        self,
        scorer: "Scorer",
        loaded: "LoadedModel",
        temperature: float,
        rivals: Sequence[Rival],
        references: References,
        definition: str,
    ) -> tuple[ScoreReport, dict[str, Any] | None]:
        from uipe_core.scoring.scorer import GENERATION

        def scored() -> tuple[ScoreReport, dict[str, Any] | None]:
            if not rivals:
                return scorer.score(loaded, temperature=temperature), None
            for report in scorer.stages(loaded, temperature=temperature):
                stage = list(report.seconds)[-1]
                if stage != GENERATION:
                    known = report.without_overflow()
                    bound = bounds(known, references[RETAIN], definition, rivals[0]["values"])  # type: ignore[arg-type]
                    if (found := dominating_rival(stage, bound, rivals)) is not None:
                        return report, found
            return report, None

        report, found = scored()
        if not report.is_finite:
            report, found = scored()  # a slip of the machine does not repeat itself, an overflow does
        return report.without_overflow(), found

    def draws(
        self,
        arrays: Arrays,
        weights: Mapping[str, FloatArray],
        reference: Arrays | None,
        objectives: Sequence[Objective],
        definition: str,
    ) -> FloatArray:
        from uipe_core.metrics.tofu import item_components, quality_ratios
        from uipe_core.metrics.uncertainty import bootstrap_forget_quality, bootstrap_harmonic_mean

        assert reference is not None
        chosen = definition_named(definition)
        columns = []
        for objective in objectives:
            if (name := objective.quality_of) is not None:
                ratios, expected = (quality_ratios(set_scores(each, name), chosen) for each in (arrays, reference))
                columns.append(bootstrap_forget_quality(ratios, expected, weights[name]))
                continue
            parts, share = {}, {}
            for name in UTILITY_SETS:
                for component, values in item_components(set_scores(arrays, name), name, chosen).items():
                    parts[component], share[component] = values, weights[name]
            columns.append(bootstrap_harmonic_mean(parts, share))
        return np.stack(columns, axis=1)

    def card_rows(self, metrics: "Metrics") -> dict[str, str]:
        quality = metrics.forget_quality
        assert quality is not None
        return {
            "model utility": f"{metrics.model_utility:.4f}",
            "forget quality (p)": f"{quality.p_value:.3g}",
            "log10 forget quality": f"{quality.log10_p:.3f}",
            "KS statistic": f"{quality.ks_statistic:.4f}",
            **{name: f"{value:.4f}" for name, value in {**metrics.components, **metrics.forget}.items()},
        }


class MultipleChoice:
    """Answers are letters: their log-likelihoods, accuracy against chance, no retain model."""

    reference_kinds: tuple[str, ...] = (INITIAL,)
    reads_logits = False  # which letter is most likely does not depend on the scale of the logits
    has_item_curves = False
    resamples_groups = False  # questions on one topic are not draws of one thing, as those about one person are
    compares_items = False
    checked: tuple[str, str] = ("forget_accuracy", "utility_accuracy")

    def scorer(self, corpus: Corpus, prompts: "PromptFormat", config: "ScoringConfig") -> "ChoiceScorer":
        from uipe_core.scoring.multiple_choice import ChoiceScorer

        return ChoiceScorer(corpus, prompts, config.batch_size)

    def read_log(self, path: Path) -> ChoiceReport:
        from uipe_core.logs.multiple_choice import read_choice_log

        return read_choice_log(path)

    def write_log(self, report: ChoiceReport, path: Path, metadata: Mapping[str, Any]) -> None:
        from uipe_core.logs.multiple_choice import write_choice_log

        write_choice_log(report, path, metadata)

    def evaluate(self, report: ChoiceReport, reference: ChoiceReport | None, definition: str) -> "ChoiceMetrics":
        from uipe_core.metrics.multiple_choice import evaluate_choices

        return evaluate_choices(report)

    def numbers(self, metrics: "ChoiceMetrics") -> dict[str, Any]:
        return {name: value for name, value in metrics.as_dict().items() if name != "definition"}

    def highest_utility(self, references: References, definition: str) -> float:
        return math.inf

    def flagged(self, metrics: "ChoiceMetrics", highest_utility: float) -> bool:
        return metrics.below_chance

    def extra(self, report: ChoiceReport, references: References, definition: str, seed: int, groups: Groups) -> dict[str, Any]:
        return {"collapsed": None}

    def score(
        self,
        scorer: "ChoiceScorer",
        loaded: "LoadedModel",
        temperature: float,
        rivals: Sequence[Rival],
        references: References,
        definition: str,
    ) -> tuple[ChoiceReport, dict[str, Any] | None]:
        return scorer.score(loaded, temperature=temperature), None

    def draws(
        self,
        arrays: Arrays,
        weights: Mapping[str, FloatArray],
        reference: Arrays | None,
        objectives: Sequence[Objective],
        definition: str,
    ) -> FloatArray:
        def mean(name: str, values: np.ndarray) -> FloatArray:
            return (weights[name] @ values) / weights[name].sum(axis=1)

        accuracy = {name: mean(name, arrays[f"{name}/correct"]) for name in MULTIPLE_CHOICE_SETS}
        chance = mean("forget", 1.0 / arrays["forget/choices"])
        return np.stack([-np.maximum(0.0, accuracy["forget"] - chance), accuracy["utility"]], axis=1)

    def card_rows(self, metrics: "ChoiceMetrics") -> dict[str, str]:
        rows = {
            f"{name} accuracy (chance {each.chance:.4f})": f"{each.accuracy:.4f} ± {each.standard_error:.4f}"
            for name, each in {"forget": metrics.forget, "utility": metrics.utility}.items()
        }
        rows["mean probability of the right forget answer"] = f"{metrics.forget.answer_probability:.4f}"
        return {**rows, "forget accuracy below chance": "yes: answers known and avoided" if metrics.below_chance else "no"}


TASKS: dict[str, Task] = {FREE_TEXT: FreeText(), MULTIPLE_CHOICE: MultipleChoice()}
"""Tasks by the name a corpus section gives."""


def task_of(corpus: Corpus) -> Task:
    """Return the task of a loaded corpus. For a study's it is ``TASKS[spec.corpus.task]``."""
    return TASKS[MULTIPLE_CHOICE if corpus.choices else FREE_TEXT]


def trial_metrics(
    task: Task,
    report: Report,
    references: References,
    definition: str,
    highest_utility: float,
    seed: int,
    groups: Groups = None,
) -> TrialMetrics:
    """Compute everything a complete trial carries about its scores.

    Args:
        task: The task of the study.
        report: The scores.
        references: Scores of the reference models on the same items.
        definition: Metric definition.
        highest_utility: `Task.highest_utility` of the references.
        seed: Seed of the permutation test.
        groups: Person or author of each forget item, whose differences the test turns together.

    Raises:
        UserError: Scores that are not finite, or a set that is missing.
    """
    metrics = task.evaluate(report, references.get(RETAIN), definition)
    initial, extra = references[INITIAL], task.extra(report, references, definition, seed, groups)
    collapsed = extra.pop("collapsed")
    return TrialMetrics(
        definition=definition,
        numbers={
            **task.numbers(metrics),
            **extra,
            # What a metric cannot tell is left out: NaN is no JSON, which the dashboard reads.
            **{name: value for name, metric in METRICS.items() if math.isfinite(value := float(metric(report, references)))},
        },
        logit_scale=report.logit_scale / initial.logit_scale
        if report.logit_scale is not None and initial.logit_scale
        else None,
        collapsed=collapsed,
        flagged=task.flagged(metrics, highest_utility),
    )
