"""The commands that follow the curves in alpha: record a dense grid of them, dial for the strongest forgetting at a floor."""

from pathlib import Path
from typing import Annotated

import typer

from search.cli.dial_tables import dial_facts, print_dial
from search.cli.tables import Address, Json, print_json, quieten
from search.execution.loopback import meet_ray


def record(
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help="Study file; the quickstart when left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write, .npz; runs/<study name>-table.npz when left out.")] = None,
    alphas: Annotated[int, typer.Option(help="Values of alpha, evenly spaced from the lowest to the highest.")] = 31,
    seed: Annotated[int | None, typer.Option(help="Seed, in place of the file's.")] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Score a dense grid (base run x epoch x alpha) and write the scores of every item into one file, a table.

    Searches can be replayed on a table without any model (benchmarks/samplers.py). The grid is scored as a study in the folder
    of the file's name without its ending; the same command resumes it.
    """
    meet_ray(address)
    from benchmarks.recorded.record import record_table
    from search.spec.study import load_study, quickstart_path

    quieten()
    spec = load_study(study or quickstart_path(), {"seed": seed})
    path = out or Path("runs", f"{spec.name}-table.npz")
    table, notes = record_table(spec, path, alphas, address=address)
    if as_json:
        print_json({"table": str(path), "bytes": path.stat().st_size, "points": len(table), "notes": notes, **table.meta})
        return
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(
        f"{path}: {len(table)} points of {sum(table.epochs.values())} base epochs, {path.stat().st_size / 1e6:.2f} MB; "
        f"metrics: {table.meta['definition']}"
    )


def dial(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")],
    floor: Annotated[float, typer.Option(help="Least share of the initial model's utility.")] = 0.95,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Find the strongest forgetting at a floor of utility, by scoring points for just that.

    The three base epochs of most promise are looked at, with at most six scores each: alpha is closed in on between the last
    point that keeps the floor and the first that does not. The points become trials of the study; the same command resumes.
    """
    meet_ray(address)
    from search.execution.run import dial_study

    quieten()
    result, answer = dial_study(out, floor, address=address)
    told = dial_facts(result, answer)
    if as_json:
        print_json(told)
    else:
        print_dial(told)


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command(epilog="Example: uipe record studies/quickstart.yaml --out quickstart.npz --alphas 31")(record)
    app.command(epilog="Example: uipe dial runs/quickstart --floor 0.95")(dial)
