"""One task of the experiments: builds a world's models, unlearns, walks along the updates, and measures all of it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from search.paper.settings import MODELS, PaperSettings, Task
from search.paper.weights import FloatArray, Place, measure_cosines, measure_projections, projection_rows
from uipe_core.corpora.people import PAPER_STAGES, load_paper_people, unlearning
from uipe_core.corpora.types import RELATED_SETS, Corpus
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.update_vectors import UpdateVector
from uipe_core.metrics.scores import ScoreReport
from uipe_core.metrics.tofu import evaluate, truth_ratio
from uipe_core.models.loading import LoadedModel, Progress, load_model, set_threads
from uipe_core.models.tiny import tiny_model
from uipe_core.scoring.scorer import Scorer
from uipe_core.storage.content_store import ContentStore
from uipe_core.unlearning.gradients import moved_weights
from uipe_core.unlearning.training import train_base_run

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
        "tuning": task.tuning,
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
    config = settings.unlearning(method, task.tuning, task.seed)
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
