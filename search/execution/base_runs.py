"""Track the base runs of a study and run the missing ones as Ray tasks."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from search.execution.capacity import ClusterCapacity
from uipe_core.deltas.store import BaseRun
from uipe_core.errors import UserError
from uipe_core.unlearning.training import DivergedError


@dataclass
class BaseRuns:
    """The base runs of a study as they come.

    Attributes:
        room: The cluster.
        published: Entries of the delta store by base run (`TrialSpec.run`).
        failed: Why there is none, by base run; nothing is tried again in this run of the study.
        waiting: Base runs no task has been started for yet, in order.
        training: Base runs at work.
    """

    room: ClusterCapacity
    published: dict[str, tuple[str, ...]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    training: set[str] = field(default_factory=set)

    @property
    def missing(self) -> int:
        """How many are still to come."""
        return len(self.waiting) + len(self.training)

    def trials_at_once(self) -> int:
        """How many trials may run now."""
        return self.room.trials(self.missing)

    def startable(self, beside_trials: bool) -> list[str]:
        """The base runs there is room to start now."""
        return self.waiting[: max(self.room.base_runs(beside_trials) - len(self.training), 0)]

    def start(self, name: str) -> None:
        """Notes that a base run is at work."""
        self.waiting.remove(name)
        self.training.add(name)

    def publish(self, name: str, keys: tuple[str, ...]) -> None:
        """Notes that a base run is there."""
        self.training.discard(name)
        self.published[name] = keys

    def fail(self, name: str, reason: str) -> None:
        """Notes that there will be none."""
        self.training.discard(name)
        self.failed[name] = f"base run {name} failed: {reason}"


POLL_SECONDS = 0.2


class BaseRunTasks:
    """Gets the missing base runs of a study trained, each by one task.

    Args:
        room: The cluster.
        known: Base runs that are there already, by name.
        starters: Makes the task of each missing base run, by name.
        news: Called with each base run that has come; or with the reason why it never will, and the traceback.
        watch: Called now and then: shows how far tasks are.
    """

    def __init__(
        self,
        room: ClusterCapacity,
        known: Mapping[str, BaseRun],
        starters: Mapping[str, Callable[[], Any]],
        news: Callable[[str, BaseRun | str, str], None],
        watch: Callable[[], None],
    ) -> None:
        self.runs = BaseRuns(room, {name: run.keys for name, run in known.items()}, waiting=list(starters))
        self._starters = starters
        self._news, self._watch = news, watch
        self._tasks: dict[Any, str] = {}
        self._looked = 0.0
        self._error: Exception | None = None

    def poll(self) -> None:
        """Notes which base runs have ended, and starts others beside the trials; costs next to nothing when none is missing."""
        if self.runs.missing:
            self._collect(0.0)
            self._start(beside_trials=True)

    def wait(self, enough: Callable[[], bool]) -> None:
        """Trains, without trials beside, until enough is there or nothing is missing."""
        self._collect(0.0)
        while self.runs.missing and not enough():
            self._start(beside_trials=False)
            self._collect(POLL_SECONDS)

    def require_one(self) -> None:
        """Checks that a base run is there, or may still come.

        Raises:
            UserError: All failed; the first failure, where it was the user's to mend.
            RuntimeError: The first failure otherwise.
        """
        if self._error is not None and not (self.runs.missing or self.runs.published):
            raise self._error

    def tend(self) -> None:
        """As `poll`, before the first trial: all that fit are started, until a first one has come."""
        self._collect(0.0)
        self._start(beside_trials=bool(self.runs.published))

    def cancel(self) -> None:
        """Ends the tasks that are still at work; what they have published stays."""
        for task in self._tasks:
            ray.cancel(task, force=True)
        self._tasks.clear()

    def _start(self, beside_trials: bool) -> None:
        for name in self.runs.startable(beside_trials):
            self._tasks[self._starters[name]()] = name
            self.runs.start(name)

    def _collect(self, timeout: float) -> None:
        """Notes what has ended, at most `timeout` seconds after the call, and shows how far the rest is."""
        ended = self._ended(timeout)
        for task in ended:
            self._note(self._tasks.pop(task), task)
        if ended or time.monotonic() - self._looked > POLL_SECONDS:
            self._watch()
            self._looked = time.monotonic()

    def _ended(self, timeout: float) -> list[Any]:
        """The tasks that have ended; waits for the first."""
        if not self._tasks:
            return []
        ray.wait(list(self._tasks), timeout=timeout)
        return ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)[0]

    def _note(self, name: str, task: Any) -> None:
        try:
            run: BaseRun = ray.get(task)
        except ray.exceptions.RayError as error:
            problem = problem_of(name, error)
            self._error = self._error or problem
            reason = str(problem).removeprefix(f"{name}: ")
            self.runs.fail(name, reason)
            self._news(name, reason, str(error))
        else:
            self.runs.publish(name, run.keys)
            self._news(name, run, "")


LOST = (
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.RayActorError,
    ray.exceptions.RaySystemError,
    ray.exceptions.WorkerCrashedError,
)
"""What Ray raises where a worker, its node or Ray itself died: no fault of what was run there."""


def problem_of(name: str, error: ray.exceptions.RayError) -> Exception:
    """A task's failure as an exception to raise: a user's, where its cause is one or can be answered by running again."""
    if isinstance(error, LOST):
        return UserError(f"{name}: what it ran on died ({_reason(error)}); the same command goes on from what was done")
    cause = getattr(error, "cause", None) or error
    kind = UserError if isinstance(cause, UserError | DivergedError) else RuntimeError
    problem = kind(f"{name}: {_reason(cause)}")
    problem.__cause__ = cause
    return problem


def _reason(cause: Exception) -> str:
    """The cause of a failure in its own words, where they were written for users; else what it is, and its first line."""
    if isinstance(cause, UserError | DivergedError):
        return str(cause)
    return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
