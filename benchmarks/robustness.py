"""Ask what alpha does to robustness: forgetting before and after 8 and 4 bits and relearning, over a grid, for several seeds.

For each seed the quickstart's world, methods and models are made, every method, base epoch and alpha is scored, and a part of
the grid is audited as `uipe audit` does. The share of forgetting that an attack undoes is then regressed, over the points of a
seed, on what could explain it; an effect is the mean coefficient over seeds, with its standard error. It holds where it is two
standard errors from 0 in the direction asked for, does not hold where it is so in the other, and is not decided otherwise.
Forgetting is the memorisation score, which is continuous; points that forgot less than `LEAST` of it are left out, because a
share of nothing is noise. Prints one JSON object.

    python benchmarks/robustness.py --out runs/robustness                  # 3 seeds, 20 to 30 minutes on two cores
    python benchmarks/robustness.py --out runs/robustness --seeds 0 --alphas 4 --epochs 6
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import machine
from numpy.typing import NDArray

from search.execution.run import audit_study, run_study
from search.results.study_result import StudyResult
from search.spec.runtime import Audit, Relearning
from search.spec.study import StudySpec, load_study, quickstart_path
from uipe_core.errors import UserError

FORGETTING, UTILITY = "memorization_score", "model_utility"
LEAST = 0.05
ATTACKS = ("int8", "int4", "nf4", "relearn_forget", "relearn_few", "relearn_retain")
RULES = ("utility-floor", "knee", "chance")
RATE = 0.0005
"""Learning rate of relearning: the quickstart's models learned at 0.003, where 2e-5 moves nothing in an epoch."""


def points(result: StudyResult) -> pd.DataFrame:
    """Return a row per audited point: place, forgetting, utility, norm, and by attack the share of forgetting undone."""
    initial = result.control("initial")
    assert initial is not None
    start = float(initial[FORGETTING])
    trials = result.trials.set_index("trial")
    rows = []
    for number, own in result.controls.dropna(subset=["of_trial"]).groupby("of_trial"):
        attacked = own[own["kind"].isin(ATTACKS)].set_index("kind")
        trial = trials.loc[int(number)]
        gone = float(trial[FORGETTING]) - start
        if attacked.empty or gone < LEAST:
            continue
        undone = {kind: (float(trial[FORGETTING]) - float(row[FORGETTING])) / gone for kind, row in attacked.iterrows()}
        facts = {name: trial[name] for name in ("base", "epoch", "alpha", "update_norm", UTILITY, FORGETTING, "on_front")}
        rows.append({"trial": int(number), **facts, **undone})
    return pd.DataFrame(rows)


def effects(table: pd.DataFrame, attack: str) -> dict[str, float]:
    """Return the coefficients of one seed: what an alpha above 0, one below 0, and distance add to the share undone.

    Each at equal utility and equal forgetting; the last two of one regression, so that each is at an equal other.
    """
    known = table.dropna(subset=[attack])
    share = known[attack].to_numpy(dtype=float)
    same = [known[UTILITY].to_numpy(dtype=float), known[FORGETTING].to_numpy(dtype=float)]
    signs = [(known["alpha"] > 0).to_numpy(dtype=float), (known["alpha"] < 0).to_numpy(dtype=float)]
    norm = known["update_norm"].to_numpy(dtype=float)
    norm = norm / norm.mean()
    above, below = _coefficients(share, [*signs, *same])[:2]
    alpha, distance = _coefficients(share, [known["alpha"].to_numpy(dtype=float), norm, *same])[:2]
    return {
        "alpha_above_0": above,
        "alpha_below_0": below,
        "alpha_at_equal_distance": alpha,
        "distance_at_equal_alpha": distance,
    }


def _coefficients(values: NDArray[np.float64], columns: list[NDArray[np.float64]]) -> list[float]:
    design = np.column_stack([np.ones(len(values)), *columns])
    return [float(each) for each in np.linalg.lstsq(design, values, rcond=None)[0][1:]]


def decided(values: list[float], wanted: float) -> dict[str, Any]:
    """Return mean, standard error over seeds, and whether the effect has the wanted sign by two standard errors."""
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    verdict = "not decided"
    if error is not None and abs(mean) > 2 * error:
        verdict = "holds" if mean * wanted > 0 else "does not hold"
    return {"effect": mean, "standard_error": error, "by_seed": values, "verdict": verdict}


def world(seed: int, out: Path, alphas: int, epochs: tuple[int, ...]) -> StudyResult:
    """Score the grid of a seed and audit the points of some epochs; the same call resumes."""
    quickstart = load_study(quickstart_path())
    count = alphas * sum(quickstart.base_epochs().values())
    search = quickstart.search.model_copy(update={"sampler": "grid", "trials": count})
    audit = Audit(tests=("quantisation", "relearning"), relearning=Relearning(learning_rate=RATE, batch_size=8))
    spec: StudySpec = quickstart.model_copy(update={"seed": seed, "search": search, "audit": None})
    folder = out / f"seed-{seed}"
    result = run_study(spec, folder)
    chosen = result.trials[result.trials["epoch"].isin(epochs) & (result.trials["alpha"] > -1)]
    result.store.record.spec["audit"] = audit.model_dump(mode="json")
    result.store.save_record()
    numbers = [int(number) for number in chosen["trial"]]
    return audit_study(folder, numbers, tests=("quantisation", "relearning"))


def picks(result: StudyResult, table: pd.DataFrame) -> dict[str, Any]:
    """Return, of the points that rules choose among the audited ones, the largest share that an attack undoes."""
    worst = table.set_index("trial")[list(ATTACKS)].max(axis=1)
    found: dict[str, Any] = {"all_audited": float(worst.mean())}
    for rule in RULES:
        try:
            number = int(result.select(rule, 0.9)["trial"])
        except UserError:
            continue
        found[rule] = float(worst[number]) if number in worst.index else None
    return found


def main() -> None:
    """Run every seed and print effects, standard errors and verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the studies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alphas", type=int, default=7, help="values of alpha from -1 to 2")
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 4, 6], help="base epochs that are audited")
    given = parser.parse_args()
    results = {seed: world(seed, given.out, given.alphas, tuple(given.epochs)) for seed in given.seeds}
    tables = {seed: points(result) for seed, result in results.items()}
    asked = {
        # Survives better: less is undone; frailer: more is.
        "alpha_above_0": -1.0,
        "alpha_below_0": 1.0,
        "alpha_at_equal_distance": -1.0,
        "distance_at_equal_alpha": -1.0,
    }
    by_attack = {
        attack: {
            "mean_share_undone": {
                group: float(np.mean([table.loc[rows(table), attack].mean() for table in tables.values()]))
                for group, rows in {
                    "alpha < 0": lambda table: table["alpha"] < 0,
                    "alpha = 0": lambda table: table["alpha"] == 0,
                    "alpha > 0": lambda table: table["alpha"] > 0,
                }.items()
            },
            **{
                name: decided([effects(table, attack)[name] for table in tables.values()], wanted)
                for name, wanted in asked.items()
            },
        }
        for attack in ATTACKS
    }
    found = {
        "points": {seed: len(table) for seed, table in tables.items()},
        "attacks": by_attack,
        "worst_share_undone_of_picks": {seed: picks(results[seed], tables[seed]) for seed in given.seeds},
        "relearning": {"epochs": 1, "learning_rate": RATE, "batch_size": 8},
        "machine": machine(),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
