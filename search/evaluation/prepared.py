"""From a study to what a run needs: its corpus, its models, its base runs, each with the address of its content."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search.evaluation.inputs import check_checkpoints, check_steered_layers, checkpoint_folder
from search.spec.sections import PretrainedModel, TinyModel
from search.spec.study import BaseRunSpec, StudySpec
from search.store.record import fingerprint
from uipe_core.corpora.refusals import REFUSALS
from uipe_core.corpora.split import Split, split_corpus, take_items
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.checkpoints import checkpoint_identity, checkpoint_inputs
from uipe_core.models.loading import ModelSource, model_folder, model_identity
from uipe_core.models.prompts import PROMPT_SCHEMA
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model_inputs
from uipe_core.scoring.scorer import ScoringConfig
from uipe_core.storage.content_store import ContentStore, content_key
from uipe_core.storage.files import cache_folder, file_hash
from uipe_core.storage.node_cache import GIGABYTE
from uipe_core.storage.remote_store import RemoteLocation
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.training import AdapterConfig, UnlearningConfig

REPORTED_PACKAGES = ("uipe-search", "ray", "optuna", "torch", "transformers", "peft", "accelerate", "scipy")


@dataclass(frozen=True)
class ReferenceModel:
    """A model that is scored as it is, for the trials to be compared with.

    Attributes:
        name: ``initial``, ``retain``, ``other_retain-1``, ..., ``never_finetuned``: its log's name, too.
        kind: ``initial``, ``retain``, ``other_retain`` or ``never_finetuned``.
        tiny: Stage and configuration a tiny model is built by; None for models that exist already.
        source: Where an existing model is.
        log: Its evaluation log, given in place of the model.
    """

    name: str
    kind: str
    tiny: tuple[str, TinyModelConfig] | None = None
    source: ModelSource | None = None
    log: Path | None = None


@dataclass(frozen=True)
class PreparedStudy:
    """A study with everything that identifies it, before anything is trained.

    Attributes:
        spec: The study.
        corpus: Its items.
        tiny: How to build its models; None for models that exist already.
        models: Identity of the initial and, where there is one, the retain model (or of the retain model's log).
        revisions: Commits that pin models from the hub.
        checkpoints: Identities of the given checkpoints of each base run, in order.
    """

    spec: StudySpec
    corpus: Corpus
    tiny: TinyModelConfig | None
    models: Mapping[str, str]
    revisions: Mapping[str, str | None]
    checkpoints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Identity of the study."""
        given = {f"{label}/{epoch}": key for label, keys in self.checkpoints.items() for epoch, key in enumerate(keys, 1)}
        return fingerprint(self.spec, self.corpus.hash, {**self.models, **given})

    @property
    def model_store(self) -> ContentStore:
        """The cache of tiny models."""
        return ContentStore(Path(self.spec.cache.models or cache_folder("models")))

    def tiny_key(self, stage: str, config: TinyModelConfig) -> str:
        """Key of a tiny model in their cache."""
        return _tiny_key(config, self.corpus, stage)

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

    @property
    def retain_log(self) -> Path | None:
        """The retain model's evaluation log, where the study gives one instead of a model."""
        model = self.spec.model
        return _log(model.retain) if isinstance(model, PretrainedModel) and model.retain is not None else None

    @property
    def split(self) -> Split:
        """Which items trials are scored on, and which finalists are reported on."""
        share = None if self.spec.split is None else self.spec.split.select
        return split_corpus(self.corpus, share, self.spec.seed)

    @property
    def references(self) -> list[ReferenceModel]:
        """The models trials are compared with: initial, retain, and what shows where forget quality is noise.

        Multiple choice is held against chance: there the initial model is the only one.
        """
        model = self.spec.model
        if isinstance(model, TinyModel):
            tiny = self.tiny
            assert tiny is not None
            found = [ReferenceModel("initial", "initial", ("full", tiny))]
            if self.corpus.choices:
                return found
            found.append(ReferenceModel("retain", "retain", ("retain", tiny)))
            for number, seed in enumerate(model.other_retain_seeds, start=1):
                other = ("retain", replace(tiny, finetune_seed=seed))
                found.append(ReferenceModel(f"other_retain-{number}", "other_retain", other))
            if tiny.base is not None:
                found.append(ReferenceModel("never_finetuned", "never_finetuned", ("base", tiny)))
            return found
        named = [("initial", "initial", model.initial)]
        named += [("retain", "retain", model.retain)] if model.retain is not None else []
        named += [(f"other_retain-{number}", "other_retain", place) for number, place in enumerate(model.other_retain, start=1)]
        named += [("never_finetuned", "never_finetuned", model.never_finetuned)] if model.never_finetuned else []
        return [self._existing(name, kind, place) for name, kind, place in named]

    def _existing(self, name: str, kind: str, place: str) -> ReferenceModel:
        log = _log(place)
        if log is not None:
            return ReferenceModel(name, kind, log=log)
        if name in self.models:
            return ReferenceModel(name, kind, source=self.source(name))
        # Not part of the study's identity, so it is enough to know where it is.
        return ReferenceModel(name, kind, source=replace(self.source("initial"), location=place, identity=place, revision=None))

    def source(self, which: str, location: str | None = None) -> ModelSource:
        """Where the ``initial`` or the ``retain`` model is; tiny models need the folder they were built in."""
        model = self.spec.model
        if isinstance(model, PretrainedModel):
            return ModelSource(
                location=model.initial if which == "initial" else str(model.retain),
                identity=self.models[which],
                revision=self.revisions.get(which),
                dtype=model.dtype,
                device=model.device,
                prompt_template=model.prompt_template,
                prompt_format=model.prompt_format,
                trust_remote_code=model.trust_remote_code,
            )
        if location is None:
            raise ValueError("a tiny model is known by the folder it was built in")
        return ModelSource(location, self.models.get(which, which), device="cpu")

    def unlearning(self, run: BaseRunSpec) -> UnlearningConfig:
        """The configuration of a base run.

        With a constant schedule one epoch more than searched is trained: the next epoch of plain training is a control. A
        linear schedule ends at learning rate 0, so there the searched epochs are all.
        """
        settings = self.spec.unlearning
        assert settings is not None
        adapter = settings.adapter
        return UnlearningConfig(
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
            adapter=None
            if adapter is None
            else AdapterConfig(adapter.rank, adapter.alpha, adapter.target_modules, adapter.dropout),
            seed=self.spec.seed,
        )

    @property
    def trained_epochs(self) -> int:
        """Epochs a base run is trained for."""
        settings = self.spec.unlearning
        return 0 if settings is None else settings.epochs + (1 if settings.schedule == "constant" else 0)

    def base_run_inputs(self, config: UnlearningConfig) -> dict[str, Any]:
        """Everything that determines a base run: its address in the delta store."""
        model = self.spec.model
        inputs = {
            "model": self.models["initial"],
            "items": self.corpus.training_hash,
            "prompt_template": model.prompt_template if isinstance(model, PretrainedModel) else None,
            "unlearning": config.as_inputs(),
        }
        # Tiny models have one format, which their own schema covers.
        if isinstance(model, PretrainedModel):
            inputs["prompt_format"] = {"name": model.prompt_format, "schema": PROMPT_SCHEMA}
        return inputs

    def _groups(self) -> dict[str, list[str | None]]:
        """Whom each item that trials are scored on is about, by evaluation set: intervals resample groups."""
        chosen = take_items(self.corpus, self.split.select)
        about = {name: [item.group for item in items] for name, items in chosen.sets.items()}
        # Questions on one topic are no draws of one thing, as those about one person are.
        return {**about, **{name: [None] * len(items) for name, items in chosen.choices.items()}}

    def checkpoints_of(self, label: str) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and address in the delta store of each given checkpoint of a base run, in order."""
        folders, keys = self.spec.checkpoints[label], self.checkpoints[label]
        return [
            (checkpoint_folder(folder), checkpoint_inputs(self.models["initial"], key))
            for folder, key in zip(folders, keys, strict=True)
        ]

    @property
    def initial_folder(self) -> Path:
        """Where the files of an initial model that exists already are."""
        source = self.source("initial")
        return model_folder(source.location, source.revision)

    @property
    def trust_remote_code(self) -> bool:
        return isinstance(self.spec.model, PretrainedModel) and self.spec.model.trust_remote_code

    def facts(self) -> dict[str, Any]:
        """What the study's record says beside its spec."""
        halves = {"select": self.split.select, "report": self.split.report}
        items = {half: {name: len(chosen) for name, chosen in rows.items()} for half, rows in halves.items()}
        return {
            "corpus": {
                "name": self.corpus.name,
                "hash": self.corpus.hash,
                "sets": self.corpus.set_hashes,
                "items": items,
                "groups": self._groups(),
            },
            "models": dict(self.models),
            "checkpoints": {label: list(keys) for label, keys in self.checkpoints.items()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in REPORTED_PACKAGES}},
        }


def _tiny_key(config: TinyModelConfig, corpus: Corpus, stage: str) -> str:
    return content_key(tiny_model_inputs(config, corpus, stage))


def _log(place: str) -> Path | None:
    """The evaluation log meant by a model's place, None where it is a model."""
    return Path(place) if place.endswith(".json") else None


def prepare(spec: StudySpec) -> PreparedStudy:
    """Loads the corpus and identifies the models of a study; nothing is trained yet.

    Raises:
        UserError: If the corpus or a model cannot be had.
    """
    corpus = spec.corpus.load(spec.seed)
    model = spec.model
    if isinstance(model, TinyModel):
        check_steered_layers(spec, None)
        tiny = TinyModelConfig(
            tokenizer=model.tokenizer,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            layers=model.layers,
            heads=model.heads,
            base=None if model.base is None else Stage(**model.base.model_dump()),
            finetune=Stage(**model.finetune.model_dump()),
            seed=spec.seed,
            extra_texts=REFUSALS if any("refusal_logp" in METHODS[run.method].needs for run in spec.variants()) else (),
        )
        stages = {"initial": "full"} if corpus.choices else {"initial": "full", "retain": "retain"}
        keys = {which: _tiny_key(tiny, corpus, stage) for which, stage in stages.items()}
        return PreparedStudy(spec, corpus, tiny, keys, {})
    identity, revision = model_identity(model.initial, model.revision)
    check_steered_layers(spec, revision)
    given = {}
    if spec.checkpoints:
        # Before the hashes, which take their time.
        check_checkpoints(spec, model_folder(model.initial, revision))
        given = {
            label: tuple(checkpoint_identity(checkpoint_folder(place)) for place in places)
            for label, places in spec.checkpoints.items()
        }
    if model.retain is None:
        return PreparedStudy(spec, corpus, None, {"initial": identity}, {"initial": revision}, given)
    if model.retain.endswith(".json"):
        retain, retain_revision = f"log:{file_hash(Path(model.retain))[:32]}", None
    else:
        retain, retain_revision = model_identity(model.retain, model.retain_revision)
    return PreparedStudy(
        spec, corpus, None, {"initial": identity, "retain": retain}, {"initial": revision, "retain": retain_revision}, given
    )
