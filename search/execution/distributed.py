"""A base run in several processes, over several GPUs or nodes: Ray Train starts them and joins them to a process group."""

import os
import re
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from search.execution.capacity import need_of
from search.spec.runtime import BaseRunResources
from uipe_core.deltas.store import BaseRun
from uipe_core.errors import UserError
from uipe_core.unlearning.training import DivergedError

LOST_PEER = re.compile(r"Connection (reset|closed|refused)|Broken pipe|remote process exit|NCCL communicator was aborted", re.I)
"""What gloo and nccl say of a process that does not answer any more."""

PATIENCE_SECONDS = 12 * 3600
"""How long processes wait for one of them: for the first to write an epoch, or for another study that trains the same run."""

ROOM_SECONDS = 600
"""How long a run waits for room for all its processes at once before it asks anew, and how often it does: some 10 hours."""
ROOM_REQUESTS = 60


def train_in_processes(
    needs: BaseRunResources, on_gpus: bool, folder: Path, retries: int, train: Callable[[], BaseRun | None]
) -> Any:
    """Starts a base run in several processes; the room for all of them is taken at once or not at all.

    A task of its own follows the run, so that many go side by side and none holds the driver up. It takes no room itself.

    Args:
        needs: What each process holds, and how many there are.
        on_gpus: Whether they compute on their GPUs (over nccl), or on the CPU (over gloo).
        folder: Where Ray Train keeps its notes. No weights are written there.
        retries: How often the run is trained anew after a process or its node has died.
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
    """What every process does; Ray Train hands on the text of an error only, so that the error itself goes another way."""
    try:
        return train()
    except Exception as error:
        problems.put(error)
        raise


def _died(error: TrainingFailedError) -> bool:
    """Whether a process was lost, rather than ended by an error of its own.

    The others may be the first to notice, when they read from one that is not there any more.
    """
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return any(isinstance(failure, ray.exceptions.RayError) or LOST_PEER.search(str(failure)) for failure in failures)


def _cause(error: TrainingFailedError, problems: Queue) -> Exception:
    """What a process raised, an error for users first: the others may have failed because that one did."""
    told: list[Exception] = problems.get_nowait_batch(problems.qsize())
    told.sort(key=lambda problem: not isinstance(problem, UserError | DivergedError))
    return told[0] if told else error
