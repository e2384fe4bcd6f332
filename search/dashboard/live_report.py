"""Serve the report of a study over HTTP, live while the study runs: one page, on loopback or behind a token."""

import contextlib
import hashlib
import hmac
import ipaddress
import logging
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from search.report.data import report_data
from search.report.html import checked, filled, render_page
from search.results.status import read_status
from search.results.study_result import StudyResult
from search.store.folder import is_running
from search.store.mirror import is_url
from search.store.record import RECORD, read_record
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"

POLL_SECONDS = 5
"""How often an open page asks whether there is something new."""

SHARE = 0.1
"""Share of the time that building pages may take, so that a large study is not slowed by those who watch it."""

SHORTEST_TOKEN = 16
"""Characters of a token; a shorter one can be guessed."""

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""A page holds answers, perhaps private ones: no cache keeps it, no other site shows it, no link tells the token."""


class LivePage:
    """The page of a study, built again when the study has changed.

    Args:
        out: Folder or URL of the study.

    Raises:
        UserError: There is no study.
    """

    def __init__(self, out: Path | str) -> None:
        self.out = out
        self._lock = threading.Lock()
        self._page, self._stamp = b"", object()
        self._next = 0.0
        if not is_url(out):
            read_record(Path(out))

    def current(self) -> bytes:
        """Return the page as the study is now, or was a moment ago."""
        with self._lock:
            began = time.monotonic()
            if began >= self._next and (stamp := self._changed()) != self._stamp:
                self._page, self._stamp = self._built(), stamp
                self._next = time.monotonic() + (time.monotonic() - began) / SHARE
            return self._page

    def _changed(self) -> object:
        """Return what differs after every change of a study in a folder; of one elsewhere, something new each time."""
        if is_url(self.out) or not (Path(self.out) / "study.db").is_file():
            return object()
        stamp: list[object] = [is_running(Path(self.out))]
        for name in ("study.db", "study.db-wal", RECORD):
            with contextlib.suppress(OSError):
                known = (Path(self.out) / name).stat()
                stamp += [name, known.st_mtime_ns, known.st_size]
        return tuple(stamp)

    def _built(self) -> bytes:
        try:
            status = read_status(self.out)
            if not any(status["trials"][key] for key in ("done", "failed")):
                return self._waiting(status)
            result = StudyResult.open(self.out)
            try:
                return render_page(checked(report_data(result)), POLL_SECONDS, status).encode()
            finally:
                result.store.close()
        except UserError as error:
            return self._explained(str(error))
        except Exception:  # as of a database that is being written; the next request finds it written
            logger.exception("the page of %s could not be built", self.out)
            return self._page or self._explained("The study cannot be read at the moment.")

    def _waiting(self, status: dict[str, Any]) -> bytes:
        running = status["trials"]["running"]
        begun = f"{running} of {status['trials']['total']} are being scored" if running else "models and base runs come first"
        sentence = f"The study is {status['state']}: {begun}."
        heading = "No trial is complete yet"
        return filled(
            "waiting.html.j2",
            title=f"{status['study']}: waiting",
            live=POLL_SECONDS,
            name=status["study"],
            heading=heading,
            sentence=sentence,
            failures=[],
        ).encode()

    def _explained(self, reason: str) -> bytes:
        name, failures = Path(str(self.out)).name, []
        with contextlib.suppress(UserError, OSError):
            store = StudyStore.open(Path(self.out))
            name = store.record.name
            failures = [f"Trial {each['trial']} failed: {each['reason']}" for each in store.failures()[:5]]
            store.close()
        values = {"name": name, "heading": "There is no report yet", "sentence": reason, "failures": failures}
        return filled("waiting.html.j2", title=f"{name}: no report", live=POLL_SECONDS, **values).encode()


class _Handler(BaseHTTPRequestHandler):
    """Answer GET and HEAD of the page, and nothing else."""

    timeout = 30
    server: "PageServer"

    def do_GET(self) -> None:
        """Answer a request for the page."""
        status, content, kind, more = self._answer()
        self.send_response(status)
        for name, value in {**HEADERS, **more, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(content)

    do_HEAD = do_GET

    def _answer(self) -> tuple[HTTPStatus, bytes, str, dict[str, str]]:
        plain = "text/plain; charset=utf-8"
        try:
            asked = urlsplit(self.path)
            given = parse_qs(asked.query, keep_blank_values=True, max_num_fields=8).get("token", [])
        except ValueError:
            return HTTPStatus.BAD_REQUEST, b"this address cannot be read\n", plain, {}
        if (refusal := self.server.refusal(self.headers.get("Host", ""), given)) is not None:
            return HTTPStatus.FORBIDDEN, f"{refusal}\n".encode(), plain, {}
        if asked.path != "/" or asked.netloc or asked.scheme:
            return HTTPStatus.NOT_FOUND, b"only the report is here, at /\n", plain, {}
        page = self.server.page.current()
        tag = f'"{hashlib.sha256(page).hexdigest()[:32]}"'
        same = self.headers.get("If-None-Match") == tag
        status = HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK
        return status, b"" if same else page, "text/html; charset=utf-8", {"ETag": tag}

    def version_string(self) -> str:
        """Return the name of the server, without versions."""
        return "uipe"

    def log_message(self, format: str, *given: Any) -> None:
        """Print nothing: requests hold the token, and what else a stranger wrote into them."""


class PageServer(ThreadingHTTPServer):
    """Serve one page.

    Args:
        page: The page.
        host: Address to listen on.
        port: Port; 0 for a free one.
        token: What requests must carry as ``?token=``; None for none, on loopback only.

    Raises:
        UserError: A public address without a token, a token that is too short, or an address that cannot be had.
    """

    daemon_threads = True

    def __init__(self, page: LivePage, host: str = HOST, port: int = 0, token: str | None = None) -> None:
        if token is None and not is_loopback(host):
            raise UserError(
                f"--host {host}: others can reach this address; give --token, of {SHORTEST_TOKEN} characters or more "
                "(python -c 'import secrets; print(secrets.token_urlsafe())' makes one)"
            )
        if token is not None and len(token) < SHORTEST_TOKEN:
            raise UserError(f"--token: {len(token)} characters can be guessed; give {SHORTEST_TOKEN} or more")
        self.page, self._token = page, token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--host {host} --port {port}: {reason}; choose another address or port") from error
        self.port = int(self.server_address[1])
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def refusal(self, host: str, given: list[str]) -> str | None:
        """Return why a request is refused; None for one that is not.

        A page on the web can point a name of its own at 127.0.0.1 (DNS rebinding): that shows in the header Host. It does not
        know a token, so with one any name will do, as behind a tunnel.
        """
        if self._token is not None:
            known = len(given) == 1 and hmac.compare_digest(given[0].encode(errors="replace"), self._token.encode())
            return None if known else "this page needs its token: add ?token=TOKEN to the address"
        name, _, port = host.lower().rpartition(":")
        if not name or host.endswith("]"):
            name, port = host.lower(), "80"
        if port == str(self.port) and name in ("localhost", HOST, "[::1]"):
            return None
        return f"this page is at {self.address} only; open that address"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong with a request, as of a browser that was closed, instead of printing it."""
        logger.debug("a request from %s ended early", client_address, exc_info=True)


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine reaches; False for every name but localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
