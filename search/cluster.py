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
from search.capacity import Fleet, Need, autoscaler_fleet, need_of, per_base_run, trials_held
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
    """What the cluster holds of a study's trials and base runs, now or once its autoscaler has brought what it may.

    Args:
        spec: The study.
        own: The cluster was started for this run and stays as it is. On another an autoscaler that leaves no description
            (KubeRay's) may bring nodes that are not there yet: then it is enough that the study says how many trials to run.

    Raises:
        UserError: No node could ever hold a trial, or a base run.
    """
    resources = spec.resources
    if isinstance(spec.model, PretrainedModel) and spec.model.device == "cuda" and resources.trial.gpus == 0:
        raise UserError("model.device: 'cuda' needs GPUs for the trials; set resources.trial.gpus, for example to 1")
    nodes: list[Need] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fleet = Fleet() if own else autoscaler_fleet()
    held = {
        key: trials_held(need_of(needs), nodes, fleet)
        for key, needs in (("trial", resources.trial), ("base_run", resources.base_run))
    }
    if own or resources.max_concurrent is None:
        for key, count in held.items():
            if count < 1:
                raise UserError(_too_much(key, need_of(getattr(resources, key)), nodes, own))
        if held["base_run"] < resources.base_run.processes:
            raise UserError(
                f"resources.base_run.processes: {resources.base_run.processes} processes train together, but this cluster has "
                f"room for {held['base_run']} of them; lower it, or what each of them asks for"
            )
    slots = held["trial"] or resources.max_concurrent or 1
    return Room(slots, per_base_run(resources.base_run, resources.trial), resources.max_concurrent or slots)


def _too_much(key: str, need: Need, nodes: list[Need], own: bool) -> str:
    most: dict[str, float] = {"CPU": 0.0, "GPU": 0.0}
    for node in nodes:
        # Memory, and the names that Ray gives its nodes, are nothing a study asks for.
        most |= {
            name: max(most.get(name, 0.0), amount) for name, amount in node.items() if ":" not in name and "memory" not in name
        }
    asked, had = (", ".join(f"{amount:g} {name}" for name, amount in sorted(found.items())) for found in (need, most))
    remedy = "lower it" if own else "lower it, or set resources.max_concurrent if an autoscaler will bring such nodes"
    return f"resources.{key}: it asks for {asked}, but the most that a node of this cluster has is {had}; {remedy}"
