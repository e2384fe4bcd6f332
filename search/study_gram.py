"""The Gram matrix of a study's update vectors: computed once, kept in the study's folder."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from search.preparation import Preparation
from uipe_core.checkpoints import find_checkpoints
from uipe_core.content_store import write_atomic
from uipe_core.delta_store import DeltaStore
from uipe_core.errors import UserError
from uipe_core.gram import gram_matrix

FILE = "gram.npz"


def study_gram(
    out: Path, deltas: DeltaStore, published: Mapping[str, tuple[str, ...]], epochs: Mapping[str, int]
) -> NDArray[np.float64]:
    """(M, M) Gram matrix of the update vectors of some base runs, in the order base, epoch (`uipe_core.gram`).

    It is read from the study's folder if it was computed of the same entries before. A file that is damaged is written anew.

    Args:
        out: Folder of the study.
        deltas: Where its update vectors are.
        published: Entries of the delta store by base run.
        epochs: How many epochs of each are searched; at least those of `published`.

    Raises:
        UserError: If a file of an update vector is gone or damaged.
    """
    names = json.dumps([[label, list(keys), epochs[label]] for label, keys in published.items()])
    path = out / FILE
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["of"]) == names:
                return np.asarray(archive["gram"], dtype=np.float64)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass
    runs = [(deltas.open(keys), epochs[label]) for label, keys in published.items()]
    gram = gram_matrix([run.load(epoch) for run, count in runs for epoch in range(1, count + 1)])
    buffer = io.BytesIO()
    np.savez(buffer, of=np.array(names), gram=gram)
    write_atomic(path, buffer.getvalue())
    return gram


def published_runs(preparation: Preparation) -> dict[str, tuple[str, ...]]:
    """Entries of the delta store by base run, of a study that is not running, in the order of the search space.

    Raises:
        UserError: If a base run is not there.
    """
    spec, deltas = preparation.spec, DeltaStore(preparation.delta_root)
    runs = {run.label: deltas.find(preparation.base_run_inputs(preparation.unlearning(run))) for run in spec.variants()}
    for label in spec.checkpoints:
        runs[label] = find_checkpoints(deltas, [inputs for _, inputs in preparation.checkpoints_of(label)])
    missing = [label for label, run in runs.items() if run is None]
    if missing:
        raise UserError(f"base runs are not in the delta store: {', '.join(missing)}; the same command trains them again")
    return {label: runs[label].keys for label in spec.base_epochs() if runs[label] is not None}  # type: ignore[union-attr]
