"""A real PostgreSQL server for tests, in a folder of its own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

SECRET = "correct/horse+battery"
QUOTED = "correct%2Fhorse%2Bbattery"


def server_binaries():
    """Folder of initdb and pg_ctl; None where PostgreSQL's server is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


class Server:
    """A PostgreSQL server on a free port of 127.0.0.1, with a password, that can be stopped and started again."""

    def __init__(self, binaries):
        self._bin = binaries
        # Not below pytest's folder, which the server's user may not enter: it refuses to run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
        self._user = []
        if os.geteuid() == 0:
            owner = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
            self._user = ["runuser", "-u", owner.pw_name, "--"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        (self.folder / "password").write_text(SECRET)
        passwords = ("--auth=scram-sha-256", f"--pwfile={self.folder / 'password'}")
        self._call("initdb", "-D", self.folder / "data", "-U", "uipe", *passwords, "--no-sync", "-E", "UTF8")
        self.start()

    @property
    def url(self):
        return f"postgresql+psycopg://uipe:{QUOTED}@127.0.0.1:{self._port}/postgres"

    def start(self):
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self._call("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-o", options, "-w", "-t", "120", "start")

    def stop(self):
        self._call("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "-t", "120", "stop")

    def remove(self):
        with contextlib.suppress(AssertionError):
            self.stop()
        shutil.rmtree(self.folder)

    def _call(self, name, *arguments):
        # The server keeps what it inherits open, so its output must not be a pipe whose end somebody waits for.
        said = self.folder / f"{name}.out"
        command = [*self._user, str(self._bin / name), *map(str, arguments)]
        with said.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=output, cwd=self.folder, timeout=180, check=False)
        assert done.returncode == 0, said.read_text()
