"""Real Ray nodes on this machine, for the tests that need a cluster, or a node that dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for entry in sockets:
        entry.bind(("127.0.0.1", 0))
    ports = [entry.getsockname()[1] for entry in sockets]
    for entry in sockets:
        entry.close()
    return ports


class Cluster:
    """Ray nodes on this machine, with a job server on the loopback and a token; the head's agent listens on the given port."""

    def __init__(self, environment, living_processes, cpus, agent=None):
        self.tag = uuid.uuid4().hex
        self._living = living_processes
        self.folder = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
        self.environment = {
            **environment,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "UIPE_TEST_TAG": self.tag,
        }
        port, server, client, free = free_ports(4)
        self.gcs, self.address = f"127.0.0.1:{port}", f"http://127.0.0.1:{server}"
        self._start(
            cpus, agent or free, "--head", f"--port={port}", f"--dashboard-port={server}", f"--ray-client-server-port={client}",
            "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}",
        )  # fmt: skip

    def _start(self, cpus, agent, *options):
        common = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        common += [f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"]
        command = [BIN / "ray", "start", *common, *options]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr

    def raylets(self):
        return {pid for pid, command in self._living(self.tag).items() if "raylet/raylet " in command}

    def add_node(self, cpus):
        """Another node; returns the process id of its raylet."""
        before = self.raylets()
        self._start(cpus, free_ports(1)[0], f"--address={self.gcs}")
        (new,) = self.raylets() - before
        return new

    def uipe(self, *arguments, seconds=180):
        """The command, run to its end: code, output, error."""
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.address}
        environment.pop("UIPE_TEST_TAG")
        command = [sys.executable, "-m", "search", *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=seconds)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    def state(self, job):
        code, output, error = self.uipe("status", job, "--json")
        assert code == 0, error
        return json.loads(output)

    def until(self, job, happened, seconds=600):
        """Waits for something to be true of a job's status."""
        ends = time.monotonic() + seconds
        while not happened(status := self.state(job)):
            assert time.monotonic() < ends, status
            assert status["state"] in ("pending", "running"), (status, self.uipe("logs", job))
            time.sleep(3)  # asking is a process that imports torch
        return status

    def end(self):
        for _ in range(3):  # what a process was just starting shows a moment later
            for pid in self._living(self.tag):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.3)
