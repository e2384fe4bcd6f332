"""The study on disk: what it keeps, what it refuses, and what it mends."""

import json
import math
import shutil

import optuna
import pytest
from optuna.trial import TrialState

from search.problem.space import Point
from search.problem.trial import TrialSpec
from search.spec.errors import without_password
from search.spec.study import parse_study
from search.store.record import read_record
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

OBJECTIVES = ("log10_forget_quality", "model_utility")

ZERO = Point("npo", 1, 0.0)
SECRET = "hunter2"


def space(store):
    return parse_study(store.record.spec).search_space()


def ask(store, params=None):
    return store.ask_point(space(store), params, "search" if params is None else "alpha_zero")


def state(store, number):
    return store.study.trials[number].state


@pytest.fixture
def store(new_store):
    return new_store()


def test_asked_point_carries_its_place_and_kind(store):
    number, job = ask(store, ZERO.params)
    assert (number, job) == (0, TrialSpec("alpha_zero", "npo", 1, 0.0))
    number, job = ask(store)
    assert (number, job.kind) == (1, "search")
    assert job.base in ("grad_diff", "npo") and job.epoch in (1, 2) and -1 <= job.alpha <= 2


def test_complete_writes_all_evidence_and_the_values(store, made_up_evidence):
    number, job = ask(store)
    assert store.complete(job, number, made_up_evidence(job, -3.0, 0.7)) is None
    trial = store.study.trials[number]
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [-3.0, 0.7]
    assert trial.user_attrs["evidence"]["components"] == {"Retain Prob": 0.5}
    row = store.trials_frame().iloc[0]
    assert (row["trial"], row["base"], row["alpha"], row["Retain Prob"], row["model_utility"]) == (
        number,
        job.base,
        job.alpha,
        0.5,
        0.7,
    )


def test_evidence_is_written_before_the_trial_ends(store, made_up_evidence):
    # A finished trial takes no attributes, so their presence shows the order; a second end changes nothing.
    number, job = ask(store)
    store.complete(job, number, made_up_evidence(job, -3.0, 0.7))
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        store.fail(job, number, "too late")
    assert state(store, number) == TrialState.COMPLETE


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "missing"])
def test_an_objective_that_is_no_number_fails_the_trial_with_its_reason(store, made_up_evidence, value):
    number, job = ask(store)
    evidence = made_up_evidence(job)
    if value == "missing":
        del evidence["model_utility"]
    else:
        evidence["model_utility"] = value
    reason = store.complete(job, number, evidence)
    assert "not finite" in reason and "model_utility" in reason
    trial = store.study.trials[number]
    assert (trial.state, trial.values) == (TrialState.FAIL, None)
    assert store.failures() == [{"trial": number, "reason": reason}]
    assert store.trials_frame().empty


def test_controls_are_kept_apart_from_points(store, made_up_evidence):
    job = TrialSpec("temperature", temperature=1.5)
    number = store.ask_control(job)
    store.complete(job, number, made_up_evidence(job, temperature=1.5))
    assert store.study.trials == []
    assert store.counts() == {"complete": 0, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}
    assert store.controls_frame().iloc[0]["temperature"] == 1.5
    assert "base" not in store.controls_frame()


def test_reconcile_ends_running_and_waiting_trials_with_a_reason(store, made_up_evidence):
    kept, job = ask(store)
    store.complete(job, kept, made_up_evidence(job))
    running, _ = ask(store)
    control = store.ask_control(TrialSpec("initial"))
    store.study.enqueue_trial(ZERO.params, user_attrs={"kind": "alpha_zero"})
    assert store.fail_orphaned_trials() == 3
    assert [trial.state for trial in store.study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert store.controls.trials[control].state == TrialState.FAIL
    assert "interrupted" in store.study.trials[running].user_attrs["reason"]
    assert store.failures() == []
    assert store.counts() == {"complete": 1, "pruned": 0, "failed": 0, "interrupted": 2, "running": 0}
    assert store.fail_orphaned_trials() == 0


def test_a_given_point_whose_trial_failed_is_asked_again(store):
    number, job = ask(store, ZERO.params)
    store.fail(job, number, "killed")
    again, job = ask(store, ZERO.params)
    assert (again, job) == (number + 1, TrialSpec("alpha_zero", "npo", 1, 0.0))
    other, job = ask(store, Point("npo", 2, 0.0).params)
    assert (other, job) == (number + 2, TrialSpec("alpha_zero", "npo", 2, 0.0))


def test_what_was_enqueued_and_never_asked_does_not_shift_the_given_points(store):
    store.study.enqueue_trial(ZERO.params, user_attrs={"kind": "alpha_zero"})
    store.fail_orphaned_trials()
    _, job = ask(store, Point("grad_diff", 2, 0.0).params)
    assert job == TrialSpec("alpha_zero", "grad_diff", 2, 0.0)


def test_metric_names_and_directions_are_set_in_both_studies(store):
    for study in (store.study, store.controls):
        assert study.metric_names == list(OBJECTIVES)
        assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MAXIMIZE"]


def test_a_reopened_study_has_its_trials_and_record(new_store, made_up_evidence, tmp_path):
    store = new_store()
    number, job = ask(store)
    store.complete(job, number, made_up_evidence(job))
    store.add_seconds("trials", 1.5)
    store.close()
    again = new_store()
    assert again.record.created == store.record.created
    again.add_seconds("trials", 1.0)
    assert StudyStore.open(tmp_path / "out").record.seconds["trials"] == 2.5
    assert len(StudyStore.open(tmp_path / "out").trials_frame()) == 1


def test_another_fingerprint_is_refused_and_nothing_changes(new_store, tmp_path):
    new_store().close()
    before = (tmp_path / "out" / "study.json").read_bytes()
    with pytest.raises(UserError, match=r"another study .*its corpus, model or code differ"):
        new_store(identity="0" * 32)
    with pytest.raises(UserError, match="differ in unlearning;"):
        new_store(identity="0" * 32, unlearning={"epochs": 3}, search={"trials": 9})
    assert (tmp_path / "out" / "study.json").read_bytes() == before


def test_a_refusal_gives_the_folder_back(new_store):
    new_store().close()
    with pytest.raises(UserError):
        new_store(identity="0" * 32)
    new_store()


def test_one_driver_at_a_time(new_store):
    new_store()
    with pytest.raises(UserError, match="under way"):
        new_store()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ('{"name": "tiny", "finger', "not JSON"),
        ("[1, 2]", "not a record"),
        ('{"name": "tiny"}', "no fingerprint"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_a_damaged_record_is_refused_by_name(new_store, tmp_path, content, said):
    new_store().close()
    path = tmp_path / "out" / "study.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for opening in (lambda: StudyStore.open(tmp_path / "out"), new_store):
        with pytest.raises(UserError, match=said) as caught:
            opening()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "key", ["name", "fingerprint", "seconds", "spec", "storage", "corpus", "models", "versions", "created"]
)
def test_a_record_that_lacks_a_key_is_refused(new_store, tmp_path, key):
    new_store().close()
    path = tmp_path / "out" / "study.json"
    record = json.loads(path.read_text())
    del record[key]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"no {key}"):
        read_record(tmp_path / "out")


def test_a_record_keeps_what_it_does_not_know_and_writes_no_more_than_was_there(new_store, tmp_path):
    new_store().close()
    path = tmp_path / "out" / "study.json"
    record = json.loads(path.read_text())
    record |= {"of_a_newer_version": {"a": [1, None]}, "stopped": None}
    record["corpus"]["licence"] = "CC0"
    path.write_text(json.dumps(record, indent=1))
    read_record(tmp_path / "out").save(tmp_path / "out")
    assert json.loads(path.read_text()) == record
    again = read_record(tmp_path / "out")
    again.note_failed_base_run("npo", "no memory")
    again.note_base_run("npo", "0123", [{"epoch": 1, "seconds": 2.0}])
    again.set_usage({"hours": 1 / 3})
    assert again.set_stopped("budget.hours") and not again.set_stopped("budget.hours")
    again.save(tmp_path / "out")
    written = json.loads(path.read_text())
    del record["stopped"]
    assert {key: written.pop(key) for key in record} == record
    assert written == {
        "base_runs": {"npo": {"delta": "0123", "epochs": [{"epoch": 1, "seconds": 2.0}]}},
        "failed_base_runs": {},
        "usage": {"hours": 0.333333},
        "stopped": "budget.hours",
    }


def test_the_times_of_an_older_record_are_kept_and_new_stages_come_to_them(new_store, tmp_path):
    new_store().close()
    path = tmp_path / "out" / "study.json"
    older = {"models": 1.0, "base_runs": 2.0, "baselines": 3.0, "trials": 4.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": older}))
    record = read_record(tmp_path / "out")
    record.add_seconds("references", 5.0)
    record.add_seconds("trials", 6.0)
    assert record.seconds == {**older, "references": 5.0, "trials": 10.0}


@pytest.mark.parametrize(("key", "value"), [("seconds", "long"), ("corpus", []), ("base_runs", {"npo": {"delta": 3}})])
def test_a_record_with_a_value_of_another_type_is_refused(new_store, tmp_path, key, value):
    new_store().close()
    path = tmp_path / "out" / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key}.*damaged"):
        read_record(tmp_path / "out")


def test_trials_whose_attributes_stand_one_by_one_are_read_as_before(store, made_up_evidence):
    """As versions before 0.2 wrote them, and other programs may."""
    number, job = ask(store)
    evidence = {key: value for key, value in made_up_evidence(job, -3.0, 0.7).items() if value is not None}
    identifier = store.storage.get_trial_id_from_study_id_trial_number(1, number)
    for name, value in evidence.items():
        store.storage.set_trial_user_attr(identifier, name, value)
    store.storage.set_trial_state_values(identifier, TrialState.COMPLETE, [-3.0, 0.7])
    (old,) = store.trials()
    assert old.user_attrs == evidence
    number, job = ask(store)
    store.complete(job, number, made_up_evidence(job, -3.0, 0.7))
    frame = store.trials_frame()
    assert not frame.isna().any().any() and len(frame) == 2
    assert set(store.trials_frame(("device", "kind")).columns) == {"trial", "kind", "device", *OBJECTIVES}


def test_a_record_with_a_broken_spec_is_refused(new_store, tmp_path):
    new_store().close()
    path = tmp_path / "out" / "study.json"
    record = json.loads(path.read_text())
    record["spec"]["unlearning"]["epochs"] = "two"
    path.write_text(json.dumps(record))
    for opening in (lambda: StudyStore.open(tmp_path / "out"), lambda: new_store(identity="0" * 32)):
        with pytest.raises(UserError, match="damaged"):
            opening()


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a study folder"):
        StudyStore.open(tmp_path)
    with pytest.raises(UserError, match="not a study folder"):
        StudyStore.open(tmp_path / "nowhere")


def test_a_missing_database_is_refused_when_reading(new_store, tmp_path):
    new_store().close()
    database = tmp_path / "out" / "study.db"
    database.unlink()
    with pytest.raises(UserError, match="missing") as caught:
        StudyStore.open(tmp_path / "out")
    assert str(database) in str(caught.value)
    assert not database.exists()


def test_a_file_that_is_no_database_is_refused(new_store, tmp_path):
    new_store().close()
    (tmp_path / "out" / "study.db").write_bytes(b"this was a database once" * 100)
    for opening in (lambda: StudyStore.open(tmp_path / "out"), new_store):
        with pytest.raises(UserError, match="cannot be opened"):
            opening()


def test_a_database_of_another_study_is_refused(new_store, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    new_store(tmp_path / "one", storage=url)
    with pytest.raises(UserError, match="holds another study named 'tiny'"):
        new_store(tmp_path / "two", identity="0" * 32, storage=url)
    # The folder that was refused is still free for the study under another name.
    assert new_store(tmp_path / "two", identity="0" * 32, storage=url, name="renamed").study.study_name == "renamed"


def test_a_database_without_the_study_is_refused(new_store, tmp_path):
    new_store().close()
    (tmp_path / "out" / "study.db").unlink()
    optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'out' / 'study.db'}")
    with pytest.raises(UserError, match="holds no study 'tiny'"):
        StudyStore.open(tmp_path / "out")


def test_a_start_that_was_killed_between_record_and_database_can_be_repeated(new_store, tmp_path):
    new_store().close()
    (tmp_path / "out" / "study.db").unlink()
    (tmp_path / "out" / ".study.json.1234.tmp").write_text("{")
    assert new_store().counts()["complete"] == 0


def test_a_start_that_was_killed_before_its_record_can_be_repeated(new_store, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".lock", ".probe-1", ".study.json.1234.tmp"):
        (tmp_path / "out" / name).write_text("")
    new_store()


@pytest.mark.parametrize("name", ["moved", "moved and #1 50% ?x=y", "ou"])
def test_a_moved_folder_still_opens(new_store, made_up_evidence, tmp_path, name):
    store = new_store()
    number, job = ask(store)
    store.complete(job, number, made_up_evidence(job))
    store.close()
    (tmp_path / "out").rename(tmp_path / name)
    assert len(StudyStore.open(tmp_path / name).trials_frame()) == 1
    again = new_store(tmp_path / name)
    assert ask(again)[0] == 1
    assert len(again.study.trials) == 2


def test_a_copied_folder_opens_its_own_trials(new_store, made_up_evidence, tmp_path):
    # The copy's name is the start of the original's: looking for one path inside the other would find it.
    store = new_store(tmp_path / "runs-1")
    store.close()
    shutil.copytree(tmp_path / "runs-1", tmp_path / "runs")
    copy = new_store(tmp_path / "runs")
    number, job = ask(copy)
    copy.complete(job, number, made_up_evidence(job))
    assert len(StudyStore.open(tmp_path / "runs").trials_frame()) == 1
    assert StudyStore.open(tmp_path / "runs-1").trials_frame().empty


def test_another_storage_holds_the_trials(new_store, made_up_evidence, tmp_path):
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    store = new_store(storage=url)
    number, job = ask(store)
    store.complete(job, number, made_up_evidence(job))
    store.close()
    assert not (tmp_path / "out" / "study.db").exists()
    assert store.record.storage == url
    assert len(StudyStore.open(tmp_path / "out").trials_frame()) == 1


def test_the_environment_gives_the_storage_of_a_url_with_a_password(new_store, tmp_path, monkeypatch):
    store = new_store(storage=f"sqlite:///{tmp_path / 'elsewhere.db'}")
    store.close()
    store.storage.engine.dispose()  # else part of it is still in the write-ahead log, which has the old name
    (tmp_path / "elsewhere.db").rename(tmp_path / "there.db")
    monkeypatch.setenv("UIPE_STORAGE", f"sqlite:///{tmp_path / 'there.db'}")
    assert StudyStore.open(tmp_path / "out").trials_frame().empty


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@localhost:1/optuna",
        f"postgresql://:{SECRET}@localhost:1/optuna",
        f"postgresql://localhost:1/optuna?user=me&password={SECRET}",
        f"postgresql://localhost:1/optuna?sslpassword={SECRET}&sslmode=disable",
        f"nonsense://user:{SECRET}@localhost/optuna",
        f"redis://:{SECRET}@localhost:1",
    ],
)
def test_passwords_are_neither_shown_nor_written(new_store, tmp_path, url):
    assert SECRET not in without_password(url)
    with pytest.raises(UserError, match=r"cannot be opened|must be the URL of a database") as caught:
        new_store(storage=url)
    assert SECRET not in str(caught.value)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def test_urls_without_a_password_are_shown_as_they_are():
    for url in ("sqlite:////a/b.db", "postgresql://user@host:5432/optuna", "mysql+pymysql://host/optuna?charset=utf8"):
        assert without_password(url) == url


def test_a_folder_below_a_file_is_refused(new_store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        new_store(tmp_path / "file" / "out")


OWN_RANGE = {
    "unlearning": {"methods": {"npo": {}, "task_vector": {}}},
    "search": {"alpha_by_method": {"task_vector": {"low": -0.5, "high": 7.3}}},
}


def test_trials_have_a_base_runs_own_alpha_where_optuna_has_that_of_the_flat_space(new_store, made_up_evidence):
    store = new_store(**OWN_RANGE)
    given = {"base": "task_vector", "epoch": 2, "alpha": 0.3}
    number, job = store.ask_point(space(store), given)
    assert (job.base, job.epoch, job.alpha) == ("task_vector", 2, 0.3)
    assert store.study.trials[number].params["alpha"] == pytest.approx(-1 + 3 * 0.8 / 7.8)
    store.complete(job, number, made_up_evidence(job))
    number, job = store.ask_point(space(store), {**given, "alpha": 0.0}, "alpha_zero")
    assert job.alpha == 0.0
    seen = {"npo": [], "task_vector": []}
    for _ in range(30):
        number, job = store.ask_point(space(store))
        seen[job.base].append(job.alpha)
        store.complete(job, number, made_up_evidence(job))
    assert min(seen["npo"]) >= -1 and max(seen["npo"]) <= 2
    assert min(seen["task_vector"]) >= -0.5 and 2 < max(seen["task_vector"]) <= 7.3
    assert store.trials_frame()["alpha"].tolist()[0] == 0.3
