#!/usr/bin/env python3
"""Run the steps of deploy/Dockerfile in a fresh Debian, where there is no container daemon; needs root and debootstrap.

    sudo python3 deploy/check_image.py /var/tmp/uipe-image     # a folder that does not exist yet; 10 GB with CUDA
    sudo env PIP_FIND_LINKS=/opt/wheels python3 deploy/check_image.py /var/tmp/uipe-image --bind /opt

In place of the image that FROM names stands Debian bookworm, whose Python is 3.11 too, as a virtual environment. What is not
checked: the layers themselves, that FROM can be pulled, and a GPU. Variables of pip and proxies are handed through.
"""

import argparse
import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PYTHON = "/usr/local/python"
PASSED = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT")
CHECKS = (
    "wget --version",
    "ray --version",
    "python -m search --version",
    "python -m search validate /opt/uipe-search/studies/quickstart.yaml",
    "python -c 'import os; assert os.getuid() == 1000'",
)
"""What KubeRay and the job of deploy/kuberay.yaml run, as the image's user."""


def steps(text):
    """Yield instruction and argument, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            instruction, _, argument = line.strip().partition(" ")
            yield instruction.upper(), argument.strip()


def ignored(name):
    """Return whether .dockerignore keeps a path out of the build: the last pattern that fits it decides."""
    out = False
    for pattern in (PROJECT / ".dockerignore").read_text().splitlines():
        pattern = pattern.strip()
        if pattern and not pattern.startswith("#"):
            wanted = pattern.removeprefix("!").removeprefix("**/").rstrip("/")
            parts = [name, *map(str, Path(name).parents), Path(name).name]
            if any(fnmatch.fnmatch(part, wanted) for part in parts if part != "."):
                out = not pattern.startswith("!")
    return out


def copy(root, folder, argument):
    """Copy what COPY names, as the build would see it."""
    *sources, target = shlex.split(argument)
    place = root / target.lstrip("/")
    for source in sources:
        if ignored(source):
            sys.exit(f"COPY {source}: .dockerignore keeps it out of the build")
        found = PROJECT / source
        if found.is_dir():
            keep_out = lambda where, names: [n for n in names if ignored(str(Path(where, n).relative_to(PROJECT)))]  # noqa: E731
            shutil.copytree(found, place, ignore=keep_out, dirs_exist_ok=True)
        else:
            to = place / found.name if target.endswith("/") or len(sources) > 1 else place
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, to)


def run(root, command, user, folder, environment):
    """Run a command in the root as a user; end with its code if it fails."""
    print(f"[{user}] {command}", flush=True)
    inside = f"export PATH={PYTHON}/bin:$PATH HOME=$(getent passwd {user} | cut -d: -f6); cd {shlex.quote(folder)} && {command}"
    done = subprocess.run(["chroot", f"--userspec={user}", root, "/bin/sh", "-c", inside], env=environment)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {command}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder for the Debian root; must not exist")
    parser.add_argument("--bind", action="append", default=[], metavar="DIR", help="folder of this machine to see inside")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    given = parser.parse_args()
    root = given.root.resolve()
    if root.exists():
        sys.exit(f"{root} exists; name another folder")
    include = "--include=ca-certificates,python3,python3-venv"
    subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", root, given.mirror], check=True)
    for name in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):
        shutil.copyfile(f"/{name}", root / name)
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    environment.update(PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", LANG="C.UTF-8")
    mounts = [(kind, place) for kind, place in (("proc", "proc"), ("devtmpfs", "dev"))]
    try:
        for kind, place in mounts:
            subprocess.run(["mount", "-t", kind, kind, root / place], check=True)
        for place in given.bind:
            inside = root / place.lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", place, inside], check=True)
        run(root, f"python3 -m venv {PYTHON}", "root", "/", environment)
        user, folder = "root", "/"
        for instruction, argument in steps((PROJECT / "deploy" / "Dockerfile").read_text()):
            if instruction == "RUN":
                run(root, argument, user, folder, environment)
            elif instruction == "COPY":
                copy(root, folder, argument)
            elif instruction == "USER":
                user = argument
            elif instruction == "WORKDIR":
                folder = argument
            elif instruction == "ENV":
                name, _, value = argument.partition("=")
                environment[name] = value
            elif instruction != "FROM":
                sys.exit(f"{instruction}: this script does not know it")
        for check in CHECKS:
            run(root, check, user, folder, environment)
    finally:
        for place in [*given.bind[::-1], "dev", "proc"]:
            subprocess.run(["umount", root / place.lstrip("/")], stderr=subprocess.DEVNULL)
    print(f"all steps of deploy/Dockerfile ran; the root is {root}")


if __name__ == "__main__":
    main()
