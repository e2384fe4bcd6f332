"""Trials that run while base runs still train, and a base run whose worker is killed."""

import contextlib
import json
import os
import signal
import sqlite3
from collections import Counter

import pytest

from search.results.study_result import StudyResult

TRIALS = 16


def complete(out):
    """Search trials that are complete, read beside the driver that writes them."""
    if not (out / "study.db").is_file():
        return 0
    query = "SELECT COUNT(*) FROM trials JOIN studies USING (study_id) WHERE study_name = 'streams' AND state = 'COMPLETE'"
    with contextlib.closing(sqlite3.connect(f"file:{out / 'study.db'}?mode=ro", uri=True, timeout=30)) as database:
        try:
            return database.execute(query).fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def entries(deltas):
    """What is published in the delta store, by what would change if it were written again."""
    files = [path for path in deltas.glob("*/*") if path.parent.name not in ("locks", "tmp")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files if path.is_file()}


def published(deltas):
    return sorted(path.parent.name for path in entries(deltas) if path.name == "manifest.json")


@pytest.mark.slow
def test_trials_run_while_base_runs_train_and_a_killed_one_is_trained_again_alone(
    finished, write_study, launch, living_processes, tmp_path
):
    deltas, out = tmp_path / "deltas", tmp_path / "out"
    file = write_study(
        tmp_path / "streams.yaml",
        name="streams",
        cache={"deltas": str(deltas)},
        # Base runs that last some seconds, and no points at alpha = 0, of which there would be 240.
        unlearning={
            "methods": {"grad_diff": {"retain_weight": [1, 2]}, "npo": {"beta": [1, 2]}},
            "epochs": 60,
            "batch_size": 1,
        },
        scoring={"temperatures": []},
        search={"alpha": {"low": 0.5, "high": 2}, "trials": TRIALS},
    )
    driver = launch("run", file, "--out", out)
    driver.until(lambda: complete(out), 300)
    assert 1 <= len(published(deltas)) < 4
    before = entries(deltas)
    trainers = [pid for pid, command in living_processes(driver.tag).items() if command.startswith("ray::train_and_publish")]
    assert len(trainers) == 1
    os.kill(trainers[0], signal.SIGKILL)
    assert driver.wait(600) == 0, driver.stderr

    assert len(published(deltas)) == 4
    after = entries(deltas)
    assert {path: after[path] for path in before} == before
    assert not (deltas / "quarantine").exists()
    assert list((deltas / "tmp").iterdir()) == []
    result = StudyResult.open(out)
    assert result.store.counts() == {"complete": TRIALS, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert result.store.record.failed_base_runs == {}
    # Trials ran before the last base run was there, and of each that was there no more than its share.
    last = max(when for path, (_, when) in after.items() if path.name == "manifest.json") / 1e9
    early = [trial.params["base"] for trial in result.study.trials if trial.datetime_start.timestamp() < last]
    assert early
    assert max(Counter(early).values()) <= TRIALS // 4


@pytest.mark.slow
def test_a_base_run_that_fails_ends_its_own_points_and_not_the_study(finished, write_study, call, tmp_path):
    # One that the shared study has trained, and one that cannot end well.
    unlearning = {"methods": {"npo": {"beta": 1}}, "learning_rate": [0.002, 1e30]}
    file = write_study(tmp_path / "study.yaml", unlearning=unlearning, search={"trials": 3}, scoring={"temperatures": []})
    good, bad = "npo[learning_rate=0.002]", "npo[learning_rate=1e+30]"
    code, output, error = call("run", file, "--out", tmp_path / "out", "--json")
    assert code == 0, error
    assert f"failed: base run {bad}: " in error
    result = StudyResult.open(tmp_path / "out")
    assert json.loads(output)["trials"] == {"complete": 2 + 3, "pruned": 0, "failed": 2, "interrupted": 0, "running": 0}
    assert set(result.trials["base"]) == {good}
    assert all(failure["reason"].startswith(f"base run {bad} failed: ") for failure in result.store.failures())
    assert set(result.store.record.failed_base_runs) == {bad}
    assert set(result.store.record.base_runs) == {good}
    kept = (tmp_path / "out" / "errors" / f"base-run-{bad}.txt").read_text()
    assert "DivergedError" in kept and "train_base_run" in kept
    assert kept in call("logs", tmp_path / "out")[1]


@pytest.mark.slow
def test_a_study_none_of_whose_base_runs_can_be_trained_ends_with_the_reason(finished, write_study, call, tmp_path):
    unlearning = {"methods": {"npo": {"beta": 1}}, "learning_rate": 1e30}
    file = write_study(tmp_path / "study.yaml", unlearning=unlearning, search={"trials": 3}, scoring={"temperatures": []})
    code, _, error = call("run", file, "--out", tmp_path / "out")
    assert code == 2
    assert "npo: " in error.splitlines()[-1] and "finite" in error
