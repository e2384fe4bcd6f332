"""Start the `uipe` command as a terminal would, watch it, and find what it leaves behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

UIPE = Path(sys.executable).parent / "uipe"


def processes_with(tag):
    """Living processes that were started with this tag in their environment: pid to command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if f"UIPE_TEST_TAG={tag}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
    return found


class Driver:
    """The `uipe` command in a session of its own, as a terminal would start it."""

    def __init__(self, arguments, folder, environment):
        self.tag = uuid.uuid4().hex
        self.folder = folder
        self._error = folder / f"stderr-{self.tag[:6]}.txt"
        self._output = folder / f"stdout-{self.tag[:6]}.txt"
        with self._error.open("w") as error, self._output.open("w") as output:
            self.process = subprocess.Popen(
                [str(UIPE), *map(str, arguments)],
                stdout=output,
                stderr=error,
                env={**environment, "UIPE_TEST_TAG": self.tag},
                cwd=folder,
                start_new_session=True,
            )

    @property
    def stderr(self):
        return self._error.read_text()

    @property
    def stdout(self):
        return self._output.read_text()

    def until(self, happened, seconds=120):
        """Waits for something to happen while the command is at work."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            found = happened()
            if found:
                return found
            assert self.process.poll() is None, f"ended too early, code {self.process.returncode}: {self.stderr}"
            time.sleep(0.02)
        raise AssertionError(f"did not happen in {seconds} s: {self.stderr}")

    def wait(self, seconds=180):
        return self.process.wait(seconds)

    def left_behind(self, seconds=120):
        """Processes of this run that outlive it, after a while in which they may end.

        A worker of Ray that was just starting when its node was killed gives up after about 26 s; a node's agents spend a
        minute on telling a server that is gone, too, before they end.
        """
        ends = time.monotonic() + seconds
        while (living := processes_with(self.tag)) and time.monotonic() < ends:
            time.sleep(0.1)
        return living

    def clean_up(self):
        # Not by the driver's number: once it has ended, the number may be another process's.
        self.process.kill()
        self.process.wait()
        for pid in processes_with(self.tag):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
