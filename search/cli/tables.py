"""What the command line prints: JSON, metrics, the front, confirmations, claims."""

import json
import sys
from typing import Annotated, Any

import typer

Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster this is a node of: auto, or host:port; Ray on this machine alone when left out."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output; all else goes to standard error.")
]

SHOWN_REASONS = 8
"""How many reasons of failure a terminal shows."""


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value, default=str, allow_nan=False))


def print_metrics(values: dict[str, Any], as_json: bool) -> None:
    """The numbers of one model, a line each, or as JSON."""
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
    for name, value in rows.items():
        typer.echo(f"{name:32} {value:.6g}" if isinstance(value, float) else f"{name:32} {value}")


SHORT_WALKS = {
    "unlearned epoch": "trained",
    "interpolation": "interp.",
    "extrapolation": "extrap.",
    "initial model": "initial",
}


def print_front(result: Any) -> None:
    """The front as a table that fits a terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from search.problem.objectives import flag_of
    from search.report.data import collapsed

    definition = result.spec.definition
    title = f"Pareto front of {result.store.record['name']} (metrics: {definition})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = {
        "trial": ("trial", "{}"),
        "base": ("base run", "{}"),
        "epoch": ("epoch", "{}"),
        "alpha": ("alpha", "{:.3f}"),
        "walk": ("walk", "{}"),
        **_objective_columns(result.objectives),
        "logit_scale": ("logit\nscale", "{:.3f}"),
        "related_log10_forget_quality": ("log10\nFQ K2", "{:.2f}"),
        "unrelated_log10_forget_quality": ("log10\nFQ K0", "{:.2f}"),
    }
    columns = {key: column for key, column in columns.items() if key in result.front}
    utility = result.objectives[1].name
    for key, (head, _) in columns.items():
        table.add_column(head, justify="left" if key in ("base", "walk") else "right", overflow="fold")
    for row in result.front.to_dict("records"):
        row["walk"] = SHORT_WALKS[row["walk"]]
        cells = {key: "" if row[key] is None else form.format(row[key]) for key, (_, form) in columns.items()}
        cells[utility] += " !" if row["flagged"] else ""
        cells["trial"] += " x" if isinstance(row["collapsed"], str) else ""
        table.add_row(*map(escape, cells.values()))
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    if result.front["flagged"].any():
        flag = flag_of(result.objectives)
        console.print(f"! {flag.meaning}, {flag.caution}")
    for row in result.front[collapsed(result.front)].to_dict("records"):
        console.print(f"x trial {row['trial']} has collapsed ({row['collapsed']}): no rule selects it", markup=False)


def print_stop(result: Any) -> None:
    """Why a study ended before it had all its trials, what pruning saved, and which trials failed."""
    from search.execution.budgets import counted

    stopped = result.store.record.get("stopped")
    if stopped:
        typer.echo(f"\nstopped: {stopped}; a larger budget and the same command go on")
    saved = result.saved
    if saved:
        stages = ", ".join(f"{count} after {stage}" for stage, count in saved["stages"].items())
        seconds = f"about {saved['seconds']:.3g} s, {saved['share']:.0%} of their scoring"
        typer.echo(f"\npruned trials: {saved['trials']} ({stages}), which saved {seconds}")
    failures = result.store.failures()
    if failures:
        typer.echo(f"\nfailed trials: {len(failures)}")
        kinds = counted(failure["reason"] for failure in failures)
        for reason, count in kinds[:SHOWN_REASONS]:
            typer.echo(f"  {count} x {reason}")
        if len(kinds) > SHOWN_REASONS:
            typer.echo(f"  and {len(kinds) - SHOWN_REASONS} other reasons: see the report")


def _objective_columns(objectives: Any) -> dict[str, tuple[str, str]]:
    columns = {}
    for objective in objectives:
        columns[objective.name] = (objective.head, f"{{:.{objective.places}f}}")
        if objective.p_value is not None:
            columns[objective.p_value] = (objective.head.removeprefix("log10\n"), "{:.2g}")
        for key, head in objective.beside:
            columns[key] = (head.replace(" ", "\n", 1), f"{{:.{objective.places}f}}")
    return columns


def print_claims(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from search.paper.page import effect_text
    from search.paper.settings import TUNINGS

    title = f"What holds here (metrics: {result['definition']}; seeds: {len(result['seeds'])})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("about")
    table.add_column("claim", overflow="fold")
    table.add_column("unit")
    for name in TUNINGS.values():
        table.add_column(name, justify="right")
        table.add_column("")
    for claim in result["claims"]:
        cells = [cell for tuning in TUNINGS for cell in (effect_text(claim, tuning), claim[tuning]["verdict"])]
        table.add_row(claim["source"], claim["claim"], claim["unit"], *cells)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def print_confirmations(result: Any, rows: list[dict[str, Any]]) -> None:
    """Each confirmed trial with its numbers over training seeds."""
    for row in rows:
        point = f"{row['base']}, epoch {row['epoch']}, alpha {row['alpha']:.4f}"
        typer.echo(f"trial {row['trial']} ({point}), further seeds: {row['seeds']}")
        for objective in result.objectives:
            own, mean, spread = (row[f"{objective.name}{suffix}"] for suffix in ("", "_mean", "_spread"))
            places = objective.places
            typer.echo(f"  {objective.title:24} own seed {own:.{places}f}   all seeds {mean:.{places}f} +- {spread:.{places}f}")


def print_status(status: dict[str, Any]) -> None:
    """How far one study is, a line each."""
    job = f", job {status['job']}" if status.get("job") else ""
    lines = {"study": f"{status['study']} ({status['out']}{job})", "state": status["state"]}
    if status.get("exit_code"):
        lines["exit code"] = str(status["exit_code"])
    if "trials" in status:
        lines.update(_progress_lines(status))
    elif status.get("message"):
        lines["message"] = str(status["message"]).strip().splitlines()[0]
    for name, text in lines.items():
        typer.echo(f"{name:13} {text}")


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
    """Studies, a row each: of folders, or of a cluster's jobs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = [
        key for key in ("job", "study", "state", "trials", "started", "ended", "out") if any(key in row for row in studies)
    ]
    for key in columns:
        table.add_column(key, overflow="fold")
    for row in studies:
        cells = {**row, "trials": "{done} of {total}".format(**row["trials"]) if "trials" in row else ""}
        table.add_row(*(str(cells.get(key) or "") for key in columns))
    if studies:
        (Console() if sys.stdout.isatty() else Console(width=160)).print(table, markup=False)
    else:
        typer.echo("no studies")


def quieten() -> None:
    """Keeps the chatter of libraries off a terminal that shows progress bars and results."""
    import optuna
    import transformers

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
