"""optuna-dashboard on a study: on loopback only, because it has no authentication, and without its writing requests."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage

from search.dashboard.artifacts import FOLDER
from search.dashboard.view import StudyView
from search.results.study_result import StudyResult
from search.store.mirror import readable_folder
from search.store.record import RECORD
from search.store.sqlite_reading import copy_database
from uipe_core.storage.scratch import scratch_folder


@contextmanager
def servable_folder(out: Path | str) -> Iterator[Path]:
    """Yield the folder of a study, or where it may only be read a temporary one with a copy of its database.

    Optuna writes into each database it opens, and the dashboard shows notes that are written for it.
    """
    folder = readable_folder(out)
    if (os.access(folder / "study.db", os.W_OK) and os.access(folder, os.W_OK)) or not (folder / "study.db").is_file():
        yield folder
        return
    with scratch_folder() as copy:
        for path in folder.iterdir():
            if path.name == RECORD:
                shutil.copyfile(path, copy / path.name)
            elif path.name in ("items", "logs"):
                (copy / path.name).symlink_to(path.resolve(), target_is_directory=True)
        if (folder / FOLDER).is_dir():
            shutil.copytree(folder / FOLDER, copy / FOLDER)
        copy_database(folder / "study.db", copy)
        yield copy


HOST = "127.0.0.1"

READING = ("GET", "HEAD", "OPTIONS")

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def guarded(application: Application, port: int, writable: bool) -> Application:
    """Refuse what the user's own browser did not ask of this address, and what writes unless that was asked for.

    A page on the web can point a name of its own at 127.0.0.1 (DNS rebinding), or send requests there across sites. The first
    shows in the header Host, the second in Origin.

    Args:
        application: The WSGI application.
        port: Where it is served.
        writable: Whether requests may change the study.
    """
    hosts = {f"{name}:{port}" for name in (HOST, "localhost")} | ({HOST, "localhost"} if port == 80 else set())

    def answer(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        host, origin = environment.get("HTTP_HOST", ""), environment.get("HTTP_ORIGIN")
        writes = environment["REQUEST_METHOD"] not in READING
        refusal = ""
        if host.lower() not in hosts:
            refusal = f"this dashboard is at http://{HOST}:{port}/ only; open that address"
        elif writes and not writable:
            refusal = "this dashboard only shows the study; start it with `uipe dashboard OUT --writable` to change it"
        elif writes and environment["PATH_INFO"].rstrip("/").endswith("/rename"):
            refusal = "a study's folder finds its trials by the study's name, so it cannot be renamed"
        elif writes and origin is not None and origin.lower().removeprefix("http://") not in hosts:
            refusal = "this request comes from another site; open the dashboard itself"
        if not refusal:
            return application(environment, lambda status, headers, *more: start(status, [*_own(headers), NO_FRAME], *more))
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8"), NO_FRAME])
        return [refusal.encode() + b"\n"]

    return answer


def _own(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out the leave that the dashboard gives every site to read artifacts."""
    return [(name, value) for name, value in headers if name.lower() != "access-control-allow-origin"]


NO_FRAME = ("X-Frame-Options", "DENY")
"""Keeps other pages from showing the dashboard inside themselves and have its buttons clicked."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Handler without a log: a terminal would print what a request was made of."""

    def log_message(self, format: str, *given: Any) -> None:
        """Print nothing."""


def serve(result: StudyResult, port: int, writable: bool = False) -> None:
    """Serve the dashboard on 127.0.0.1 until interrupted.

    Args:
        result: The study.
        port: Port to listen on.
        writable: Whether its users may change or delete the study.

    Raises:
        OSError: If the port cannot be had.
    """
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    shown = wsgi(cast(BaseStorage, StudyView(result.store.storage)), FileSystemArtifactStore(result.out / FOLDER))
    with make_server(HOST, port, guarded(shown, port, writable), _Server, _Quiet) as server:
        server.serve_forever()
