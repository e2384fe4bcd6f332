"""optuna-dashboard on a real study, asked over HTTP."""

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest


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


@pytest.fixture
def dashboard(copied, launch):
    port = free_port()
    driver = launch("dashboard", copied, "--port", port)
    driver.until(lambda: answers(port))
    return port, driver


def test_shows_both_studies_with_names_notes_and_evidence(dashboard, result):
    port, driver = dashboard
    assert "<html" in fetch(port, "/dashboard/").lower()
    studies = {study["study_name"]: study for study in json.loads(fetch(port, "/api/studies"))["study_summaries"]}
    assert studies.keys() == {"tiny", "tiny.controls"}
    detail = json.loads(fetch(port, f"/api/studies/{studies['tiny']['study_id']}?after=0"))
    assert detail["objective_names"] == ["log10_forget_quality", "model_utility"]
    note = detail["note"]["body"]
    assert note.startswith("# tiny")
    assert all(f"| {trial} |" in note for trial in result.front["trial"])
    assert len(detail["trials"]) == len(result.trials)
    attributes = {pair["key"]: pair["value"] for pair in detail["trials"][-1]["user_attrs"]}
    assert {"kind", "base", "method", "epoch", "alpha", "walk"} <= attributes.keys()
    assert all(f'"{name}"' in attributes["evidence"] for name in ("definition", "ks_statistic", "components", "logit_scale"))
    controls = json.loads(fetch(port, f"/api/studies/{studies['tiny.controls']['study_id']}?after=0"))
    assert "Controls of tiny" in controls["note"]["body"]
    assert f"http://127.0.0.1:{port}/" in driver.stderr

    assert listening_addresses(port) == {"0100007F"}

    os.kill(driver.process.pid, signal.SIGINT)
    assert driver.wait() in (0, 130)
    assert "Traceback" not in driver.stderr


def test_a_port_in_use_is_refused(copied, call):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = call("dashboard", copied, "--port", port)
    assert code == 2
    assert str(port) in error and "choose another" in error
