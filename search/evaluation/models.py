"""Find or build the models of a study. One class per kind: tiny models that the study trains, models that exist already, and
models that the study fine-tunes from one that exists.

Each knows its reference models, their identities, where the initial and the retain model are, and what of them determines a
base run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from search.evaluation.task import task_of
from search.problem.trial import INITIAL, NEVER_FINETUNED, OTHER_RETAIN, RETAIN
from search.spec.models import FinetunedModel, PretrainedModel, TinyModel, model_place
from search.spec.sections import Adapter, is_local, lacks_package
from search.spec.study import StudySpec
from uipe_core.corpora.types import REFUSALS, Corpus
from uipe_core.errors import UserError
from uipe_core.models.gguf import gguf_folder, gguf_identity, is_gguf
from uipe_core.models.loading import ModelSource, Progress, model_folder, model_identity
from uipe_core.models.prompts import prompt_schema
from uipe_core.models.skeleton import meta_model
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model, tiny_model_inputs, tiny_skeleton
from uipe_core.storage.content_store import ContentStore, content_key
from uipe_core.storage.files import cache_folder, file_hash
from uipe_core.unlearning.finetuning import FinetuneConfig, finetuned_inputs, finetuned_model, stage_items
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.training import AdapterConfig

_STAGES = {INITIAL: "full", RETAIN: "retain"}
"""What the models that determine a study are trained on."""


def model_cache(spec: StudySpec) -> ContentStore:
    """Return the cache of what a study builds: models, dequantised GGUF files, scores of reference models."""
    return ContentStore(Path(spec.cache.models or cache_folder("models")))


def adapter_config(section: Adapter | None) -> AdapterConfig | None:
    """Return a section ``adapter`` as training takes it; None for full fine-tuning."""
    return None if section is None else AdapterConfig(**section.model_dump())


@dataclass(frozen=True)
class Build:
    """A model to be built.

    Attributes:
        key: Its key in the cache.
        stage: What it is trained on: ``base``, ``full`` or ``retain``.
        make: Builds it unless the cache has it, and returns its folder: called with the cache and with progress.
        config: How it is built.
    """

    key: str
    stage: str
    make: Callable[[ContentStore, Progress | None], Path]
    config: TinyModelConfig | FinetuneConfig


@dataclass(frozen=True)
class ReferenceModel:
    """A model that is scored as it is, for the trials to be compared with.

    Attributes:
        name: ``initial``, ``retain``, ``other_retain-1``, ..., ``never_finetuned``: its log's name, too.
        kind: ``initial``, ``retain``, ``other_retain`` or ``never_finetuned``.
        build: How it is built; None for models that exist already.
        source: Where an existing model is.
        log: Its evaluation log, given in place of the model.
    """

    name: str
    kind: str
    build: Build | None = None
    source: ModelSource | None = None
    log: Path | None = None


@dataclass(frozen=True)
class TinyModels:
    """Small models that the study trains, cached by content.

    Attributes:
        section: The model section of the study.
        config: How they are built.
        corpus: What they are trained on.
        store: Their cache.
    """

    section: TinyModel
    config: TinyModelConfig
    corpus: Corpus
    store: ContentStore

    trust_remote_code = False
    retain_log = None
    revision = None

    @classmethod
    def of(cls, spec: StudySpec, section: TinyModel, corpus: Corpus) -> "TinyModels":
        """Describe the tiny models of a study."""
        config = TinyModelConfig(
            tokenizer=section.tokenizer,
            vocab_size=section.vocab_size,
            hidden_size=section.hidden_size,
            layers=section.layers,
            heads=section.heads,
            base=None if section.base is None else Stage(**section.base.model_dump()),
            finetune=Stage(**section.finetune.model_dump()),
            seed=spec.seed,
            extra_texts=REFUSALS if any(METHODS[run.method].refuses for run in spec.variants()) else (),
        )
        return cls(section, config, corpus, model_cache(spec))

    @property
    def identities(self) -> dict[str, str]:
        """Cache keys of the models that determine the study."""
        kinds = task_of(self.corpus).reference_kinds
        return {name: self.key(stage, self.config) for name, stage in _STAGES.items() if name in kinds}

    def key(self, stage: str, config: TinyModelConfig) -> str:
        """Return the cache key of a stage: ``base``, ``full`` or ``retain``."""
        return content_key(tiny_model_inputs(config, self.corpus, stage))

    def _build(self, stage: str, config: TinyModelConfig) -> Build:
        return Build(self.key(stage, config), stage, partial(tiny_model, config, self.corpus, stage), config)

    def references(self) -> list[ReferenceModel]:
        """List the models trials are compared with."""
        found = [
            ReferenceModel(INITIAL, INITIAL, self._build("full", self.config)),
            ReferenceModel(RETAIN, RETAIN, self._build("retain", self.config)),
        ]
        for number, seed in enumerate(self.section.other_retain_seeds, start=1):
            other = self._build("retain", replace(self.config, finetune_seed=seed))
            found.append(ReferenceModel(f"{OTHER_RETAIN}-{number}", OTHER_RETAIN, other))
        if self.config.base is not None:
            found.append(ReferenceModel(NEVER_FINETUNED, NEVER_FINETUNED, self._build("base", self.config)))
        return [model for model in found if model.kind in task_of(self.corpus).reference_kinds]

    def source(self, which: str, location: str | None = None) -> ModelSource:
        """Return how a model that was built in the folder `location` is loaded; a name other than the two is its identity."""
        if location is None:
            raise ValueError("a tiny model is known by the folder it was built in")
        return ModelSource(location, self.identities.get(which, which), device="cpu")

    def ready_source(self, which: str) -> ModelSource:
        """Return where the ``initial`` or the ``retain`` model is, building it where the cache lacks it."""
        return self.source(which, str(tiny_model(self.config, self.corpus, _STAGES[which], self.store)))

    def base_run_inputs(self) -> dict[str, Any]:
        """Return what of the models determines a base run. Their one prompt format is covered by their own schema."""
        return {"model": self.identities[INITIAL], "prompt_template": None}

    def skeleton(self) -> Any:
        """Return the initial model without weights, on the meta device."""
        return tiny_skeleton(self.config, self.corpus)


@dataclass(frozen=True)
class PretrainedModels:
    """Models from the hub or from folders.

    Attributes:
        section: The model section of the study.
        identities: Of the initial and, where there is one, the retain model (or of its log).
        revisions: Commits that pin models from the hub.
        initial: Where the initial model is: as the section says, or the folder a GGUF file was dequantised into.
    """

    section: PretrainedModel
    identities: Mapping[str, str]
    revisions: Mapping[str, str | None]
    initial: str

    @classmethod
    def of(cls, section: PretrainedModel, store: ContentStore) -> "PretrainedModels":
        """Identify the models of a study: content hash of a folder or log, commit of a hub model.

        Args:
            section: The model section of the study.
            store: Cache for what a GGUF file is dequantised into.

        Raises:
            UserError: A model cannot be found.
        """
        identities, revisions = {}, {}
        initial, identities[INITIAL], revisions[INITIAL] = _identified(section.initial, section.revision, store)
        if section.retain is not None and _log(section.retain) is not None:
            identities[RETAIN], revisions[RETAIN] = f"log:{file_hash(Path(section.retain))[:32]}", None
        elif section.retain is not None:
            identities[RETAIN], revisions[RETAIN] = model_identity(section.retain, section.retain_revision)
        return cls(section, identities, revisions, initial)

    @classmethod
    def unseen(cls, section: PretrainedModel) -> "PretrainedModels":
        """Describe models that are not on this machine: names stand in for identities."""
        retain = {RETAIN: section.retain} if section.retain else {}
        return cls(section, {INITIAL: section.initial, **retain}, {INITIAL: section.revision}, section.initial)

    @property
    def trust_remote_code(self) -> bool:
        """Return True if the study lets code of the model's folder run."""
        return self.section.trust_remote_code

    @property
    def retain_log(self) -> Path | None:
        """The retain model's evaluation log, where the study gives one in place of a model."""
        return None if self.section.retain is None else _log(self.section.retain)

    @property
    def revision(self) -> str | None:
        """Commit that pins the initial model."""
        return self.revisions.get(INITIAL)

    def references(self) -> list[ReferenceModel]:
        """List the models trials are compared with."""
        section = self.section
        found = [self._reference(INITIAL, INITIAL, section.initial)]
        found += [self._reference(RETAIN, RETAIN, section.retain)] if section.retain else []
        for number, place in enumerate(section.other_retain, start=1):
            found.append(self._reference(f"{OTHER_RETAIN}-{number}", OTHER_RETAIN, place))
        never = section.never_finetuned
        return [*found, self._reference(NEVER_FINETUNED, NEVER_FINETUNED, never)] if never else found

    def _reference(self, name: str, kind: str, place: str) -> ReferenceModel:
        log = _log(place)
        if log is not None:
            return ReferenceModel(name, kind, log=log)
        if name in self.identities:
            return ReferenceModel(name, kind, source=self.source(name))
        # Not part of the study's identity, so it is enough to know where it is.
        return ReferenceModel(name, kind, source=replace(self.source(INITIAL), location=place, identity=place, revision=None))

    def source(self, which: str, location: str | None = None) -> ModelSource:
        """Return where the ``initial`` or the ``retain`` model is, or how one at another location is loaded."""
        return ModelSource(
            location=location or (self.initial if which == INITIAL else str(self.section.retain)),
            identity=self.identities[which],
            revision=self.revisions.get(which) if location is None else None,
            **_loading(self.section),
        )

    def ready_source(self, which: str) -> ModelSource:
        """Return where the ``initial`` or the ``retain`` model is."""
        return self.source(which)

    def base_run_inputs(self) -> dict[str, Any]:
        """Return what of the models determines a base run."""
        return _base_run_inputs(self.identities[INITIAL], self.section)

    def skeleton(self) -> Any:
        """Return the initial model without weights, on the meta device."""
        return meta_model(self.initial, self.revision, self.trust_remote_code)

    def initial_folder(self) -> Path:
        """Return the folder with the files of the initial model."""
        return model_folder(self.initial, self.revision)


@dataclass(frozen=True)
class FinetunedModels:
    """Models that the study fine-tunes from a base model, cached by content.

    Attributes:
        section: The model section of the study.
        base: The base model; of a GGUF file, the folder it was dequantised into.
        config: How they are trained.
        corpus: What they are trained on.
        store: Their cache.
    """

    section: FinetunedModel
    base: ModelSource
    config: FinetuneConfig
    corpus: Corpus
    store: ContentStore

    retain_log = None
    revision = None

    @classmethod
    def of(cls, spec: StudySpec, section: FinetunedModel, corpus: Corpus) -> "FinetunedModels":
        """Identify the base model of a study, and describe what is made of it.

        Raises:
            UserError: The base model cannot be found, or the corpus has nothing to learn.
        """
        if not corpus.forget_train or not corpus.retain_train:
            raise UserError("model.kind: finetuned needs a corpus with texts to learn; this one has none")
        location, identity, revision = _identified(section.base, section.revision, model_cache(spec))
        return cls._from(spec, section, corpus, ModelSource(location, identity, revision, **_loading(section)))

    @classmethod
    def unseen(cls, spec: StudySpec, section: FinetunedModel, corpus: Corpus) -> "FinetunedModels":
        """Describe models made of one that is not on this machine: its name stands in for its identity."""
        base = ModelSource(section.base, section.base, section.revision, **_loading(section))
        return cls._from(spec, section, corpus, base)

    @classmethod
    def _from(cls, spec: StudySpec, section: FinetunedModel, corpus: Corpus, base: ModelSource) -> "FinetunedModels":
        given, adapter = section.finetune.model_dump(exclude={"adapter"}), adapter_config(section.finetune.adapter)
        config = FinetuneConfig(**given, adapter=adapter, seed=spec.seed)
        return cls(section, base, config, corpus, model_cache(spec))

    @property
    def trust_remote_code(self) -> bool:
        """Return True if the study lets code of the base model's folder run."""
        return self.section.trust_remote_code

    @cached_property
    def identities(self) -> dict[str, str]:
        """Cache keys of the models that determine the study; every item enters them, so they are computed once."""
        return {model.name: model.build.key for model in self.references() if model.build is not None}

    def _build(self, stage: str) -> Build:
        key = content_key(finetuned_inputs(self.base, stage_items(self.corpus, stage), self.config))
        return Build(key, stage, partial(finetuned_model, self.base, self.corpus, stage, self.config), self.config)

    def references(self) -> list[ReferenceModel]:
        """List the models trials are compared with; the base model never learned the corpus."""
        found = [ReferenceModel(INITIAL, INITIAL, self._build("full"))]
        if self.section.retain and RETAIN in task_of(self.corpus).reference_kinds:
            found.append(ReferenceModel(RETAIN, RETAIN, self._build("retain")))
        if NEVER_FINETUNED in task_of(self.corpus).reference_kinds:
            found.append(ReferenceModel(NEVER_FINETUNED, NEVER_FINETUNED, source=self.base))
        return found

    def source(self, which: str, location: str | None = None) -> ModelSource:
        """Return how a model that was built in the folder `location` is loaded; None is the base model, as it was."""
        if location is None:
            return self.base
        return ModelSource(location, self.identities.get(which, which), **_loading(self.section))

    def ready_source(self, which: str) -> ModelSource:
        """Return where the ``initial`` or the ``retain`` model is, training it where the cache lacks it."""
        return self.source(which, str(self._build(_STAGES[which]).make(self.store, None)))

    def base_run_inputs(self) -> dict[str, Any]:
        """Return what of the models determines a base run."""
        return _base_run_inputs(self.identities[INITIAL], self.section)

    def skeleton(self) -> Any:
        """Return the initial model without weights, on the meta device."""
        return meta_model(self.base.location, self.base.revision, self.trust_remote_code)


def _loading(section: PretrainedModel | FinetunedModel) -> dict[str, Any]:
    """Return how a section's models are loaded, as arguments of `ModelSource`."""
    names = ("dtype", "device", "prompt_template", "prompt_format", "trust_remote_code")
    return {name: getattr(section, name) for name in names}


def _base_run_inputs(identity: str, section: PretrainedModel | FinetunedModel) -> dict[str, Any]:
    return {
        "model": identity,
        "prompt_template": section.prompt_template,
        "prompt_format": {"name": section.prompt_format, "schema": prompt_schema(section.prompt_template)},
    }


def _identified(location: str, revision: str | None, store: ContentStore) -> tuple[str, str, str | None]:
    """Return where a model is, its identity, and the revision that pins it; a GGUF file is dequantised into the cache."""
    if lacks_package(location):
        model_place(location)  # raises, with what to install
    if is_gguf(location):
        return str(gguf_folder(Path(location), store)), gguf_identity(Path(location)), None
    return location, *model_identity(location, revision)


Models = TinyModels | PretrainedModels | FinetunedModels


def models_of(spec: StudySpec, corpus: Corpus) -> Models:
    """Describe and identify the models of a study; nothing is built or loaded.

    Raises:
        UserError: A model cannot be found.
    """
    section = spec.model
    if isinstance(section, TinyModel):
        return TinyModels.of(spec, section, corpus)
    if isinstance(section, FinetunedModel):
        return FinetunedModels.of(spec, section, corpus)
    return PretrainedModels.of(section, model_cache(spec))


def _log(place: str) -> Path | None:
    """Return the evaluation log a place means; None where it means a model."""
    return Path(place) if place.endswith(".json") else None


def checkpoint_folder(place: str) -> Path:
    """Return the folder of a given checkpoint: its own, or the hub's copy on this machine, fetched where it is missing."""
    return Path(place) if is_local(place) else model_folder(place)
