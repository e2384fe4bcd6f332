"""Replay searches on recorded tables whose losses have a relative error, fixed for every point.

In bfloat16 the loss of an item is off its smooth curve by about a percent, and by the same amount whenever that point is scored
again. Here every loss of a point is multiplied by 1 + level * N(0, 1), drawn once per point; the table
itself is the truth. A search sees the errors only, and the front is that of the points as measured.

Figures, per seed: scores beyond the given points until 95% of the dense grid's gain, null where that was not reached within
--scores, and shares of the gain after --look-at scores. Three gains. ``scored``: all points scored count with their values
without errors, against the grid without errors: whether the search goes where the gain is. ``chosen``: so do only those on the
measured front: what a user gets, who must choose by measured values. ``measured``: values and the grid with errors, as a study
shows them; the best of 720 points are partly luck. ``grid`` has ``chosen`` of the front of the whole grid with errors: what
choosing by measured values costs any search. Prints one JSON object.

    python benchmarks/noise.py
    python benchmarks/noise.py benchmarks/tables/quickstart-seed0.npz --levels 0.01 --searches line --seeds 1
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from machine import machine
from numpy.typing import NDArray
from recorded.replay import NoisyWorld
from recorded.table import read_table
from samplers import TABLES, Search, curves_of
from scipy.interpolate import PchipInterpolator

from search.problem.pareto import non_dominated
from search.samplers.acquisition import growth

SHARE = 0.95
NINE = 9
CANDIDATES = 48
"""Values of alpha that `monotone` looks at on each line."""
Place = tuple[int, int, float]
Points = NDArray[np.float64]


def sampled(name: str, world: NoisyWorld, seed: int, scores: int) -> Iterator[tuple[Place, Points]]:
    """A sampler of the registry."""
    search = Search(world, name, seed, scores)
    for _ in range(scores):
        values, _ = search.step()
        yield search.place, values


def nine(world: NoisyWorld, seed: int, scores: int) -> Iterator[tuple[Place, Points]]:
    """The last epoch of every base run at nine alphas below 0, in an order of the seed's own."""
    ends = [(world.labels.index(label), count) for label, count in world.table.epochs.items()]
    places = [(base, epoch, float(alpha)) for base, epoch in ends for alpha in np.linspace(world.low, 0.0, NINE + 2)[1:-1]]
    for number in np.random.default_rng(seed).permutation(len(places))[:scores]:
        yield places[number], world.objectives(world.items(*places[number]))


def monotone(world: NoisyWorld, seed: int, scores: int) -> Iterator[tuple[Place, Points]]:
    """Shape-preserving cubics through every item's curve on each line, straight beyond the last point; then the candidate whose
    prediction adds most to the hypervolume."""
    curves, generator = curves_of(world), np.random.default_rng(seed)
    start, ceilings = curves.of(world.table.initial), world.ceilings
    known = {(base, epoch): {-1.0: start, 0.0: curves.of(items)} for base, epoch, items, _ in world.given}
    points = world.given_points
    for _ in range(scores):
        best: tuple[float, Place] | None = None
        front = np.minimum(points, ceilings)
        front = front[non_dominated(front)]
        for (base, epoch), line in known.items():
            step = (world.high - world.low) / CANDIDATES
            alphas = world.low + (np.arange(CANDIDATES) + generator.random()) * step
            apart = np.abs(alphas[:, None] - np.array(sorted(line))[None]).min(axis=1)
            alphas = alphas[apart > 0.5 * step]
            predicted = curves.objectives({name: along(line, name, alphas) for name in start})
            gain = growth(np.minimum(predicted, ceilings), front, world.reference)
            # Where no gain is predicted, the widest gap tells most.
            gain = gain + 1e-12 * apart[apart > 0.5 * step]
            chosen = int(np.argmax(gain))
            if best is None or gain[chosen] > best[0]:
                best = float(gain[chosen]), (base, epoch, float(alphas[chosen]))
        assert best is not None
        place = best[1]
        items = world.items(*place)
        known[place[:2]][place[2]] = curves.of(items)
        values = world.objectives(items)
        points = np.concatenate([points, values[None]])
        yield place, values


def along(line: dict[float, Any], name: str, alphas: Points) -> Points:
    """(C, n) a curve at values of alpha, from what is known of its line."""
    there = np.array(sorted(line))
    values = np.stack([line[alpha][name] for alpha in there])
    inside = PchipInterpolator(there, values, axis=0)(np.clip(alphas, there[0], there[-1]))
    slope = (values[-1] - values[-2]) / (there[-1] - there[-2])
    return np.asarray(inside + np.maximum(alphas - there[-1], 0.0)[:, None] * slope)


def searched(world: NoisyWorld, gain: float, name: str, seed: int, scores: int, look_at: int) -> dict[str, float | None]:
    """Scores to 95% of both gains, and true shares."""
    own = {"nine": nine, "monotone": monotone}
    places = own[name](world, seed, scores) if name in own else sampled(name, world, seed, scores)
    truth = world.truth
    measured, true = world.given_points, truth.given_points
    given, given_true = world.volume(measured), truth.volume(true)
    found: dict[str, float | None] = dict.fromkeys(("scored", "chosen", "measured"))
    shares: dict[str, float] = {}
    for count, (place, values) in enumerate(places, 1):
        measured = np.concatenate([measured, values[None]])
        true = np.concatenate([true, truth.objectives(truth.items(*place))[None]])
        front = non_dominated(np.minimum(measured, world.ceilings))
        shares = {
            "scored": (truth.volume(true) - given_true) / truth.dense_gain,
            "chosen": (truth.volume(true[front]) - given_true) / truth.dense_gain,
            "measured": (world.volume(measured) - given) / gain,
        }
        for kind, share in shares.items():
            if share >= SHARE and found[kind] is None:
                found[kind] = count
        if count == look_at:
            found |= {f"{kind}_at_{look_at}": round(share, 3) for kind, share in shares.items()}
        if count >= look_at and None not in (found["scored"], found["chosen"], found["measured"]):
            break
    return found


def with_errors(world: NoisyWorld) -> tuple[float, float]:
    """Hypervolume of the dense grid with errors over that of the given points with errors; and what the front of all of that is
    worth without errors, as a share of the gain: no search that sees errors and takes its front by them can expect more."""
    table, truth = world.table, world.truth
    places = [
        (int(base), int(epoch), float(alpha)) for base, epoch, alpha in zip(table.base, table.epoch, table.alpha, strict=True)
    ]
    measured = np.concatenate([world.given_points, [world.objectives(world.items(*place)) for place in places]])
    true = np.concatenate([truth.given_points, table.objectives])[non_dominated(np.minimum(measured, world.ceilings))]
    given = truth.volume(truth.given_points)
    return world.volume(measured) - world.volume(world.given_points), (truth.volume(true) - given) / truth.dense_gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, help="recorded grids; the shipped ones when left out")
    parser.add_argument("--levels", nargs="+", type=float, default=[0.0, 0.003, 0.01, 0.05])
    parser.add_argument("--searches", nargs="+", default=["line", "tpe", "monotone", "nine"])
    parser.add_argument("--seeds", type=int, default=4, help="seeds of sampler and errors, per table")
    parser.add_argument("--scores", type=int, default=150, help="longest search, given points aside")
    parser.add_argument("--look-at", type=int, default=25)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    found: dict[str, Any] = {}
    for path in options.tables or sorted(TABLES.glob("*.npz")):
        table = read_table(path)
        found[path.stem] = {}
        for level in options.levels:
            worlds = [NoisyWorld(table, level, seed) for seed in range(options.seeds)]
            grids = [with_errors(world) for world in worlds]
            one = found[path.stem][f"{level:.1%}"] = {"grid": {"chosen": [round(chosen, 3) for _, chosen in grids]}}
            for name in options.searches:
                runs = [
                    searched(world, gain, name, seed, options.scores, options.look_at)
                    for seed, (world, (gain, _)) in enumerate(zip(worlds, grids, strict=True))
                ]
                one[name] = {key: [run.get(key) for run in runs] for key in runs[0]}
    print(json.dumps({"benchmark": "noise", "longest": options.scores, "worlds": found, "machine": machine()}))


if __name__ == "__main__":
    main()
