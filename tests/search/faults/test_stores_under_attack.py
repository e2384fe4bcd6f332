"""Delta entries damaged in every way, disks full or read-only, locks of the dead: found, mended, nothing else touched."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
import uuid

import pytest
from sqlalchemy import create_engine, text

pytestmark = pytest.mark.faults


def largest(entry):
    return max(entry.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def torn(entry, others, draws):
    """As a machine that lost power leaves it: the file is there in its length, its end was never written."""
    path = largest(entry)
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(size - draws.randrange(1, size // 2))
        stream.write(b"\0" * (size - stream.tell()))


def bit_flipped(entry, others, draws):
    path = largest(entry)
    content = bytearray(path.read_bytes())
    place = draws.randrange(len(content))
    content[place] ^= 1 << draws.randrange(8)
    path.write_bytes(bytes(content))


def truncated(entry, others, draws):
    path = largest(entry)
    os.truncate(path, draws.randrange(path.stat().st_size))


def missing(entry, others, draws):
    draws.choice(sorted(path for path in entry.iterdir() if path.name != "manifest.json")).unlink()


def foreign(entry, others, draws):
    """Another base run's entry in its place, whole and with a manifest that fits its files."""
    shutil.rmtree(entry)
    shutil.copytree(draws.choice(others), entry)


def manifest_missing(entry, others, draws):
    (entry / "manifest.json").unlink()


def manifest_bit_flipped(entry, others, draws):
    path = entry / "manifest.json"
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(7)
    path.write_bytes(bytes(content))


def manifest_truncated(entry, others, draws):
    path = entry / "manifest.json"
    os.truncate(path, draws.randrange(path.stat().st_size))


def manifest_foreign(entry, others, draws):
    shutil.copy(draws.choice(others) / "manifest.json", entry / "manifest.json")


DAMAGES = {
    damage.__name__.replace("_", " "): damage
    for damage in (
        torn,
        bit_flipped,
        truncated,
        missing,
        foreign,
        manifest_missing,
        manifest_bit_flipped,
        manifest_truncated,
        manifest_foreign,
    )
}


def stop_with_base_runs(study, end, wanted):
    """Runs the study until all its base runs are there and a few trials, then kills the driver."""
    driver = study.start()
    driver.until(lambda: len(list(study.deltas.glob("*/manifest.json"))) == 4 and study.complete() >= wanted)
    end(driver.process.pid, signal.SIGKILL)
    driver.wait()
    study.look()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_delta_entry(watched, hold, end, damage, repeat):
    stop_with_base_runs(watched, end, 10)
    entries = sorted(path.parent for path in watched.deltas.glob("*/manifest.json"))
    entry = watched.random.choice(entries)
    untouched = {path.name: path.read_bytes() for path in entry.iterdir()}
    DAMAGES[damage](entry, [other for other in entries if other != entry], watched.random)
    assert {path.name: path.read_bytes() for path in entry.iterdir()} != untouched
    watched.retrained.add(entry.name)
    driver = watched.finish(watched.start())
    assert f"{entry.name}: " in driver.stderr and "moved to" in driver.stderr, driver.stderr
    assert [path.name.split(".")[0] for path in (watched.deltas / "quarantine").iterdir()] == [entry.name]
    hold(f"delta entry: {damage}", watched)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system of its own at a folder; mounts it anew with other options when called again."""
    mounted = []

    def mount(folder, options):
        folder.mkdir(parents=True, exist_ok=True)
        verb = ["-o", f"remount,{options}"] if folder in mounted else ["-t", "tmpfs", "-o", options]
        done = subprocess.run(
            ["mount", *verb, *([] if folder in mounted else ["tmpfs"]), folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")
        if folder not in mounted:
            mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=False)


def test_disk_full_while_publishing(watched, hold, small_disk, repeat):
    # Room for the files of one base run or two, not for four.
    small_disk(watched.deltas, f"size={watched.random.randrange(100, 400)}k")
    driver = watched.start()
    # Without any base run there is nothing to search; with one the study goes on, and says what is missing.
    assert driver.wait() == (0 if list(watched.deltas.glob("*/manifest.json")) else 2), driver.stderr
    assert "No space left on device" in driver.stderr and "free some space" in driver.stderr
    assert "Traceback" not in driver.stderr
    assert all((path / "manifest.json").is_file() for path in watched.deltas.iterdir() if len(path.name) == 32)
    watched.look()
    small_disk(watched.deltas, "size=64m")
    watched.finish(watched.start())
    hold("disk full while publishing", watched)


def test_store_read_only(watched, hold, small_disk, repeat):
    small_disk(watched.deltas, "size=64m")
    small_disk(watched.deltas, "ro")
    driver = watched.start()
    assert driver.wait() == 2, driver.stderr
    assert "Read-only file system" in driver.stderr and "choose another folder" in driver.stderr
    watched.look()
    small_disk(watched.deltas, "rw")
    watched.finish(watched.start())
    hold("delta store read-only", watched)


@contextlib.contextmanager
def locked(database):
    """Holds the database's lock for writing, as a program that hangs in the middle of a transaction would."""
    with contextlib.closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_storage_locked_for_a_while(watched, hold, repeat):
    driver = watched.start()
    driver.until(lambda: watched.complete() >= watched.random.randrange(1, 20))
    with locked(watched.out / "study.db"):
        driver.until(lambda: "trying again for up to 60 s" in driver.stderr)
        time.sleep(watched.random.uniform(0, 15))
    assert watched.finish(driver) is driver
    assert "there again after" in driver.stderr
    hold("storage locked for a while", watched)


def test_storage_locked_for_good(watched, hold, repeat):
    driver = watched.start()
    driver.until(lambda: watched.complete() >= watched.random.randrange(1, 20))
    with locked(watched.out / "study.db"):
        assert driver.wait() == 2, driver.stderr
    assert "locked" in driver.stderr and "the same command resumes the study" in driver.stderr
    assert "Traceback" not in driver.stderr
    watched.look()
    watched.finish(watched.start())
    hold("storage locked until the run gives up", watched)


@pytest.fixture
def in_postgresql(watched, grid_study, server, monkeypatch, tmp_path):
    """The grid study with its trials in a database of its own on a server, which can be stopped."""
    name = f"faults_{uuid.uuid4().hex[:8]}"
    with create_engine(server.url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    watched.database = server.url.removesuffix("postgres") + name
    monkeypatch.setenv("UIPE_STORAGE", watched.database)  # the password is nowhere else
    watched.command = ("run", grid_study(tmp_path / "watched", storage=watched.database), "--out", watched.out)
    return watched


def test_server_gone_for_a_while(in_postgresql, server, hold, repeat):
    study = in_postgresql
    driver = study.start()
    for _ in range(2):
        wanted = study.complete() + study.random.randrange(1, 15)
        driver.until(lambda wanted=wanted: study.complete() >= wanted)
        study.look()
        server.stop()
        try:
            time.sleep(study.random.uniform(0, 15))
        finally:
            server.start()
    assert study.finish(driver) is driver
    hold("PostgreSQL stopped for a while", study)


def test_server_gone_for_good(in_postgresql, server, hold, repeat):
    study = in_postgresql
    driver = study.start()
    driver.until(lambda: study.complete() >= study.random.randrange(1, 20))
    study.look()
    server.stop()
    try:
        assert driver.wait(300) == 2, driver.stderr
    finally:
        server.start()
    assert "then the same command resumes the study" in driver.stderr
    assert "Traceback" not in driver.stderr
    study.finish(study.start())
    hold("PostgreSQL stopped until the run gives up", study)


def test_lock_of_a_dead_process(watched, hold, end, repeat):
    stop_with_base_runs(watched, end, watched.random.randrange(1, 10))
    # What a killed process leaves: lock files, and the folder of an entry that was being written.
    assert (watched.out / ".lock").exists()
    keys = [path.parent.name for path in watched.deltas.glob("*/manifest.json")]
    for key in keys:
        (watched.deltas / "locks" / f"{key}.lock").touch()
    abandoned = watched.deltas / "tmp" / keys[0]
    abandoned.mkdir(parents=True)
    (abandoned / "epoch-001.safetensors").write_bytes(b"half of it")
    watched.finish(watched.start())
    hold("locks and leavings of a dead process", watched)


def test_two_drivers(watched, hold, repeat):
    first = watched.start()
    first.until(lambda: watched.complete() >= watched.random.randrange(1, 10))
    second = watched.start()
    assert second.wait() == 2
    assert "another run of this study is under way" in second.stderr
    watched.finish(first)
    hold("a second driver on the same study", watched)
