"""optuna-dashboard on a real study, asked over HTTP."""

import http.client
import json
import os
import shutil
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from optuna_dashboard import get_note

from search.dashboard.annotate import annotate
from search.dashboard.serving import servable_folder
from search.results.study_result import StudyResult


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def answers(port):
    try:
        return fetch(port, "/dashboard/")
    except (urllib.error.URLError, OSError):
        return None


def listening_addresses(port):
    """Local addresses, as the kernel writes them, on which anything listens at this port."""
    found = set()
    for table in ("tcp", "tcp6"):
        rows = [row.split() for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        found |= {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    return found


@pytest.fixture(scope="module")
def dashboard(finished, driver_class, environment, tmp_path_factory):
    """A copy of the study, served; its port, its folder and its process."""
    out = tmp_path_factory.mktemp("served") / "copied"
    shutil.copytree(finished.out, out, ignore=shutil.ignore_patterns("ray"))
    port = free_port()
    driver = driver_class(["dashboard", out, "--port", port], out.parent, environment)
    try:
        driver.until(lambda: answers(port))
        yield port, out, driver
    finally:
        driver.clean_up()


def ask(port, method, path, **headers):
    """Status and text of an answer; `Host` is the dashboard's own unless it is given."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def studies_of(port):
    return {study["study_name"]: study["study_id"] for study in json.loads(fetch(port, "/api/studies"))["study_summaries"]}


def test_shows_both_studies_with_names_notes_and_evidence(dashboard, result):
    port, _, driver = dashboard
    assert "<html" in fetch(port, "/dashboard/").lower()
    studies = {study["study_name"]: study for study in json.loads(fetch(port, "/api/studies"))["study_summaries"]}
    assert studies.keys() == {"tiny", "tiny.controls"}
    detail = json.loads(fetch(port, f"/api/studies/{studies['tiny']['study_id']}?after=0"))
    assert detail["objective_names"] == ["log10_forget_quality", "model_utility"]
    note = detail["note"]["body"]
    assert note.startswith("# tiny")
    assert all(f"| {trial} |" in note for trial in result.front["trial"])
    assert len(detail["trials"]) == len(result.trials)
    for trial in detail["trials"]:
        attributes = {pair["key"]: pair["value"] for pair in trial["user_attrs"]}
        assert {"kind", "base", "epoch", "alpha", "walk", "forget_rouge", "logit_scale"} <= attributes.keys()
        assert len(attributes) <= 16 and max(map(len, attributes.values())) < 130
        assert json.loads(attributes["retain"]).keys() == {"exact", "extraction", "probability", "ROUGE", "truth"}
        assert trial["note"]["body"].startswith(f"# Trial {trial['number']}: ")
        assert {each["filename"] for each in trial["artifacts"]} >= {"items.csv", "recipe.yaml"}
    assert {each["id"] for each in detail["plotly_graph_objects"]} == {"front", "alpha-curves"}
    assert json.loads(fetch(port, f"/api/studies/{studies['tiny']['study_id']}/param_importances"))["param_importances"]
    own, held = studies["tiny"]["study_id"], detail["trials"][0]
    names = {each["filename"]: each["artifact_id"] for each in held["artifacts"]}
    table = fetch(port, f"/artifacts/{own}/{held['trial_id']}/{names['items.csv']}")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/artifacts/{own}/{held['trial_id']}/{names['items.csv']}") as answer:
        assert answer.headers["Access-Control-Allow-Origin"] is None
    assert table.startswith("set,item,") and table.count("\nforget,") == result.store.item_counts["forget"]
    assert "uipe_recipe: 1" in fetch(port, f"/artifacts/{own}/{held['trial_id']}/{names['recipe.yaml']}")
    controls = json.loads(fetch(port, f"/api/studies/{studies['tiny.controls']['study_id']}?after=0"))
    assert "Controls of tiny" in controls["note"]["body"]
    assert controls["best_trials"] == [] and len(controls["trials"]) == len(result.controls)
    assert all(trial["state"] == "Pruned" and not trial.get("values") for trial in controls["trials"])
    initial = {pair["key"]: pair["value"] for pair in controls["trials"][0]["user_attrs"]}
    assert float(initial["model_utility"]) == pytest.approx(result.control(initial["kind"])["model_utility"], rel=1e-4)
    asked = fetch(port, f"/api/studies/{studies['tiny.controls']['study_id']}/param_importances")
    assert json.loads(asked) == {"param_importances": [[], []]}
    assert f"http://127.0.0.1:{port}/" in driver.stderr

    assert listening_addresses(port) == {"0100007F"}


def test_a_port_in_use_is_refused(copied, call):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = call("dashboard", copied, "--port", port)
    assert code == 2
    assert str(port) in error and "choose another" in error


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""]
)
def test_another_name_for_this_machine_is_refused(dashboard, host):
    port, _, _ = dashboard
    for path in ("/", "/dashboard/", "/api/studies"):
        status, text = ask(port, "GET", path, Host=host.format(port=port))
        assert status == 403 and f"http://127.0.0.1:{port}/" in text
    assert ask(port, "GET", "/dashboard/", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize("method", ["DELETE", "POST", "PUT", "PATCH", "BREW"])
def test_nothing_is_written_unless_that_was_asked_for(dashboard, method):
    port, out, _ = dashboard
    studies = studies_of(port)
    for path in (f"/api/studies/{studies['tiny']}", "/api/studies", f"/api/studies/{studies['tiny']}/note"):
        status, text = ask(port, method, path)
        assert status == 403 and "--writable" in text
    assert ask(port, "DELETE", f"/api/studies/{studies['tiny.controls']}", Host="evil.example")[0] == 403
    assert studies_of(port) == studies
    assert len(StudyResult.open(out).controls)


def test_a_writable_dashboard_writes_for_its_own_pages_only(copied, launch):
    port = free_port()
    driver = launch("dashboard", copied, "--port", port, "--writable")
    driver.until(lambda: answers(port))
    studies = studies_of(port)
    controls = f"/api/studies/{studies['tiny.controls']}"
    assert ask(port, "DELETE", controls, Host="evil.example")[0] == 403
    assert ask(port, "DELETE", controls, Origin="https://evil.example")[0] == 403
    assert ask(port, "DELETE", controls, Origin="null")[0] == 403
    status, text = ask(port, "POST", f"/api/studies/{studies['tiny']}/rename", Origin=f"http://127.0.0.1:{port}")
    assert status == 403 and "cannot be renamed" in text
    assert studies_of(port) == studies
    assert ask(port, "DELETE", controls, Origin=f"http://127.0.0.1:{port}")[0] == 204
    assert studies_of(port).keys() == {"tiny"}
    os.kill(driver.process.pid, signal.SIGINT)
    assert driver.wait() in (0, 130)
    assert "Traceback" not in driver.stderr


def test_a_study_that_may_only_be_read_is_served_from_a_copy_and_reported_elsewhere(copied, monkeypatch, tmp_path, call):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != ".lock"}
    # Tests may run as root, whom rights do not keep from writing.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or not Path(path).is_relative_to(copied))
    with servable_folder(copied) as folder:
        assert folder != copied
        result = StudyResult.open(folder)
        annotate(result)
        assert get_note(result.study).startswith("# tiny")
        assert any((folder / "artifacts").iterdir())
    assert not folder.exists()
    code, output, _ = call("report", copied, "--to", tmp_path / "elsewhere")
    assert code == 0 and output.strip() == str(tmp_path / "elsewhere" / "report.html")
    after = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
