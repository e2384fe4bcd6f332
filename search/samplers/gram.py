"""The Gram matrix of a study's update vectors: kept in the study's folder, and grown as base runs come."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uipe_core.deltas.gram import gram_matrix
from uipe_core.deltas.store import DeltaStore
from uipe_core.storage.files import write_atomic

FILE = "gram.npz"
"""Where a study's folder keeps it."""

Runs = Mapping[str, tuple[Sequence[str], int]]
"""Base runs by label: their entries in the delta store, and how many of their epochs are searched."""


@dataclass(frozen=True)
class StudyGram:
    """Inner products of the update vectors of base runs.

    Attributes:
        runs: The base runs, in the order of the rows.
        gram: (M, M) inner products, rows in the order run, epoch.
    """

    runs: Runs
    gram: NDArray[np.float64]

    @property
    def places(self) -> dict[tuple[str, int], int]:
        """The row of each update vector, by base run and its own epoch."""
        vectors = [(label, epoch) for label, (_, count) in self.runs.items() for epoch in range(1, count + 1)]
        return {vector: row for row, vector in enumerate(vectors)}

    def among(self, runs: Runs) -> "StudyGram":
        """Return the rows of these base runs, in the kept order, where their entries and numbers of epochs are unchanged."""
        same = {label: run for label, run in self.runs.items() if label in runs and _plain(runs[label]) == _plain(run)}
        rows = [row for (label, _), row in self.places.items() if label in same]
        return StudyGram(same, self.gram[np.ix_(rows, rows)])


NOTHING = StudyGram({}, np.zeros((0, 0)))


def extend_gram(known: StudyGram, runs: Runs, deltas: DeltaStore) -> StudyGram:
    """The inner products of base runs: those that are known as they are, and behind them the others.

    Raises:
        UserError: If an update vector's file is gone or damaged.
        BrokenEntryError: If an entry is no longer in the store.
    """
    known = known.among(runs)
    if len(known.runs) == len(runs):
        return known
    wanted = {**known.runs, **{label: run for label, run in runs.items() if label not in known.runs}}
    opened = [(deltas.open(keys), count) for keys, count in wanted.values()]
    updates = [run.load(epoch) for run, count in opened for epoch in range(1, count + 1)]
    return StudyGram(wanted, gram_matrix(updates, known.gram))


def keep_gram(file: Path, gram: StudyGram) -> None:
    """Write it for `kept_gram`."""
    buffer = io.BytesIO()
    np.savez(buffer, runs=np.array(json.dumps(gram.runs)), gram=gram.gram)
    write_atomic(file, buffer.getvalue())


def kept_gram(file: Path) -> StudyGram:
    """Read the matrix an earlier run kept. Return `NOTHING` where the file is missing or damaged: it is computed again."""
    try:
        with np.load(file) as archive:
            runs, gram = json.loads(str(archive["runs"])), archive["gram"]
        size = sum(count for _, count in runs.values())
        return StudyGram(runs, gram) if gram.shape == (size, size) and np.isfinite(gram).all() else NOTHING
    except Exception:
        return NOTHING


def _plain(run: tuple[Sequence[str], int]) -> tuple[list[str], int]:
    return list(run[0]), run[1]
