"""Plans and findings as tables on a terminal."""

import sys
from typing import Any


def print_plan(plan: Any) -> None:
    """A plan as a table of numbers, then what cannot fit and what is not known."""
    from rich.markup import escape

    table, console = _table(f"Plan of {plan.study}")
    for head in ("", "what", "amount", "how it is known"):
        table.add_column(head, justify="right" if head == "amount" else "left", overflow="fold")
    section = ""
    for line in plan.lines:
        amount = "?" if line.value is None else _AMOUNTS[line.unit](line.value)
        table.add_row("" if line.section == section else line.section, escape(line.what), amount, line.how)
        section = line.section
    console.print(table)
    for misfit in plan.misfits:
        console.print(f"cannot fit: {misfit.what}; {misfit.remedy}", markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    if not plan.misfits:
        console.print("nothing that is known stands in the way", markup=False)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


_AMOUNTS = {"": "{:,.0f}".format, "s": _duration, "bytes": _bytes, "GPU-hours": "{:.3g} GPU-hours".format}


def print_findings(study: str, findings: Any) -> None:
    """What the doctor found: a row per finding with what it means and what to do."""
    from rich.markup import escape

    table, console = _table(f"Findings about {study}")
    for head in ("", "finding", "what it means", "remedy"):
        table.add_column(head, overflow="fold")
    for finding in findings:
        table.add_row(finding.state, escape(finding.found), escape(finding.meaning), escape(finding.remedy))
    console.print(table)


def _table(title: str) -> tuple[Any, Any]:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    return table, Console() if sys.stdout.isatty() else Console(width=140)
