"""Compare walks of more than one dimension with theta_init + (1 + alpha) * delta. Prints one JSON object.

Each walk has the plain one within it, and begins with what a study is given: the initial model and every epoch at alpha = 0.

line     (method, epoch, alpha): the plain walk, the baseline
pair     two update vectors: theta_init + (1 + alpha) ((1 - share) delta_1 + share delta_2)
layers   an alpha for each of three groups of weights: embeddings and first layers, middle, last layers and head
project  the update vector without its component along the gradient of the retain loss at theta_init, or with it
repair   0 to 8 optimisation steps after the walk, on retain items that the held-out half does not ask for; the repaired initial
         model is among what is given, since repair also teaches

Measured: hypervolume on the held-out half of the items of the front that the other half chose, as a share of the given
hypervolume, after equal numbers of scorings, and the difference from the plain walk in the same world, with its standard error
over worlds. ``matched`` is the same with the logits of every point divided by their scale relative to the initial model's.
``seconds`` is what a point takes: building, repairing and scoring it. Searches are of TPE for every walk.

    python benchmarks/walks.py --work runs/walks                      # the quickstart's worlds; 40 minutes on 2 cores
    python benchmarks/walks.py --work runs/smollm2 --study studies/smollm2_countries.yaml --seeds 1 --scores 10

Every search is kept in the work folder; the same command goes on where one ended.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from machine import machine
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial
from torch import Tensor

from search.evaluation.evaluator import load_for_scoring
from search.evaluation.prepared import prepare
from search.evaluation.task import Comparison, task_of
from search.paper.statistics import estimate
from search.problem.hypervolume import quality_floor
from search.problem.pareto import hypervolume, non_dominated
from search.problem.trial import INITIAL, RETAIN
from search.samplers.registry import SAMPLERS
from search.spec.study import load_study
from search.spec.study_file import quickstart_path
from uipe_core.audits.relearning import RelearningConfig, relearn
from uipe_core.corpora.split import split_corpus, take_items
from uipe_core.deltas.store import DeltaStore
from uipe_core.deltas.update_vectors import UpdateVector
from uipe_core.storage.files import write_atomic
from uipe_core.unlearning.gradients import dot, mean_gradient
from uipe_core.unlearning.training import train_base_run

PLAIN = "line"
REPAIR_STEPS = (0, 1, 2, 4, 8)
GRADIENT_ITEMS = 64
GROUPS = 3

Tensors = Mapping[str, Tensor]
FloatArray = np.ndarray


class World:
    """One world: its base runs, and any model near them scored on both halves of the items.

    Args:
        study: Study file.
        seed: Of corpus, models and trainings.
    """

    def __init__(self, study: Path, seed: int) -> None:
        self.spec = load_study(study, {"seed": seed})
        assert self.spec.unlearning is not None
        self.settings = self.spec.unlearning
        prepared = prepare(self.spec)
        store = DeltaStore(prepared.delta_root)
        self.corpus = prepared.corpus
        self.runs = {}
        for run in self.spec.variants():
            config = prepared.unlearning(run)

            def train(config=config):
                yield from train_base_run(prepared.models.ready_source(INITIAL).load(dtype="auto"), self.corpus, config)

            self.runs[run.label] = store.get_or_train(prepared.base_run_inputs(config), train())
        self.loaded, self._walker = load_for_scoring(prepared.models.ready_source(INITIAL))
        self.objectives = self.spec.maximised[:2]
        needed = {name for objective in self.objectives for name in objective.scored_sets}
        split = split_corpus(self.corpus, 0.5, seed)
        self.corpus = replace(self.corpus, sets={name: items for name, items in self.corpus.sets.items() if name in needed})
        self._task = task_of(self.corpus)
        self._scorer = self._task.scorer(self.corpus, self.loaded.prompts, prepared.scoring)
        halves = {half: {name: kept for name, kept in rows.items() if name in needed} for half, rows in vars(split).items()}
        self._halves = {half: (rows, take_items(self.corpus, rows).set_hashes) for half, rows in halves.items()}
        asked = {item.question for item in take_items(self.corpus, halves["report"]).sets.get("retain", ())}
        kept = tuple(item for item in self.corpus.retain_train if item.question not in asked)
        self._repairing = replace(self.corpus, retain_train=kept)
        self._updates: dict[tuple[str, int], UpdateVector] = {}
        self.initial = self._score(self.loaded)
        retain = [each for each in prepared.models.references() if each.kind == RETAIN and each.log is None]
        self._retain = self._score(load_for_scoring(prepared.models.ready_source(RETAIN))[0]) if retain else None
        self.corner = np.array([self._worst(objective) for objective in self.objectives])
        self._gradient: Tensors | None = None

    @property
    def places(self) -> list[tuple[str, int]]:
        """Every base epoch that a study walks from."""
        return list(product(self.runs, range(1, self.settings.epochs + 1)))

    def tensors(self, base: str, epoch: int) -> Tensors:
        """An update vector's tensors by weight."""
        if (base, epoch) not in self._updates:
            self._updates[base, epoch] = self.runs[base].load(epoch)
        return self._updates[base, epoch].tensors

    def retain_gradient(self) -> Tensors:
        """Gradient of the retain loss at theta_init, by weight."""
        if self._gradient is None:
            names = sorted(self.tensors(*self.places[0]))
            loaded = load_for_scoring(prepare(self.spec).models.ready_source(INITIAL))[0]
            flat = mean_gradient(loaded, self.corpus.retain_train[:GRADIENT_ITEMS], names)
            shapes = [self.tensors(*self.places[0])[name].shape for name in names]
            parts = flat.split([shape.numel() for shape in shapes])
            self._gradient = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return self._gradient

    def point(self, update: Tensors, steps: int = 0, matched: bool = False) -> dict[str, Any]:
        """Objectives of theta_init + update on both halves; `matched` adds those with the logits divided by their scale."""
        started = time.perf_counter()
        loaded = replace(self.loaded, model=self._walker.apply(UpdateVector("dense", dict(update)), 0.0))
        if steps:
            size = self.settings.batch_size
            config = RelearningConfig(
                "benign", steps * size, epochs=1, learning_rate=self._rate, batch_size=size, adapter=None, seed=self.spec.seed
            )
            found = relearn(loaded, self._repairing, config)
            if found.loaded is None:
                corner = list(map(float, self.corner))
                return {"select": corner, "report": corner, "matched": corner, "scale": 1.0, "seconds": 0.0}
            loaded = found.loaded
        report = self._score(loaded)
        scale = (report.logit_scale or 1.0) / (self.initial.logit_scale or 1.0)
        values = {name: list(map(float, self.values(report, name))) for name in self._halves}
        found = {**values, "scale": float(scale), "seconds": time.perf_counter() - started}
        if matched:
            found["matched"] = list(map(float, self.values(self._score(loaded, scale), "report")))
        return found

    def values(self, report: Any, half: str) -> FloatArray:
        """(2,) objectives of one half of the items; forget quality counts up to the noise ceiling."""
        part, against = (None if each is None else each.take(*self._halves[half]) for each in (report, self._retain))
        numbers = self._task.numbers(self._task.evaluate(part, against, self.spec.definition))
        ceilings = [objective.ceiling(self.spec.hypervolume.forget_quality_cap) for objective in self.objectives]
        return np.minimum([numbers[objective.name] for objective in self.objectives], ceilings)

    @property
    def _rate(self) -> float:
        rate = self.settings.learning_rate
        return float(rate[0] if isinstance(rate, list | tuple) else rate)

    def _score(self, loaded: Any, temperature: float = 1.0) -> Any:
        return self._task.score(self._scorer, loaded, Comparison({}, self.spec.definition, self.spec.maximised), temperature)[0]

    def _worst(self, objective: Any) -> float:
        if objective.quality_of is None:
            return float(objective.worst)
        return quality_floor({name: len(rows) for name, rows in self._halves["select"][0].items()}, objective.quality_of)


def combined(*parts: tuple[float, Tensors]) -> Tensors:
    """Weighted sum of updates."""
    return {name: sum(weight * tensors[name] for weight, tensors in parts) for name in parts[0][1]}


def group_of(name: str, layers: int) -> int:
    """Group of a weight: thirds of the sequence of embeddings, layers, and what follows them."""
    parts = name.split(".")
    place = 0 if "embed" in name else 1 + int(parts[parts.index("layers") + 1]) if "layers" in parts else 1 + layers
    return int(GROUPS * (place + 0.5) / (layers + 2))


class Walk:
    """A search space, the update of a point of it, and the point that an epoch as trained is."""

    def __init__(self, world: World, kind: str) -> None:
        self._world, self.kind = world, kind
        alpha = FloatDistribution(world.spec.search.alpha.low, world.spec.search.alpha.high)
        place = CategoricalDistribution([f"{base}/{epoch}" for base, epoch in world.places])
        more: dict[str, dict[str, BaseDistribution]] = {
            "line": {},
            "pair": {"other": place, "share": FloatDistribution(0.0, 1.0)},
            "layers": {f"alpha_{number}": alpha for number in range(1, GROUPS)},
            "project": {"projected": CategoricalDistribution([False, True])},
            "repair": {"steps": CategoricalDistribution(REPAIR_STEPS)},
        }
        self.space = {"place": place, "alpha": alpha, **more[kind]}

    def given(self, place: str) -> dict[str, Any]:
        """The point of an epoch as trained."""
        rest = {"other": place, "share": 0.0, "projected": False, "steps": 0, **{f"alpha_{n}": 0.0 for n in range(1, GROUPS)}}
        return {"place": place, "alpha": 0.0, **{name: rest[name] for name in self.space if name in rest}}

    def update(self, params: Mapping[str, Any]) -> Tensors:
        """theta - theta_init at a point, before any repair."""
        delta, length = self._delta(params["place"]), 1.0 + params["alpha"]
        if self.kind == "pair":
            share = params["share"]
            return combined((length * (1 - share), delta), (length * share, self._delta(params["other"])))
        if self.kind == "layers":
            lengths = [length, *(1.0 + params[f"alpha_{number}"] for number in range(1, GROUPS))]
            layers = self._world.loaded.model.config.num_hidden_layers
            return {name: lengths[group_of(name, layers)] * tensor for name, tensor in delta.items()}
        if self.kind == "project" and params["projected"]:
            gradient = self._world.retain_gradient()
            along, square = (sum(dot(one[n].flatten(), gradient[n].flatten()) for n in gradient) for one in (delta, gradient))
            return combined((length, delta), (-length * along / square, gradient))
        return combined((length, delta))

    def _delta(self, place: str) -> Tensors:
        base, _, epoch = place.rpartition("/")
        return self._world.tensors(base, int(epoch))


def search(study: Path, seed: int, kinds: list[str], scores: int, repeats: int, work: Path) -> list[Path]:
    """Run the searches of one world, and keep each in a file."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    files = [work / f"seed-{seed}-{kind}-{number}.json" for kind in kinds for number in range(repeats)]
    if all(file.is_file() for file in files):
        return files
    world = World(study, seed)
    start = {half: world.values(world.initial, half) for half in ("select", "report")}
    given_file = work / f"seed-{seed}-given.json"
    if not given_file.is_file():
        found = [world.point(combined((1.0, world.tensors(*place))), matched=True) for place in world.places]
        write_atomic(given_file, json.dumps(found).encode())
    given = json.loads(given_file.read_text())
    for kind, number in product(kinds, range(repeats)):
        file = work / f"seed-{seed}-{kind}-{number}.json"
        if file.is_file():
            continue
        walk = Walk(world, kind)
        sampler = SAMPLERS["tpe"].make(1000 * seed + number)
        asked = optuna.create_study(directions=["maximize"] * 2, sampler=sampler)
        for (base, epoch), point in zip(world.places, given, strict=True):
            params = walk.given(f"{base}/{epoch}")
            asked.add_trial(create_trial(values=point["select"], params=params, distributions=walk.space))
        known = given
        if kind == "repair":
            nothing = combined((0.0, world.tensors(*world.places[0])))
            known = [*given, *(world.point(nothing, steps, matched=True) for steps in REPAIR_STEPS[1:])]
        points = []
        for _ in range(scores):
            trial = asked.ask(fixed_distributions=walk.space)
            point = world.point(walk.update(trial.params), trial.params.get("steps", 0))
            asked.tell(trial, point["select"])
            points.append({**trial.params, **point})
        every = [*known, *points]
        front = non_dominated(np.array([point["select"] for point in every]))
        for place in np.flatnonzero(front[len(known) :]):
            params = points[place]
            points[place]["matched"] = world.point(walk.update(params), params.get("steps", 0), matched=True)["matched"]
        record = {"kind": kind, "seed": seed, "points": points, "given": known, "corner": list(world.corner)}
        write_atomic(file, json.dumps({**record, "initial": {half: list(values) for half, values in start.items()}}).encode())
    return files


def gain(record: Mapping[str, Any], scores: int, column: str = "report") -> float:
    """Hypervolume on held-out items of the front that the other half chose, as a share more than that of what is given."""
    corner = np.array(record["corner"])

    def volume(points: list[Mapping[str, Any]]) -> float:
        start = record["initial"]
        select = np.array([start["select"], *(point["select"] for point in points)])
        chosen = non_dominated(select)[1:]
        kept = [point.get(column, point["report"]) for point, keep in zip(points, chosen, strict=True) if keep]
        return float(hypervolume(np.array([start["report"], *kept]), corner))

    given = volume(record["given"])
    return volume([*record["given"], *record["points"][:scores]]) / given - 1.0


def summary(records: list[Mapping[str, Any]], budgets: list[int]) -> dict[str, Any]:
    """Gains and differences from the plain walk, paired by world, by kind and number of scorings."""
    by: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for record in records:
        by.setdefault(record["kind"], {}).setdefault(record["seed"], []).append(record)

    def of_worlds(kind: str, measure: Callable[[Mapping[str, Any]], float]) -> dict[int, float]:
        return {seed: statistics.fmean(map(measure, found)) for seed, found in by[kind].items()}

    table: dict[str, Any] = {}
    for kind in by:
        rows: dict[str, Any] = {}
        for column, budget in [*(("report", budget) for budget in budgets), ("matched", budgets[-1])]:
            own, plain = (of_worlds(each, lambda r, b=budget, c=column: gain(r, b, c)) for each in (kind, PLAIN))
            name = f"{budget} scorings" if column == "report" else "matched"
            rows[name] = {"gain": estimate(list(own.values())).as_dict()}
            if kind != PLAIN:
                rows[name]["over_line"] = estimate([own[seed] - plain[seed] for seed in own]).as_dict()
        seconds = [point["seconds"] for found in by[kind].values() for record in found for point in record["points"]]
        table[kind] = {**rows, "seconds": round(statistics.median(seconds), 3)}
    return table


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every search")
    parser.add_argument("--study", type=Path, default=quickstart_path(), help="study file; the quickstart when left out")
    parser.add_argument("--seeds", type=int, default=5, help="worlds, seeds 0, 1, ...")
    parser.add_argument("--scores", type=int, default=60, help="scorings of a search, given points not counted")
    parser.add_argument("--repeats", type=int, default=2, help="searches of each walk in a world")
    parser.add_argument("--walks", nargs="+", default=["line", "pair", "layers", "project", "repair"])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    arguments = (options.walks, options.scores, options.repeats, options.work)
    with ProcessPoolExecutor(options.processes) as pool:
        for done in as_completed([pool.submit(search, options.study, seed, *arguments) for seed in range(options.seeds)]):
            files += done.result()
    records = [json.loads(file.read_text()) for file in files]
    budgets = [max(1, options.scores * part // 3) for part in (1, 2, 3)]
    print(json.dumps({"machine": machine(), "study": options.study.stem, "walks": summary(records, budgets)}, indent=1))


if __name__ == "__main__":
    main()
