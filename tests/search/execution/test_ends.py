"""How a run ends that is asked to, again and again, or whose Ray has died under it: in good order, with one sentence."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from optuna.trial import TrialState

from search.execution import ray_cluster
from search.execution.ray_cluster import UNWIND_SECONDS, _watched, clear_old_runs
from search.execution.ray_compat import OWNER, end_processes_of
from search.execution.run import _at_work
from search.report.progress import Bars
from search.spec.runtime import Resources
from search.spec.study import load_study
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

COMMAND = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # whatever these tests were started by
from search.cli import main as cli
from uipe_core.storage.signals import ignore_signals
from uipe_core.errors import StudyInterrupted

def work():
    try:
        print("at work", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        with ignore_signals():
            time.sleep(1.5)
        raise StudyInterrupted("what was done is in OUT; the same command resumes it")

cli.AGAIN_SECONDS = 0.2
cli.app = work
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_requests_to_end_in_a_row_end_a_command_once(number):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COMMAND)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "at work\n"
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.3)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "interrupted: what was done is in OUT; the same command resumes it\n"


def test_what_nohup_ignores_stays_ignored():
    code = COMMAND.replace("time.sleep(30)", "time.sleep(0.5)")
    ignoring = code.replace("cli.app = work", "signal.signal(signal.SIGHUP, signal.SIG_IGN); cli.app = work")
    with subprocess.Popen(
        [sys.executable, "-c", ignoring], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0, process.stderr.read()


def test_whatever_a_run_raises_no_trial_stays_open(write_study, place, tmp_path):
    spec = load_study(write_study(tmp_path / "study.yaml"))

    def work(run):
        run.store.ask_point(spec.search_space())
        raise ZeroDivisionError("anything")

    with pytest.raises(ZeroDivisionError):
        _at_work(spec, tmp_path / "out", True, None, False, work)
    (trial,) = StudyStore.open(tmp_path / "out").study.trials
    assert trial.state == TrialState.FAIL and "interrupted" in trial.user_attrs["reason"]


def test_a_run_whose_ray_died_ends_with_a_sentence():
    closed = []
    told = pytest.raises(UserError, match=r"Ray has died \(gcs_server\); the same command goes on")
    with told, _watched(lambda: "gcs_server", lambda: closed.append(1)):
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            time.sleep(0.01)
    assert closed == [1]


def test_a_run_goes_on_while_ray_lives_and_ends_as_it_would():
    with pytest.raises(ZeroDivisionError), _watched(lambda: "", pytest.fail):
        raise ZeroDivisionError
    with _watched(lambda: "", pytest.fail):
        pass


HUNG = """
import time
from search.execution.ray_cluster import _watched
with _watched(lambda: "raylet", lambda: print("closed", flush=True)):
    time.sleep(60)  # as a call to a server that is gone: nothing of Python's runs meanwhile
"""


def test_a_run_that_hangs_in_a_call_to_a_dead_ray_is_closed_and_ended():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (2, "closed\n")
    assert done.stderr == "error: Ray has died (raylet); the same command goes on from what was done\n"
    assert UNWIND_SECONDS < time.monotonic() - started < 55


PRINT = """
import sys
from search.cli import main as cli
cli.app = lambda: print("x" * 20000)
cli.main()
"""


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        (
            '"$0" -c "$1" > /dev/full',
            1,
            "error: standard output: No space left on device; only what was to be printed is lost\n",
        ),
        ('"$0" -c "$1" > /dev/full 2> /dev/full', 1, ""),
        ('"$0" -c "$1" >&-', 0, ""),
        ('"$0" -c "$1" >&- 2>&-', 0, ""),
        ('set -o pipefail; "$0" -c "$1" | true', 1, ""),
    ],
)
def test_standard_output_that_is_full_or_closed_costs_no_traceback(shell, code, said):
    done = subprocess.run(["bash", "-c", shell, sys.executable, PRINT], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_what_is_left_of_the_ray_of_a_dead_run_is_ended(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    left = subprocess.Popen(sleep, env={**os.environ, OWNER: str(tmp_path / "dead")})
    other = subprocess.Popen(sleep, env={**os.environ, OWNER: str(tmp_path / "dead-not")})
    try:
        time.sleep(0.5)
        end_processes_of(tmp_path / "dead")
        assert left.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_files_of_ray_and_tune_are_kept_of_the_last_run_only(tmp_path):
    for day in range(1, 6):
        for name in (f"session_2026-11-0{day}", f"tune-2026110{day}-1"):
            (tmp_path / name).mkdir()
            os.utime(tmp_path / name, (day, day))
    (tmp_path / "torch").mkdir()
    (tmp_path / "session_latest").symlink_to("session_2026-11-05")
    clear_old_runs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "session_2026-11-05",
        "session_latest",
        "torch",
        "tune-20261105-1",
    ]
    clear_old_runs(tmp_path / "missing")


def test_ray_is_started_again_and_its_limits_are_named(tmp_path, monkeypatch, capsys):
    tries = []

    def start(folder, memory, seconds):
        tries.append(seconds)
        raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray_cluster, "start_local", start)
    with pytest.raises(UserError, match=r"could not be started .*timed out during startup.*resources\.ray_start_seconds"):
        ray_cluster._start(tmp_path, Resources(ray_start_seconds=7, ray_start_tries=3), Bars())
    assert tries == [7, 7, 7]
    assert " ".join(capsys.readouterr().err.split()).count("trying again") == 2
