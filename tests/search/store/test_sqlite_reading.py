"""Studies are read without Optuna's storage: the same trials, from files that cannot be written too, and clear errors."""

import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import make_url

from search.store.optuna_compat import read_trials
from search.store.record import own_database
from search.store.sqlite_reading import SQLiteFile, copy_database
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

ROOT = str(Path(__file__).parents[3])

PYTHON_WITHOUT_STORAGE = """
import sys
from pathlib import Path
from search.store.study_store import StudyStore
store = StudyStore.open(Path(sys.argv[1]))
print(store.counts(), len(store.controls_frame()))
assert not {"sqlalchemy", "alembic"} & sys.modules.keys()
"""


@pytest.fixture
def study(new_store, made_up_evidence):
    store = new_store()
    for alpha in (-0.5, 0.5):
        number, job = store.ask_point(store.spec.search_space(), {"base": "npo", "epoch": 1, "alpha": alpha})
        store.complete(job, number, made_up_evidence(job))
    return store


def test_reading_needs_neither_sqlalchemy_nor_optunas_storage(study):
    done = subprocess.run(
        [sys.executable, "-c", PYTHON_WITHOUT_STORAGE, study.out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'complete': 2" in done.stdout


def test_what_is_read_is_what_the_writer_reads_also_while_it_writes(study, made_up_evidence):
    reader = StudyStore.open(study.out)
    assert list(reader.trials()) == list(study.trials())
    number, job = study.ask_point(study.spec.search_space(), {"base": "npo", "epoch": 2, "alpha": 1.5})
    assert reader.counts()["running"] == 1
    study.complete(job, number, made_up_evidence(job))
    assert reader.counts()["complete"] == 3
    assert reader.study.trials == study.study.trials  # Optuna's own view, opened when it is asked for
    reader.close()


def read_only(monkeypatch, *folders):
    """Answer as the operating system does on a file system that cannot be written; root may write everything else."""
    import os

    real = os.access
    under = tuple(str(folder) for folder in folders)
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and str(path).startswith(under)) and real(path, mode)
    )


@pytest.mark.parametrize("open_writer", [False, True])
def test_a_study_that_cannot_be_written_is_read_and_nothing_is_left_beside_it(study, tmp_path, monkeypatch, open_writer):
    expected = list(study.trials())
    if not open_writer:
        study.close()
    copy = tmp_path / "copy"
    shutil.copytree(study.out, copy)
    assert ((copy / "study.db-wal").exists() and (copy / "study.db-wal").stat().st_size > 0) is open_writer
    before = sorted(path.name for path in copy.iterdir())
    read_only(monkeypatch, copy)
    reader = StudyStore.open(copy)
    assert list(reader.trials()) == expected
    with pytest.raises(UserError, match=r"readonly"):
        reader.source.rows("DELETE FROM trials", {})
    reader.close()
    assert sorted(path.name for path in copy.iterdir()) == before


@pytest.mark.parametrize("damage", ["text", "pages", "empty", "another"])
def test_a_damaged_database_is_named_with_its_remedy(study, damage):
    study.close()
    path = study.out / "study.db"
    if damage == "text":
        path.write_text("no database at all" * 100)
    elif damage == "pages":
        content = path.read_bytes()
        path.write_bytes(content[:4096] + bytes(len(content) - 4096))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE things (name TEXT)")
    with pytest.raises(UserError, match=r"study\.db: cannot be opened or read: .*; restore the file from a copy"):
        StudyStore.open(study.out)


def test_a_database_that_is_locked_is_waited_for(study, monkeypatch):
    monkeypatch.setattr("search.store.sqlite_reading.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("search.store.sqlite_reading.BUSY_SECONDS", 0.05)
    study.close()
    other = sqlite3.connect(study.out / "study.db", isolation_level=None)
    other.execute("PRAGMA journal_mode=DELETE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="database is locked; try again"):
        SQLiteFile(study.out / "study.db").rows("SELECT 1 FROM trials", {})
    other.execute("ROLLBACK")
    assert SQLiteFile(study.out / "study.db").rows("SELECT COUNT(*) FROM trials", {}) == [(2,)]
    other.close()


@pytest.mark.parametrize("name", ["a b", "c%d+e", "ü#?&", 'x;y@z:"'])
def test_the_url_of_the_own_database_is_sqlalchemys(tmp_path, name):
    folder = tmp_path / name
    assert make_url(own_database(folder)).database == str((folder / "study.db").resolve())
    assert quote(name, safe=" +/") in own_database(folder)


def test_a_copy_is_taken_again_while_its_database_changes(study, tmp_path, monkeypatch):
    copied, real = [], shutil.copyfile

    def while_it_grows(source, target):
        copied.append(source.name)
        real(source, target)
        if len(copied) == 1:
            with source.open("ab") as file:
                file.write(bytes(1))

    study.close()
    monkeypatch.setattr(shutil, "copyfile", while_it_grows)
    copy = copy_database(study.out / "study.db", tmp_path)
    assert copied == ["study.db", "study.db"]
    assert copy.read_bytes() == (study.out / "study.db").read_bytes()


def test_names_that_mysql_reserves_are_asked_for_behind_a_dot(study):
    asked, rows = [], study.source.rows
    reads = lambda statement, given: asked.append(statement) or rows(statement, given)  # noqa: E731
    assert read_trials(reads, study.study_ids[False], names=("kind",))
    assert not [each for each in asked if re.search(r"(?<![.:\w])key\b", each)]


READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
shift
exec "$@"
"""
"""Run a command where a folder is mounted read-only; the mount ends with the command, which has mounts of its own."""


def may_mount(folder):
    """Whether tests can mount here: root in a container often may not."""
    command = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", folder, "touch", folder / "written"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode != 0 and "Read-only file system" in done.stderr and not (folder / "written").exists()


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
def test_a_study_on_a_file_system_mounted_read_only_is_shown_and_exported(copied, environment, tmp_path, killed):
    if not may_mount(copied):
        pytest.skip("no folder can be mounted read-only here (needs root, unshare and mount)")
    if killed:  # what is still in the write-ahead log when the driver dies, as far as a copy can have it
        writer = sqlite3.connect(copied / "study.db")
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("UPDATE studies SET study_name = study_name")
        writer.commit()
        wal = (copied / "study.db-wal").read_bytes()
        writer.close()
        (copied / "study.db-wal").write_bytes(wal)
        assert wal
    # Reports of an older run do not hide that none can be written.
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    def uipe(*arguments):
        command = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", copied, sys.executable, "-m", "search", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": ROOT})
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    for command in (["status"], ["pareto", "--json"], ["select"], ["doctor"]):
        code, output, error = uipe(command[0], copied, *command[1:])
        assert (code, error) == (0, "") and output, (command, error)
    code, _, error = uipe("report", copied)
    assert code == 2 and "cannot write the report into" in error and "`uipe report --to`" in error
    assert "matplotlib" not in error.lower()
    assert uipe("report", copied, "--to", tmp_path / "report")[0] == 0
    assert (tmp_path / "report" / "report.html").stat().st_size
    for form in ("recipe", "model"):
        code, _, error = uipe("export", copied, "--rule", "utility-floor", "--to", tmp_path / form, "--as", form)
        assert code == 0, error
    for command in (["confirm", copied, "--top", "1"], ["doctor", copied, "--fix"]):
        code, _, error = uipe(*command)
        assert code == 2 and "Read-only file system" in error, error
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
