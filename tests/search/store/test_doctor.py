"""The doctor on really damaged copies of a real study: what is found, what is repaired, what is left alone."""

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from optuna.trial import TrialState
from sqlalchemy import make_url

from search.problem.space import Point
from search.problem.trial import TrialSpec
from search.store.checks import ADVICE, FIXED, OK, PROBLEM
from search.store.database import WriterLock
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
    assert "2 trials were interrupted by the end of a run" in told and "no trial failed" not in told


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
    # Of both studies of the database, and of the record itself.
    assert len(remaining) == 3 and all("fingerprint" in finding.found and finding.remedy for finding in remaining)
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


def test_a_range_of_a_methods_own_is_widened_by_its_own_key(new_store, made_up_evidence):
    methods = {"methods": {"npo": {}, "task_vector": {}}}
    store = new_store(unlearning=methods, search={"alpha_by_method": {"task_vector": {"low": -0.5, "high": 7}}})
    for base, alpha, quality, utility in (("task_vector", 7.0, -1.0, 0.5), ("npo", 1.5, -2.0, 0.6), ("npo", 2.0, -3.0, 0.7)):
        number, job = store.ask_point(store.spec.search_space(), Point(base, 1, alpha).params)
        store.complete(job, number, made_up_evidence(job, quality, utility))
    store.close()
    told = {finding.found: finding.remedy for finding in by_state(examine(store.out, fix=False), ADVICE)}
    own = "search.alpha_by_method.task_vector.high"
    assert f"raise {own}" in told[f"1 of 3 front points have alpha at {own} (7)"]
    assert "raise search.alpha.high" in told["1 of 3 front points have alpha at search.alpha.high (2)"]


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


def sql(statement, *values):
    def change(out):
        with contextlib.closing(sqlite3.connect(out / "study.db")) as database:
            assert database.execute(statement, values).rowcount
            database.commit()

    return change


def pages(out):
    """Overwrites the second half of the database, as a disk that is dying."""
    with contextlib.closing(sqlite3.connect(out / "study.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = out / "study.db"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\x5a" * (len(content) - len(content) // 2)
    path.write_bytes(content)


def record(change):
    def edit(out):
        content = json.loads((out / "study.json").read_text())
        change(content)
        (out / "study.json").write_text(json.dumps(content))

    return edit


def swap_items(out):
    first, second = (out / "items" / "trials" / f"0000{number}.npz" for number in (1, 2))
    one, other = first.read_bytes(), second.read_bytes()
    assert one != other
    first.write_bytes(other)
    second.write_bytes(one)


def alter_items(out):
    path = out / "items" / "trials" / "00001.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    name = next(name for name, values in arrays.items() if values.dtype.kind == "f")
    arrays[name] = arrays[name] * 0.5
    np.savez_compressed(path, **arrays)


OF_TRIAL_2 = "trial_id = (SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE number = 2 AND study_name = 'tiny')"

DAMAGES = {
    "pages": (pages, "study.db"),
    "no values": (sql(f"DELETE FROM trial_values WHERE {OF_TRIAL_2}"), "trial 2: it has the values []"),
    "infinite": (sql(f"UPDATE trial_values SET value = NULL, value_type = 'INF_POS' WHERE {OF_TRIAL_2}"), "[inf, inf]"),
    "no attributes": (sql(f"DELETE FROM trial_user_attributes WHERE {OF_TRIAL_2}"), "trial 2: its attribute kind is None"),
    "no JSON": (sql(f"UPDATE trial_user_attributes SET value_json = '{{x' WHERE {OF_TRIAL_2}"), "trial 2 cannot be read"),
    "no mapping": (
        sql(f"UPDATE trial_user_attributes SET value_json = '[1]' WHERE key = 'evidence' AND {OF_TRIAL_2}"),
        "evidence is no mapping",
    ),
    "an objective": (
        sql(f"UPDATE trial_values SET value = 0.9999 WHERE objective = 1 AND {OF_TRIAL_2}"),
        "trial 2: it has 0.9999 as model_utility, and",
    ),
    "half a character": (
        sql(f"UPDATE trial_user_attributes SET value_json = ? WHERE key = 'kind' AND {OF_TRIAL_2}", '"\\ud800"'),
        "trial 2 cannot be read (ValueError: half of a surrogate pair",
    ),
    "the trial of a control": (
        sql("UPDATE trial_user_attributes SET value_json = ? WHERE key = 'of_trial'", '{"x": 1}'),
        "its attribute of_trial is {'x': 1}",
    ),
    "a state": (sql(f"UPDATE trials SET state = 'DONE' WHERE {OF_TRIAL_2}"), "trial 2 cannot be read"),
    "a number": (sql(f"UPDATE trials SET number = NULL WHERE {OF_TRIAL_2}"), "trial None cannot be read"),
    "a range": (
        sql(
            "UPDATE trial_params SET distribution_json = replace(distribution_json, '\"step\": null', ?) "
            f"WHERE param_name = 'alpha' AND {OF_TRIAL_2}",
            f'"step": 1{"0" * 400}',
        ),
        "trial 2 cannot be read (OverflowError",
    ),
    "a direction": (sql("UPDATE study_directions SET direction = 'MINIMIZE' WHERE objective = 1"), "MINIMIZE"),
    "the seed": (record(lambda study: study["spec"].update(seed=7)), "another seed, space"),
    "the range of alpha": (record(lambda study: study["spec"]["search"]["alpha"].update(high=3.0)), "another seed, space"),
    "a model": (record(lambda study: study["models"].update(retain="0" * 32)), "another seed, space"),
    "swapped items": (swap_items, "2 files are damaged, first 00001.npz (not what was written with the trial)"),
    "altered items": (alter_items, "1 files are damaged, first 00001.npz (not what was written with the trial)"),
    "a log": (lambda out: (out / "logs" / "retain.json").write_bytes(b'{"eval_log_forget.json": '), "retain.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_a_finding_and_what_reads_the_study_ends_with_a_sentence(ill, call, damage):
    change, told = DAMAGES[damage]
    change(ill)
    code, output, error = call("doctor", ill, "--json")
    problems = [finding for finding in json.loads(output)["findings"] if finding["state"] == PROBLEM]
    assert code == 1 and error == ""
    assert any(told in finding["found"] for finding in problems), problems
    assert all(finding["meaning"] and finding["remedy"] for finding in problems)
    for command in ("pareto", "status", "report"):
        code, _, error = call(command, ill)
        assert code in (0, 2) and (code == 0 or error.startswith("error: ")), error
    code, output, _ = call("doctor", ill, "--fix", "--json")
    mended = damage in ("swapped items", "altered items", "a log")
    assert (code, json.loads(output)["remaining"] == 0) == ((0, True) if mended else (1, False))


def test_a_study_whose_database_is_damaged_is_not_run(ill, finished, call):
    pages(ill)
    code, _, error = call("run", finished.file, "--out", ill, "--trials", 9)
    assert code == 2 and "study.db" in error and "Error" not in error.splitlines()[0][:12]


def test_the_trials_of_a_run_from_another_folder_are_left_alone(new_store, made_up_evidence, tmp_path, call):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    old = new_store(out=tmp_path / "old", storage=url)
    old.close()
    live = new_store(out=tmp_path / "live", storage=url)
    running, job = live.ask_point(live.spec.search_space())
    found = examine(tmp_path / "old", fix=False)
    assert "under way" in found[0].found
    assert any("1 trials are running" in finding.found for finding in by_state(found, OK))
    code, _, error = call("doctor", tmp_path / "old", "--fix")
    assert code == 2 and "another run writes to its study 'tiny', from another output folder" in error
    live.complete(job, running, made_up_evidence(job))
    left, _ = live.ask_point(live.spec.search_space())
    live.close()
    (fixed,) = by_state(examine(tmp_path / "old", fix=True), FIXED)
    assert "1 trials are RUNNING" in fixed.found
    again = StudyStore.open(tmp_path / "live")
    assert [trial.state for trial in again.study.trials] == [TrialState.COMPLETE, TrialState.FAIL] and left == 1
    assert WriterLock(make_url(url), "tiny").is_free()
