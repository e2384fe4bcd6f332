"""What UIPE says, what is measured of it here, and whether that holds.

Every claim is one number per seed and way of fine-tuning, made so that the claim is a larger number than its threshold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from search.paper.settings import TUNINGS, PaperSettings
from search.paper.statistics import (
    FloatArray,
    at,
    best_above,
    estimate,
    first_reached,
    judge,
    nearest,
    stall_epoch,
)

LOG_FQ, NATS, UTILITY, COSINE, CORRELATION, SHARE = "log10 FQ", "nats", "utility", "cosine", "correlation", "share"


class World:
    """The results of one task, as the measures of claims ask for them.

    Forget quality counts up to the noise ceiling: above it, higher means nothing.
    """

    def __init__(self, settings: PaperSettings, result: dict[str, Any]) -> None:
        self.settings = settings
        self.seed, self.tuning = result["seed"], result["tuning"]
        self.points = pd.DataFrame(result["points"])
        for name in ("k1", "k2", "k0"):
            self.points[name] = self.points[name].clip(upper=np.log10(settings.ceiling))
        self.models: dict[str, dict[str, float]] = {row["name"]: row for row in result["models"]}
        self.cosines = {kind: float(np.mean(values)) for kind, values in result["cosines"].items()}
        self.projections = pd.DataFrame(result["projections"])

    @property
    def one(self) -> float:
        """The alpha nearest 1: the update doubled."""
        return min(self.settings.alphas, key=lambda alpha: abs(alpha - 1.0))

    def curve(self, model: str = "M1", method: str | None = None) -> pd.DataFrame:
        """Training curve: a row per epoch from 0 on."""
        chosen = method or self.settings.table_method
        rows = self.points[(self.points["model"] == model) & (self.points["method"] == chosen) & (self.points["alpha"] == 0)]
        return rows.sort_values("epoch").reset_index(drop=True)

    def walk(self, method: str, epoch: int) -> pd.DataFrame:
        """The walk from an epoch of M1: alpha = 0 and all above, ascending."""
        rows = self.points[(self.points["model"] == "M1") & (self.points["method"] == method)]
        return rows[rows["epoch"] == epoch].sort_values("alpha").reset_index(drop=True)

    def walks(self) -> list[tuple[str, int, pd.DataFrame]]:
        """Every walk of M1 as (method, epoch, rows)."""
        epochs = range(1, self.settings.epochs + 1)
        return [(method, epoch, self.walk(method, epoch)) for method in self.settings.methods for epoch in epochs]

    def kept_utility(self, model: str = "M1") -> float:
        """Utility that must be kept: the floor's share of what the model had before unlearning."""
        return float(self.settings.utility_floor * self.curve(model)["utility"].iloc[0])

    def peak(self) -> int:
        """Epoch at which K1 is forgotten best by M1."""
        return int(self.curve()["k1"].to_numpy().argmax())


def _best(world: World, model: str) -> float:
    curve = world.curve(model)
    return best_above(curve["k1"], curve["utility"], world.kept_utility(model))


def _way(curve: pd.DataFrame, name: str) -> FloatArray:
    """Share of the way from the initial model to the best of K1 or K2 that can be had, by epoch from 1 on."""
    values, ceiling = curve[name].to_numpy(dtype=float), float(curve["ceiling"].iloc[0])
    return (values[1:] - values[0]) / (ceiling - values[0])


def _lag(world: World) -> float:
    curve = world.curve().assign(ceiling=np.log10(world.settings.ceiling))
    return float(np.mean(_way(curve, "k1") - _way(curve, "k2")))


def _rise(world: World, name: str) -> float:
    curve = world.curve()
    return float(curve[name].iloc[world.peak()] - curve[name].iloc[0])


def _projected(world: World, column: str, alphas: str, name: str = "related") -> float:
    rows = world.projections[world.projections["set"] == name]
    rows = rows[rows["alpha"] > 0] if alphas == "above 0" else rows[rows["alpha"] == 0]
    return float(rows[column].astype(float).mean())


def _mean_gain(world: World, name: str) -> float:
    """Mean over walks of what the doubled update adds to alpha = 0."""
    gains = [rows.loc[rows["alpha"] == world.one, name].iloc[0] - rows[name].iloc[0] for _, _, rows in world.walks()]
    return float(np.mean(gains))


def _beyond_next(world: World) -> float:
    """Mean over walks of the best K1 along alpha above 0, less that of the next epoch."""
    gains = []
    for method, epoch, rows in world.walks():
        following = world.curve(method=method)["k1"].iloc[epoch + 1]
        gains.append(rows.loc[rows["alpha"] > 0, "k1"].max() - following)
    return float(np.mean(gains))


def _as_next(world: World, name: str) -> float:
    """Mean over walks that reach the next epoch's K1 forgetting, there: the walk's value less the next epoch's."""
    gains = []
    for method, epoch, rows in world.walks():
        following = world.curve(method=method).iloc[epoch + 1]
        if following["k1"] <= rows["k1"].iloc[0]:
            continue
        place = first_reached(rows["k1"], following["k1"])
        if np.isfinite(place):
            gains.append(at(rows[name], place) - following[name])
    return float(np.mean(gains)) if gains else float("nan")


def _at_same_k1(world: World, name: str) -> float:
    """Mean over points with alpha above 0 of their value, less that of plain training where it first forgets K1 as well."""
    gains = []
    for method, _, rows in world.walks():
        curve = world.curve(method=method)
        for _, point in rows[rows["alpha"] > 0].iterrows():
            place = first_reached(curve["k1"], point["k1"])
            if np.isfinite(place):
                gains.append(point[name] - at(curve[name], place))
    return float(np.mean(gains)) if gains else float("nan")


def matched_gains(world: World, name: str) -> list[float]:
    """For each point with alpha above 0 that plain training matches in K1 and utility: its value less that of training."""
    gains = []
    for method, _, rows in world.walks():
        curve = world.curve(method=method)
        for _, point in rows[rows["alpha"] > 0].iterrows():
            match = nearest(curve[["k1", "utility"]], point[["k1", "utility"]].astype(float), world.settings.match_scales)
            if match.distance <= 1.0:
                gains.append(float(point[name] - at(curve[name], match.position)))
    return gains


def left_out_gains(world: World, name: str) -> list[float]:
    """The same for every trained epoch against its neighbours: what interpolation between epochs gets wrong by itself."""
    gains = []
    for method in world.settings.methods:
        curve = world.curve(method=method)
        for epoch in range(1, len(curve) - 1):
            others, point = curve.drop(index=epoch), curve.iloc[epoch]
            match = nearest(others[["k1", "utility"]], point[["k1", "utility"]].astype(float), world.settings.match_scales)
            if match.distance <= 1.0:
                gains.append(float(point[name] - at(others[name], match.position)))
    return gains


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _from_stall(world: World, name: str) -> float:
    curve = world.curve()
    rows = world.walk(world.settings.table_method, min(stall_epoch(curve["k2"]), world.settings.epochs))
    return float(rows.loc[rows["alpha"] == world.one, name].iloc[0] - rows[name].iloc[0])


@dataclass(frozen=True)
class Claim:
    """One thing the paper says, as something that can turn out otherwise.

    Attributes:
        key: Name in ``results.json``.
        source: Where the paper says it.
        text: What it says.
        measured: What is measured here, in words.
        unit: Of the effect.
        least: The effect must lie above this for the claim to hold.
        effect: One number per task.
    """

    key: str
    source: str
    text: str
    measured: str
    unit: str
    least: float
    effect: Callable[[World], float]


CLAIMS = (
    Claim(
        "inference",
        "section 3",
        "What was forgotten can be worked out from related knowledge.",
        "log truth ratio of K1 of a model that never saw it: neither K1 nor K2 learned, less K2 alone learned",
        NATS,
        0.05,
        lambda w: w.models["retain"]["k1_log_truth_ratio"] - w.models["full_k2"]["k1_log_truth_ratio"],
    ),
    Claim(
        "m2_over_m1",
        "table 1, figure 2",
        "K1 is forgotten better where K2 was never learned.",
        "best K1 forget quality with 95% of the utility kept: M2 less M1",
        LOG_FQ,
        1.0,
        lambda w: _best(w, "M2") - _best(w, "M1"),
    ),
    Claim(
        "m3_over_m1",
        "table 1, figure 2",
        "K1 is forgotten better where K2 is unlearned too.",
        "best K1 forget quality with 95% of the utility kept: M3 less M1",
        LOG_FQ,
        1.0,
        lambda w: _best(w, "M3") - _best(w, "M1"),
    ),
    Claim(
        "k2_follows",
        "figure 3",
        "Unlearning K1 alone makes K2 be forgotten too.",
        "K2 forget quality at M1's best epoch for K1, less that of the initial model",
        LOG_FQ,
        1.0,
        lambda w: _rise(w, "k2"),
    ),
    Claim(
        "k2_lags",
        "figure 3",
        "K2 stays behind K1.",
        "share of the way to the noise ceiling, K1 less K2, mean over M1's epochs",
        SHARE,
        0.05,
        _lag,
    ),
    Claim(
        "k2_before_k0",
        "figure 3",
        "What goes along is related: K2 suffers more than K0.",
        "rise of the loss up to M1's best epoch for K1, K2 less K0",
        NATS,
        0.05,
        lambda w: _rise(w, "k2_loss") - _rise(w, "k0_loss"),
    ),
    Claim(
        "cosine_unrelated",
        "equation 2",
        "Gradients of related facts point the same way.",
        "mean gradient cosine, K1 with its own K2 less K1 with K0 of another attribute",
        COSINE,
        0.02,
        lambda w: w.cosines["matched"] - w.cosines["unrelated"],
    ),
    Claim(
        "cosine_person",
        "equation 2",
        "It is the fact and not the person that they share.",
        "mean gradient cosine, K1 with its own K2 less K1 with K2 of another attribute of the person",
        COSINE,
        0.02,
        lambda w: w.cosines["matched"] - w.cosines["same person"],
    ),
    Claim(
        "cosine_attribute",
        "equation 2",
        "It is the fact and not the kind of question that they share.",
        "mean gradient cosine, K1 with its own K2 less K1 with another person's K2 of the attribute",
        COSINE,
        0.02,
        lambda w: w.cosines["matched"] - w.cosines["same attribute"],
    ),
    Claim(
        "projection",
        "equation 4",
        "The update moves along a related gradient as the cosine predicts.",
        "correlation over K2 facts of predicted and measured projection, mean over methods and epochs",
        CORRELATION,
        0.5,
        lambda w: _projected(w, "correlation", "0"),
    ),
    Claim(
        "projection_sign",
        "equation 4",
        "The update climbs the loss of related facts.",
        "projection on K2 gradients over the length of the update, mean over facts, methods and epochs",
        SHARE,
        0.0,
        lambda w: float((_at_zero(w)["measured"] / _at_zero(w)["norm"]).mean()),
    ),
    Claim(
        "amplified",
        "equation 6",
        "The amplified update raises each related loss as its projection says.",
        "correlation over K2 facts of first-order and measured rise of the loss, mean over alpha above 0",
        CORRELATION,
        0.5,
        lambda w: _projected(w, "rise_correlation", "above 0"),
    ),
    Claim(
        "alpha_k1",
        "figure 7",
        "Forgetting of K1 grows with alpha.",
        "K1 forget quality at alpha = 1 less at alpha = 0, mean over methods and epochs",
        LOG_FQ,
        0.0,
        lambda w: _mean_gain(w, "k1"),
    ),
    Claim(
        "alpha_k2",
        "figure 7",
        "Forgetting of K2 grows with alpha.",
        "K2 forget quality at alpha = 1 less at alpha = 0, mean over methods and epochs",
        LOG_FQ,
        0.0,
        lambda w: _mean_gain(w, "k2"),
    ),
    Claim(
        "alpha_over_next",
        "figure 7",
        "The right alpha forgets more than the next epoch.",
        "K1 forget quality at the best alpha above 0 less at the next epoch, mean over methods and epochs",
        LOG_FQ,
        0.0,
        _beyond_next,
    ),
    Claim(
        "next_utility",
        "figure 7",
        "It does so at less cost.",
        "utility where a walk forgets K1 as well as the next epoch, less the next epoch's",
        UTILITY,
        0.0,
        lambda w: _as_next(w, "utility"),
    ),
    Claim(
        "same_k1_utility",
        "figure 6",
        "Extrapolation keeps more utility for the same forgetting.",
        "utility of points with alpha above 0, less that of plain training where it first forgets K1 as well",
        UTILITY,
        0.0,
        lambda w: _at_same_k1(w, "utility"),
    ),
    Claim(
        "matched_k2",
        "abstract",
        "Extrapolation removes more related knowledge.",
        "K2 forget quality of points with alpha above 0, less that of plain training at the same K1 forget quality and utility",
        LOG_FQ,
        0.0,
        lambda w: _mean(matched_gains(w, "k2")),
    ),
    Claim(
        "stall_k2",
        "figure 8",
        "Where K2 has stalled, alpha makes it go on.",
        "K2 forget quality at alpha = 1 less at alpha = 0, from the epoch at which it stalls",
        LOG_FQ,
        1.0,
        lambda w: _from_stall(w, "k2"),
    ),
    Claim(
        "stall_k0",
        "figure 8",
        "Unrelated knowledge stays.",
        "the same for K0, which may lose one unit",
        LOG_FQ,
        -1.0,
        lambda w: _from_stall(w, "k0"),
    ),
    Claim(
        "stall_utility",
        "figure 8",
        "Utility stays.",
        "the same for utility, which may lose 0.02",
        UTILITY,
        -0.02,
        lambda w: _from_stall(w, "utility"),
    ),
)


def _at_zero(world: World) -> pd.DataFrame:
    rows = world.projections
    return rows[(rows["set"] == "related") & (rows["alpha"] == 0)]


def judged(worlds: Sequence[World]) -> list[dict[str, Any]]:
    """Every claim with its effect and verdict for each way of fine-tuning, as strict JSON."""
    rows = []
    for claim in CLAIMS:
        row: dict[str, Any] = {
            "key": claim.key,
            "source": claim.source,
            "claim": claim.text,
            "measured": claim.measured,
            "unit": claim.unit,
            "least": claim.least,
        }
        for tuning in TUNINGS:
            found = estimate([claim.effect(world) for world in worlds if world.tuning == tuning])
            row[tuning] = {**found.as_dict(), "verdict": judge(found, claim.least)}
        rows.append(row)
    return rows
