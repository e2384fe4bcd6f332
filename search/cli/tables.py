"""Print results as Rich tables or as JSON."""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from search.report.display import new_table
from uipe_core.errors import UserError, printable


def echo(text: object = "", err: bool = False, nl: bool = True) -> None:
    """Print a text, which may hold names out of files, without what would control a terminal."""
    typer.echo(printable(str(text)), err=err, nl=nl)


def say(text: str, hang: str = "") -> None:
    """Print a sentence; on a terminal its lines break between words, and all but the first begin with `hang`."""
    text = printable(text)
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)
    typer.echo(text)


Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster this is a node of: auto, or host:port; Ray on this machine alone when left out."),
]

Floor = Annotated[
    float | None,
    typer.Option(
        help="For a utility floor: least share of the initial model's utility; the study's objectives.floor, or 0.95."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output; all else goes to standard error.")
]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the study file with another value; may be given several times."),
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the models, where the study asks for it (model.trust_remote_code).",
    ),
]

Verify = Annotated[
    str,
    typer.Option(
        help="How the written model is checked: loss reads the losses of the items, full generates its texts too, none checks "
        "nothing and says so on the card."
    ),
]
CHECKED = {
    "loss": "loaded again, its losses were compared with the trial's",
    "full": "loaded again, its numbers were compared with the trial's",
    "none": "it was not checked",
}
"""What is said of an export, by the value of --verify."""

SHOWN_REASONS = 8
"""How many reasons of failure a terminal shows."""


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    echo(json.dumps(value, default=str, allow_nan=False))


def print_metrics(values: dict[str, Any], as_json: bool) -> None:
    """Print the numbers of one model, a line each, or as JSON."""
    if as_json:
        print_json(values)
        return
    rows: dict[str, Any] = {}
    for key, value in values.items():
        rows.update(value if key in ("components", "forget") else {key: value})
    for name, quality in rows.pop("related", {}).items():
        rows[f"{name}: log10 forget quality"] = quality["log10_forget_quality"]
    for name, memorized in rows.pop("memorization", {}).items():
        rows.update({f"{name}: {key.replace('_', ' ')}": value for key, value in memorized.items()})
    if rows["collapsed"] is None:
        del rows["collapsed"]
    notes = rows.pop("notes", [])
    rows = {name: "not known" if value is None else value for name, value in rows.items()}
    for name, value in rows.items():
        echo(f"{name:32} {value:.6g}" if isinstance(value, float) else f"{name:32} {value}")
    for note in notes:
        echo(f"note: {note}")


def print_stop(result: Any) -> None:
    """Print why a study stopped early, what pruning saved, and which trials were interrupted or failed."""
    from search.report.style import counted

    stopped = result.store.record.stopped
    if stopped:
        echo(f"\nstopped: {stopped}; a larger budget and the same command go on")
    saved = result.saved
    if saved:
        stages = ", ".join(f"{count} after {stage}" for stage, count in saved["stages"].items())
        seconds = f"about {saved['seconds']:.3g} s, {saved['share']:.0%} of their scoring"
        echo(f"\npruned trials: {saved['trials']} ({stages}), which saved {seconds}")
    interrupted = result.store.counts()["interrupted"]
    if interrupted:
        echo(f"\ninterrupted trials: {interrupted}, by the end of a run; the same command makes up for them")
    failures = result.store.failures()
    if failures:
        echo(f"\nfailed trials: {len(failures)}")
        kinds = counted(failure["reason"] for failure in failures)
        for reason, count in kinds[:SHOWN_REASONS]:
            echo(f"  {count} x {reason}")
        if len(kinds) > SHOWN_REASONS:
            echo(f"  and {len(kinds) - SHOWN_REASONS} other reasons: see the report")


def print_claims(result: dict[str, Any]) -> None:
    from search.paper.page import effect_text, estimate_text
    from search.paper.settings import TUNINGS

    if "claims" in result:
        title = f"What holds here (metrics: {result['definition']}; seeds: {len(result['seeds'])})"
        table, console = new_table(title, width=160)
        table.add_column("about")
        table.add_column("claim", overflow="fold")
        table.add_column("unit")
        for name in TUNINGS.values():
            table.add_column(name, justify="right")
            table.add_column("")
        for claim in result["claims"]:
            cells = [cell for tuning in TUNINGS for cell in (effect_text(claim, tuning), claim[tuning]["verdict"])]
            table.add_row(claim["source"], claim["claim"], claim["unit"], *cells)
        console.print(table)
    attacked = result["survival"]
    title = (
        f"What survives attacks (study: {attacked['study']}; seeds: {len(attacked['seeds'])}; unit: share of forgetting undone)"
    )
    table, console = new_table(title, width=160)
    table.add_column("claim", overflow="fold")
    table.add_column("effect", justify="right")
    table.add_column("")
    table.add_column("points", justify="right")
    for row in attacked["answers"]:
        table.add_row(row["claim"], estimate_text(row, "share undone"), row["verdict"], str(row["points"]))
    console.print(table)


def print_confirmations(result: Any, rows: list[dict[str, Any]]) -> None:
    """Print each confirmed trial with its numbers over training seeds."""
    for row in rows:
        point = f"{row['base']}, epoch {row['epoch']}, alpha {row['alpha']:.4f}"
        echo(f"trial {row['trial']} ({point}), further seeds: {row['seeds']}")
        for objective in result.objectives:
            own, mean, spread = (row[f"{objective.name}{suffix}"] for suffix in ("", "_mean", "_spread"))
            places = objective.places
            echo(f"  {objective.title:24} own seed {own:.{places}f}   all seeds {mean:.{places}f} +- {spread:.{places}f}")


def print_status(status: dict[str, Any]) -> None:
    """Print the status of one study, a line per number."""
    job = f", job {status['job']}" if status.get("job") else ""
    lines = {"study": f"{status['study']} ({status['out']}{job})", "state": status["state"]}
    if status.get("exit_code"):
        lines["exit code"] = str(status["exit_code"])
    if "trials" in status:
        lines.update(_progress_lines(status))
    elif status.get("message"):
        lines["message"] = str(status["message"]).strip().splitlines()[0]
    for name, text in lines.items():
        echo(f"{name:13} {text}")


def _progress_lines(status: dict[str, Any]) -> dict[str, str]:
    trials, volumes = status["trials"], status["hypervolume"]
    counts = [f"{trials['done']} of {trials['total']} done", f"{trials['running']} running", f"{trials['failed']} failed"]
    counts += [f"{trials[name]} {name}" for name in ("interrupted", "pruned") if trials.get(name)]
    lines = {"trials": ", ".join(counts)}
    if volumes is not None:
        lines["front"] = f"{status['front']} points"
        known = {name: "not finite" if value is None else f"{value:.6g}" for name, value in volumes.items()}
        lines["hypervolume"] = f"{known['now']} ({known['given']} at alpha = 0)"
    lines["GPU-hours"] = f"{status['gpu_hours']:.2f} ({status['hours']:.2f} hours)"
    for name, (done, total) in status["progress"].items():
        lines[f"  {name}"] = f"{done} of {total}"
    if status["state"] in ("pending", "running"):
        lines["expected end"] = status["expected_end"] or "not known"
    lines["as of"] = status["updated"]
    return lines


def print_studies(studies: list[dict[str, Any]]) -> None:
    """Print studies, a row each: of folders, or of a cluster's jobs."""
    if not studies:
        echo("no studies")
        return
    table, console = new_table(width=160)
    names = ("job", "study", "state", "trials", "front", "hypervolume", "given", "started", "ended", "out")
    found = []
    for row in studies:
        volumes = row.get("hypervolume") or {}
        shown = {"hypervolume": volumes.get("now"), "given": volumes.get("given")} if "hypervolume" in row else {}
        trials = {"trials": "{done} of {total}".format(**row["trials"])} if "trials" in row else {}
        found.append({**row, **trials, **{key: "" if value is None else f"{value:.6g}" for key, value in shown.items()}})
    columns = [key for key in names if any(key in row for row in found)]
    for key in columns:
        table.add_column(key, overflow="fold")
    for cells in found:
        table.add_row(*(printable(str(cells.get(key) or "")) for key in columns))
    console.print(table, markup=False)


def attempt(what: Path | str, action: Callable[[], Any]) -> None:
    """Do what writes a file or opens a port; what the system refuses is a `UserError` that names it."""
    try:
        action()
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}; choose another") from error


def quieten() -> None:
    """Silence the log messages of libraries, which would break progress bars."""
    import optuna
    import transformers

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
