"""Record what rounding does to a real model's scores: the same points in fp32 and in bf16, losses only, as two tables.

One base run of SmolLM2-135M-Instruct on the capitals of Europe (`studies/smollm2_countries.yaml`), in one process and without
Ray. In fp32 the weights of a point are summed and scored in single precision; in bf16 the same sum is rounded and scored in
bf16, as a study with such a `model.dtype` does. No text is generated, and items are a part of the study's, so that a point
takes seconds. The base run and every scored point are kept in the work folder: the same command goes on where one ended.

    python -m benchmarks.recorded.rounding --work runs/rounding      # records; 20 minutes on a busy machine
    python -m benchmarks.recorded.rounding                           # describes the shipped tables; one JSON object
"""

import argparse
import json
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
from uipe_core.metrics.composites import composite
from uipe_core.metrics.scores import ScoreReport, set_scores
from uipe_core.models.loading import LoadedModel, set_threads
from uipe_core.scoring.scorer import Scorer, ScoringConfig
from uipe_core.unlearning.training import train_base_run

from .replay import RETAIN_PROBABILITY
from .table import ScoreTable, read_table, write_table

STUDY = Path(__file__).parents[2] / "studies" / "smollm2_countries.yaml"
OBJECTIVES = (FORGETTING["memorization"], RETAIN_PROBABILITY)
METHOD, EPOCHS = "grad_diff", 2
FORGET, RETAIN, WRONG = 12, 16, 2
"""Items of either set, and perturbed answers of an item to forget."""
LOW, HIGH, ALPHAS = -1.0, 2.0, 12
NEAR = (0.5, 0.501, 0.502, 0.504, 0.508, 0.516, 0.532)
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


def table_of(study: PreparedStudy, run: BaseRun, places: Sequence[tuple[int, float]], scores: Sequence[Arrays]) -> ScoreTable:
    """The table of some places; `scores` begins with theta_init."""
    constant = [name for name in scores[0] if name.endswith("_tokens")]
    arrays = {name: each if name in constant else np.stack([of[name] for of in scores[1:]]) for name, each in scores[0].items()}
    arrays, initial = (
        {name: each.astype(np.float32) if each.dtype.kind == "f" else each for name, each in of.items()}
        for of in (arrays, scores[0])
    )
    definition = study.spec.definition
    reports = [ScoreReport({name: set_scores(of, name) for name in ("forget", "retain")}) for of in scores[1:]]
    meta = {
        "study": study.spec.name,
        "seed": study.spec.seed,
        "definition": definition,
        "objectives": [each.name for each in OBJECTIVES],
        "bases": [{"label": METHOD, "method": METHOD, "epochs": EPOCHS}],
        "alpha": {"low": LOW, "high": HIGH},
        "items": {"forget": FORGET, "retain": RETAIN},
        "corner": [0.0, 0.0],
        "ceilings": [None, None],
        "constant": constant,
    }
    return ScoreTable(
        meta=meta,
        base=np.zeros(len(places), dtype=np.int64),
        epoch=np.array([epoch for epoch, _ in places], dtype=np.int64),
        alpha=np.array([alpha for _, alpha in places]),
        objectives=np.array([[composite(each, of.components, definition) for of in OBJECTIVES] for each in reports]),
        arrays=arrays,
        initial=initial,
        retain={},
        gram=gram_matrix([run.load(epoch) for epoch in range(1, EPOCHS + 1)]),
    )


def describe(folder: Path) -> dict[str, Any]:
    """Return what bf16 does to the losses of the tables in a folder, and fp32 for comparison.

    ``scatter``: root mean square of what losses of points 0.001 to 0.032 apart in alpha are off a straight line, as a share of
    the loss; ``by_item`` its quartiles. ``items`` and ``neighbours``: mean correlation of that between items at a point, and
    between points that follow each other. ``bend``: what a bf16 loss differs from the fp32 loss of the same point, as a share:
    root mean square over the grid, correlation between items, and mean by alpha.
    """
    near = {dtype: read_table(folder / f"smollm2-{dtype}-near.npz") for dtype in DTYPES}
    wide = {dtype: read_table(folder / f"smollm2-{dtype}.npz") for dtype in DTYPES}
    found: dict[str, Any] = {}
    for name in ("forget/answer_loss", "retain/answer_loss", "forget/perturbed_loss"):
        one = found[name] = {}
        for dtype, table in near.items():
            losses = np.asarray(table.arrays[name], dtype=np.float64).reshape(len(table), -1)
            line = np.polynomial.polynomial.polyfit(table.alpha, losses, 1)
            off = losses - np.polynomial.polynomial.polyval(table.alpha, line).T
            share = np.sqrt(np.square(off / losses).sum(axis=0) / (len(table) - 2))
            one[dtype] = {
                "scatter": round(float(np.sqrt(np.square(share).mean())), 5),
                "by_item": [round(float(np.quantile(share, q)), 5) for q in (0.0, 0.25, 0.5, 0.75, 1.0)],
                "items": between(off),
                "neighbours": round(float((off[1:] * off[:-1]).sum() / np.square(off).sum()), 2),
            }
        precise, rounded = (
            np.asarray(wide[dtype].arrays[name], dtype=np.float64).reshape(len(wide[dtype]), -1) for dtype in DTYPES
        )
        apart = rounded / precise - 1.0
        one["bend"] = {"size": round(float(np.sqrt(np.square(apart).mean())), 4), "items": between(apart)}
        one["bend"]["mean_by_alpha"] = {
            f"epoch {epoch}": [round(float(each), 3) for each in apart[wide["float32"].epoch == epoch].mean(axis=1)]
            for epoch in range(1, EPOCHS + 1)
        }
    return found


def walked(study: PreparedStudy, run: BaseRun) -> dict[str, list[dict[str, float]]]:
    """How far a bf16 model really walks, by epoch.

    ``by``: 1 + alpha as asked. ``went``: the inner product of the difference between rounded weights with the update vector,
    over the vector's square. ``moved``: the share of weights that differ at all.
    """
    loaded = study.models.source("initial").load(dtype="auto")
    initial = {name: each.detach().float() for name, each in loaded.model.named_parameters()}
    found: dict[str, list[dict[str, float]]] = {}
    for epoch in range(1, EPOCHS + 1):
        update = run.load(epoch)
        for scale in (0.25, 1.0, 2.0, 3.0):
            along = square = moved = count = 0.0
            for name, each in update.tensors.items():
                vector, start = each.float(), initial[name]
                apart = (start + scale * vector).bfloat16().float() - start.bfloat16().float()
                along += float((apart * vector).sum())
                square += float(vector.square().sum())
                moved += float((apart != 0).sum())
                count += apart.numel()
            row = {"by": scale, "went": round(along / square, 3), "moved": round(moved / count, 3)}
            found.setdefault(f"epoch {epoch}", []).append(row)
    return found


def between(errors: NDArray[np.float64]) -> float:
    """Mean correlation between the columns of (points, items)."""
    matrix = np.corrcoef(errors.T)
    count = len(matrix)
    return round(float((matrix.sum() - count) / (count * (count - 1))), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the base run and of scored points; nothing is scored without it")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parents[1] / "tables" / "rounding", help="folder of the tables"
    )
    options = parser.parse_args()
    if options.work is not None:
        set_threads(1)
        options.work.mkdir(parents=True, exist_ok=True)
        study = prepare(load_study(STUDY))
        run = base_run(study, options.work)
        alphas = np.round(np.linspace(LOW, HIGH, ALPHAS + 1)[1:], 6)
        wide = [(epoch, float(alpha)) for epoch in range(1, EPOCHS + 1) for alpha in alphas]
        near = [(EPOCHS, alpha) for alpha in NEAR]
        options.to.mkdir(parents=True, exist_ok=True)
        for dtype in DTYPES:
            for ending, places in (("", wide), ("-near", near)):
                scores = scored(study, run, dtype, places, options.work)
                write_table(table_of(study, run, places, scores), options.to / f"smollm2-{dtype}{ending}.npz")
    # How far was walked needs the weights themselves, everything else the tables.
    print(json.dumps({**describe(options.to), **({} if options.work is None else {"walked": walked(study, run)})}))


if __name__ == "__main__":
    main()
