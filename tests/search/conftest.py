"""One very small study, really run, shared by the tests of the service; and ways to call the command line."""

import copy
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from driver import Driver, processes_with
from filelock import FileLock
from postgres_server import Server, server_binaries

TINY = {
    "schema_version": 1,
    "name": "tiny",
    "seed": 0,
    "corpus": {"kind": "people", "forget_people": 2, "retain_people": 12, "pretraining_people": 10},
    "model": {
        "kind": "tiny",
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "base": {"epochs": 8, "learning_rate": 0.01, "batch_size": 32},
        "finetune": {"epochs": 15, "learning_rate": 0.01, "batch_size": 16},
        "other_retain_seeds": [5],
    },
    "unlearning": {
        "methods": {"grad_diff": {"retain_weight": 2}, "npo": {"beta": 1}},
        "epochs": 2,
        "learning_rate": 0.002,
        "weight_decay": 0.0,
    },
    "scoring": {"batch_size": 64, "max_new_tokens": 12, "temperatures": [0.67]},
    "split": {"select": 0.5},
    "search": {"alpha": {"low": -1, "high": 2}, "trials": 5, "prune": False},
}
"""Without pruning, so that every trial has values and tests can count them; `test_pruning` has studies with it."""


def merged(data, changes):
    """A copy of a study with some keys changed; sections are merged, everything else replaced."""
    result = copy.deepcopy(data)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        # A union's other kind, or another set of methods, takes the whole section's place.
        replace = both and ("kind" in value or key == "methods")
        result[key] = merged(result[key], value) if both and not replace else value
    return result


@dataclass
class Finished:
    """A study that ran to its end in a process of its own."""

    file: Path
    out: Path
    strays: list[Path]
    cwd: Path
    stdout: str
    stderr: str

    def give_to(self, shared, base, cache):
        """Copies it for other test processes, with what it left in the caches."""
        half = shared.with_name("half")
        copy_files(base / "tiny", half / "tiny")
        copy_files(cache, half / "cache")
        facts = {"base": str(base), "strays": list(map(str, self.strays)), "stdout": self.stdout, "stderr": self.stderr}
        (half / "facts.json").write_text(json.dumps(facts))
        half.rename(shared)

    @classmethod
    def taken_from(cls, shared, base, cache):
        """Copies it from another test process; its paths become those of the copy."""
        facts = json.loads((shared / "facts.json").read_text())
        copy_files(shared / "tiny", base / "tiny")
        copy_files(shared / "cache", cache)
        moved = lambda text: text.replace(facts["base"], str(base))  # noqa: E731
        file, out = base / "tiny" / "studies" / "tiny.yaml", base / "tiny" / "runs" / "tiny"
        (out / "study.json").write_text(moved((out / "study.json").read_text()))
        strays = list(map(Path, facts["strays"]))
        return cls(file, out, strays, base / "tiny" / "io", moved(facts["stdout"]), moved(facts["stderr"]))


def copy_files(source, target):
    """Copies a folder's files, without the sockets and links of Ray's."""
    special = lambda folder, names: [  # noqa: E731
        name for name in names if (path := Path(folder, name)).is_symlink() or not (path.is_file() or path.is_dir())
    ]
    shutil.copytree(source, target, ignore=special, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """An empty home, an empty folder for temporary files, and the caches, for this process and all it starts."""
    root = tmp_path_factory.mktemp("place")
    folders = {name: root / name for name in ("home", "cache")}
    for folder in folders.values():
        folder.mkdir()
    # Short, as such folders are: Ray's sockets are found through it.
    folders["scratch"] = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UIPE_CACHE", str(folders["cache"]))
        # This process may have chosen where these libraries put their files; what it starts shall choose for itself.
        for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "RAY_AUTH_TOKEN", "UIPE_STORAGE"):
            patch.delenv(name, raising=False)
        yield folders
    shutil.rmtree(folders["scratch"], ignore_errors=True)


@pytest.fixture(scope="session")
def environment(place):
    """Environment of a user with an empty home."""
    own = {"HOME": place["home"], "TMPDIR": place["scratch"], "UIPE_CACHE": place["cache"], "COLUMNS": "200"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TUNE_", "XDG_", "MPL", "TORCHIND"))}
    return {**kept, **{key: str(value) for key, value in own.items()}}


@pytest.fixture(scope="session")
def driver_class():
    """`Driver`, for a command in another environment."""
    return Driver


@pytest.fixture
def launch(environment, tmp_path):
    """Starts the `uipe` command, with more variables in its environment; all it started is killed after the test."""
    started = []

    def start(*arguments, **variables):
        started.append(Driver(arguments, tmp_path, {**environment, **variables}))
        return started[-1]

    yield start
    for driver in started:
        driver.clean_up()


@pytest.fixture(scope="session")
def run_command(environment, tmp_path_factory):
    """Runs the `uipe` command to its end; returns what it printed."""

    def run(*arguments):
        driver = Driver(arguments, tmp_path_factory.mktemp("io"), environment)
        try:
            code = driver.wait(300)
        finally:
            driver.clean_up()
        assert code == 0, driver.stderr
        return driver.stdout

    return run


@pytest.fixture(scope="session")
def living_processes():
    """Finds the processes of a run by its tag."""
    return processes_with


@pytest.fixture(scope="session")
def write_study():
    """Writes the tiny study, with changes, to a file."""

    def write(path, **changes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(merged(TINY, changes), sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def finished(place, environment, write_study, tmp_path_factory):
    """The tiny study, run once by the command. Of several test processes the first runs it, the others take copies."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return run_tiny(place, environment, write_study, base)
    shared = base.parent / "finished"
    with FileLock(f"{shared}.lock"):
        if shared.exists():
            return Finished.taken_from(shared, base, place["cache"])
        study = run_tiny(place, environment, write_study, base)
        study.give_to(shared, base, place["cache"])
        return study


def run_tiny(place, environment, write_study, base):
    """Run the tiny study in ``base/tiny``."""
    (base / "tiny" / "io").mkdir(parents=True)
    file, out = write_study(base / "tiny" / "studies" / "tiny.yaml"), base / "tiny" / "runs" / "tiny"
    driver = Driver(["run", file, "--out", out, "--json"], base / "tiny" / "io", environment)
    try:
        code = driver.wait(300)
    finally:
        driver.clean_up()
    assert code == 0, driver.stderr
    strays = [path for name in ("home", "scratch") for path in place[name].rglob("*")]
    return Finished(file, out, strays, driver.folder, driver.stdout, driver.stderr)


@pytest.fixture(scope="session")
def result(finished):
    """Its results, as Python sees them."""
    from search.results.study_result import StudyResult

    return StudyResult.open(finished.out)


@pytest.fixture(scope="session")
def preparation(finished):
    """What identifies that study."""
    from search.evaluation.prepared import prepare
    from search.spec.study import load_study

    return prepare(load_study(finished.file))


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL server."""
    binaries = server_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server (initdb, pg_ctl) is not installed; apt-get install postgresql")
    running = Server(binaries)
    yield running
    running.remove()


@pytest.fixture(scope="session")
def study_context(finished, preparation):
    """What the workers of that study know."""
    from search.evaluation.evaluator import StudyContext
    from uipe_core.logs.tofu import read_log
    from uipe_core.models.tiny import tiny_model

    folder = tiny_model(preparation.models.config, preparation.corpus, "full", preparation.models.store)
    return StudyContext(
        corpus=preparation.corpus,
        split=preparation.split,
        source=preparation.models.source("initial", str(folder)),
        deltas=preparation.delta_root,
        references={
            model.name: read_log(finished.out / "logs" / f"{model.name}.json") for model in preparation.models.references()
        },
        scoring=preparation.scoring,
        definition="tofu",
        objectives=preparation.spec.maximised,
        seed=0,
        threads=1,
    )


@pytest.fixture(scope="session")
def with_delta(preparation):
    """A job as the driver hands it out: with the entries of the delta store that hold its base run."""
    from uipe_core.deltas.store import DeltaStore

    deltas = DeltaStore(preparation.delta_root)
    runs = {
        run.label: deltas.find(preparation.base_run_inputs(preparation.unlearning(run))) for run in preparation.spec.variants()
    }
    return lambda job: replace(job, delta=runs[job.base].keys if job.base in runs else ())


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished study, to be changed."""
    # Ray's folder holds sockets, which cannot be copied.
    return Path(shutil.copytree(finished.out, tmp_path / "copied", ignore=shutil.ignore_patterns("ray")))


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Runs the command line in this process: exit code, standard output, standard error."""
    from search.cli import main as cli

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["uipe", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def new_store(tmp_path):
    """Opens an empty study of the tiny kind, without running anything."""
    from search.spec.study import parse_study
    from search.store.study_store import StudyStore

    opened = []

    def make(out=None, identity="f" * 32, **changes):
        spec = parse_study(merged(TINY, changes))
        facts = {
            "corpus": {
                "name": "people",
                "hash": "0",
                "sets": {},
                "items": {"select": {"forget": 16, "related": 16}},
                "groups": {"forget": ["a", "b"] * 8},
            },
            "models": {"initial": "a", "retain": "b"},
            "versions": {},
        }
        opened.append(StudyStore.create(out or tmp_path / "out", spec, identity, facts))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture(scope="session")
def made_up_evidence():
    """Evidence as a worker returns it, with made-up numbers."""

    def make(job, log10_forget_quality=-5.0, model_utility=0.5, **more):
        from search.problem.space import Point
        from search.problem.trial import TrialSpec

        assert isinstance(job, TrialSpec)
        return {
            "kind": job.kind,
            "base": job.base,
            "method": job.base,
            "epoch": job.epoch,
            "alpha": job.alpha,
            "walk": None if job.base is None else Point(job.base, job.epoch, job.alpha).walk,
            "of_trial": job.of_trial,
            "definition": "tofu",
            "log10_forget_quality": log10_forget_quality,
            "forget_quality": 10.0**log10_forget_quality,
            "ks_statistic": 0.5,
            "model_utility": model_utility,
            "components": {"Retain Prob": 0.5},
            "forget_components": {"Forget Prob": 0.5},
            "logit_scale": 1.0,
            "flagged": False,
            "dtype": "float32",
            "device": "cpu",
            "seconds": 0.1,
            **more,
        }

    return make
