"""Track the base runs of a study, and run the missing ones as Ray tasks, in one process or several."""

import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from search.execution.capacity import ClusterCapacity, need_of
from search.execution.ray_compat import without_commands
from search.execution.worker_pool import LESS_MEMORY
from search.spec.runtime import BaseRunResources
from uipe_core.deltas.store import BaseRun
from uipe_core.errors import UserError, first_line
from uipe_core.unlearning.training import DivergedError


@dataclass(frozen=True)
class BaseRunEvent:
    """The end of a base run: published, or failed.

    Attributes:
        name: The base run (`TrialSpec.run`).
        run: What was published; None where it failed.
        reason: Why it failed.
        traceback: Where in the code it failed.
    """

    name: str
    run: BaseRun | None = None
    reason: str = ""
    traceback: str = ""


@dataclass
class BaseRuns:
    """States of a study's base runs: waiting, then training, then published or failed.

    Attributes:
        capacity: The cluster.
        published: Entries of the delta store by base run (`TrialSpec.run`).
        failed: Reasons by base run. A failed base run is not tried again in this run of the study.
        waiting: Base runs no task has been started for yet, in order.
        training: Base runs with a task.
        events: Ends that have not been taken yet, in order; see `take_events`.
    """

    capacity: ClusterCapacity
    published: dict[str, tuple[str, ...]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    training: set[str] = field(default_factory=set)
    events: list[BaseRunEvent] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """How many are still to come."""
        return len(self.waiting) + len(self.training)

    def trials_at_once(self) -> int:
        """How many trials may run now."""
        return self.capacity.trials(self.missing)

    def startable(self, with_trials: bool) -> list[str]:
        """The base runs there is room to start now."""
        return self.waiting[: max(self.capacity.base_runs(with_trials) - len(self.training), 0)]

    def start(self, name: str) -> None:
        """Move a base run from waiting to training."""
        self.waiting.remove(name)
        self.training.add(name)

    def publish(self, name: str, run: BaseRun) -> None:
        """Move a base run from training to published."""
        self.training.discard(name)
        self.published[name] = run.keys
        self.events.append(BaseRunEvent(name, run))

    def fail(self, name: str, reason: str, traceback: str = "") -> None:
        """Move a base run from training to failed."""
        self.training.discard(name)
        self.failed[name] = f"base run {name} failed: {reason}"
        self.events.append(BaseRunEvent(name, None, reason, traceback))

    def take_events(self) -> list[BaseRunEvent]:
        """Return the ends since the last call."""
        taken, self.events = self.events, []
        return taken


POLL_SECONDS = 0.2


class BaseRunTasks:
    """Train or import the missing base runs of a study, one Ray task each.

    Args:
        capacity: The cluster.
        known: Base runs that the delta store has, by name.
        starters: Start the task of each missing base run, by name.

    Attributes:
        runs: Their states.
    """

    def __init__(
        self, capacity: ClusterCapacity, known: Mapping[str, BaseRun], starters: Mapping[str, Callable[[], Any]]
    ) -> None:
        self.runs = BaseRuns(capacity, {name: run.keys for name, run in known.items()}, waiting=list(starters))
        self._starters = starters
        self._tasks: dict[Any, str] = {}
        self._error: Exception | None = None

    def start(self, with_trials: bool) -> None:
        """Start the tasks there is room for; `with_trials` leaves a slot for a trial."""
        for name in self.runs.startable(with_trials):
            self._tasks[self._starters[name]()] = name
            self.runs.start(name)

    def collect(self, timeout: float = 0.0) -> None:
        """Update the states of tasks that have ended; wait up to `timeout` seconds for the first."""
        if not self._tasks:
            return
        ray.wait(list(self._tasks), timeout=timeout)
        for task in ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)[0]:
            name = self._tasks.pop(task)
            try:
                self.runs.publish(name, ray.get(task))
            except ray.exceptions.RayError as error:
                problem = problem_of(name, error)
                self._error = self._error or problem
                self.runs.fail(name, str(problem).removeprefix(f"{name}: "), without_commands(str(error)))

    def require_one(self) -> None:
        """Check that a base run is published, or may still be.

        Raises:
            UserError: All failed; the first failure, where the user can correct its cause.
            RuntimeError: The first failure otherwise.
        """
        if self._error is not None and not (self.runs.missing or self.runs.published):
            raise self._error

    def cancel(self) -> None:
        """Cancel the tasks that still run; what they have published stays."""
        for task in self._tasks:
            ray.cancel(task, force=True)
        self._tasks.clear()


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
        remedy = f"{LESS_MEMORY}; then " if isinstance(error, ray.exceptions.OutOfMemoryError) else ""
        what = f"what it ran on died ({_reason(error)})"
        return UserError(f"{name}: {what}; {remedy}the same command goes on from what was done")
    cause = getattr(error, "cause", None) or error
    kind = UserError if isinstance(cause, UserError | DivergedError) else RuntimeError
    problem = kind(f"{name}: {_reason(cause)}")
    problem.__cause__ = cause
    return problem


def _reason(cause: Exception) -> str:
    """The cause of a failure in its own words, where they were written for users; else what it is, and its first line."""
    if isinstance(cause, UserError | DivergedError):
        return str(cause)
    return f"{type(cause).__name__}: {first_line(cause)}"


LOST_PEER = re.compile(r"Connection (reset|closed|refused)|Broken pipe|remote process exit|NCCL communicator was aborted", re.I)
"""What gloo and nccl say of a process that does not answer any more."""

PATIENCE_SECONDS = 12 * 3600
"""How long processes wait for one of them: for the first to write an epoch, or for another study that trains the same run."""

ROOM_SECONDS = 600
"""How long a run waits for room for all its processes at once before it asks again, and how often it does: some 10 hours."""

ROOM_REQUESTS = 60


def train_in_processes(
    needs: BaseRunResources, on_gpus: bool, folder: Path, retries: int, train: Callable[[], BaseRun | None]
) -> Any:
    """Start a base run in several processes; the room for all of them is taken at once or not at all.

    A task of its own follows the run, so that many go side by side and none holds the driver up. It takes no room itself.

    Args:
        needs: What each process holds, and how many there are.
        on_gpus: Whether they compute on their GPUs (over nccl), or on the CPU (over gloo).
        folder: Where Ray Train keeps its notes. No weights are written there.
        retries: How often the run is trained again after a process or its node has died.
        train: What every process does, in a process group with the others; the first one returns the base run.

    Returns:
        Reference to the base run, or to the error that ended it: a `UserError` or `DivergedError` as it was raised.
    """
    task = ray.remote(num_cpus=0, max_retries=retries)(_follow)
    return task.remote(needs, on_gpus, folder, retries, train)


def _follow(needs: BaseRunResources, on_gpus: bool, folder: Path, retries: int, train: Callable[[], BaseRun | None]) -> BaseRun:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ROOM_SECONDS)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # caches may be given by relative paths
    problems = Queue(actor_options={"num_cpus": 0})
    # Not left to Ray Train: it would train a run that diverges again, too.
    for attempt in range(retries + 1):
        trainer = TorchTrainer(
            partial(_in_group, train, problems),
            torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=PATIENCE_SECONDS),
            scaling_config=ScalingConfig(
                num_workers=needs.processes, use_gpu=needs.gpus > 0, resources_per_worker=dict(need_of(needs))
            ),
            run_config=RunConfig(
                name=f"train-{uuid.uuid4().hex[:12]}",
                storage_path=str(folder),
                failure_config=FailureConfig(controller_failure_limit=ROOM_REQUESTS),
            ),
        )
        try:
            run: BaseRun = trainer.fit().return_value
            return run
        except TrainingFailedError as error:
            cause = _cause(error, problems)
            if attempt == retries or not _died(error):
                raise cause from error
    raise AssertionError("the last attempt returns or raises")


def _in_group(train: Callable[[], BaseRun | None], problems: Queue) -> BaseRun | None:
    """Train in one process of a group; put an error into the queue, because Ray Train passes on its text only."""
    try:
        return train()
    except Exception as error:
        problems.put(error)
        raise


def _died(error: TrainingFailedError) -> bool:
    """Return True if a process was lost, rather than ended by an error of its own.

    The others may be the first to notice, when they read from one that is not there any more.
    """
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return any(isinstance(failure, ray.exceptions.RayError) or LOST_PEER.search(str(failure)) for failure in failures)


def _cause(error: TrainingFailedError, problems: Queue) -> Exception:
    """Return what a process raised, an error for users first: the others may have failed because that one did."""
    found: list[Exception] = problems.get_nowait_batch(problems.qsize())
    found.sort(key=lambda problem: not isinstance(problem, UserError | DivergedError))
    return found[0] if found else error
