"""Print results as Rich tables or as JSON."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uipe_core.errors import printable


def echo(text: object = "", err: bool = False, nl: bool = True) -> None:
    """Print a text, which may hold names out of files, without what would control a terminal."""
    typer.echo(printable(str(text)), err=err, nl=nl)


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
    names = ("job", "study", "state", "trials", "started", "ended", "out")
    columns = [key for key in names if any(key in row for row in studies)]
    for key in columns:
        table.add_column(key, overflow="fold")
    for row in studies:
        cells = {**row, "trials": "{done} of {total}".format(**row["trials"]) if "trials" in row else ""}
        table.add_row(*(printable(str(cells.get(key) or "")) for key in columns))
    console.print(table, markup=False)


def quieten() -> None:
    """Silence the log messages of libraries, which would break progress bars."""
    import optuna
    import transformers

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if TYPE_CHECKING:
    from search.results.constrained import Answer, ScoredPoint
    from search.results.study_result import StudyResult

MEANINGS = {
    "crossed": "the floor is between the two",
    "peak": "forgetting grows no further before the floor",
    "ceiling": "forgetting is at its noise ceiling",
    "always": "the highest alpha keeps the floor",
    "never": "the lowest alpha does not keep the floor",
    "open": "not settled within its scores",
}


def dial_facts(result: "StudyResult", answer: "Answer") -> dict[str, Any]:
    """Return the answer of a constrained search for JSON; intervals as in `search.results.uncertainty`."""
    names = [objective.name for objective in result.objectives[:2]]
    scored_trials = {int(row["trial"]): row for row in result.trials.to_dict("records")}
    intervals = {int(row["trial"]): row for row in result.certainty.to_dict("records")}

    def point(scored: "ScoredPoint | None") -> dict[str, Any] | None:
        if scored is None:
            return None
        if scored.trial is None:
            return {"trial": None, "alpha": scored.alpha, names[0]: scored.forgetting, names[1]: scored.utility}
        facts: dict[str, Any] = {"trial": scored.trial, "alpha": scored.alpha}
        for name in names:
            facts[name] = float(scored_trials[scored.trial][name])
            sure = intervals.get(scored.trial, {})
            if f"{name}_low" in sure:
                facts[f"{name}_interval"] = [float(sure[f"{name}_{end}"]) for end in ("low", "high")]
        return facts

    lines = [
        {
            "base": line.base,
            "epoch": line.epoch,
            "state": line.standing.state,
            "scores": line.scores,
            "best": point(line.standing.best),
            "last_feasible": point(line.standing.last_feasible),
            "first_infeasible": point(line.standing.first_infeasible),
        }
        for line in answer.lines
    ]
    best = export = None
    if answer.best is not None:
        best = result.rows(result.trials[result.trials["trial"] == answer.best])[0]
        export = f"uipe export {result.out} --trial {answer.best} --to {result.out}/export/dial --as model"
    facts = {"study": result.store.record.name, "definition": result.spec.definition, "objectives": names}
    asked = {"floor": answer.floor, "least_utility": answer.question.floor}
    return {**facts, **asked, "best": best, "lines": lines, "export": export}


def print_dial(answer: dict[str, Any]) -> None:
    """Print the answer of a constrained search."""
    forgetting, utility = answer["objectives"]
    share = f"{answer['floor']:g} of the initial model's ({answer['definition']})"
    echo(f"{utility} of at least {answer['least_utility']:.4f}, {share}")
    for line in answer["lines"]:
        echo(f"\n{line['base']}, epoch {line['epoch']}: {MEANINGS[line['state']]} ({line['scores']} scores)")
        for title in ("best", "last_feasible", "first_infeasible"):
            point = line[title]
            if point is None or (title == "last_feasible" and point == line["best"]):
                continue
            named = "initial model" if point["trial"] is None else f"trial {point['trial']}"
            numbers = "  ".join(
                f"{name} {point[name]:.4f}{_interval(point.get(f'{name}_interval'))}" for name in (forgetting, utility)
            )
            echo(f"  {title.replace('_', ' '):17} alpha {point['alpha']:7.4f}  {numbers}  {named}")
    if answer["best"] is None:
        noise = any(line["state"] == "ceiling" for line in answer["lines"])
        why = ": that one is at the noise ceiling itself" if noise else "; give a lower --floor"
        echo(f"\nno trial that keeps so much utility forgets more than the initial model{why}")
        return
    best = answer["best"]
    where = f"trial {best['trial']} ({best['base']}, epoch {best['epoch']}, alpha {best['alpha']:.4f})"
    echo(f"\nstrongest forgetting: {where}, {forgetting} {best[forgetting]:.4f}, {utility} {best[utility]:.4f}")
    echo(f"export   {answer['export']}")


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"


def print_audits(facts: dict[str, Any]) -> None:
    """Print what audits found: a row per number, a column per model."""
    names = [name for name in facts["models"] if name != "retain" or facts["retain"] is None]
    table, console = new_table(f"Audits of {facts['study']}", width=140)
    for head in ("audit", "number"):
        table.add_column(head, overflow="fold")
    for name in names:
        table.add_column(f"trial\n{name}" if isinstance(name, int) else f"{name}\nmodel", justify="right")
    for audit in facts["audits"]:
        if audit["state"] != "done":
            table.add_row(audit["title"], "not tested", *("" for _ in names))
            continue
        for place, number in enumerate(audit["numbers"]):
            cells = [_audited(number, str(name)) for name in names]
            table.add_row(audit["title"] if place == 0 else "", number["title"], *cells)
    console.print(table, markup=False)
    if facts["retain"] is not None:
        echo("retain model: there is none")
    for audit in facts["audits"]:
        for name, reason in audit["reasons"].items():
            whom = {"all": "", **{known: f" on the {known} model" for known in ("initial", "retain")}}.get(
                name, f" on trial {name}"
            )
            echo(f"{audit['title']}: not tested{whom}: {reason}")
    for row in facts["after_attacks"]:
        echo(
            f"trial {row['trial']}: {row['worst']:.4g} after the worst of {row['attacks']} changes of its weights "
            f"({row['attack'].replace('_', ' ')})"
        )


def _audited(number: dict[str, Any], name: str) -> str:
    value = number["values"][name]
    if value is None:
        # What an attack undid is a share of what a trial forgot; reference models forgot nothing.
        return "-" if number["key"] == "recovered" and not name.isdigit() else "not tested"
    return f"{value:.{number['places']}f}"


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


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


_AMOUNTS = {
    "": "{:,.0f}".format,
    "s": _duration,
    "bytes": _bytes,
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


def new_table(title: str | None = None, width: int = 140) -> tuple[Any, Any]:
    """Return an empty table, and a console that is `width` columns wide where standard output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    return table, Console() if sys.stdout.isatty() else Console(width=width)
