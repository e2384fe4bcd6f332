"""How many items a trial needs for the sampler `line` to choose as well: replayed on recorded tables, without any model.

A search sees a share of every set's items, its finalists are scored on all. Items are chosen before the search by their
spread: those whose answer's loss differs most between the given points (initial model, every epoch at alpha = 0); or evenly,
every second, third, ... one. Baseline: the same search on all items. Figures are quartiles over sampler seeds: the share of the
dense grid's gain (hypervolume over the given points, forget quality capped at the noise ceiling, all items) that the finalists
have, which are the front as the search sees it after so many scores; the items scored, those of finalists included, as a share
of the baseline's; and the number of finalists. Prints one JSON object.

    python benchmarks/fewer_items.py                                 # all tables, 5 sampler seeds
    python benchmarks/fewer_items.py --shares 1 0.5 --seeds 20 --scores 25
"""

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from machine import machine
from numpy.typing import NDArray
from recorded.replay import World
from recorded.table import ScoreTable, read_table
from samplers import TABLES, Search

from search.problem.pareto import non_dominated
from search.problem.space import own_epoch

LOSS = "answer_loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, help="recorded grids; the shipped ones when left out")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 1 / 2, 1 / 3, 1 / 4])
    parser.add_argument("--choices", nargs="+", choices=("spread", "even"), default=["spread", "even"])
    parser.add_argument("--seeds", type=int, default=5, help="sampler seeds per table")
    parser.add_argument("--scores", type=int, default=25, help="points a search proposes")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    found = {}
    for path in options.tables or sorted(TABLES.glob("*.npz")):
        whole = World(read_table(path))
        found[path.stem] = {
            f"{share:.2f} by {choice}": summary(whole, share, choice, options)
            for choice in options.choices
            for share in options.shares
            if share < 1 or choice == options.choices[0]
        }
    print(json.dumps({"benchmark": "fewer items", "scores": options.scores, "seeds": options.seeds, "worlds": found,
                      "machine": machine()}, indent=1))  # fmt: skip


def summary(whole: World, share: float, choice: str, options: argparse.Namespace) -> dict[str, Any]:
    """Quartiles over sampler seeds of the gain and of the cost."""
    seen = World(part_of(whole, share, choice)) if share < 1 else whole
    runs = [searched(whole, seen, share, seed, options.scores) for seed in range(options.seeds)]
    return {
        name: [round(float(np.quantile(values, q)), 3) for q in (0.25, 0.5, 0.75)]
        for name, values in zip(
            ("share_of_dense_gain", "share_of_items_scored", "finalists"), zip(*runs, strict=True), strict=True
        )
    }


def searched(whole: World, seen: World, share: float, seed: int, scores: int) -> tuple[float, float, int]:
    """Search on what is seen; gain of the finalists on all items, items scored as a share, number of finalists."""
    search = Search(seen, "line", seed, scores)
    values = [search.step()[0] for _ in range(scores)]
    front = non_dominated(np.minimum(np.concatenate([seen.given_points, values]), seen.ceilings))
    # The given points are scored on all items anyway.
    chosen = [int(place) - len(seen.given_points) for place in np.flatnonzero(front) if place >= len(seen.given_points)]
    trials = search._study.trials[len(seen.given) :]
    finalists = [whole.objectives(place_of(whole, trials[number].params)) for number in chosen]
    points = np.concatenate([whole.given_points, np.reshape(finalists, (-1, len(whole.reference)))])
    gain = (whole.volume(points) - whole.volume(whole.given_points)) / whole.dense_gain
    return gain, share + (len(chosen) / scores if share < 1 else 0.0), len(chosen)


def place_of(world: World, params: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Item scores at a proposed place."""
    base, counts = world.labels.index(params["base"]), list(world.table.epochs.values())
    return world.items(base, own_epoch(params["epoch"], max(counts), counts[base]), params["alpha"])


def part_of(world: World, share: float, choice: str) -> ScoreTable:
    """The table with a share of every set's items: those of the largest spread over the given points, or evenly taken."""
    table = world.table
    sets = {name.partition("/")[0] for name in table.initial}
    chosen = {}
    for name in sets:
        key = f"{name}/{LOSS}"
        losses = np.array([table.initial[key], *(items[key] for _, _, items, _ in world.given)])
        count = max(2, round(share * losses.shape[1]))
        widest = np.sort(np.argsort(-losses.std(axis=0), kind="stable")[:count])
        chosen[name] = widest if choice == "spread" else np.arange(count) * losses.shape[1] // count

    def taken(arrays: Mapping[str, NDArray[Any]], points: bool) -> dict[str, NDArray[Any]]:
        return {
            name: np.take(values, chosen[name.partition("/")[0]], axis=int(points and name not in table.meta["constant"]))
            for name, values in arrays.items()
        }

    part = replace(
        table, arrays=taken(table.arrays, True), initial=taken(table.initial, False), retain=taken(table.retain, False)
    )
    known = World(part)
    return replace(part, objectives=np.array([known.objectives(part.items(row)) for row in range(len(part))]))


if __name__ == "__main__":
    main()
