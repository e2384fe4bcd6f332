"""Hold a study against a goal: a floor of utility (`uipe dial`), other studies (`uipe compare`), published numbers, attacks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.cli.tables import Address, Floor, Json, Trust, attempt, echo, print_json, quieten, say
from search.execution.ray_compat import configure_ray
from search.problem.trial import AUDITS
from search.report.display import new_table
from uipe_core.errors import UserError, printable

if TYPE_CHECKING:
    from search.results.constrained import Answer, ScoredPoint
    from search.results.study_result import StudyResult

PICTURES = (".png", ".svg", ".pdf")

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

    from search.report.conclusions import export_command

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
        best["beats_initial"] = intervals.get(answer.best, {}).get("beats_initial")
        export = export_command(result.out, f"--trial {answer.best}", "dial")
    facts = {"study": result.store.record.name, "definition": result.spec.definition, "objectives": names}
    asked = {"floor": answer.floor, "least_utility": answer.question.floor}
    return {**facts, **asked, "best": best, "lines": lines, "export": export}


def print_dial(answer: dict[str, Any]) -> None:
    """Print the answer of a constrained search."""
    from search.results.selection import sureness

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
    numbers = f"{forgetting} {best[forgetting]:.4f}, {utility} {best[utility]:.4f}"
    echo(f"\nstrongest forgetting: {where}, {numbers}{sureness(best['beats_initial'])}")
    echo(f"export   {answer['export']}")


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"


def dial(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")],
    floor: Floor = None,
    address: Address = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Search for the strongest forgetting at a floor of utility.

    The three most promising base epochs get at most six scores each: alpha is bracketed between the last point that keeps
    the floor and the first that does not. The points become trials of the study; the same command resumes.
    """
    configure_ray(address)
    from search.execution.run import dial_study

    quieten()
    result, answer = dial_study(out, floor, address=address, trust_remote_code=trust_remote_code)
    facts = dial_facts(result, answer)
    print_json(facts) if as_json else print_dial(facts)


def print_comparison(found: dict[str, Any]) -> None:
    """Print published models, each with the study's own next to it."""
    objectives = found["objectives"]
    table, console = new_table(f"Published numbers and {found['study']} (metrics: {found['definition']})")
    table.add_column("model", overflow="fold")
    for name in objectives:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("matched")
    for row in found["models"]:
        matched = {True: "yes", False: "no", None: ""}[row["matched"]]
        cells = [_number(row["numbers"].get(name)) for name in objectives]
        table.add_row(printable(f"{row['name']} ({row['source']})"), *cells, matched)
        ours = row["ours"]
        if row["model"] != "unlearned" or ours is not None:
            cells = ["not scored"] * len(objectives) if ours is None else [_number(ours["numbers"].get(n)) for n in objectives]
            table.add_row(printable(f"  ours: {_named(row['model'], ours)}"), *cells, "", end_section=True)
    console.print(table)
    say(
        f"{found['matched']} of {found['published']} published models are matched in {' and '.join(objectives)}, by "
        f"{found['trainings']} trainings and {found['scorings']} scorings"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _named(model: str, ours: dict[str, Any] | None) -> str:
    if ours is None or ours["trial"] is None:
        return f"{model} model"
    return f"trial {ours['trial']}, {ours['base']}, epoch {ours['epoch']}, alpha {ours['alpha']:.3f}"


def compare_published(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")],
    table: Annotated[Path, typer.Argument(metavar="FILE", help="CSV file: name,model,source and numbers (docs/reproduce.md).")],
    as_json: Json = False,
) -> None:
    """Set published numbers next to those of a study.

    A published model is matched by a trial that is at least as good in both objectives; above the noise ceiling of forget
    quality more counts for nothing.
    """
    from search.results.comparison import compare_published
    from search.results.study_result import StudyResult

    found = compare_published(StudyResult.open(out), table)
    print_json(found) if as_json else print_comparison(found)


def print_fronts(found: dict[str, Any]) -> None:
    """Print what studies reached, a row each."""
    objectives = found["objectives"]
    table, console = new_table(f"{' and '.join(objectives)} (metrics: {found['definition']})", width=120)
    table.add_column("study", overflow="fold")
    for head in ("hypervolume", "gain", "front", "of all", "trainings", "scorings", "hours"):
        table.add_column(head, justify="right")
    for row in found["studies"]:
        gain = row["hypervolume"] - row["given"]
        hours = "" if row["hours"] is None else f"{row['hours']:.2f}"
        cells = (
            f"{row['hypervolume']:.4g}",
            f"{gain:.4g}",
            len(row["points"]),
            row["joint"],
            row["trainings"],
            row["scorings"],
        )
        table.add_row(printable(f"{row['study']} ({row['out']})"), *map(str, cells), hours)
    console.print(table)
    corner = ", ".join(f"{name} {value:.4g}" for name, value in found["reference_point"].items())
    say(f"hypervolume: from {corner}; gain: over the initial model and the trained epochs")
    say("front: points of a study's front; of all: those that no point of another study beats")
    for note in found["notes"]:
        say(f"note: {note}")


def compare(
    outs: Annotated[list[str], typer.Argument(metavar="OUT OUT ...", help="Folders or URLs of two studies or more.")],
    picture: Annotated[Path | None, typer.Option(help="Also draw the fronts: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the fronts of studies, on a common reference point and noise ceiling."""
    from search.results.comparison import compare_studies
    from search.results.study_result import StudyResult

    if len(outs) < 2:
        raise UserError(f"OUT: {outs[0]} alone cannot be compared; give two studies or more")
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(f"--picture: {picture} has no ending that can be drawn; give {', '.join(PICTURES)}")
    found = compare_studies([StudyResult.open(out) for out in outs])
    if picture is not None:
        from search.report.display import draw_fronts

        attempt(picture, lambda: draw_fronts(found, picture))
    print_json(found) if as_json else print_fronts(found)
    if picture is not None and not as_json:
        echo(f"picture  {picture}")


def audit(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")],
    trial: Annotated[list[int] | None, typer.Option(help="Number of a trial; may be given several times.")] = None,
    rule: Annotated[str | None, typer.Option(help="Audit the trial that a rule chooses, as in uipe select.")] = None,
    floor: Floor = None,
    top: Annotated[int | None, typer.Option(help="Audit so many finalists; audit.top of the study, or 3.")] = None,
    tests: Annotated[
        str | None,
        typer.Option(help=f"Which, separated by commas: {', '.join(AUDITS)}; audit.tests of the study, or all."),
    ] = None,
    address: Address = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Attack trials: does what was forgotten come back, and is it seen that it was there?

    Weights are rounded to 8 and 4 bits, the facts are trained back, the questions are asked otherwise and many times, and
    membership is guessed. Each number stands next to that of the initial and of the retain model. Audits are controls of the
    study: what is known is not done again, and the same command resumes. What was not done is called not tested.
    """
    from search.results.study_result import StudyResult

    if sum(given is not None for given in (trial or None, rule, top)) > 1:
        raise UserError("audit: give --trial, --rule or --top, one of them")
    configure_ray(address)
    from search.execution.run import audit_study

    quieten()
    trials = list(trial or ())
    if rule is not None:
        trials = [int(StudyResult.open(out).select(rule, floor)["trial"])]
    names = [name.strip() for name in (tests or "").split(",") if name.strip()]
    if tests is not None and not names:
        raise UserError(f"--tests: {tests!r} names none; give some of {', '.join(AUDITS)}, or leave it out")
    result = audit_study(out, trials, top, names, address=address, trust_remote_code=trust_remote_code)
    facts = result.audits or {}
    print_json(facts) if as_json else print_audits(facts)


def print_audits(facts: dict[str, Any]) -> None:
    """Print what audits found: a row per number, a column per model."""
    table, console = new_table(f"Audits of {facts['study']}", width=140)
    for head in ("audit", "number"):
        table.add_column(head, overflow="fold")
    for column in facts["columns"]:
        table.add_column(column["title"].replace(" ", "\n"), justify="right")
    for audit in facts["audits"]:
        for place, row in enumerate(audit["rows"]):
            cells = [row["texts"][column["name"]] for column in facts["columns"]]
            table.add_row(audit["title"] if place == 0 else "", printable(row["title"]), *cells)
    console.print(table, markup=False)
    if facts["retain"] is not None:
        echo("retain model: there is none")
    names = {"all": "", **{column["name"]: f" on {_article(column['title'])}" for column in facts["columns"]}}
    for audit in facts["audits"]:
        for name, reason in audit["reasons"].items():
            echo(f"{audit['title']}: not tested{names.get(name, '')}: {reason}")
    titles = {audit["kind"]: audit["title"] for audit in facts["audits"]}
    forgetting = facts["forgetting"]["title"]
    places = facts["forgetting"]["places"]
    for row in facts["after_attacks"]:
        echo(
            f"trial {row['trial']}: {forgetting} {row['before']:z.{places}f}, {row['worst']:z.{places}f} after "
            f"the worst of {row['attacks']} attacks on its weights ({titles[row['attack']]})"
        )


def _article(title: str) -> str:
    return title if title.startswith("trial ") else f"the {title}"


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: uipe dial runs/quickstart --floor 0.95")(dial)
    app.command(epilog="Example: uipe compare runs/npo runs/grad_diff --picture fronts.png")(compare)
    example = "studies/reproduce/tofu_forget10_llama32_1b.csv"
    app.command("compare-published", epilog=f"Example: uipe compare-published runs/tofu {example}")(compare_published)
    app.command(epilog="Example: uipe audit runs/quickstart --top 3 --tests quantisation,membership")(audit)
