"""The limits of one trial: its time, its memory, and what it means when its worker died. Knows nothing of Ray or Optuna."""

import faulthandler
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from search.evaluation.evaluator import Evaluator
from search.evaluation.task import Report
from search.problem.trial import Job
from uipe_core.models.memory import give_back, ran_out

DIED = "the worker died or was killed"


class OutOfMemory(Exception):
    """A trial that found too little memory twice."""


@dataclass(frozen=True)
class Death:
    """Why a trial's worker died.

    Attributes:
        reason: In words for people.
        timed_out: Whether the trial itself was too long at work; it would be again, so it is not to be run again by itself.
    """

    reason: str
    timed_out: bool = False


def cause_of_death(told: str, seconds: float | None, minutes: float | None) -> Death:
    """What ended a worker in the middle of a trial.

    A worker at its time limit ends itself where nothing but the clock can speak for it: a trial that hangs in C code, perhaps
    with Python's lock held, sends no word. So a death without another cause after that time is one of the limit.

    Args:
        told: What Ray says of the death; empty where it says nothing.
        seconds: How long the trial was at work; None if its worker had not started yet.
        minutes: The limit; None without one.
    """
    if "running low on memory" in told:
        used = re.search(r"was ([\d.]+ ?\w+) used / ([\d.]+ ?\w+) limit", told)
        amount = "" if used is None else f" ({used[1]} of {used[2]} in use)"
        return Death(f"{DIED}: its machine ran out of memory{amount}, so Ray ended it")
    if "node has died" in told or "node was terminated" in told:
        return Death(f"{DIED}: its machine died or left the cluster")
    if "error raised in its creation task" in told:
        return Death(f"the worker could not start: {told.strip().splitlines()[-1]}")
    if minutes is not None and seconds is not None and seconds >= 60 * minutes:
        return Death(f"ran past its time limit of {minutes:g} minutes (budget.trial_minutes)", timed_out=True)
    code = re.search(r"exit code (\d+)", told)
    return Death(DIED if code is None else f"{DIED}: exit code {code[1]}")


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Ends this process if the block is still at work after so long, in Python or in C code; None never does.

    The watch is a thread that needs no lock of Python's, so code that never gives it back cannot escape. What every thread was
    doing is written to standard error, which Ray keeps.
    """
    if minutes is None:
        yield
        return
    faulthandler.dump_traceback_later(60 * minutes, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def score_within_memory(evaluator: Callable[[], Evaluator], job: Job) -> tuple[dict[str, Any], Report]:
    """Evidence and scores of a job; without enough memory tried once more, with what was in use given back.

    Scoring halves its batches by itself. What fails here is loading or moving the model, or a single row.

    Args:
        evaluator: Gives the worker's evaluator; making it loads the model, and may itself find too little memory.
        job: What to score.

    Raises:
        OutOfMemory: If it was too little again.
        Exception: What else went wrong.
    """
    said = ""
    for _ in range(2):
        try:
            return evaluator().evaluate(job)
        except Exception as error:
            if not ran_out(error):
                raise
            said = str(error).partition("\n")[0] or type(error).__name__
        # Not in the handler: the error's traceback refers to everything that took the memory.
        give_back()
    raise OutOfMemory(f"out of memory twice, however small the batches: {said}")
