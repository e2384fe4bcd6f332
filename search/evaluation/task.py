"""How models are measured, by the kind of their corpus: the scorer, the log of a report, and the numbers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uipe_core.corpora.types import Corpus
from uipe_core.logs.multiple_choice import read_choice_log, write_choice_log
from uipe_core.logs.tofu import read_log, write_log
from uipe_core.metrics.multiple_choice import ChoiceMetrics, evaluate_choices
from uipe_core.metrics.scores import ChoiceReport, ScoreReport
from uipe_core.metrics.tofu import Metrics, evaluate
from uipe_core.models.prompts import PromptFormat
from uipe_core.scoring.multiple_choice import ChoiceScorer
from uipe_core.scoring.scorer import Scorer, ScoringConfig

Report = ScoreReport | ChoiceReport


def scorer_of(corpus: Corpus, prompts: PromptFormat, config: ScoringConfig) -> Scorer | ChoiceScorer:
    """What scores models on a corpus: letters where it has multiple choices, free text otherwise."""
    return ChoiceScorer(corpus, prompts, config.batch_size) if corpus.choices else Scorer(corpus, prompts, config)


def write_report(report: Report, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a report as the log of its kind."""
    if isinstance(report, ChoiceReport):
        write_choice_log(report, path, metadata)
    else:
        write_log(report, path, metadata)


def read_report(path: Path, choices: bool) -> Report:
    """Reads the log of a report; `choices` says of which kind."""
    return read_choice_log(path) if choices else read_log(path)


def measure(report: Report, reference: Report | None, definition: str) -> Metrics | ChoiceMetrics:
    """The numbers of a report: of multiple choice by themselves, of free text against a retain model."""
    if isinstance(report, ChoiceReport):
        return evaluate_choices(report)
    if not isinstance(reference, ScoreReport):
        raise ValueError("forget quality needs the scores of a retain model")
    return evaluate(report, reference, definition)


def suspicious_utility(references: Mapping[str, Report], definition: str) -> float:
    """Utility above which a trial is flagged: the better of initial and retain model; infinity for multiple choice."""
    retain = references.get("retain")
    numbers = [measure(references[name], retain, definition) for name in ("initial", "retain") if name in references]
    return max(each.model_utility if isinstance(each, Metrics) else math.inf for each in numbers)


def is_flagged(metrics: Metrics | ChoiceMetrics, suspicious: float) -> bool:
    """Whether a point is not to be believed at first sight, for the reason `search.problem.objectives.flag_of` gives."""
    return metrics.below_chance if isinstance(metrics, ChoiceMetrics) else metrics.model_utility > suspicious
