"""Plan a study, repair its folder, search at a utility floor, attack trials: `uipe plan`, `doctor`, `dial`, `audit`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from search.cli.tables import (
    Address,
    Floor,
    Json,
    Settings,
    Trust,
    dial_facts,
    echo,
    print_audits,
    print_dial,
    print_findings,
    print_json,
    print_plan,
    quieten,
)
from search.execution.ray_compat import configure_ray
from search.problem.trial import AUDITS
from uipe_core.errors import UserError


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
    names = [name.strip() for name in tests.split(",") if name.strip()] if tests else []
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
    for path in write_dossier(result, number, to, texts):
        echo(str(path))


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


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: uipe dial runs/quickstart --floor 0.95")(dial)
    app.command(epilog="Example: uipe dossier runs/quickstart --rule utility-floor --to dossier.html")(dossier)
    app.command(epilog="Example: uipe audit runs/quickstart --top 3 --tests quantisation,membership")(audit)
    app.command(epilog="Example: uipe plan studies/quickstart.yaml")(plan)
    app.command(epilog="Example: uipe doctor runs/quickstart --fix")(doctor)
