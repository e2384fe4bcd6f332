"""Attack trials, and write the record of one: `uipe audit`, `uipe dossier`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from search.cli.tables import Address, Floor, Json, Trust, echo, print_json, quieten
from search.execution.ray_compat import configure_ray
from search.problem.trial import AUDITS
from search.report.display import new_table
from uipe_core.errors import UserError, printable


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


def dossier(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")],
    to: Annotated[Path, typer.Option(help="Page to write (.html); the same facts go next to it as .json.")],
    trial: Annotated[int | None, typer.Option(help="Number of the trial; or give --rule.")] = None,
    rule: Annotated[str | None, typer.Option(help="The trial that a rule chooses, as in uipe select.")] = None,
    floor: Floor = None,
    texts: Annotated[
        bool, typer.Option("--texts", help="List the items to forget; otherwise counts and hashes alone.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write the record of one model: the request, the procedure, numbers before and after, audits, and what was not tested.

    It certifies nothing. Run uipe audit first, so that it has more to say.
    """
    from search.report.dossier import write_dossier
    from search.results.study_result import StudyResult

    if (trial is None) == (rule is None):
        raise UserError("dossier: give either --trial N or --rule, as in uipe select")
    quieten()
    result = StudyResult.open(out)
    number = int(result.select(str(rule), floor)["trial"]) if trial is None else trial
    for path in write_dossier(result, number, to, texts, trust_remote_code):
        echo(str(path))


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
    app.command(epilog="Example: uipe dossier runs/quickstart --rule utility-floor --to dossier.html")(dossier)
    app.command(epilog="Example: uipe audit runs/quickstart --top 3 --tests quantisation,membership")(audit)
