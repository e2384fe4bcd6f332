"""How many scores a search needs: samplers replayed on recorded tables, without any model. Prints one JSON object.

A table (`benchmarks.recorded.record`) has the scores of every item on a dense grid. A replay answers a proposed (base,
epoch, alpha) with the items of that place, between recorded alphas by interpolation, and computes the objectives from them by
the study's own metrics. ``left_out`` says how inexact that is: every other alpha is left out and predicted from the rest, so
that gaps twice as wide as a replay's are bridged. ``recomputed`` is what the table's single precision costs.

Given, as in a study: the initial model and every epoch at alpha = 0. Measured: scores beyond those until 95% and 99% of the
gain of the dense grid are reached, that is of its hypervolume over the given points, with forget quality capped at the noise
ceiling. A search that has not reached it after --scores counts as infinitely long: a quartile there is null. Baseline:
multivariate TPE. ``oracle`` knows the grid and takes the best point each time: fewer scores than that are luck.

    python benchmarks/samplers.py                                 # all tables, 20 sampler seeds
    python benchmarks/samplers.py benchmarks/tables/quickstart-seed0.npz --samplers random tpe --seeds 5
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from machine import machine
from numpy.typing import NDArray
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial
from recorded.replay import OBJECTIVES, World
from recorded.table import ScoreTable, read_table

from search.problem.pareto import non_dominated
from search.problem.space import own_epoch, sampled_epoch
from search.samplers.line import LineSampler, LineStudy, UpdateVectors
from search.samplers.outcomes import OutcomeModel
from search.samplers.registry import SAMPLERS as REGISTRY

TABLES = Path(__file__).parent / "tables"
SAMPLERS = ["random", "grid", "nsga2", "tpe", "gp", "line"]
SHARES = (0.95, 0.99)
BASELINE = "tpe"
TOFU_ITEMS = {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117}
Items = Mapping[str, NDArray[Any]]


class Search:
    """One search on a world: a study in memory, as `search.store.ask_tell` keeps one, that begins with what is given."""

    def __init__(self, world: World, name: str, seed: int, trials: int) -> None:
        self._world = world
        self._kept: dict[int, Items] = {}
        self._seed = seed
        self._grid = self._grid_points(trials) if name == "grid" else None
        sampler = _line_sampler(world, seed, self._kept.get) if name == "line" else REGISTRY[name].make(seed)
        self._study = optuna.create_study(directions=["maximize"] * len(world.table.meta["objectives"]), sampler=sampler)
        counts = list(world.table.epochs.values())
        for base, epoch, items, values in world.given:
            params = {"base": world.labels[base], "epoch": sampled_epoch(epoch, max(counts), counts[base]), "alpha": 0.0}
            self._kept[len(self._kept)] = items
            self._study.add_trial(create_trial(values=list(values), params=params, distributions=world.space))

    @property
    def place(self) -> tuple[int, int, float]:
        """Base, own epoch and alpha of the last point."""
        params = self._study.trials[-1].params
        base, counts = self._world.labels.index(params["base"]), list(self._world.table.epochs.values())
        return base, own_epoch(params["epoch"], max(counts), counts[base]), params["alpha"]

    def step(self) -> tuple[NDArray[np.float64], float]:
        """Propose a point and score it; objectives, and seconds that proposing took."""
        if self._grid is not None:
            self._study.enqueue_trial(next(self._grid))
        started = time.perf_counter()
        trial = self._study.ask(fixed_distributions=self._world.space)
        seconds = time.perf_counter() - started
        items = self._world.items(*self.place)
        values = self._world.objectives(items)
        self._kept[trial.number] = items
        self._study.tell(trial.number, list(values), state=TrialState.COMPLETE)
        return values, seconds

    def _grid_points(self, trials: int) -> Iterator[dict[str, Any]]:
        """An even grid of so many points, as `search.problem.space.grid_points` has it, in an order of the seed's own."""
        table = self._world.table
        bases = [(label, epoch) for label, count in table.epochs.items() for epoch in range(1, count + 1)]
        alphas = np.linspace(self._world.low, self._world.high, max(trials // len(bases), 2))
        longest = max(table.epochs.values())
        points = [
            {"base": label, "epoch": sampled_epoch(epoch, longest, table.epochs[label]), "alpha": float(alpha)}
            for alpha in alphas
            if abs(alpha) > 1e-9
            for label, epoch in bases
        ]
        order = np.random.default_rng(self._seed).permutation(len(points))
        return cycle([points[place] for place in order])


def _line_sampler(world: World, seed: int, items: Callable[[int], Items | None]) -> BaseSampler:
    """The sampler that knows the line, as a study has it."""
    table = world.table
    vectors = [(label, epoch) for label, count in table.epochs.items() for epoch in range(1, count + 1)]
    lines = UpdateVectors({place: number for number, place in enumerate(vectors)}, table.gram)
    study = LineStudy(
        epochs=table.epochs,
        alpha=(world.low, world.high),
        curves=curves_of(world),
        initial=table.initial,
        reference=lambda: (list(world.reference), list(world.ceilings)),
        items=items,
        lines=lambda: lines,
    )
    return LineSampler(study, world.space, REGISTRY["tpe"].make(seed), seed, warnings.warn)


def curves_of(world: World) -> OutcomeModel:
    """The curves that the table's objectives are made of."""
    meta = world.table.meta
    return OutcomeModel(meta["definition"], [OBJECTIVES[name] for name in meta["objectives"]], world.table.retain)


def replay(world: World, name: str, seed: int, most: int) -> tuple[dict[float, float], float]:
    """Score until each share of the gain is reached, infinity if it is not; and the share reached in the end."""
    search, points = Search(world, name, seed, most), world.given_points
    given, reached, share = world.volume(points), {}, 0.0
    for scores in range(1, most + 1):
        values, _ = search.step()
        points = np.concatenate([points, values[None]])
        share = (world.volume(points) - given) / world.dense_gain
        reached |= {wanted: float(scores) for wanted in SHARES if share >= wanted and wanted not in reached}
        if len(reached) == len(SHARES):
            break
    return {wanted: reached.get(wanted, np.inf) for wanted in SHARES}, share


def oracle(world: World) -> dict[str, int]:
    """Score that somebody needs who knows the whole grid, and takes each time the point that adds most."""
    points, reached = world.given_points, dict[float, int]()
    given = world.volume(points)
    everything = np.concatenate([points, world.table.objectives])
    front = everything[non_dominated(np.minimum(everything, world.ceilings))]
    for scores in range(1, len(front) + 1):
        volumes = [world.volume(np.concatenate([points, each[None]])) for each in front]
        points = np.concatenate([points, front[np.argmax(volumes)][None]])
        share = (max(volumes) - given) / world.dense_gain
        reached |= {wanted: scores for wanted in SHARES if share >= wanted and wanted not in reached}
    return {f"scores_to_{wanted:.0%}": scores for wanted, scores in reached.items()}


def left_out(world: World) -> dict[str, dict[str, float]]:
    """How far objectives predicted from every other alpha are from the recorded ones, at those left out."""
    table = world.table
    place = np.zeros(len(table), dtype=int)
    for base, epoch in {*zip(table.base, table.epoch, strict=True)}:
        rows = np.flatnonzero((table.base == base) & (table.epoch == epoch))
        place[rows] = np.arange(len(rows))
    # Of 0.1 to 2.0 in steps of 0.1 every second one is known; those at the ends stay, nothing is known beyond them.
    known = (place % 2 == 1) | (table.alpha >= world.high) | (table.alpha == 0)
    coarse = World(table, known)
    rows = np.flatnonzero(~known)
    found = [coarse.objectives(coarse.items(int(table.base[r]), int(table.epoch[r]), float(table.alpha[r]))) for r in rows]
    apart = np.abs(np.minimum(found, world.ceilings) - np.minimum(table.objectives[rows], world.ceilings))
    names = table.meta["objectives"]
    return {
        name: {
            "mean": round(float(apart[:, at].mean()), 6),
            "q95": round(float(np.quantile(apart[:, at], 0.95)), 6),
            "max": round(float(apart[:, at].max()), 6),
        }
        for at, name in enumerate(names)
    }


def recomputed(world: World) -> list[float]:
    """(m) largest difference between the objectives of recorded items and those the study had: what single precision costs."""
    table = world.table
    found = np.array([world.objectives(table.items(row)) for row in range(len(table))])
    return [float(value) for value in np.abs(found - table.objectives).max(axis=0)]


def suggest_seconds(world: World, name: str, trials: int) -> dict[str, float]:
    """Median and largest time of a proposal with so many trials scored at random before."""
    search = Search(world, "random", 0, trials)
    for _ in range(trials - len(world.given)):
        search.step()
    kept = search._kept
    search._study.sampler = _line_sampler(world, 0, kept.get) if name == "line" else REGISTRY[name].make(0)
    search.step()  # a sampler's first proposal reads all there is; in a study that is spread over all of them
    seconds = [search.step()[1] for _ in range(9)]
    return {"median": round(float(np.median(seconds)), 4), "largest": round(max(seconds), 4)}


def tofu_sized(table: ScoreTable) -> ScoreTable:
    """The same table with as many items as the evaluation sets of TOFU forget10 have, its own over and over."""

    def sized(arrays: Items, points: bool) -> dict[str, NDArray[Any]]:
        found = dict(arrays)
        for name, values in arrays.items():
            axis = int(points and name not in table.meta["constant"])
            if (count := TOFU_ITEMS.get(name.partition("/")[0])) is not None:
                found[name] = np.take(values, np.arange(count) % values.shape[axis], axis=axis)
        return found

    initial, retain = sized(table.initial, False), sized(table.retain, False)
    return replace(table, arrays=sized(table.arrays, True), initial=initial, retain=retain)


def summary(runs: Sequence[dict[float, float]], shares: Sequence[float]) -> dict[str, Any]:
    """Quartiles of the scores needed for each share of the gain; null where a search in that place did not reach it."""
    figures: dict[str, Any] = {}
    for wanted in SHARES:
        scores = np.array([run[wanted] for run in runs])
        # The next larger one, so that infinity is not averaged with a number.
        quartiles = [float(np.quantile(scores, q, method="inverted_cdf")) for q in (0.25, 0.5, 0.75)]
        figures[f"scores_to_{wanted:.0%}"] = {
            **{
                name: value if np.isfinite(value) else None
                for name, value in zip(("q25", "median", "q75"), quartiles, strict=True)
            },
            "reached": int(np.isfinite(scores).sum()),
        }
    return {**figures, "share_at_end": round(float(np.median(shares)), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Samplers replayed on recorded tables; one JSON object.")
    parser.add_argument(
        "tables", nargs="*", type=Path, help="recorded grids (benchmarks/README.md); the shipped ones when left out"
    )
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--seeds", type=int, default=20, help="sampler seeds per table")
    parser.add_argument("--scores", type=int, default=150, help="longest search, given points aside")
    parser.add_argument("--suggest-at", type=int, default=500, help="time proposals with so many trials; 0 does not")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    files = options.tables or sorted(TABLES.glob("*.npz"))
    worlds = {path.stem: World(read_table(path)) for path in files}
    figures: dict[str, Any] = {
        "benchmark": "samplers",
        "seeds": options.seeds,
        "longest": options.scores,
        "baseline": BASELINE,
        "machine": machine(),
        "versions": {name: version(name) for name in ("optuna", "numpy", "scipy")},
        "worlds": {},
    }
    for title, world in worlds.items():
        one: dict[str, Any] = {
            "points": len(world.table),
            "given_hypervolume": round(world.volume(world.given_points), 6),
            "dense_gain": round(world.dense_gain, 6),
            "recomputed": recomputed(world),
            "left_out": left_out(world),
            "oracle": oracle(world),
            "samplers": {},
        }
        for name in options.samplers:
            started = time.process_time()
            done = [replay(world, name, seed, options.scores) for seed in range(options.seeds)]
            one["samplers"][name] = summary([run for run, _ in done], [share for _, share in done])
            one["samplers"][name]["cpu_seconds"] = round(time.process_time() - started, 1)
            if options.suggest_at:
                one["samplers"][name][f"suggest_at_{options.suggest_at}"] = suggest_seconds(world, name, options.suggest_at)
                if name == "line":
                    large = World(tofu_sized(world.table))
                    one["samplers"][name]["with_items_of_tofu"] = suggest_seconds(large, name, options.suggest_at)
        for wanted in [f"scores_to_{wanted:.0%}" for wanted in SHARES]:
            base = one["samplers"].get(BASELINE, {}).get(wanted, {}).get("median")
            for of in one["samplers"].values():
                own = of[wanted]["median"]
                of[wanted]["ratio_to_tpe"] = round(own / base, 3) if own and base else None
        figures["worlds"][title] = one
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
