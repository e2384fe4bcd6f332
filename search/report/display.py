"""Show results on a terminal, as tables that break no word, and fronts in pictures and notebooks."""

import base64
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uipe_core.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT_WALKS = {
    "unlearned epoch": "trained",
    "interpolation": "interp.",
    "extrapolation": "extrap.",
    "initial model": "initial",
}

BASE_WIDTH = 14
"""Characters that the table leaves to the name of a base run; a longer one takes several lines, broken at its separators."""

SCREEN_DPI = 80

MEANINGS = {
    "base": "base run: one training of a method",
    "alpha": "alpha: 0 as trained, -1 the initial model, above 0 extrapolated",
    "log10_forget_quality": "FQ: forget quality (p-value against a retain model)",
    "model_utility": "MU: model utility",
    "forget_rouge": "forget ROUGE, prob.: how far the answers to forget are still given",
    "logit_scale": "logit scale: relative to the initial model",
    "related_log10_forget_quality": "K2: facts that follow from the forgotten ones",
    "unrelated_log10_forget_quality": "K0: unrelated facts",
}
"""What the heads of columns stand for, by key."""


@dataclass(frozen=True)
class Column:
    """A column of the front.

    Attributes:
        key: In the table of trials.
        head: Two lines at most.
        form: Format of a value.
        rank: A narrow table leaves out the columns of the highest rank first; 0 is always there.
    """

    key: str
    head: str
    form: str = "{}"
    rank: int = 0


def front_columns(result: Any) -> list[Column]:
    """Return the columns of a study's front, those that its trials have."""
    from search.results.study_result import FORGET_NUMBERS

    found = [
        Column("trial", "trial"),
        Column("base", "base run"),
        Column("epoch", "epoch"),
        Column("alpha", "alpha", "{:.3f}"),
        Column("walk", "walk", rank=2),
    ]
    for objective in result.objectives:
        places = f"{{:z.{objective.places}f}}"
        found.append(Column(objective.name, objective.head, places))
        if objective.p_value is not None:
            found.append(Column(objective.p_value, objective.head.removeprefix("log10\n"), "{:.2g}", rank=1))
        found += [Column(key, head.replace(" ", "\n", 1), places) for key, head in objective.companions]
    found += [Column(key, head.replace(" ", "\n"), "{:.3f}") for key, head in FORGET_NUMBERS.items()]
    known = {column.key for column in found}
    more = [
        Column("logit_scale", "logit\nscale", "{:.3f}", rank=3),
        Column("related_log10_forget_quality", "log10\nFQ K2", "{:z.2f}", rank=4),
        Column("unrelated_log10_forget_quality", "log10\nFQ K0", "{:z.2f}", rank=5),
    ]
    found += [column for column in more if column.key not in known]
    audits = (result.audits or {"front": []})["front"]
    audited = [Column(each["key"], each["head"], rank=6 + place) for place, each in enumerate(audits)]
    return [*(column for column in found if column.key in result.front), *audited]


def print_front(result: Any, width: int = 140) -> None:
    """Print the front.

    Args:
        result: The study.
        width: Columns where standard output is no terminal.
    """
    from rich.markup import escape

    from search.problem.objectives import chosen_by, flag_of
    from search.problem.stand_ins import MARK, marked, stand_in_note
    from search.store.trials import collapsed

    title = f"Pareto front of {result.store.record.name} (metrics: {result.spec.definition})"
    table, console = new_table(title, width)
    columns = front_columns(result)
    marks = marked(result.objectives, result.store.record.corpus.stand_ins, [column.key for column in columns])
    columns = [replace(column, head=f"{column.head} {MARK}") if column.key in marks else column for column in columns]
    audits = (result.audits or {"front": []})["front"]
    tests = {
        str(name): {each["key"]: each["texts"][str(name)] for each in audits} for name in (*result.front["trial"], "initial")
    }
    rows = [
        _cells(columns, {**row, **tests[str(row["trial"])]}, result.objectives[1].name)
        for row in result.front.to_dict("records")
    ]
    initial = result.control("initial")
    if initial is not None:
        nowhere = dict.fromkeys(("trial", "epoch", "alpha", "walk", "flagged", "collapsed"))
        rows.append(
            _cells(columns, {**initial, **nowhere, **tests["initial"], "base": "initial model"}, result.objectives[1].name)
        )
    shown, left_out = _fitting(columns, rows, console.width)
    for column in shown:
        left = column.key in ("base", "walk")
        table.add_column(column.head, justify="left" if left else "right", no_wrap=True)
    for place, row in enumerate(rows):
        table.add_row(
            *(escape(printable(row[column.key])) for column in shown),
            end_section=initial is not None and place == len(rows) - 2,
        )
    console.print(table)
    console.print("; ".join(MEANINGS[column.key] for column in shown if column.key in MEANINGS), markup=False, highlight=False)
    console.print(printable(chosen_by(result.objectives)), markup=False)
    if left_out:
        heads = ", ".join(column.head.replace("\n", " ") for column in left_out)
        console.print(f"left out, because the terminal is narrow: {heads}", markup=False)
    if result.front.empty:
        console.print("the front has no point: the initial model is at least as good as every trial in every objective")
    if (note := stand_in_note(marks)) is not None:
        console.print(printable(note), markup=False)
    if not (seeds := result.over_seeds).empty:
        holding = ", ".join(str(number) for number in seeds.loc[seeds["holds"], "trial"]) or "none"
        console.print(f"hold over all {len(result.spec.unlearning.seeds)} seeds: {holding}", markup=False)
    if result.front["flagged"].any():
        flag = flag_of(result.objectives)
        console.print(f"! {flag.meaning}, {flag.caution}")
    for row in result.front[collapsed(result.front)].to_dict("records"):
        console.print(f"x trial {row['trial']} has collapsed ({printable(row['collapsed'])}): no rule selects it", markup=False)


def _cells(columns: list[Column], row: dict[Any, Any], utility: str) -> dict[str, str]:
    """Return the texts of a row by column."""
    row = {**row, "walk": SHORT_WALKS.get(row["walk"], "")}
    cells = {each.key: "" if _missing(value := row.get(each.key)) else each.form.format(value) for each in columns}
    cells["base"] = "\n".join(broken_name(cells["base"], BASE_WIDTH))
    cells[utility] += " !" if row["flagged"] else ""
    cells["trial"] += " x" if isinstance(row["collapsed"], str) else ""
    return cells


def broken_name(name: str, width: int) -> list[str]:
    """Break a name into lines of at most `width` characters, behind separators; a part that is longer stays whole."""
    lines = [""]
    for part in re.findall(r"[^-_/,.: ]*[-_/,.: ]*", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines if line] or [""]


def _missing(value: Any) -> bool:
    return value is None or value != value


def _fitting(columns: list[Column], rows: list[dict[str, str]], width: int) -> tuple[list[Column], list[Column]]:
    """Return the columns that fit, and those to leave out."""

    def wide(column: Column) -> int:
        texts = (column.head, *(row[column.key] for row in rows))
        return 2 + max(len(line) for text in texts for line in text.split("\n"))

    shown, left_out = list(columns), []
    for column in sorted((each for each in columns if each.rank), key=lambda each: -each.rank):
        if sum(map(wide, shown)) + 1 <= width:
            break
        shown.remove(column)
        left_out.append(column)
    return shown, left_out


def new_table(title: str | None = None, width: int = 140) -> tuple[Any, Any]:
    """Return an empty table, and a console that is `width` columns wide where standard output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    return table, Console() if sys.stdout.isatty() else Console(width=width)


def draw_front(result: Any) -> "Figure":
    """Draw the front of a study; as the last line of a notebook's cell the figure is shown."""
    from search.report.data import report_data
    from search.report.figures import front_figure
    from search.report.progress import in_notebook

    if in_notebook():
        from IPython import get_ipython
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(get_ipython(), {"png"}, dpi=SCREEN_DPI)  # without pyplot a kernel cannot show figures
    return front_figure(report_data(result))


def draw_fronts(found: Mapping[str, Any], path: Path) -> None:
    """Draw the fronts of studies into a picture file (`search.results.comparison.compare_studies`)."""
    from search.report.figures import comparison_figure

    comparison_figure(found).savefig(path)


def front_html(result: Any) -> str:
    """Return the front as HTML for a notebook: table and picture."""
    from html import escape

    columns = [column for column in front_columns(result) if column.key in result.front]
    table = result.front[[column.key for column in columns]].copy()
    for column in columns:
        table[column.key] = ["" if _missing(value) else column.form.format(value) for value in table[column.key]]
    table.columns = [column.head.replace("\n", " ") for column in columns]
    picture = io.BytesIO()
    draw_front(result).savefig(picture, format="png", dpi=SCREEN_DPI)
    image = base64.b64encode(picture.getvalue()).decode()
    title = (
        f"{result.store.record.name}: {len(result.trials)} trials, hypervolume {result.hypervolume['front']:.6g} "
        f"({result.hypervolume['alpha_zero']:.6g} without a search)"
    )
    return (
        f"<p><b>{escape(title)}</b></p>"
        f"{table.to_html(index=False, border=0, escape=True)}"
        f'<img alt="Pareto front" src="data:image/png;base64,{image}">'
    )
