"""Find or build the models of a study. One class per kind: tiny models that the study trains, and models that exist already.

Each knows its reference models, their identities, where the initial and the retain model are, and what of them determines a
base run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.evaluation.task import task_of
from search.problem.trial import INITIAL, NEVER_FINETUNED, OTHER_RETAIN, RETAIN
from search.spec.sections import PretrainedModel, TinyModel, is_local
from search.spec.study import StudySpec
from uipe_core.corpora.refusals import REFUSALS
from uipe_core.corpora.types import Corpus
from uipe_core.models.loading import ModelSource, model_folder, model_identity
from uipe_core.models.prompts import prompt_schema
from uipe_core.models.skeleton import meta_model
from uipe_core.models.tiny import Stage, TinyModelConfig, tiny_model, tiny_model_inputs, tiny_skeleton
from uipe_core.storage.content_store import ContentStore, content_key
from uipe_core.storage.files import cache_folder, file_hash
from uipe_core.unlearning.methods import METHODS


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
            extra_texts=REFUSALS if any("refusal_logp" in METHODS[run.method].needs for run in spec.variants()) else (),
        )
        return cls(section, config, corpus, ContentStore(Path(spec.cache.models or cache_folder("models"))))

    @property
    def identities(self) -> dict[str, str]:
        """Cache keys of the models that determine the study."""
        stages = {INITIAL: "full", RETAIN: "retain"}
        kinds = task_of(self.corpus).reference_kinds
        return {name: self.key(stage, self.config) for name, stage in stages.items() if name in kinds}

    def key(self, stage: str, config: TinyModelConfig) -> str:
        """Return the cache key of a stage: ``base``, ``full`` or ``retain``."""
        return content_key(tiny_model_inputs(config, self.corpus, stage))

    def references(self) -> list[ReferenceModel]:
        """List the models trials are compared with."""
        found = [
            ReferenceModel(INITIAL, INITIAL, ("full", self.config)),
            ReferenceModel(RETAIN, RETAIN, ("retain", self.config)),
        ]
        for number, seed in enumerate(self.section.other_retain_seeds, start=1):
            other = ("retain", replace(self.config, finetune_seed=seed))
            found.append(ReferenceModel(f"{OTHER_RETAIN}-{number}", OTHER_RETAIN, other))
        if self.config.base is not None:
            found.append(ReferenceModel(NEVER_FINETUNED, NEVER_FINETUNED, ("base", self.config)))
        return [model for model in found if model.kind in task_of(self.corpus).reference_kinds]

    def source(self, which: str, location: str | None = None) -> ModelSource:
        """Return how a model that was built in the folder `location` is loaded; a name other than the two is its identity."""
        if location is None:
            raise ValueError("a tiny model is known by the folder it was built in")
        return ModelSource(location, self.identities.get(which, which), device="cpu")

    def ready_source(self, which: str) -> ModelSource:
        """Return where the ``initial`` or the ``retain`` model is, building it where the cache lacks it."""
        stage = {INITIAL: "full", RETAIN: "retain"}[which]
        return self.source(which, str(tiny_model(self.config, self.corpus, stage, self.store)))

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
    """

    section: PretrainedModel
    identities: Mapping[str, str]
    revisions: Mapping[str, str | None]

    @classmethod
    def of(cls, section: PretrainedModel) -> "PretrainedModels":
        """Identify the models of a study: content hash of a folder or log, commit of a hub model.

        Raises:
            UserError: A model cannot be found.
        """
        identities, revisions = {}, {}
        identities[INITIAL], revisions[INITIAL] = model_identity(section.initial, section.revision)
        if section.retain is not None and _log(section.retain) is not None:
            identities[RETAIN], revisions[RETAIN] = f"log:{file_hash(Path(section.retain))[:32]}", None
        elif section.retain is not None:
            identities[RETAIN], revisions[RETAIN] = model_identity(section.retain, section.retain_revision)
        return cls(section, identities, revisions)

    @classmethod
    def unseen(cls, section: PretrainedModel) -> "PretrainedModels":
        """Describe models that are not on this machine: names stand in for identities."""
        retain = {RETAIN: section.retain} if section.retain else {}
        return cls(section, {INITIAL: section.initial, **retain}, {INITIAL: section.revision})

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
        section = self.section
        return ModelSource(
            location=location or (section.initial if which == INITIAL else str(section.retain)),
            identity=self.identities[which],
            revision=self.revisions.get(which) if location is None else None,
            dtype=section.dtype,
            device=section.device,
            prompt_template=section.prompt_template,
            prompt_format=section.prompt_format,
            trust_remote_code=section.trust_remote_code,
        )

    def ready_source(self, which: str) -> ModelSource:
        """Return where the ``initial`` or the ``retain`` model is."""
        return self.source(which)

    def base_run_inputs(self) -> dict[str, Any]:
        """Return what of the models determines a base run."""
        return {
            "model": self.identities[INITIAL],
            "prompt_template": self.section.prompt_template,
            "prompt_format": {"name": self.section.prompt_format, "schema": prompt_schema(self.section.prompt_template)},
        }

    def skeleton(self) -> Any:
        """Return the initial model without weights, on the meta device."""
        return meta_model(self.section.initial, self.revision, self.trust_remote_code)

    def initial_folder(self) -> Path:
        """Return the folder with the files of the initial model."""
        return model_folder(self.section.initial, self.revision)


Models = TinyModels | PretrainedModels


def models_of(spec: StudySpec, corpus: Corpus) -> Models:
    """Describe and identify the models of a study; nothing is built or loaded.

    Raises:
        UserError: A model cannot be found.
    """
    return TinyModels.of(spec, spec.model, corpus) if isinstance(spec.model, TinyModel) else PretrainedModels.of(spec.model)


def _log(place: str) -> Path | None:
    """Return the evaluation log a place means; None where it means a model."""
    return Path(place) if place.endswith(".json") else None


def checkpoint_folder(place: str) -> Path:
    """Return the folder of a given checkpoint: its own, or the hub's copy on this machine, fetched where it is missing."""
    return Path(place) if is_local(place) else model_folder(place)
