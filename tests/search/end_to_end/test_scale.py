"""What keeps a study cheap for its driver however many trials it has: few statements, whole transactions, nothing kept."""

import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from sqlalchemy import event, text

from search.problem.trial import TrialSpec
from search.samplers.registry import SAMPLERS
from search.store import optuna_compat
from search.store.trials import TrialTable
from uipe_core.errors import UserError

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def store(new_store):
    return new_store()


def ask(store):
    return store.ask_point(store.spec.search_space())


def score(store, made_up_evidence, count=1):
    for _ in range(count):
        number, job = ask(store)
        store.complete(job, number, made_up_evidence(job, -5.0 * (1 + job.alpha), 0.9 - 0.1 * job.alpha))


def statements(store, action):
    """How many statements an action sends to the database."""
    sent = []
    listen = lambda *given: sent.append(given[2])  # noqa: E731
    event.listen(store.storage.engine, "before_cursor_execute", listen)
    try:
        action()
    finally:
        event.remove(store.storage.engine, "before_cursor_execute", listen)
    return len(sent)


def attributes(store, number):
    return next(trial.user_attrs for trial in store.trials() if trial.number == number)


def test_evidence_is_there_under_its_names_and_none_twice(store, made_up_evidence):
    number, job = store.ask_point(store.spec.search_space(), {"base": "npo", "epoch": 1, "alpha": 0.0}, "alpha_zero")
    evidence = made_up_evidence(job, note="ü 'quoted' % :name", flagged=True, of_trial=None)
    store.complete(job, number, evidence)
    assert attributes(store, number) == {key: value for key, value in evidence.items() if value is not None}
    with store.storage.engine.connect() as connection:
        rows = dict(connection.execute(text("SELECT key, value_json FROM trial_user_attributes")).tuples().all())
    assert sorted([*rows, *json.loads(rows.pop("evidence"))]) == sorted([*attributes(store, number), "evidence"])
    assert rows.keys() == {"kind", "base", "method", "epoch", "alpha", "walk", "flagged"}


def test_evidence_is_written_whole_or_not_at_all(store, made_up_evidence):
    number, job = ask(store)
    engine = store.storage.engine

    @event.listens_for(engine, "connect")
    def _no_more_room(connection, _):
        connection.execute(f"PRAGMA max_page_count={connection.execute('PRAGMA page_count').fetchone()[0]}")

    engine.dispose()
    with pytest.raises(StorageInternalError) as caught:
        store.complete(job, number, made_up_evidence(job, note="x" * 200_000))
    assert "full" in str(caught.value.__cause__)
    assert "device" not in attributes(store, number)
    assert store.study.trials[number].state == TrialState.RUNNING
    event.remove(engine, "connect", _no_more_room)
    engine.dispose()
    assert store.complete(job, number, made_up_evidence(job)) is None
    assert attributes(store, number)["device"] == "cpu"


def test_what_is_written_is_what_optuna_would_have_written(new_store, made_up_evidence):
    """Every row but the ids and the times, of trials that ended in each way, with parameters and a sampler's notes."""
    ours = new_store()
    ours.use_sampler(SAMPLERS["nsga2"].make(0))
    score(ours, made_up_evidence, 3)
    number, job = ask(ours)
    ours.fail(job, number, "no memory")
    number, job = ask(ours)
    ours.prune(job, number, {**made_up_evidence(job), "pruned": {"stage": "retain"}})
    ask(ours)
    theirs = optuna.create_study(
        study_name="theirs", storage=str(ours.storage.url), directions=["maximize"] * 2, sampler=RandomSampler(seed=0)
    )
    for trial in ours.study.trials:
        theirs._storage.create_new_trial(theirs._study_id, trial)
    tables = ("params", "values", "user_attributes", "system_attributes")
    skipped = {"trial_id", "param_id", "trial_value_id", "trial_user_attribute_id", "trial_system_attribute_id"}
    with ours.storage.engine.connect() as connection:

        def rows(study, name):
            where = f"JOIN trials t USING (trial_id) WHERE t.study_id = {study._study_id}"
            found = connection.execute(text(f"SELECT t.number, r.* FROM trial_{name} r {where}")).mappings()
            return sorted(sorted((k, v) for k, v in row.items() if k not in skipped) for row in found)

        for name in tables:
            assert rows(ours.study, name) == rows(theirs, name) != []
    times = [(mine.datetime_start, mine.datetime_complete) for mine in ours.study.trials]
    assert all(abs((began - datetime.now()).total_seconds()) < 60 for began, _ in times)
    assert [ended is not None for _, ended in times] == [True] * 5 + [False]
    assert all(ended is None or ended >= began for began, ended in times)
    own = [(mine.number, mine.state, mine.params, mine.distributions, mine.values) for mine in ours.study.trials]
    assert own == [(other.number, other.state, other.params, other.distributions, other.values) for other in theirs.trials]


def flat(trials):
    """Trials as Optuna read them, with their evidence among their attributes."""
    for trial in trials:
        trial.user_attrs |= trial.user_attrs.pop("evidence", {})
    return trials


def test_what_is_read_is_what_optuna_would_have_read(new_store, made_up_evidence, monkeypatch):
    """Of trials in each state, of ours and of another program, more than fit one answer; controls lie between them."""
    monkeypatch.setattr(optuna_compat, "BATCH", 3)
    store = new_store()
    store.use_sampler(SAMPLERS["nsga2"].make(0))
    assert list(store.trials()) == []
    score(store, made_up_evidence, 4)
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial))
    number, job = ask(store)
    store.prune(job, number, {**made_up_evidence(job), "pruned": {"stage": "retain"}, "nested": {"a": {"b": [1, None, "ü"]}}})
    number, job = ask(store)
    store.fail(job, number, "no memory")
    ask(store)
    theirs = optuna.load_study(study_name=store.study.study_name, storage=str(store.storage.url))
    theirs.enqueue_trial({"alpha": 0.5})
    theirs.tell(theirs.ask().number, [math.inf, -math.inf])
    theirs.enqueue_trial({"alpha": 1.5})
    whole = list(store.trials())
    assert whole == flat(store.study.trials)
    assert len({trial.state for trial in whole}) == 5
    assert list(store.trials(controls=True)) == flat(store.controls.trials) != []
    states = (TrialState.PRUNED, TrialState.RUNNING)
    assert list(store.trials(states)) == flat(store.study.get_trials(states=states))
    for trial, part in zip(whole, store.trials(names=("kind", "nested", "nobody's")), strict=True):
        assert part.user_attrs == {key: value for key, value in trial.user_attrs.items() if key in ("kind", "nested")}
        assert (part.params, part.values, part.system_attrs) == (trial.params, trial.values, trial.system_attrs)


def test_reading_asks_as_many_questions_for_four_hundred_trials_as_for_ten(new_store, made_up_evidence):
    store = new_store()
    score(store, made_up_evidence, 10)
    few = statements(store, lambda: list(store.trials()))
    for _ in range(400):
        ask(store)
    assert statements(store, lambda: list(store.trials())) == few


def test_an_end_that_is_written_again_changes_nothing_and_another_end_is_refused(store, made_up_evidence):
    number, job = ask(store)
    assert store.complete(job, number, made_up_evidence(job)) is None
    whole = store.study.trials[number]
    table = TrialTable(store._database, store.storage.get_study_id_from_name(store.study.study_name), "storage")
    table.end(number, TrialState.COMPLETE, {"device": "another"}, [0.0, 0.0])
    assert store.study.trials[number] == whole
    with pytest.raises(UpdateFinishedTrialError, match="already finished"):
        table.end(number, TrialState.FAIL, {"reason": "late"})
    assert store.study.trials[number] == whole


def test_what_a_trial_costs_depends_neither_on_running_trials_nor_on_ended_ones(store, made_up_evidence):
    store.use_sampler(RandomSampler(seed=0))
    score(store, made_up_evidence, 2)
    alone = statements(store, lambda: score(store, made_up_evidence))
    for _ in range(12):
        ask(store)
    score(store, made_up_evidence, 12)
    assert statements(store, lambda: score(store, made_up_evidence)) == alone
    assert alone < 60


def test_the_sampler_proposes_as_it_would_on_the_study_itself(store, made_up_evidence):
    score(store, made_up_evidence, 15)
    ask(store)
    itself = optuna.load_study(
        study_name=store.study.study_name, storage=store.storage, sampler=TPESampler(multivariate=True, seed=3)
    )
    expected = itself.ask(fixed_distributions=store.spec.search_space()).params
    itself.tell(16, state=TrialState.FAIL)
    store.use_sampler(TPESampler(multivariate=True, seed=3))
    # The failed one is no part of what it learns from.
    number, _ = ask(store)
    assert number == 17
    assert store.study.trials[number].params == expected


class Noting(RandomSampler):
    """Notes the trials it is shown."""

    def before_trial(self, study, trial):
        self.shown = study.get_trials(deepcopy=False)


def test_a_resumed_study_shows_its_sampler_all_trials_with_their_numbers_and_without_evidence(new_store, made_up_evidence):
    store = new_store()
    score(store, made_up_evidence, 2)
    failed, job = ask(store)
    store.fail(job, failed, "no memory")
    ask(store)
    store.close()
    store = new_store(out=store.out)
    assert store.fail_orphaned_trials() == 1
    sampler = Noting(seed=0)
    assert isinstance(sampler, BaseSampler)
    store.use_sampler(sampler)
    number, _ = ask(store)
    assert number == 4
    written = store.study.trials
    assert [trial.state.name for trial in sampler.shown] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "RUNNING"]
    assert [(trial.params, trial.values) for trial in sampler.shown[:4]] == [(t.params, t.values) for t in written[:4]]
    assert all(not trial.user_attrs for trial in sampler.shown)
    assert written[0].user_attrs


def test_what_a_sampler_notes_with_a_trial_is_kept_for_the_next_run(new_store, made_up_evidence):
    store = new_store()
    store.use_sampler(SAMPLERS["nsga2"].make(0))
    score(store, made_up_evidence, 14)
    noted = [trial.system_attrs for trial in store.study.trials]
    assert all(noted)
    sampler = Noting(seed=0)
    store.use_sampler(sampler)
    ask(store)
    assert [trial.system_attrs for trial in sampler.shown[:14]] == noted


def test_trials_that_another_program_writes_into_the_study_are_noticed(store):
    ask(store)
    optuna.load_study(study_name=store.study.study_name, storage=str(store.storage.url)).ask()
    with pytest.raises(UserError, match="another program"):
        ask(store)


def test_tune_keeps_nothing_of_what_trials_returned(finished):
    states = [json.loads(path.read_text()) for path in (finished.out / "ray").glob("tune-*/experiment_state-*.json")]
    trials = [trial for state in states for trial in state["trial_data"]]
    assert len(trials) > 10
    assert all("items" not in metadata and "metrics" not in metadata for _, metadata in trials)


@pytest.mark.slow
def test_the_drivers_memory_is_flat_once_tune_has_begun_anew():
    command = [sys.executable, BENCHMARKS / "many_workers.py", "--no-pool"]
    command += ["--workers", "2", "--trials", "6000", "--seconds", "0"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout)
    at = {int(trial): megabytes for trial, megabytes in found["driver_memory_mb_at_trial"].items()}
    # Item scores alone are 21 kB a trial: 52 MB of these 2,500. Tune keeps what it does for 2,500 trials at most.
    assert 0 < at[6000] - at[3500] < 20


@pytest.mark.slow
def test_the_storage_benchmark_runs_and_beats_its_baseline():
    command = [sys.executable, BENCHMARKS / "driver.py", "--trials", "150", "--running", "16"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert found["rows"][-1]["trials"] == 150
    assert found["ratio_to_baseline"]["cpu"] < 0.6
