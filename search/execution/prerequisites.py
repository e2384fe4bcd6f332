"""Get what trials need, as Ray tasks: models, the scores of the reference models, and base runs."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from search.evaluation.evaluator import StudyContext
from search.evaluation.inputs import check_references
from search.evaluation.models import Build, PretrainedModels, ReferenceModel, model_cache
from search.evaluation.prepared import PreparedStudy
from search.evaluation.task import Report, task_of
from search.execution.base_runs import POLL_SECONDS, BaseRunEvent, BaseRunTasks, problem_of, train_in_processes
from search.execution.budget import BudgetMonitor
from search.execution.capacity import ClusterCapacity
from search.execution.workers import build_model, import_and_publish, sample_and_keep, score_model, train_and_publish
from search.problem.trial import INITIAL, NEVER_FINETUNED, RETAIN, retrained
from search.report.progress import Bars
from search.spec.runtime import Audit, BaseRunResources, TrialResources
from search.store.folder import keep_traceback
from search.store.study_store import StudyStore
from uipe_core.corpora.split import take_items
from uipe_core.deltas.checkpoints import find_checkpoints
from uipe_core.deltas.store import BaseRun, DeltaStore
from uipe_core.errors import UserError
from uipe_core.metrics.scores import ScoreReport, SetScores, require_same_items
from uipe_core.models.loading import ModelSource
from uipe_core.scoring.scorer import COMPARED_SETS
from uipe_core.storage.content_store import content_key
from uipe_core.storage.files import write_atomic
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.training import UnlearningConfig

TASK_RETRIES = 5
"""How often Ray runs a task again whose worker or node died: a machine that may be taken away is, while a model trains."""
SCORES = "scores.json"
"""Evaluation log of a reference model in the cache."""
BOARD_SECONDS = 5.0
"""How long an answer about progress is waited for."""


@dataclass
class Prerequisites:
    """Build, trains and scores what the caches and the study's folder lack.

    Attributes:
        preparation: The study.
        store: Its folder, where the logs of the reference models are kept.
        bars: Progress.
        board: Actor that tasks report their progress to.
        capacity: The cluster.
        guard: Counts the time that base runs have used.
    """

    preparation: PreparedStudy
    store: StudyStore
    bars: Bars
    board: Any
    capacity: ClusterCapacity
    guard: BudgetMonitor
    _shown: float = 0.0
    _alternates: tuple[tuple[str, ...], ...] = ()

    def begin(self, seeds: Iterable[int] = (), labels: Iterable[str] = ()) -> tuple[StudyContext, BaseRunTasks]:
        """Build models and score references; base runs begin meanwhile and may go on afterwards.

        Args:
            seeds: Further seeds to train base runs with.
            labels: Which base runs to train with them.

        Returns:
            Everything a worker needs to score any job of the study whose base run is there; and the base runs.
        """
        spec = self.preparation.spec
        with self._stage("models"):
            sources = self._sources()
        tasks = self._base_runs(sources["initial"], [(label, seed) for seed in seeds for label in labels])
        try:
            with self._stage("references"):
                reports = self._reports(sources, tasks)
            if any(objective.compares_with_initial for objective in spec.maximised):
                initial = reports[INITIAL]
                assert isinstance(initial, ScoreReport)
                reports[INITIAL] = initial.compared_with_itself(COMPARED_SETS)
            self._check(reports)
            identities = self.preparation.models.identities
            for warning in check_references(reports, identities, spec.maximised, spec.definition):
                self.bars.say(f"warning: {warning}")
        except BaseException:
            tasks.cancel()
            raise
        self.store.least_utility = self._least_utility(reports)
        context = StudyContext(
            corpus=self.preparation.corpus,
            split=self.preparation.split,
            source=_spread(sources["initial"], spec.resources.trial),
            deltas=self.preparation.delta_root,
            references=reports,
            scoring=self.preparation.scoring,
            definition=spec.definition,
            objectives=spec.maximised,
            seed=spec.seed,
            threads=spec.resources.trial.threads,
            trial_minutes=spec.budget.trial_minutes,
            harness=self.preparation.spec.lm_eval,
            retain=None if RETAIN not in sources else _spread(sources[RETAIN], spec.resources.trial),
            audits=spec.audit or Audit(),
        )
        return context, tasks

    def _least_utility(self, reports: Mapping[str, Report]) -> float | None:
        """Return the utility below which a trial is infeasible; None without a floor, or where scores do not tell utility."""
        preparation, utility = self.preparation, self.preparation.spec.maximised[1]
        floor = preparation.spec.objectives.floor
        if floor is None:
            return None
        rows = preparation.split.select
        hashes, task = take_items(preparation.corpus, rows).set_hashes, task_of(preparation.corpus)
        taken = {name: reports[name].take(rows, hashes) for name in (INITIAL, RETAIN) if name in reports}
        numbers = task.numbers(task.evaluate(taken[INITIAL], taken.get(RETAIN), preparation.spec.definition))
        if utility.name not in numbers:
            self.bars.say(f"objectives.floor: {utility.title} is not known before the search, so no trial is called infeasible")
            return None
        return floor * float(numbers[utility.name])

    def wait(self, tasks: BaseRunTasks, enough: Callable[[], bool]) -> None:
        """Train base runs, without trials at the same time, until `enough` returns True or none is missing."""
        with self._stage("training"):
            self._record(tasks)
            while tasks.runs.missing and not enough():
                tasks.start(with_trials=False)
                self._record(tasks, POLL_SECONDS)

    def poll(self, tasks: BaseRunTasks) -> None:
        """Record the base runs that have ended, and start others while trials run. Cheap while none is missing."""
        if tasks.runs.missing:
            self._record(tasks)
            tasks.start(with_trials=True)

    def _record(self, tasks: BaseRunTasks, timeout: float = 0.0) -> None:
        """Collect what has ended and write it into the study's record; show how far the rest is."""
        tasks.collect(timeout)
        events = tasks.runs.take_events()
        for event in events:
            if event.run is not None:
                seconds = sum(float(epoch.get("seconds", 0.0)) for epoch in event.run.epochs)
                self.guard.held(seconds, self.preparation.spec.resources.base_run)
            else:
                self.bars.say(f"failed: base run {event.name}: {event.reason}")
            self._note(event)
        if events or time.monotonic() - self._shown > POLL_SECONDS:
            self._show()

    def _sources(self) -> dict[str, ModelSource]:
        """Sources of the reference models, by name; those that a study builds are built where the cache lacks them."""
        models = self.preparation.models
        references = models.references()
        sources = {model.name: model.source for model in references if model.source is not None}
        if isinstance(models, PretrainedModels):
            return sources
        wanted = {model.name: model.build for model in references if model.build is not None}
        folders = {name: models.store.find(build.key) for name, build in wanted.items()}
        missing = {name: build for name, build in wanted.items() if folders[name] is None}
        # What others start from first, so that it is built once.
        for first in (True, False):
            tasks = {
                name: self._build(name, build, models.store.root)
                for name, build in missing.items()
                if (build.stage == "base") is first
            }
            folders.update(self._gather(tasks))
        return sources | {name: models.source(name, str(folder)) for name, folder in folders.items()}

    def _build(self, name: str, build: Build, root: Path) -> Any:
        title = {NEVER_FINETUNED: "base"}.get(name, name.replace("_", " "))
        needs = self.preparation.spec.resources.base_run
        return _task(needs, build_model, title, build.make, root, needs.threads, self.board)

    def _base_runs(self, initial: ModelSource, further: list[tuple[str, int]]) -> BaseRunTasks:
        """The base runs of the study and further ones (label and seed): which are there, and a task for each that is not."""
        preparation, spec = self.preparation, self.preparation.spec
        variants = {run.label: run for run in spec.variants()}
        wanted = {label: preparation.unlearning(run) for label, run in variants.items()}
        wanted |= {
            retrained(label, seed): replace(preparation.unlearning(variants[label]), seed=seed) for label, seed in further
        }
        starters: dict[str, Callable[[], Any]] = {
            name: partial(self._train, name, initial, config) for name, config in wanted.items()
        }
        starters |= {label: partial(self._import, label) for label in spec.checkpoints}
        there = find_base_runs(preparation, spec.checkpoints, wanted)
        for name, run in there.items():
            self._note(BaseRunEvent(name, run))
        missing = {name: start for name, start in starters.items() if name not in there}
        self._sample_alternates(initial, [wanted[name] for name in missing if name in wanted])
        return BaseRunTasks(self.capacity, there, missing)

    def _sample_alternates(self, initial: ModelSource, configs: Iterable[UnlearningConfig]) -> None:
        """Get the alternate answers that missing base runs need, before anything is trained; UserError if there are none."""
        preparation = self.preparation
        if preparation.corpus.alternates or not any(METHODS[config.method].alternates for config in configs):
            return
        needs, root = preparation.spec.resources.base_run, model_cache(preparation.spec).root
        arguments = (initial, preparation.corpus, preparation.alternates_inputs(), root, needs.threads)
        task = _task(needs, sample_and_keep, *arguments)
        self._alternates = self._gather({"alternate answers": task})["alternate answers"]

    def _train(self, name: str, initial: ModelSource, config: UnlearningConfig) -> Any:
        """Start the training of a base run: the one place where such a task is made."""
        preparation, needs = self.preparation, self.preparation.spec.resources.base_run
        inputs = preparation.base_run_inputs(config)
        corpus = preparation.corpus
        if METHODS[config.method].alternates and not corpus.alternates:
            corpus = replace(corpus, alternates=self._alternates)
        arguments = (initial, corpus, config, inputs, preparation.delta_root, needs.threads, self.board, name)
        if needs.processes == 1:
            return _task(needs, train_and_publish, *arguments)
        on_gpus = needs.gpus > 0 and initial.device != "cpu"
        folder = (self.store.out / "ray").resolve()
        return train_in_processes(needs, on_gpus, folder, TASK_RETRIES, partial(train_and_publish, *arguments))

    def _import(self, label: str) -> Any:
        """Start the import of given checkpoints as a base run."""
        preparation, needs = self.preparation, self.preparation.spec.resources.base_run
        given = preparation.checkpoints_of(label)
        models = preparation.models
        assert isinstance(models, PretrainedModels)
        arguments = (models.initial_folder(), given, preparation.delta_root, models.trust_remote_code, needs.threads)
        return _task(needs, import_and_publish, *arguments, self.board, label)

    def _note(self, event: BaseRunEvent) -> None:
        """Write into the study's record that a base run is published, or why it failed."""
        if event.run is not None:
            self.store.record.note_base_run(event.name, event.run.key, event.run.epochs)
        else:
            self.store.record.note_failed_base_run(event.name, event.reason)
            keep_traceback(self.store.out, f"base-run-{event.name}", event.traceback)
        self.store.save_record()

    def _reports(self, sources: Mapping[str, ModelSource], base_runs: BaseRunTasks) -> dict[str, Report]:
        """The scores of the reference models, which every trial needs; base runs start behind them."""
        preparation, needs = self.preparation, self.preparation.spec.resources.trial
        task = task_of(preparation.corpus)
        reports: dict[str, Report] = {}
        tasks = {}
        references = {model.name: model for model in preparation.models.references()}
        for model in references.values():
            log = model.log or self.store.out / "logs" / f"{model.name}.json"
            if model.log is None and not log.is_file():
                self._take_known_scores(model, log)
            if log.is_file():
                reports[model.name] = task.read_log(log)
            else:
                title = f"scoring: {model.name.replace('_', ' ')} model"
                wanted = (
                    _spread(sources[model.name], needs),
                    preparation.corpus,
                    preparation.scoring,
                    needs.threads,
                    self.board,
                    title,
                )
                tasks[model.name] = _task(needs, score_model, *wanted)
        scored_models = self._gather({f"score {name}": task for name, task in tasks.items()}, lambda: self._tend(base_runs))
        for title, scored in scored_models.items():
            name = title.removeprefix("score ")
            reports[name] = scored
            facts = {"study": preparation.spec.name, "model": name}
            log = self.store.out / "logs" / f"{name}.json"
            task.write_log(scored, log, facts)
            self._keep_scores(references[name], log)
        return reports

    def _take_known_scores(self, model: ReferenceModel, log: Path) -> None:
        """Copy the scores of a reference model from the cache, if another study has scored it on the same items."""
        inputs = self.preparation.score_inputs(model)
        found = None if inputs is None else model_cache(self.preparation.spec).find(content_key(inputs))
        if found is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(log, (found / SCORES).read_bytes())
            self.bars.say(f"scoring: {model.name.replace('_', ' ')} model: known from an earlier study")

    def _keep_scores(self, model: ReferenceModel, log: Path) -> None:
        """Keep the scores of a reference model for other studies."""
        inputs = self.preparation.score_inputs(model)
        if inputs is not None:
            model_cache(self.preparation.spec).get_or_make(
                inputs, lambda folder: write_atomic(folder / SCORES, log.read_bytes())
            )

    def _check(self, reports: Mapping[str, Report]) -> None:
        """Return True if given logs will do, found out once here: in the workers they would fail every trial."""
        task = task_of(self.preparation.corpus)
        for model in self.preparation.models.references():
            if model.log is None:
                continue
            for name in ("initial", model.name):
                try:
                    task.evaluate(reports[name], reports[model.name], self.preparation.spec.definition)
                    # Halves are taken from every set, not only from those that forget quality compares.
                    scores, given = reports[name].sets, reports[model.name].sets
                    for key in scores.keys() & given.keys():
                        if isinstance(scored := scores[key], SetScores) and isinstance(expected := given[key], SetScores):
                            require_same_items(scored, expected, key)
                except UserError as error:
                    raise UserError(f"model.{model.kind}: {error}") from error

    def _gather(self, tasks: Mapping[str, Any], meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Results by name, showing progress meanwhile. All tasks end before the first failure is raised."""
        waiting = list(tasks.values())
        while waiting:
            meanwhile()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            self._show()
        results: dict[str, Any] = {}
        failures = []
        for name, task in tasks.items():
            try:
                results[name] = ray.get(task)
            except ray.exceptions.RayError as error:
                failures.append(problem_of(name, error))
        if failures:
            raise failures[0]
        return results

    def _tend(self, tasks: BaseRunTasks) -> None:
        """Record what has ended; start all base runs that fit until a first one is published, then leave room for a trial."""
        self._record(tasks)
        tasks.start(with_trials=bool(tasks.runs.published))

    def _show(self) -> None:
        """Show how far the tasks are; while the board's node has just died, nothing."""
        self._shown = time.monotonic()
        with suppress(ray.exceptions.RayError):
            self.bars.show_all(ray.get(self.board.read.remote(), timeout=BOARD_SECONDS))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.store.add_seconds(name, time.perf_counter() - started)


def find_base_runs(
    preparation: PreparedStudy, labels: Iterable[str], wanted: Mapping[str, UnlearningConfig] | None = None
) -> dict[str, BaseRun]:
    """Return base runs that the delta store has, by name.

    Args:
        preparation: The study.
        labels: Labels of base runs of the study.
        wanted: Further trained base runs, by name.
    """
    deltas = DeltaStore(preparation.delta_root)
    variants = {run.label: run for run in preparation.spec.variants()}
    known = {name: deltas.find(preparation.base_run_inputs(config)) for name, config in (wanted or {}).items()}
    for label in labels:
        if label in variants:
            known[label] = deltas.find(preparation.base_run_inputs(preparation.unlearning(variants[label])))
        else:
            known[label] = find_checkpoints(deltas, [inputs for _, inputs in preparation.checkpoints_of(label)])
    return {name: run for name, run in known.items() if run is not None}


def _spread(source: ModelSource, trial: TrialResources) -> ModelSource:
    """A model as trials load it: over all GPUs a trial has, where it has several and the study names no device."""
    return replace(source, device_map="auto") if trial.gpus > 1 and source.device == "auto" else source


def _task(needs: TrialResources | BaseRunResources, function: Callable[..., Any], *arguments: Any) -> Any:
    options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "resources": needs.custom}
    return ray.remote(**options, max_retries=TASK_RETRIES)(function).remote(*arguments)
