"""Record a study's table: its dense grid is scored as a study of its own, and the scores are collected into one file."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.evaluation.prepared import PreparedStudy, prepare
from search.execution.ray_compat import configure_ray
from search.execution.run import run_study
from search.problem.objectives import Objective
from search.results.study_result import StudyResult
from search.samplers.gram import FILE, extend_gram, keep_gram, kept_gram
from search.spec.study import StudySpec, load_study
from search.spec.study_file import quickstart_path
from uipe_core.deltas.checkpoints import find_checkpoints
from uipe_core.deltas.store import DeltaStore
from uipe_core.errors import UserError

from .table import ScoreTable, write_table

MEASUREMENTS = (
    "answer_loss",
    "answer_tokens",
    "paraphrase_loss",
    "paraphrase_tokens",
    "perturbed_loss",
    "perturbed_tokens",
    "rouge_l_recall",
)
"""What of free text is recorded: all that objectives are made of."""


def record_table(
    spec: StudySpec, out: Path, alphas: int, *, quiet: bool = False, address: str | None = None
) -> tuple[ScoreTable, list[str]]:
    """Score every base run x epoch at evenly spaced alphas and write the table; the same call resumes.

    The grid is scored as a study in the folder named like the file without its ending, where its report is, too.

    Args:
        spec: The study; its alpha range, base runs, items and controls are taken, sampler and number of trials are not.
        out: File to write, ``.npz``.
        alphas: How many values of alpha from the lowest to the highest, at least 2. Points at alpha = 0 are added.
        quiet, address: As `search.execution.run.run_study`.

    Returns:
        The table, and what its user should know of it.

    Raises:
        UserError: Bad input, or a grid that did not come to its end.
        StudyInterrupted: On Ctrl-C or SIGTERM; what was scored is kept.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out: {out} is no name of a table; give one that ends in .npz")
    if alphas < 2:
        raise UserError(f"--alphas: {alphas} is too few; give at least 2, the lowest and the highest")
    count = alphas * sum(spec.base_epochs().values())
    # A trial that is pruned lacks what the table is for.
    search = spec.search.model_copy(update={"sampler": "grid", "trials": count, "prune": False})
    # In a database of its own: there may be a study of this name in the other.
    grid = spec.model_copy(update={"search": search, "warm_start": (), "storage": None})
    result = run_study(grid, out.with_suffix(""), quiet=quiet, address=address)
    stopped = result.store.record.stopped
    if stopped:
        raise UserError(f"{result.out}: its grid is not whole: {stopped}; give it more and the same command goes on")
    table = collect_table(result, gram_of_study(prepare(grid), result.out))
    write_table(table, out)
    wanted = count + (sum(grid.base_epochs().values()) if _zero_is_between(grid, alphas) else 0)
    return table, _notes(result, table, wanted)


def gram_of_study(preparation: PreparedStudy, out: Path) -> NDArray[np.float64]:
    """(M, M) Gram matrix of a study's update vectors, in the order base, epoch; what its folder lacks is computed and kept.

    Raises:
        UserError: If a base run is not in the delta store, or a file of one is damaged.
    """
    spec, deltas = preparation.spec, DeltaStore(preparation.delta_root)
    runs = {run.label: deltas.find(preparation.base_run_inputs(preparation.unlearning(run))) for run in spec.variants()}
    for label in spec.checkpoints:
        runs[label] = find_checkpoints(deltas, [inputs for _, inputs in preparation.checkpoints_of(label)])
    there: dict[str, tuple[Sequence[str], int]] = {}
    for label, count in spec.base_epochs().items():
        run = runs[label]
        if run is None:
            raise UserError(f"base run {label} is no longer in the delta store; the same command trains it again")
        there[label] = (run.keys, count)
    gram = extend_gram(kept_gram(out / FILE), there, deltas)
    keep_gram(out / FILE, gram)
    places = gram.places
    # In the table's order of base runs, which may not be the kept one.
    rows = [places[label, epoch] for label in there for epoch in range(1, gram.runs[label][1] + 1)]
    return gram.gram[np.ix_(rows, rows)]


def collect_table(result: StudyResult, gram: NDArray[np.float64]) -> ScoreTable:
    """The table of a grid that was scored.

    Raises:
        UserError: If item scores of a point or of a reference model are missing.
    """
    spec, labels = result.spec, list(result.spec.base_epochs())
    trials = result.trials[result.trials["alpha"] != -1].assign(place=lambda frame: frame["base"].map(labels.index))
    trials = trials.sort_values(["place", "epoch", "alpha"], ignore_index=True).drop_duplicates(["place", "epoch", "alpha"])
    kept = [_items(result, int(number)) for number in trials["trial"]]
    initial, retain = (_reference(result, kind) for kind in ("initial", "retain"))
    arrays: dict[str, NDArray[Any]] = {}
    constant = []
    for name in kept[0]:
        values = np.stack([arrays_of[name] for arrays_of in kept])
        if values.dtype.kind == "i" and (values == values[0]).all():
            constant.append(name)
            values = values[0]
        arrays[name] = _single(values)
    cap = result.forget_quality_cap
    ceilings = [objective.ceiling(cap) for objective in result.objectives]
    methods = dict(zip(trials["base"], trials["method"], strict=True))
    meta = {
        "study": result.store.record.name,
        "seed": spec.seed,
        "definition": spec.definition,
        "objectives": [objective.name for objective in result.objectives],
        "bases": [{"label": label, "method": methods.get(label), "epochs": spec.base_epochs()[label]} for label in labels],
        "alpha": {"low": spec.search.alpha.low, "high": spec.search.alpha.high},
        "items": result.store.item_counts,
        "corner": [result.reference_point()[objective.name] for objective in result.objectives],
        "ceilings": [None if math.isinf(ceiling) else ceiling for ceiling in ceilings],
        "constant": constant,
        "fingerprint": result.store.record.fingerprint,
        "versions": result.store.record.versions,
    }
    return ScoreTable(
        meta=meta,
        base=trials["place"].to_numpy(dtype=np.int64),
        epoch=trials["epoch"].to_numpy(dtype=np.int64),
        alpha=trials["alpha"].to_numpy(dtype=np.float64),
        objectives=trials[list(meta["objectives"])].to_numpy(dtype=np.float64),
        arrays=arrays,
        initial={name: _single(values) for name, values in initial.items()},
        retain={name: _single(values) for name, values in retain.items()},
        gram=gram,
    )


def _single(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _items(result: StudyResult, number: int, control: bool = False) -> dict[str, NDArray[Any]]:
    arrays = result.store.items(number, control)
    if arrays is None:
        raise UserError(
            f"{result.out}: the item scores of trial {number} are missing; restore them, or record into another file"
        )
    return _recorded(arrays, result.objectives, result.spec.corpus.kind == "multiple_choice")


def _reference(result: StudyResult, kind: str) -> dict[str, NDArray[Any]]:
    row = result.control(kind)
    if row is not None:
        return _items(result, int(row["trial"]), control=True)
    if kind == "initial":
        raise UserError(f"{result.out}: the initial model has not been scored; the same command goes on")
    return {}


def _recorded(arrays: Mapping[str, NDArray[Any]], objectives: tuple[Objective, ...], choices: bool) -> dict[str, NDArray[Any]]:
    if choices:
        return dict(arrays)
    sets = {name for objective in objectives for name in objective.sets}
    parts = {name: name.partition("/") for name in arrays}
    return {name: arrays[name] for name, (of, _, what) in parts.items() if of in sets and what in MEASUREMENTS}


def _zero_is_between(spec: StudySpec, alphas: int) -> bool:
    """Return True if alpha = 0 is within the range and is none of the evenly spaced values."""
    alpha = spec.search.alpha
    values = np.round(np.linspace(alpha.low, alpha.high, alphas), 9)
    return alpha.low <= 0 <= alpha.high and not (values == 0).any()


def _notes(result: StudyResult, table: ScoreTable, wanted: int) -> list[str]:
    notes = []
    lost = wanted - len(result.trials)
    if lost > 0:
        reasons = pd.Series([failure["reason"] for failure in result.store.failures()]).value_counts()
        why = f", most often because: {reasons.index[0]}" if len(reasons) else ""
        notes.append(f"{lost} of {wanted} points are not in the table: they failed{why}")
    return notes


def main() -> None:
    """Record the grid of a study from the command line."""
    parser = argparse.ArgumentParser(description="Score a dense grid of a study; write the scores of all items into one file.")
    parser.add_argument("study", nargs="?", type=Path, help="study file; the quickstart when left out")
    parser.add_argument("--out", type=Path, help="file to write, .npz; runs/<study name>-table.npz when left out")
    parser.add_argument("--alphas", type=int, default=31, help="values of alpha, evenly spaced from the lowest to the highest")
    parser.add_argument("--seed", type=int, help="seed, in place of the file's")
    parser.add_argument("--address", help="Ray cluster to run on; this machine when left out")
    options = parser.parse_args()
    configure_ray(options.address)
    spec = load_study(options.study or quickstart_path(), {"seed": options.seed})
    path = options.out or Path("runs", f"{spec.name}-table.npz")
    table, notes = record_table(spec, path, options.alphas, address=options.address)
    for note in notes:
        print(f"note: {note}")
    epochs, size = sum(table.epochs.values()), path.stat().st_size / 1e6
    print(f"{path}: {len(table)} points of {epochs} base epochs, {size:.2f} MB; metrics: {table.meta['definition']}")


if __name__ == "__main__":
    main()
