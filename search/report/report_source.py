"""From a study's results to what its report is made of."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.execution.budgets import counted
from search.problem.pareto import DEFAULT_FLOOR, RULES
from search.report.data import ReportData
from search.results.uncertainty import smallest_groups
from search.spec.study import StudySpec
from uipe_core.errors import UserError

if TYPE_CHECKING:
    from search.results.study_result import StudyResult


def report_data(result: "StudyResult") -> ReportData:
    """Tables and summary of the report."""
    record, spec = result.store.record, result.spec
    trained = [run["epochs"] for label, run in record["base_runs"].items() if label not in spec.checkpoints]
    summary = {
        **result.summary(),
        "corpus": record["corpus"]["name"],
        "model": _model_title(spec, record),
        "seed": spec.seed,
        "dtype": str(result.trials["dtype"].iloc[0]),
        "forget_items": result.item_counts["forget"],
        "log10_floor": None if result.objectives[0].quality_of is None else result.floor_of("forget"),
        "alpha": spec.search.alpha.model_dump(),
        "created": record["created"],
        "versions": record["versions"],
        "base_run_seconds": [sum(epoch["seconds"] for epoch in epochs) for epochs in trained],
        "selections": _selections(result),
        "failures": result.store.failures(),
        "pruned": result.pruned.to_dict("records"),
        "failure_reasons": counted(failure["reason"] for failure in result.store.failures()),
        "notes": _notes(result),
        "item_counts": record["corpus"]["items"],
        "smallest_groups": smallest_groups(result.store),
    }
    tables = (result.certainty, result.held_out, result.matched_scale, result.confirmations)
    return ReportData(result.trials, result.controls, summary, result.objectives, *tables)


def _selections(result: "StudyResult") -> list[dict[str, Any]]:
    found = []
    for rule in RULES:
        title = f"{rule}, floor {DEFAULT_FLOOR}" if rule == "utility-floor" else rule
        try:
            found.append({"rule": title, "trial": int(result.select(rule)["trial"])})
        except UserError:
            continue
    return found


def _notes(result: "StudyResult") -> list[str]:
    notes = [
        f"Epochs of {label} are given checkpoints: "
        + ", ".join(f"{epoch} is {Path(folder).name}" for epoch, folder in enumerate(folders, 1))
        for label, folders in result.spec.checkpoints.items()
    ]
    searched = int((result.trials["kind"] == "search").sum()) + len(result.pruned)
    wanted, stopped = result.spec.search.trials, result.store.record.get("stopped")
    if stopped:
        notes.append(
            f"Stopped after {searched} of {wanted} search trials: {stopped}. A larger budget and the same command go on."
        )
    elif searched < wanted:
        notes.append(f"{searched} of {wanted} search trials are done: the same command resumes the study.")
    return notes


def _model_title(spec: StudySpec, record: dict[str, Any]) -> str:
    model = spec.model
    if model.kind == "pretrained":
        return f"{model.initial} ({record['models']['initial']})"
    shape = f"hidden {model.hidden_size}, {model.layers} layers, {model.heads} heads"
    return f"small Llama built here ({shape}, {model.tokenizer} tokenizer; {record['models']['initial'][:12]})"
