"""A study's database that is shared, locked or gone: a real server that is stopped, a file that another connection locks."""

import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from postgres_server import QUOTED, SECRET
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

import search
from search.problem.space import Point
from search.results.study_result import StudyResult
from search.spec.errors import without_password, without_secrets_of
from search.store import database as storage
from search.store.database import STORAGE_ERRORS, open_storage
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

HOLDER = """
import sys, time
from search.store.database import open_storage
storage = open_storage(sys.argv[1])
storage.acquire_writer_lock(sys.argv[1], sys.argv[2])
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request, tmp_path):
    """A database that several output folders may name."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.db'}"
    return request.getfixturevalue("server").url


def score(store, made_up_evidence, count):
    """Some trials from their beginning to their end; their numbers."""
    numbers = []
    for _ in range(count):
        number, job = store.ask_point(store.spec.search_space())
        assert store.complete(job, number, made_up_evidence(job)) is None
        numbers.append(number)
    return numbers


def states(store):
    return [trial.state for trial in store.study.get_trials(deepcopy=False)]


@contextlib.contextmanager
def locked(database):
    """Another process's write lock on an SQLite file."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(storage, "BUSY_SECONDS", 0)


def test_a_second_driver_of_a_shared_database_is_refused_whatever_its_folder(new_store, shared_url, tmp_path, monkeypatch):
    first = new_store(tmp_path / "one", storage=shared_url, name="drivers")
    with pytest.raises(UserError, match="another run writes to its study 'drivers'") as caught:
        new_store(tmp_path / "two", storage=shared_url, name="drivers")
    assert SECRET not in str(caught.value) and QUOTED not in str(caught.value)
    other = new_store(tmp_path / "three", storage=shared_url, name="others")
    assert other.study.study_name == "others"
    monkeypatch.setenv("UIPE_STORAGE", shared_url)
    assert StudyStore.open(tmp_path / "one").trials_frame().empty  # reading is everybody's
    first.close()
    assert new_store(tmp_path / "two", storage=shared_url, name="drivers").study.study_name == "drivers"


def test_a_claim_dies_with_its_holder(new_store, shared_url, tmp_path):
    command = [sys.executable, "-c", HOLDER, shared_url, "dead"]
    environment = {**os.environ, "PYTHONPATH": str(Path(search.__file__).parents[1])}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="another run writes"):
            new_store(tmp_path / "one", storage=shared_url, name="dead")
    finally:
        holder.kill()
        holder.communicate()
    ends = time.monotonic() + 30
    while True:
        try:
            new_store(tmp_path / "one", storage=shared_url, name="dead")
            break
        except UserError:
            assert time.monotonic() < ends
            time.sleep(0.2)


def test_a_server_that_is_stopped_and_started_again_costs_nothing(server, new_store, made_up_evidence, caplog):
    store = new_store(storage=server.url, name="restarted")
    numbers = score(store, made_up_evidence, 3)
    number, job = store.ask_point(store.spec.search_space())
    server.stop()
    starting = threading.Timer(1.5, server.start)
    starting.start()
    with caplog.at_level(logging.WARNING):
        assert store.complete(job, number, made_up_evidence(job)) is None
    starting.join()
    numbers += [number, *score(store, made_up_evidence, 2)]
    assert numbers == list(range(6))
    assert states(store) == [TrialState.COMPLETE] * 6
    assert "trying again" in caplog.text and "there again after" in caplog.text
    assert SECRET not in caplog.text
    # Asking anew, too, makes one trial and not two.
    server.stop()
    starting = threading.Timer(1.0, server.start)
    starting.start()
    given = Point("npo", 1, 0.0)
    number, job = store.ask_point(store.spec.search_space(), given.params, "alpha_zero")
    starting.join()
    assert (number, job.kind, job.alpha) == (6, "alpha_zero", 0.0)
    assert states(store)[6:] == [TrialState.RUNNING]
    with pytest.raises(UserError, match="another run writes"):
        # The claim ended with the server's memory of it, and was taken again.
        new_store(store.out.parent / "two", storage=server.url, name="restarted")


def test_a_driver_whose_claim_went_to_another_stops(server, new_store, made_up_evidence, tmp_path):
    store = new_store(tmp_path / "one", storage=server.url, name="taken")
    server.stop()
    server.start()
    new_store(tmp_path / "two", storage=server.url, name="taken")
    with pytest.raises(UserError, match="another run writes to its study 'taken'"):
        score(store, made_up_evidence, 1)


@pytest.mark.parametrize("given", [None, Point("npo", 1, 0.0).params])
def test_an_answer_that_was_lost_makes_no_second_trial(new_store, made_up_evidence, monkeypatch, given):
    store = new_store()
    score(store, made_up_evidence, 2)
    lost = []

    def losing(call):
        def then_fail(*arguments, **named):
            result = call(*arguments, **named)
            if call not in lost:
                lost.append(call)
                # As when a server dies right after the commit: the write is done, and its answer is lost.
                raise OperationalError("COMMIT", {}, sqlite3.OperationalError("database is locked"))
            return result

        return then_fail

    for name in ("create_new_trial", "set_trial_user_attr", "set_trial_state_values"):
        monkeypatch.setattr(RDBStorage, name, losing(getattr(RDBStorage, name)))
    number, job = store.ask_point(store.spec.search_space(), given)
    assert (number, job.kind) == (2, "search")
    assert store.complete(job, number, made_up_evidence(job)) is None
    assert len(lost) == 3
    assert score(store, made_up_evidence, 1) == [3]
    assert states(store) == [TrialState.COMPLETE] * 4


def test_what_optuna_itself_wrote_twice_after_a_lost_answer_is_one_trial(new_store, made_up_evidence):
    store = new_store()
    score(store, made_up_evidence, 2)
    dialect = store.storage.engine.dialect
    commit, lost = dialect.do_commit, []

    def losing(connection):
        commit(connection)
        if not lost:
            lost.append(connection)
            raise sqlite3.OperationalError("database is locked")

    dialect.do_commit = losing
    number, job = store.ask_point(store.spec.search_space())
    assert store.complete(job, number, made_up_evidence(job)) is None
    assert lost and number == 3
    assert score(store, made_up_evidence, 1) == [4]
    assert states(store) == [*[TrialState.COMPLETE] * 2, TrialState.FAIL, *[TrialState.COMPLETE] * 2]
    assert "did not confirm" in store.failures()[0]["reason"]


@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_a_locked_file_is_waited_for(new_store, made_up_evidence, tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(storage, "BUSY_SECONDS", 1)
    store = new_store()
    number, job = store.ask_point(store.spec.search_space())
    held, freed = threading.Event(), []

    def hold():
        with locked(tmp_path / "out" / "study.db"):
            held.set()
            time.sleep(seconds)
            freed.append(time.monotonic())

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert store.complete(job, number, made_up_evidence(job)) is None
    assert time.monotonic() >= freed[0]
    holder.join()
    assert states(store) == [TrialState.COMPLETE]


def test_patience_ends_and_is_not_begun_again_for_every_trial(impatient, new_store, made_up_evidence, tmp_path):
    store = new_store()
    jobs = [store.ask_point(store.spec.search_space()) for _ in range(5)]
    with locked(tmp_path / "out" / "study.db"):
        started = time.monotonic()
        with pytest.raises(STORAGE_ERRORS):
            store.complete(jobs[0][1], jobs[0][0], made_up_evidence(jobs[0][1]))
        first = time.monotonic() - started
        for number, job in jobs[1:]:
            with pytest.raises(STORAGE_ERRORS):
                store.complete(job, number, made_up_evidence(job))
        assert first > 1 and time.monotonic() - started < 3 * first
        store.end_running()
    store.close()
    again = new_store()
    assert again.fail_orphaned_trials() == 5
    assert states(again) == [TrialState.FAIL] * 5


def test_an_interrupt_waits_for_the_end_of_a_transaction(new_store):
    store = new_store()
    done = []

    def interrupted_in_the_middle(again):
        with store.storage.engine.begin() as connection:
            connection.execute(text("INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (1, 'half', '1')"))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(connection.execute(text("UPDATE study_user_attributes SET value_json = '2' WHERE key = 'half'")))

    with pytest.raises(KeyboardInterrupt):
        store._database.with_retry(interrupted_in_the_middle)
    assert done
    assert store.storage.get_study_user_attrs(1)["half"] == 2
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_interrupted_runs_leave_nothing_open(new_store, made_up_evidence):
    """At moments that differ: between statements and in the middle of them."""
    store = new_store()
    main = threading.main_thread().ident
    for round_ in range(30):
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.002 + 0.0007 * round_, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
            while True:
                number, job = store.ask_point(store.spec.search_space())
                store.complete(job, number, made_up_evidence(job, -5.0, 0.9))
        store.end_running()
        assert {trial.state for trial in store.study.get_trials(deepcopy=False)} <= {TrialState.COMPLETE, TrialState.FAIL}
        store.use_sampler(RandomSampler(seed=round_))


def test_opening_a_locked_file_waits_and_opening_nothing_does_not(new_store, tmp_path):
    new_store().close()
    opened = []
    with locked(tmp_path / "out" / "study.db"):
        thread = threading.Thread(target=lambda: opened.append(StudyStore.open(tmp_path / "out").counts()))
        thread.start()
        time.sleep(0.5)
    thread.join(30)
    assert opened == [{"complete": 0, "pruned": 0, "failed": 0, "interrupted": 0, "running": 0}]
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be opened: OperationalError"):
        new_store(tmp_path / "elsewhere", storage=f"sqlite:///{tmp_path / 'no such folder' / 'a.db'}")
    assert time.monotonic() - started < 10


def at_once(url):
    """Ends of eight programs that open a database which nobody has opened before, at the same moment."""
    gate, ends = threading.Barrier(8), []

    def opens():
        gate.wait(30)
        try:
            open_storage(url).close()
            ends.append(None)
        except UserError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=opens) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return ends


def test_a_new_database_can_be_opened_by_several_at_the_same_moment(server, tmp_path):
    engine = create_engine(server.url, isolation_level="AUTOCOMMIT")
    for number in range(3):
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE race{number}"))
        assert at_once(server.url.removesuffix("postgres") + f"race{number}") == [None] * 8
    engine.dispose()
    assert at_once(f"sqlite:///{tmp_path / 'race.db'}") == [None] * 8


def test_a_wrong_password_is_said_without_the_password(server, new_store, tmp_path):
    wrong = server.url.replace(QUOTED, "hunter2%2Fhunter3")
    with pytest.raises(UserError, match="password authentication failed") as caught:
        new_store(storage=wrong)
    assert "hunter" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not (tmp_path / "out" / "study.json").exists()


def test_a_study_in_postgresql_keeps_no_password(server, new_store, made_up_evidence, tmp_path, monkeypatch):
    store = new_store(storage=server.url, name="secretive")
    score(store, made_up_evidence, 2)
    store.close()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes() and QUOTED.encode() not in path.read_bytes()
    with pytest.raises(UserError, match="cannot be opened"):
        StudyStore.open(tmp_path / "out")
    monkeypatch.setenv("UIPE_STORAGE", server.url)
    assert len(StudyStore.open(tmp_path / "out").trials_frame()) == 2


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:hunter2@bucket/deltas",
        "s3://AKIAEXAMPLE:hunter2/hunter2+hunter2@bucket/deltas?region=us-east-1",
        "s3://bucket/deltas?access_key=me&secret_key=hunter2&session_token=hunter2",
        "abfs://account:hunter2@container/deltas",
        "abfs://container/deltas?sas_token=hunter2&x=1",
        "https://store.example/deltas?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2",
        "postgresql://me:hunt@hunter2@host/db",
    ],
)
def test_secrets_of_any_url_are_hidden(url):
    assert "hunter2" not in without_password(url)
    assert "hunter2" not in without_secrets_of(f"cannot reach {url}", url)
    as_a_path = str(Path("/studies") / url)
    assert "hunter2" not in without_password(as_a_path)
    assert without_secrets_of("the key is hunter2", "s3://me:hunter2@bucket/a?b=1") == "the key is ***"
    assert without_secrets_of("the key is a/b", "s3://me:a%2Fb@bucket/a") == "the key is ***"
    assert without_password(url).partition("://")[0] == url.partition("://")[0]


def test_urls_without_secrets_are_shown_as_they_are():
    for url in ("s3://bucket/deltas?region=eu-west-1&endpoint_override=localhost:9000", "gs://bucket/a b", "file:///a/b@c"):
        assert without_password(url) == url


@pytest.mark.slow
def test_a_study_runs_in_postgresql_through_a_restart_of_its_server_and_is_resumed(
    server, finished, write_study, launch, tmp_path, monkeypatch
):
    monkeypatch.setenv("UIPE_STORAGE", server.url)
    file = write_study(tmp_path / "study.yaml", storage=server.url, search={"trials": 40}, scoring={"batch_size": 2})
    command = ("run", file, "--out", tmp_path / "out")

    def done():
        with contextlib.suppress(UserError):
            return StudyStore.open(tmp_path / "out").counts()["complete"]
        return 0

    driver = launch(*command)
    driver.until(lambda: done() >= 3)
    second = launch("run", file, "--out", tmp_path / "other")
    assert second.wait() == 2
    assert "another run writes to its study 'tiny'" in second.stderr
    server.stop()
    time.sleep(3)
    server.start()
    kept = done()
    driver.until(lambda: done() > kept)
    os.killpg(driver.process.pid, signal.SIGKILL)
    driver.wait()
    again = launch(*command)
    assert again.wait() == 0, again.stderr
    result = StudyResult.open(tmp_path / "out")
    assert result.trials["kind"].value_counts().to_dict() == {"search": 40, "alpha_zero": 4}
    assert result.store.counts()["running"] == 0
    for output in (driver, second, again):
        assert SECRET not in output.stderr + output.stdout and QUOTED not in output.stderr + output.stdout


@pytest.mark.slow
def test_a_study_whose_server_stays_away_stops_cleanly_and_is_resumed(
    server, finished, write_study, launch, tmp_path, monkeypatch
):
    monkeypatch.setenv("UIPE_STORAGE", server.url)
    changes = {"name": "away", "search": {"trials": 12}, "scoring": {"batch_size": 2}}
    file = write_study(tmp_path / "study.yaml", storage=server.url, **changes)
    command = ("run", file, "--out", tmp_path / "out")

    def done():
        with contextlib.suppress(UserError):
            return StudyStore.open(tmp_path / "out").counts()["complete"]
        return 0

    driver = launch(*command)
    driver.until(lambda: done() >= 3)
    before = done()
    server.stop()
    try:
        assert driver.wait(300) == 2, driver.stderr
    finally:
        server.start()
    assert "then the same command resumes the study" in driver.stderr
    assert "Traceback" not in driver.stderr and SECRET not in driver.stderr
    again = launch(*command)
    assert again.wait() == 0, again.stderr
    result = StudyResult.open(tmp_path / "out")
    assert result.trials["kind"].value_counts().to_dict() == {"search": 12, "alpha_zero": 4}
    assert result.store.counts()["running"] == 0
    assert result.store.counts()["complete"] >= before
