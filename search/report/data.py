"""Collect what the report shows from a study result."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from search.evaluation.inputs import power_of_forget_quality
from search.problem.hypervolume import quality_floor
from search.problem.objectives import (
    CHOICE_FORGETTING,
    FORGET_QUALITY,
    MODEL_UTILITY,
    Flag,
    Objective,
    chosen_by,
    flag_of,
)
from search.problem.pareto import DEFAULT_FLOOR, RULES
from search.problem.stand_ins import MARK, marked, stand_in_note
from search.problem.trial import INITIAL
from search.report.style import counted, decimal, probability
from search.results.study_result import FORGET_NUMBERS, StudyResult
from search.results.uncertainty import smallest_groups
from search.spec.models import FinetunedModel, PretrainedModel
from search.spec.study import StudySpec
from search.store.record import StudyRecord
from uipe_core.errors import UserError
from uipe_core.metrics.scores import TEXTS

FORGETTING, UTILITY = "forgetting", "utility"
"""Columns of the first two objectives by role: pictures and verdict need not know which numbers these are."""

TRIAL_COLUMNS = ("trial", "kind", "base", "method", "epoch", "alpha", "walk", "flagged", "seconds", "on_front")


@dataclass(frozen=True)
class Column:
    """A number in a table of the report: its key, its head, and the function of `search.report.style` that writes it."""

    key: str
    head: str
    form: str
    places: int = 4

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the number of a row as text; a dash where it has none."""
        value = row.get(self.key)
        return probability(value) if self.form == "probability" else decimal(value, self.places)


@dataclass(frozen=True)
class Answers:
    """A few answers as text, the same items for every model.

    Attributes:
        items: Set, question, expected answer and answer of the initial model of each item.
        of_trials: Answers to these items, by trial.
    """

    items: list[tuple[str, str, str, str]]
    of_trials: dict[int, list[str]]


@dataclass(frozen=True, eq=False)
class ReportData:
    """All that a report shows, read from a study by the caller.

    Attributes:
        trials: a row per complete point of the search space with the columns of `TRIAL_COLUMNS` and the objectives. `kind` is
            "alpha_zero" or "search"; `walk` is "initial model", "interpolation", "unlearned epoch" or "extrapolation";
            `seconds` is the time of the trial. Optional: `related_log10_forget_quality`,
            `unrelated_log10_forget_quality` and the components of utility.
        controls: a row per scored control, likewise (`CONTROL_COLUMNS`), NaN or None where one does not apply.
            `kind` is a key of `CONTROLS`; `of_trial` is the front point a control belongs to.
        summary: study, definition, corpus, model, seed, dtype, forget_items, log10_floor, reference_point,
            forget_quality_cap, alpha {low, high}, alpha_by_base {base run: {key, low, high}},
            trials {complete, pruned, failed, interrupted, running}, hypervolume, gain
            {all, extrapolation_only, random_direction}, seconds by stage, base_run_seconds and epoch_seconds by label
            [training only], storage, created (ISO time), versions; and,
            where there are any, selections [{rule, trial, ...}], notes [text], failures [{trial, reason}],
            failure_reasons [(reason, count)], unfinished (the note on missing trials, or None), saved
            (`search.evaluation.pruning.savings`), pruned [{trial, base, ...}]
            (`pruned_table`), usage {hours, cpu_hours, gpu_hours}, out (the folder, as commands name it), recommended (as
            `recommended`), untested [{title, reason}] (audits that were not done on the trial recommended).
        objectives: what the study maximises.
        audits: `search.results.audits.audit_facts`; None where nothing was audited.
        floor: least share of the initial model's utility that sentences speak of.
        certainty, held_out, matched_scale, confirmations, over_seeds: tables of `search.results.uncertainty` and
            `search.results.finalists`; empty where nothing of the kind was scored.
        answers: a few answers of the initial model and of trials (`answers`); None where no texts are kept.
        attainment: corners of the surfaces that shares of the seeds attain (`StudyResult.attainment`).
    """

    trials: pd.DataFrame
    controls: pd.DataFrame
    summary: dict[str, Any]
    objectives: tuple[Objective, ...] = (FORGET_QUALITY, MODEL_UTILITY)
    floor: float = DEFAULT_FLOOR
    audits: dict[str, Any] | None = None
    certainty: pd.DataFrame = field(default_factory=pd.DataFrame)
    held_out: pd.DataFrame = field(default_factory=pd.DataFrame)
    matched_scale: pd.DataFrame = field(default_factory=pd.DataFrame)
    confirmations: pd.DataFrame = field(default_factory=pd.DataFrame)
    over_seeds: pd.DataFrame = field(default_factory=pd.DataFrame)
    attainment: dict[str, list[list[float]]] = field(default_factory=dict)
    answers: "Answers | None" = None

    @property
    def columns(self) -> list[Column]:
        """The numbers that tables show of every trial and control: objectives, p-values, forget answers, logit scale."""
        found = []
        for objective in self.objectives:
            if objective.p_value is not None:
                found.append(Column(objective.p_value, objective.title.removeprefix("log10 "), "probability"))
                found.append(Column(objective.name, "log10", "decimal", objective.places))
            else:
                found.append(Column(objective.name, objective.title, "decimal", objective.places))
            found += [Column(key, head, "decimal", objective.places) for key, head in objective.companions]
        named = [Column(key, head, "decimal", 3) for key, head in FORGET_NUMBERS.items() if key in self.trials.columns]
        return [*map(self._with_mark, found), *named, Column("logit_scale", "logit scale", "decimal", 3)]

    @property
    def related(self) -> list[Column]:
        """Further columns of the front: log10 forget quality of related (K2) and unrelated (K0) facts, where scored."""
        heads = {"related": "related (K2)", "unrelated": "unrelated (K0)"}
        shown = {objective.name for objective in self.objectives}
        names = {f"{name}_log10_forget_quality": head for name, head in heads.items()}
        return [
            self._with_mark(Column(name, head, "decimal", 2))
            for name, head in names.items()
            if name in self.trials.columns and name not in shown
        ]

    @property
    def _marks(self) -> dict[str, dict[str, list[str]]]:
        return marked(self.objectives, self.summary.get("stand_ins", {}), self.trials.columns)

    def _with_mark(self, column: Column) -> Column:
        return replace(column, head=f"{column.head} {MARK}") if column.key in self._marks else column

    @property
    def chosen_by(self) -> str:
        """Return a sentence: which objectives chose, and whether they looked at a retain model."""
        return chosen_by(self.objectives)

    @property
    def stand_in_note(self) -> str | None:
        """Return the note on numbers made with stand-ins; None where there are none."""
        return stand_in_note(self._marks)

    @property
    def initial(self) -> dict[str, Any] | None:
        """The initial model as a control, what every point is held against; None before it is scored."""
        rows = self.controls[self.controls["kind"] == INITIAL] if "kind" in self.controls else self.controls
        return None if rows.empty else {str(key): value for key, value in rows.iloc[0].items()}

    def finalists(self) -> list[dict[str, Any]]:
        """The front from best kept to best forgotten, each point with what was found out about it afterwards."""
        front = self.trials[self.trials["on_front"]].sort_values(
            [objective.name for objective in self.objectives], ascending=False
        )
        for table, columns in (
            (self.certainty, list(self.certainty.columns)),
            (self.held_out, [name for name in self.held_out.columns if name.endswith(("_held_out", "_difference"))]),
            (self.matched_scale, [name for name in self.matched_scale.columns if name.endswith("_matched")]),
        ):
            if not table.empty:
                front = front.merge(table[["trial", *(name for name in columns if name != "trial")]], on="trial", how="left")
        return records(front)

    @property
    def choices(self) -> bool:
        """Return True for a study of multiple choice."""
        return self.objectives[0].name == CHOICE_FORGETTING.name

    @property
    def flag(self) -> Flag:
        """Return what it means that a point is flagged."""
        return flag_of(self.objectives)

    @property
    def ceiling(self) -> float:
        """Value of the first objective above which differences are noise; infinity where there is none."""
        return self.objectives[0].ceiling(self.summary["forget_quality_cap"])

    def by_role(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with the first two objectives under their roles too (`FORGETTING`, `UTILITY`)."""
        roles = dict(zip((FORGETTING, UTILITY), self.objectives, strict=False))
        return table.assign(**{role: table[objective.name].astype(float) for role, objective in roles.items()})


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def report_data(result: StudyResult) -> ReportData:
    """Tables and summary of the report."""
    record, spec = result.store.record, result.spec
    trained = {label: run.epochs for label, run in record.base_runs.items() if label not in spec.checkpoints}
    summary = {
        **result.summary(),
        "corpus": record.corpus.name,
        "model": _model_title(spec, record),
        "seed": spec.seed,
        "dtype": str(result.trials["dtype"].iloc[0]),
        "forget_items": result.store.item_counts["forget"],
        "log10_floor": None if result.objectives[0].quality_of is None else quality_floor(result.store.item_counts, "forget"),
        "alpha": {"low": spec.search.alpha.low, "high": spec.search.alpha.high},
        "alpha_by_base": {
            label: {"key": spec.range_key(label), "low": low, "high": high}
            for label, (low, high) in spec.alpha_ranges().items()
        },
        "created": record.created,
        "versions": record.versions,
        "base_run_seconds": [sum(epoch["seconds"] for epoch in epochs) for epochs in trained.values()],
        "epoch_seconds": {label: [epoch["seconds"] for epoch in epochs] for label, epochs in trained.items()},
        "selections": _selections(result),
        **_recommended(result),
        "failures": result.store.failures(),
        "pruned": result.pruned.to_dict("records"),
        "failure_reasons": counted(failure["reason"] for failure in result.store.failures()),
        "notes": _notes(result),
        "unfinished": _unfinished(result),
        "item_counts": record.corpus.items,
        "smallest_groups": smallest_groups(result.store),
        "power": _power(result),
        "forget_groups": _forget_groups(result),
        "stand_ins": record.corpus.stand_ins,
    }
    tables = (result.certainty, result.held_out, result.matched_scale, result.confirmations, result.over_seeds)
    front = (result.objectives, result.floor, result.audits)
    return ReportData(result.trials, result.controls, summary, *front, *tables, result.attainment, answers(result))


MOST_ANSWERED = 1000
"""Trials whose answers are in the report, those of the front first."""


def answers(result: StudyResult) -> Answers | None:
    """Read the answers that are kept as text (`search.evaluation.metrics.example_texts`), of up to `MOST_ANSWERED` trials."""
    initial = result.control(INITIAL)
    kept = None if initial is None else result.store.items(int(initial["trial"]), control=True, item_set=TEXTS)
    if not kept:
        return None
    asked = {name: [tuple(map(str, row)) for row in rows] for name, rows in kept.items()}
    items = [(name.partition("/")[2], *row) for name, rows in asked.items() for row in rows]
    found = {}
    order = result.trials.sort_values("on_front", ascending=False, kind="stable")["trial"]
    for number in map(int, order[:MOST_ANSWERED]):
        own = result.store.items(number, item_set=TEXTS) or {}
        texts = [[tuple(map(str, row)) for row in own.get(name, ())] for name in asked]
        # A trial that was scored on other items, by an older version perhaps, has nothing to compare with.
        if [[row[:2] for row in rows] for rows in texts] == [[row[:2] for row in rows] for rows in asked.values()]:
            found[number] = [row[2] for rows in texts for row in rows]
    return Answers(items, found)  # type: ignore[arg-type]


def recommended(result: StudyResult) -> dict[str, Any] | None:
    """Choose the model to ship: the strongest forgetting at the floor of utility, or the knee where none keeps that much.

    Returns:
        ``rule`` and ``trial``, ``note`` where there is something to say of the choice; None where no rule chooses.
    """
    for rule in ("utility-floor", "knee"):
        try:
            row, note = result.choose(rule)
        except UserError:
            continue
        title = f"{rule} {result.floor:g}" if rule == "utility-floor" else rule
        return {"rule": title, "trial": int(row["trial"]), "note": note}
    return None


def _recommended(result: StudyResult) -> dict[str, Any]:
    found = recommended(result)
    missing = [] if found is None else result.audits_of(found["trial"])[1]
    return {"recommended": found, "untested": [{key: each[key] for key in ("title", "reason")} for each in missing]}


MOST_SIMULATED = 1000
"""Items up to which the power of forget quality is worth its simulation: with more it sees a fifth of a standard deviation."""


def _power(result: StudyResult) -> str | None:
    items = result.store.item_counts["forget"]
    known = result.objectives[0].quality_of is not None and items <= MOST_SIMULATED
    return power_of_forget_quality(items) if known else None


def _forget_groups(result: StudyResult) -> int | None:
    """Count the people or authors of the forget items; None where an item stands for itself."""
    groups = result.store.record.corpus.groups.get("forget", [])
    return len(set(groups)) if groups and None not in groups else None


def _selections(result: StudyResult) -> list[dict[str, Any]]:
    found = []
    for rule in RULES:
        title = f"{rule}, floor {result.floor:g}" if rule == "utility-floor" else rule
        try:
            row, note = result.choose(rule)
        except UserError:
            continue
        found.append({"rule": title if note is None else f"{title} ({note})", "trial": int(row["trial"])})
    return found


def _notes(result: StudyResult) -> list[str]:
    notes = [
        f"Epochs of {label} are given checkpoints: "
        + ", ".join(f"{epoch} is {Path(folder).name}" for epoch, folder in enumerate(folders, 1))
        for label, folders in result.spec.checkpoints.items()
    ]
    searched, wanted, stopped = _searched(result), result.spec.search.trials, result.store.record.stopped
    if stopped:
        notes.append(
            f"Stopped after {searched} of {wanted} search trials: {stopped}. A larger budget and the same command go on."
        )
    elif (unfinished := _unfinished(result)) is not None:
        notes.append(unfinished)
    return notes


def _searched(result: StudyResult) -> int:
    return int((result.trials["kind"] == "search").sum()) + len(result.pruned)


def _unfinished(result: StudyResult) -> str | None:
    """Return the note on a study that no driver goes on with; None where nothing is missing."""
    searched, wanted = _searched(result), result.spec.search.trials
    return None if searched >= wanted else f"{searched} of {wanted} search trials are done: the same command resumes the study."


def _model_title(spec: StudySpec, record: StudyRecord) -> str:
    model = spec.model
    if isinstance(model, PretrainedModel):
        return f"{model.initial} ({record.models['initial']})"
    if isinstance(model, FinetunedModel):
        return f"{model.base}, fine-tuned on the corpus by the study ({record.models['initial'][:12]})"
    shape = f"hidden {model.hidden_size}, {model.layers} layers, {model.heads} heads"
    return f"small Llama built here ({shape}, {model.tokenizer} tokenizer; {record.models['initial'][:12]})"


MAX_BASES = 24
"""Base runs with a column of their own in the figures."""


def shown_bases(trials: pd.DataFrame) -> list[str]:
    """Labels of the base runs that get a column, in order of appearance.

    Of more than `MAX_BASES` those with front points are kept first, then those with most trials.
    """
    counts = trials.groupby("base", sort=False)["on_front"].agg(["sum", "size"])
    kept = set(counts.sort_values(["sum", "size"], ascending=False, kind="stable").index[:MAX_BASES])
    return [str(base) for base in counts.index if base in kept]
