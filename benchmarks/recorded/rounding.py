"""Record what rounding does to a real model's scores: the same points in fp32 and in bf16, losses only, as two tables.

One base run of SmolLM2-135M-Instruct on the capitals of Europe (`studies/smollm2_countries.yaml`), in one process and without
Ray. In fp32 the weights of a point are summed and scored in single precision; in bf16 the same sum is rounded and scored in
bf16, as a study with such a `model.dtype` does. No text is generated, and items are a part of the study's, so that a point
takes seconds. The base run and every scored point are kept in the work folder: the same command goes on where one ended.

    python -m benchmarks.recorded.rounding --work runs/rounding --to benchmarks/tables/rounding
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.evaluation.evaluator import load_for_scoring
from search.evaluation.prepared import PreparedStudy, prepare
from search.problem.objectives import FORGETTING
from search.spec.study import load_study
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.gram import gram_matrix
from uipe_core.deltas.store import BaseRun, DeltaStore
from uipe_core.models.loading import LoadedModel, set_threads
from uipe_core.scoring.scorer import Scorer, ScoringConfig
from uipe_core.unlearning.training import train_base_run

from .replay import RETAIN_PROBABILITY
from .table import ScoreTable, write_table

STUDY = Path(__file__).parents[2] / "studies" / "smollm2_countries.yaml"
OBJECTIVES = (FORGETTING["memorization"], RETAIN_PROBABILITY)
METHOD, EPOCHS = "grad_diff", 2
FORGET, RETAIN, WRONG = 12, 16, 2
"""Items of either set, and perturbed answers of an item to forget."""
LOW, HIGH, ALPHAS = -1.0, 2.0, 12
CLOSE = (0.501, 0.502, 0.504, 0.508, 0.516, 0.532)
"""Further points of the last epoch, near each other: whether errors of neighbours are alike."""
DTYPES = ("float32", "bfloat16")
MEASUREMENTS = ("answer", "paraphrase", "perturbed", "extraction", "exact")

Arrays = dict[str, NDArray[Any]]


def part_of(corpus: Corpus) -> Corpus:
    """The first items of the sets that the objectives are made of."""
    forget = tuple(replace(item, perturbed_answers=item.perturbed_answers[:WRONG]) for item in corpus.sets["forget"][:FORGET])
    retain = tuple(replace(item, perturbed_answers=()) for item in corpus.sets["retain"][:RETAIN])
    return replace(corpus, sets={"forget": forget, "retain": retain})


def base_run(study: PreparedStudy, work: Path) -> BaseRun:
    """The base run, trained where it is not kept."""
    run = next(each for each in study.spec.variants() if each.method == METHOD)
    config = replace(study.unlearning(run), epochs=EPOCHS)
    store = DeltaStore(work / "deltas")
    inputs = study.base_run_inputs(config)
    found = store.find(inputs)
    if found is None:
        loaded = study.models.source("initial").load(dtype="auto")
        found = store.get_or_train(inputs, train_base_run(loaded, study.corpus, config))
    return found


def losses(scorer: Scorer, loaded: LoadedModel, last: str) -> Arrays:
    """Item scores after the stage that ends with the losses of a set."""
    for report in scorer.stages(loaded):
        if last in report.sets:
            arrays = report.arrays()
            return {name: values for name, values in arrays.items() if name.partition("/")[2].startswith(MEASUREMENTS)}
    raise AssertionError(last)


def scored(study: PreparedStudy, run: BaseRun, dtype: str, places: Sequence[tuple[int, float]], work: Path) -> list[Arrays]:
    """Item scores of theta_init and of every place (epoch, alpha), in a dtype."""
    loaded, walker = load_for_scoring(replace(study.models.source("initial"), dtype=dtype))
    scorer = Scorer(part_of(study.corpus), loaded.prompts, ScoringConfig(batch_size=32))
    found = []
    for epoch, alpha in [(0, -1.0), *places]:
        file = work / f"{dtype}-{epoch}-{alpha:+.3f}.npz"
        if not file.is_file():
            began = time.perf_counter()
            model = walker.apply(run.load(epoch), alpha) if epoch else walker.reset()
            arrays = losses(scorer, replace(loaded, model=model), "retain")
            np.savez(file, **arrays)
            print(f"{file.name}: {time.perf_counter() - began:.1f} s", flush=True)
        with np.load(file) as archive:
            found.append(dict(archive))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the base run and of scored points")
    parser.add_argument("--to", type=Path, required=True, help="folder of the two tables")
    options = parser.parse_args()
    set_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    study = prepare(load_study(STUDY))
    run = base_run(study, options.work)
    alphas = np.round(np.linspace(LOW, HIGH, ALPHAS + 1)[1:], 6)
    places = [(epoch, float(alpha)) for epoch in range(1, EPOCHS + 1) for alpha in alphas] + [(EPOCHS, alpha) for alpha in CLOSE]
    print({dtype: len(scored(study, run, dtype, places, options.work)) for dtype in DTYPES})


if __name__ == "__main__":
    main()
