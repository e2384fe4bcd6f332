"""Trackers hear of a study while it runs, once of each trial; they may be missing, slow or broken, and the study goes on."""

import contextlib
import json
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from search.problem.trial import TrialSpec
from search.publishing import tracking as tracked
from search.publishing.trackers import TRACKERS, Entry
from search.publishing.tracking import TRACKED, StudyTracking
from search.results.study_result import StudyResult
from search.spec.errors import StudyFileError
from search.spec.study import parse_study
from uipe_core.errors import UserError


@pytest.fixture
def with_tracking(copied):
    """Opens a copy of the finished study whose file names these trackers."""

    def make(**section):
        record = json.loads((copied / "study.json").read_text())
        record["spec"]["tracking"] = {"mlflow": None, "wandb": None, "trackio": None, **section}
        (copied / "study.json").write_text(json.dumps(record))
        return StudyResult.open(copied)

    return make


class Recorder:
    """A tracker that notes what it hears, and fails where it is told to."""

    made = ()

    def __init__(self, section, study, run):
        self.section, self.study, self.run = section, study, run or f"run {len(Recorder.made) + 1}"
        self.entries, self.finished, self.ended = [], [], None
        if self.section.experiment == "broken from the start":
            raise ConnectionError("no server at https://me:secret@host\nmore")
        Recorder.made = (*Recorder.made, self)

    def log(self, entry):
        if self.section.experiment == "slow":
            self.released.wait(10)
        if self.section.experiment == "broken at the third" and len(self.entries) == 2:
            raise RuntimeError("the disk is full")
        self.entries.append(entry)

    def finish(self, front, numbers, report):
        self.finished.append((front, numbers, report))

    def close(self, ended):
        self.ended = ended


@pytest.fixture
def recorder(monkeypatch):
    Recorder.made, Recorder.released = (), threading.Event()
    monkeypatch.setitem(TRACKERS, "mlflow", Recorder)
    yield Recorder
    Recorder.released.set()


def track(result, said, finish=True):
    with StudyTracking(result.store, said.append) as tracking:
        if finish:
            tracking.finish(result)
    return tracking


def test_every_trial_is_handed_over_once_with_what_was_measured(with_tracking, recorder):
    said, result = [], with_tracking(mlflow={"uri": "sqlite:///x.db", "experiment": None})
    track(result, said)
    (run,) = recorder.made
    names = [entry.name for entry in run.entries]
    assert names == [f"trial {n}" for n in result.trials["trial"]] + [f"control {n}" for n in result.controls["trial"]]
    first = run.entries[0]
    row = result.trials.iloc[0]
    assert first.point["base"] == row["base"] and first.point["alpha"] == row["alpha"] and first.state == "complete"
    assert first.numbers["model_utility"] == row["model_utility"] and "components/Prob Retain" in first.numbers
    ((front, numbers, report),) = run.finished
    assert [row["trial"] for row in front] == list(result.front["trial"]) and report == result.report_path
    assert numbers["hypervolume/front"] == result.hypervolume["front"] and run.ended == "finished" and said == []


def test_a_later_run_of_the_study_goes_on_in_the_same_run(with_tracking, recorder):
    said, result = [], with_tracking(mlflow={"uri": "sqlite:///x.db", "experiment": None})
    with StudyTracking(result.store, said.append):
        pass
    with StudyTracking(result.store, said.append) as tracking:
        tracking.ended(TrialSpec("search", "npo", 1, 0.5), 99, "failed", {"base": "npo", "reason": "it broke"})
        tracking.ended(TrialSpec("search", "npo", 1, 0.5), 99, "failed", {"base": "npo", "reason": "it broke"})
    first, second = recorder.made
    assert second.run == first.run
    (entry,) = second.entries
    assert (entry.name, entry.state, entry.point["reason"]) == ("trial 99", "failed", "it broke")
    other = with_tracking(mlflow={"uri": "sqlite:///other.db", "experiment": None})
    track(other, said)
    assert recorder.made[2].run != first.run and len(recorder.made[2].entries) == len(first.entries)


@pytest.mark.parametrize("content", ["", "[", "[1]", '{"mlflow": 3}', '{"mlflow": {"trials": 5}}', "\udc80"])
def test_a_damaged_note_of_earlier_runs_begins_anew(with_tracking, recorder, content):
    result = with_tracking(mlflow={"uri": None, "experiment": None})
    (result.out / TRACKED).write_bytes(content.encode(errors="surrogateescape"))
    track(result, [])
    assert len(recorder.made[0].entries) == len(result.trials) + len(result.controls)


@pytest.mark.parametrize(
    ("experiment", "reason"),
    [
        ("broken from the start", "ConnectionError: no server at https://me:***@host"),
        ("broken at the third", "RuntimeError: the disk is full"),
    ],
)
def test_a_tracker_that_fails_costs_one_warning(with_tracking, recorder, experiment, reason):
    said = []
    track(with_tracking(mlflow={"uri": None, "experiment": experiment}), said)
    assert said == [f"tracking.mlflow: {reason}; the study goes on without it"]


def test_a_tracker_that_hangs_holds_the_end_up_for_a_while_only(with_tracking, recorder, monkeypatch):
    monkeypatch.setattr(tracked, "WAIT_SECONDS", 0.1)
    said = []
    track(with_tracking(mlflow={"uri": None, "experiment": "slow"}), said)
    assert said == ["tracking: mlflow did not take everything within 0 s; the same command sends the rest"]


def test_a_package_that_is_not_there_costs_one_warning(with_tracking, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    said = []
    track(with_tracking(trackio={"project": "p"}), said)
    assert len(said) == 1 and said[0].startswith("tracking.trackio: ModuleNotFoundError: ")


@pytest.mark.parametrize(("error", "ended"), [(KeyboardInterrupt, "interrupted"), (UserError, "failed")])
def test_a_study_that_ends_early_says_so(with_tracking, recorder, error, ended):
    result = with_tracking(mlflow={"uri": None, "experiment": None})
    with pytest.raises(error), StudyTracking(result.store, print):
        raise error
    assert recorder.made[0].ended == ended


def test_a_study_without_trackers_starts_nothing(result):
    before = threading.active_count()
    with StudyTracking(result.store, print) as tracking:
        tracking.finish(result)
        assert threading.active_count() == before
    assert not (result.out / TRACKED).exists()


def test_evidence_is_sorted_into_what_a_trial_is_and_what_was_measured():
    entry = Entry.of(True, 4, "pruned", {"kind": "initial", "alpha": 0.5, "x": float("nan"), "flagged": True, "t": {"a": 1}})
    assert (entry.name, entry.point, entry.numbers) == (
        "control 4",
        {"kind": "initial", "alpha": 0.5, "flagged": True},
        {"t/a": 1.0},
    )


class TestSection:
    def study(self, write_study, tmp_path, **tracking):
        import yaml

        return yaml.safe_load(write_study(tmp_path / "study.yaml", tracking=tracking).read_text())

    def test_trackers_make_no_other_study(self, write_study, tmp_path):
        spec = parse_study(self.study(write_study, tmp_path, mlflow={}, wandb={"project": "p"}), tmp_path)
        plain = self.study(write_study, tmp_path)
        del plain["tracking"]
        assert spec.fingerprint_payload() == parse_study(plain, tmp_path).fingerprint_payload()
        assert spec.tracking.wandb.project == "p" and spec.tracking.trackio is None

    @pytest.mark.parametrize(
        ("given", "read"),
        [
            ("runs", "{}/runs"),
            ("sqlite:///x.db", "sqlite:///x.db"),
            ("http://host:5000", "http://host:5000"),
            ("databricks",) * 2,
        ],
    )
    def test_a_folder_of_mlflow_is_found_from_the_study_file(self, write_study, tmp_path, given, read):
        spec = parse_study(self.study(write_study, tmp_path, mlflow={"uri": given}), tmp_path)
        assert spec.tracking.mlflow.uri == read.format(tmp_path)

    @pytest.mark.parametrize(
        ("section", "said"),
        [
            ({"mlflow": {"uri": "https://me:secret@host"}}, "MLFLOW_TRACKING_USERNAME"),
            ({"mlflow": {"url": "x"}}, "uri"),
            ({"comet": {}}, "tracking.comet"),
            ({"wandb": "p"}, "tracking.wandb"),
            ({"trackio": {"project": ""}}, "tracking.trackio.project"),
        ],
    )
    def test_what_is_wrong_is_named(self, write_study, tmp_path, section, said):
        with pytest.raises(StudyFileError) as caught:
            parse_study(self.study(write_study, tmp_path, **section), tmp_path)
        assert said in str(caught.value) and "secret" not in str(caught.value)

    def test_validate_names_the_package_that_is_missing(self, write_study, tmp_path, call, monkeypatch):
        monkeypatch.setattr("search.spec.runtime.find_spec", lambda name: None)
        code, _, error = call("validate", write_study(tmp_path / "study.yaml", tracking={"wandb": {}}))
        assert code == 2 and "tracking.wandb" in error and "pip install 'uipe-search[wandb]'" in error.replace("\n", " ")


@pytest.mark.slow
class TestReal:
    """The packages themselves, without a server."""

    def test_mlflow_has_a_run_with_a_nested_run_per_trial(self, with_tracking, tmp_path, monkeypatch):
        mlflow = pytest.importorskip("mlflow", reason="pip install 'uipe-search[mlflow]'")
        monkeypatch.chdir(tmp_path)
        place = f"sqlite:///{tmp_path}/runs.db"
        said, result = [], with_tracking(mlflow={"uri": place, "experiment": "forgetting"})
        for _ in range(2):
            track(result, said)
        assert said == []
        client = mlflow.MlflowClient(place)
        runs = client.search_runs([client.get_experiment_by_name("forgetting").experiment_id], max_results=1000)
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        nested = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
        assert len(nested) == len(runs) - 1 == len(result.trials) + len(result.controls)
        row = result.trials.iloc[1]
        trial = nested[f"trial {row['trial']}"]
        assert trial.data.metrics["model_utility"] == pytest.approx(row["model_utility"])
        assert (trial.data.params["base"], float(trial.data.params["alpha"])) == (row["base"], row["alpha"])
        assert {run.info.status for run in runs} == {"FINISHED"}
        assert parent.data.metrics["hypervolume/front"] == pytest.approx(result.hypervolume["front"])
        front = json.loads(Path(client.download_artifacts(parent.info.run_id, "front.json", str(tmp_path))).read_text())
        assert [dict(zip(front["columns"], each, strict=True))["trial"] for each in front["data"]] == list(
            result.front["trial"]
        )
        report = Path(client.download_artifacts(parent.info.run_id, "report/report.html", str(tmp_path)))
        assert report.read_bytes() == result.report_path.read_bytes()

    def test_wandb_writes_an_offline_run(self, with_tracking, monkeypatch):
        pytest.importorskip("wandb", reason="pip install 'uipe-search[wandb]'")
        monkeypatch.setenv("WANDB_MODE", "offline")
        said, result = [], with_tracking(wandb={"project": "forgetting"})
        track(result, said)
        (file,) = result.out.glob("wandb/offline-run-*/*.wandb")
        content = file.read_bytes()
        assert said == [] and b"forgetting" in content and b"model_utility" in content and b"report.html" in content

    def test_wandb_without_a_login_is_not_asked_for_one(self, with_tracking, monkeypatch, tmp_path):
        pytest.importorskip("wandb", reason="pip install 'uipe-search[wandb]'")
        for name in ("WANDB_MODE", "WANDB_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        said = []
        track(with_tracking(wandb={"project": None}), said)
        (sentence,) = said
        assert sentence.startswith(
            "tracking.wandb: no login of wandb; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=off"
        )

    def test_trackio_has_a_step_per_trial(self, with_tracking, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        trackio = pytest.importorskip("trackio", reason="pip install 'uipe-search[trackio]'")
        said, result = [], with_tracking(trackio={"project": "forgetting"})
        track(result, said)
        assert said == []
        assert capsys.readouterr().out == ""
        (run,) = trackio.Api().runs("forgetting")
        assert run.name.startswith("tiny-")
        with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "forgetting.db")) as database:
            steps = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
        assert [step["name"] for step in steps[:-1]] == [
            *(f"trial {number}" for number in result.trials["trial"]),
            *(f"control {number}" for number in result.controls["trial"]),
        ]
        assert steps[0]["model_utility"] == pytest.approx(result.trials.iloc[0]["model_utility"])
        assert [row["trial"] for row in steps[-1]["front"]["_value"]] == list(result.front["trial"])
        kept = [path.read_bytes() for path in (tmp_path / "trackio" / "artifacts").rglob("blobs/**/*") if path.is_file()]
        assert result.report_path.read_bytes() in kept

    def test_a_run_of_the_command_is_tracked_while_it_runs(self, finished, launch, tmp_path):
        mlflow = pytest.importorskip("mlflow", reason="pip install 'uipe-search[mlflow]'")
        place = f"sqlite:///{tmp_path}/runs.db"
        out = shutil.copytree(finished.out, tmp_path / "more", ignore=shutil.ignore_patterns("ray"))
        driver = launch(
            "run", finished.file, "--out", out, "--trials", 7, "--set", f"tracking={{mlflow: {{uri: '{place}'}}}}", "--json"
        )
        assert driver.wait(600) == 0, driver.stderr
        assert "tracking" not in driver.stderr
        client = mlflow.MlflowClient(place)
        runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=1000)
        result = StudyResult.open(out)
        names = {run.info.run_name for run in runs}
        assert names >= {f"trial {number}" for number in result.trials["trial"]} | {"tiny"}
        assert len(result.trials) == len(StudyResult.open(finished.out).trials) + 2
