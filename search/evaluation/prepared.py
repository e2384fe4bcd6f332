"""From a study to what a run needs: its corpus, its models, its base runs, each with the address of its content."""

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search.evaluation.inputs import check_objectives, require_trust
from search.evaluation.model_checks import (
    check_checkpoints,
    check_positions,
    check_steered_layers,
    check_target_modules,
    small_llama,
)
from search.evaluation.models import (
    Models,
    PretrainedModels,
    ReferenceModel,
    TinyModels,
    adapter_config,
    checkpoint_folder,
    model_cache,
    models_of,
)
from search.evaluation.task import task_of
from search.problem.trial import INITIAL
from search.spec.models import TinyModel
from search.spec.study import BaseRunSpec, StudySpec
from search.store.record import fingerprint
from uipe_core.corpora.split import Split, split_corpus, take_items
from uipe_core.corpora.types import MEMBERSHIP_SETS, PRIVLEAK_SETS, Corpus, item_set_hash
from uipe_core.deltas.checkpoints import checkpoint_identity, checkpoint_inputs
from uipe_core.models.loading import ModelSource
from uipe_core.scoring.scorer import SCORING_SCHEMA, ScoringConfig
from uipe_core.storage.content_store import ContentStore, content_key
from uipe_core.storage.files import cache_folder, write_atomic
from uipe_core.storage.node_cache import GIGABYTE
from uipe_core.storage.remote_store import RemoteLocation
from uipe_core.unlearning.alternates import sample_alternates, sampled_inputs
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.training import UnlearningConfig

ALTERNATES = "alternates.json"
"""Alternate answers of the forget items in the cache of models."""

logger = logging.getLogger(__name__)

REPORTED_PACKAGES = ("uipe-search", "ray", "optuna", "torch", "transformers", "peft", "accelerate", "scipy")


@dataclass(frozen=True)
class PreparedStudy:
    """A study with everything that identifies it, before anything is trained.

    Attributes:
        spec: The study.
        corpus: Its items.
        models: Its models, found or to be built.
        checkpoints: Identities of the given checkpoints of each base run, in order.
        recorded: Key in the delta store of each base run that an earlier run of the study walked from.
    """

    spec: StudySpec
    corpus: Corpus
    models: Models
    checkpoints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recorded: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Identity of the study."""
        given = {f"{label}/{epoch}": key for label, keys in self.checkpoints.items() for epoch, key in enumerate(keys, 1)}
        return fingerprint(self.spec, self.corpus.hash, {**self.models.identities, **given})

    @property
    def delta_root(self) -> Path | RemoteLocation:
        """Folder of the delta store, or where it is at a URL."""
        cache = self.spec.cache
        if cache.deltas is not None and "://" in cache.deltas:
            return RemoteLocation(cache.deltas, int(cache.node_gigabytes * GIGABYTE))
        return Path(cache.deltas or cache_folder("deltas"))

    @property
    def scoring(self) -> ScoringConfig:
        """Batch size, and the generation length of the metric definition unless the study gives its own."""
        settings = self.spec.scoring
        return ScoringConfig.of(settings.definition, settings.rows, settings.max_new_tokens)

    def score_inputs(self, model: ReferenceModel) -> dict[str, Any] | None:
        """Return everything that determines the scores of a reference model; None where its weights are not identified."""
        identity = self.models.identities.get(model.name)
        if model.build is not None:
            identity = model.build.key
        if identity is None:
            return None
        scored = {name: key for name, key in self.corpus.set_hashes.items() if name not in self.corpus.implied}
        settings = self.spec.model.model_dump(mode="json", include={"dtype", "device", "prompt_format", "prompt_template"})
        return {
            "kind": "scores",
            "schema": SCORING_SCHEMA,
            "model": identity,
            "loading": {**settings, "gpus": self.spec.resources.trial.gpus > 0},
            "sets": scored,
            "scoring": asdict(self.scoring),
            # What earlier versions scored of these sets has no Min-K%.
            **({"min_k": True} if any(scored.keys() >= set(pair) for pair in (MEMBERSHIP_SETS, PRIVLEAK_SETS)) else {}),
        }

    @property
    def split(self) -> Split:
        """Which items trials are scored on, and which finalists are reported on."""
        share = None if self.spec.split is None else self.spec.split.select
        return split_corpus(self.corpus, share, self.spec.seed)

    def unlearning(self, run: BaseRunSpec) -> UnlearningConfig:
        """The configuration of a base run.

        With a constant schedule one epoch more than searched is trained: the next epoch of plain training is a control. A
        linear schedule ends at learning rate 0, so there the searched epochs are all. A study goes on with the update vectors
        it began with, trained as it was then.
        """
        settings = self.spec.unlearning
        assert settings is not None
        config = UnlearningConfig(
            method=run.method,
            hyperparameters=run.loss_hyperparameters,
            epochs=self.trained_epochs,
            learning_rate=run.learning_rate,
            batch_size=settings.batch_size,
            gradient_accumulation=settings.gradient_accumulation,
            gradient_checkpointing=settings.gradient_checkpointing,
            schedule=settings.schedule,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            adapter=adapter_config(settings.adapter),
            seed=run.seed,
        )
        former = replace(config, whole_last_step=True)
        keys = [content_key(self.base_run_inputs(each)) for each in (config, former)] if run.label in self.recorded else []
        return former if keys and keys[0] != keys[1] == self.recorded[run.label] else config

    @property
    def trained_epochs(self) -> int:
        """Epochs a base run is trained for."""
        settings = self.spec.unlearning
        return 0 if settings is None else settings.epochs + (1 if settings.schedule == "constant" else 0)

    def base_run_inputs(self, config: UnlearningConfig) -> dict[str, Any]:
        """Return everything that determines a base run: its address in the delta store."""
        items = len(self.corpus.forget_train)
        inputs = {**self.models.base_run_inputs(), "items": self.corpus.training_hash, "unlearning": config.as_inputs(items)}
        if METHODS[config.method].alternates:
            inputs["alternates"] = self.corpus.alternates_hash if self.corpus.alternates else dict(sampled_inputs())
        return inputs

    def alternates_inputs(self) -> dict[str, Any]:
        """Return everything that determines alternate answers sampled from the initial model."""
        items = item_set_hash(self.corpus.forget_train)
        return {**self.models.base_run_inputs(), **sampled_inputs(), "kind": "alternates", "items": items}

    def training_corpus(self, method: str, source: ModelSource) -> Corpus:
        """Return the corpus as a method reads it: with alternate answers, sampled where the cache lacks them.

        Args:
            method: Name of the method.
            source: The initial model.

        Raises:
            UserError: No alternate can be sampled of an item.
        """
        if self.corpus.alternates or not METHODS[method].alternates:
            return self.corpus
        cache = model_cache(self.spec)
        return replace(self.corpus, alternates=kept_alternates(source, self.corpus, self.alternates_inputs(), cache))

    def _groups(self) -> dict[str, list[str | None]]:
        """Return the group (person, author) of each item that trials are scored on, by evaluation set; None without one."""
        chosen = take_items(self.corpus, self.split.select)
        grouped = task_of(self.corpus).resamples_groups
        sets = {**chosen.sets, **chosen.choices}
        return {name: [getattr(item, "group", None) if grouped else None for item in items] for name, items in sets.items()}

    def checkpoints_of(self, label: str) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and address in the delta store of each given checkpoint of a base run, in order."""
        folders, keys = self.spec.checkpoints[label], self.checkpoints[label]
        return [
            (checkpoint_folder(folder), checkpoint_inputs(self.models.identities[INITIAL], key))
            for folder, key in zip(folders, keys, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        """Return what the study's record has in addition to its spec."""
        halves = {"select": self.split.select, "report": self.split.report}
        items = {half: {name: len(chosen) for name, chosen in rows.items()} for half, rows in halves.items()}
        return {
            "corpus": {
                "name": self.corpus.name,
                "hash": self.corpus.hash,
                "sets": self.corpus.set_hashes,
                "items": items,
                "groups": self._groups(),
                "stand_ins": {name: list(lacking) for name, lacking in self.corpus.stand_ins.items()},
            },
            "models": dict(self.models.identities),
            "checkpoints": {label: list(keys) for label, keys in self.checkpoints.items()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in REPORTED_PACKAGES}},
        }


def kept_alternates(
    source: ModelSource, corpus: Corpus, inputs: Mapping[str, Any], cache: ContentStore
) -> tuple[tuple[str, ...], ...]:
    """Return sampled alternate answers from a cache, sampling them where it has none.

    Args:
        source: The initial model.
        corpus: Its `forget_train` is answered otherwise.
        inputs: `PreparedStudy.alternates_inputs`.
        cache: Where they are kept.

    Raises:
        UserError: No alternate can be sampled of an item.
    """

    def write(folder: Path) -> None:
        found = sample_alternates(source.load(dtype="auto"), corpus.forget_train)
        write_atomic(folder / ALTERNATES, json.dumps(found, ensure_ascii=False).encode())

    kept = json.loads((cache.get_or_make(inputs, write) / ALTERNATES).read_bytes())
    return tuple(tuple(own) for own in kept)


def prepare(spec: StudySpec, trust_remote_code: bool = False) -> PreparedStudy:
    """Load the corpus and identify the models of a study; nothing is trained yet.

    Args:
        spec: The study.
        trust_remote_code: Code may run that comes with its models, if the study asks for that.

    Raises:
        UserError: If the corpus or a model cannot be had, or the study asks for trust that is not granted.
    """
    require_trust(spec, trust_remote_code)
    check_objectives(spec)
    corpus = spec.corpus.load(spec.seed)
    if isinstance(spec.model, TinyModel):
        check_target_modules(spec, small_llama)
    models = models_of(spec, replace(corpus, alternates=()))  # which no model is built from
    if not isinstance(models, TinyModels):
        check_target_modules(spec, models.skeleton)
        check_positions(spec, corpus, models.source(INITIAL), models.trust_remote_code)
    start = None if isinstance(models, TinyModels) else models.source(INITIAL)
    check_steered_layers(spec, start.location if start else "", start.revision if start else None, models.trust_remote_code)
    if isinstance(models, PretrainedModels) and spec.checkpoints:
        for note in check_checkpoints(spec, models.initial_folder(), models.trust_remote_code):
            logger.warning(note)
    given = {
        label: tuple(checkpoint_identity(checkpoint_folder(place)) for place in places)
        for label, places in spec.checkpoints.items()
    }
    if any(objective.membership for objective in spec.maximised):
        # Scored with the others then, and so part of what the study is.
        corpus = replace(corpus, implied=())
    return PreparedStudy(spec, corpus, models, given)
