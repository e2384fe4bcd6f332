"""Compute the numbers of a scored trial, and hold them as a worker returns them and the study stores them."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from search.problem.trial import INITIAL, RETAIN
from uipe_core.errors import UserError, first_line
from uipe_core.metrics.scores import TEXTS, ScoreReport

if TYPE_CHECKING:
    from search.evaluation.task import Comparison, Report, Task

Metric = Callable[[Any, Mapping[str, Any]], float]
"""Compute a number from the scores of a trial and of the reference models on the same items, by name; NaN is left out."""

METRICS: dict[str, Metric] = {}
"""Further numbers of every trial by name: columns of the tables, and objectives where `THIRD_OBJECTIVES` has the name.

What a metric definition defines is computed by the task (`search.evaluation.task`).
"""


def own_function(name: str) -> Metric:
    """Import a function that a study file names as ``package.module:function``.

    Raises:
        UserError: It cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # importing runs the user's code
        raise UserError(
            f"objective {name}: cannot be imported ({first_line(error)}); its package must be installed where the driver and "
            "the workers run"
        ) from error
    if not callable(found):
        raise UserError(f"objective {name}: is no function, but a {type(found).__name__}; name one that takes item scores")
    function: Metric = found
    return function


def own_value(name: str, report: Any, references: Mapping[str, Any]) -> float:
    """Return the value of a user's own objective for the scores of a trial.

    The function gets the item scores as arrays by ``set/measurement`` (`uipe_core.metrics.scores.ScoreReport.arrays`), and
    the same of every reference model by name; it returns a finite number, to be maximised.

    Raises:
        UserError: It raises, or returns something else.
    """
    function = own_function(name)
    try:
        value = float(function(report.arrays(), {key: each.arrays() for key, each in references.items()}))
    except Exception as error:  # the user's code
        raise UserError(f"objective {name}: raised {type(error).__name__}: {first_line(error)}") from error
    if not math.isfinite(value):
        raise UserError(f"objective {name}: returned {value}; it must return a finite number")
    return value


@dataclass(frozen=True)
class TrialMetrics:
    """Numbers of one scored trial. What the trial is (`search.problem.trial.TrialSpec`) stays with the driver.

    Attributes:
        definition: Metric definition of every number.
        numbers: Objectives and metrics by name, ready for JSON; empty for a pruned trial.
        logit_scale: Spread of the logits relative to the initial model's; None where it was not measured.
        collapsed: Why the model counts as collapsed (`uipe_core.metrics.collapse`); None where it does not.
        flagged: The point is suspicious for the reason `search.problem.objectives.flag_of` gives.
        pruned: The bound a rival dominates (`search.evaluation.pruning.dominating_rival`); None for a trial scored to its end.
        update_norm: Norm of (1 + alpha) * delta; None where no update vector is involved.
        dtype, device: What the model was scored in and on.
        seconds: Wall-clock seconds of the trial.
        seconds_by_stage: The same by stage.
        batch_size: Answers per batch, where it is not what the study asked for.
    """

    definition: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    logit_scale: float | None = None
    collapsed: str | None = None
    flagged: bool | None = None
    pruned: Mapping[str, Any] | None = None
    update_norm: float | None = None
    dtype: str | None = None
    device: str | None = None
    seconds: float | None = None
    seconds_by_stage: Mapping[str, float] = field(default_factory=dict)
    batch_size: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return everything flat, as the columns of a study's tables. Unknown values are left out; of a trial
        scored to its end, ``collapsed``, ``flagged`` and ``logit_scale`` are always there."""
        known = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "numbers"}
        always = () if self.pruned is not None else ("collapsed", "flagged", "logit_scale")
        return {**self.numbers, **{name: value for name, value in known.items() if value is not None or name in always}}

    def as_text(self) -> str:
        """Return JSON, in which it travels: Tune flattens nested results before its searcher sees them."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> "TrialMetrics":
        """Read what `as_text` wrote."""
        return TrialMetrics(**json.loads(text))


def trial_metrics(task: "Task", report: "Report", context: "Comparison") -> TrialMetrics:
    """Compute everything a complete trial carries about its scores.

    Args:
        task: The task of the study.
        report: The scores.
        context: What they are compared with.

    Raises:
        UserError: Scores that are not finite, a set that is missing, or an objective of the user's own that fails.
    """
    references, initial = context.references, context.references[INITIAL]
    metrics = task.evaluate(report, references.get(RETAIN), context.definition)
    extra = task.extra(report, context)
    collapsed = extra.pop("collapsed")
    own = [objective for objective in context.objectives if objective.function is not None]
    return TrialMetrics(
        definition=context.definition,
        numbers={
            **task.numbers(metrics),
            **extra,
            # What a metric cannot tell is left out: NaN is no JSON, which the dashboard reads.
            **{name: value for name, metric in METRICS.items() if math.isfinite(value := float(metric(report, references)))},
            **{objective.name: own_value(str(objective.function), report, references) for objective in own},
        },
        logit_scale=report.logit_scale / initial.logit_scale
        if report.logit_scale is not None and initial.logit_scale
        else None,
        collapsed=collapsed,
        flagged=task.flagged(report, metrics, context),
    )


EXAMPLES = 3
"""Answers of each set that are kept as text."""
LONGEST_TEXT = 400
"""Characters that are kept of a text."""


def example_texts(report: "Report") -> dict[str, np.ndarray]:
    """Return a few answers as text, by ``texts/<set>``: (k, 3) question, expected answer, generated answer.

    The items are spread evenly over their set, so they are the same for every model scored on it, and none is picked.
    Empty without generated text.
    """
    found = {}
    for name, scores in report.sets.items() if isinstance(report, ScoreReport) else ():
        columns = (scores.questions, scores.answers, scores.generated)
        if any(column is None for column in columns) or not len(scores):
            continue
        rows = sorted({int(row) for row in np.linspace(0, len(scores) - 1, EXAMPLES)})
        found[f"{TEXTS}/{name}"] = np.array([[_short(column[row]) for column in columns if column] for row in rows])
    return found


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 4]} ..."
