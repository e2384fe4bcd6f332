"""Submit a study to a cluster, follow and stop it; check a cluster file; show the status and errors of a study."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from search.cli.tables import (
    Json,
    Trust,
    echo,
    print_json,
    print_status,
    print_studies,
)
from search.execution.ray_compat import ADDRESS, require_token
from uipe_core.errors import StudyInterrupted, UserError

Server = Annotated[
    str | None,
    typer.Option("--address", help="URL of the cluster's job server; RAY_API_SERVER_ADDRESS when left out."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of a study's job, as `uipe submit` and `uipe studies` print it.")]
Follow = Annotated[bool, typer.Option("--follow", help="Print the driver's log until the study ends.")]

cluster = typer.Typer(name="cluster", help="Files that describe clusters.", no_args_is_help=True)


def submit(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file.")],
    address: Server = None,
    out: Annotated[
        str | None,
        typer.Option(help="Output folder on the cluster, absolute or ~/...; ~/runs/<study name> of the head when left out."),
    ] = None,
    trust_remote_code: Trust = False,
    pass_env: Annotated[
        list[str] | None,
        typer.Option(
            "--pass-env",
            metavar="NAME",
            help="Give driver and workers this variable of yours (HF_TOKEN, UIPE_STORAGE); encrypted by the cluster's token.",
        ),
    ] = None,
    follow: Follow = False,
) -> None:
    """Submit a study to a Ray cluster. A study that runs there is not started twice; one that has ended is resumed."""
    jobs = open_jobs(address)
    submission = jobs.submit(study, out, trust_remote_code, pass_env or ())
    for note in submission.notes:
        echo(f"note: {note}", err=True)
    name = submission.job
    if submission.attached:
        echo(f"under way  {name} (nothing was sent; to change it, stop it and submit again)")
    else:
        echo(f"submitted  {name}")
    echo(f"output     {submission.out} on the head node")
    if follow:
        _follow(jobs, name)
        return
    echo(f"follow     uipe logs {name} --follow")
    echo(f"status     uipe status {name}")
    echo(f"report     uipe report {name}")
    echo(f"stop       uipe stop {name}")
    echo(f"browse     {jobs.address.rstrip('/')}/#/jobs/{name} (Ray's dashboard)")


def status(
    what: Annotated[
        str | None, typer.Argument(metavar="[OUT|ID]", help="Folder of a study, or id of its job; all of runs/ when left out.")
    ] = None,
    address: Server = None,
    as_json: Json = False,
) -> None:
    """Show the progress of a study: trials, hypervolume, GPU-hours, expected end; from its folder or from its cluster."""
    from search.results.status import read_status
    from search.store.mirror import is_url

    if what is None:
        ls(as_json=as_json)
        return
    known = read_status(what) if is_url(what) or Path(what).is_dir() else open_jobs(address, what).status(what)
    print_json(known) if as_json else print_status(known)


def ls(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder whose subfolders are studies.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the studies of a folder, latest first: state, trials, front, hypervolume over what is given without a search."""
    from search.results.status import read_status

    records = sorted(folder.glob("*/study.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not records:
        raise UserError(f"{folder}: there is no study in this folder; name the folder whose subfolders are studies")
    found: list[dict[str, Any]] = [read_status(path.parent) for path in records]
    print_json({"studies": found}) if as_json else print_studies(found)


def logs(
    what: Annotated[
        str, typer.Argument(metavar="OUT|ID", help="Folder or URL of a study, for its errors; or id of its job, for its log.")
    ],
    address: Server = None,
    follow: Follow = False,
    trial: Annotated[int | None, typer.Option(help="Of a folder: only the error of the trial with this number.")] = None,
) -> None:
    """Print the tracebacks of a study's failed trials and base runs, or the log of its driver on a cluster."""
    from search.store.mirror import is_url

    if is_url(what) or Path(what).is_dir():
        _print_tracebacks(what, trial)
        return
    from search.results.status import without_status

    jobs = open_jobs(address, what)
    if follow:
        _follow(jobs, what)
    else:
        echo(without_status(jobs.log(what)), nl=False)


def _print_tracebacks(out: str, trial: int | None) -> None:
    from search.store.folder import read_tracebacks
    from search.store.mirror import readable_folder
    from search.store.record import read_record

    folder = readable_folder(out)
    read_record(folder)
    found = read_tracebacks(folder, trial)
    if not found:
        echo(f"{out}: no traceback is kept: nothing raised in a trial or base run", err=True)
    for name, text in found.items():
        echo(f"{name}\n{text}")


def stop(job: JobId, address: Server = None) -> None:
    """Stop a study on a cluster; the same submit resumes it."""
    from search.cluster.jobs import summary_of

    jobs = open_jobs(address)
    ended = summary_of(jobs.stop(job, lambda text: echo(text, err=True)))
    more = "" if ended["state"] == "succeeded" else "; the same `uipe submit` resumes it"
    echo(f"{ended['job']}: {ended['state']}; what was done is in {ended['out']}{more}")


def studies(address: Server = None, as_json: Json = False) -> None:
    """List the studies of a cluster, latest first."""
    from search.cluster.jobs import summary_of

    found = [summary_of(job) for job in open_jobs(address).all()]
    print_json({"studies": found}) if as_json else print_studies(found)


@cluster.command("validate", epilog="Example: uipe cluster validate deploy/kuberay.yaml")
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Cluster file of `ray up`, or manifest of a KubeRay RayJob.")],
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|kubectl",
            help="Check every field of a RayJob by KubeRay's CRD (or its openAPIV3Schema): a file, or read by kubectl.",
        ),
    ] = None,
) -> None:
    """Check a file that describes a cluster: by Ray's own schema and checks, and for what studies need beyond them."""
    from search.cluster.config_checks import check_cluster_file

    _quiet_ray()
    described, notes = check_cluster_file(file, schema)
    echo(f"{file}: valid; {described}")
    for note in notes:
        echo(f"note: {note}")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    example = "http://127.0.0.1:8265"
    app.command(epilog=f"Example: uipe submit studies/quickstart.yaml --address {example} --follow")(submit)
    app.command(epilog="Example: uipe status runs/quickstart")(status)
    app.command(epilog="Example: uipe ls runs")(ls)
    app.command(epilog="Example: uipe logs runs/quickstart --trial 7, or uipe logs quickstart-1a2b3c4d --follow")(logs)
    app.command(epilog="Example: uipe stop quickstart-1a2b3c4d")(stop)
    app.command(epilog=f"Example: uipe studies --address {example}")(studies)
    app.add_typer(cluster)


def open_jobs(address: str | None, what: str | None = None) -> Any:
    """Return the jobs of a cluster; `what` is an id that may have been meant as a folder."""
    if what is not None and ("/" in what or what.startswith((".", "~")) or not (address or os.environ.get(ADDRESS))):
        raise UserError(
            f"{what}: there is no such folder; correct the path, or name the cluster of a job by --address or {ADDRESS}"
        )
    require_token()
    from search.cluster.jobs import Jobs

    _quiet_ray()
    return Jobs(address)


def _quiet_ray() -> None:
    # It logs every package it sends, and every default.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _follow(jobs: Any, name: str) -> None:
    """Print a driver's log until it ends, and exit as the study did."""
    for line in jobs.follow(name):
        echo(line, nl=False)
    job = jobs.ended(name, seconds=30)
    state = job.status.value.lower()
    if state == "stopped":
        raise StudyInterrupted(f"{name} was stopped; `uipe submit` resumes it")
    if state == "failed":
        code = "was killed" if job.driver_exit_code is None else f"ended with code {job.driver_exit_code}"
        echo(f"error: {name}: its driver {code}; the same `uipe submit` resumes it", err=True)
        raise typer.Exit(1)
