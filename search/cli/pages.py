"""Show a study as pages: `uipe report`, `uipe watch`, `uipe dashboard`, `uipe dossier`."""

from pathlib import Path
from typing import Annotated

import typer

from search.cli.cluster import Server, open_jobs
from search.cli.tables import Floor, Trust, attempt, echo, quieten
from uipe_core.errors import UserError

Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a study, as given to `uipe run`.")]
Host = Annotated[
    str | None, typer.Option(help="Address to listen on; 127.0.0.1 when left out. Any that others reach needs --token.")
]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 8081 when left out, 0 for a free one.")]
Token = Annotated[
    str | None,
    typer.Option(envvar="UIPE_TOKEN", help="What the address must end with, as ?token=TOKEN; 16 characters or more."),
]
PORT = 8081


def report(
    what: Annotated[str, typer.Argument(metavar="OUT|ID", help="Folder or URL of a study, or id of its job on a cluster.")],
    to: Annotated[Path | None, typer.Option(help="Folder for it; OUT/report when left out, of a job ./ID.")] = None,
    live: Annotated[bool, typer.Option("--serve", help="Serve it in place of writing it, as uipe watch does.")] = False,
    host: Host = None,
    port: Port = None,
    token: Token = None,
    address: Server = None,
) -> None:
    """Write the HTML report again, with its pictures for papers; of a study on a cluster fetch the page."""
    from search.report.html import write_report
    from search.results.study_result import StudyResult
    from search.store.mirror import is_url

    if live:
        if to is not None:
            raise UserError("report: give either --to or --serve")
        watch(what, host, port, token)
        return
    if host is not None or port is not None:
        raise UserError("report: --host and --port are for --serve")
    if is_url(what) or Path(what).is_dir():
        echo(write_report(StudyResult.open(what), to))
        return
    page = (to or Path(what)) / "report.html"
    content = open_jobs(address, what).report(what)

    def write() -> None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(content)

    attempt(page, write)
    echo(page)


def watch(out: Out, host: Host = None, port: Port = None, token: Token = None) -> None:
    """Serve the report, live while the study runs; to this machine alone, or with a token to others."""
    from search.dashboard.live_report import HOST, LivePage, PageServer

    quieten()
    with PageServer(LivePage(out), host or HOST, PORT if port is None else port, token) as server:
        echo(f"{server.address}{'?token=TOKEN, with your own' if token else ''} (Ctrl-C ends it)", err=True)
        server.serve_forever()


def dashboard(
    out: Out,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
    writable: Annotated[bool, typer.Option("--writable", help="Let the page change or delete the study, too.")] = False,
) -> None:
    """Browse the study in optuna-dashboard (on this machine only)."""
    from search.dashboard.annotate import annotate
    from search.dashboard.serving import servable_folder, serve
    from search.results.study_result import StudyResult

    with servable_folder(out) as folder:
        result = StudyResult.open(folder)
        annotate(result)
        echo(f"http://127.0.0.1:{port}/ (Ctrl-C ends it)", err=True)
        attempt(f"port {port}", lambda: serve(result, port, writable))


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


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: uipe report runs/quickstart, or uipe report quickstart-1a2b3c4d")(report)
    app.command(epilog="Example: uipe watch runs/quickstart")(watch)
    app.command(epilog="Example: uipe dashboard runs/quickstart --port 8080")(dashboard)
    app.command(epilog="Example: uipe dossier runs/quickstart --rule utility-floor --to dossier.html")(dossier)
