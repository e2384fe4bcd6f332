"""An output folder at a URL: mirrored as it grows, taken over by another machine, never worked on by two."""

import json
import shutil
import time

import pytest

from search.results.status import read_status
from search.results.study_result import StudyResult
from search.store import mirror as out_mirror
from search.store.mirror import readable_folder, working_folder
from search.store.study_store import StudyStore
from uipe_core.errors import UserError


@pytest.fixture
def on_machine(tmp_path, monkeypatch):
    """Moves this process to a machine: its caches are that machine's."""

    def move(name):
        monkeypatch.setenv("UIPE_CACHE", str(tmp_path / name))

    for name, seconds in (("PUSH_SECONDS", 0.2), ("BEAT_SECONDS", 0.1), ("SETTLE_SECONDS", 0.05)):
        monkeypatch.setattr(out_mirror, name, seconds)
    move("machine-1")
    return move


@pytest.fixture
def remote(tmp_path):
    return tmp_path / "remote"


@pytest.fixture
def url(remote, on_machine):
    return f"file://{remote}"


def score(store, made_up_evidence, count=1):
    for _ in range(count):
        number, job = store.ask_point(store.spec.search_space())
        store.complete(job, number, made_up_evidence(job), items=b"scores of every item")


def until(happened, seconds=30):
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.02)


def complete(url):
    try:
        return len(StudyStore.open(readable_folder(url)).trials_frame())
    except UserError:
        return 0


def test_a_folder_is_itself(tmp_path):
    with working_folder(tmp_path / "out") as folder:
        assert folder == tmp_path / "out"
    assert readable_folder(tmp_path / "out") == tmp_path / "out"


def test_a_run_is_seen_at_its_url_while_it_grows_and_goes_on_elsewhere(url, remote, on_machine, new_store, made_up_evidence):
    with working_folder(url) as folder:
        store = new_store(folder)
        (folder / "ray").mkdir()
        (folder / "ray" / "huge.log").write_text("Ray's own")
        score(store, made_up_evidence, 2)
        until(lambda: complete(url) == 2)
        status = read_status(url)
        assert (status["state"], status["out"], status["trials"]["done"]) == ("running", url, 2)
        score(store, made_up_evidence)
        store.close()
    names = {path.name for path in remote.rglob("*") if path.is_file()}
    assert {"study.db", "study.json", "00002.npz"} <= names
    assert not names & {"huge.log", "lease.json", "study.db-wal"}

    on_machine("machine-2")
    assert complete(url) == 3
    assert read_status(url)["state"] != "running"
    with working_folder(url) as folder:
        assert not (folder / "ray").exists()
        store = new_store(folder)
        assert store.counts()["complete"] == 3
        score(store, made_up_evidence)
        store.close()

    on_machine("machine-1")
    with working_folder(url) as folder:
        assert new_store(folder).counts()["complete"] == 4
        aside = [path for path in folder.parent.iterdir() if path.is_dir() and path.name.startswith(f"{folder.name}.2")]
        assert len(aside) == 1  # what this machine had, before the other went on
    assert len(StudyResult.open(url).trials) == 4


def test_a_killed_run_goes_on_where_it_was_on_its_own_machine(url, new_store, made_up_evidence, monkeypatch):
    with working_folder(url) as folder:
        store = new_store(folder)
        score(store, made_up_evidence)
        store.close()
    # What a run had and could not bring there before it was killed, its lease still lying there.
    store = new_store(folder)
    score(store, made_up_evidence)
    store.close()
    mirror = out_mirror._Mirror(url)
    mirror._owner = (folder.parent / f"{folder.name}.owner").read_text()
    mirror._write_lease()
    with working_folder(url) as again:
        assert again == folder
        assert new_store(folder).counts()["complete"] == 2
    assert complete(url) == 2


def test_a_file_that_is_again_what_it_was_stays(url, remote):
    with working_folder(url) as folder:
        for content in ("one", "two", "one", "three"):
            (folder / "study.json").write_text(content)
            until(lambda content=content: content in said(remote))
    assert (readable_folder(url) / "study.json").read_text() == "three"


def said(remote):
    """What the index says is in study.json."""
    try:
        named = json.loads((remote / "index.json").read_text())["files"]["study.json"]
    except (FileNotFoundError, KeyError):
        return ""
    return (remote / "files" / named["sha256"][:16] / "study.json").read_text()


def test_two_runs_of_one_url_are_refused(url, on_machine, monkeypatch):
    with working_folder(url):
        with pytest.raises(UserError, match="another run of this study is under way, on this machine"), working_folder(url):
            pass
        on_machine("machine-2")
        with pytest.raises(UserError, match="under way, on another machine, last seen"), working_folder(url):
            pass
        on_machine("machine-1")


def test_a_run_that_died_elsewhere_is_forgotten_and_hears_of_it_if_it_did_not_die(url, on_machine, monkeypatch, new_store):
    with (
        pytest.raises(UserError, match="another run has taken it over; what this one did is in"),
        working_folder(url) as folder,
    ):
        new_store(folder).close()
        monkeypatch.setattr(out_mirror, "STALE_SECONDS", 0.0)
        on_machine("machine-2")
        with working_folder(url):
            time.sleep(0.5)
            on_machine("machine-1")
    assert (folder / "study.json").is_file()


def test_an_interrupted_run_is_brought_there_too(url, new_store, made_up_evidence):
    with pytest.raises(KeyboardInterrupt), working_folder(url) as folder:
        store = new_store(folder)
        score(store, made_up_evidence)
        store.close()
        raise KeyboardInterrupt
    assert complete(url) == 1


def test_a_damaged_copy_and_a_damaged_store_are_told_apart(url, remote, new_store, made_up_evidence, monkeypatch):
    with working_folder(url) as folder:
        store = new_store(folder)
        score(store, made_up_evidence)
        store.close()
    assert complete(url) == 1
    named = json.loads((remote / "index.json").read_text())["files"]["study.db"]
    database = remote / "files" / named["sha256"][:16] / "study.db"
    whole = database.read_bytes()
    database.write_bytes(whole[:-1])
    assert complete(url) == 1  # this machine has it
    shutil.rmtree(readable_folder(url))
    monkeypatch.setattr(out_mirror, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="missing or damaged"):
        readable_folder(url)
    database.write_bytes(whole)
    assert complete(url) == 1


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"id": "a"}', json.dumps({"id": "a", "files": {"../stolen": {"bytes": 1, "sha256": "0" * 64}}})],
)
def test_an_index_that_is_none_or_leads_out_is_refused(url, remote, content):
    remote.mkdir()
    (remote / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        readable_folder(url)
    with pytest.raises(UserError, match=r"index\.json is damaged"), working_folder(url):
        pass


def test_a_url_without_a_study_or_with_keys_is_refused(url):
    with pytest.raises(UserError, match="no study there"):
        readable_folder(url)
    with pytest.raises(UserError, match="give keys and passwords in the environment") as caught:
        readable_folder("s3://AKIAEXAMPLE:hunter2@bucket/runs")
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_a_study_runs_with_everything_at_urls_and_is_resumed(write_study, run_command, launch, tmp_path):
    deltas, out = f"file://{tmp_path / 'deltas'}", f"file://{tmp_path / 'runs'}"
    file = write_study(tmp_path / "study.yaml", cache={"deltas": deltas, "node_gigabytes": 1}, search={"trials": 3})
    first = json.loads(run_command("run", file, "--out", out, "--json"))
    assert first["trials"]["complete"] == 4 + 3
    front = json.loads(run_command("pareto", out, "--json"))["front"]
    assert front
    assert len(list((tmp_path / "deltas").glob("*/manifest.json"))) == 2
    run_command("run", file, "--out", out, "--trials", "5")
    assert len(StudyResult.open(out).trials) == 4 + 5
