"""Time a few steps of a study on this machine, or take durations from a finished study."""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from search.evaluation.evaluator import load_for_scoring
from search.evaluation.models import Build, TinyModels
from search.evaluation.prepared import PreparedStudy
from search.evaluation.task import task_of
from search.planning.quantities import MEASURED, PAST, Rates
from search.problem.trial import INITIAL
from search.store.study_store import StudyStore
from uipe_core.corpora.split import Rows, take_items
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.update_vectors import UpdateVector
from uipe_core.errors import UserError
from uipe_core.models.loading import ModelSource, set_threads
from uipe_core.models.tiny import TinyModelConfig, tiny_model
from uipe_core.storage.content_store import ContentStore
from uipe_core.storage.scratch import scratch_folder
from uipe_core.unlearning.alternates import draw_texts, longest_sample
from uipe_core.unlearning.finetuning import FinetuneConfig, finetune, stage_items
from uipe_core.unlearning.training import UnlearningConfig, train_base_run

TIMED_STEPS = 4
"""Optimiser steps that are timed, after a first one that is not."""

PROBE_ITEMS = 1
"""Items of a step that is tried first; where it takes `SLOW_SECONDS`, the step's duration follows from it."""
SLOW_SECONDS = 0.5
"""Seconds from which on the passes of a step take as long as their arithmetic does, in proportion to its items."""

RETAIN_ITEMS = 256
"""Retain items that a timed base run draws from; tokenizing all of them would take longer than the steps."""

WHOLE_SECONDS = 5.0
"""Up to this duration a trial's scoring is timed whole; beyond, it is estimated from a share of the items."""

FIRST_SHARE = 1 / 16

SAMPLED_ITEMS = 2

WARM_SECONDS = 2.0
"""Duration of a first pass from which on what it has warmed up no longer counts."""


def measured_rates(
    preparation: PreparedStudy,
    trains: Iterable[str],
    builds: Iterable[Build],
    say: Callable[[str], None],
    sampled: bool = False,
) -> Rates:
    """Load (or begin to build) the initial model, time a few optimiser steps of every method, and time scoring.

    Args:
        preparation: The study.
        trains: Labels of the base runs that are to be trained; runs of the same method are timed once.
        builds: Models that are to be built.
        say: Called with what is being timed.
        sampled: Whether alternate answers are to be sampled.

    Raises:
        UserError: If the model cannot be loaded, or a method cannot train it.
    """
    set_threads(preparation.spec.resources.trial.threads)
    with scratch_folder() as scratch:
        store = ContentStore(scratch)
        seconds: dict[str, float] = {}
        known: dict[FinetuneConfig, float] = {}
        for build in builds:
            config = build.config
            if isinstance(config, FinetuneConfig):  # one duration for both models: of an item
                if config not in known:
                    say("timing a few steps of fine-tuning")
                    known[config] = _seconds_to_learn(config, preparation)
                seconds[build.key] = known[config] * config.epochs * len(stage_items(preparation.corpus, build.stage))
                continue
            say(f"timing a few steps of building a small model ({build.stage})")
            seconds[build.key] = _seconds_to_build(config, preparation.corpus, build.stage, store)
        source = _initial(preparation, store)
        epochs, update = _epochs(preparation, source, set(trains), say)
        say("timing the scoring of a few items")
        trial, whole, load, size = _scoring(preparation, source, update)
        sample = None
        if sampled:
            say("timing the sampling of a few alternate answers")
            sample = _seconds_of_a_sample(preparation.corpus, source)
    return Rates(MEASURED, epochs, sum(seconds.values()), trial, whole, size, load, sample)


def _seconds_of_a_sample(corpus: Corpus, source: ModelSource) -> float:
    loaded = source.load(dtype="auto")
    limit = longest_sample(loaded, corpus.forget_train)
    started = time.perf_counter()
    drawn = draw_texts(loaded, corpus.forget_train[:SAMPLED_ITEMS], limit)
    return (time.perf_counter() - started) / sum(map(len, drawn))


def _initial(preparation: PreparedStudy, store: ContentStore) -> ModelSource:
    """Return the initial model, or one of its shape where it is not built yet: the base model, or a tiny one begun."""
    models = preparation.models
    if not isinstance(models, TinyModels):
        return models.source(INITIAL)
    folder = models.store.find(models.key("full", models.config))
    return models.source(INITIAL, str(folder or _begun(models.config, preparation.corpus, "full", store)))


def _begun(config: TinyModelConfig, corpus: Corpus, stage: str, store: ContentStore, note: Any = None) -> Path:
    """Train a tiny model for the first few steps of a stage, with its whole vocabulary."""
    settings = config.base if stage == "base" and config.base is not None else config.finetune
    items = corpus.build[stage][: settings.batch_size * (TIMED_STEPS + 1)]
    texts = [text for group in corpus.build.values() for item in group for text in (item.question + "\n", item.answer)]
    short = replace(settings, epochs=1)
    base = short if stage == "base" and config.base is not None else None
    few = replace(config, base=base, finetune=short, extra_texts=(*config.extra_texts, *texts))
    return tiny_model(few, replace(corpus, build={stage: items}), stage, store, note)


def _seconds_to_build(config: TinyModelConfig, corpus: Corpus, stage: str, store: ContentStore) -> float:
    clock = _Clock()
    _begun(config, corpus, stage, store, clock)
    settings = config.base if stage == "base" and config.base is not None else config.finetune
    return clock.step * settings.epochs * -(-len(corpus.build[stage]) // settings.batch_size)


def _seconds_to_learn(config: FinetuneConfig, preparation: PreparedStudy) -> float:
    """Return seconds of fine-tuning on an item: of two steps, the second."""
    clock = _Clock()
    items = stage_items(preparation.corpus, "full")[: 2 * config.batch_size]
    source = preparation.models.source(INITIAL)
    finetune(source.load(dtype="auto"), items, replace(config, epochs=1), source.dtype, clock)
    return clock.step / config.batch_size


@dataclass(frozen=True)
class _Step:
    """Seconds of an optimiser step: of its forward and backward passes, and of the optimiser, whatever the items."""

    passes: float
    optimizer: float


class _Clock:
    """Record when steps end; step 0 is the begin of the first."""

    def __init__(self) -> None:
        self._ends: dict[int, float] = {}

    def __call__(self, done: int, total: int) -> None:
        self._ends[done] = time.perf_counter()

    @property
    def last(self) -> float:
        return max(self._ends.values())

    @property
    def step(self) -> float:
        """Seconds of a step: the first is left out where there are others, because it warms everything up."""
        seconds = {done: end - self._ends[done - 1] for done, end in self._ends.items() if done - 1 in self._ends}
        return statistics.median([later for done, later in seconds.items() if done > 1] or [seconds.get(1, 0.0)])


def _epochs(
    preparation: PreparedStudy, source: ModelSource, trains: set[str], say: Callable[[str], None]
) -> tuple[dict[str, float], UpdateVector | None]:
    """Return seconds of an epoch of each base run, its update vector included; and one such vector."""
    by_method: dict[str, float] = {}
    update, slow = None, None
    corpus = preparation.corpus
    runs = [run for run in preparation.spec.variants() if run.label in trains]
    for run in runs:
        if run.method in by_method:
            continue
        say(f"timing a few steps of {run.method}")
        config = replace(preparation.unlearning(run), epochs=1)
        step_items = config.batch_size * config.gradient_accumulation
        probe = min(PROBE_ITEMS, step_items)
        few = replace(config, batch_size=probe, gradient_accumulation=1)
        step, rest, update = _timed_steps(source, corpus, few, probe, 1 if slow is None else 0)
        if slow is not None:  # the passes of a first step are warm by now, its optimiser's state is not
            step = replace(step, optimizer=min(step.optimizer, slow.optimizer))
        elif step.passes + step.optimizer < SLOW_SECONDS:
            step, rest, update = _timed_steps(source, corpus, config, step_items, TIMED_STEPS)
            probe = step_items
        else:
            slow = step
        seconds = step.passes * step_items / probe + step.optimizer
        by_method[run.method] = -(-len(corpus.forget_train) // step_items) * seconds + rest
    return {run.label: by_method[run.method] for run in runs}, update


def _timed_steps(
    source: ModelSource, corpus: Corpus, config: UnlearningConfig, items: int, steps: int
) -> tuple[_Step, float, UpdateVector]:
    """Return the duration of a step after a first one, seconds of taking the update vector, and that vector.

    Where `steps` is 0, or an epoch is a single step, it is the duration of the first.
    """
    few = replace(
        corpus, forget_train=corpus.forget_train[: items * (steps + 1)], retain_train=corpus.retain_train[:RETAIN_ITEMS]
    )
    # As long as the alternates that will be sampled, and nothing else counts here.
    few = replace(few, alternates=tuple((item.answer,) for item in few.forget_train))
    clock = _Clock()
    with _optimizer_seconds() as optimizer:
        update = next(train_base_run(source.load(dtype="auto"), few, config, clock)).update
    ended = time.perf_counter()
    in_optimizer = statistics.median(optimizer[1:] or optimizer)
    return _Step(clock.step - in_optimizer, in_optimizer), ended - clock.last, update


@contextlib.contextmanager
def _optimizer_seconds() -> Iterator[list[float]]:
    """Collect the seconds of every optimiser's step meanwhile."""
    seconds: list[float] = []
    before = register_optimizer_step_pre_hook(lambda *_: seconds.append(-time.perf_counter()))
    after = register_optimizer_step_post_hook(lambda *_: seconds.append(time.perf_counter() + seconds.pop()))
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()


def _scoring(preparation: PreparedStudy, source: ModelSource, update: UpdateVector | None) -> tuple[float, float, float, float]:
    """Return seconds of a trial, of scoring all items and of loading the model; and bytes of a trial's item scores."""
    started = time.perf_counter()
    loaded, walker = load_for_scoring(source)
    load = time.perf_counter() - started
    select = preparation.split.select
    rows = _share(select, FIRST_SHARE)
    seconds, size = _timed_scores(preparation, rows, loaded)
    if seconds < WARM_SECONDS:
        rows = select if seconds / FIRST_SHARE <= WHOLE_SECONDS else rows
        seconds, size = _timed_scores(preparation, rows, loaded)
    corpus = preparation.corpus
    scored, chosen = (_characters(take_items(corpus, part)) for part in (rows, select))
    half = seconds * chosen / scored
    apply = 0.0
    if update is not None:
        started = time.perf_counter()
        walker.apply(update, 0.5)
        apply = time.perf_counter() - started
    return half + apply, seconds * _characters(corpus) / scored, load, size * half / seconds


def _characters(corpus: Corpus) -> int:
    """Return how much text is scored: a few items of some corpora are as long as all others together."""
    items = [item for group in corpus.sets.values() for item in group]
    texts = [text for item in items for text in (item.question, item.answer, item.paraphrase, *item.perturbed_answers)]
    choices = [text for group in corpus.choices.values() for item in group for text in (item.question, *item.choices)]
    return sum(map(len, (*texts, *choices)))


def _share(rows: Rows, share: float) -> Rows:
    """Take every n-th item of each set, short and long ones among them."""
    return {name: chosen[:: max(1, round(1 / share))] for name, chosen in rows.items()}


def _timed_scores(preparation: PreparedStudy, rows: Rows, loaded: Any) -> tuple[float, int]:
    chosen = take_items(preparation.corpus, rows)
    scorer = task_of(chosen).scorer(chosen, loaded.prompts, preparation.scoring)
    report = scorer.score(loaded)
    # Not what a worker does once, such as finding out how this model can be read.
    seconds = sum(report.seconds.values())
    with tempfile.TemporaryFile() as stream:
        arrays: dict[str, Any] = dict(report.arrays())
        np.savez_compressed(stream, **arrays)
        return seconds, os.fstat(stream.fileno()).st_size


def past_rates(folder: Path, preparation: PreparedStudy, trains: Iterable[str], builds: int) -> Rates:
    """Return the rates of a finished study: medians of its epochs and trials.

    Args:
        folder: Where it was run.
        preparation: The study that is planned.
        trains: Labels of the base runs that are to be trained.
        builds: Small models that are to be built; the other study is taken to have built as many.

    Raises:
        UserError: If the folder holds no study, one of another model or corpus, or none of what is asked for is in it.
    """
    store = StudyStore.open(folder)
    record, trials = store.record, store.trials_frame()
    store.close()
    # What is not on this machine is known by its name only, and the corpus by its section of the study file.
    model, own = record.models.get(INITIAL, ""), preparation.models.identities[INITIAL]
    corpus_known = bool(preparation.corpus.sets or preparation.corpus.forget_train)
    same = {
        "model": model == own or model.startswith(f"{own}@"),
        "corpus": record.corpus.hash == preparation.corpus.hash
        if corpus_known
        else store.spec.corpus == preparation.spec.corpus,
    }
    if not all(same.values()):
        other = " and ".join(name for name, equal in same.items() if not equal)
        raise UserError(
            f"--like {folder}: it is a study of another {other}; give one of the same, or leave it out to time it here"
        )
    if trials.empty:
        raise UserError(f"--like {folder}: no trial of it is complete; give a finished study, or leave it out to time it here")
    past = {
        label: statistics.median(epoch["seconds"] for epoch in run.epochs)
        for label, run in record.base_runs.items()
        if run.epochs and all("seconds" in epoch for epoch in run.epochs)
    }
    trains = list(trains)
    if trains and not past:
        raise UserError(f"--like {folder}: it has no base runs to take times from; leave it out to time them here")
    # A base run that was not in the other study is taken to be as slow as the slowest that was.
    epochs = {label: past.get(label, max(past.values())) for label in trains}
    trial = float(trials["seconds"].median())
    scored = sum(record.corpus.items["select"].values())
    halves = record.corpus.items
    everything = scored + (sum(halves["report"].values()) if store.spec.split is not None else 0)
    sizes = [path.stat().st_size for path in (folder / "items" / "trials").glob("*.npz")]
    size = statistics.median(sizes) if sizes else 0.0
    return Rates(PAST, epochs, record.seconds["models"] if builds else 0.0, trial, trial * everything / scored, size)
