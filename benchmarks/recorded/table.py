"""A recorded table: the scores of every item at every point of a dense grid of one study, in one file without pickles.

The file is a compressed numpy archive. ``meta`` is one JSON string; ``base``, ``epoch``, ``alpha`` and ``objectives`` have a
row per point; arrays of items are named as `ScoreReport.arrays` names them, with a leading axis of points where they differ
between points (those ``meta`` lists as ``constant`` have none: counts of tokens); ``initial/...`` and ``retain_model/...`` are
the same of the two reference models; ``gram`` is the Gram matrix of the update vectors, in the order base, epoch.
"""

import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.errors import UserError
from uipe_core.storage.files import write_atomic

FORMAT, VERSION = "uipe-score-table", 1
COLUMNS = ("base", "epoch", "alpha", "objectives")
INITIAL, RETAIN = "initial/", "retain_model/"
META_KEYS = ("study", "seed", "definition", "objectives", "bases", "alpha", "items", "corner", "ceilings", "constant")

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """A dense grid of scored points. P points, m objectives, M update vectors.

    Attributes:
        meta: Facts: ``study``, ``seed``, ``definition``; ``objectives`` (m names); ``bases`` (label, method and number of
            epochs of each); ``alpha`` (``low``, ``high``); ``items`` (number by evaluation set); ``corner`` and ``ceilings``
            (m) of the hypervolume, null where nothing is capped; ``constant`` (arrays without a points axis).
        base: (P,) index into ``meta["bases"]``.
        epoch: (P,) from 1, the base run's own.
        alpha: (P,) never -1: that is the initial model, for every base run.
        objectives: (P, m) as the study scored them.
        arrays: (P, n, ...) of items by ``set/measurement``; those of ``meta["constant"]`` are (n, ...).
        initial, retain: (n, ...) of the reference models; no ``retain`` for multiple choice.
        gram: (M, M) inner products of the update vectors, in the order base, epoch.
    """

    meta: Mapping[str, Any]
    base: NDArray[np.int64]
    epoch: NDArray[np.int64]
    alpha: NDArray[np.float64]
    objectives: NDArray[np.float64]
    arrays: Arrays
    initial: Arrays
    retain: Arrays
    gram: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def epochs(self) -> dict[str, int]:
        """Number of epochs by the label of the base run."""
        return {str(each["label"]): int(each["epochs"]) for each in self.meta["bases"]}

    def items(self, row: int) -> dict[str, NDArray[Any]]:
        """Every array of one point, as a study keeps them of a trial."""
        constant = set(self.meta["constant"])
        return {name: values if name in constant else values[row] for name, values in self.arrays.items()}


def write_table(table: ScoreTable, path: Path) -> None:
    """Write a table atomically; what of it is in single precision stays so."""
    content: dict[str, Any] = {name: getattr(table, name) for name in (*COLUMNS, "gram")}
    content["meta"] = np.array(json.dumps({"format": FORMAT, "version": VERSION, **table.meta}))
    content |= table.arrays
    content |= {f"{INITIAL}{name}": values for name, values in table.initial.items()}
    content |= {f"{RETAIN}{name}": values for name, values in table.retain.items()}
    buffer = io.BytesIO()
    # What `np.savez_compressed` does, by the better of zip's methods: these files are kept, and read now and then.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, values in content.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, np.asarray(values), allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def read_table(path: Path) -> ScoreTable:
    """Read a table and checks that it is whole.

    Raises:
        UserError: No such file; cut off or damaged; something else; written by a newer version; parts that do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = dict(archive)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python -m benchmarks.recorded.record STUDY --out {path}` writes one") from None
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path}: cut off, damaged or no table ({type(error).__name__}); record it again (benchmarks/README.md)"
        ) from error
    meta = _meta(path, content)
    _require(path, content, (*COLUMNS, "gram", *meta["constant"]))
    references = {
        prefix: {name.removeprefix(prefix): content.pop(name) for name in list(content) if name.startswith(prefix)}
        for prefix in (INITIAL, RETAIN)
    }
    gram, columns = content.pop("gram"), {name: content.pop(name) for name in COLUMNS}
    table = ScoreTable(meta, **columns, arrays=content, initial=references[INITIAL], retain=references[RETAIN], gram=gram)
    _check(path, table)
    return table


def _meta(path: Path, content: dict[str, NDArray[Any]]) -> dict[str, Any]:
    try:
        meta = json.loads(str(content.pop("meta")))
        version = meta["version"] if meta["format"] == FORMAT else None
    except (KeyError, ValueError, TypeError):
        version = None
    if not isinstance(version, int):
        raise UserError(f"{path}: a numpy archive, but no table of scores; give a file that benchmarks/recorded wrote")
    if version > VERSION:
        raise UserError(f"{path}: format {version}, this program reads up to {VERSION}; upgrade uipe-search")
    missing = [key for key in META_KEYS if key not in meta]
    if missing:
        raise UserError(f"{path}: its description lacks {', '.join(missing)}; record it again (benchmarks/README.md)")
    return dict(meta)


def _require(path: Path, content: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in content]
    if missing:
        raise UserError(f"{path}: it lacks {', '.join(missing)}; record it again (benchmarks/README.md)")


def _check(path: Path, table: ScoreTable) -> None:
    """Return True if the parts fit together."""
    points, vectors, constant = len(table), sum(table.epochs.values()), set(table.meta["constant"])
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "base": (table.base, (points,)),
        "epoch": (table.epoch, (points,)),
        "alpha": (table.alpha, (points,)),
        "objectives": (table.objectives, (points, len(table.meta["objectives"]))),
        "gram": (table.gram, (vectors, vectors)),
    }
    for name, values in table.arrays.items():
        own = table.initial.get(name)
        if own is None:
            raise UserError(f"{path}: {name} is not there of the initial model; record it again (benchmarks/README.md)")
        shapes[name] = (values, own.shape if name in constant else (points, *own.shape))
    for name, (values, shape) in shapes.items():
        if values.shape != shape:
            raise UserError(
                f"{path}: {name} has shape {values.shape}, {shape} expected; record it again (benchmarks/README.md)"
            )
        if values.dtype.kind not in "biuf" or np.isnan(values.astype(np.float64)).any():
            raise UserError(f"{path}: {name} holds something else than numbers; record it again (benchmarks/README.md)")
    counts = np.array([*table.epochs.values(), 0])
    known = (table.base >= 0) & (table.base < len(table.epochs)) & (table.epoch >= 1)
    known &= table.epoch <= counts[np.where(known, table.base, -1)]
    if not known.all():
        row = int(np.argmin(known))
        raise UserError(
            f"{path}: point {row} is of base run {table.base[row]}, epoch {table.epoch[row]}, which the table does not have; "
            "record it again (benchmarks/README.md)"
        )
