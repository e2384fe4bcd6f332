"""The Ray cluster a study runs on: connected already, or started on this machine for the length of a run."""

import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from search.base_runs import Room
from search.capacity import autoscaler_fleet, room_for
from search.progress import Bars
from search.spec import StudySpec
from search.spec_sections import PretrainedModel
from uipe_core.errors import UserError

OBJECT_STORE_BYTES = 256 * 2**20
LONGEST_SCRATCH = 24
"""Length of a folder for temporary files that still leaves room for the names of Ray's sockets."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study is the record; Tune's own loggers double the time of a trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the runner's: it leaves a study that can be resumed
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def local_ray(spec: StudySpec, out: Path, bars: Bars) -> Iterator[Room]:
    """A Ray cluster of this machine's cores for the length of a run; one that is already connected is used as it is.

    Yields:
        What it holds of the study.

    Raises:
        UserError: No node of it could ever hold a trial, or a base run.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield _room(spec, own=False)
        return
    # A local cluster asks for a token. Our own keeps others on this machine out and leaves no token file in the home folder.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folder = (out / "ray").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))  # workers make it on import, else under /tmp
    # Ray puts sockets below its folder, and a socket's path may have at most 107 bytes: a link keeps it short.
    scratch = tempfile.gettempdir()
    link = Path(tempfile.mkdtemp(prefix="uipe-", dir=scratch if len(scratch) <= LONGEST_SCRATCH else "/tmp")) / "r"
    link.symlink_to(folder, target_is_directory=True)
    bars.say("starting Ray ...")
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _interrupts_held():
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=str(link),
                _node_ip_address="127.0.0.1",
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in place, which ends the process at once
        yield _room(spec, own=True)
    except SystemExit as error:
        raise KeyboardInterrupt from error  # SIGTERM while Ray was starting, and had its own handler in place
    finally:
        ray.shutdown()
        shutil.rmtree(link.parent, ignore_errors=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back until the block has ended: what a handler raises while Ray forks its processes, Python swallows."""
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


def _room(spec: StudySpec, own: bool) -> Room:
    """What the cluster holds of the study; see `room_for`."""
    if isinstance(spec.model, PretrainedModel) and spec.model.device == "cuda" and spec.resources.trial.gpus == 0:
        raise UserError("model.device: 'cuda' needs GPUs for the trials; set resources.trial.gpus, for example to 1")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return room_for(spec.resources, nodes, None if own else autoscaler_fleet())
