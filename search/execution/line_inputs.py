"""Feed the `line` sampler during a run: Gram matrix rows, losses and points scored so far."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ray
from optuna.samplers import BaseSampler

from search.evaluation.evaluator import StudyContext
from search.execution.base_runs import BaseRuns, problem_of
from search.execution.workers import grow_gram
from search.problem.trial import INITIAL, RETAIN
from search.samplers.gram import FILE, Runs, StudyGram, keep_gram, kept_gram
from search.samplers.line import LineSampler, LineStudy, UpdateVectors
from search.samplers.outcomes import OutcomeModel
from search.store.study_store import StudyStore
from uipe_core.corpora.split import take_items
from uipe_core.metrics.scores import ScoreReport
from uipe_core.storage.remote_store import RemoteLocation

PATIENCE = 20.0
"""Seconds that proposals wait, all in all, for the first inner products: where models are small, they are there sooner."""

_RETRIES = 2


class InnerProducts:
    """Get the inner products of all update vectors that are there; those of further base runs when they have come.

    Args:
        runs: The base runs as they come.
        epochs: Epochs that are searched, by base run.
        deltas: Root of the delta store.
        out: Folder of the study.
        say: Called with a message on the first failure.
    """

    def __init__(
        self, runs: BaseRuns, epochs: Mapping[str, int], deltas: Path | RemoteLocation, out: Path, say: Callable[[str], None]
    ) -> None:
        self._runs, self._epochs, self._deltas, self._file, self._say = runs, epochs, deltas, out / FILE, say
        self._patience = PATIENCE
        self._task: tuple[frozenset[str], ray.ObjectRef[StudyGram]] | None = None
        self._failed: set[frozenset[str]] = set()
        self._lines: UpdateVectors | None = None
        self._known = kept_gram(self._file).among(self._there())
        self._take(self._known)

    def poll(self, timeout: float = 0.0) -> None:
        """Start what is missing, and takes what has come within `timeout` seconds."""
        there = self._there()
        wanted = frozenset(there)
        if self._task is None and wanted > set(self._known.runs) and wanted not in self._failed:
            task = ray.remote(num_cpus=0, max_retries=_RETRIES)(grow_gram)
            self._task = (wanted, task.remote(self._known, there, self._deltas))
        if self._task is None or not ray.wait([self._task[1]], timeout=timeout)[0]:
            return
        (wanted, reference), self._task = self._task, None
        try:
            found = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._failed.add(wanted)
            reason = str(problem_of("inner products of the update vectors", error))
            self._say(f"failed: {reason}; the sampler goes on without them")
            return
        self._take(found)
        keep_gram(self._file, found)

    def lines(self) -> UpdateVectors | None:
        """The update vectors whose inner products are known; None if there are none yet, after a little patience."""
        started = time.monotonic()
        self.poll()
        while self._lines is None and self._task is not None and self._patience > 0:
            self.poll(0.2)
            now = time.monotonic()
            self._patience, started = self._patience - (now - started), now
        return self._lines

    def cancel(self) -> None:
        """End a task that is still at work."""
        if self._task is not None:
            ray.cancel(self._task[1], force=True)
            self._task = None

    def _there(self) -> Runs:
        """Base runs that are there: their entries in the store and their epochs."""
        published = self._runs.published
        return {label: (published[label], count) for label, count in self._epochs.items() if label in published}

    def _take(self, gram: StudyGram) -> None:
        self._known = gram
        if gram.runs:
            self._lines = UpdateVectors(gram.places, gram.gram)


def line_sampler(
    store: StudyStore,
    context: StudyContext,
    lines: Callable[[], UpdateVectors | None],
    fallback: BaseSampler,
    seed: int,
    say: Callable[[str], None],
) -> LineSampler:
    """The sampler of a study whose trials are scored on free text.

    Args:
        store: The open study.
        context: Its reference models, and which of their items trials are scored on.
        lines: Update vectors that are there, and their inner products.
        fallback: Proposes until there are any.
        seed: Of the draws.
        say: Called with a message when the sampler lacks an input.
    """
    spec, rows = store.spec, context.split.select
    hashes = take_items(context.corpus, rows).set_hashes
    reports = {name: report for name, report in context.references.items() if isinstance(report, ScoreReport)}
    known = {name: report.take(rows, hashes).arrays() for name, report in reports.items()}

    def reference() -> tuple[Sequence[float], Sequence[float]]:
        point, cap = store.reference_point(), store.noise_ceiling(store.controls_frame())
        names = [objective.name for objective in store.objectives]
        return [point[name] for name in names], [objective.ceiling(cap) for objective in store.objectives]

    world = LineStudy(
        epochs=spec.base_epochs(),
        alpha=spec.search.alpha.ends,
        ranges=spec.alpha_ranges(),
        curves=OutcomeModel(spec.definition, store.objectives, known.get(RETAIN)),
        initial=known[INITIAL],
        reference=reference,
        items=store.items,
        lines=lines,
    )
    return LineSampler(world, spec.search_space(), fallback, seed, say)
