"""Write the report of a study: one self-contained HTML page, its figures as files, and its front as a LaTeX table."""

import base64
import errno
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import jinja2

from search.evaluation.controls import CONTROLS
from search.report.charts import chart_data
from search.report.conclusions import conclude
from search.report.data import TRIAL_COLUMNS, ReportData, records, report_data, shown_bases
from search.report.recommendation import examples, recommendation
from search.report.style import WALKS, alpha, decimal, number, page_style, probability, seconds, table_text, whole
from search.results.study_result import CONTROL_COLUMNS, StudyResult
from search.results.uncertainty import FEW_GROUPS
from uipe_core.errors import UserError, printable
from uipe_core.storage.files import write_atomic

STAGES = {
    "models": "models: find or train the initial and the retain model",
    "references": "reference models: score them",
    "base_runs": "reference models: score them, and wait for base runs",
    "training": "base runs: wait while unlearning methods are trained, each once",
    "baselines": "given points: score alpha = 0 and the controls, and train base runs meanwhile",
    "given": "given points: score alpha = 0 and the controls",
    "trials": "trials: re-apply cached updates and score",
    "audits": "audits: attack finalists",
}
"""Stages by their key in a record; those of older records, in which scoring and training are mixed, say so."""
MIXED_STAGES = ("base_runs", "baselines")
NONE_YET: dict[str, Any] = {
    **{key: [] for key in ("selections", "notes", "failures", "failure_reasons", "pruned")},
    **dict.fromkeys(("usage", "saved", "unfinished")),
    "epoch_seconds": {},
}
"""What a summary may lack."""


def write_report(result: StudyResult, folder: Path | None = None) -> Path:
    """Write the report of a study; return the path of the page.

    Args:
        result: The study.
        folder: Where to; None is ``report`` in its own folder.

    Raises:
        UserError: The folder cannot be written.
    """
    target = folder or result.report_path.parent
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK):  # asked before anything is drawn
            raise OSError(errno.EROFS, "it is read-only")
    except OSError as error:
        raise _not_written(target, error) from error
    # Matplotlib writes a font cache, by default into the home folder.
    place = result.out if folder is None else folder
    os.environ.setdefault("MPLCONFIGDIR", str((place / ".matplotlib").resolve()))
    return render_report(report_data(result), target)


def _not_written(folder: Path, error: OSError) -> UserError:
    where = "free space there, or choose another folder with `uipe report --to`"
    return UserError(f"cannot write the report into {folder}: {error.strerror}; {where}")


VECTOR = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "svg": {"Date": None, "Creator": None}}
"""Formats of the pictures for papers, with what is left out of them so that the same study gives the same bytes."""


def render_report(view: ReportData, folder: Path) -> Path:
    """Write `report.html`, and the front and the curves over alpha as PNG, SVG and PDF, each whole or not at all.

    Args:
        view: the study's tables and summary.
        folder: created where it is missing; an older report in it is replaced.

    Returns:
        The path of `report.html`, which needs no other file and no network.

    Raises:
        UserError: the folder cannot be written.
        ValueError: a column that the report needs is missing, or a walk or kind of control has an unknown name.
    """
    from search.report import figures as plots  # imports matplotlib, after its folder has been set
    from search.report.style import picture

    view = checked(view)
    figures = {"front": plots.front_figure(view), "alpha_curves": plots.alpha_figure(view)}
    page = render_page(view)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for form in ("png", "svg", "pdf"):
                write_atomic(folder / f"{name}.{form}", picture(figure, form))
        write_atomic(folder / "report.html", page.encode())
    except OSError as error:
        raise _not_written(folder, error) from error
    return folder / "report.html"


def checked(view: ReportData) -> ReportData:
    """Return a view with the columns that tables and charts read.

    Raises:
        ValueError: As `render_report`.
    """
    needed = [*TRIAL_COLUMNS, *(objective.name for objective in view.objectives)]
    missing = [column for column in needed if column not in view.trials.columns]
    if missing:
        raise ValueError(f"trials lack the columns {missing}")
    strange = set(view.trials["walk"]) - set(WALKS) | set(view.controls.get("kind", ())) - set(CONTROLS)
    if strange:
        raise ValueError(f"walks or kinds of control that the report does not know: {sorted(map(str, strange))}")
    columns = [*CONTROL_COLUMNS, *(column.key for column in view.columns), *view.controls.columns]
    controls = view.controls.reindex(columns=list(dict.fromkeys(columns)))
    trials = view.trials.astype({"on_front": bool, "flagged": bool}).assign(collapsed=view.trials.get("collapsed"))
    return replace(view, trials=trials, controls=controls)


def environment() -> jinja2.Environment:
    """Return the environment of the pages: what comes from files is escaped."""
    loader = jinja2.PackageLoader("search.report", "templates")
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = {"probability": probability, "decimal": decimal, "alpha": alpha, "seconds": seconds}
    made.filters.update(filters, whole=whole, table_text=table_text, cell=lambda row, column: column.text(row))
    return made


def filled(template: str, **values: Any) -> str:
    """Return a page that has the style and the script of the report. Its policy lets this one script run and nothing load.

    Args:
        template: One that extends ``page.html.j2``.
        values: What it shows; ``title``, and ``live`` as `render_page`.
    """
    parts = resources.files("search.report").joinpath("templates")
    code = "".join(parts.joinpath(name).read_text(encoding="utf-8") for name in ("charts.js", "report.js"))
    known = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{known}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
    page = environment().get_template(template)
    return page.render(style=page_style(), script=code, policy=policy, **values)


def render_page(view: ReportData, live: float | None = None, status: Mapping[str, Any] | None = None) -> str:
    """Return the page.

    Args:
        view: What it shows, as `checked` returns it.
        live: Seconds after which the page asks for itself again; None for a file.
        status: How far the study is (`search.results.status.read_status`); None for a file.
    """
    front = view.trials[view.trials["on_front"]].sort_values([objective.name for objective in view.objectives])
    by_trial = {int(row["trial"]): row for row in view.trials.to_dict("records")}
    ship = recommendation(view)
    return filled(
        "report.html.j2",
        title=f"{view.summary['study']}: unlearning study",
        live=live,
        status=status,
        ship=ship,
        examples=[] if ship["trial"] is None else examples(view, ship["trial"]),
        chart=chart_data(view, ship["trial"]),
        summary={**NONE_YET, **view.summary},
        verdict=conclude(view),
        gains=_gain_bars(view.summary),
        front=front.to_dict("records"),
        columns=view.columns,
        initial=view.initial,
        chosen_by=view.chosen_by,
        stand_in_note=view.stand_in_note,
        finalists=view.finalists(),
        certain=not view.certainty.empty,
        few_groups=FEW_GROUPS,
        withheld=view.certainty.empty and view.summary.get("smallest_groups", FEW_GROUPS) < FEW_GROUPS,
        power=view.summary.get("power"),
        forget_groups=view.summary.get("forget_groups"),
        apart=not view.held_out.empty,
        matched=not view.matched_scale.empty,
        paired="paired_p" in view.trials.columns,
        confirmed=view.confirmations.to_dict("records"),
        over_seeds=view.over_seeds.to_dict("records"),
        related=view.related,
        objectives=view.objectives,
        ceiling=view.ceiling,
        flag=view.flag,
        infinity=math.inf,
        by_trial=by_trial,
        controls=[
            {
                "name": control.title,
                "purpose": control.purpose,
                "rows": view.controls[view.controls["kind"] == kind].to_dict("records"),
            }
            for kind, control in CONTROLS.items()
            # Most kinds mean something for free text only.
            if control.title and (not view.choices or kind in set(view.controls["kind"]))
        ],
        choices=view.choices,
        audits=view.audits,
        audited=(view.audits or {"front": []})["front"],
        cost=_cost(view),
        bases=int(view.trials["base"].nunique()),
        bases_shown=len(shown_bases(view.trials)),
    )


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "−": "$-$",
        "–": "--",
        "±": r"$\pm$",
    }
)
"""What LaTeX reads as more than itself, and signs that its fonts may lack."""
_POWER = re.compile(r"^([\d.]+)e\$-\$(\d+)$")


def front_latex(result: StudyResult) -> str:
    """Return the front as a LaTeX table for the package booktabs, the initial model under it; all names are escaped."""
    view = checked(report_data(result))
    front = view.trials[view.trials["on_front"]].sort_values([objective.name for objective in view.objectives])

    def line(*cells: str) -> str:
        plain = (" ".join(printable(cell).split()) for cell in cells)
        return " & ".join(_POWER.sub(r"$\1\\times10^{-\2}$", cell.translate(_LATEX)) for cell in plain) + r" \\"

    rows = [
        line(
            whole(row["trial"]),
            str(row["base"]),
            whole(row["epoch"]),
            alpha(row["alpha"]),
            *(c.text(row) for c in view.columns),
        )
        for row in records(front)
    ]
    if view.initial is not None:
        rows += [r"\midrule", line("", "initial model", "", "", *(column.text(view.initial) for column in view.columns))]
    named = " ".join(printable(f"{result.store.record.name}, metrics: {view.summary['definition']}").split())
    return "\n".join(
        [
            rf"% Pareto front of {named}; needs \usepackage{{booktabs}}",
            rf"\begin{{tabular}}{{rl{'r' * (2 + len(view.columns))}}}",
            r"\toprule",
            line("trial", "base run", "epoch", "alpha", *(column.head for column in view.columns)),
            *([r"\midrule", *rows] if rows else []),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _gain_bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    labels = {"all": "all alpha", "extrapolation_only": "alpha ≥ 0", "random_direction": "random directions"}
    gains = {key: number(summary["gain"].get(key)) for key in labels}
    longest = max([value for value in gains.values() if value > 0], default=1.0)
    shares = {key: 0.0 if math.isnan(value) else max(value, 0.0) / longest for key, value in gains.items()}
    return [{"label": labels[key], "gain": gains[key], "share": 100 * shares[key]} for key in labels]


def _share_of_training(view: ReportData) -> float:
    """Return what one more alpha costs, as a share of training a base run to the same epoch and scoring it; a median."""
    search = view.trials[view.trials["kind"] == "search"]
    epochs, trial = view.summary.get("epoch_seconds", {}), float(search["seconds"].median())
    trained = [
        sum(epochs[row["base"]][: int(row["epoch"])])
        for row in search.to_dict("records")
        if len(epochs.get(row["base"], ())) >= row["epoch"]
    ]
    return median(trial / (seconds + trial) for seconds in trained) if trained else math.nan


def _cost(view: ReportData) -> dict[str, Any]:
    spent = {stage: number(view.summary["seconds"].get(stage), 0.0) for stage in STAGES}
    total = sum(spent.values())
    search = view.trials[view.trials["kind"] == "search"]
    trained = view.summary["base_run_seconds"]
    base_run = sum(trained) / len(trained) if trained else math.nan
    trial = float(search["seconds"].median())
    saved = view.summary.get("saved")
    scored = len(search) + (saved["trials"] if saved else 0)
    return {
        "stages": [
            {"label": label, "seconds": spent[stage], "share": 100 * spent[stage] / total if total else 0.0}
            for stage, label in STAGES.items()
            if stage not in (*MIXED_STAGES, "audits") or spent[stage]
        ],
        "total": total,
        "saved": saved,
        "trials_per_second": scored / spent["trials"] if spent["trials"] else math.nan,
        "trial": trial,
        "share": _share_of_training(view),
        "base_run": base_run,
        "ratio": base_run / trial if trial > 0 and base_run > 0 else math.nan,
    }
