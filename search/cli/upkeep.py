"""Plan a study, and repair its folder: `uipe plan`, `uipe doctor`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from search.cli.tables import Json, Settings, Trust, echo, print_json, quieten
from search.report.display import new_table
from uipe_core.errors import printable


def plan(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file.")],
    out: Annotated[Path | None, typer.Option(help="Where it would be run; runs/<study name> when left out.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished study of the same model and corpus: times are taken from it, not measured."),
    ] = None,
    settings: Settings = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Estimate what a study will train, score and store, and whether it fits; a few steps are timed on this machine.

    Models of the hub are not fetched: where they are missing, memory and disk follow from their configuration alone.
    Exit code 1 when something cannot fit.
    """
    from search.planning.planner import plan_study
    from search.spec.study import load_study
    from search.spec.study_file import read_settings

    quieten()
    spec = load_study(study, read_settings(settings or ()))
    place = out or Path("runs", spec.name)
    made = plan_study(spec, place, like, lambda text: echo(f"{text} ...", err=True), trust_remote_code)
    print_json(made.as_dict()) if as_json else print_plan(made)
    if made.misfits:
        sys.exit(1)


def doctor(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a study, as written by `uipe run`.")],
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired.")] = False,
    as_json: Json = False,
) -> None:
    """Check a study's folder and its entries in the caches; without --fix nothing is changed.

    Exit code 0 when nothing is wrong or all of it was repaired, 1 when something remains.
    """
    from search.store.doctor import PROBLEM, examine

    quieten()
    findings = examine(out, fix)
    remaining = sum(finding.state == PROBLEM for finding in findings)
    if as_json:
        print_json({"out": str(out), "remaining": remaining, "findings": [vars(finding) for finding in findings]})
    else:
        print_findings(str(out), findings)
        if remaining == 0:
            echo("no problem found")
        elif not fix:
            echo(f"uipe doctor {out} --fix repairs what can be repaired")
    if remaining:
        sys.exit(1)


def print_plan(plan: Any) -> None:
    """Print a plan as a table, then what cannot fit and what is not known."""
    from rich.markup import escape

    table, console = new_table(f"Plan of {plan.study}")
    for head in ("", "what", "amount", "how it is known"):
        table.add_column(head, justify="right" if head == "amount" else "left", overflow="fold")
    section = ""
    for line in plan.lines:
        amount = "?" if line.value is None else _AMOUNTS[line.unit](line.value)
        table.add_row("" if line.section == section else line.section, escape(printable(line.what)), amount, line.how)
        section = line.section
    console.print(table)
    for misfit in plan.misfits:
        console.print(printable(f"cannot fit: {misfit.what}; {misfit.remedy}"), markup=False)
    for note in plan.notes:
        console.print(printable(f"note: {note}"), markup=False)
    if not plan.misfits:
        console.print("everything that is known fits", markup=False)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


_AMOUNTS = {
    "": "{:,.0f}".format,
    "s": _duration,
    "bytes": lambda count: decimal(round(count)),
    "share": "{:.2f}".format,
    "GPU-hours": "{:.3g} GPU-hours".format,
}


def print_findings(study: str, findings: Any) -> None:
    """Print findings, a row each: what was found, what it means, the remedy."""
    from rich.markup import escape

    table, console = new_table(f"Findings about {study}")
    for head in ("", "finding", "what it means", "remedy"):
        table.add_column(head, overflow="fold")
    for finding in findings:
        texts = (finding.found, finding.meaning, finding.remedy)
        table.add_row(finding.state, *(escape(printable(text)) for text in texts))
    console.print(table)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: uipe plan studies/quickstart.yaml")(plan)
    app.command(epilog="Example: uipe doctor runs/quickstart --fix")(doctor)
