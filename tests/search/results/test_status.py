"""How far a study is, from its folder and from the log of its driver."""

import json
import sys
import threading
import time
from contextlib import closing
from datetime import datetime, timedelta

import pytest
from filelock import FileLock

from search.cli.tables import print_stop
from search.evaluation.prepared import prepare
from search.problem.trial import TrialSpec
from search.report.progress import Bars
from search.results.status import PREFIX, StatusLines, is_running, last_status, read_status, status_of, without_status
from search.results.study_result import StudyResult
from search.spec.study import load_study
from search.store.study_store import StudyStore

BASE = ("grad_diff", 1)


def score(store, evidence, alpha, kind="search", **values):
    """A complete trial."""

    params = {"base": BASE[0], "epoch": BASE[1], "alpha": alpha} if kind == "alpha_zero" else None
    number, job = store.ask_point(store.spec.search_space(), params)
    store.complete(job, number, evidence(job, **values))
    return number


@pytest.fixture
def begun(new_store, made_up_evidence):
    """A study with the initial model, one point at alpha = 0 and two search trials scored, one running and one failed."""

    store = new_store()
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, log10_forget_quality=-9.0, model_utility=0.6))
    score(store, made_up_evidence, 0.0, kind="alpha_zero", log10_forget_quality=-5.0, model_utility=0.5)
    score(store, made_up_evidence, 0.5, log10_forget_quality=-2.0, model_utility=0.4)
    score(store, made_up_evidence, 1.0, log10_forget_quality=-1.0, model_utility=0.1)
    space = store.spec.search_space()
    number, job = store.ask_point(space)
    store.fail(job, number, "broken")
    store.ask_point(space)
    return store


def test_an_unfinished_study_tells_counts_front_and_hypervolume(begun):
    status = status_of(begun)
    assert status["state"] == "unfinished"
    assert status["trials"] == {"done": 3, "total": 4 + 5, "running": 1, "failed": 1, "interrupted": 0, "pruned": 0}
    assert status["front"] == 3
    assert status["hypervolume"]["now"] > status["hypervolume"]["given"] > 0
    assert status["expected_end"] is None
    json.dumps(status, allow_nan=False)


def test_interrupted_trials_are_no_failures_for_status_and_terminal(begun, capsys):
    begun.fail_orphaned_trials()
    assert status_of(begun)["trials"] == {"done": 3, "total": 9, "running": 0, "failed": 1, "interrupted": 1, "pruned": 0}
    print_stop(StudyResult.of(begun))
    printed = capsys.readouterr().out
    assert "interrupted trials: 1, by the end of a run; the same command makes up for them" in printed
    assert "failed trials: 1\n  1 x broken" in printed


def test_usage_comes_from_the_record_and_is_nothing_where_nobody_kept_it(begun):
    begun.add_seconds("trials", 1800)
    assert (status_of(begun)["gpu_hours"], status_of(begun)["hours"]) == (0.0, 0.5)
    begun.record.set_usage({"gpu_hours": 3.25, "hours": 1.5})
    assert (status_of(begun)["gpu_hours"], status_of(begun)["hours"]) == (3.25, 1.5)


def test_the_expected_end_is_the_missing_trials_at_the_pace_of_the_latest(new_store, made_up_evidence):

    store = new_store()
    space = store.spec.search_space()
    asked = [store.ask_point(space) for _ in range(4)]
    time.sleep(0.3)
    for number, job in asked[:2]:
        store.complete(job, number, made_up_evidence(job))
    # 4 points at alpha = 0 and 3 of 5 search trials are missing; 2 run at once; each takes 0.3 s or more.
    status = status_of(store, "running")
    left = datetime.fromisoformat(status["expected_end"]) - datetime.fromisoformat(status["updated"])
    assert timedelta(0) <= left <= timedelta(seconds=20)
    mean = sum(trial.duration.total_seconds() for trial in store.study.get_trials(deepcopy=False)[:2]) / 2
    assert abs(left.total_seconds() - mean * 7 / 2) <= 1
    assert status_of(store)["expected_end"] is None  # nobody is at work


def test_a_study_without_trials_has_no_front(new_store):
    status = status_of(new_store(), "running", {"unlearning: npo": (1, 4)})
    assert (status["front"], status["hypervolume"], status["expected_end"]) == (None, None, None)
    assert status["progress"] == {"unlearning: npo": [1, 4]}


def test_a_finished_study_says_so_on_the_command_line(finished, call):
    code, output, error = call("status", finished.out)
    assert (code, error) == (0, "")
    assert "state         finished\n" in output
    assert "trials        9 of 9 done, 0 running, 0 failed\n" in output
    status = json.loads(call("status", finished.out, "--json")[1])
    assert status["state"] == "finished"
    assert status["trials"]["done"] == status["trials"]["total"] == 9
    assert status["hypervolume"]["now"] >= status["hypervolume"]["given"]


def test_a_held_lock_means_a_driver_is_at_work(begun):
    assert is_running(begun.out)
    assert read_status(begun.out)["state"] == "running"
    begun.close()
    assert not is_running(begun.out)
    assert read_status(begun.out)["state"] == "unfinished"


def test_a_look_at_the_status_keeps_no_driver_out(begun, new_store):
    begun.close()
    look = FileLock(begun.out / ".lock", thread_local=False)
    look.acquire()
    threading.Timer(0.3, look.release).start()
    new_store(out=begun.out)  # waits a moment, and opens


def test_all_studies_of_runs_when_none_is_named(finished, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("status")[0] == 2
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(finished.out)
    assert json.loads(call("status", "--json")[1])["studies"][0]["trials"]["done"] == 9
    assert "finished" in call("status")[1]


def test_a_folder_without_a_study_is_refused(call, tmp_path):
    code, _, error = call("status", tmp_path)
    assert code == 2
    assert "not a study folder" in error


def test_a_run_by_hand_is_told_in_words_only(finished):
    assert PREFIX not in finished.stderr
    assert "writing the report" in finished.stderr


def test_the_driver_of_a_job_tells_its_status_in_its_log(copied, finished, capsys):
    preparation = prepare(load_study(finished.file))
    store = StudyStore.create(copied, preparation.spec, preparation.fingerprint, preparation.facts())
    with closing(store), StatusLines(store, (bars := Bars()).under_way, wanted=True):
        bars.say("writing the report")
    log = capsys.readouterr().err
    told = [json.loads(line.removeprefix(PREFIX)) for line in log.splitlines() if line.startswith(PREFIX)]
    assert [each["state"] for each in told] == ["running", "finished"]
    assert told[-1]["trials"]["done"] == 9
    assert last_status(log) == told[-1]
    assert PREFIX not in without_status(log)
    assert "writing the report" in without_status(log)


def test_a_log_that_ends_in_the_middle_of_a_line_has_the_status_before():
    log = f'{PREFIX}{{"state":"running"}}\nwords\n{PREFIX}{{"sta'
    assert last_status(log) == {"state": "running"}
    assert last_status("words\n") is None
    assert without_status(log) == "words\n"
    assert without_status("(raylet) died\n    [state-dump] 1 total\nnext\n") == "(raylet) died\nnext\n"


def test_a_storage_that_is_away_costs_a_line_and_nothing_else(begun, capsys, monkeypatch):
    monkeypatch.setattr(type(begun), "trials", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
    with StatusLines(begun, Bars().under_way, wanted=True):
        pass
    assert PREFIX not in capsys.readouterr().err


def test_only_a_job_that_is_not_quiet_tells_it(begun, capsys):
    for bars, job in ((Bars(quiet=True), True), (Bars(), False)):
        with StatusLines(begun, bars.under_way, job and bars.plain):
            pass
    assert capsys.readouterr().err == ""
    assert not sys.stderr.isatty()
    with pytest.raises(RuntimeError), StatusLines(begun, Bars().under_way, wanted=True):
        raise RuntimeError
    assert last_status(capsys.readouterr().err)["state"] == "unfinished"
