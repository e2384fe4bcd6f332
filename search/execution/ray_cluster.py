"""The Ray cluster a study runs on: connected already, or started on this machine for the length of a run."""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

import search
import uipe_core
from search.execution.capacity import ClusterCapacity, autoscaler_fleet, capacity_of
from search.execution.ray_compat import (
    ADVICE,
    ENVIRONMENT,
    IN_A_JOB,
    MODE,
    dead_processes,
    end_processes_of,
    has_ended,
    kill_processes,
    raylet_process,
    require_token,
    start_local,
)
from search.report.progress import Bars
from search.spec.models import TinyModel
from search.spec.runtime import Resources
from search.spec.study import StudySpec
from uipe_core.errors import UserError, first_line
from uipe_core.storage.scratch import scratch_folder
from uipe_core.storage.signals import ignore_signals

OBJECT_STORE_BYTES = 256 * 2**20
LONGEST_SCRATCH = 24
"""Length of a folder for temporary files that still leaves room for the names of Ray's sockets."""
CONNECT_SECONDS = 5
WATCH_SECONDS = 1.0
"""How often it is asked whether Ray is still there."""
UNWIND_SECONDS = 4.0
"""How long a run has to end by itself once Ray has died: some seconds later Ray ends its process."""
AWAY_SECONDS = 40.0
"""How long a cluster's GCS may be away, as while it is started again; after 60 s Ray ends the process."""


@contextmanager
def connected(
    spec: StudySpec, out: Path, bars: Bars, address: str | None = None, close: Callable[[], None] = lambda: None
) -> Iterator[ClusterCapacity]:
    """A Ray cluster for the length of a run.

    Args:
        spec: The study.
        out: Its output folder, where a cluster of our own keeps its files.
        bars: Progress.
        address: ``auto`` or ``host:port`` of a cluster one of whose nodes this is; None starts one on this machine's cores.
            A cluster that is already connected is used as it is.
        close: Called, perhaps by another thread, when Ray has died; the process may end right after.

    Yields:
        What it holds of the study.

    Raises:
        UserError: If the cluster cannot be reached, refuses the token, or no node of it could ever hold a trial or base run; or
            Ray has died.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield _capacity(spec, own=False)
        return
    clear_old_runs(out / "ray")
    with _joined(address, bars, close) if address else _own(out, spec.resources, bars, close):
        yield _capacity(spec, own=not address)


KEPT_RUNS = 2
"""Runs whose files of Ray and Tune stay in the output folder: this one's and the last one's, which may be asked about."""


def clear_old_runs(folder: Path) -> None:
    """Remove what Ray and Tune wrote in earlier runs of a study, but for the last one's."""
    for start in ("session_2", "tune-", "train-"):  # not session_latest, a link
        with contextlib.suppress(OSError):
            found = sorted(folder.glob(f"{start}*"), key=lambda path: path.stat().st_mtime)
            for path in found[: 1 - KEPT_RUNS]:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _joined(address: str, bars: Bars, close: Callable[[], None]) -> Iterator[None]:
    """A cluster that runs already. Its workers get this very code, whatever is installed there."""
    _check_address(address)
    require_token()
    # A submitted job's own environment holds already for its workers, and Ray takes no second one.
    environment = None if IN_A_JOB in os.environ else code_environment()
    bars.say(f"connecting to Ray at {address} ...")
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _interrupts_held():
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        _restore(on_terminate)
        with _watched(_node_watch(ray.get_runtime_context().gcs_address, raylet_process()), close):
            yield
    except SystemExit as error:
        raise KeyboardInterrupt from error  # SIGTERM while Ray was connecting, and had its own handler in place
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        if ray.is_initialized():
            raise  # not of the connection: the study's own
        raise UserError(f"--address: cannot connect to Ray at {address}: {first_line(error)}; {ADVICE}") from error
    finally:
        with ignore_signals():
            ray.shutdown()


@contextmanager
def _own(out: Path, resources: Resources, bars: Bars, close: Callable[[], None]) -> Iterator[None]:
    """A cluster of this machine's cores."""
    # A local cluster asks for a token. Our own keeps others on this machine out and leaves no token file in the home folder.
    if MODE not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folder = (out / "ray").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))  # workers make it on import, else under /tmp
    # Ray puts sockets below its folder, and a socket's path may have at most 107 bytes: a link keeps it short.
    place = tempfile.gettempdir()
    with scratch_folder(place if len(place) <= LONGEST_SCRATCH else "/tmp", left=end_processes_of) as scratch:
        link = scratch / "r"
        link.symlink_to(folder, target_is_directory=True)
        bars.say("starting Ray ...")
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            with _interrupts_held():
                _start(link, resources, bars)
            _restore(on_terminate)
            with _watched(lambda: " and ".join(dead_processes()), close):
                yield
        except SystemExit as error:
            raise KeyboardInterrupt from error  # SIGTERM while Ray was starting, and had its own handler in place
        finally:
            with ignore_signals():
                ray.shutdown()


class _RayDied(BaseException):
    """Raised in the thread of a run whose Ray has died; no error that anything on the way could take for its own."""


@contextmanager
def _watched(lost: Callable[[], str], close: Callable[[], None]) -> Iterator[None]:
    """End the block when Ray has died under it.

    Ray ends the process by itself then, some seconds after its raylet and a minute after its GCS, without a word of Python's,
    and until then calls to it hang. Trials would be left open.

    Args:
        lost: Names what has died; empty while nothing has.
        close: Close what must not be left open.

    Raises:
        UserError: Ray has died.
    """
    runs_in, over, lock = threading.get_ident(), threading.Event(), threading.Lock()
    sentence: list[str] = []

    def end() -> None:
        with contextlib.suppress(Exception):
            close()
        with contextlib.suppress(Exception):
            kill_processes()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            if not (what := lost()):
                continue
            sentence.append(f"Ray has died ({what}); the same command goes on from what was done")
            with lock:
                if over.is_set():
                    return
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(runs_in), ctypes.py_object(_RayDied))
            if not over.wait(UNWIND_SECONDS):  # inside a call to Ray that does not come back
                end()
                with contextlib.suppress(OSError, AttributeError):
                    sys.stderr.write(f"error: {sentence[0]}\n")
                    sys.stderr.flush()
                os._exit(2)
            return

    threading.Thread(target=watch, name="ray watch", daemon=True).start()
    try:
        try:
            yield
        finally:
            with lock:
                over.set()
    except _RayDied:
        end()
        raise UserError(sentence[0]) from None


def _node_watch(address: str, raylet: int | None) -> Callable[[], str]:
    """Return what tells whether the GCS of a cluster has been away for too long, or this node's raylet has ended."""
    host, _, port = address.rpartition(":")
    since = time.monotonic()

    def lost() -> str:
        nonlocal since
        if raylet is not None and has_ended(raylet):
            return "this node's raylet"
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except OSError:
            return f"its GCS at {address} does not answer" if time.monotonic() - since > AWAY_SECONDS else ""
        since = time.monotonic()
        return ""

    return lost


def _start(folder: Path, resources: Resources, bars: Bars) -> None:
    for left in reversed(range(resources.ray_start_tries)):
        try:
            start_local(folder, OBJECT_STORE_BYTES, resources.ray_start_seconds)
            return
        except Exception as error:  # Ray has no type of its own for it
            kill_processes()
            ray.shutdown()
            if left:
                bars.say(f"Ray could not be started ({first_line(error)}); trying again")
                continue
            raise UserError(
                f"Ray could not be started on this machine ({first_line(error)}); give it room (processor, memory, disk) or "
                "time (resources.ray_start_seconds, ray_start_tries), then the same command goes on from what was done"
            ) from error


def code_environment() -> dict[str, Any]:
    """The runtime environment that gives a cluster's workers this very code: the two packages as they are here."""
    packages = [str(Path(str(module.__file__)).parent) for module in (search, uipe_core)]
    return {"py_modules": packages, "excludes": ["__pycache__"]}


def _check_address(address: str) -> None:
    """Refuse a malformed address, and one where no server listens: Ray itself would retry for 90 seconds."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+|\[[0-9a-fA-F:]+\]", host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--address: {address} is not the address of a node; on one of the cluster's nodes give auto or host:port, from "
            "elsewhere use `uipe submit`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--address: cannot connect to Ray at {address}: {error}. Is the head node running (`ray status`), and the port "
            "right?"
        ) from error


def _restore(on_terminate: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in place, which ends the process at once


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended: what a handler raises while Ray forks its processes, Python swallows."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if seen:
        raise KeyboardInterrupt


def _capacity(spec: StudySpec, own: bool) -> ClusterCapacity:
    """Return what the cluster holds of the study; see `capacity_of`."""
    if not isinstance(spec.model, TinyModel) and spec.model.device == "cuda" and spec.resources.trial.gpus == 0:
        raise UserError("model.device: 'cuda' needs GPUs for the trials; set resources.trial.gpus, for example to 1")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return capacity_of(spec.resources, nodes, None if own else autoscaler_fleet())
