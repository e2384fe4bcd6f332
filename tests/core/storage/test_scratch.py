"""Temporary folders: their own process removes them, or the next one where it was killed."""

import subprocess
import sys

import pytest

from uipe_core.storage.scratch import scratch_folder

KILLED = """
import os, signal, sys
from uipe_core.storage.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    (folder / "r").symlink_to(sys.argv[2])
    print(folder, flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(place, target, how):
    command = [sys.executable, "-c", KILLED, str(place), str(target), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_folder_goes_with_its_process():
    with scratch_folder() as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), scratch_folder() as folder:
        raise ZeroDivisionError
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    place, target = tmp_path / "tmp", tmp_path / "target"
    place.mkdir()
    target.mkdir()
    (target / "file").write_text("kept")
    (place / "uipe-older").mkdir()  # without an owner: of another program, or of a version without such a file
    (place / "uipe-link").symlink_to(target)
    # One after the other: the living one, too, removes what the dead one left.
    with start(place, target, "wait") as alive:
        held = alive.stdout.readline().strip()
        with start(place, target, "kill") as dead:
            left = dead.stdout.readline().strip()
            dead.wait(30)
        seen = []
        with scratch_folder(place, seen.append) as own:
            there = {path.name for path in place.iterdir()}
        assert [str(folder) for folder in seen] == [left]
        assert there == {own.name, "uipe-older", "uipe-link", held.rpartition("/")[2]}
        alive.stdin.close()
        alive.wait(30)
    assert (target / "file").read_text() == "kept"
