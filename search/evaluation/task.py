"""Score models by task: free text or multiple choice. One class each says how, and everything that follows from it.

`task_of` finds the class. Scorers and logs are imported where they are used, because commands that only read a study need
none of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from search.evaluation.pruning import bounds, dominating_rival
from search.problem.objectives import MADE_FROM, Objective, composites
from search.problem.trial import INITIAL, REFERENCE_KINDS, RETAIN, Rival
from search.spec.corpora import FREE_TEXT, MULTIPLE_CHOICE
from uipe_core.corpora.types import MULTIPLE_CHOICE_SETS, Corpus
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
Groups = Mapping[str, Sequence[str | None]]
"""Person, author or document of each item by evaluation set; None for an item that stands for itself."""

References = Mapping[str, Report]
"""Scores of the reference models by name, on the items in question."""
Arrays = Mapping[str, np.ndarray]
"""Item scores of a trial by ``set/measurement``."""
Weights = Mapping[str, FloatArray]
"""(d, n) how often d draws have each item, by evaluation set."""


@dataclass(frozen=True)
class Comparison:
    """Hold what the scores of a trial are compared with.

    Attributes:
        references: Scores of the reference models on the same items.
        definition: Metric definition.
        objectives: What the study maximises.
        seed: Of permutations and draws.
        groups: By evaluation set.
    """

    references: References
    definition: str
    objectives: tuple[Objective, ...]
    seed: int = 0
    groups: Groups = field(default_factory=dict)

    def weights(self, report: Report) -> Weights:
        """Draw the items of every set again (`uipe_core.metrics.uncertainty.group_weights`)."""
        from uipe_core.metrics.uncertainty import group_weights

        counts = {name: len(scores) for name, scores in report.sets.items()}
        groups = {name: self.groups.get(MADE_FROM.get(name, name)) or [None] * count for name, count in counts.items()}
        return {name: group_weights(of_set, self.seed) for name, of_set in groups.items()}


class Task(Protocol):
    """Hold what a study needs to know of its task.

    Attributes:
        reference_kinds: Kinds of reference models that trials are compared with.
        reads_logits: Numbers depend on the scale of the logits: temperatures and matched scale are worth scoring.
        has_item_curves: Item scores follow smooth curves in alpha, which the sampler ``line`` models.
        resamples_groups: Intervals resample what an item is about (a person, an author); otherwise the items themselves.
    """

    reference_kinds: tuple[str, ...]
    reads_logits: bool
    has_item_curves: bool
    resamples_groups: bool

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

    def flagged(self, report: Any, metrics: Any, context: "Comparison") -> bool:
        """Return True if a point is suspicious for the reason `search.problem.objectives.flag_of` gives."""

    def extra(self, report: Any, context: "Comparison") -> dict[str, Any]:
        """Compute numbers that no objective is made of: collapse, paired test."""

    def score(
        self,
        scorer: Any,
        loaded: "LoadedModel",
        context: Comparison,
        temperature: float = 1.0,
        rivals: Sequence[Rival] = (),
    ) -> tuple[Any, dict[str, Any] | None]:
        """Score a model, its logits divided by a temperature, stage by stage as far as its rivals leave it a chance.

        Returns:
            The scores, and None; or those of the stages that were scored, and the bound a rival dominates.
        """

    def draws(
        self, arrays: Arrays, weights: Weights, reference: Arrays | None, objectives: Sequence[Objective], definition: str
    ) -> FloatArray:
        """Compute the (d, m) objectives of a trial in each of d bootstrap draws."""

    def checked(self, objectives: Sequence[Objective]) -> tuple[str, ...]:
        """Return the numbers that an export must reproduce: what the objectives are made of, without logarithms."""

    def card_rows(self, metrics: Any) -> dict[str, str]:
        """Return the rows of a model card: metric and value."""


class FreeText:
    """Answers are texts: losses of given answers, greedy generations, comparison with a retain model."""

    reference_kinds: tuple[str, ...] = REFERENCE_KINDS
    reads_logits = True
    has_item_curves = True
    resamples_groups = True

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
        from uipe_core.metrics.composites import composite
        from uipe_core.metrics.tofu import evaluate

        metrics = evaluate(report, reference, definition, required=("forget", "retain"))
        values = {each.name: composite(report, each.components, definition) for each in composites(report.sets)}
        return replace(metrics, composites=values)

    def numbers(self, metrics: "Metrics") -> dict[str, Any]:
        quality = metrics.forget_quality
        compared: dict[str, Any] = (
            {}
            if quality is None
            else {
                "log10_forget_quality": quality.log10_p,
                "forget_quality": quality.p_value,
                "ks_statistic": quality.ks_statistic,
            }
        )
        return {
            **compared,
            **metrics.composites,
            "components": dict(metrics.components),
            "forget_components": dict(metrics.forget),
            "forget_probability": metrics.forget["Prob Forget"],
            "forget_rouge": metrics.forget["ROUGE Forget"],
            **{f"{name}_{key}": value for name, each in metrics.memorization.items() for key, value in each.items()},
            **{f"{name}_log10_forget_quality": related.log10_p for name, related in metrics.related.items()},
        }

    def flagged(self, report: ScoreReport, metrics: "Metrics", context: Comparison) -> bool:
        from uipe_core.metrics.composites import composite

        utility = context.objectives[1]
        initial = context.references[INITIAL].logit_scale
        if not utility.components or not initial or report.logit_scale is None or report.logit_scale <= initial:
            return False

        def value(scores: Report) -> float:
            return composite(scores, utility.components, context.definition)  # type: ignore[arg-type]

        if utility.compares_with_initial:
            return False  # it has no reference model to be above: 1 is the initial model itself
        known = [context.references[name] for name in (INITIAL, RETAIN) if name in context.references]
        best = max(known, key=value)
        if value(report) <= value(best):
            return False
        # Draws are the same for both, so that their difference is that of the same items.
        weights = context.weights(report)
        own, other = (self.draws(each.arrays(), weights, None, (utility,), context.definition)[:, 0] for each in (report, best))
        return float(np.quantile(own - other, 0.025)) > 0

    def extra(self, report: ScoreReport, context: Comparison) -> dict[str, Any]:
        from uipe_core.metrics.collapse import collapse_reason
        from uipe_core.metrics.composites import membership
        from uipe_core.metrics.tofu import quality_ratios
        from uipe_core.metrics.uncertainty import paired_permutation

        found: dict[str, Any] = {"collapsed": collapse_reason(report)}
        compared = {name: each.initial_kl for name, each in report.sets.items() if each.initial_kl is not None}
        found |= {f"{name}_kl_from_initial": float(values.mean()) for name, values in compared.items()}
        retain = context.references.get(RETAIN)
        found |= membership(report.sets, retain.sets if isinstance(retain, ScoreReport) else None)
        if retain is not None:
            chosen = definition_named(context.definition)
            scores, expected = (quality_ratios(each.sets["forget"], chosen) for each in (report, retain))  # type: ignore[arg-type]
            found["paired_p"] = paired_permutation(scores, expected, context.seed, context.groups.get("forget"))
        return found

    def score(
        self,
        scorer: "Scorer",
        loaded: "LoadedModel",
        context: Comparison,
        temperature: float = 1.0,
        rivals: Sequence[Rival] = (),
    ) -> tuple[ScoreReport, dict[str, Any] | None]:
        from uipe_core.scoring.scorer import GENERATION

        def scored() -> tuple[ScoreReport, dict[str, Any] | None]:
            if not rivals:
                return scorer.score(loaded, temperature=temperature), None
            for report in scorer.stages(loaded, temperature=temperature):
                stage = list(report.seconds)[-1]
                if stage != GENERATION:
                    known = report.without_overflow()
                    reference = context.references.get(RETAIN)
                    bound = bounds(known, reference, context.definition, context.objectives)  # type: ignore[arg-type]
                    if (found := dominating_rival(stage, bound, rivals)) is not None:
                        return report, found
            return report, None

        report, found = scored()
        if not report.is_finite:
            report, found = scored()  # a slip of the machine does not repeat itself, an overflow does
        return report.without_overflow(), found

    def draws(
        self, arrays: Arrays, weights: Weights, reference: Arrays | None, objectives: Sequence[Objective], definition: str
    ) -> FloatArray:
        from uipe_core.metrics.composites import privacy
        from uipe_core.metrics.tofu import quality_ratios
        from uipe_core.metrics.uncertainty import bootstrap_forget_quality, bootstrap_harmonic_mean

        chosen = definition_named(definition)
        columns = []
        for objective in objectives:
            if (name := objective.quality_of) is not None:
                assert reference is not None
                ratios, expected = (quality_ratios(set_scores(each, name), chosen) for each in (arrays, reference))
                columns.append(bootstrap_forget_quality(ratios, expected, weights[name]))
                continue
            if objective.membership:
                own, ideal = (_drawn_auc(each, objective.membership, weights) for each in (arrays, reference))
                assert own is not None
                columns.append(privacy(own, ideal))
                continue
            parts, share = {}, {}
            for number, each in enumerate(objective.components):
                parts[str(number)] = each.of_items(set_scores(arrays, each.item_set), chosen)
                share[str(number)] = weights[each.item_set]
            columns.append(bootstrap_harmonic_mean(parts, share))
        return np.stack(columns, axis=1)

    def checked(self, objectives: Sequence[Objective]) -> tuple[str, ...]:
        tests = ("ks_statistic",) if any(each.quality_of == "forget" for each in objectives) else ()
        return (*tests, *(each.name for each in objectives if each.components))

    def card_rows(self, metrics: "Metrics") -> dict[str, str]:
        quality = metrics.forget_quality
        compared = (
            {}
            if quality is None
            else {
                "forget quality (p)": f"{quality.p_value:.3g}",
                "log10 forget quality": f"{quality.log10_p:.3f}",
                "KS statistic": f"{quality.ks_statistic:.4f}",
            }
        )
        return {
            **{name.replace("_", " "): f"{value:.4f}" for name, value in metrics.composites.items()},
            **compared,
            **{name: f"{value:.4f}" for name, value in {**metrics.components, **metrics.forget}.items()},
        }


def _drawn_auc(arrays: Arrays | None, pair: Sequence[str], weights: Weights) -> FloatArray | None:
    """Return (d,) AUCs of the Min-K% of two sets in each of d draws; None where it was not measured."""
    from uipe_core.metrics.uncertainty import bootstrap_auc

    keys = [f"{name}/min_k" for name in pair]
    if arrays is None or not arrays.keys() >= set(keys):
        return None
    return bootstrap_auc(*(arrays[key] for key in keys), *(weights[name] for name in pair))


class MultipleChoice:
    """Answers are letters: their log-likelihoods, accuracy against chance, no retain model."""

    reference_kinds: tuple[str, ...] = (INITIAL,)
    reads_logits = False  # which letter is most likely does not depend on the scale of the logits
    has_item_curves = False
    resamples_groups = False  # questions on one topic are not draws of one thing, as those about one person are

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

    def flagged(self, report: ChoiceReport, metrics: "ChoiceMetrics", context: Comparison) -> bool:
        return metrics.below_chance

    def extra(self, report: ChoiceReport, context: Comparison) -> dict[str, Any]:
        from uipe_core.metrics.collapse import choice_collapse_reason

        return {"collapsed": choice_collapse_reason(report)}

    def score(
        self,
        scorer: "ChoiceScorer",
        loaded: "LoadedModel",
        context: Comparison,
        temperature: float = 1.0,
        rivals: Sequence[Rival] = (),
    ) -> tuple[ChoiceReport, dict[str, Any] | None]:
        report = scorer.score(loaded, temperature=temperature)
        if not report.is_finite:
            report = scorer.score(loaded, temperature=temperature)  # a slip of the machine does not repeat itself
        return report.without_overflow(), None

    def draws(
        self, arrays: Arrays, weights: Weights, reference: Arrays | None, objectives: Sequence[Objective], definition: str
    ) -> FloatArray:
        def mean(name: str, values: np.ndarray) -> FloatArray:
            return (weights[name] @ values) / weights[name].sum(axis=1)

        accuracy = {name: mean(name, arrays[f"{name}/correct"]) for name in MULTIPLE_CHOICE_SETS}
        chance = mean("forget", 1.0 / arrays["forget/choices"])
        return np.stack([-np.maximum(0.0, accuracy["forget"] - chance), accuracy["utility"]], axis=1)

    def checked(self, objectives: Sequence[Objective]) -> tuple[str, ...]:
        return ("forget_accuracy", "utility_accuracy")

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
