"""What a study needs before its first trial, as Ray tasks: models, base runs, and the scores of the reference models."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from search.evaluator import StudyContext, retrained
from search.measures import Report, measure, read_report, write_report
from search.preparation import Preparation, ReferenceModel
from search.progress import Bars
from search.study_store import StudyStore
from search.workers import build_tiny, import_and_publish, score_model, train_and_publish
from uipe_core.checkpoints import find_checkpoints
from uipe_core.delta_store import BaseRun, DeltaStore
from uipe_core.errors import UserError
from uipe_core.item_check import require_same_items
from uipe_core.models import ModelSource
from uipe_core.score_report import SetScores
from uipe_core.tiny_models import TinyModelConfig
from uipe_core.training import DivergedError

POLL_SECONDS = 0.2


@dataclass
class Groundwork:
    """Builds, trains and scores what the caches and the study's folder lack.

    Attributes:
        preparation: The study.
        store: Its folder, where the logs of the reference models are kept.
        bars: Progress.
        board: Actor the tasks note their progress with.
    """

    preparation: Preparation
    store: StudyStore
    bars: Bars
    board: Any

    def context(self, seeds: Iterable[int] = (), labels: Iterable[str] = ()) -> StudyContext:
        """Everything a worker needs to score any job of the study.

        Args:
            seeds: Further seeds to train base runs with.
            labels: Which base runs to train with them.
        """
        spec = self.preparation.spec
        with self._stage("models"):
            sources = self._sources()
        with self._stage("base_runs"):
            runs, reports = self._runs_and_reports(sources, [(label, seed) for seed in seeds for label in labels])
        self._check(reports)
        return StudyContext(
            corpus=self.preparation.corpus,
            split=self.preparation.split,
            source=sources["initial"],
            runs=runs,
            methods={**{run.label: run.method for run in spec.variants()}, **{label: label for label in spec.checkpoints}},
            references=reports,
            scoring=self.preparation.scoring,
            definition=spec.definition,
            seed=spec.seed,
            threads=spec.resources.trial.threads,
        )

    def _sources(self) -> dict[str, ModelSource]:
        """Sources of the reference models, by name; tiny ones are built where the cache lacks them."""
        preparation = self.preparation
        sources = {model.name: model.source for model in preparation.references if model.source is not None}
        tiny = [(model, *model.tiny) for model in preparation.references if model.tiny is not None]
        folders = {model.name: preparation.model_store.find(self._key(stage, config)) for model, stage, config in tiny}
        missing = [(model, stage, config) for model, stage, config in tiny if folders[model.name] is None]
        # What others start from first, so that it is built once.
        for first in (True, False):
            tasks = {
                model.name: self._build(model, stage, config) for model, stage, config in missing if (stage == "base") is first
            }
            folders.update(self._gather(tasks))
        return sources | {name: preparation.source(name, str(folder)) for name, folder in folders.items()}

    def _key(self, stage: str, config: TinyModelConfig) -> str:
        return self.preparation.tiny_key(stage, config)

    def _build(self, model: ReferenceModel, stage: str, config: TinyModelConfig) -> Any:
        title = {"never_finetuned": "base"}.get(model.name, model.name.replace("_", " "))
        preparation, threads = self.preparation, self.preparation.spec.resources.base_run.threads
        return self._task(
            build_tiny, title, stage, config, preparation.corpus, preparation.model_store.root, threads, self.board
        )

    def _runs_and_reports(
        self, sources: Mapping[str, ModelSource], further: list[tuple[str, int]]
    ) -> tuple[dict[str, BaseRun], dict[str, Report]]:
        preparation, spec = self.preparation, self.preparation.spec
        variants = {run.label: run for run in spec.variants()}
        wanted = {label: (run, preparation.unlearning(run)) for label, run in variants.items()}
        for label, seed in further:
            config = replace(preparation.unlearning(variants[label]), seed=seed)
            wanted[retrained(label, seed)] = (variants[label], config)
        deltas = DeltaStore(preparation.delta_root)
        threads = spec.resources.base_run.threads
        tasks, runs = {}, {}
        for name, (_, config) in wanted.items():
            inputs = preparation.base_run_inputs(config)
            known = deltas.find(inputs)
            if known is not None:
                runs[name] = known
                continue
            initial = sources["initial"]
            arguments = (initial, preparation.corpus, config, inputs, preparation.delta_root, threads, self.board, name)
            tasks[name] = self._task(train_and_publish, *arguments)
        for label in spec.checkpoints:
            given = preparation.checkpoints_of(label)
            known = find_checkpoints(deltas, [inputs for _, inputs in given])
            if known is not None:
                runs[label] = known
                continue
            imported = (preparation.initial_folder, given, preparation.delta_root, preparation.trust_remote_code, threads)
            tasks[label] = self._task(import_and_publish, *imported, self.board, label)
        reports: dict[str, Report] = {}
        for model in preparation.references:
            log = model.log or self.store.out / "logs" / f"{model.name}.json"
            if log.is_file():
                reports[model.name] = read_report(log, bool(preparation.corpus.choices))
            else:
                title = f"scoring: {model.name.replace('_', ' ')} model"
                wanted_scores = (sources[model.name], preparation.corpus, preparation.scoring, threads, self.board, title)
                tasks[f"score {model.name}"] = self._task(score_model, *wanted_scores)
        results = self._gather(tasks)
        for model in preparation.references:
            scored = results.pop(f"score {model.name}", None)
            if scored is not None:
                reports[model.name] = scored
                write_report(scored, self.store.out / "logs" / f"{model.name}.json", {"study": spec.name, "model": model.name})
        runs.update(results)
        known_runs = {name: {"delta": run.key, "epochs": list(run.epochs)} for name, run in runs.items()}
        self.store.record["base_runs"] = {**self.store.record.get("base_runs", {}), **known_runs}
        self.store.save_record()
        return runs, reports

    def _check(self, reports: Mapping[str, Report]) -> None:
        """Whether given logs will do, found out once here: in the workers they would fail every trial."""
        for model in self.preparation.references:
            if model.log is None:
                continue
            for name in ("initial", model.name):
                try:
                    measure(reports[name], reports[model.name], self.preparation.spec.definition)
                    # Halves are taken from every set, not only from those that forget quality compares.
                    scores, given = reports[name].sets, reports[model.name].sets
                    for key in scores.keys() & given.keys():
                        if isinstance(scored := scores[key], SetScores) and isinstance(expected := given[key], SetScores):
                            require_same_items(scored, expected, key)
                except UserError as error:
                    raise UserError(f"model.{model.kind}: {error}") from error

    def _task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        needs = self.preparation.spec.resources.base_run
        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "resources": needs.custom, "max_retries": 2}
        return ray.remote(**options)(function).remote(*arguments)

    def _gather(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """Results by name, showing progress meanwhile. All tasks end before the first failure is raised."""
        names = {reference: name for name, reference in tasks.items()}
        waiting = list(names)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            self.bars.show_all(ray.get(self.board.read.remote()))
        results, failures = {}, []
        for reference, name in names.items():
            try:
                results[name] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                failures.append((name, error.cause if error.cause is not None else error))
        for name, cause in failures:
            if isinstance(cause, UserError | DivergedError):
                raise UserError(f"{name}: {cause}") from cause
            raise RuntimeError(f"{name} failed: {cause}") from cause
        return results

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.store.add_seconds(name, time.perf_counter() - started)
