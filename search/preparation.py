"""From a study to what a run needs: its corpus, its models, its base runs, each with the address of its content."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search.spec import BaseRunSpec, StudySpec
from search.spec_sections import PeopleCorpus, PretrainedModel, TinyModel, TofuCorpus, is_local
from search.study_store import fingerprint
from uipe_core.content_store import ContentStore, cache_folder, content_key, file_hash
from uipe_core.corpora.people import load_people
from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import Corpus
from uipe_core.evaluation_log import read_log
from uipe_core.models import ModelSource, check_model_folder, model_identity
from uipe_core.scoring import ScoringConfig
from uipe_core.tiny_models import Stage, TinyModelConfig, tiny_model_inputs
from uipe_core.training import AdapterConfig, UnlearningConfig

REPORTED_PACKAGES = ("uipe-search", "ray", "optuna", "torch", "transformers", "peft", "accelerate", "scipy")


@dataclass(frozen=True)
class Preparation:
    """A study with everything that identifies it, before anything is trained.

    Attributes:
        spec: The study.
        corpus: Its items.
        tiny: How to build its models; None for models that exist already.
        models: Identity of the initial and the retain model (or of the retain model's log).
        revisions: Commits that pin models from the hub.
    """

    spec: StudySpec
    corpus: Corpus
    tiny: TinyModelConfig | None
    models: Mapping[str, str]
    revisions: Mapping[str, str | None]

    @property
    def fingerprint(self) -> str:
        """Identity of the study."""
        return fingerprint(self.spec, self.corpus.hash, self.models)

    @property
    def model_store(self) -> ContentStore:
        """The cache of tiny models."""
        return ContentStore(Path(self.spec.cache.models or cache_folder("models")))

    @property
    def delta_root(self) -> Path:
        """Folder of the delta store."""
        return Path(self.spec.cache.deltas or cache_folder("deltas"))

    @property
    def scoring(self) -> ScoringConfig:
        return ScoringConfig(self.spec.scoring.batch_size, self.spec.scoring.max_new_tokens)

    @property
    def retain_log(self) -> Path | None:
        """The retain model's evaluation log, where the study gives one instead of a model."""
        model = self.spec.model
        given = isinstance(model, PretrainedModel) and model.retain.endswith(".json")
        return Path(model.retain) if given and isinstance(model, PretrainedModel) else None

    def source(self, which: str, location: str | None = None) -> ModelSource:
        """Where the ``initial`` or the ``retain`` model is; tiny models need the folder they were built in."""
        model = self.spec.model
        if isinstance(model, PretrainedModel):
            return ModelSource(
                location=model.initial if which == "initial" else model.retain,
                identity=self.models[which],
                revision=self.revisions.get(which),
                dtype=model.dtype,
                device=model.device,
                prompt_template=model.prompt_template,
                trust_remote_code=model.trust_remote_code,
            )
        if location is None:
            raise ValueError("a tiny model is known by the folder it was built in")
        return ModelSource(location, self.models[which], device="cpu")

    def unlearning(self, run: BaseRunSpec) -> UnlearningConfig:
        """The configuration of a base run.

        With a constant schedule one epoch more than searched is trained: the next epoch of plain training is a control. A
        linear schedule ends at learning rate 0, so there the searched epochs are all.
        """
        settings = self.spec.unlearning
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
        return self.spec.unlearning.epochs + (1 if self.spec.unlearning.schedule == "constant" else 0)

    def base_run_inputs(self, run: BaseRunSpec) -> dict[str, Any]:
        """Everything that determines a base run: its address in the delta store."""
        template = self.spec.model.prompt_template if isinstance(self.spec.model, PretrainedModel) else None
        return {
            "model": self.models["initial"],
            "items": self.corpus.training_hash,
            "prompt_template": template,
            "unlearning": self.unlearning(run).as_inputs(),
        }

    def facts(self) -> dict[str, Any]:
        """What the study's record says beside its spec."""
        return {
            "corpus": {"name": self.corpus.name, "hash": self.corpus.hash, "sets": self.corpus.set_hashes},
            "models": dict(self.models),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in REPORTED_PACKAGES}},
        }


def load_corpus(spec: StudySpec) -> Corpus:
    """The corpus of a study."""
    if isinstance(spec.corpus, PeopleCorpus):
        sizes = spec.corpus
        return load_people(spec.seed, sizes.forget_people, sizes.retain_people, sizes.pretraining_people)
    return load_tofu(spec.corpus.source, spec.corpus.split, spec.corpus.retain_train)


def check_inputs(spec: StudySpec) -> list[str]:
    """Reads what a study needs and lies on this machine; returns notes on what only the run itself can check.

    Raises:
        UserError: If an input is missing or broken.
    """
    notes = []
    if isinstance(spec.corpus, TofuCorpus) and not is_local(spec.corpus.source):
        notes.append(f"corpus.source: {spec.corpus.source} is on the hub and is fetched when the study runs")
    else:
        load_corpus(spec)
    if isinstance(spec.model, PretrainedModel):
        for key, value in (("initial", spec.model.initial), ("retain", spec.model.retain)):
            if not is_local(value):
                notes.append(f"model.{key}: {value} is on the hub and is fetched when the study runs")
            elif value.endswith(".json"):
                read_log(value)
            else:
                check_model_folder(value, spec.model.prompt_template)
    return notes


def prepare(spec: StudySpec) -> Preparation:
    """Loads the corpus and identifies the models of a study; nothing is trained yet.

    Raises:
        UserError: If the corpus or a model cannot be had.
    """
    corpus = load_corpus(spec)
    model = spec.model
    if isinstance(model, TinyModel):
        tiny = TinyModelConfig(
            tokenizer=model.tokenizer,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            layers=model.layers,
            heads=model.heads,
            base=None if model.base is None else Stage(**model.base.model_dump()),
            finetune=Stage(**model.finetune.model_dump()),
            seed=spec.seed,
        )
        stages = {"initial": "full", "retain": "retain"}
        keys = {which: content_key(tiny_model_inputs(tiny, corpus, stage)) for which, stage in stages.items()}
        return Preparation(spec, corpus, tiny, keys, {})
    identity, revision = model_identity(model.initial, model.revision)
    if model.retain.endswith(".json"):
        retain, retain_revision = f"log:{file_hash(Path(model.retain))[:32]}", None
    else:
        retain, retain_revision = model_identity(model.retain, model.retain_revision)
    return Preparation(
        spec, corpus, None, {"initial": identity, "retain": retain}, {"initial": revision, "retain": retain_revision}
    )
