"""Run on Ray workers: the trainable, the tasks, and the time and memory limits of a trial."""

import base64
import faulthandler
import io
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from search.evaluation.evaluator import Evaluator, StudyContext, load_for_scoring
from search.evaluation.metrics import TrialMetrics, example_texts
from search.evaluation.prepared import kept_alternates
from search.evaluation.task import Report, task_of
from search.execution.ray_compat import take_passed
from search.problem.trial import TrialSpec
from search.samplers.gram import Runs, StudyGram, extend_gram
from search.spec.plugins import load_plugins
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.checkpoints import import_checkpoints
from uipe_core.deltas.store import BaseRun, DeltaStore
from uipe_core.errors import first_line
from uipe_core.models.loading import ModelSource, Progress, set_threads
from uipe_core.models.memory import free_memory, is_out_of_memory
from uipe_core.models.skeleton import open_initial
from uipe_core.scoring.scorer import ScoringConfig
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.remote_store import RemoteLocation
from uipe_core.unlearning.distributed import current_processes
from uipe_core.unlearning.training import UnlearningConfig, train_base_run

logger = logging.getLogger(__name__)

HOLD_SECONDS = 0.2
"""How long a worker with nothing to do waits before it asks again (see `search.execution.tune`)."""

REPORT_SECONDS = 0.2
"""Least time between two notes on the progress of a task."""


def _begin() -> None:
    """Set what was passed to the study, and load its extensions."""
    take_passed()
    load_plugins()


class ScoringTrial(tune.Trainable):
    """A warm worker: its model stays loaded while Tune gives it one job after another."""

    def setup(self, config: dict[str, Any], context: StudyContext) -> None:
        """Record the job; the model is loaded with the first step, because slow set-ups upset actor reuse."""
        self._job: TrialSpec | None = TrialSpec.from_text(config["job"])
        self._context = context
        self._loaded: Evaluator | None = None
        _begin()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next job."""
        self._job = TrialSpec.from_text(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        """Score the job. A failure is a result: an exception would cost the warm actor and, with it, concurrency.

        The job's end is not the trial's: `search.execution.tune` may ask again and again until another worker has started.
        """
        if self._job is None:
            time.sleep(HOLD_SECONDS)
            return {}
        job, self._job = self._job, None
        try:
            with time_limit(self._context.trial_minutes):
                metrics, report = score_within_memory(self._evaluator, job)
                items = {} if report is None else {"items": pack_arrays({**report.arrays(), **example_texts(report)})}
                return {"metrics": metrics.as_text(), **items}
        except Exception as error:
            logger.exception("trial failed: %s", job)
            reason = str(error) if isinstance(error, OutOfMemory) else f"{type(error).__name__}: {error}"
            return {"reason": reason, "traceback": traceback.format_exc()}

    def _evaluator(self) -> Evaluator:
        if self._loaded is None:
            self._loaded = Evaluator(self._context)
        return self._loaded


def pack_arrays(arrays: Mapping[str, Any]) -> str:
    """Named arrays as text: base64 of a compressed numpy archive."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return base64.b64encode(buffer.getvalue()).decode()


def _reporter(board: Any, name: str) -> Callable[[int, int], None]:
    last = 0.0

    def note(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > REPORT_SECONDS or done == total:
            last = now
            board.note.remote(name, done, total)

    return note


def build_model(
    title: str, make: Callable[[ContentStore, Progress | None], Path], root: Path, threads: int, board: Any
) -> Path:
    """Build a model unless the cache has it; return its folder."""
    _begin()
    set_threads(threads)
    return make(ContentStore(root), _reporter(board, f"training: {title} model"))


def train_and_publish(
    source: ModelSource,
    corpus: Corpus,
    config: UnlearningConfig,
    inputs: Mapping[str, Any],
    root: Path | RemoteLocation,
    threads: int,
    board: Any,
    label: str,
) -> BaseRun | None:
    """Train a base run and publish it, unless the store has it by now.

    In a process group the first process publishes what all train together, and returns it; the others return None.
    """
    _begin()
    set_threads(threads)
    processes = current_processes()
    if processes.count > 1 and config.adapter is None:
        source = replace(source, device="cpu")  # from there each process takes its shards
    report = _reporter(board, f"unlearning: {label}") if processes.rank == 0 else None
    epochs = train_base_run(source.load(dtype="auto"), corpus, config, report)
    return processes.run_on_first(epochs, partial(DeltaStore(root).get_or_train, inputs))


def sample_and_keep(
    source: ModelSource, corpus: Corpus, inputs: Mapping[str, Any], root: Path, threads: int
) -> tuple[tuple[str, ...], ...]:
    """Sample alternate answers of the forget items unless the cache has them; return them."""
    _begin()
    set_threads(threads)
    return kept_alternates(source, corpus, inputs, ContentStore(root))


def import_and_publish(
    initial: Path,
    checkpoints: Sequence[tuple[Path, Mapping[str, Any]]],
    root: Path | RemoteLocation,
    trust_remote_code: bool,
    threads: int,
    board: Any,
    label: str,
) -> BaseRun:
    """Make a base run of given checkpoints, importing those that the store lacks."""
    _begin()
    set_threads(threads)
    note = _reporter(board, f"importing: {label}")
    return import_checkpoints(open_initial(initial, trust_remote_code), checkpoints, DeltaStore(root), note)


def grow_gram(known: StudyGram, runs: Runs, root: Path | RemoteLocation) -> StudyGram:
    """Add the inner products of base runs that were published to those that are known."""
    _begin()
    set_threads(1)
    return extend_gram(known, runs, DeltaStore(root))


def score_model(source: ModelSource, corpus: Corpus, scoring: ScoringConfig, threads: int, board: Any, title: str) -> Report:
    """Score a model as it is."""
    _begin()
    set_threads(threads)
    loaded, _ = load_for_scoring(source)
    return task_of(corpus).scorer(corpus, loaded.prompts, scoring).score(loaded, progress=_reporter(board, title))


class OutOfMemory(Exception):
    """A trial that found too little memory twice."""


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """End this process if the block is still at work after so long, in Python or in C code; None never does.

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


def score_within_memory(evaluator: Callable[[], Evaluator], job: TrialSpec) -> tuple[TrialMetrics, Report | None]:
    """Score a trial. Where memory runs out, release what is in use and try once more.

    Scoring halves its batches by itself. What fails here is loading or moving the model, or a single row.

    Args:
        evaluator: Gives the worker's evaluator; making it loads the model, and may itself find too little memory.
        job: What to score.

    Raises:
        OutOfMemory: If it was too little again.
        Exception: What else went wrong.
    """
    said = details = ""
    for _ in range(2):
        try:
            return evaluator().evaluate(job)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said, details = first_line(error), traceback.format_exc()
        # Not in the handler: the error's traceback refers to everything that took the memory.
        free_memory()
    problem = OutOfMemory(f"out of memory twice, however small the batches: {said}")
    problem.add_note(details)
    raise problem
