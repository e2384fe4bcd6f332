"""The doctor on really damaged copies of a real study: what is found, what is repaired, what is left alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from optuna.trial import TrialState

from search.problem.space import Point
from search.problem.trial import TrialSpec
from search.store.checks import ADVICE, FIXED, OK, PROBLEM
from search.store.doctor import examine
from search.store.study_store import StudyStore
from uipe_core.errors import UserError
from uipe_core.storage.content_store import ContentStore


@pytest.fixture
def ill(copied, place, tmp_path, monkeypatch):
    """A copy of the finished study with caches of its own, to be damaged."""
    cache = tmp_path / "cache"
    # Without what the killed makers of other tests have left there.
    shutil.copytree(place["cache"] / "deltas", cache / "deltas", ignore=shutil.ignore_patterns("tmp"))
    monkeypatch.setenv("UIPE_CACHE", str(cache))
    return copied


def by_state(findings, *states):
    return [finding for finding in findings if finding.state in states]


def deltas():
    return ContentStore(Path(os.environ["UIPE_CACHE"]) / "deltas")


def entry_of(out, label):
    return deltas().root / json.loads((out / "study.json").read_text())["base_runs"][label]["delta"]


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sound_study_has_no_problem_and_is_left_as_it_was(ill, call):
    before = content_of(ill / "items") | content_of(deltas().root)
    code, output, _ = call("doctor", ill, "--json")
    found = json.loads(output)
    assert (code, found["remaining"]) == (0, 0)
    assert {"lock", "record", "trials", "item scores", "base runs", "cache", "repeats", "failures", "disk"} <= {
        finding["check"] for finding in found["findings"]
    }
    assert all(finding["state"] in (OK, ADVICE) for finding in found["findings"])
    assert content_of(ill / "items") | content_of(deltas().root) == before


def test_everything_broken_at_once_is_found_and_then_repaired(ill, call):
    store = StudyStore.open(ill)
    orphan, _ = store.ask_point(store.spec.search_space())
    control = store.ask_control(TrialSpec("initial"))
    items = ill / "items" / "trials"
    damaged = items / "00001.npz"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    (items / "00999.npz").write_bytes(b"")
    (items / ".00003.npz.0123abcd.tmp").write_bytes(b"half")
    flipped = entry_of(ill, "npo") / "epoch-001.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    left = deltas().root / "tmp" / ("a" * 32)
    left.mkdir(parents=True)
    (left / "epoch-001.safetensors").write_bytes(b"half")
    (ill / "ray" / "session_2026").mkdir(parents=True)
    (ill / "ray" / "session_latest").symlink_to("session_2026")
    (ill / "ray" / "session_2026" / "log").write_text("log")

    code, output, _ = call("doctor", ill)
    assert code == 1
    assert f"uipe doctor {ill} --fix" in output
    found = examine(ill, fix=False)
    told = " ".join(finding.found for finding in by_state(found, PROBLEM))
    for words in (
        "2 trials are RUNNING",
        "1 files are damaged, first 00001.npz",
        "2 files belong to no",
        "npo: epoch-001",
        "1 unfinished",
    ):
        assert words in told
    assert flipped.is_file() and left.is_dir() and damaged.is_file()
    assert store.study.trials[orphan].state == TrialState.RUNNING

    code, output, _ = call("doctor", ill, "--fix", "--json")
    repaired = json.loads(output)
    assert (code, repaired["remaining"]) == (0, 0)
    assert len([finding for finding in repaired["findings"] if finding["state"] == FIXED]) == 6
    store = StudyStore.open(ill)
    for study, number in ((store.study, orphan), (store.controls, control)):
        assert study.trials[number].state == TrialState.FAIL and "interrupted" in study.trials[number].user_attrs["reason"]
    assert not damaged.exists() and not left.exists() and not any((ill / "ray").iterdir())
    assert [path.name.partition(".")[0] for path in (deltas().root / "quarantine").iterdir()] == [flipped.parent.name]

    again = examine(ill, fix=False)
    assert by_state(again, PROBLEM) == []
    told = " ".join(finding.found for finding in by_state(again, ADVICE))
    assert "1 complete trials have none, first trials/1" in told
    assert "npo: not in the cache" in told
    assert "2 failed: interrupted" in told


def test_nothing_of_a_study_at_work_is_touched(ill, call):
    store = StudyStore.open(ill)
    running, _ = store.ask_point(store.spec.search_space())
    stray = ill / "items" / "trials" / "00999.npz"
    stray.write_bytes(b"")
    (ill / "items" / "trials" / f"{running:05d}.npz").write_bytes(b"being told")
    with FileLock(ill / ".lock"):
        found = examine(ill, fix=True)
        assert "under way" in found[0].found
        assert any("1 trials are running" in finding.found for finding in by_state(found, OK))
        assert [finding.found for finding in by_state(found, PROBLEM)] == [
            "1 files belong to no complete trial, first 00999.npz"
        ]
    assert stray.exists() and store.study.trials[running].state == TrialState.RUNNING


def test_a_cache_entry_that_is_being_made_is_no_leftover(ill):
    key = "b" * 32
    (deltas().root / "tmp" / key).mkdir(parents=True)
    (deltas().root / "locks").mkdir(exist_ok=True)
    with FileLock(deltas().root / "locks" / f"{key}.lock"):
        assert by_state(examine(ill, fix=True), PROBLEM, FIXED) == []
        assert (deltas().root / "tmp" / key).is_dir()
    assert [finding.check for finding in by_state(examine(ill, fix=True), FIXED)] == ["cache"]


def test_a_record_beside_another_database_is_found_and_not_repaired(ill):
    record = json.loads((ill / "study.json").read_text())
    record["fingerprint"] = "0" * 32
    (ill / "study.json").write_text(json.dumps(record))
    remaining = by_state(examine(ill, fix=True), PROBLEM)
    assert len(remaining) == 2 and all("fingerprint" in finding.found and finding.remedy for finding in remaining)
    (ill / "study.db").unlink()
    assert any("missing" in finding.found for finding in by_state(examine(ill, fix=True), PROBLEM))


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_what_is_no_study_is_refused(tmp_path, call, content):
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    code, _, error = call("doctor", tmp_path)
    assert code == 2 and "study" in error
    with pytest.raises(UserError):
        examine(tmp_path, fix=True)


def test_parameters_at_their_bounds_repeats_and_failures_become_advice(new_store, made_up_evidence):
    store = new_store(search={"alpha": {"low": -0.5, "high": 2}})
    points = [(2.0, -1.0, 0.5), (1.99, -2.0, 0.6), (-0.5, -3.0, 0.7), (1.0, -9.0, 0.1), (1.0, -9.0, 0.1)]
    for alpha, quality, utility in points:
        number, job = store.ask_point(store.spec.search_space(), Point("npo", 2, alpha).params)
        store.complete(job, number, made_up_evidence(job, quality, utility))
    for memory in (12, 13):
        number, job = store.ask_point(store.spec.search_space())
        store.fail(job, number, f"out of memory: {memory} GB")
    store.close()
    found = by_state(examine(store.out, fix=False), ADVICE)
    told = {finding.found: finding.remedy for finding in found}
    assert "raise search.alpha.high" in told["2 of 3 front points have alpha at search.alpha.high (2)"]
    assert "lower search.alpha.low" in told["1 of 3 front points have alpha at search.alpha.low (-0.5)"]
    assert "unlearning.epochs" in told["2 of 3 front points are at or beyond the last epoch of their base run"]
    assert "search.sampler" in told["1 of 5 trials repeated a point"]
    assert "2 failed: out of memory: N GB" in told


def test_alpha_at_minus_one_is_no_bound_to_widen(new_store, made_up_evidence):
    store = new_store()
    number, job = store.ask_point(store.spec.search_space(), Point("npo", 1, -1.0).params)
    store.complete(job, number, made_up_evidence(job))
    store.close()
    assert [finding.state for finding in examine(store.out, fix=False) if finding.check == "bounds"] == [OK]


def test_space_that_is_missing_is_a_problem(new_store, made_up_evidence, monkeypatch):
    store = new_store(search={"trials": 1000})
    number, job = store.ask_point(store.spec.search_space(), Point("npo", 1, 0.5).params)
    store.complete(job, number, made_up_evidence(job), np.random.default_rng(0).bytes(10000))
    store.close()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    (problem,) = [finding for finding in by_state(examine(store.out, fix=False), PROBLEM) if finding.check == "disk"]
    assert str(store.out) in problem.found and "free some space" in problem.remedy
