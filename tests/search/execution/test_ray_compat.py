"""What `ray_compat` assumes of Ray's internals, so that another version of Ray shows where it is no longer so."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

import search
from search.execution.ray_compat import (
    CLUSTERS,
    ENVIRONMENT,
    configure_ray,
    every_loss_is_a_death,
    failure_cause,
    failure_text,
    has_ended,
    release_trial,
    without_commands,
)

LISTENERS = """
import json, os, sys
from pathlib import Path
from search.execution.ray_compat import configure_ray, start_local
if sys.argv[2] == "configured":
    configure_ray(None)
os.environ["RAY_AUTH_TOKEN"] = "0" * 64
import ray
start_local(Path(sys.argv[1]), 2**27)
inodes = {}
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":  # LISTEN
            inodes[fields[9]] = fields[1].rpartition(":")[0]
from search.execution.ray_compat import has_ended, raylet_process
raylet = raylet_process()
command = Path(f"/proc/{raylet}/cmdline").read_bytes().partition(bytes(1))[0]
assert command.endswith(b"raylet") and not has_ended(raylet), command
own = set()
for entry in Path("/proc").iterdir():
    if not entry.name.isdigit():
        continue
    try:
        if sys.argv[1].encode() not in (entry / "cmdline").read_bytes():
            continue
        for descriptor in (entry / "fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                own.add(target[8:-1])
    except OSError:
        continue
print(json.dumps(sorted(inodes[number] for number in own & set(inodes))))
ray.shutdown()
assert has_ended(raylet) and raylet_process() is None
"""


def listeners(tmp_path, how):
    import json
    import tempfile

    link = Path(tempfile.mkdtemp(prefix="uc-", dir="/tmp"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(search.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LISTENERS), str(link), how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_local_ray_listens_on_loopback_only(tmp_path):
    found = listeners(tmp_path, "configured")
    assert found, "the processes of Ray were not found"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(found) <= loopback


def test_a_process_that_nothing_has_reaped_has_ended():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(process.pid) and not has_ended(os.getpid())
    assert has_ended(process.pid)


def test_the_switch_is_what_ray_reads():
    # Without it the text of Ray's own module would no longer name the variable, and the call would do nothing.
    import ray._private.ray_constants as constants
    import ray._private.services as services

    source = "".join(Path(module.__file__).read_text() for module in (services, constants))
    assert CLUSTERS in source


def test_a_study_of_its_own_does_not_touch_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv(CLUSTERS, "1")
    configure_ray(None)
    assert os.environ[CLUSTERS] == "1"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Memory was 7.5GB used / 8.0GB limit, running low on memory",
            ("memory", "7.5GB of 8.0GB in use"),
        ),
        ("The actor is dead because its node has died.", ("node", "")),
        ("... error raised in its creation task, a\nValueError: no", ("start", "ValueError: no")),
        ("worker died, exit code 137", ("exit", "137")),
        ("", ("unknown", "")),
    ],
)
def test_causes_of_a_death(text, cause):
    assert failure_cause(text) == cause


def test_what_tune_keeps_of_a_trial_can_be_dropped():
    from ray.tune.experiment import Trial
    from ray.tune.registry import register_trainable

    register_trainable("nothing", lambda config: None)
    trial = Trial("nothing", config={"job": "x"}, stub=True)
    trial.run_metadata.last_result = {"evidence": "x" * 1000}
    release_trial(trial)
    assert "evidence" not in trial.last_result and "job" not in trial.config and trial.experiment_tag == ""
    assert isinstance(type(trial).error_file, property)


def test_an_actor_that_is_lost_for_want_of_memory_has_died():
    import ray
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.air.execution._internal.tracked_actor import TrackedActor
    from ray.air.execution._internal.tracked_actor_task import TrackedActorTask

    said = []
    manager = RayActorManager(None)  # what takes care of resources is not asked here
    manager._cleanup_actor = lambda tracked_actor: None
    actor = TrackedActor("1", on_error=lambda actor, error: said.append(error))
    task = TrackedActorTask(actor, on_error=lambda actor, error: said.append(error))
    lost = ray.exceptions.OutOfMemoryError("1 worker(s) were killed due to the node running low on memory")
    # Without help Tune ends the whole search here. Should this line fail, the help is needed no more.
    with pytest.raises(RuntimeError, match="unexpected exception"):
        manager._actor_task_failed(tracked_actor_task=task, exception=lost)
    assert said == []
    with every_loss_is_a_death(), pytest.raises(ray.exceptions.LocalRayletDiedError):
        manager._actor_task_failed(tracked_actor_task=task, exception=ray.exceptions.LocalRayletDiedError())
    with every_loss_is_a_death():
        manager._actor_task_failed(tracked_actor_task=task, exception=lost)
    assert [type(error) for error in said] == [ray.exceptions.RayActorError] * 2
    assert failure_cause(str(said[0]))[0] == "memory"
    assert not ray.is_initialized()


def test_a_task_without_memory_is_not_run_again_for_ever():
    import ray

    name = "RAY_task_oom_retries"
    assert ENVIRONMENT[name] == "5"
    libraries = list(Path(ray.__file__).parent.glob("_raylet*.so"))
    assert any(name.removeprefix("RAY_").encode() in path.read_bytes() for path in libraries)


KILLED = """1 worker(s) were killed due to the node running low on memory.
To see more information about memory usage on this node, use `ray logs raylet.out -ip 127.0.0.1`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
8038\t3.88\tmysqld --password=hunter2
8710\t0.40\tray::ResourceTrainable.train
Refer to the documentation on how to address the out of memory issue.
"""


def test_command_lines_of_other_processes_are_not_kept(tmp_path):
    file = tmp_path / "error.txt"
    file.write_text(f"Failure # 1\n{KILLED}\nFailure # 2\n{KILLED}")
    kept = failure_text(SimpleNamespace(error_file=str(file)))
    assert "hunter2" not in kept and "ResourceTrainable" not in kept
    assert kept.count("Refer to the documentation") == 2 and "Failure # 2" in kept
    assert "hunter2" not in without_commands(KILLED.partition("Refer")[0])


def test_cluster_files_are_checked_offline():
    import yaml

    from search.execution.ray_compat import check_cluster_config

    file = Path(search.__file__).parents[1] / "ray_cluster.yaml"
    check_cluster_config(yaml.safe_load(file.read_text()))
    with pytest.raises(Exception, match="max_workers"):
        check_cluster_config({**yaml.safe_load(file.read_text()), "max_workers": "many"})
