"""One task of the experiments: builds a world's models, unlearns, walks along the updates, and measures all of it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from search.paper.settings import MODELS, PaperSettings, Task
from search.paper.statistics import correlation
from uipe_core.corpora.people import PAPER_STAGES, fact_pairs, load_paper_people, unlearning
from uipe_core.corpora.types import RELATED_SETS, Corpus
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.update_vectors import UpdateVector
from uipe_core.metrics.scores import ScoreReport
from uipe_core.metrics.tofu import evaluate, truth_ratio
from uipe_core.models.loading import LoadedModel, Progress, load_model, set_threads
from uipe_core.models.tiny import tiny_model
from uipe_core.scoring.scorer import Scorer
from uipe_core.storage.content_store import ContentStore
from uipe_core.unlearning.gradients import (
    cosine,
    dot,
    first_order_rise,
    flat_update,
    item_gradient,
    mean_gradient,
    moved_weights,
    norm,
    pair_cosines,
    predicted_projection,
)
from uipe_core.unlearning.training import train_base_run

FloatArray = NDArray[np.float64]
Place = tuple[str, int]
"""A method and an epoch."""

OTHER_RETAIN = "retain_other"
"""A second retain model, of another seed: what forget quality is worth between models that never saw the forget set."""

_OTHER_SEED = 1000


@dataclass(frozen=True)
class Run:
    """A base run of one of the models of table 1: its update of every epoch, the first at index 0."""

    model: str
    method: str
    updates: list[UpdateVector]


def run_task(settings: PaperSettings, task: Task, store: ContentStore, progress: Progress | None = None) -> dict[str, Any]:
    """Everything measured for one seed and one way of fine-tuning.

    Args:
        settings: What to run.
        task: Which seed, which fine-tuning.
        store: Cache of tiny models.
        progress: Called with (steps done, steps in all); a step is a model, a base run, a pass over gradients or a scoring.

    Returns:
        Strict JSON: ``models`` (a row per model before unlearning), ``points`` (a row per scored place of a base run),
        ``cosines`` and ``projections`` (equations 2, 4 and 6), ``seconds``.

    Raises:
        UserError: If the cache cannot be written.
    """
    set_threads(1)
    started = time.perf_counter()
    step = _counter(_steps(settings), progress)
    sizes = (settings.forget_people, settings.retain_people, settings.pretraining_people)
    corpus = load_paper_people(task.seed, *sizes)
    folders = _build_models(settings, task.seed, corpus, store, step)
    scorer = Scorer(corpus, load_model(folders["retain"], device="cpu").prompts, settings.scoring)

    def score(model: LoadedModel) -> ScoreReport:
        report = scorer.score(model)
        step()
        return report

    reports = {name: score(load_model(folder, device="cpu")) for name, folder in folders.items()}
    reference = reports["retain"]
    models = [{"name": name, **_numbers(report, reference, settings.definition)} for name, report in reports.items()]
    runs = [_train(settings, task, corpus, folders, model, method, step) for model, method in _planned(settings)]

    loaded = load_model(folders["full"], device="cpu")
    walked = {(run.method, epoch + 1): update for run in runs if run.model == "M1" for epoch, update in enumerate(run.updates)}
    cosines = measure_cosines(loaded, corpus, moved_weights(next(iter(walked.values()))), task.seed)
    step()
    projections = measure_projections(loaded, corpus, walked)
    step()

    points: list[dict[str, Any]] = []
    rises: dict[tuple[Place, float], dict[str, FloatArray]] = {}
    for run in runs:
        start = reports[MODELS[run.model][0]]
        loaded = load_model(folders[MODELS[run.model][0]], device="cpu")
        walker = Extrapolator(loaded.model)
        points.append({**_place(run, 0, 0.0), **_numbers(start, reference, settings.definition)})
        for epoch, alpha in _walk(settings, run.model):
            report = score(replace(loaded, model=walker.apply(run.updates[epoch - 1], alpha)))
            points.append({**_place(run, epoch, alpha), **_numbers(report, reference, settings.definition)})
            if run.model == "M1":
                rises[(run.method, epoch), alpha] = {
                    name: report.sets[name].answer_loss - start.sets[name].answer_loss for name in RELATED_SETS
                }
    return {
        "seed": task.seed,
        "tuning": task.part,
        "corpus": corpus.name,
        "corpus_hash": corpus.hash,
        "items": {name: len(items) for name, items in corpus.sets.items()},
        "models": models,
        "points": points,
        "cosines": cosines,
        "projections": _finite(projection_rows(projections, rises)),
        "seconds": time.perf_counter() - started,
    }


def _planned(settings: PaperSettings) -> list[tuple[str, str]]:
    """Base runs: M1 by every method, the other models of table 1 by those of the table."""
    others = [(model, method) for model in MODELS if model != "M1" for method in settings.table_methods]
    return [*(("M1", method) for method in settings.methods), *others]


def _walk(settings: PaperSettings, model: str) -> list[tuple[int, float]]:
    """Scored (epoch, alpha): every trained epoch, and for M1 every alpha from each of them but the last."""
    plain = [(epoch, 0.0) for epoch in range(1, settings.epochs + 2)]
    if model != "M1":
        return plain
    return plain + [(epoch, alpha) for epoch in range(1, settings.epochs + 1) for alpha in settings.alphas]


def _steps(settings: PaperSettings) -> int:
    planned = _planned(settings)
    scorings = len(PAPER_STAGES) + 1 + sum(len(_walk(settings, model)) for model, _ in planned)
    return len(PAPER_STAGES) + 1 + len(planned) + 2 + scorings


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step


def _build_models(
    settings: PaperSettings, seed: int, corpus: Corpus, store: ContentStore, step: Callable[[], None]
) -> dict[str, str]:
    """Folders of the models of every stage, and of the second retain model."""
    wanted = [(stage, stage, seed) for stage in PAPER_STAGES] + [(OTHER_RETAIN, "retain", seed + _OTHER_SEED)]
    folders = {}
    for name, stage, model_seed in wanted:
        folders[name] = str(tiny_model(settings.model(model_seed), corpus, stage, store))
        step()
    return folders


def _train(
    settings: PaperSettings,
    task: Task,
    corpus: Corpus,
    folders: Mapping[str, str],
    model: str,
    method: str,
    step: Callable[[], None],
) -> Run:
    stage, parts = MODELS[model]
    loaded = load_model(folders[stage], device="cpu")
    config = settings.unlearning(method, task.part, task.seed)
    updates = [result.update for result in train_base_run(loaded, unlearning(corpus, parts), config)]
    step()
    return Run(model, method, updates)


def _place(run: Run, epoch: int, alpha: float) -> dict[str, Any]:
    return {"model": run.model, "method": run.method, "epoch": epoch, "alpha": alpha}


def _numbers(report: ScoreReport, reference: ScoreReport, definition: str) -> dict[str, Any]:
    """Return what a row says about a model: log10 forget quality on K1, K2, K0, utility, mean losses and truth ratios."""
    metrics = evaluate(report, reference, definition)
    quality = {"k1": metrics.forget_quality, "k2": metrics.related["related"], "k0": metrics.related["unrelated"]}
    row: dict[str, Any] = {name: found.log10_p for name, found in quality.items() if found is not None}
    row["utility"] = metrics.model_utility
    for name, part in (("k1", "forget"), ("k2", "related"), ("k0", "unrelated")):
        scores = report.sets[part]
        row[f"{name}_loss"] = float(scores.answer_loss.mean())
        ratios = truth_ratio(scores.paraphrase_loss, scores.perturbed_loss, definition)
        row[f"{name}_log_truth_ratio"] = float(np.log(np.clip(ratios, 1e-300, 1e300)).mean())
    row["logit_scale"] = report.logit_scale
    return row


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers that do not exist become null, as JSON has it."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]


def measure_cosines(loaded: LoadedModel, corpus: Corpus, weights: Sequence[str], seed: int) -> dict[str, list[float]]:
    """Equation 2: cosine of the gradients of each K1 fact and another fact, by how the two hang together."""
    kinds = fact_pairs(corpus, seed)
    # Pairs of one K1 fact lie together, so that its gradient is made once.
    found = pair_cosines(loaded, [pair for row in zip(*kinds.values(), strict=True) for pair in row], weights)
    return {kind: found[place :: len(kinds)].tolist() for place, kind in enumerate(kinds)}


@dataclass(frozen=True)
class Projections:
    """Hold what the gradients at theta_init say about every update.

    Attributes:
        norms: |delta| by place.
        alignments: Cosine of delta and the mean K1 gradient by place: 1 is what equations 4 and 6 presume.
        cosines: (n,) cosine of the mean K1 gradient and each item's gradient, by set.
        lengths: (n,) norm of each item's gradient, by set.
        dots: (n,) <delta, gradient of item>, by set and place.
    """

    norms: Mapping[Place, float]
    alignments: Mapping[Place, float]
    cosines: Mapping[str, FloatArray]
    lengths: Mapping[str, FloatArray]
    dots: Mapping[tuple[str, Place], FloatArray]


def measure_projections(loaded: LoadedModel, corpus: Corpus, updates: Mapping[Place, UpdateVector]) -> Projections:
    """One pass over the gradients of K1, K2 and K0 facts, held against every update."""
    weights = moved_weights(next(iter(updates.values())))
    deltas: dict[Place, Tensor] = {place: flat_update(update) for place, update in updates.items()}
    target = mean_gradient(loaded, corpus.sets["forget"], weights)
    cosines, lengths = {}, {}
    dots: dict[tuple[str, Place], FloatArray] = {}
    for name in RELATED_SETS:
        rows = []
        for item in corpus.sets[name]:
            gradient = item_gradient(loaded, item, weights)
            along = [first_order_rise(delta, gradient) for delta in deltas.values()]
            rows.append([cosine(target, gradient), norm(gradient), *along])
        table = np.array(rows, dtype=np.float64)
        cosines[name], lengths[name] = table[:, 0], table[:, 1]
        dots.update({(name, place): table[:, 2 + column] for column, place in enumerate(deltas)})
    return Projections(
        norms={place: norm(delta) for place, delta in deltas.items()},
        alignments={place: dot(delta, target) / (norm(delta) * norm(target)) for place, delta in deltas.items()},
        cosines=cosines,
        lengths=lengths,
        dots=dots,
    )


def projection_rows(found: Projections, rises: Mapping[tuple[Place, float], Mapping[str, FloatArray]]) -> list[dict[str, Any]]:
    """Predicted against measured, a row per place, alpha and set.

    Args:
        found: The projections at alpha = 0; equation 6 multiplies both sides by 1 + alpha.
        rises: (n,) measured rise of each item's loss (nats per answer token) since theta_init, by place and alpha, by set.

    Returns:
        Rows of ``method``, ``epoch``, ``alpha``, ``set``; means over items of the ``predicted`` and ``measured``
        projection, in units of weights, and their ``correlation`` over items; mean ``first_order`` and measured ``rise`` of
        the loss in nats, and their ``rise_correlation``; ``norm`` of (1 + alpha) delta, and its ``alignment`` with the
        mean K1 gradient (a cosine).
    """
    rows = []
    for (place, alpha), by_set in rises.items():
        for name, rise in by_set.items():
            dots = (1.0 + alpha) * found.dots[name, place]
            measured = dots / found.lengths[name]
            predicted = predicted_projection(found.norms[place], 1.0, alpha) * found.cosines[name]
            rows.append(
                {
                    "method": place[0],
                    "epoch": place[1],
                    "alpha": alpha,
                    "set": name,
                    "norm": (1.0 + alpha) * found.norms[place],
                    "alignment": found.alignments[place],
                    "predicted": float(predicted.mean()),
                    "measured": float(measured.mean()),
                    "correlation": correlation(predicted, measured),
                    "first_order": float(dots.mean()),
                    "rise": float(rise.mean()),
                    "rise_correlation": correlation(dots, rise),
                }
            )
    return rows
