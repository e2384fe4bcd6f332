"""Coverage of the intervals, false differences among equal trials, and false alarms of the paired test, by simulation.

People are drawn with effects of their own, items within them; the truth is what the same number of people gives on average.
Baselines in the same run: percentile intervals, and sign changes item by item. Prints one JSON object.

    python benchmarks/coverage.py --repeats 400
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from uipe_core.metrics.tofu import harmonic_mean
from uipe_core.metrics.uncertainty import (
    LEVEL,
    bootstrap_forget_quality,
    bootstrap_harmonic_mean,
    group_weights,
    indistinguishable,
    intervals,
    paired_permutation,
)

PER_PERSON = 20
SHIFT = 1.0
"""Between the log truth ratios of the model and of the reference, in standard deviations of an item within a person."""

TRIALS = 6


def ratios(people: int, shift: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log truth ratios of a model and its reference on the same items; half of a person's effect is shared."""
    shared, own, other = generator.normal(0, np.sqrt(0.5), (3, people, 1))
    noise = generator.normal(0, 1, (2, people, PER_PERSON))
    return (shared + own + shift + noise[0]).ravel(), (shared + other + noise[1]).ravel()


def components(people: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Three components of utility in [0, 1] per item, with effects of persons."""
    found = {}
    for name, centre in (("probability", 1.0), ("rouge", 0.5), ("truth ratio", 0.0)):
        values = centre + generator.normal(0, 0.7, (people, 1)) + generator.normal(0, 1, (people, PER_PERSON))
        found[name] = (1 / (1 + np.exp(-values))).ravel()
    return found


def coverage(people: int, repeats: int) -> dict[str, float]:
    """Share of intervals that hold the truth, expanded and percentile, of both objectives."""
    generator = np.random.default_rng(people)
    ones = np.ones((1, people * PER_PERSON))
    fq_truth = np.mean([bootstrap_forget_quality(*ratios(people, SHIFT, generator), ones)[0] for _ in range(4000)])
    means = [[part.mean() for part in components(people, generator).values()] for _ in range(4000)]
    mu_truth = float(harmonic_mean(np.mean(means, axis=0)))
    hits: dict[str, list[bool]] = {}
    for repeat in range(repeats):
        weights = group_weights([str(item // PER_PERSON) for item in range(people * PER_PERSON)], repeat)
        utility = components(people, generator)
        draws = {
            "log10_forget_quality": (bootstrap_forget_quality(*ratios(people, SHIFT, generator), weights), fq_truth),
            "model_utility": (bootstrap_harmonic_mean(utility, dict.fromkeys(utility, weights)), mu_truth),
        }
        for name, (values, truth) in draws.items():
            plain = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            for kind, (low, high) in (("", intervals(values, people)), ("_percentile", plain)):
                hits.setdefault(f"{name}{kind}", []).append(bool(low <= truth <= high))
    return {name: round(float(np.mean(found)), 3) for name, found in hits.items()}


def false_alarms(people: int, repeats: int) -> dict[str, float]:
    """Share of studies that find a difference where there is none."""
    generator = np.random.default_rng(1000 + people)
    names = [str(item // PER_PERSON) for item in range(people * PER_PERSON)]
    found: dict[str, list[bool]] = {"trials_apart": [], "paired_p": [], "paired_p_by_item": []}
    for repeat in range(repeats):
        weights = group_weights(names, repeat)
        base, reference = ratios(people, SHIFT, generator)
        columns = []
        for _ in range(TRIALS):
            change = generator.normal(0, 0.5, (people, 1)) + generator.normal(0, 0.5, (people, PER_PERSON))
            utility = components(people, generator)
            columns.append(
                np.stack(
                    [
                        bootstrap_forget_quality(base + change.ravel(), reference, weights),
                        bootstrap_harmonic_mean(utility, dict.fromkeys(utility, weights)),
                    ],
                    axis=1,
                )
            )
        found["trials_apart"].append(len(set(indistinguishable(np.stack(columns, axis=1), people))) > 1)
        same, other = ratios(people, 0.0, generator)
        found["paired_p"].append(paired_permutation(same, other, repeat, names) < 1 - LEVEL)
        found["paired_p_by_item"].append(paired_permutation(same, other, repeat) < 1 - LEVEL)
    return {name: round(float(np.mean(found)), 3) for name, found in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, nargs="+", default=[2, 5, 10, 20, 40], help="numbers of people")
    parser.add_argument("--repeats", type=int, default=400, help="simulated studies of each")
    given = parser.parse_args()
    table = {
        people: {"coverage": coverage(people, given.repeats), "false": false_alarms(people, max(20, given.repeats // 4))}
        for people in given.people
    }
    table_of = {"level": LEVEL, "repeats": given.repeats, "items_per_person": PER_PERSON, "people": table}
    json.dump(table_of, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
