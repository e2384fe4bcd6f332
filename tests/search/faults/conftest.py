"""The fault suite: a small grid study that is disturbed again and again, and held against the same study left in peace.

The grid's points do not depend on the order in which trials end, so whatever happens, the front must come out the same.
"""

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from search.results.study_result import StudyResult
from search.store.study_store import StudyStore

OBJECTIVES = ["log10_forget_quality", "model_utility"]

POINT = ["kind", "base", "epoch", "alpha"]

JOB = [*POINT, "of_trial", "model", "temperature"]

INVARIANTS = (
    "same front",
    "nothing open",
    "nothing lost",
    "nothing twice",
    "no base run again",
    "every failure has its reason",
)

TABLE = pytest.StashKey[dict]()

METHODS = {"grad_ascent": {}, "grad_diff": {"retain_weight": 2}, "kl_min": {}, "npo": {"beta": 1}}


def pytest_generate_tests(metafunc):
    if "repeat" in metafunc.fixturenames:
        metafunc.parametrize("repeat", range(metafunc.config.getoption("--fault-repeats")))


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(TABLE, {})
    if not rows:
        return
    terminalreporter.section("fault suite")
    width = max(map(len, rows)) + 2
    terminalreporter.write_line(f"{'fault':{width}}{'repeats':>8}  " + "  ".join(INVARIANTS))
    for fault, checks in rows.items():
        held = [f"{sum(check[name] for check in checks)}/{len(checks)}" for name in INVARIANTS]
        cells = "  ".join(f"{text:>{len(name)}}" for text, name in zip(held, INVARIANTS, strict=True))
        terminalreporter.write_line(f"{fault:{width}}{len(checks):>8}  {cells}")


@dataclass
class Kept:
    """What a study has at some moment: values of every complete trial by study and number, its jobs, its delta entries."""

    values: dict
    jobs: list
    entries: dict


@dataclass
class Watched:
    """One study that is disturbed.

    Attributes:
        command: The command that runs it, and runs it again.
        out, deltas: Its output folder and its delta store.
        kept: What it had each time it was looked at.
        expected: Front of the same study left in peace.
        seconds: How long that took.
        variables: More of the commands' environment.
        database: URL of its storage; None for its own file.
        retrained: Keys of base runs that may be trained again, because a fault hit them.
    """

    command: tuple
    out: Path
    deltas: Path
    launch: object
    expected: list
    seconds: float
    random: random.Random
    variables: dict = field(default_factory=dict)
    database: str | None = None
    kept: list = field(default_factory=list)
    retrained: set = field(default_factory=set)

    def start(self):
        return self.launch(*self.command, **self.variables)

    def complete(self):
        """How many trials are complete, read beside the driver that writes them."""
        return self._count("COMPLETE")

    def failed(self):
        """How many have failed."""
        return self._count("FAIL")

    def reasons(self):
        """Why they have."""
        return reasons(self.out)

    def _count(self, state):
        file = self.out / "study.db"
        if self.database is None and not file.is_file():
            return 0
        engine = create_engine(self.database or f"sqlite:///file:{file}?mode=ro&uri=true&timeout=30", poolclass=NullPool)
        with contextlib.suppress(OperationalError, ProgrammingError), engine.connect() as connection:
            return connection.execute(text(f"SELECT count(*) FROM trials WHERE state = '{state}'")).scalar_one()
        return 0

    def look(self):
        """Notes what must not be lost from now on."""
        self.kept.append(kept(self))

    def take_front(self):
        """Expects the front there is, where another could not be expected."""
        self.expected = front(self.out)

    def finish(self, driver, attempts=6):
        """Waits for a run to end and starts it again until one ends well."""
        for _ in range(attempts):
            code = driver.wait(300)
            if code == 0:
                return driver
            assert "Traceback" not in driver.stderr, driver.stderr
            self.look()
            driver = self.start()
        raise AssertionError(f"did not end well in {attempts} attempts: {driver.stderr}")


def kept(study):
    values, jobs = {}, []
    if study.database or (study.out / "study.db").is_file():
        store = StudyStore.open(study.out)
        for of, frame in (("trials", store.trials_frame()), ("controls", store.controls_frame())):
            for row in frame.to_dict("records"):
                job = tuple(None if row.get(key) != row.get(key) else row.get(key) for key in JOB)
                values[of, row["trial"]] = (job, *(row[name] for name in OBJECTIVES))
                jobs.append((of, job))
    entries = {path.parent.name: path.stat().st_ino for path in study.deltas.glob("*/manifest.json")}
    return Kept(values, jobs, entries)


def front(out):
    """The front as points and values, without the numbers of trials."""
    return sorted(map(tuple, StudyResult.open(out).front[["base", "epoch", "alpha", *OBJECTIVES]].to_numpy().tolist()))


def same(found, expected):
    """Same points; and values that may differ where a batch was halved, in what sums of floats depend on."""
    return [row[:3] for row in found] == [row[:3] for row in expected] and all(
        row[3:] == pytest.approx(other[3:], rel=1e-5, abs=1e-6) for row, other in zip(found, expected, strict=True)
    )


def open_trials(out):
    store = StudyStore.open(out)
    return [trial.number for study in (store.study, store.controls) for trial in study.trials if not trial.state.is_finished()]


def reasons(out):
    store = StudyStore.open(out)
    return [
        trial.user_attrs.get("reason")
        for study in (store.study, store.controls)
        for trial in study.trials
        if trial.state.name == "FAIL"
    ]


@pytest.fixture(scope="session")
def grid_study(place, write_study, tmp_path_factory):
    """Writes the grid study with a delta store of its own."""

    def write(folder, **changes):
        return write_study(
            folder / "grid.yaml",
            name="grid",
            unlearning={"methods": METHODS, "epochs": 2},
            scoring={"batch_size": 4},
            search={"sampler": "grid", "trials": 32},
            cache={"deltas": str(folder / "deltas")},
            **changes,
        )

    return write


@pytest.fixture(scope="session")
def left_in_peace(tmp_path_factory, run_command):
    """Runs a study twice: its front, and how long it takes once its models are there."""
    known = {}

    def find(write):
        if write not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            trusted = "--trust-remote-code"  # counts only where a study asks for it
            run_command("run", write(folder), "--out", folder / "first", trusted)  # builds the models
            again = write(folder / "again")
            started = time.perf_counter()
            run_command("run", again, "--out", folder / "out", trusted)
            assert front(folder / "first") == front(folder / "out")
            known[write] = front(folder / "out"), time.perf_counter() - started
        return known[write]

    return find


@pytest.fixture(scope="session")
def undisturbed(left_in_peace, grid_study):
    """The grid study left in peace; from here on its models are there."""
    return left_in_peace(grid_study)


@pytest.fixture
def watch(left_in_peace, launch, tmp_path, request):
    """Makes a fresh copy of a study, to be disturbed; what it must keep is checked by `hold`."""

    def make(write):
        repeat = request.node.callspec.params.get("repeat", 0)
        expected, seconds = left_in_peace(write)
        return Watched(
            command=("run", write(tmp_path / "watched"), "--out", tmp_path / "out"),
            out=tmp_path / "out",
            deltas=tmp_path / "watched" / "deltas",
            launch=launch,
            expected=expected,
            seconds=seconds,
            random=random.Random(f"{request.config.getoption('--fault-seed')} {request.node.name} {repeat}"),
        )

    return make


@pytest.fixture
def watched(watch, grid_study):
    """The grid study."""
    return watch(grid_study)


@pytest.fixture
def hold(request):
    """Checks every invariant on a study that has been through a fault, and notes them for the table."""

    def check(fault, study):
        last = kept(study)
        found = dict.fromkeys(INVARIANTS, True)
        found["same front"] = same(front(study.out), study.expected)
        found["nothing open"] = open_trials(study.out) == []
        found["nothing lost"] = all(before.values.items() <= last.values.items() for before in study.kept)
        found["nothing twice"] = len(last.jobs) == len(set(last.jobs))
        found["no base run again"] = all(
            last.entries.get(key) == inode
            for before in study.kept
            for key, inode in before.entries.items()
            if key not in study.retrained
        )
        found["every failure has its reason"] = all(reasons(study.out))
        request.config.stash.setdefault(TABLE, {}).setdefault(fault, []).append(found)
        assert all(found.values()), found

    return check


@pytest.fixture
def workers(living_processes):
    """Processes of a run by what they do: ``scoring`` trials, or ``train_and_publish``."""

    def find(driver, what):
        names = {
            "scoring": ("ScoringTrial", "Trainable"),
            "base run": ("train_and_publish",),
            "raylet": ("raylet/raylet",),
            "GCS": ("gcs/gcs_server",),
        }[what]
        return sorted(pid for pid, command in living_processes(driver.tag).items() if any(name in command for name in names))

    return find


@pytest.fixture
def end():
    """Ends a process: kill -9 unless told otherwise."""

    def send(pid, number=signal.SIGKILL, group=False):
        try:
            (os.killpg if group else os.kill)(pid, number)
        except ProcessLookupError:
            return False
        return True

    return send
