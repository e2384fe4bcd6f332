"""Search every unlearning method by itself in the quickstart's worlds. Prints one JSON object.

A study per method and seed: the quickstart's, with one method in its default hyperparameters (`GIVEN` has those that the small
model needs otherwise), its finalists not audited. For each method, as mean, standard error and 95% interval over seeds:

given, front   hypervolume of the initial model and the trained epochs, and of the whole front
gain           the front's over the given one's, as a share of the given
forgetting     log10 forget quality, up to the noise ceiling, of the strongest trial that keeps 95% of the initial utility; as
               trained, and anywhere; null in a seed in which nothing keeps so much (``values`` has the others)
above          share of the front at alpha above 0

    python benchmarks/methods.py --work runs/methods                                    # 25 minutes on 2 cores
    python benchmarks/methods.py --work runs/smollm2 --study studies/smollm2_countries.yaml --seeds 1 --methods npo undial

Every study is kept in the work folder; the same command goes on where one ended.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from machine import machine

from search.execution.ray_compat import configure_ray
from search.execution.run import run_study
from search.paper.statistics import estimate
from search.problem.pareto import hypervolume
from search.results.study_result import StudyResult
from search.spec.study import StudySpec, load_study
from search.spec.study_file import quickstart_path
from uipe_core.unlearning.methods import METHODS

FLOOR = 0.95
GIVEN: Mapping[str, Mapping[str, float]] = {"rmu": {"layer": 1}}
"""Hyperparameters other than the defaults: RMU steers layer 7, and the quickstart's model has two."""


def study_of(path: Path, method: str, seed: int, trials: int) -> StudySpec:
    """The study of one method."""
    spec = load_study(path, {"seed": seed, "trials": trials})
    assert spec.unlearning is not None
    given = spec.unlearning.methods.get(method, GIVEN.get(method, {}))
    methods = {"unlearning.methods": {method: dict(given)}}
    return load_study(path, {"seed": seed, "trials": trials, **methods}).model_copy(update={"audit": None})


def numbers_of(result: StudyResult) -> dict[str, float | None]:
    """The numbers of one study, see above."""
    names = [objective.name for objective in result.objectives[:2]]
    ceilings = [objective.ceiling(result.forget_quality_cap) for objective in result.objectives[:2]]
    corner = np.array([result.reference_point()[name] for name in names])
    initial = result.control("initial")
    assert initial is not None

    def volume(table: pd.DataFrame) -> float:
        rows = [initial[names], *(row for _, row in table[names].iterrows())]
        return float(hypervolume(np.minimum(np.array(rows, dtype=float), ceilings), corner))

    def strongest(table: pd.DataFrame) -> float | None:
        kept = table[table[names[1]] >= FLOOR * float(initial[names[1]])]
        return None if kept.empty else float(min(kept[names[0]].max(), ceilings[0]))

    trained = result.trials[result.trials["alpha"] == 0]
    given, front = volume(trained), volume(result.trials)
    return {
        "given": given,
        "front": front,
        "gain": front / given - 1.0,
        "trained": strongest(trained),
        "forgetting": strongest(result.trials),
        "above": float((result.front["alpha"] > 0).mean()) if len(result.front) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every study")
    parser.add_argument("--study", type=Path, default=quickstart_path(), help="study file; the quickstart when left out")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    configure_ray(None)
    found = {}
    for method in options.methods:
        rows = []
        for seed in range(options.seeds):
            spec = study_of(options.study, method, seed, options.trials)
            rows.append(numbers_of(run_study(spec, options.work / f"{method}-{seed}", quiet=True)))
        found[method] = {
            name: estimate([math.nan if row[name] is None else row[name] for row in rows]).as_dict() for name in rows[0]
        }
    print(json.dumps({"machine": machine(), "study": options.study.stem, "seeds": options.seeds, "methods": found}, indent=1))


if __name__ == "__main__":
    main()
