"""Study folders broken at random: what reads them ends with a result or a sentence, and the doctor always with findings."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from fuzzing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.results.status import read_status
from search.results.study_result import StudyResult
from search.store.checks import Finding
from search.store.doctor import examine
from uipe_core.errors import UserError

VALUES = st.sampled_from(
    [
        None, True, -1, 0, 1, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "npo", "search", "../..",
        "\x1b[31m", "\ud800", [], [1], {}, {"x": {}}, [[]], {"npo": 1}, {"npo": {"delta": "x"}}, "2026-11-30",
        "2026-11-30T00:00:00+00:00",
    ]
) | st.text(max_size=8)  # fmt: skip

TABLES = {
    "trials": ("number", "state", "datetime_start", "datetime_complete"),
    "trial_values": ("objective", "value", "value_type"),
    "trial_params": ("param_name", "param_value", "distribution_json"),
    "trial_user_attributes": ("key", "value_json"),
    "studies": ("study_name",),
    "study_directions": ("direction", "objective"),
    "study_user_attributes": ("key", "value_json"),
    "version_info": ("schema_version", "library_version"),
}


@pytest.fixture(scope="module")
def original(finished, tmp_path_factory):
    """The finished study with its database as one file and without what is no evidence."""
    out = tmp_path_factory.mktemp("original") / "out"
    shutil.copytree(finished.out, out, ignore=shutil.ignore_patterns("ray", "report", "*.lock", ".matplotlib"))
    with contextlib.closing(sqlite3.connect(out / "study.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode=DELETE")
    return out


def places(content, path=()):
    yield path
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from places(value, (*path, key))


def changed(data, content):
    """A JSON value with a part of it replaced, removed or renamed."""
    path = data.draw(st.sampled_from(list(places(content))))
    if not path:
        return data.draw(VALUES)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    how = data.draw(st.sampled_from(["value", "value", "delete", "rename"]))
    if how == "delete":
        del inside[path[-1]]
    elif how == "rename" and isinstance(inside, dict):
        inside[data.draw(st.text(max_size=6))] = inside.pop(path[-1])
    else:
        inside[path[-1]] = data.draw(VALUES)
    return content


def break_json(data, out):
    path = data.draw(st.sampled_from([out / "study.json", *sorted((out / "logs").glob("*.json"))]))
    path.write_bytes(json.dumps(changed(data, json.loads(path.read_bytes()))).encode())


def break_bytes(data, out):
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])


def break_files(data, out):
    path = data.draw(st.sampled_from(sorted(out.rglob("*"))))
    how = data.draw(st.sampled_from(["remove", "empty", "folder", "swap"]))
    other = data.draw(st.sampled_from(sorted(other for other in out.rglob("*") if other.is_file())))
    if how == "swap" and path.is_file():
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.mkdir()


def break_database(data, out):
    table = data.draw(st.sampled_from(sorted(TABLES)))
    column = data.draw(st.sampled_from(TABLES[table]))
    value = data.draw(st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | st.none())
    with contextlib.closing(sqlite3.connect(out / "study.db")) as database:
        database.execute("PRAGMA ignore_check_constraints=1")
        rows = [row for (row,) in database.execute(f"SELECT rowid FROM {table} ORDER BY rowid")]
        if not rows:
            return
        row = data.draw(st.sampled_from(rows))
        if data.draw(st.integers(0, 4)) == 0:
            database.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
        else:
            if column.endswith("_json"):
                ((text,),) = database.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (row,))
                with contextlib.suppress(ValueError):
                    value = json.dumps(changed(data, json.loads(text)))
            # What the schema forbids cannot be there either.
            with contextlib.suppress(sqlite3.IntegrityError, UnicodeEncodeError):
                database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row))
        database.commit()


def read_all(out):
    """What `status`, `pareto` and `select` show of a study, without drawing it."""
    read_status(out)
    result = StudyResult.open(out)
    with contextlib.closing(result.store):
        json.dumps([result.summary(), result.rows(result.front), result.rows(result.controls), result.audits])
        json.dumps([result.rows_of(result.held_out), result.rows_of(result.confirmations)])
        result.store.failures()
        for rule in ("utility-floor", "knee"):
            row, _ = result.choose(rule)
            assert result.reason(row, rule)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_broken_study_folder_is_read_or_explained(original, tmp_path_factory, data):
    out: Path = tmp_path_factory.getbasetemp() / "broken-study"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(original, out)
    for _ in range(data.draw(st.integers(1, 2))):
        damage = data.draw(st.sampled_from([break_json, break_bytes, break_files, break_database, break_database]))
        # What the first damage destroyed cannot be damaged further.
        with contextlib.suppress(OSError, ValueError, sqlite3.Error):
            damage(data, out)
    try:
        read_all(out)
    except UserError as error:
        str(error).encode()
        assert str(error).strip()
    try:
        findings = examine(out, fix=False)
    except UserError as error:
        # A folder without a record that can be read is no study.
        assert "study.json" in str(error) or "no study" in str(error), error
        return
    assert findings and all(isinstance(finding, Finding) for finding in findings)
