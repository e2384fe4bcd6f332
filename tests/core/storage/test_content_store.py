"""The contract of the content store: made once, published whole, never handed out broken."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import uipe_core
from uipe_core.errors import UserError
from uipe_core.storage.content_store import BrokenEntryError, ContentStore, content_key
from uipe_core.storage.files import file_hash, write_atomic

INPUTS = {"what": "weights", "seed": 3}
KEY = content_key(INPUTS)

MAKER = """
import sys, time
from pathlib import Path
from uipe_core.storage.content_store import ContentStore
root, calls, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def make(folder):
    (folder / "half.bin").write_bytes(b"h" * 1000)
    with calls.open("a") as stream:
        stream.write("called\\n")
    print("half", flush=True)
    time.sleep(seconds)
    (folder / "rest.bin").write_bytes(b"r" * 1000)
print("ready", flush=True)
ContentStore(root).get_or_make({"what": "weights", "seed": 3}, make)
print("done", flush=True)
"""


def make(folder):
    (folder / "deep").mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "deep" / "config.json").write_text('{"a": 1}')


def never(folder):
    raise AssertionError("made a second time")


@pytest.fixture
def store(tmp_path):
    return ContentStore(tmp_path / "store")


@pytest.fixture
def start_maker(tmp_path):
    """Starts a process that makes the entry for `INPUTS`, and kills what is left of it at the end."""
    started = []

    def start(seconds):
        command = [sys.executable, "-c", MAKER, str(tmp_path / "store"), str(tmp_path / "calls"), str(seconds)]
        environment = {**os.environ, "PYTHONPATH": str(Path(uipe_core.__file__).parents[1])}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def reach(process, line):
    """Waits until the process has printed the line."""
    assert any(printed.strip() == line for printed in process.stdout)


@given(st.dictionaries(st.text(), st.integers() | st.floats() | st.text() | st.none() | st.lists(st.booleans())))
def test_a_key_depends_on_content_and_not_on_order(inputs):
    backwards = dict(reversed(inputs.items()))
    assert content_key(backwards) == content_key(inputs) == content_key(json.loads(json.dumps(inputs)))
    assert content_key({**inputs, "one more": 1}) != content_key(inputs)


def test_an_entry_is_made_once_and_found_by_other_stores_on_the_same_folder(store):
    folder = store.get_or_make(INPUTS, make)
    assert folder == store.get_or_make(INPUTS, never) == ContentStore(store.root).get_or_make(INPUTS, never)
    assert folder == store.find(KEY) == ContentStore(store.root).find(KEY)
    assert store.get_or_make({**INPUTS, "seed": 4}, make) != folder


def test_the_manifest_says_what_an_entry_is_made_of(store):
    folder = store.get_or_make(INPUTS, make)
    manifest = store.manifest(KEY)
    assert (manifest["key"], manifest["inputs"]) == (KEY, INPUTS)
    assert set(manifest["files"]) == {"weights.bin", "deep/config.json"}
    digest = hashlib.sha256((folder / "weights.bin").read_bytes()).hexdigest()
    assert manifest["files"]["weights.bin"] == {"bytes": 5120, "sha256": digest}
    assert file_hash(folder / "weights.bin") == digest


def test_finding_in_a_store_that_is_not_there_finds_nothing_and_writes_nothing(store):
    assert store.find(KEY) is None
    assert not store.root.exists()
    with pytest.raises(BrokenEntryError, match="manifest is missing"):
        store.manifest(KEY)


def test_threads_make_an_entry_once(tmp_path):
    calls, together = [], threading.Barrier(6)

    def slow(folder):
        calls.append(folder)
        time.sleep(0.05)
        make(folder)

    def ask(_):
        together.wait()
        return ContentStore(tmp_path).get_or_make(INPUTS, slow)

    with ThreadPoolExecutor(6) as pool:
        folders = set(pool.map(ask, range(6)))
    assert len(calls) == len(folders) == 1


def test_processes_make_an_entry_once(start_maker, tmp_path):
    processes = [start_maker(0.3) for _ in range(4)]
    assert all(process.wait(30) == 0 for process in processes)
    assert (tmp_path / "calls").read_text() == "called\n"
    assert ContentStore(tmp_path / "store").get_or_make(INPUTS, never)


def test_a_killed_maker_leaves_no_entry_and_the_next_caller_makes_it(start_maker, store):
    victim = start_maker(600)
    reach(victim, "half")
    victim.send_signal(signal.SIGKILL)
    victim.wait(10)
    assert store.find(KEY) is None
    assert (store.root / "locks" / f"{KEY}.lock").exists()
    folder = store.get_or_make(INPUTS, make)
    assert not (folder / "half.bin").exists()
    assert list((store.root / "tmp").iterdir()) == []


def test_who_waits_for_a_maker_that_is_killed_goes_on_in_its_place(start_maker, store, tmp_path):
    victim = start_maker(600)
    reach(victim, "half")
    heir = start_maker(0)
    reach(heir, "ready")
    time.sleep(0.1)
    assert heir.poll() is None
    victim.send_signal(signal.SIGKILL)
    reach(heir, "done")
    assert (tmp_path / "calls").read_text() == "called\n" * 2
    assert (store.find(KEY) / "rest.bin").exists()


def truncate(folder):
    path = folder / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder):
    content = bytearray((folder / "weights.bin").read_bytes())
    content[2000] ^= 1
    (folder / "weights.bin").write_bytes(content)


def change_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


BROKEN = {
    "truncated": (truncate, "weights.bin has 5119 bytes, expected 5120"),
    "bit-flipped": (flip_a_bit, "weights.bin does not match its checksum"),
    "file missing": (lambda folder: (folder / "deep" / "config.json").unlink(), "deep/config.json is missing"),
    "manifest missing": (lambda folder: (folder / "manifest.json").unlink(), "never finished"),
    "manifest torn": (lambda folder: (folder / "manifest.json").write_text('{"key": '), "manifest is not JSON"),
    "manifest binary": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest is not JSON"),
    "manifest no object": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest is not an object"),
    "manifest empty": (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest was altered"),
    "inputs altered": (lambda folder: change_manifest(folder, inputs={"seed": 4}), "manifest was altered"),
    "checksums altered": (lambda folder: change_manifest(folder, files={}), "manifest was altered"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_entry_is_reported_quarantined_and_made_again(case, store, caplog):
    spoil, reason = BROKEN[case]
    spoil(store.get_or_make(INPUTS, make))
    fresh = ContentStore(store.root)
    with caplog.at_level(logging.WARNING):
        folder = fresh.get_or_make(INPUTS, make)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reason in caplog.text
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert ContentStore(store.root).find(KEY) == folder
    assert (folder / "weights.bin").stat().st_size == 5120


def test_finding_a_broken_entry_quarantines_it_and_finds_nothing(store, caplog):
    truncate(store.get_or_make(INPUTS, make))
    fresh = ContentStore(store.root)
    assert fresh.find(KEY) is None
    assert fresh.find(KEY) is None
    assert caplog.text.count("it will be made again") == 1


def test_an_entry_under_a_foreign_key_is_quarantined(store, caplog):
    other = {**INPUTS, "seed": 4}
    store.get_or_make(INPUTS, make).rename(store.root / content_key(other))
    assert ContentStore(store.root).find(content_key(other)) is None
    assert "entry belongs to another key" in caplog.text


def test_an_entry_deleted_behind_its_back_is_made_again(store):
    folder = store.get_or_make(INPUTS, make)
    folder.rename(store.root / "elsewhere")
    assert store.find(KEY) is None
    assert store.get_or_make(INPUTS, make) == folder


@pytest.mark.parametrize("error", [RuntimeError("training diverged"), KeyboardInterrupt(), FileNotFoundError(2, "no such")])
def test_an_error_while_making_publishes_nothing_and_comes_through(error, store):
    def fail(folder):
        make(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        store.get_or_make(INPUTS, fail)
    assert caught.value is error
    assert store.find(KEY) is None
    assert list((store.root / "tmp").iterdir()) == []
    assert store.get_or_make(INPUTS, make).is_dir()


def test_an_entry_may_be_made_with_the_help_of_another(store):
    def build(folder):
        base = store.get_or_make({"stage": "base"}, make)
        (folder / "copy.bin").write_bytes((base / "weights.bin").read_bytes())

    assert (store.get_or_make({"stage": "full"}, build) / "copy.bin").stat().st_size == 5120


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_place_where_no_folder_can_be_is_the_users_error(below, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cache folder .*file.*choose another folder"):
        ContentStore(tmp_path / "file" / below).get_or_make(INPUTS, never)


def test_a_read_only_folder_is_the_users_error(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write to read-only folders")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        ContentStore(tmp_path / "store").get_or_make(INPUTS, never)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_the_users_error_and_publishes_nothing(store):
    def fill(folder):
        make(folder)
        Path("/dev/full").write_bytes(b"one byte too many")

    with pytest.raises(UserError, match="No space left on device; free some space or choose another folder"):
        store.get_or_make(INPUTS, fill)
    assert store.find(KEY) is None
    assert list((store.root / "tmp").iterdir()) == []


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in path.parent.iterdir()] == [("file.json", b"new")]
