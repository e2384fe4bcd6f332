"""Collect the data of the interactive charts: what `templates/report.js` draws, as JSON."""

import json
import math
import shlex
from typing import Any

from search.evaluation.controls import CONTROLS
from search.problem.objectives import Objective
from search.report.data import Column, ReportData, records, shown_bases
from search.report.recommendation import ROLES
from search.report.style import WALKS, decimal, number

SHAPES = {
    "^": "up",
    "v": "down",
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "*": "star",
    "P": "plus",
    "+": "plus",
    "x": "cross",
    "1": "tee",
}
"""Shapes of the page by markers of matplotlib."""

LONGEST_ANSWERS = 600_000
"""Bytes of answers in a page, so that it stays below 2 MB; trials of the front come first."""

MOST_TRIALS = 5000
"""Trials in the charts, those of the front first; a browser draws each of them as three marks."""


def chart_data(view: ReportData, recommended: int | None) -> dict[str, Any]:
    """Return everything that the charts show, ready for JSON.

    Args:
        view: What the report shows.
        recommended: The trial that is selected at first; None for none.
    """
    drawn = view.trials.sort_values("on_front", ascending=False, kind="stable")[:MOST_TRIALS].sort_index()
    methods = sorted(view.trials["method"].dropna().unique())
    bases = list(dict.fromkeys(view.trials["base"]))
    of_base = dict(zip(view.trials["base"], view.trials["method"], strict=True))
    markers = {kind: control.marker for kind, control in CONTROLS.items() if control.marker is not None}
    kinds = list(markers)
    columns = [*view.columns, *view.related]
    return {
        "objectives": [_axis(each) for each in view.objectives],
        "definition": view.summary["definition"],
        "ceiling": view.ceiling if math.isfinite(view.ceiling) else None,
        "columns": [column.head.replace("\n", " ") for column in columns],
        "initial": None if view.initial is None else [column.text(view.initial) for column in columns],
        "methods": methods,
        "bases": [{"label": base, "method": methods.index(of_base[base])} for base in bases],
        "panels": [bases.index(base) for base in shown_bases(view.trials)],
        "walks": [{"name": label, "shape": SHAPES[marker]} for marker, _, label in WALKS.values()],
        "trials": [_trial(view, row, bases, columns) for row in records(drawn)],
        "controls": [
            {"name": each.label.removeprefix("control: "), "shape": SHAPES[each.shape], "named": each.size is not None}
            for each in markers.values()
        ],
        "controlled": [_control(view, row, bases, kinds) for row in records(view.controls) if row["kind"] in kinds],
        "surfaces": [{"share": share, "corners": corners} for share, corners in view.attainment.items()],
        "recommended": recommended,
        "export": [shlex.quote(view.summary["out"]), shlex.quote(f"{view.summary['out']}/export/")],
        "answers": _answers(view),
    }


def _axis(objective: Objective) -> dict[str, Any]:
    return {"title": objective.title, "whole": objective.quality_of is not None}


def _values(view: ReportData, row: dict[str, Any]) -> list[float | None]:
    """Return the objectives of a row with five digits, which no picture resolves."""
    known = [number(row.get(objective.name)) for objective in view.objectives]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in known]


def _trial(view: ReportData, row: dict[str, Any], bases: list[str], columns: list[Column]) -> list[Any]:
    marks = [
        word
        for word, holds in (
            ("collapsed", isinstance(row.get("collapsed"), str)),
            ("flagged", bool(row["flagged"])),
            ("noise", number(row[view.objectives[0].name]) > view.ceiling),
        )
        if holds
    ]
    place = [bases.index(row["base"]), int(row["epoch"]), round(float(row["alpha"]), 4), list(WALKS).index(row["walk"])]
    return [
        int(row["trial"]),
        *place,
        int(row["on_front"]),
        marks,
        _values(view, row),
        [column.text(row) for column in columns],
    ]


def _control(view: ReportData, row: dict[str, Any], bases: list[str], kinds: list[str]) -> list[Any]:
    base = row.get("base")
    place = bases.index(base) if base in bases else None
    alpha = number(row.get("alpha"))
    texts = [f"{each.title} {decimal(row.get(each.name), each.places)}" for each in view.objectives]
    return [kinds.index(row["kind"]), place, None if math.isnan(alpha) else round(alpha, 4), _values(view, row), texts]


def _answers(view: ReportData) -> dict[str, Any] | None:
    """Return items [role, question, expected, before] and the answers of trials, as many as `LONGEST_ANSWERS` allows."""
    if view.answers is None:
        return None
    order = list(ROLES)
    places = [place for place, item in enumerate(view.answers.items) if item[0] in ROLES]
    places.sort(key=lambda place: order.index(view.answers.items[place][0]))  # type: ignore[union-attr]
    items = [[ROLES[name], *texts] for name, *texts in (view.answers.items[place] for place in places)]
    left, found = LONGEST_ANSWERS, {}
    for trial, texts in view.answers.of_trials.items():
        left -= len(json.dumps(texts))
        if left < 0:
            break
        found[str(trial)] = [texts[place] for place in places]
    return {"items": items, "trials": found}
