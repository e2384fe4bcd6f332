"""Submit, list, follow and stop studies as jobs of a Ray cluster."""

import asyncio
import base64
import contextlib
import gzip
import ipaddress
import os
import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from requests.utils import get_environ_proxies, select_proxy

from search.cluster.bundle import STUDY_FILE, build_bundle, submission_id
from search.evaluation.inputs import require_trust
from search.execution.ray_cluster import code_environment
from search.execution.ray_compat import ADDRESS, ADVICE, PASSED, cluster_token, seal
from search.results.status import is_noise, last_status
from search.spec.errors import without_password
from uipe_core.errors import StudyInterrupted, UserError
from uipe_core.storage.scratch import scratch_folder

STUDY, OUT = "uipe_study", "uipe_out"
"""Metadata of a job that is a study."""
STOP_SECONDS = 90
"""How long a study may take to end in good order before Ray kills it; Ray's own 3 s are too few."""
POLL_SECONDS = 1.0
REPORT_SECONDS = 600
"""How long writing a report on a cluster may take, with the time that a job needs to start."""
PAGE = "uipe-report: "
"""Begins the line of a log that is a page, packed."""
T = TypeVar("T")


@dataclass(frozen=True)
class Submission:
    """A submitted study.

    Attributes:
        job: Id of its job.
        attached: Whether the job was there already, pending or running, and nothing was sent.
        out: Its output folder, as the cluster sees it.
        notes: Warnings for the user.
    """

    job: str
    attached: bool
    out: str
    notes: list[str]


class Jobs:
    """The studies of a cluster.

    Args:
        address: Address of its job server (``http://127.0.0.1:8265``); None is what RAY_API_SERVER_ADDRESS says.

    Raises:
        UserError: No job server answers, or it refuses the token.
    """

    def __init__(self, address: str | None) -> None:
        url = address or os.environ.get(ADDRESS)
        if not url:
            raise UserError(f"--address: no cluster was named; give the URL of its job server, or set {ADDRESS}")
        if not re.match(r"https?://[^/]", url):
            raise UserError(
                f"--address: {without_password(url)} is not the URL of a job server; give for example http://127.0.0.1:8265"
            )
        self.address = without_password(url)
        self._proxy = _way_to(url)
        token = cluster_token()
        headers = None if token is None else {"Authorization": f"Bearer {token}"}
        with _only_address(url):
            self._client = self._ask(lambda: JobSubmissionClient(url, headers=headers))

    def submit(
        self, study: Path, out: str | None = None, trust_remote_code: bool = False, passed: Sequence[str] = ()
    ) -> Submission:
        """Submit a study to the cluster, unless it is pending or running there.

        The first job of a study has a name that follows from the study; when that has ended, the next is its resumption.

        Args:
            study: The study file.
            out: Output folder on the cluster: absolute, or below ``~`` of the head node; None is ``~/runs/<study name>``.
            trust_remote_code: As `search.evaluation.prepared.prepare`.
            passed: Names of this process's variables that driver and workers get; they travel sealed.

        Raises:
            UserError: If a variable is not set, the study is broken or cannot travel, or the cluster refuses it.
        """
        sealed = seal(passed)
        with scratch_folder() as scratch:
            folder = scratch / "bundle"
            folder.mkdir()
            bundle = build_bundle(study, folder)
            require_trust(bundle.spec, trust_remote_code)
            place = _output_folder(out or f"~/runs/{bundle.spec.name}")
            first = submission_id(bundle, place)
            known = {job.submission_id: job for job in self.all() if _is_of(job.submission_id, first)}
            for name, job in known.items():
                if not job.status.is_terminal():
                    return Submission(str(name), True, place, bundle.notes)
            name = first if not known else f"{first}-{max(_turn(str(name), first) for name in known) + 1}"
            environment = {
                **code_environment(),
                "working_dir": str(folder),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **({PASSED: sealed} if sealed else {})},
            }
            # Not from the folder the job came in: Ray may clear that away when a node dies, and a process without a folder
            # can no longer tell where it is.
            run = (
                f'exec python -m search run "$study" --address auto --out {_quoted(place)}'
                + " --trust-remote-code" * trust_remote_code
            )
            command = f'study="$PWD/{STUDY_FILE}"; cd; {run}'
            try:
                self._ask(
                    lambda: self._client.submit_job(
                        entrypoint=command,
                        submission_id=name,
                        runtime_env=environment,
                        metadata={STUDY: bundle.spec.name, OUT: place},
                    )
                )
            except UserError as error:
                if "already exists" not in str(error):
                    raise
                return Submission(name, True, place, bundle.notes)  # another submit was faster
        return Submission(name, False, place, bundle.notes)

    def all(self) -> list[JobDetails]:
        """Return the jobs that are studies, latest first."""
        jobs = [job for job in self._ask(self._client.list_jobs) if STUDY in (job.metadata or {})]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def job(self, name: str) -> JobDetails:
        """Return a job by its id.

        Raises:
            UserError: If the cluster has none.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise UserError(f"{name!r} is no id of a job and no folder of a study; `uipe studies` lists the ids")
        return self._ask(lambda: self._client.get_job_info(name), missing=name)

    def status(self, name: str) -> dict[str, Any]:
        """Return a job's state with the latest status its driver logged (`search.results.status.status_of`)."""
        job = self.job(name)
        summary = summary_of(job)
        latest = last_status(self.log(name)) if job.status != JobStatus.PENDING else None
        if latest is None:
            return {**summary, **({"message": job.message} if job.message else {})}
        # What the driver said last may be minutes old; that the job has ended is not.
        ended = {"expected_end": None} if job.status.is_terminal() else {}
        state = latest["state"] if job.status in (JobStatus.RUNNING, JobStatus.SUCCEEDED) else summary["state"]
        return {**latest, **ended, **summary, "state": state}

    def log(self, name: str) -> str:
        """Return the whole log of a study's driver, status lines included."""
        return self._ask(lambda: self._client.get_job_logs(name), missing=name)

    def report(self, name: str) -> bytes:
        """Return the report of a study as it is now, written on the cluster by a short job of its own.

        The job server serves no files, so that job prints the page, packed, into its log.

        Raises:
            UserError: The job is no study, or has nothing to report yet.
        """
        out = (self.job(name).metadata or {}).get(OUT)
        if out is None:
            raise UserError(f"{name}: this job is no study; `uipe studies` lists those")
        command = (
            f'cd; to="$(mktemp -d)"; trap \'rm -r "$to"\' EXIT; python -m search report {_quoted(out)} --to "$to" '
            f'&& echo && echo "{PAGE}$(gzip -9c "$to/report.html" | base64 -w 0)"'
        )
        helper = f"report-of-{name}-{uuid.uuid4().hex[:8]}"
        environment = code_environment()
        self._ask(lambda: self._client.submit_job(entrypoint=command, submission_id=helper, runtime_env=environment))
        try:
            self.ended(helper, REPORT_SECONDS)
            lines = self.log(helper).splitlines()
        finally:
            with contextlib.suppress(UserError):
                self._ask(lambda: self._client.stop_job(helper))
                self._ask(lambda: self._client.delete_job(helper))
        packed = next((line.removeprefix(PAGE) for line in lines if line.startswith(PAGE)), None)
        if packed is None:
            said = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["it printed nothing"]
            raise UserError(f"{name}: no report could be written on the cluster: {said[-1].removeprefix('error: ')}")
        return gzip.decompress(base64.b64decode(packed))

    def follow(self, name: str) -> Iterator[str]:
        """Yield the lines of a driver's log as they come, without status lines, until it ends.

        Raises:
            StudyInterrupted: On Ctrl-C; the study goes on.
        """
        self.job(name)
        lines = _LogLines(self._client.tail_job_logs(name))
        try:
            while (line := self._ask(lines.next)) is not None:
                if not is_noise(line):
                    yield line
        except KeyboardInterrupt:
            raise StudyInterrupted(f"{name} goes on; `uipe logs {name} --follow` follows it again") from None
        finally:
            lines.close()

    def stop(self, name: str, say: Callable[[str], None]) -> JobDetails:
        """Stop a study and wait until it has ended; a job that has ended already stays as it is."""
        job = self.job(name)
        if job.status.is_terminal():
            return job
        self._ask(lambda: self._client.stop_job(name), missing=name)
        say(f"stopping {name} ...")
        return self.ended(name, STOP_SECONDS + 30)

    def ended(self, name: str, seconds: float) -> JobDetails:
        """Wait for a job to end.

        Raises:
            UserError: If it has not after so many seconds.
        """
        last = time.monotonic() + seconds
        while not (job := self.job(name)).status.is_terminal():
            if time.monotonic() > last:
                raise UserError(f"{name}: has not ended after {seconds:.0f} s; look at `uipe logs {name}` and try again")
            time.sleep(POLL_SECONDS)
        return job

    def _ask(self, question: Callable[[], T], missing: str | None = None) -> T:
        """Call the job server; turn its errors and those of the connection into errors for users."""
        try:
            return question()
        except ray.exceptions.AuthenticationError as error:
            raise UserError(f"{self.address}: the cluster refused the token; {ADVICE}") from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            reason = type(error).__name__
            raise UserError(f"{self.address}: no job server answers ({reason}){self._proxy}; is the cluster up?") from error
        except RuntimeError as error:
            text = str(error)
            if missing is not None and "404" in text:
                raise UserError(f"{missing}: {self.address} has no such job; `uipe studies` lists them") from error
            if "No available agent" in text:
                raise UserError(f"{self.address}: {NO_AGENT}") from error
            raise UserError(f"{self.address}: {_cause(text)}") from error


NO_AGENT = (
    "the head has no agent to run jobs. The port that the agent listens on, 52365 or the head's --dashboard-agent-listen-port, "
    "is perhaps taken there by another Ray or another program (dashboard_agent.log in the head's session names it): "
    "free it, or start the head with another --dashboard-agent-listen-port"
)


def _way_to(url: str) -> str:
    """Let requests to this machine go past a proxy; return words about the proxy that others go through, if there is one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            for name in ("no_proxy", "NO_PROXY"):
                os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))
            return ""
    proxy = select_proxy(url, get_environ_proxies(url))
    if proxy is None:
        return ""
    return f" by way of the proxy {without_password(proxy)} ({parts.scheme}_proxy; no_proxy names hosts to reach without it)"


def summary_of(job: JobDetails) -> dict[str, Any]:
    """Return what Ray knows of a study's job, ready for JSON."""
    metadata = job.metadata or {}
    return {
        "job": job.submission_id,
        "study": metadata.get(STUDY),
        "out": metadata.get(OUT),
        "state": job.status.value.lower(),
        "exit_code": job.driver_exit_code,
        "started": _moment(job.start_time),
        "ended": _moment(job.end_time),
    }


class _LogLines:
    """Join the chunks of a job's log to lines."""

    def __init__(self, pieces: Any) -> None:
        self._pieces, self._rest = pieces, ""
        self._ready: list[str] = []
        self._runner = asyncio.Runner()

    def next(self) -> str | None:
        """Return the next line, with its end; None when the job has ended."""
        while not self._ready:
            try:
                piece = self._runner.run(anext(self._pieces))
            except StopAsyncIteration:
                last, self._rest = self._rest, ""
                return last or None
            *self._ready, self._rest = (self._rest + piece).splitlines(keepends=True) or [""]
            if self._rest.endswith("\n"):
                self._ready.append(self._rest)
                self._rest = ""
        return self._ready.pop(0)

    def close(self) -> None:
        self._runner.run(self._pieces.aclose())
        self._runner.close()


@contextmanager
def _only_address(url: str) -> Iterator[None]:
    """Set RAY_API_SERVER_ADDRESS, which Ray prefers to the address it is given."""
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS]
        else:
            os.environ[ADDRESS] = before


def _output_folder(out: str) -> str:
    if without_password(out) != out:
        raise UserError(f"--out: {without_password(out)} holds a password; give it to the nodes by their environment")
    if "://" in out or Path(out).is_absolute() or re.match(r"~/[^/]", out):
        return out
    raise UserError(f"--out: {out} would be in the job's temporary folder; give an absolute path or ~/... on the head node")


def _quoted(out: str) -> str:
    """Quote a path for the shell, which expands a leading ``~`` only where it is not quoted."""
    return f"~/{shlex.quote(out[2:])}" if out.startswith("~/") else shlex.quote(out)


def _turn(name: str, first: str) -> int:
    return 1 if name == first else int(name.removeprefix(f"{first}-"))


def _is_of(name: str | None, first: str) -> bool:
    return name is not None and re.fullmatch(rf"{re.escape(first)}(-\d+)?", name) is not None


def _moment(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone().isoformat(timespec="seconds")


def _cause(text: str) -> str:
    """Return the last line of the server's answer, which is a whole traceback."""
    lines = [line for line in text.strip().rstrip(".").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "the job server failed without a word"
