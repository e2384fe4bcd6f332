"""A study whose storage has a secret in its URL, really run: where the secret must not be, and who can reach the run."""

import json
import sqlite3
from pathlib import Path

import pytest

from search.problem.space import Point
from search.spec.errors import without_password, without_secrets_of
from search.store.study_store import StudyStore

SECRET = "hunter2-9f3c"


def bytes_below(*folders):
    """Every file below some folders, with its content; sockets and links aside."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()


def listening(pids):
    """Local addresses, as the kernel writes them, on which any of these processes listens."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = {}
    for table in ("tcp", "tcp6"):
        for row in (line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]):
            if row[3] == "0A" and row[9] in inodes:
                address, _, port = row[1].rpartition(":")
                found[int(port, 16)] = address
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture(scope="module")
def secret_study(finished, write_study, tmp_path_factory):
    """A study that begins at the front of the finished one, and keeps its trials at a URL with a secret."""
    folder = tmp_path_factory.mktemp("secret")
    url = f"sqlite:///file:{folder / 'study.db'}?password={SECRET}&uri=true"
    changes = {"storage": url, "warm_start": str(finished.out), "search": {"trials": 2}}
    return write_study(folder / "tiny.yaml", **changes), folder


@pytest.mark.slow
def test_a_run_hides_its_secret_begins_at_an_earlier_front_and_listens_on_loopback(
    secret_study, finished, result, launch, living_processes, place, tmp_path
):
    study, folder = secret_study
    out = tmp_path / "out"
    driver = launch("run", study, "--out", out, "--json")
    heard = {}

    def scoring():
        heard.update(listening(living_processes(driver.tag)))
        return "searching" in driver.stderr

    driver.until(scoring, 240)
    heard.update(listening(living_processes(driver.tag)))
    assert driver.wait(240) == 0, driver.stderr
    assert len(heard) >= 3, "Ray's processes were looked at"
    assert set(heard.values()) <= LOOPBACK, heard

    # The front of the earlier study was scored first, once, as points of this search.
    with sqlite3.connect(folder / "study.db") as database:
        (count,) = database.execute("select count(*) from trials where state = 'RUNNING'").fetchone()
        rows = database.execute("select value_json from trial_user_attributes where key = 'evidence'").fetchall()
    assert count == 0
    taken = [Point(row["base"], row["epoch"], row["alpha"]) for row in result.front.to_dict("records") if row["alpha"] != 0]
    origins = [origin for (value,) in rows if (origin := json.loads(value).get("warm_start"))]
    assert origins == ["tiny"] * min(len(taken), 2)

    again = launch("run", study, "--out", out, "--json")
    assert again.wait(240) == 0, again.stderr
    assert json.loads(again.stdout)["trials"] == json.loads(driver.stdout)["trials"]
    assert len(list((out / "ray").glob("session_2*"))) == 1, "nothing was left to do, so Ray was not started"

    shown = [driver.stdout, driver.stderr, again.stdout, again.stderr]
    assert not any(SECRET in text for text in shown)
    looked_at = 0
    for path, content in bytes_below(out, folder, place["home"], place["scratch"], place["cache"]):
        looked_at += 1
        assert SECRET.encode() not in content or path == study, path
    assert looked_at > 50
    assert "***" in json.loads((out / "study.json").read_text())["storage"]


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_a_broken_study_does_not_tell_its_secret(write_study, tmp_path, call, command):
    for url in (f"postgresql://me:{SECRET}@[host/db", f"redis://:{SECRET}@host", f"postgresql://host/x?sslpassword={SECRET}"):
        study = write_study(tmp_path / "study.yaml", storage=url, search={"trials": -1}, unknown=url, model={"heads": url})
        code, output, error = call(command, study)
        assert code == 2 and "problems" in error
        assert SECRET not in output + error


def test_a_database_that_cannot_be_reached_does_not_tell_the_secret(new_store):
    with pytest.raises(Exception, match="storage") as caught:
        new_store(storage=f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/db?connect_timeout=1")
    error = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@host/db", f"postgresql://me:a:{SECRET}@b@host/db", f"s3://id:{SECRET}@bucket/x",
        f"sqlite:///file:x.db?Password={SECRET}", f"s3://bucket/x?secret_key={SECRET}&region=x", f"az://c/x?sig={SECRET}",
        f"gs://c/x?access_token={SECRET}#y",
    ],
)  # fmt: skip
def test_secrets_of_urls_are_hidden_wherever_they_stand(url):
    assert SECRET not in without_password(url)
    assert SECRET not in without_secrets_of(f"could not reach {url}, tried twice: {url}", url)


def test_secrets_are_hidden_where_somebody_else_writes_them_out():
    url = f"postgresql://me:{SECRET}%40@host/db?sslpassword=k"
    assert without_secrets_of(f"password {SECRET}@ or {SECRET}%40 is wrong", url) == "password *** or *** is wrong"


def test_an_opened_study_shows_no_secret(secret_study, monkeypatch, new_store, tmp_path):
    _, folder = secret_study
    url = f"sqlite:///file:{folder / 'own.db'}?password={SECRET}&uri=true"
    store = new_store(storage=url)
    store.close()
    assert SECRET not in json.dumps(store.record.as_dict()) and SECRET not in repr(store.spec)
    monkeypatch.setenv("UIPE_STORAGE", url)
    assert SECRET not in json.dumps(StudyStore.open(store.out).record.as_dict())
