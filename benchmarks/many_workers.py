"""Throughput of a study on many workers whose trials sleep instead of scoring. Prints one JSON object.

Everything but the score is real: `StudyStore` on SQLite, `StudySearcher`, Tune with the settings of a study, warm workers,
evidence and item scores of a real trial's size. The workers are processes of this machine, more than it has cores: they only
sleep. To start so many takes two cores a minute, so the first trial of each waits for all. The share of linear is trials per
second times seconds per trial over workers, from when each has had another until the last proposal. Its baseline, in the same
run, is a bare pool of as many actors without a study: what Ray itself takes.

    python benchmarks/many_workers.py                         # 64 workers, 1 s a trial: 3 minutes on two idle cores, 8 GB
    python benchmarks/many_workers.py --seconds 4 --trials 640  # trials as long as those of a 1B model on a GPU
    python benchmarks/many_workers.py --workers 8 --trials 80 # a small one
    python benchmarks/many_workers.py --workers 2 --trials 10000 --seconds 0 --no-pool   # memory of a long study
"""

import argparse
import base64
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import ray
from driver import EVIDENCE, ITEM_BYTES, STUDY, resident
from machine import machine
from ray import tune

from search.evaluation.metrics import TrialMetrics
from search.execution.base_runs import BaseRuns
from search.execution.budget import BudgetMonitor
from search.execution.capacity import ClusterCapacity
from search.execution.ray_cluster import ENVIRONMENT
from search.execution.tune import StudySearcher, run_trials
from search.execution.worker_pool import WorkerPoolMonitor
from search.problem.trial import TrialSpec
from search.samplers.registry import SAMPLERS
from search.spec.study import parse_study
from search.store.study_store import StudyStore

MARKS = (500, 1000, 2000, 2500, 3500, 5000, 6000, 7500, 8500, 10000)
"""Ended trials at which the driver's memory is reported."""


@dataclass(frozen=True)
class Started:
    """Where workers wait for each other, each in the first thing it does.

    Attributes:
        folder: In which each leaves a file.
        workers: How many there will be.
    """

    folder: Path
    workers: int

    def wait(self) -> None:
        own = self.folder / str(os.getpid())
        if own.exists():
            return
        own.touch()
        while len(list(self.folder.iterdir())) < self.workers:
            time.sleep(0.5)

    @classmethod
    def within(cls, folder: Path, workers: int) -> "Started":
        folder.mkdir()
        return cls(folder, workers)


class Sleeper(tune.Trainable):
    """Take jobs as `ScoringTrial` does, and sleeps."""

    def setup(self, config: dict[str, Any], started: Started, seconds: float, evidence: dict[str, Any], items: str) -> None:
        self._job, self._seconds, self._evidence, self._items = TrialSpec.from_text(config["job"]), seconds, evidence, items
        self._started = started

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._job = TrialSpec.from_text(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        self._started.wait()
        time.sleep(self._seconds)
        walked = (1 + self._job.alpha) * self._job.epoch / 5
        objectives = {"log10_forget_quality": -20 * 2.718281828**-walked, "model_utility": 0.9 - 0.1 * walked}
        metrics = TrialMetrics("tofu", {**self._evidence, **objectives})
        return {"metrics": metrics.as_text(), "items": self._items, "done": True}


class Timed:
    """Seconds and CPU seconds of the driver's calls of some functions."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0
        self.ends: list[tuple[float, float, float, float]] = []

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            started, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*given, **named)
            finally:
                self.seconds += time.perf_counter() - started
                self.cpu += time.thread_time() - cpu

        return timed

    def note(self, *_: Any) -> None:
        """Called when a trial has ended."""
        self.ends.append((time.perf_counter(), time.process_time(), self.seconds, resident()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=1280)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--no-pool", action="store_true", help="without the baseline")
    parser.add_argument("--dir", type=Path, help="where to write the study; a temporary folder when left out")
    options = parser.parse_args()
    with local_ray(options.workers, options.dir) as folder:
        pool = None
        if not options.no_pool:
            rate = pool_rate(options.workers, options.trials, options.seconds, folder)
            pool = round(rate * options.seconds / options.workers, 3)
        found = study_share(options, folder)
    print(json.dumps(summary(options, found, pool), indent=1))


@contextmanager
def local_ray(workers: int, where: Path | None = None) -> Iterator[Path]:
    """A Ray of this machine with room for so many workers, and a folder that goes with it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = Path(tempfile.mkdtemp(prefix="w", dir=where))
    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 * 2**20,
        _temp_dir=str(folder / "r"),
        _node_ip_address="127.0.0.1",
    )
    try:
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def summary(options: argparse.Namespace, found: dict[str, Any], pool: float | None) -> dict[str, Any]:
    return {
        "workers": options.workers,
        "seconds_per_trial": options.seconds,
        "sampler": options.sampler,
        **found,
        "baseline": {"name": "bare pool of actors, no study", "share_of_linear": pool},
        "ratio_to_baseline": round(found["share_of_linear"] / pool, 3) if pool else None,
        "machine": machine(),
        "versions": {name: version(name) for name in ("ray", "optuna")},
    }


def study_share(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A study of as many trials as asked for, and what each cost."""
    spec = parse_study(STUDY, folder)
    store = StudyStore.create(folder / "study", spec, "f" * 32, {})
    store.use_sampler(SAMPLERS[options.sampler].make(0))
    clock = Timed()
    for name in ("ask_point", "complete"):
        setattr(store, name, clock.wrap(getattr(store, name)))
    labels = [variant.label for variant in spec.variants()]
    runs = BaseRuns(ClusterCapacity(slots=options.workers, most=options.workers), published=dict.fromkeys(labels, ()))
    pool, guard = WorkerPoolMonitor(None), BudgetMonitor(store, spec.budget, print)
    ended = clock.note
    searcher = StudySearcher(store, spec.search_space(), [], options.trials, runs, lambda: None, iter(()), ended, pool, guard)
    items = base64.b64encode(os.urandom(ITEM_BYTES)).decode()
    started = Started.within(folder / "started", options.workers)
    trainable = tune.with_parameters(Sleeper, started=started, seconds=options.seconds, evidence=EVIDENCE, items=items)
    trainable = tune.with_resources(trainable, {"cpu": 1})
    for part in count(1):  # as `search.execution.run` does
        run_trials(trainable, searcher, pool, options.workers, folder / "ray", f"tune-{part}")
        if searcher.error is not None:
            raise searcher.error
        if searcher.done:
            break
    assert store.counts()["complete"] == options.trials
    store.close()
    # From when each worker has had a trial after that for which it waited until there are no more to hand out.
    first, last = clock.ends[2 * options.workers], clock.ends[-options.workers]
    counted = len(clock.ends) - 3 * options.workers
    rate = counted / (last[0] - first[0])
    return {
        "trials": options.trials,
        "trials_per_second": round(rate, 2),
        "share_of_linear": round(rate * options.seconds / options.workers, 3),
        "driver_cpu_ms_per_trial": round(1e3 * (last[1] - first[1]) / counted, 2),
        "of_it_storage_and_sampler_cpu_ms": round(1e3 * clock.cpu / options.trials, 2),
        "storage_and_sampler_ms": round(1e3 * (last[2] - first[2]) / counted, 2),
        "driver_memory_mb_at_trial": {mark: clock.ends[mark - 1][3] for mark in MARKS if mark <= len(clock.ends)},
    }


def pool_rate(workers: int, trials: int, seconds: float, folder: Path) -> float:
    """Trials per second of a bare pool, once it is at work."""
    started = Started.within(folder / "pool", workers)

    class Bare:
        def step(self) -> str:
            started.wait()
            time.sleep(seconds)
            return "x" * ITEM_BYTES

    actors = [ray.remote(num_cpus=1)(Bare).remote() for _ in range(workers)]
    running = {actor.step.remote(): actor for actor in actors}
    ends = []
    for _ in range(trials):
        (ended,), _ = ray.wait(list(running), num_returns=1)
        ray.get(ended)
        actor = running.pop(ended)
        running[actor.step.remote()] = actor
        ends.append(time.perf_counter())
    for actor in actors:
        ray.kill(actor)
    first, last = ends[2 * workers], ends[-1]
    return (len(ends) - 1 - 2 * workers) / (last - first)


if __name__ == "__main__":
    main()
