"""What the store assumes of Optuna: each assumption by itself, on Optuna alone. A new Optuna that breaks one fails here."""

import sqlite3
from datetime import UTC, datetime

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy import text

from search.store import optuna_compat
from search.store.database import open_storage
from search.store.sqlite_reading import SQLiteFile
from uipe_core.errors import UserError

SPACE = {"alpha": FloatDistribution(-1, 2), "base": CategoricalDistribution(["npo", "grad_diff"])}


@pytest.fixture
def database(tmp_path):
    opened = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    yield opened
    opened.close()


@pytest.fixture
def study_id(database):
    return database.backend.create_new_study([StudyDirection.MAXIMIZE] * 2, "study")


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "{x", "["])
def test_an_attribute_of_a_study_that_cannot_be_parsed_is_named(text):
    def rows(query, values):
        return [("fingerprint", text)] if "study_user_attributes" in query else []

    with pytest.raises(UserError, match="attribute fingerprint of the study cannot be read"):
        optuna_compat.study_facts(rows, 1)


def template(**attributes):
    return create_trial(
        state=TrialState.RUNNING, params={"alpha": 0.5, "base": "npo"}, distributions=SPACE, user_attrs=attributes
    )


def commits_of(engine):
    """A list that grows by one with each commit."""
    seen, commit = [], engine.dialect.do_commit

    def counting(connection):
        seen.append(connection)
        commit(connection)

    engine.dialect.do_commit = counting
    return seen


def test_a_trial_created_from_a_template_is_running_with_all_of_it_after_one_commit(database, study_id):
    commits = commits_of(database.engine)
    identifier = database.backend.create_new_trial(study_id, template(kind="search", epoch=2))
    assert len(commits) == 1
    trial = database.backend.get_trial(identifier)
    assert (trial.state, trial.number, trial.params) == (TrialState.RUNNING, 0, {"alpha": 0.5, "base": "npo"})
    assert trial.user_attrs == {"kind": "search", "epoch": 2}
    assert abs((trial.datetime_start - datetime.now()).total_seconds()) < 60
    assert database.backend.get_trial_id_from_study_id_trial_number(study_id, 0) == identifier
    assert optuna_compat.newest_trial(database.rows, study_id) == (identifier, 0)


def test_an_attribute_and_an_end_take_a_commit_each_and_overwrite_what_was_there(database, study_id):
    backend = database.backend
    identifier = backend.create_new_trial(study_id, template(kind="search"))
    commits = commits_of(database.engine)
    backend.set_trial_user_attr(identifier, "evidence", {"a": [1, None, "ü"]})
    backend.set_trial_user_attr(identifier, "evidence", {"b": {"c": 0.1}})
    backend.set_trial_state_values(identifier, TrialState.COMPLETE, [-3.0, 0.7])
    assert len(commits) == 3
    trial = backend.get_trial(identifier)
    assert trial.user_attrs == {"kind": "search", "evidence": {"b": {"c": 0.1}}}
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [-3.0, 0.7])


def test_a_finished_trial_takes_nothing_more(database, study_id):
    backend = database.backend
    identifier = backend.create_new_trial(study_id, template())
    backend.set_trial_state_values(identifier, TrialState.COMPLETE, [-3.0, 0.7])
    with pytest.raises(UpdateFinishedTrialError):
        backend.set_trial_user_attr(identifier, "late", 1)
    with pytest.raises(UpdateFinishedTrialError):
        backend.set_trial_state_values(identifier, TrialState.FAIL)
    assert backend.get_trial(identifier).user_attrs == {}


def test_a_waiting_trial_can_be_failed(database, study_id):
    study = optuna.load_study(study_name="study", storage=database.backend)
    study.enqueue_trial({"alpha": 0.5})
    identifier = database.backend.get_trial_id_from_study_id_trial_number(study_id, 0)
    database.backend.set_trial_user_attr(identifier, "reason", "interrupted")
    database.backend.set_trial_state_values(identifier, TrialState.FAIL)
    assert study.trials[0].state == TrialState.FAIL


def test_optuna_itself_creates_a_trial_again_when_the_answer_was_lost(database, study_id, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    dialect = database.engine.dialect
    commit, lost = dialect.do_commit, []

    def losing(connection):
        commit(connection)
        if not lost:
            lost.append(connection)
            raise sqlite3.OperationalError("database is locked")

    dialect.do_commit = losing
    identifier = database.backend.create_new_trial(study_id, template())
    assert optuna_compat.newest_trial(database.rows, study_id) == (identifier, 1)


def test_an_error_of_the_database_keeps_its_cause(database, study_id):
    identifier = database.backend.create_new_trial(study_id, template())
    with database.engine.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        connection.execute(text(f"PRAGMA max_page_count={pages}"))
    with pytest.raises(StorageInternalError) as caught:
        database.backend.set_trial_user_attr(identifier, "evidence", "x" * 200_000)
    assert isinstance(caught.value.__cause__.orig, sqlite3.OperationalError)


def test_a_storage_with_retries_is_an_optuna_storage_and_is_not_wrapped_in_a_cache(database, study_id):
    assert isinstance(database.optuna, BaseStorage)
    assert get_storage(database.optuna) is database.optuna
    assert optuna.load_study(study_name="study", storage=database.optuna).trials == []


def test_sqlite_writes_ahead_and_does_not_wait_for_the_disk_at_each_commit(database):
    with database.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 1


def test_the_tables_hold_times_in_utc_and_values_as_they_are_read_here(database, study_id, tmp_path):
    identifier = database.backend.create_new_trial(study_id, template())
    study = optuna.load_study(study_name="study", storage=database.backend)
    study.tell(0, [float("inf"), float("-inf")])
    [(began,)] = database.rows("SELECT datetime_start FROM trials", {})
    assert abs((datetime.fromisoformat(began).replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()) < 60
    as_optuna_reads = [(identifier, database.backend.get_trial(identifier))]
    assert optuna_compat.read_trials(database.rows, study_id) == as_optuna_reads
    assert optuna_compat.read_trials(SQLiteFile(tmp_path / "study.db").rows, study_id) == as_optuna_reads


def test_the_tables_have_the_columns_that_are_asked_for(database):
    assert optuna_compat.has_known_schema(database.rows)
    assert database.backend.get_head_version() == optuna_compat.SCHEMA


def test_databases_of_another_schema_are_refused_by_optuna(database, tmp_path):
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'v0.9.0.a'"))
    with pytest.raises(RuntimeError, match="runtime optuna version"):
        RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
