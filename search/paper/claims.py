"""State the claims of UIPE as tests with thresholds, and judge them by the measured effects.

Every claim is one number per seed and way of fine-tuning; it holds where that number is surely above a threshold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from search.paper import measures
from search.paper.measures import World
from search.paper.settings import TUNINGS
from search.paper.statistics import estimate, judge

LOG_FQ, NATS, UTILITY, COSINE, CORRELATION, SHARE = "log10 FQ", "nats", "utility", "cosine", "correlation", "share"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        key: Name in ``results.json``.
        source: Which part of the paper it is about.
        text: The claim, in our words.
        measured: What is measured.
        unit: Of what is measured.
        least: What is measured must lie above this for the claim to hold.
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
        "abstract",
        "What was forgotten can be worked out from related knowledge",
        "log truth ratio of K1 in a model that learned neither K1 nor K2, less in one that learned K2 alone",
        NATS,
        0.05,
        measures.inference,
    ),
    Claim(
        "m2_over_m1",
        "table 1, figure 2",
        "K1 is forgotten better where K2 was never learned",
        "best K1 forget quality with 95% of the utility kept, M2 less M1",
        LOG_FQ,
        1.0,
        lambda world: measures.over_m1(world, "M2"),
    ),
    Claim(
        "m3_over_m1",
        "table 1, figure 2",
        "K1 is forgotten better where K2 is unlearned too",
        "best K1 forget quality with 95% of the utility kept, M3 less M1",
        LOG_FQ,
        1.0,
        lambda world: measures.over_m1(world, "M3"),
    ),
    Claim(
        "k2_follows",
        "figure 3",
        "Unlearning K1 alone makes K2 be forgotten too",
        "K2 forget quality of M1 where 5% of its utility is used up, less that of the initial model",
        LOG_FQ,
        1.0,
        lambda world: measures.rise(world, "k2"),
    ),
    Claim(
        "k2_lags",
        "figure 3",
        "K2 stays behind K1",
        "share of the way from the initial model to the noise ceiling, K1 less K2, mean over M1's epochs",
        SHARE,
        0.05,
        measures.lag,
    ),
    Claim(
        "k2_before_k0",
        "figure 3",
        "It is related knowledge that goes along",
        "rise of M1's loss up to where 5% of its utility is used up, K2 less K0",
        NATS,
        0.05,
        lambda world: measures.rise(world, "k2_loss") - measures.rise(world, "k0_loss"),
    ),
    Claim(
        "cosine",
        "equation 2",
        "Gradients of related facts point the same way",
        "mean gradient cosine, K1 and its own K2 less K1 and K0 of another person and attribute",
        COSINE,
        0.02,
        lambda world: world.cosines["matched"] - world.cosines["unrelated"],
    ),
    Claim(
        "cosine_person",
        "equation 2, control",
        "It is not only the person that related facts share",
        "mean gradient cosine, K1 and its own K2 less K1 and the person's K2 of another attribute",
        COSINE,
        0.02,
        lambda world: world.cosines["matched"] - world.cosines["same person"],
    ),
    Claim(
        "cosine_attribute",
        "equation 2, control",
        "It is not only the kind of question that related facts share",
        "mean gradient cosine, K1 and its own K2 less K1 and another person's K2 of the attribute",
        COSINE,
        0.02,
        lambda world: world.cosines["matched"] - world.cosines["same attribute"],
    ),
    Claim(
        "projection",
        "equation 4",
        "The update moves along related gradients as the cosine predicts",
        "correlation over K2 facts of predicted and measured projection, mean over methods and epochs",
        CORRELATION,
        0.5,
        lambda world: measures.projected(world, "correlation"),
    ),
    Claim(
        "projection_sign",
        "equation 4",
        "The update climbs the loss of related facts",
        "projection on K2 gradients as a share of the length of the update, mean over facts, methods and epochs",
        SHARE,
        0.0,
        lambda world: measures.projected(world, "measured", per_length=True),
    ),
    Claim(
        "amplified",
        "equation 6",
        "The amplified update raises each related loss as its projection says",
        "correlation over K2 facts of the rise by first order and as measured, mean over alpha above 0, methods and epochs",
        CORRELATION,
        0.5,
        lambda world: measures.projected(world, "rise_correlation", extrapolated=True),
    ),
    Claim(
        "tradeoff",
        "figure 6",
        "Extrapolation keeps more utility for the same forgetting",
        "utility at alpha above 0, less that of plain training where it first forgets K1 as well, mean over points",
        UTILITY,
        0.0,
        lambda world: measures.at_same_k1(world, "utility"),
    ),
    Claim(
        "matched_k2",
        "abstract",
        "Extrapolation removes more related knowledge",
        "K2 forget quality at alpha above 0, less that of plain training at the same K1 forget quality and utility",
        LOG_FQ,
        0.0,
        lambda world: measures.mean([point["k2_gain"] for point in measures.matched_points(world)]),
    ),
    Claim(
        "alpha_k1",
        "figure 7",
        "Forgetting grows with alpha",
        "K1 forget quality at alpha = 1 less at alpha = 0, mean over methods and epochs",
        LOG_FQ,
        0.0,
        lambda world: measures.doubled(world, "k1"),
    ),
    Claim(
        "beyond_next",
        "figure 7",
        "The right alpha forgets more than the next epoch does",
        "K1 forget quality at the best alpha above 0 less at the next epoch, mean over methods and epochs",
        LOG_FQ,
        0.0,
        measures.beyond_next,
    ),
    Claim(
        "next_utility",
        "figure 7",
        "Where a walk forgets as much as the next epoch, it costs less utility",
        "utility where a walk forgets K1 as well as the next epoch, less that of the next epoch",
        UTILITY,
        0.0,
        lambda world: measures.as_next(world, "utility"),
    ),
    Claim(
        "stall_k2",
        "figure 8",
        "From where K2 forgetting stalls, alpha makes it go on",
        "K2 forget quality at alpha = 1 less at alpha = 0, from the epoch at which it stalls",
        LOG_FQ,
        0.0,
        lambda world: measures.doubled_from_stall(world, "k2"),
    ),
    Claim(
        "stall_k0",
        "figure 8",
        "Unrelated knowledge stays meanwhile",
        "the same for K0, which may lose one unit",
        LOG_FQ,
        -1.0,
        lambda world: measures.doubled_from_stall(world, "k0"),
    ),
    Claim(
        "stall_utility",
        "figure 8",
        "Utility stays meanwhile",
        "the same for utility, which may lose 0.02",
        UTILITY,
        -0.02,
        lambda world: measures.doubled_from_stall(world, "utility"),
    ),
)


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
