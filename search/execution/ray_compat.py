"""Everything that leans on Ray's internals: variables it reads on import, private arguments, texts, what Tune keeps of a trial.

tests/search/execution/test_ray_compat.py pins each assumption. Nothing here imports Ray when it is imported itself: the
variables must be set before that.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uipe_core.errors import UserError

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Variable with the URL of a cluster's job server."""

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

DEFAULT_PATH = "~/.ray/auth_token"

ADVICE = (
    f"put the cluster's token into {DEFAULT_PATH} (or name its file in {TOKEN_PATH}) and set {MODE}=token; a cluster that was "
    f"started without authentication needs {MODE}=disabled"
)


def cluster_token() -> str | None:
    """Return the token to show a cluster; None where RAY_AUTH_MODE says that it asks for none.

    It is looked for where Ray does: RAY_AUTH_TOKEN, the file named by RAY_AUTH_TOKEN_PATH, ``~/.ray/auth_token``. Without
    RAY_AUTH_MODE a token is asked for, and used.

    Raises:
        UserError: If there is none, it cannot be read, or the mode is unknown.
    """
    mode = os.environ.get(MODE, "token").lower()
    if mode == "disabled":
        return None
    if mode != "token":
        raise UserError(f"{MODE}: {mode!r} is unknown; set token or disabled")
    value = os.environ.get(TOKEN, "").strip()
    if value:
        return value
    named = os.environ.get(TOKEN_PATH)
    path = Path(named or DEFAULT_PATH).expanduser()
    try:
        value = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if named or not isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: the cluster's token cannot be read ({type(error).__name__}); {ADVICE}") from error
    if not value:
        raise UserError(f"no token for the Ray cluster was found; {ADVICE}")
    return value


def require_token() -> None:
    """Set token authentication for joining a cluster. Call it before Ray is imported, which reads the mode only once.

    Raises:
        UserError: As `cluster_token`.
    """
    if cluster_token() is not None:
        os.environ[MODE] = "token"


PASSED = "UIPE_PASSED"
"""Variable of a job with the variables that were passed to it, sealed: Ray shows a job's variables to all who list jobs."""

READ_TOO_EARLY = ("PATH", "LD_", "PYTHON", "RAY_", PASSED)
"""Starts of names that a process reads before it could be passed them."""


def seal(names: Sequence[str]) -> str | None:
    """Encrypt variables of this process for all who have the cluster's token; None for no names.

    Args:
        names: Of the variables.

    Raises:
        UserError: If one is not set or cannot be passed, or the cluster has no token.
    """
    if not names:
        return None
    from cryptography.fernet import Fernet

    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith(READ_TOO_EARLY):
            raise UserError(f"--pass-env: {name!r} cannot be passed; name a variable such as HF_TOKEN, without its value")
        if not os.environ.get(name):
            raise UserError(f"--pass-env: {name} is not set here; set it, or leave the option out")
    key = _sealing_key()
    if key is None:
        raise UserError(f"--pass-env: the cluster asks for no token ({MODE}=disabled), so all could read it; {ADVICE}")
    return Fernet(key).encrypt(json.dumps({name: os.environ[name] for name in names}).encode()).decode()


def take_passed() -> None:
    """Set the variables that were passed to this job, if there are any, in this process.

    Raises:
        UserError: They were sealed with another token.
    """
    sealed = os.environ.get(PASSED)
    if not sealed:
        return
    from cryptography.fernet import Fernet, InvalidToken

    try:
        passed = json.loads(Fernet(_sealing_key() or b"").decrypt(sealed.encode()))
    except (InvalidToken, ValueError):
        raise UserError(
            f"{PASSED}: what `uipe submit --pass-env` passed was sealed with another token than this node has; give all nodes "
            "the same token and submit again"
        ) from None
    os.environ.update(passed)


def _sealing_key() -> bytes | None:
    token = cluster_token()
    if token is None:
        return None
    return base64.urlsafe_b64encode(hashlib.sha256(f"uipe passed variables {token}".encode()).digest())


IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable by which Ray's job server hands a job its runtime environment."""

CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for clusters of several nodes, named after the systems on which it is off by default."""

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study is the record; Tune's own loggers double the time of a trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled by the run, which leaves a study that can be resumed
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshots of all trials are never read: the study is what resumes
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "5",  # a task whose worker is ended for want of memory is otherwise run again for ever
}
"""Variables of every run."""


def configure_ray(address: str | None) -> None:
    """Set the variables that Ray reads on import: a token to join a cluster with, or loopback addresses for a local one.

    On a cluster the variables that were passed to the job are set too.

    Ray takes 127.0.0.1 for "the address others reach me by" and then listens on every interface, token or not. With clusters
    switched off it does not. That is right only where no cluster is to be joined.

    Raises:
        UserError: As `cluster_token`.
    """
    if address is None:
        os.environ.setdefault(CLUSTERS, "0")
    else:
        require_token()
        take_passed()


OWNER = "UIPE_RAY_OWNER"
"""Variable in the environment of all processes of a Ray that was started here: the folder of its owner's link."""


def end_processes_of(folder: Path) -> None:
    """Kill what is left of the Ray of a dead process: its agents ask for a minute whether their node is still there."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if f"{OWNER}={folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def start_local(folder: Path, object_store_bytes: int, seconds: float = 60.0) -> None:
    """Start Ray on this machine's cores, on loopback.

    Args:
        folder: Its files go there; the paths of its sockets must stay short.
        object_store_bytes: Memory for objects.
        seconds: How long its GCS, and then its raylet, may take. Ray itself would give the raylet 30 s.
    """
    import ray
    from ray._private import services

    os.environ[OWNER] = str(folder.parent)
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", f"{seconds:.0f}")
    find_node = services.get_node

    def wait_for_node(*given: Any, **named: Any) -> Any:
        ends = time.monotonic() + seconds
        while True:
            try:
                return find_node(*given, **named)
            except RuntimeError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.1)

    services.get_node = wait_for_node
    try:
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder),
            _node_ip_address="127.0.0.1",
        )
    finally:
        services.get_node = find_node


def dead_processes() -> list[str]:
    """Return the processes that have ended of those without which a Ray that was started here cannot go on."""
    from ray._private.worker import _global_node

    ended = [] if _global_node is None else _global_node.dead_processes()
    return [name for name, _ in ended if name in ("raylet", "gcs_server")]


def raylet_process() -> int | None:
    """Return the process id of this node's raylet: the peer of its socket; None where that is not known."""
    from ray._private.worker import _global_node

    if _global_node is None:
        return None
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError, AttributeError):
        connection.connect(_global_node.raylet_socket_name)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", credentials)[0] or None  # 0: of another process namespace
    return None


def has_ended(pid: int) -> bool:
    """Return True if a process is gone, or a zombie that nothing has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return Path("/proc/self/stat").exists()  # without /proc nothing is known
    except OSError:
        return False


def kill_processes() -> None:
    """Kill what is left of the Ray that this process started."""
    from ray._private.worker import _global_node

    if _global_node is not None:
        _global_node.kill_all_processes(check_alive=False, allow_graceful=False)


def check_cluster_config(config: Mapping[str, Any]) -> None:
    """Check a cluster file as ``ray up`` does, offline; raises what Ray raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(dict(config)))


@contextlib.contextmanager
def every_loss_is_a_death() -> Iterator[None]:
    """Let Tune take every loss of a worker for the end of that worker's trial, while the block runs.

    Tune knows such a loss by `RayActorError` alone. Where Ray ends a worker for want of memory it raises another error, at
    which Tune gives up the whole search. Only the end of this machine's own raylet is one of everything.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import LocalRayletDiedError, RayActorError, RayError, RayTaskError

    original = RayActorManager._actor_task_failed

    def failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, LocalRayletDiedError):
            raise exception
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=str(exception))
        original(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original


def failure_text(trial: "Trial | None") -> str:
    """Return what Tune wrote about a trial whose worker died; it tells its searcher that, but not why."""
    file = None if trial is None else trial.error_file
    return without_commands(Path(file).read_text()) if file is not None and Path(file).is_file() else ""


def without_commands(text: str) -> str:
    """Drop the list of the machine's largest processes from what Ray says of memory: other people's command lines."""
    return re.sub(r"^Top \d+ memory users:.*?(?=^\D|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)


def failure_cause(text: str) -> tuple[str, str]:
    """Find the cause in what Ray says of a worker's death.

    Returns:
        ``memory``, ``node``, ``start``, ``exit`` or ``unknown``; and the amount in use, the last line or the exit code.
    """
    if "running low on memory" in text:
        used = re.search(r"was ([\d.]+ ?\w+) used / ([\d.]+ ?\w+) limit", text)
        return "memory", "" if used is None else f"{used[1]} of {used[2]} in use"
    if "node has died" in text or "node was terminated" in text:
        return "node", ""
    if "error raised in its creation task" in text:
        return "start", text.strip().splitlines()[-1]
    code = re.search(r"exit code (\d+)", text)
    return ("unknown", "") if code is None else ("exit", code[1])


def release_trial(trial: "Trial") -> None:
    """Drop what Tune keeps of a trial that has ended: its result with the item scores, statistics, its configuration."""
    for kept in (trial.last_result, trial.metric_analysis, trial.metric_n_steps, trial.evaluated_params):
        kept.clear()
    trial.config.pop("job", None)
    trial.experiment_tag = ""  # the whole configuration again, as the name of the trial's folder
