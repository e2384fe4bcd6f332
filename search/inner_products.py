"""The inner products of a study's update vectors, as a Ray task: update vectors are read where they lie, the result is kept."""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from search.base_run_tasks import problem_of
from search.base_runs import BaseRuns
from search.line_sampler import Lines
from search.workers import inner_products
from uipe_core.content_store import write_atomic
from uipe_core.remote_store import RemotePlace

PATIENCE = 20.0
"""Seconds that proposals wait, all in all, for the first inner products: where models are small, they are there sooner."""
FILE = "gram.npz"
"""Where a study's folder keeps them."""
_RETRIES = 2


class InnerProducts:
    """Gets the inner products of all update vectors that are there; again when further base runs have come.

    Args:
        runs: The base runs as they come.
        epochs: Epochs that are searched, by base run.
        deltas: Root of the delta store.
        out: Folder of the study.
        say: Told once of a failure.
    """

    def __init__(
        self, runs: BaseRuns, epochs: Mapping[str, int], deltas: Path | RemotePlace, out: Path, say: Callable[[str], None]
    ) -> None:
        self._runs, self._epochs, self._deltas, self._file, self._say = runs, epochs, deltas, out / FILE, say
        self._patience = PATIENCE
        self._task: tuple[str, ray.ObjectRef[NDArray[np.float64]]] | None = None
        self._failed: set[str] = set()
        self._lines: Lines | None = None
        self._known = ""
        kept = kept_gram(self._file, self._there())
        if kept is not None:
            self._take(*kept)

    def poll(self, timeout: float = 0.0) -> None:
        """Starts what is missing, and takes what has come within `timeout` seconds."""
        wanted = json.dumps(self._there())  # names what is computed
        if self._task is None and wanted not in (self._known, "{}") and wanted not in self._failed:
            task = ray.remote(num_cpus=0, max_retries=_RETRIES)(inner_products)
            self._task = (wanted, task.remote(self._deltas, json.loads(wanted)))
        if self._task is None or not ray.wait([self._task[1]], timeout=timeout)[0]:
            return
        (name, reference), self._task = self._task, None
        try:
            gram = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._failed.add(name)
            reason = str(problem_of("inner products of the update vectors", error))
            self._say(f"failed: {reason}; the sampler goes on without them")
            return
        self._take(name, gram)
        buffer = io.BytesIO()
        np.savez(buffer, runs=np.array(name), gram=gram)
        write_atomic(self._file, buffer.getvalue())

    def lines(self) -> Lines | None:
        """The update vectors whose inner products are known; None if there are none yet, after a little patience."""
        started = time.monotonic()
        self.poll()
        while self._lines is None and self._task is not None and self._patience > 0:
            self.poll(0.2)
            now = time.monotonic()
            self._patience, started = self._patience - (now - started), now
        return self._lines

    def cancel(self) -> None:
        """Ends a task that is still at work."""
        if self._task is not None:
            ray.cancel(self._task[1], force=True)
            self._task = None

    def _there(self) -> dict[str, tuple[Sequence[str], int]]:
        """Base runs that are there: their entries in the store and their epochs."""
        published = self._runs.published
        return {label: (list(published[label]), count) for label, count in self._epochs.items() if label in published}

    def _take(self, name: str, gram: NDArray[np.float64]) -> None:
        places = [(label, epoch) for label, (_, count) in json.loads(name).items() for epoch in range(1, count + 1)]
        self._lines, self._known = Lines({place: number for number, place in enumerate(places)}, gram), name


def kept_gram(file: Path, runs: Mapping[str, tuple[Sequence[str], int]]) -> tuple[str, NDArray[np.float64]] | None:
    """What an earlier run of a study has kept, and of which base runs, as text.

    Args:
        file: Where it would be.
        runs: The base runs that are there: entries in the store and epochs by label. Those of the file must be among them.

    Returns:
        None if there is nothing of use: it can be computed again, whatever is wrong with the file.
    """
    try:
        with np.load(file) as archive:
            name, gram = str(archive["runs"]), archive["gram"]
        kept = json.loads(name)
        size = sum(count for _, count in kept.values())
        there = all(label in runs and [list(runs[label][0]), runs[label][1]] == run for label, run in kept.items())
        return (name, gram) if there and gram.shape == (size, size) and size and np.isfinite(gram).all() else None
    except Exception:
        return None
