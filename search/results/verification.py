"""Check an export: load it as a stranger would, score it again, and compare it with its trial.

A form that computes what the trial computed must have the trial's numbers. A model into which an adapter was merged cannot: its
sums are rounded. How far rounding moves its items' losses is measured, and its own numbers are shown with the trial's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from search.evaluation.prepared import PreparedStudy
from search.evaluation.task import Arrays, Report, task_of
from search.problem.objectives import composites
from search.problem.trial import INITIAL, RETAIN
from search.results.recipe import Recipe
from uipe_core.corpora.split import Rows, take_items
from uipe_core.corpora.types import KEPT_SETS
from uipe_core.deltas.extrapolation import merge
from uipe_core.errors import ExportMismatchError
from uipe_core.logs.tofu import read_log
from uipe_core.metrics.composites import composite
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import ChoiceReport, ChoiceScores, ScoreReport, set_scores
from uipe_core.metrics.tofu import ForgetQuality, loss_components, quality_of_set
from uipe_core.models.loading import LoadedModel
from uipe_core.scoring.scorer import Scorer

LOSS, FULL, NONE = "loss", "full", "none"
VERIFICATIONS = (LOSS, FULL, NONE)
"""Read the losses of an export, or generate its texts too, or check nothing."""

SAME = 1e-6
"""Allowed difference in a checked number where the form computes what the trial computed."""
SAME_LOSSES = 1e-4
"""Allowed difference in item losses there, nats per token: other machines sum in another order."""
MARGIN = 2.0
"""How many times the measured rounding a merged model may be away from its trial; seen were 0.8 to 1.2 times."""

LOSSES = ("answer_loss", "paraphrase_loss", "perturbed_loss", "log_likelihood")
"""Measurements of an item that are losses, or log-likelihoods of letters."""

ITEM_LOSSES = "item losses, root mean square"


class Watch(Protocol):
    """Hear how far a check is; `search.report.progress.Bars` is one."""

    def show(self, name: str, done: int, total: int) -> None:
        """Take note of a step."""

    def say(self, text: str) -> None:
        """Print a line."""


@dataclass(frozen=True)
class Compared:
    """A number of a trial and of its export.

    Attributes:
        name: Which.
        trial, export: Its values; None where only the difference is known.
        apart: The difference.
        allowed: How far they may be apart; None where the form has numbers of its own.
    """

    name: str
    trial: float | None
    export: float | None
    apart: float
    allowed: float | None

    @property
    def wrong(self) -> bool:
        """Return True if the difference is larger than allowed, or not a number."""
        return self.allowed is not None and not self.apart <= self.allowed

    def __str__(self) -> str:
        values = "" if self.trial is None or self.export is None else f"trial {self.trial:.6g}, export {self.export:.6g}, "
        allowed = "" if self.allowed is None else f" (allowed {self.allowed:.2g})"
        return f"{self.name}: {values}apart by {self.apart:.2g}{allowed}"


@dataclass(frozen=True)
class Verified:
    """The outcome of a check.

    Attributes:
        how: One of `VERIFICATIONS`.
        dtype: Of the weights, as they were scored.
        compared: Numbers of trial and export.
        trial, export, held_out: Rows of a model card, metric to value: of the trial, and of the export on the items that trials
            are scored on and on those kept for reporting.
    """

    how: str
    dtype: str | None = None
    compared: tuple[Compared, ...] = ()
    trial: Mapping[str, str] = field(default_factory=dict)
    export: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Return True if the form has numbers of its own."""
        return any(each.allowed is None for each in self.compared)

    @property
    def unread(self) -> str | None:
        """Return what is to be said where the form has a utility of its own that was not read."""
        if not self.merged or any("utility" in each.name for each in self.compared):
            return None
        return "the utility of the merged model was not read; --verify full reads it"


class Verifier:
    """Check exports of a trial.

    Args:
        recipe: The trial.
        preparation: Its study.
        how: `LOSS` or `FULL`.
        reference: Scores of the retain model on all items; scored here where the study has one and they are not given.
        items: Item scores of the trial, by ``set/measurement``, if they were kept.
        watch: Hears how far it is.
    """

    def __init__(
        self,
        recipe: Recipe,
        preparation: PreparedStudy,
        how: str,
        reference: Report | None = None,
        items: Arrays | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._recipe, self._preparation, self._how = recipe, preparation, how
        self._given, self._items, self._watch = reference, items, watch
        self._task = task_of(preparation.corpus)
        self._adapted: tuple[Report, float] | None = None

    def measure_rounding(self, adapted: LoadedModel) -> None:
        """Measure what rounding does to the item losses of a model into which its adapter is merged.

        The model is scored with its adapter, as the trial was, and again with every sum of weight and adapter rounded up or
        down at random. The root mean square difference of the losses is that of rounding alone. Call this before `check` of
        such a model.

        Args:
            adapted: The model at theta(alpha) with its adapter; merged afterwards.

        Raises:
            ExportMismatchError: If the model with its adapter does not have the trial's numbers.
        """
        rows = self._preparation.split.select
        report = self._score(adapted, rows, "scoring the adapter", LOSS)
        self._require(self._compare(report, rows))
        rounded = replace(adapted, model=merge(adapted.model, self._preparation.spec.seed))
        self._adapted = report, _apart(report.arrays(), self._score(rounded, rows, "measuring the rounding", LOSS))

    def check(self, folder: Path) -> Verified:
        """Load the written folder, score it and compare it with the trial.

        Raises:
            ExportMismatchError: If a number is farther from the trial's than allowed.
        """
        split = self._preparation.split
        loaded = replace(self._preparation.models.ready_source(INITIAL), location=str(folder), revision=None).load()
        report = self._score(loaded, split.select, "scoring the export", self._how)
        compared = self._compare(report, split.select)
        if self._adapted is not None:
            adapted, noise = self._adapted
            apart = _apart(adapted.arrays(), report)
            shown = [replace(each, allowed=None) for each in compared if each.name != ITEM_LOSSES]
            compared = [*shown, Compared(ITEM_LOSSES, None, None, apart, MARGIN * noise + SAME)]
        self._require(compared)
        held_out = None
        if self._preparation.spec.split is not None:
            held_out = self._score(loaded, split.report, "scoring the held-out items", self._how)
        return Verified(
            self._how,
            str(loaded.model.dtype).removeprefix("torch."),
            tuple(compared),
            {} if self._items is None else self._rows(_report_of(self._items), split.select),
            self._rows(report, split.select),
            {} if held_out is None else self._rows(held_out, split.report),
        )

    def _require(self, compared: list[Compared]) -> None:
        wrong = [str(each) for each in compared if each.wrong]
        if wrong:
            raise ExportMismatchError(
                f"the export of trial {self._recipe.trial} was withdrawn; scored afresh, its numbers are not the trial's: "
                + "; ".join(wrong)
            )

    def _score(self, loaded: LoadedModel, rows: Rows, title: str, how: str) -> Report:
        """Score a model on some items, in the trial's own batches: in other company the last bits of a loss may differ."""
        corpus, scoring = take_items(self._preparation.corpus, rows), self._preparation.scoring
        size = self._recipe.expected.get("batch_size")
        scorer = self._task.scorer(corpus, loaded.prompts, scoring if size is None else replace(scoring, batch_size=int(size)))
        read_only = how == LOSS and isinstance(scorer, Scorer)

        def progress(done: int, total: int) -> None:
            if self._watch is not None:
                self._watch.show(title, done, len(scorer.examples) if read_only else total)

        if not read_only:
            scored: Report = scorer.score(loaded, progress=progress)
            return scored.without_overflow()
        # The stages before the last: all sets are known then, and no text.
        read = next(each for each in scorer.stages(loaded, progress=progress) if each.sets.keys() == scorer.sets.keys())
        return read.without_overflow()

    def _compare(self, report: Report, rows: Rows) -> list[Compared]:
        """Compare what both have: the numbers that the task has checked, and the losses of the items."""
        expected, numbers = self._recipe.expected, self._numbers(report, rows)
        checked = self._task.checked(self._preparation.spec.maximised)
        names = [name for name in checked if name in numbers]
        pairs = [(name, float(expected[name]), float(numbers[name])) for name in names]
        compared = [Compared(name, trial, export, abs(trial - export), SAME) for name, trial, export in pairs]
        if self._items is not None:
            return [*compared, Compared(ITEM_LOSSES, None, None, _apart(self._items, report), SAME_LOSSES)]
        means = self._means(report) if isinstance(report, ScoreReport) else {}
        pairs = [(name, float(value), means[name]) for name, value in expected.get("losses", {}).items() if name in means]
        return compared + [Compared(name, trial, export, abs(trial - export), SAME_LOSSES) for name, trial, export in pairs]

    def _means(self, report: ScoreReport) -> dict[str, float]:
        """Return the means over items that losses give: probability and truth ratio of every set."""
        chosen = definition_named(self._preparation.spec.definition)
        parts = [loss_components(report.sets[name], name, chosen) for name in (*KEPT_SETS, "forget") if name in report.sets]
        return {name: float(np.mean(values)) for part in parts for name, values in part.items()}

    def _numbers(self, report: Report, rows: Rows) -> Mapping[str, Any]:
        if _has_texts(report):
            return self._task.numbers(self._task.evaluate(report, self._against(rows), self._preparation.spec.definition))
        quality = self._quality(report, rows)
        tests = {} if quality is None else {"ks_statistic": quality.ks_statistic}
        return tests | self._composites(report)

    def _composites(self, report: Report) -> dict[str, float]:
        """Return the harmonic means that losses give, objectives of the study or not."""
        assert isinstance(report, ScoreReport)
        definition = self._preparation.spec.definition
        known = [each for each in composites(report.sets) if not each.reads_text]
        return {each.name: composite(report, each.components, definition) for each in known}

    def _rows(self, report: Report, rows: Rows) -> Mapping[str, str]:
        """Return the rows of a model card: without texts, those that losses give."""
        definition = self._preparation.spec.definition
        if _has_texts(report):
            return self._task.card_rows(self._task.evaluate(report, self._against(rows), definition))
        assert isinstance(report, ScoreReport)
        quality = self._quality(report, rows)
        found = {name.replace("_", " "): f"{value:.4f}" for name, value in self._composites(report).items()}
        if quality is not None:
            found |= {"forget quality (p)": f"{quality.p_value:.3g}", "log10 forget quality": f"{quality.log10_p:.3f}"}
            found["KS statistic"] = f"{quality.ks_statistic:.4f}"
        return found | {name: f"{value:.4f}" for name, value in self._means(report).items()}

    def _quality(self, report: Report, rows: Rows) -> ForgetQuality | None:
        """Return the test against the retain model; None where the study has none."""
        against = self._against(rows)
        if against is None:
            return None
        assert isinstance(report, ScoreReport) and isinstance(against, ScoreReport)
        return quality_of_set(report, against, "forget", definition_named(self._preparation.spec.definition))

    def _against(self, rows: Rows) -> Report | None:
        """Return the scores of the retain model on some items; None where the task needs none."""
        if self._given is None and RETAIN in self._preparation.models.identities:
            models = self._preparation.models
            if models.retain_log is not None:
                self._given = read_log(models.retain_log)
            else:
                every = {name: tuple(range(len(items))) for name, items in self._preparation.corpus.sets.items()}
                self._given = self._score(models.ready_source(RETAIN).load(), every, "scoring the retain model", LOSS)
        return None if self._given is None else self._given.take(rows, take_items(self._preparation.corpus, rows).set_hashes)


def _has_texts(report: Report) -> bool:
    return isinstance(report, ChoiceReport) or report.sets["forget"].rouge_l_recall is not None


def _report_of(items: Arrays) -> Report:
    """Return scores from the arrays that are kept of a trial."""
    names = dict.fromkeys(key.partition("/")[0] for key in items)
    if any(key.endswith("/log_likelihood") for key in items):
        kept = {name: {part.name: items.get(f"{name}/{part.name}") for part in fields(ChoiceScores)} for name in names}
        return ChoiceReport({name: ChoiceScores(**arrays) for name, arrays in kept.items()})  # type: ignore[arg-type]
    return ScoreReport({name: set_scores(items, name) for name in names})


def _apart(items: Arrays, report: Report) -> float:
    """Return the root mean square difference of the losses that both have, in nats per token; infinity without any."""
    arrays = report.arrays()
    shared = [key for key in arrays if key in items and key.partition("/")[2] in LOSSES]
    if not shared or any(items[key].shape != arrays[key].shape for key in shared):
        return math.inf
    with np.errstate(invalid="ignore"):  # beyond a question's choices log-likelihoods are -inf in both
        differences = [np.where(items[key] == arrays[key], 0.0, items[key] - arrays[key]) for key in shared]
    return float(np.sqrt(np.mean(np.concatenate([each.ravel() for each in differences]) ** 2)))
