"""What ends a single trial: the clock, too little memory, and the words Ray has for a worker's death."""

import errno
import subprocess
import sys
import textwrap

import pytest
import torch

from search.execution.worker_pool import DIED, LESS_MEMORY, worker_failure
from search.execution.workers import OutOfMemory, score_within_memory
from search.problem.trial import TrialSpec
from uipe_core.models.memory import is_out_of_memory

MEMORY_MONITOR = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 29e1) was 2.90GB "
    "used / 23.54GB limit (0.123131)\nOOM kill reason: Memory usage 3079737344B exceeded threshold"
)
NODE = "The actor died unexpectedly before finishing this task.\nThe actor died because its node has died. Node Id: 3dee"
CREATION = (
    "The actor died because of an error raised in its creation task, ray::ImplicitFunc.__init__()\n  File ...\n"
    "ModuleNotFoundError: No module named 'peft'"
)
LOST = "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2."


@pytest.mark.parametrize(
    ("told", "seconds", "reason", "timed_out"),
    [
        ("", None, DIED, False),
        (LOST, 59.0, DIED, False),
        (LOST, 60.0, "ran past its time limit of 1 minutes (budget.trial_minutes)", True),
        ("Worker exits with an exit code 5.", 3.0, f"{DIED}: exit code 5", False),
        (
            MEMORY_MONITOR,
            99.0,
            f"{DIED}: its machine ran out of memory (2.90GB of 23.54GB in use), so Ray ended it; {LESS_MEMORY}",
            False,
        ),
        (NODE, 99.0, f"{DIED}: its machine died or left the cluster", False),
        (CREATION, None, "the worker could not start: ModuleNotFoundError: No module named 'peft'", False),
    ],
)
def test_a_death_has_its_cause(told, seconds, reason, timed_out):
    death = worker_failure(told, seconds, 1.0)
    assert (death.reason, death.timed_out) == (reason, timed_out)
    assert death.short_of_memory == (told == MEMORY_MONITOR)


def test_without_a_limit_no_death_is_one_of_time():
    assert worker_failure(LOST, 1e9, None).reason == DIED


WORK = {
    "asleep": "time.sleep(60)",
    "in C code, never giving back Python's lock": "re.match('(a+)+$', 'a' * 64 + 'b')",
    "in time": "time.sleep(0.01)",
    "raises in time": "raise ValueError",
}


def test_a_process_ends_itself_at_its_limit():
    # Forks of one process, because starting torch takes longer than all of them.
    code = """
        import os, re, sys, time
        from search.execution.workers import time_limit
        for work in sys.argv[1:]:
            child = os.fork()
            if not child:
                try:
                    with time_limit(2 / 60):
                        exec(work)
                except ValueError:
                    pass
                time.sleep(2.5)
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *WORK.values()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert dict(zip(WORK, ran.stdout.split(), strict=True)) == dict(zip(WORK, "1177", strict=True)), ran.stderr
    # What every thread was doing then.
    assert ran.stderr.count("Timeout") == 2 and "match" in ran.stderr


def allocate(elements):
    return torch.empty(elements)


def test_what_torch_really_says_of_too_little_memory_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        allocate(2**50)
    assert is_out_of_memory(raised.value)
    assert all(
        map(is_out_of_memory, (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(errno.ENOMEM, "no memory")))
    )
    others = (RuntimeError("shapes differ"), ValueError("out of memory"), OSError(errno.ENOSPC, "full"), KeyError("x"))
    assert not any(map(is_out_of_memory, others))


class Hungry:
    """Scores by really allocating: at first more than any machine has."""

    def __init__(self, fails):
        self.fails, self.asked = fails, 0

    def evaluate(self, job):
        self.asked += 1
        allocate(2**50 if self.asked <= self.fails else 1)
        return {"asked": self.asked}, None


@pytest.mark.parametrize("fails", [0, 1])
def test_too_little_memory_is_tried_once_more(fails):
    hungry = Hungry(fails)
    facts, _ = score_within_memory(lambda: hungry, TrialSpec("initial"))
    assert facts == {"asked": fails + 1}


def test_twice_too_little_is_the_end():
    hungry = Hungry(9)
    with pytest.raises(OutOfMemory, match=r"out of memory twice, however small the batches: .*can't allocate memory"):
        score_within_memory(lambda: hungry, TrialSpec("initial"))
    assert hungry.asked == 2


def test_a_model_that_does_not_fit_is_loaded_once_more():
    loads = []

    def load():
        loads.append(1)
        allocate(2**50)

    with pytest.raises(OutOfMemory):
        score_within_memory(load, TrialSpec("initial"))
    assert len(loads) == 2


def test_other_errors_are_not_tried_again():
    class Broken:
        def evaluate(self, job):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        score_within_memory(Broken, TrialSpec("initial"))
