"""Define the `uipe` command, its exit codes, and the commands of a study."""

import inspect
import logging
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from search.cli import cluster, goals, init, models, pages, reference, upkeep
from search.cli.streams import RECORDS, end, failure_of_output, open_streams
from search.cli.tables import (
    CHECKED,
    Address,
    Floor,
    Json,
    Settings,
    Trust,
    Verify,
    attempt,
    echo,
    print_claims,
    print_confirmations,
    print_json,
    print_stop,
    quieten,
    say,
)
from search.execution.ray_compat import configure_ray
from search.report.display import print_front
from uipe_core.errors import ExportMismatchError, StudyInterrupted, UserError
from uipe_core.storage.signals import REQUESTS_TO_END

app = typer.Typer(
    name="uipe",
    help="Hyperparameter search for LLM unlearning by parameter extrapolation (UIPE).\n\n"
    "Start with [bold]uipe run[/bold]: it needs nothing and takes a minute or two.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

LogLevel = Literal["debug", "info", "warning", "error"]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        echo(f"uipe {version('uipe-search')}")
        raise typer.Exit()


@app.callback()
def _settings(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", help="Log records of uipe that are printed; info has every traceback.")
    ] = "warning",
) -> None:
    for name in ("search", "uipe_core"):
        logger = logging.getLogger(name)
        logger.setLevel(log_level.upper())
        if RECORDS not in logger.handlers:
            logger.addHandler(RECORDS)


Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")]
Rule = Annotated[str | None, typer.Option(help="utility-floor, knee, chance or robust (after an audit).")]
AllowCollapsed = Annotated[bool, typer.Option("--allow-collapsed", help="Let the rule choose a collapsed model too.")]


@app.command(epilog="Example: uipe run studies/quickstart.yaml --out runs/first --trials 30")
def run(
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help="Study file; the quickstart when left out.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Output folder, or its URL (s3://bucket/runs/first); runs/<study name> when left out.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Search trials in all, in place of search.trials.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, in place of the file's.")] = None,
    settings: Settings = None,
    address: Address = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Run a study; the same command resumes an interrupted one and extends a finished one."""
    configure_ray(address)
    from search.execution.run import run_study
    from search.report.conclusions import choice, conclude, next_step
    from search.report.data import report_data
    from search.spec.study import load_study
    from search.spec.study_file import quickstart_path, read_settings

    quieten()
    overrides = {**read_settings(settings or ()), "seed": seed, "trials": trials}
    spec = load_study(study or quickstart_path(), overrides)
    result = run_study(spec, out, address=address, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(result.summary())
        return
    print_front(result)
    view = report_data(result)
    for sentence in conclude(view):
        say(f"- {sentence}", hang="  ")
    print_stop(result)
    echo(f"\nreport   {result.report_path}")
    echo(f"browse   uipe dashboard {shlex.quote(str(result.out))}")
    if (chosen := choice(view)) is not None:
        echo(f"ship     {chosen}: the report says what speaks against it")
    echo(f"export   {next_step(result)}")


@app.command(epilog="Example: uipe validate studies/quickstart.yaml")
def validate(study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file.")], settings: Settings = None) -> None:
    """Check a study file and its local inputs; every error at once, nothing is spent, and no code of a model runs."""
    from search.evaluation.inputs import check_inputs
    from search.spec.study import load_study
    from search.spec.study_file import read_settings

    spec = load_study(study, read_settings(settings or ()))
    for note in check_inputs(spec):
        say(f"note: {note}")
    epochs = spec.base_epochs()
    longest, points = max(epochs.values()), sum(epochs.values())
    lengths = f"{longest}" if min(epochs.values()) == longest else f"{min(epochs.values())} to {longest}"
    given = f" ({len(spec.checkpoints)} given as checkpoints)" if spec.checkpoints else ""
    echo(
        f"{study}: valid; {len(epochs)} base runs{given} of {lengths} epochs, {points} base points, {spec.search.trials} trials"
    )


@app.command(epilog="Example: uipe pareto runs/quickstart --csv front.csv")
def pareto(
    out: Out,
    as_json: Json = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the front as a CSV file.")] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX table (booktabs) in place of all else.")] = False,
) -> None:
    """Show the Pareto front of a study."""
    from search.results.study_result import StudyResult

    result = StudyResult.open(out)
    if csv is not None:
        import pandas as pd

        attempt(csv, lambda: pd.DataFrame(result.rows(result.front)).to_csv(csv, index=False))
    if latex:
        from search.report.html import front_latex

        if as_json:
            raise UserError("pareto: give either --json or --latex")
        echo(front_latex(result))
    elif as_json:
        keys = ("study", "definition", "front", "hypervolume", "gain", "reference_point", "forget_quality_cap")
        summary = result.summary()
        seeds = result.over_seeds
        several = {} if seeds.empty else {"over_seeds": result.rows_of(seeds), "attainment": result.attainment}
        print_json({**{key: summary[key] for key in keys}, **several})
    else:
        print_front(result)


@app.command(epilog="Example: uipe select runs/quickstart --rule utility-floor --floor 0.95")
def select(
    out: Out,
    rule: Rule = "utility-floor",
    floor: Floor = None,
    allow_collapsed: AllowCollapsed = False,
    as_json: Json = False,
) -> None:
    """Choose one point of the front by a rule."""
    from search.results.study_result import StudyResult

    result = StudyResult.open(out)
    picked, note = result.choose(rule or "utility-floor", floor, allow_collapsed=allow_collapsed)
    chosen = result.rows(picked.to_frame().T)[0]
    # What chose in place of a knee that is not there stands in the note.
    reason = result.reason(picked, rule or "utility-floor", floor) if note is None or rule == "robust" else note
    if rule == "robust" and note is not None:
        reason += f" ({note})"
    if as_json:
        said = (
            {"floor": result.floor if floor is None else floor}
            if rule == "utility-floor"
            else {}
            if note is None
            else {"note": note}
        )
        print_json({"rule": rule, **said, "reason": reason, **chosen})
        return
    say(f"trial {chosen['trial']}: {reason}")
    for key, value in chosen.items():
        echo(f"{key:32} {value:.6g}" if isinstance(value, float) else f"{key:32} {value}")


@app.command(epilog="Example: uipe export runs/quickstart --rule knee --to exported --as model")
def export(
    out: Out,
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    form: Annotated[str, typer.Option("--as", help="recipe, adapter, model, or a form that an extension adds.")],
    trial: Annotated[int | None, typer.Option(help="Number of the trial; or give --rule.")] = None,
    rule: Rule = None,
    floor: Floor = None,
    allow_collapsed: AllowCollapsed = False,
    verify: Verify = "loss",
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Push it to this repository of the Hugging Face hub, made private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what --push would send, and send nothing.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a trial as a recipe, an adapter or a full model; load it again and check its numbers."""
    from search.publishing.hub import Destination
    from search.report.progress import Bars
    from search.results.study_result import StudyResult

    if (trial is None) == (rule is None):
        raise UserError("export: give either --trial N or --rule utility-floor|knee|chance|robust")
    destination = Destination.of(push, public=public, dry_run=dry_run)
    quieten()
    result = StudyResult.open(out)
    if trial is not None:
        row = result.trial(trial)
    else:
        row, note = result.choose(str(rule), floor, allow_collapsed=allow_collapsed)
        if note is not None:
            echo(note, err=True)
    with Bars() as bars:
        path = result.export(row, to, form, trust_remote_code, verify, bars, repository=push)
    checked = "" if form == "recipe" else f"; {CHECKED[verify]}"
    echo(f"trial {row['trial']} ({row['base']}, epoch {row['epoch']}, alpha {row['alpha']:.4f}) as {form}: {path}{checked}")
    for line in () if destination is None else destination.send(path):
        echo(line)


@app.command(epilog="Example: uipe rebuild exported/recipe.yaml --to rebuilt --as model")
def rebuild(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml of an export.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    form: Annotated[str, typer.Option("--as", help="adapter or model.")] = "model",
    verify: Verify = "loss",
    trust_remote_code: Trust = False,
) -> None:
    """Rebuild an exported model from its recipe, training what the caches lack, and check its numbers."""
    from search.report.progress import Bars
    from search.results.export import export as export_recipe
    from search.results.recipe import read_recipe

    quieten()
    with Bars() as bars:
        path = export_recipe(read_recipe(recipe), to, form, trust_remote_code=trust_remote_code, verify=verify, watch=bars)
    echo(f"rebuilt {'and checked' if verify != 'none' else 'without a check'}: {path}")


@app.command(epilog="Example: uipe confirm runs/quickstart --top 3 --seeds 2")
def confirm(
    out: Out,
    top: Annotated[
        int, typer.Option(help="How many finalists, 1 to 1000: what the rules select, then by the hypervolume only they add.")
    ] = 3,
    seeds: Annotated[int, typer.Option(help="How many further seeds their base runs are trained with, 1 to 1000.")] = 2,
    address: Address = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train the finalists' base runs from other seeds and score the finalists again, on the items kept for reporting."""
    configure_ray(address)
    from search.execution.run import confirm_study

    quieten()
    result = confirm_study(out, top, seeds, address=address, trust_remote_code=trust_remote_code)
    rows = result.rows_of(result.confirmations)
    if as_json:
        print_json({"study": result.store.record.name, "definition": result.spec.definition, "confirmed": rows})
        return
    print_confirmations(result, rows)
    echo(f"metrics: {result.spec.definition}; report: {result.report_path}")


@app.command(epilog="Example: uipe paper --seeds 3 --out runs/paper")
def paper(
    seeds: Annotated[
        int, typer.Option(help="Worlds to run, 1 to 1000; more narrow the intervals, and those run before are kept.")
    ] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the page, its pictures and the finished parts.")] = Path("runs/paper"),
    study: Annotated[
        Path | None, typer.Option(help="Attack what this study's methods forget, on its models, in place of all experiments.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Repeat UIPE's experiments on small models, attack what was forgotten, and judge the claims.

    The same command resumes an interrupted run. Three seeds take about a quarter of an hour on two idle cores.
    """
    from search.paper.runner import run_paper, run_study_attacks

    quieten()
    result = run_paper(seeds, out) if study is None else run_study_attacks(study, seeds, out)
    if as_json:
        print_json(result)
        return
    print_claims(result)
    echo(f"page     {result['page']}")


def _as_paragraphs(text: str) -> str:
    """Join the lines of each paragraph of a docstring, whose breaks a help page would keep."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text))


for commands in (init, reference, models, cluster, goals, pages, upkeep):
    commands.register(app)
for command in (*app.registered_commands, *cluster.cluster.registered_commands):
    command.help = _as_paragraphs(command.callback.__doc__ or "")


AGAIN_SECONDS = 3.0
"""A second request to end that comes so soon changes nothing: the first is at work."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 bad input, 130 interrupted and resumable, 1 anything else."""
    heard: list[float] = []

    def interrupt(number: int, _: Any) -> None:
        now = time.monotonic()
        if not heard or now - heard[-1] > AGAIN_SECONDS:
            heard.append(now)
            raise KeyboardInterrupt

    for number in REQUESTS_TO_END:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell sets it for what runs in its background, or nohup
            signal.signal(number, interrupt)
    open_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # now, and not when the interpreter ends
        _ignore_requests()  # whose end, too, takes a moment: the default would report a finished command as killed
    except SystemExit:
        _ignore_requests()
        raise
    except (Exception, KeyboardInterrupt) as error:
        _ignore_requests()  # what is left is a sentence
        if isinstance(error, StudyInterrupted):
            end(130, f"interrupted: {error}")
        if heard:  # compiled code that is hit by an interrupt may raise an error of its own for it
            end(130, "interrupted")
        if isinstance(error, UserError):
            end(2, f"error: {error}")
        if isinstance(error, ExportMismatchError):
            end(1, f"error: {error}")
        if (said := failure_of_output(error)) is not None:
            end(1, said)
        raise


def _ignore_requests() -> None:
    for number in REQUESTS_TO_END:
        signal.signal(number, signal.SIG_IGN)
