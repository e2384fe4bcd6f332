"""What a study keeps when its processes are really killed, and when it is interrupted."""

import contextlib
import os
import shutil
import signal
import sqlite3
import time
from datetime import datetime, timedelta
from itertools import accumulate

import pytest

from search.execution.run import run_study
from search.results.recipe import read_recipe
from search.results.study_result import StudyResult
from search.spec.study import load_study

OBJECTIVES = ("log10_forget_quality", "model_utility")

GIVEN, SEARCHED = 4, 40


def trials(out, study="tiny"):
    """State of every trial, read from the database beside the driver that writes it."""
    path = out / "study.db"
    if not path.is_file():
        return []
    query = "SELECT t.state FROM trials t JOIN studies s USING (study_id) WHERE s.study_name = ?"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        try:
            return [state for (state,) in database.execute(query, (study,))]
        except sqlite3.OperationalError:
            return []


def complete(out):
    return trials(out).count("COMPLETE")


def values(out):
    frame = StudyResult.open(out).trials.set_index("trial")
    return frame[[*OBJECTIVES, "base", "epoch", "alpha", "seconds"]]


def at_once(out, since):
    """How many trials of the study were being scored at the same time, at most, among those that began after a moment."""
    query = """SELECT t.datetime_complete, json_extract(a.value_json, '$.seconds') FROM trials t JOIN studies s USING (study_id)
        JOIN trial_user_attributes a USING (trial_id)
        WHERE s.study_name = 'tiny' AND t.state = 'COMPLETE' AND a.key = 'evidence'"""
    with contextlib.closing(sqlite3.connect(f"file:{out / 'study.db'}?mode=ro", uri=True, timeout=30)) as database:
        rows = [(datetime.fromisoformat(ended), float(seconds)) for ended, seconds in database.execute(query)]
    spans = [(ended - timedelta(seconds=seconds), ended) for ended, seconds in rows]
    changes = [change for began, ended in spans if began >= since for change in ((began, 1), (ended, -1))]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def scoring_workers(driver, living_processes):
    return [pid for pid, command in living_processes(driver.tag).items() if "Trainable" in command or "ScoringTrial" in command]


@pytest.fixture(scope="session")
def slower_study(finished, write_study):
    """The shared study on the models and base runs that are there, with trials that last long enough to be caught."""
    return write_study(finished.file.parent / "slower.yaml", search={"trials": SEARCHED}, scoring={"batch_size": 2})


def the_rest_is_kept(before, out):
    after = values(out)
    assert after.loc[before.index].equals(before)


def nothing_is_open(out):
    for study in ("tiny", "tiny.controls"):
        assert set(trials(out, study)) <= {"COMPLETE", "FAIL"}


@pytest.mark.slow
def test_killed_drivers_and_workers_lose_only_what_was_running(slower_study, launch, living_processes, tmp_path):
    out = tmp_path / "out"
    command = ("run", slower_study, "--out", out)

    killed = launch(*command)
    killed.until(lambda: complete(out) >= 1)
    os.kill(killed.process.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert "RUNNING" in trials(out)
    first = values(out)

    again = launch(*command)
    again.until(lambda: complete(out) > len(first) + 2)
    workers = again.until(lambda: scoring_workers(again, living_processes))
    assert len(workers) == 2
    # Stopped until the other one has ended three trials, it cannot be between two trials when it is killed.
    os.kill(workers[0], signal.SIGSTOP)
    stopped_at = complete(out)
    again.until(lambda: complete(out) >= stopped_at + 3)
    os.kill(workers[0], signal.SIGKILL)
    again.until(lambda: len(set(scoring_workers(again, living_processes)) - {workers[0]}) == 2)
    # The one that was killed is replaced for good, not by one worker that does it all.
    moment = datetime.now()
    again.until(lambda: at_once(out, moment) == 2)
    assert "the worker died or was killed" in again.stderr
    assert "trials of an interrupted run were closed" in again.stderr
    # As a terminal does: to the driver and everything it started.
    os.killpg(again.process.pid, signal.SIGINT)
    assert again.wait() == 130
    assert "interrupted: what was done is in" in again.stderr
    assert "Traceback" not in again.stderr
    assert again.left_behind() == {}
    nothing_is_open(out)
    the_rest_is_kept(first, out)
    second = values(out)

    last = launch(*command)
    assert last.wait() == 0, last.stderr
    # Ray's agents look for their raylet only now and then, so what a killed driver leaves takes a while to end.
    assert [driver.left_behind() for driver in (last, killed)] == [{}, {}]
    nothing_is_open(out)
    the_rest_is_kept(second, out)
    result = StudyResult.open(out)
    assert result.trials["kind"].value_counts().to_dict() == {"search": SEARCHED, "alpha_zero": GIVEN}
    reasons = [failure["reason"] for failure in result.store.failures()]
    assert result.store.counts()["interrupted"] > 0
    assert all(reason.startswith("the worker died") for reason in reasons)
    assert {trial.number for trial in result.study.best_trials} == set(result.front["trial"])
    moved = set(result.front.loc[result.front["alpha"] != 0, "trial"])
    mirrored = result.controls.loc[result.controls["kind"] == "random_direction", "of_trial"]
    assert moved <= set(mirrored)


def test_a_request_to_end_while_ray_starts_is_heard(slower_study, launch, tmp_path):
    driver = launch("run", slower_study, "--out", tmp_path / "out")
    driver.until(lambda: "starting Ray" in driver.stderr)
    time.sleep(0.3)
    os.kill(driver.process.pid, signal.SIGTERM)
    lost = "sigterm_handler"  # Ray's own, in place while it starts: it may raise where Python swallows it
    while driver.process.poll() is None and lost not in driver.stderr:
        time.sleep(0.1)
    if lost in driver.stderr:
        os.kill(driver.process.pid, signal.SIGTERM)
    assert driver.wait() == 130, driver.stderr
    assert "interrupted: what was done is in" in driver.stderr
    assert "the same command resumes it" in driver.stderr
    assert lost in driver.stderr or "Traceback" not in driver.stderr
    assert driver.left_behind() == {}
    assert (tmp_path / "out" / "study.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "moment"),
    [
        ("SIGINT", "starting Ray"),
        ("SIGKILL", "starting Ray"),
        ("SIGTERM", "scoring: initial"),
        ("SIGINT", "scoring: alpha = 0"),
        ("SIGKILL", "first trial"),
        ("SIGTERM", "half way"),
        ("SIGKILL", "half way"),
        ("SIGINT", "report"),
        ("SIGKILL", "report"),
    ],
)
def test_ended_at_any_moment_a_study_resumes(slower_study, launch, tmp_path, sent, moment):
    out = tmp_path / "out"
    command = ("run", slower_study, "--out", out)
    counts = {"first trial": GIVEN + 1, "half way": GIVEN + SEARCHED // 2}
    driver = launch(*command)
    if moment in counts:
        driver.until(lambda: complete(out) >= counts[moment])
    else:
        driver.until(lambda: moment in driver.stderr, seconds=300)  # the report comes after the whole study
    # Ctrl-C of a terminal reaches everything; a request to end is for the driver, because it would end Ray's processes too.
    (os.kill if sent == "SIGTERM" else os.killpg)(driver.process.pid, getattr(signal, sent))
    assert driver.wait() == (-signal.SIGKILL if sent == "SIGKILL" else 130), driver.stderr
    assert "Traceback" not in driver.stderr
    assert driver.left_behind() == {}
    kept = complete(out)

    again = launch(*command)
    assert again.wait() == 0, again.stderr
    nothing_is_open(out)
    result = StudyResult.open(out)
    assert len(result.trials) == GIVEN + SEARCHED >= kept
    assert result.report_path.is_file()


@pytest.mark.slow
def test_base_runs_cut_off_by_a_kill_are_trained_again_and_not_published_in_part(write_study, launch, tmp_path):
    cache = tmp_path / "own cache"
    file = write_study(
        tmp_path / "study.yaml", cache={"models": str(cache / "models"), "deltas": str(cache / "deltas")}, search={"trials": 2}
    )
    command = ("run", file, "--out", tmp_path / "out")
    for words in ("training: initial model", "unlearning:"):
        driver = launch(*command)
        driver.until(lambda driver=driver, words=words: words in driver.stderr)
        os.killpg(driver.process.pid, signal.SIGKILL)
        driver.wait()
        assert driver.left_behind() == {}
    last = launch(*command)
    assert last.wait() == 0, last.stderr
    assert StudyResult.open(tmp_path / "out").store.counts()["complete"] == GIVEN + 2


def test_a_study_whose_folder_was_lost_goes_on_from_its_database(finished, write_study, tmp_path):
    copied = tmp_path / "kept.db"
    with contextlib.closing(sqlite3.connect(finished.out / "study.db")) as source:
        source.execute("VACUUM INTO ?", (str(copied),))
    spec = load_study(write_study(finished.file.parent / "in-database.yaml", storage=f"sqlite:///{copied}"))
    for _ in range(2):
        # Nothing is missing, so no Ray is started; only the folder is made anew.
        result = run_study(spec, tmp_path / "out", quiet=True)
    before = StudyResult.open(finished.out)
    assert result.front[["trial", "base", "epoch", "alpha", *OBJECTIVES]].equals(
        before.front[["trial", "base", "epoch", "alpha", *OBJECTIVES]]
    )
    assert result.store.record.base_runs == before.store.record.base_runs
    assert not (tmp_path / "out" / "ray").exists()
    row = result.trial(int(result.front["trial"].iloc[0]))
    recipe = read_recipe(result.export(row, tmp_path / "recipe", "recipe") / "recipe.yaml")
    assert recipe.provenance["delta"] == before.store.record.base_runs[recipe.base].delta
    result.store.close()


@pytest.mark.slow
def test_a_study_in_postgresql_whose_folder_was_lost_goes_on_from_it(
    server, finished, place, write_study, launch, tmp_path, monkeypatch
):
    monkeypatch.setenv("UIPE_STORAGE", server.url)  # the password, which no folder keeps

    def run(out, **changes):
        file = write_study(tmp_path / "study.yaml", name="lost", storage=server.url, **changes)
        driver = launch("run", file, "--out", tmp_path / out)
        assert driver.wait() == 0, driver.stderr
        return driver

    def written():
        return {path: path.stat().st_mtime_ns for path in place["cache"].rglob("*.safetensors")}

    run("lost")
    before, updates = values(tmp_path / "lost"), written()
    base_runs = StudyResult.open(tmp_path / "lost").store.record.base_runs
    assert updates and base_runs
    shutil.rmtree(tmp_path / "lost")
    for _ in range(2):
        assert "starting Ray" not in run("new").stderr
        again = StudyResult.open(tmp_path / "new")
        assert again.store.record.base_runs == base_runs
        again.store.close()
        assert values(tmp_path / "new").equals(before)
    # With one more trial, from another empty folder: only that one is scored.
    run("newer", search={"trials": 6})
    the_rest_is_kept(before, tmp_path / "newer")
    assert len(values(tmp_path / "newer")) == len(before) + 1
    assert written() == updates
