"""Answer what survives attacks, from the parts of `search.paper.attacks`: effects over seeds, and the points that rules choose.

The share undone by an attack is (before - after) / (before - initial) of forgetting: 1 when all of it is back. A walk is
compared with training by the same method where training is alike: the trained epochs in order are a curve, straight between
epochs, and the nearest place of it counts where it is within one `STEP`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from search.paper.attacks import ATTACKS, FOUR_BITS, LEAST, PUSHED, RANDOM, WALK, AttackSettings
from search.paper.statistics import (
    CONFIDENCE,
    FAILS,
    HOLDS,
    OPEN,
    at,
    coefficient,
    estimate,
    finite_mean,
    first_reached,
    judge,
    nearest,
)
from search.problem.objectives import MEMORIZATION, TRUTH_RATIO, Objective
from search.problem.pareto import DEFAULT_FLOOR, RULES, non_dominated_from
from search.results.selection import chosen_row
from uipe_core.errors import UserError

BITS, WORST, AFTER_WORST = "four_bits", "worst", "after_worst"
"""Columns: the larger share that NF4 or int4 undid, the largest that any attack undid, forgetting after that one."""

STEP = {"forgetting": 0.05, "utility": 0.02}
"""What counts as alike in the memorisation score and in utility."""

STRONGEST = "strongest"
"""The end of the front with the most forgetting, which no rule of `uipe select` takes."""

ONE_SEED, NOT_TESTED = "one seed", "not tested"

GROUPS: dict[str, Callable[[pd.Series], pd.Series]] = {
    "alpha below 0": lambda alpha: alpha < 0,
    "alpha = 0": lambda alpha: alpha == 0,
    "alpha above 0": lambda alpha: alpha > 0,
}


class Attacked:
    """The points of one seed.

    Attributes:
        seed: The seed.
        initial: Numbers of the initial model.
        retain: Those of the retain model, with forgetting ``after`` each attack; None without one.
        points: A row per scored point: ``base``, what `run_attacks` says of it, the share undone by name of the attack and in
            `BITS` and `WORST` (NaN where it was not attacked), and `AFTER_WORST`.
        front: Mask of the front of walks in forgetting and utility, collapsed points left out.
    """

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        known = [part for part in parts if part["points"]]
        self.seed: int = parts[0]["seed"]
        self.initial: dict[str, Any] = dict(known[0]["initial"]) if known else {}
        self.retain: dict[str, Any] | None = next((part["retain"] for part in known if part["retain"]), None)
        rows = [{"base": part["base"], **point} for part in known for point in part["points"]]
        self.points = pd.DataFrame([self._with_shares(row) for row in rows])
        self.front = np.zeros(len(rows), dtype=bool)
        if rows:
            walks = self.points[(self.points["kind"] == WALK) & self.points["collapsed"].isna()]
            values = walks[["forgetting", "utility"]].to_numpy(dtype=float)
            start = [self.initial["forgetting"], self.initial["utility"]]
            self.front[walks.index[non_dominated_from(values, start)]] = True

    def _with_shares(self, row: dict[str, Any]) -> dict[str, Any]:
        before, start = row["forgetting"], self.initial["forgetting"]
        after = {attack: value for attack, value in row["after"].items() if value is not None}
        shares = {attack: (before - after[attack]) / (before - start) for attack in ATTACKS if attack in after}
        bits = [shares[attack] for attack in FOUR_BITS if attack in shares]
        return {
            **{key: value for key, value in row.items() if key not in ("after", "problems")},
            **{attack: shares.get(attack, np.nan) for attack in ATTACKS},
            **{f"after_{attack}": after.get(attack, np.nan) for attack in ATTACKS},
            BITS: max(bits, default=np.nan),
            WORST: max(shares.values(), default=np.nan),
            AFTER_WORST: min(after.values(), default=np.nan),
        }

    def rows(self, kind: str, group: str | None = None) -> pd.DataFrame:
        """Return the points of a kind that have not collapsed and were attacked, of walks those of a group of alphas."""
        if self.points.empty:
            return self.points
        found = self.points[(self.points["kind"] == kind) & self.points["collapsed"].isna() & self.points[WORST].notna()]
        return found if group is None else found[GROUPS[group](found["alpha"])]

    def curves(self, share: str) -> dict[str, pd.DataFrame]:
        """Return the trained epochs of every method, in order, of which the share undone is known."""
        trained = self.rows(WALK, "alpha = 0")
        if trained.empty:
            return {}
        known = trained[trained[share].notna()].sort_values("epoch")
        return {str(base): rows.reset_index(drop=True) for base, rows in known.groupby("base")}


def over_training(world: Attacked, share: str, group: str, alike: Sequence[str]) -> list[float]:
    """Return the share undone of training less that of each walk of a group that training comes within one `STEP` of.

    Args:
        world: The points of a seed.
        share: Column of the share undone.
        group: Key of `GROUPS`.
        alike: Quantities that must be alike, keys of `STEP`.
    """
    curves, names = world.curves(share), list(alike)
    gains = []
    for point in world.rows(WALK, group).to_dict("records"):
        curve = curves.get(point["base"])
        if curve is None or np.isnan(point[share]):
            continue
        match = nearest(curve[names], [point[name] for name in names], [STEP[name] for name in names])
        if match.distance <= 1.0:
            gains.append(at(curve[share], match.position) - point[share])
    return gains


def as_far(world: Attacked, share: str) -> list[float]:
    """Return the share undone of training where it first is as far from theta_init, less that of each walk above 0."""
    curves = world.curves(share)
    gains = []
    for point in world.rows(WALK, "alpha above 0").to_dict("records"):
        curve = curves.get(point["base"])
        place = np.nan if curve is None else first_reached(curve["distance"], point["distance"])
        if curve is not None and np.isfinite(place) and not (place == 0 and curve["distance"][0] > point["distance"]):
            gains.append(at(curve[share], place) - point[share])
    return [gain for gain in gains if np.isfinite(gain)]


def pushed_over(world: Attacked, share: str, alpha: float) -> list[float]:
    """Return the share undone of a walk's epoch less that of the epoch with a random step; alpha 0 is the epoch as trained."""
    if world.points.empty:
        return []
    walks = world.rows(WALK)
    own = walks[walks["alpha"] == alpha].set_index(["base", "epoch"])[share]
    pushed = world.rows(PUSHED).set_index(["base", "epoch"])[share]
    return [float(gain) for gain in (own - pushed).dropna()]


def by_regression(world: Attacked, share: str, group: str, alike: Sequence[str]) -> float:
    """Return what a group of alphas adds to the share undone of training at equal `alike`, by least squares over all walks.

    The other group of alphas and the methods have coefficients of their own.
    """
    rows = world.rows(WALK)
    rows = rows[rows[share].notna()] if len(rows) else rows
    if rows.empty:
        return float("nan")
    signs = {name: GROUPS[name](rows["alpha"]).to_numpy(dtype=float) for name in GROUPS if name != "alpha = 0"}
    asked = signs.pop(group)
    others = [*signs.values(), *(rows[name].to_numpy(dtype=float) for name in alike)]
    others += [(rows["base"] == base).to_numpy(dtype=float) for base in rows["base"].unique()]
    return coefficient(rows[share], asked, others)


def chosen(world: Attacked, utility: Objective) -> dict[str, pd.Series]:
    """Return the point of the front that each rule takes, where it takes one that was attacked."""
    if world.points.empty or not world.front.any():
        return {}
    front = world.points[world.front].rename(columns={"forgetting": MEMORIZATION.name, "utility": utility.name})
    places = np.flatnonzero(world.front)
    front = front.assign(trial=places)
    initial = pd.Series(world.initial).rename({"forgetting": MEMORIZATION.name, "utility": utility.name})
    known = front[front[AFTER_WORST].notna()]
    attacked = dict(zip(known["trial"].astype(int), known[AFTER_WORST].astype(float), strict=True))
    found = {STRONGEST: int(front[MEMORIZATION.name].to_numpy().argmax())}
    for rule in RULES:
        try:
            found[rule], _ = chosen_row(front, initial, (MEMORIZATION, utility), rule, DEFAULT_FLOOR, attacked)
        except UserError:
            continue
    points = {rule: world.points.iloc[int(places[row])] for rule, row in found.items()}
    return {rule: point for rule, point in points.items() if np.isfinite(point[WORST])}


def fragility(world: Attacked, utility: Objective, rule: str) -> list[float]:
    """Return the share that the worst attack undoes of a rule's point, less its mean over the front."""
    point = chosen(world, utility).get(rule)
    return [] if point is None else [float(point[WORST] - world.points[world.front][WORST].mean())]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        key: Name in ``results.json``.
        text: What is asked, as a claim.
        measured: What is measured; the claim holds where it is above 0.
        effects: One number per compared point of a seed, whose mean is the seed's effect.
        regression: The same by regression, as a check; None where there is none.
    """

    key: str
    text: str
    measured: str
    effects: Callable[[Attacked], list[float]]
    regression: Callable[[Attacked], float] | None = None


def questions(settings: AttackSettings) -> list[Question]:
    """Return what is asked of an experiment."""
    both = ("forgetting", "utility")
    found = []
    for share, how, alike in (
        (BITS, "the worse of NF4 and int4", ("utility",)),
        ("relearn_forget", "relearning from the forget set", both),
        ("relearn_few", "relearning from a few forget items", both),
        ("relearn_retain", "fine-tuning on retain items", both),
    ):
        equal = " and ".join(alike)
        for group, sign, text in (
            ("alpha above 0", 1.0, "resists better than training"),
            ("alpha below 0", -1.0, "is frailer than training"),
        ):
            order = "training less the walk" if sign > 0 else "the walk less training"
            found.append(
                Question(
                    f"{share}_{'above' if sign > 0 else 'below'}",
                    f"{group.capitalize()} {text} under {how}",
                    f"share of forgetting undone at equal {equal}, {order}",
                    partial(_signed, sign, over_training, share=share, group=group, alike=alike),
                    partial(_signed_one, -sign, by_regression, share=share, group=group, alike=alike),
                )
            )
    if settings.pushes:
        found += [
            Question(
                "distance_random",
                "Distance alone makes relearning harder",
                "share undone by the forget set: a trained epoch less the epoch with a random step to the distance of "
                f"alpha = {settings.far:g}",
                partial(pushed_over, share="relearn_forget", alpha=0.0),
            ),
            Question(
                "direction",
                "As far away, a walk resists better than a random step",
                f"share undone by the forget set: the epoch with a random step less its walk to alpha = {settings.far:g}",
                partial(_signed, -1.0, pushed_over, share="relearn_forget", alpha=settings.far),
            ),
        ]
    found.append(
        Question(
            "distance_training",
            "As far away, a walk resists better than longer training",
            "share undone by the forget set: training at the same distance less alpha above 0",
            partial(as_far, share="relearn_forget"),
        )
    )
    utility = settings.study.maximised[1]
    return found + [
        Question(
            f"fragile_{rule}",
            f"The point of {rule} is frailer than the front",
            "share undone by the worst attack: the point less the mean of the front",
            partial(fragility, utility=utility, rule=rule),
        )
        for rule in (STRONGEST, *RULES)
    ]


def _signed(sign: float, effects: Callable[..., list[float]], world: Attacked, **given: Any) -> list[float]:
    return [sign * effect for effect in effects(world, **given)]


def _signed_one(sign: float, effect: Callable[..., float], world: Attacked, **given: Any) -> float:
    return sign * effect(world, **given)


def answered(settings: AttackSettings, worlds: Sequence[Attacked]) -> list[dict[str, Any]]:
    """Return every question with its effect over seeds and the verdict, as strict JSON."""
    rows = []
    for question in questions(settings):
        by_seed = [question.effects(world) for world in worlds]
        found = estimate([float(np.mean(effects)) if effects else np.nan for effects in by_seed])
        check = None if question.regression is None else estimate([question.regression(world) for world in worlds])
        few = ONE_SEED if found.values else NOT_TESTED
        rows.append(
            {
                "key": question.key,
                "claim": question.text,
                "measured": question.measured,
                **found.as_dict(),
                "points": sum(map(len, by_seed)),
                "verdict": judge(found, 0.0) if len(found.values) > 1 else few,
                "regression": None if check is None else check.as_dict(),
            }
        )
    return rows


def summarise(settings: AttackSettings, parts: Sequence[dict[str, Any]]) -> tuple[list[Attacked], dict[str, Any]]:
    """Return the points by seed, and all numbers of the section as strict JSON.

    Raises:
        UserError: No base run gave any point.
    """
    seeds = sorted({part["seed"] for part in parts})
    problems = [f"seed {part['seed']}, {part['base']}: {part['problem']}" for part in parts if part["problem"]]
    worlds = [Attacked([part for part in parts if part["seed"] == seed]) for seed in seeds]
    if all(world.points.empty for world in worlds):
        raise UserError(
            f"unlearning.methods: no method is left, every training failed: {problems[0]}; give a lower learning_rate"
        )
    worlds = [world for world in worlds if not world.points.empty]
    utility = settings.study.maximised[1]
    answers = answered(settings, worlds)
    random = [world.points[world.points["kind"] == RANDOM] for world in worlds]
    moved = [rows["forgetting"].mean() - world.initial["forgetting"] for world, rows in zip(worlds, random, strict=True)]
    return worlds, {
        "study": settings.study.name,
        "definition": settings.study.definition,
        "utility": {"name": utility.name, "title": utility.title},
        "seeds": [world.seed for world in worlds],
        "rule": f"holds where Student's {CONFIDENCE:.0%} interval over seeds is above 0, does not hold where it is below",
        "answers": answers,
        "verdicts": {
            name: sum(row["verdict"] == name for row in answers) for name in (HOLDS, FAILS, OPEN, ONE_SEED, NOT_TESTED)
        },
        "by_attack": [_by_attack(worlds, attack, title) for attack, title in ATTACKS.items()],
        "picks": [_pick(world, rule, point) for world in worlds for rule, point in chosen(world, utility).items()],
        "front": [_front(world) for world in worlds],
        "initial": {key: finite_mean([world.initial[key] for world in worlds]) for key in ("forgetting", "utility")},
        "random_alone": estimate(moved).as_dict(),
        "attacked": sum(len(world.rows(WALK)) + len(world.rows(PUSHED)) for world in worlds),
        "scored": sum(len(world.points) for world in worlds),
        "items": parts[0]["items"],
        "step": STEP,
        "least": LEAST,
        "floor": DEFAULT_FLOOR,
        "problems": problems,
        "settings": settings.as_dict(),
        "seconds": sum(part["seconds"] for part in parts),
    }


def _by_attack(worlds: Sequence[Attacked], attack: str, title: str) -> dict[str, Any]:
    groups = {name: estimate([float(world.rows(WALK, name)[attack].mean()) for world in worlds]).as_dict() for name in GROUPS}
    retain = [
        world.retain["forgetting"] - world.retain["after"][attack]
        for world in worlds
        if world.retain is not None and world.retain["after"].get(attack) is not None
    ]
    return {"attack": attack, "title": title, "groups": groups, "retain_loses": finite_mean(retain)}


def _pick(world: Attacked, rule: str, point: pd.Series) -> dict[str, Any]:
    names = ("epoch", "alpha", "forgetting", "utility", TRUTH_RATIO.name, AFTER_WORST, WORST)
    place = {name: float(point[name]) for name in names}
    return {"seed": world.seed, "rule": rule, "base": str(point["base"]), **place, "epoch": int(point["epoch"])}


def _front(world: Attacked) -> dict[str, Any]:
    rows = world.points[world.front]
    shares = {name: int(GROUPS[name](rows["alpha"]).sum()) for name in GROUPS}
    return {"seed": world.seed, "points": len(rows), **shares, WORST: finite_mean(rows[WORST].dropna().tolist())}
