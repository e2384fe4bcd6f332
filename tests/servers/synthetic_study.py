"""What a report shows of a study that was never run: smooth stand-ins for scored models."""

import math

import numpy as np
import pandas as pd

from search.problem.pareto import hypervolume, knee, non_dominated, utility_floor
from search.report.data import ReportData
from search.report.html import checked, render_page

FLOOR, CAP = -22.73, 0.3
REFERENCE = [FLOOR - 0.5, 0.0]
INITIAL = {"log10_forget_quality": -14.2, "model_utility": 0.772, "logit_scale": 1.0}
RETAIN = {"log10_forget_quality": 0.0, "model_utility": 0.781, "logit_scale": 1.02}


def metrics(log10, utility, scale):
    return {
        "log10_forget_quality": log10,
        "forget_quality": 10.0**log10,
        "ks_statistic": min(1.0, 0.12 + abs(log10) / 26),
        "model_utility": utility,
        "logit_scale": scale,
    }


def walk_name(alpha):
    names = {-1.0: "initial model", 0.0: "unlearned epoch"}
    return names.get(alpha, "interpolation" if alpha < 0 else "extrapolation")


def outcome(strength, damage, epoch, alpha):
    """A smooth stand-in for a scored model: forgetting rises, peaks and overshoots; utility wears off."""
    length = (1 + alpha) * epoch
    peak = np.exp(-(((length * strength - 4.5) / 3.2) ** 2))
    start = np.exp(-((4.5 / 3.2) ** 2))
    log10 = -14.2 + 13.9 * (peak - start) / (1 - start) - 0.15 * max(0.0, length * strength - 7)
    utility = 0.772 * np.exp(-damage * length**1.7) + 0.012 * np.sin(length / 2)
    return metrics(float(max(FLOOR, log10)), float(max(0.0, utility)), 1 + 0.03 * length * strength)


def synthetic(methods=4, epochs=6, searched=60, low=-1.0, randoms=True, seed=0):
    rng = np.random.default_rng(seed)
    known = [("grad_ascent", 1.5, 0.03), ("grad_diff", 0.8, 0.004), ("kl_min", 0.95, 0.008), ("npo", 0.7, 0.006)]
    bases = [known[n % 4] for n in range(methods)]
    labels = [
        name if methods <= 4 else f"{name}[learning_rate={1e-4 * 2 ** (n // 4):.0e}]" for n, (name, *_) in enumerate(bases)
    ]
    places = [(n, epoch, 0.0, "alpha_zero") for n in range(methods) for epoch in range(1, epochs + 1)]
    for _ in range(searched):
        alpha = round(float(rng.uniform(low, 2.0)), 3)
        places.append((int(rng.integers(methods)), int(rng.integers(1, epochs + 1)), alpha, "search"))
    rows = []
    for number, (n, epoch, alpha, kind) in enumerate(places):
        name, strength, damage = bases[n]
        scores = outcome(strength * (1 + 0.15 * (n // 4)), damage, epoch, alpha)
        flagged = scores["model_utility"] > max(INITIAL["model_utility"], RETAIN["model_utility"])
        row = {"trial": number, "kind": kind, "base": labels[n], "method": name, "epoch": epoch, "alpha": alpha}
        row |= {"walk": walk_name(alpha), **scores, "flagged": flagged, "seconds": float(rng.uniform(0.4, 0.7))}
        row["related_log10_forget_quality"] = row["log10_forget_quality"] * 0.6
        row["unrelated_log10_forget_quality"] = -0.2
        rows.append(row)
    trials = pd.DataFrame(rows)
    trials["on_front"] = non_dominated(trials[["log10_forget_quality", "model_utility"]])
    controls = synthetic_controls(trials, labels, bases, epochs, randoms, rng)
    return ReportData(trials, controls, synthetic_summary(trials, controls, low))


def synthetic_controls(trials, labels, bases, epochs, randoms, rng):
    rows = [{"kind": "initial", **metrics(*INITIAL.values())}, {"kind": "retain", **metrics(*RETAIN.values())}]
    for label, (name, strength, damage) in zip(labels, bases, strict=True):
        scores = outcome(strength, damage, epochs + 1, 0.0)
        rows.append({"kind": "next_epoch", "base": label, "method": name, "epoch": epochs + 1, "alpha": 0.0, **scores})
    rows += [
        {"kind": "temperature", "temperature": heat, **metrics(-14.0, 0.772 + 0.25 * (1 - heat), 1 / heat)}
        for heat in (0.67, 0.8, 1.25)
    ]
    for _, trial in trials[trials["on_front"] & (trials["kind"] == "search")].iterrows() if randoms else ():
        scores = metrics(-14.2 + float(rng.normal(0, 0.4)), 0.772 - float(rng.uniform(0, 0.02)), 0.99)
        point = {key: trial[key] for key in ("base", "method", "epoch", "alpha")}
        rows.append({"kind": "random_direction", **point, "of_trial": trial["trial"], **scores})
    return pd.DataFrame(rows)


def synthetic_summary(trials, controls, low):
    def volume(*tables):
        points = pd.concat(tables)[["log10_forget_quality", "model_utility"]].to_numpy()
        return hypervolume(np.minimum(points, [math.log10(CAP), math.inf]), REFERENCE)

    start, zero = controls[controls["kind"] == "initial"], trials[trials["kind"] == "alpha_zero"]
    tables = {
        "front": trials,
        "alpha_zero": zero,
        "extrapolation_only": trials[trials["alpha"] >= 0],
        "random_direction": pd.concat([zero, controls[controls["kind"] == "random_direction"]]),
    }
    points = trials[["log10_forget_quality", "model_utility"]].to_numpy()
    volumes = {name: volume(start, table) for name, table in tables.items()}
    gain = {key: volumes[key] - volumes["alpha_zero"] for key in ("extrapolation_only", "random_direction")}
    return {
        "study": "quickstart",
        "definition": "tofu",
        "corpus": "people (6 forget, 34 retain)",
        "model": "tiny Llama, 154k parameters",
        "seed": 0,
        "dtype": "float32",
        "forget_items": 48,
        "log10_floor": FLOOR,
        "reference_point": {"log10_forget_quality": REFERENCE[0], "model_utility": REFERENCE[1]},
        "forget_quality_cap": CAP,
        "alpha": {"low": low, "high": 2.0},
        "alpha_by_base": {base: {"key": "search.alpha", "low": low, "high": 2.0} for base in trials["base"].dropna().unique()},
        "trials": {"complete": len(trials), "pruned": 3, "failed": 1, "interrupted": 0, "running": 0},
        "hypervolume": volumes,
        "gain": {"all": volumes["front"] - volumes["alpha_zero"], **gain},
        "base_run_seconds": [1.0, 2.0],
        "seconds": {"models": 22.4, "references": 12.5, "training": 28.5, "given": 18.3, "trials": 33.1},
        "storage": "sqlite:///study.db",
        "created": "2025-11-03T14:05:00+00:00",
        "versions": {"torch": "2.9.0", "optuna": "5.0.0", "ray": "2.60.0"},
        "selections": [
            {
                "rule": "utility-floor, floor 0.95",
                "trial": utility_floor(*points.T, 0.95 * INITIAL["model_utility"]),
            },
            {"rule": "knee", "trial": knee(points)},
        ],
        "notes": [],
        "out": "runs/quick start",
        "recommended": {
            "rule": "utility-floor 0.95",
            "trial": utility_floor(*points.T, 0.95 * INITIAL["model_utility"]),
            "note": None,
        },
        "failures": [{"trial": 77, "reason": "the scored model gave NaN losses"}],
    }


def page_of(view):
    """The page alone: pictures take seconds."""
    return render_page(checked(view))
