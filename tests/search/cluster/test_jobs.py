"""Studies as jobs of a real Ray cluster: a head with its job server, and in the slow tests a second node that dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from ray_nodes import TOKEN, Cluster

from search.results.study_result import StudyResult


@pytest.fixture(scope="module")
def head(environment, living_processes):
    cluster = Cluster(environment, living_processes, cpus=2)
    yield cluster
    cluster.end()


@pytest.fixture
def client(head, monkeypatch):
    """This process as a client of the head."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return head


def submitted(output):
    return next(line.split()[1] for line in output.splitlines() if line.startswith(("submitted", "under way"))).removeprefix(
        "way "
    )


def ended(call, job, seconds=120):
    ends = time.monotonic() + seconds
    # A study is finished a moment before the process that ran it has ended.
    while (status := json.loads(call("status", job, "--json")[1]))["ended"] is None:
        assert time.monotonic() < ends, status
        time.sleep(0.5)
    return status


@pytest.mark.slow
def test_a_study_is_submitted_attached_to_followed_reported_and_resumed(client, copied, finished, call, tmp_path):
    """With a study that has all its trials already, so that only its driver runs."""
    code, output, error = call("submit", finished.file, "--out", copied)
    assert code == 0
    assert all(line.startswith("note: Forget quality on 8 items") for line in error.splitlines())
    job = submitted(output)
    assert job.startswith("tiny-")
    assert f"report     uipe report {job}" in output and f"{client.address}/#/jobs/{job} (Ray's dashboard)" in output

    code, output, _ = call("submit", finished.file, "--out", copied)
    assert code == 0
    assert f"under way  {job}" in output
    studies = json.loads(call("studies", "--json")[1])["studies"]
    assert [(row["job"], row["study"], row["out"]) for row in studies] == [(job, "tiny", str(copied))]

    code, output, error = call("logs", job, "--follow")
    assert (code, error) == (0, "")
    assert "Pareto front of tiny" in output
    assert "uipe-status" not in output
    status = ended(call, job)
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert status["trials"] == {"done": 9, "total": 9, "running": 0, "failed": 0, "interrupted": 0, "pruned": 0}
    assert status["hypervolume"]["now"] >= status["hypervolume"]["given"]
    assert "9 of 9 done" in call("status", job)[1]
    assert call("logs", job)[1].count("uipe-status") == 0
    assert f"{job}: succeeded" in call("stop", job)[1]  # it stays as it is

    code, output, _ = call("report", job, "--to", tmp_path / "fetched")
    assert code == 0 and output.strip() == str(tmp_path / "fetched" / "report.html")
    assert '<section id="front-table">' in (tmp_path / "fetched" / "report.html").read_text()
    assert [row["job"] for row in json.loads(call("studies", "--json")[1])["studies"]] == [job]
    (copied / "study.db").rename(copied / "moved.db")
    code, _, error = call("report", job, "--to", tmp_path / "none")
    assert code == 2 and f"{job}: no report could be written on the cluster" in error and not (tmp_path / "none").exists()
    (copied / "moved.db").rename(copied / "study.db")

    code, output, _ = call("submit", finished.file, "--out", copied)
    assert submitted(output) == f"{job}-2"
    assert ended(call, f"{job}-2")["exit_code"] == 0
    assert [row["job"] for row in json.loads(call("studies", "--json")[1])["studies"]] == [f"{job}-2", job]


@pytest.mark.slow
def test_a_study_that_fails_fails_its_follower(client, finished, call, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    code, output, error = call("submit", finished.file, "--out", tmp_path / "full", "--follow")
    assert code == 1
    assert "it is not empty and holds no study" in output
    assert "its driver ended with code 2" in error


@pytest.mark.slow
def test_no_secret_reaches_the_job_server(client, write_study, call, tmp_path):
    import requests

    secret = "s3cr3t-passw0rd"
    study = write_study(tmp_path / "study.yaml", name="secretive", storage=f"postgresql://me:{secret}@127.0.0.1:1/uipe")
    code, output, error = call("submit", study, "--out", tmp_path / "out", "--follow")
    assert code == 1
    assert secret not in output + error
    assert "UIPE_STORAGE" in output
    answer = requests.get(f"{client.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    assert "secretive" in answer.text
    assert secret not in answer.text


@pytest.mark.slow
def test_a_variable_that_is_passed_reaches_driver_and_workers_and_no_list_of_jobs(
    client, write_study, call, tmp_path, monkeypatch
):
    import requests

    from search.execution.ray_compat import PASSED, seal

    secret = "s3cr3t-passw0rd"
    url = f"postgresql://me:{secret}@127.0.0.1:1/uipe"
    monkeypatch.setenv("UIPE_STORAGE", url)
    study = write_study(tmp_path / "study.yaml", name="passing", storage=url)
    code, output, error = call("submit", study, "--out", tmp_path / "out", "--pass-env", "UIPE_STORAGE", "--follow")
    assert code == 1
    # The driver had the whole URL: it asked the server, which is not there.
    assert "storage postgresql://me:***@127.0.0.1:1/uipe: cannot be opened" in output and secret not in output + error
    answer = requests.get(f"{client.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    assert PASSED in answer.text and secret not in answer.text

    task = (
        "import os, ray\n"
        "@ray.remote(num_cpus=1)\n"
        "def ask():\n"
        "    from search.execution.workers import _begin\n"
        "    _begin()\n"
        "    return os.environ['UIPE_STORAGE']\n"
        f"ray.init(address={client.gcs!r}, runtime_env={{'env_vars': {{{PASSED!r}: {seal(['UIPE_STORAGE'])!r}}}}})\n"
        "print(ray.get(ask.remote()))\n"
    )
    environment = {key: value for key, value in client.environment.items() if key != "UIPE_STORAGE"}
    done = subprocess.run([sys.executable, "-c", task], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith(url), done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("HF_TOKEN", "HF_TOKEN is not set here"),
        ("HF_TOKEN=secret", "without its value"),
        ("LD_PRELOAD", "cannot be passed"),
        ("RAY_AUTH_TOKEN", "cannot be passed"),
        ("", "cannot be passed"),
    ],
)
def test_a_variable_that_cannot_be_passed_is_refused_before_anything_is_sent(client, finished, call, monkeypatch, name, said):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, output, error = call("submit", finished.file, "--out", "/srv/none", "--pass-env", name)
    assert (code, output) == (2, "") and said in error
    assert "/srv/none" not in call("studies", "--json")[1]


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_job_that_is_not_there_is_refused(command, client, call):
    code, _, error = call(command, "tiny-00000000")
    assert code == 2
    assert "has no such job" in error
    assert call(command, "../tiny")[0] == 2


def test_a_wrong_token_is_refused(client, call, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    code, _, error = call("studies")
    assert code == 2
    assert "refused the token" in error
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/none")
    assert call("studies")[0] == 2


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("http://127.0.0.1:1", "no job server answers"),
        ("127.0.0.1:8265", "not the URL"),
        ("ray://a:1", "not the URL"),
        ("", "named"),
    ],
)
def test_addresses_where_no_job_server_is(address, word, call, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    code, _, error = call("studies", "--address", address)
    assert code == 2
    assert word in error


@pytest.mark.parametrize("out", ["runs/x", "./x", "~", "~other/x", "s3://key:pass@bucket/x"])
def test_output_folders_that_would_be_lost_are_refused(out, client, finished, call):
    code, _, error = call("submit", finished.file, "--out", out)
    assert code == 2
    assert "--out: " in error
    assert "pass@" not in error


@pytest.mark.parametrize(
    "address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "127.0.0.1", "127.0.0.1:0", "a b:1", "127.0.0.1:1"]
)
def test_addresses_that_no_run_can_join_are_refused(address, finished, call, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    code, _, error = call("run", finished.file, "--out", tmp_path / "out", "--address", address)
    assert code == 2
    assert "error: --address: " in error


def test_a_run_that_cannot_authenticate_is_refused(finished, call, monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, error = call("run", finished.file, "--address", "auto")
    assert code == 2
    assert "no token" in error


SEARCHED = 24


@pytest.fixture
def longer(finished, write_study, tmp_path):
    """The shared study on the models and base runs that are there, with trials that last long enough to be caught."""
    return write_study(tmp_path / "longer.yaml", name="longer", search={"trials": SEARCHED}, scoring={"batch_size": 2})


def everything_is_there(out):
    result = StudyResult.open(out)
    assert result.trials["kind"].value_counts().to_dict() == {"search": SEARCHED, "alpha_zero": 4}
    assert result.store.counts()["running"] == 0
    return result.trials.set_index("trial")


@pytest.mark.slow
def test_a_stopped_study_is_resumed_on_the_same_cluster(head, longer, tmp_path):
    out = tmp_path / "out"
    job = submitted(head.uipe("submit", longer, "--out", out)[1])
    head.until(job, lambda status: status.get("trials", {}).get("done", 0) >= 2)
    code, output, error = head.uipe("stop", job)
    assert code == 0, error
    assert f"{job}: stopped" in output
    assert "interrupted: what was done is in" in head.uipe("logs", job)[1]
    status = head.state(job)
    assert status["state"] == "stopped"
    kept = StudyResult.open(out)
    assert kept.store.counts()["running"] == 0  # in good order: not killed
    assert len(kept.trials) >= 2

    code, output, error = head.uipe("submit", longer, "--out", out, "--follow", seconds=900)
    assert code == 0, output + error
    assert submitted(output) == f"{job}-2"
    after = everything_is_there(out)
    before = kept.trials.set_index("trial")
    assert after.loc[before.index, "seconds"].equals(before["seconds"])  # none was scored again


@pytest.mark.slow
def test_a_node_dies_and_the_study_finishes(environment, living_processes, longer, tmp_path):
    cluster = Cluster(environment, living_processes, cpus=1)
    try:
        second = cluster.add_node(cpus=2)
        out = tmp_path / "out"
        job = submitted(cluster.uipe("submit", longer, "--out", out)[1])
        cluster.until(job, lambda status: status.get("trials", {}).get("done", 0) >= 2)
        os.kill(second, signal.SIGKILL)
        cluster.until(job, lambda status: status["state"] not in ("pending", "running"), seconds=900)
        # A study is finished a moment before the process that ran it has ended.
        while (status := cluster.state(job))["ended"] is None:
            time.sleep(1)
        assert (status["state"], status["exit_code"]) == ("finished", 0), cluster.uipe("logs", job)[1]
        assert status["trials"]["done"] == SEARCHED + 4
        everything_is_there(out)
    finally:
        cluster.end()


PROXY = "http://user:hunter2@127.0.0.1:1"


def test_a_job_server_on_this_machine_is_reached_past_a_proxy(client, call, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, PROXY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    code, _, error = call("studies", "--json")
    assert (code, error) == (0, "")


def test_a_proxy_in_the_way_is_named_without_its_password(call, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, PROXY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    code, _, error = call("studies", "--address", "http://head.example:8265")
    assert code == 2 and "by way of the proxy http://user:***@127.0.0.1:1 (http_proxy" in error and "hunter2" not in error


def test_a_head_whose_agent_has_no_port_names_the_port_and_the_remedy(environment, living_processes, finished):
    import ray._private.ray_constants as constants

    with socket.create_server(("0.0.0.0", 0)) as other:
        taken = other.getsockname()[1]
        cluster = Cluster(environment, living_processes, cpus=1, agent=taken)
        try:
            code, _, error = cluster.uipe("submit", finished.file)
            assert code == 2
            assert re.search(
                r"the head has no agent.*52365 or the head's --dashboard-agent-listen-port.*free it, or start", error
            )
            (log,) = cluster.folder.glob("session_2*/logs/dashboard_agent.log")
            assert re.search(rf"{taken}\W.*address already in use", log.read_text())
        finally:
            cluster.end()
    assert constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT == 52365


@pytest.mark.parametrize("what", ["/no/such/folder", "./runs/x", "~/runs", "nothing"])
@pytest.mark.parametrize("command", ["status", "logs", "report"])
def test_a_folder_that_is_not_there_is_no_question_of_a_token(what, command, call, monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    code, _, error = call(command, what)
    assert code == 2 and f"{what}: there is no such folder" in error and "token" not in error
