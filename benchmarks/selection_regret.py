"""How much a rule that picks one model loses against the best there is: on 150 published unlearned models, without a GPU.

The table has 20 metrics of every model, and `overall`, the harmonic mean of memorisation, privacy (membership inference and
depth, both against a retain model) and utility. Regret of a rule in a method: best `overall` of the method minus that of its
pick. A rule that refuses leaves the initial model. Per rule `mean_regret` and `max_regret` are over methods, and
`mean_regret_of_usable` is over those that have a model worth picking (`overall` of at least 0.2). `global_pick` is `overall`
of its pick among all models. `needs_retain` and `needs_holdout` say whether it reads a number that cannot be had without.

Rules with constants are fitted to the other methods only: for each method, the constant of the lowest mean regret over the
others chooses (of equal ones the middle). Their `global_pick` is the lowest over these constants. `held_out` holds the search
for a rule itself against that: for each method the rule chooses that has the lowest mean regret over the others.
Names read "rule (forgetting, utility)". The project's own rules see the front alone, as `uipe select` does. `fluent` sets
the utility of models to 0 whose fluency is below half of the initial model's, in place of the check for collapse.

    python benchmarks/selection_regret.py                             # UIPE_SHARED_DATA, or ../shared/data by the checkout
    python benchmarks/selection_regret.py unlearned_models_150.json
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from numpy.typing import NDArray

from search.problem.objectives import TRUTH_RATIO
from search.problem.pareto import DEFAULT_FLOOR, balance_at_chance, knee, non_dominated_from, utility_floor
from search.results.selection import KNEE_POINTS
from uipe_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("UIPE_SHARED_DATA", ROOT.parent / "shared" / "data"))
SOURCE = "repository gnueaj/unlearning-depth-score (arXiv 2605.24614, Apache License 2.0)"

HOLDOUT = {"overall", "privacy", "privacy_mia", "s_loss", "s_zlib", "s_mink", "s_minkpp"}
RETAIN = {*HOLDOUT, "uds"}
FORGETTING = {
    "memorisation": "mem",
    "1-ES": "one_minus_es",
    "1-EM": "one_minus_em",
    "1-paraphrase": "one_minus_paraprob",
    "1-truth": "one_minus_truth",
}
UTILITY = {"utility": "utility", "model utility": "model_utility", "fluent model utility": "fluent_model_utility"}
PARTS = ("one_minus_es", "one_minus_em", "one_minus_paraprob", "one_minus_truth")
FLOORS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)
TARGETS = tuple(round(0.35 + 0.025 * step, 3) for step in range(27))
CHANCE = float(TRUTH_RATIO.chance or 0.0)
USABLE = 0.2

FloatArray = NDArray[np.float64]
Pick = Callable[["Models"], Sequence[int]]


@dataclass(frozen=True)
class Models:
    """Some of the models, and what they are compared with.

    Attributes:
        columns: Numbers of every model, by metric.
        initial: The same of the model before unlearning.
        retain: The same of the model that never saw the data.
    """

    columns: Mapping[str, FloatArray]
    initial: Mapping[str, float]
    retain: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.columns["overall"])

    def part(self, rows: NDArray[Any]) -> "Models":
        """Those of some rows."""
        return Models({name: values[rows] for name, values in self.columns.items()}, self.initial, self.retain)

    def share(self, name: str) -> FloatArray:
        """A number as a share of the initial model's, at most 1."""
        return np.minimum(self.columns[name] / self.initial[name], 1.0)

    def front(self, *names: str) -> NDArray[np.intp]:
        """Rows of the front of these numbers, from the initial model."""
        points = np.column_stack([self.columns[name] for name in names])
        return np.flatnonzero(non_dominated_from(points, [self.initial[name] for name in names]))


@dataclass(frozen=True)
class Rule:
    """A way to pick a model.

    Attributes:
        pick: Rows that it picks with equal odds; none where it refuses.
        reads: Metrics it looks at.
        retain: It looks at the retain model's own numbers.
    """

    pick: Pick
    reads: tuple[str, ...] = ()
    retain: bool = False

    def outcome(self, models: Models) -> float:
        """Score `overall` of the pick."""
        try:
            rows = list(self.pick(models))
        except UserError:
            rows = []
        return float(models.columns["overall"][rows].mean()) if rows else models.initial["overall"]


@dataclass(frozen=True)
class Fitted:
    """Rules that differ in a constant."""

    by_constant: Mapping[float, Rule]


def read_models(path: Path) -> tuple[dict[str, Models], Models]:
    """Read the published table: models by method, and all of them.

    Raises:
        SystemExit: There is no such table; says where it is to be had.
    """
    if not path.is_file():
        raise SystemExit(
            f"{path}: no table of published models; get unlearned_models_150.json from {SOURCE} and give its path, or a folder "
            "with published/unlearned_models_150.json in UIPE_SHARED_DATA"
        )
    rows = json.loads(path.read_text())["models"]
    numbers = sorted(key for key, value in rows[0].items() if isinstance(value, float))

    def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
        fluent = row["fluency"] >= 0.5 * rows[0]["fluency"]
        return {name: row[name] for name in numbers} | {"fluent_model_utility": row["model_utility"] * fluent}

    references = {row["method"]: numbers_of(row) for row in rows if row["is_reference"]}
    unlearned = [row for row in rows if not row["is_reference"]]
    values = [numbers_of(row) for row in unlearned]
    every = Models(
        {name: np.array([each[name] for each in values]) for name in values[0]}, references["full"], references["retain"]
    )
    methods = np.array([row["method"] for row in unlearned])
    return {str(name): every.part(np.flatnonzero(methods == name)) for name in np.unique(methods)}, every


def highest(score: Callable[[Models], FloatArray]) -> Pick:
    """Pick the highest score; the first of equal ones."""
    return lambda models: [int(np.argmax(score(models)))]


def harmonic(*numbers: FloatArray) -> FloatArray:
    """Harmonic mean; 0 where a number is 0 or less."""
    parts = np.maximum(np.array(numbers), 1e-12)
    return len(parts) / (1 / parts).sum(axis=0)


def at_floor(strength: str, kept: str, floor: float, models: Models) -> Sequence[int]:
    """Pick as ``uipe select --rule utility-floor``."""
    rows = models.front(strength, kept)
    chosen = utility_floor(models.columns[strength][rows], models.columns[kept][rows], floor * models.initial[kept])
    # A pick that forgets no more than the initial model is refused by `uipe select`.
    return [int(rows[chosen])] if models.columns[strength][rows[chosen]] > models.initial[strength] else []


def at_knee(strength: str, kept: str, models: Models) -> Sequence[int]:
    """Pick as ``uipe select --rule knee``."""
    rows = models.front(strength, kept)
    points = np.column_stack([models.columns[strength], models.columns[kept]])[rows]
    if len(rows) >= KNEE_POINTS:
        return [int(rows[knee(points)])]
    try:
        return at_floor(strength, kept, DEFAULT_FLOOR, models)
    except UserError:
        more = rows[points[:, 0] > models.initial[strength]]
        return [int(more[np.argmax(models.columns[kept][more])])] if len(more) else []


def at_chance(front_of: str | None, strength: str, kept: str, models: Models) -> Sequence[int]:
    """Pick as ``uipe select --rule chance``, from the front of a number and utility, or from all models."""
    rows = np.arange(len(models)) if front_of is None else models.front(front_of, kept)
    start = models.initial[strength], models.initial[kept]
    return [int(rows[balance_at_chance(models.columns[strength][rows], models.columns[kept][rows], start, CHANCE)])]


def way(models: Models, name: str, target: float = 1.0) -> FloatArray:
    """Share of the way from the initial model to a target; what is overshot counts as not gone."""
    start = models.initial[name]
    # A target the initial model has reached already leaves no way to go.
    scale = max(target - start, 1e-9)
    return np.maximum(0.0, 1 - np.abs(target - models.columns[name]) / scale)


def rules() -> dict[str, Rule | Fitted]:
    """All rules by name; those with constants in one family each."""
    found: dict[str, Rule | Fitted] = {
        "random": Rule(lambda models: range(len(models))),
        "first": Rule(lambda models: [0]),
        "last": Rule(lambda models: [len(models) - 1]),
        "OpenUnlearning: harmonic mean (memorisation, utility)": Rule(
            highest(lambda models: harmonic(models.columns["mem"], models.columns["utility"])), ("mem", "utility")
        ),
    }
    for title, kept in UTILITY.items():
        found[f"highest ({title})"] = Rule(highest(lambda models, kept=kept: models.columns[kept]), (kept,))
    for forgotten, strength in FORGETTING.items():
        found[f"strongest ({forgotten})"] = Rule(highest(lambda models, name=strength: models.columns[name]), (strength,))
        for title, kept in UTILITY.items():
            for name, rule in of_pair(strength, kept):
                found[f"{name} ({forgotten}, {title})"] = rule
    truth = FORGETTING["1-truth"]
    for title, kept in UTILITY.items():
        found[f"chance (1-truth, {title})"] = Rule(partial(at_chance, truth, truth, kept), (truth, kept))
        found[f"chance, of all models (1-truth, {title})"] = Rule(partial(at_chance, None, truth, kept), (truth, kept))
        found[f"chance, front of memorisation (1-truth, {title})"] = Rule(
            partial(at_chance, "mem", truth, kept), ("mem", truth, kept)
        )
        found[f"chance, harmonic mean (1-truth, {title})"] = Rule(
            highest(lambda models, kept=kept: harmonic(way(models, truth, CHANCE), models.share(kept))), (truth, kept)
        )
        found[f"chance, minimum (1-truth, {title})"] = Rule(
            highest(lambda models, kept=kept: np.minimum(way(models, truth, CHANCE), models.share(kept))), (truth, kept)
        )
    for name, reads in {
        "with depth": ("mem", "uds", "utility"),
        "with membership": ("mem", "privacy_mia", "utility"),
        "depth and utility": ("uds", "utility"),
        "membership and utility": ("privacy_mia", "utility"),
    }.items():
        found[f"harmonic mean, {name}"] = Rule(
            highest(lambda models, reads=reads: harmonic(*(models.columns[each] for each in reads))), reads
        )
    found["chance, at the retain model's truth ratio (1-truth, utility)"] = Rule(
        highest(lambda models: way(models, truth, models.retain[truth]) * models.share("utility")),
        (truth, "utility"),
        retain=True,
    )
    found["nearest to the retain model in four forget numbers"] = Rule(
        highest(lambda models: -sum((models.columns[each] - models.retain[each]) ** 2 for each in PARTS)), PARTS, retain=True
    )
    found["nearest to the retain model in four forget numbers, and utility"] = Rule(
        highest(lambda models: harmonic(*(way(models, each, models.retain[each]) for each in PARTS), models.share("utility"))),
        (*PARTS, "utility"),
        retain=True,
    )
    return found


def of_pair(strength: str, kept: str) -> Iterator[tuple[str, Rule | Fitted]]:
    """Rules that look at a number of forgetting and one of utility."""

    def scored(score: Callable[[Models], FloatArray]) -> Rule:
        return Rule(highest(score), (strength, kept))

    def floored(floor: float) -> Rule:
        return Rule(partial(at_floor, strength, kept, floor), (strength, kept))

    def middle(target: float) -> Rule:
        return scored(lambda models: way(models, strength, target) * models.share(kept))

    for floor in FLOORS:
        yield f"utility-floor {floor:g}", floored(floor)
    yield "utility-floor, fitted", Fitted({floor: floored(floor) for floor in FLOORS})
    yield "knee", Rule(partial(at_knee, strength, kept), (strength, kept))
    yield "harmonic mean", scored(lambda models: harmonic(models.columns[strength], models.columns[kept]))
    yield "harmonic mean of squares", scored(lambda m: harmonic(m.columns[strength] ** 2, m.columns[kept] ** 2))
    yield "harmonic mean from initial", scored(lambda models: harmonic(way(models, strength), models.share(kept)))
    yield "minimum", scored(lambda models: np.minimum(models.columns[strength], models.columns[kept]))
    yield "nearest to (1, 1)", scored(lambda m: -np.hypot(1 - m.columns[strength], 1 - m.share(kept)))
    yield "middle, fitted", Fitted({target: middle(target) for target in TARGETS})


def regrets(rule: Rule, methods: Mapping[str, Models]) -> dict[str, float]:
    """Regret of a rule by method."""
    return {name: float(models.columns["overall"].max()) - rule.outcome(models) for name, models in methods.items()}


def least(candidates: Mapping[Any, Mapping[str, float]], left_out: str) -> Any:
    """The candidate of the lowest mean regret over all methods but one; of equal ones the middle."""
    means = {
        key: round(float(np.mean([value for name, value in each.items() if name != left_out])), 9)
        for key, each in candidates.items()
    }
    best = [key for key, mean in means.items() if mean == min(means.values())]
    return best[(len(best) - 1) // 2]


def held_out_regrets(fitted: Fitted, methods: Mapping[str, Models]) -> tuple[dict[str, float], list[float]]:
    """Regret by method with the constant of the others, and these constants."""
    known = {constant: regrets(rule, methods) for constant, rule in fitted.by_constant.items()}
    chosen = {name: least(known, name) for name in methods}
    return {name: known[constant][name] for name, constant in chosen.items()}, sorted(set(chosen.values()))


def figures(by_method: Mapping[str, float], methods: Mapping[str, Models]) -> dict[str, Any]:
    """Mean and largest regret."""
    usable = [name for name, models in methods.items() if models.columns["overall"].max() >= USABLE]
    return {
        "mean_regret": round(float(np.mean(list(by_method.values()))), 4),
        "max_regret": round(max(by_method.values()), 4),
        "mean_regret_of_usable": round(float(np.mean([by_method[name] for name in usable])), 4) if usable else None,
    }


def summary(methods: Mapping[str, Models], every: Models) -> dict[str, Any]:
    """Figures of all rules, the lowest mean regret first, and those of the search for one."""
    found, free = {}, {}
    for name, rule in rules().items():
        if isinstance(rule, Fitted):
            by_method, constants = held_out_regrets(rule, methods)
            outcomes = [rule.by_constant[constant].outcome(every) for constant in constants]
            one, further = next(iter(rule.by_constant.values())), {"constants": constants}
        else:
            by_method, outcomes, one, further = regrets(rule, methods), [rule.outcome(every)], rule, {}
        needs_retain = one.retain or bool(RETAIN & set(one.reads))
        if not needs_retain:
            free[name] = by_method
        found[name] = figures(by_method, methods) | {
            "global_pick": round(min(outcomes), 4),
            "needs_retain": needs_retain,
            "needs_holdout": bool(HOLDOUT & set(one.reads)),
        } | further  # fmt: skip
    ordered = dict(sorted(found.items(), key=lambda each: each[1]["mean_regret"]))
    chosen = {name: least(free, name) for name in methods}
    held_out = figures({name: free[rule][name] for name, rule in chosen.items()}, methods) | {"chosen": chosen}
    return {"rules": ordered, "rules_tried": len(found), "held_out": held_out}


def main() -> None:
    """Read the table and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=SHARED / "published" / "unlearned_models_150.json")
    methods, every = read_models(parser.parse_args().table)
    note = (
        "Overall is made of numbers that need a retain model, whichever rule picks. Constants are fitted to the other methods; "
        "the rules themselves were thought of with this table in view."
    )
    counts = {name: len(models) for name, models in methods.items()}
    best = round(float(every.columns["overall"].max()), 4)
    print(json.dumps({"benchmark": "selection regret", "source": SOURCE, "models": counts, "best": best,
                      **summary(methods, every), "note": note, "machine": machine()}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
