"""The model section of a study, one class per kind: tiny models, models that exist, models the study fine-tunes."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from search.spec.bounds import MOST_CONTROLS, Count, Epochs, LearningRate, Seed
from search.spec.errors import did_you_mean, rule
from search.spec.paths import absolute_paths
from search.spec.sections import PACKAGE, Adapter, Name, Section, all_different, as_tuple, is_local, names_of
from uipe_core.errors import UserError
from uipe_core.models.prompts import FORMATS


def model_place(value: str) -> str:
    """Return where a model that a command line names is: an absolute path, or a name on the hub.

    Args:
        value: Folder, GGUF file, ``package:NAME/FILE`` or name on the hub; relative to the current directory.

    Raises:
        UserError: It is a path where nothing is, or a package that is not installed or lacks the file.
    """
    located, problems = absolute_paths({"model": {"base": value}}, Path.cwd())
    section = located["model"]
    assert isinstance(section, dict)
    if value.startswith(PACKAGE) and (problems or section["base"] == value):
        name = value.removeprefix(PACKAGE).partition("/")[0]
        lacking = f"found {value!r}; there is no installed package {name!r}. Install it with pip, or give a path."
        raise UserError(f"model: {problems[0][1] if problems else lacking}")
    if problems:
        raise UserError(f"model {value}: there is no such folder or GGUF file; correct the path, or give a name on the hub")
    return str(section["base"])


class Stage(Section):
    """One training of a tiny model."""

    epochs: Epochs
    learning_rate: LearningRate
    batch_size: Count


class TinyModel(Section):
    """A small Llama with its own tokenizer, built and trained by the study. `vocab_size` is None for words."""

    kind: Literal["tiny"]
    tokenizer: Literal["word", "bpe"] = "word"
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] | None = None
    hidden_size: Annotated[int, Field(ge=1, le=65_536)] = 64
    layers: Annotated[int, Field(ge=1, le=1000)] = 2
    heads: Annotated[int, Field(ge=1, le=4096)] = 4
    base: Stage | None = None
    finetune: Stage
    other_retain_seeds: Annotated[tuple[Seed, ...], BeforeValidator(as_tuple), Field(max_length=MOST_CONTROLS)] = ()

    @field_validator("other_retain_seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(seed) for seed in all_different(value))

    @field_validator("vocab_size")
    @classmethod
    def _only_bpe_has_a_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        tokenizer = info.data.get("tokenizer")
        if tokenizer == "word" and value is not None:
            raise rule("a word tokenizer takes its size from the corpus", "Remove vocab_size, or set tokenizer: bpe.")
        return 3000 if tokenizer == "bpe" and value is None else value

    @field_validator("heads")
    @classmethod
    def _heads_share_the_width(cls, value: int, info: ValidationInfo) -> int:
        width = info.data.get("hidden_size")
        # Rotary embeddings turn pairs of numbers, so an odd width per head fails late, inside the model.
        if width is not None and width % (2 * value):
            allowed = f"hidden_size ({width}) must be divisible by heads, with an even quotient"
            raise rule(allowed, f"Choose a hidden_size that is a multiple of {2 * value}, or other heads.")
        return value


def _format_exists(value: str | None) -> str | None:
    if value is not None and value not in FORMATS:
        raise rule("there is no such prompt format", did_you_mean(value, list(FORMATS)))
    return value


def _question_has_a_place(value: str | None, info: ValidationInfo) -> str | None:
    if value is not None and "{question}" not in value:
        raise rule("must contain {question}", 'Write for example "[INST] {question} [/INST]", or null.')
    if value is not None and info.data.get("prompt_format") is not None:
        raise rule(f"model.prompt_format ({info.data['prompt_format']}) is given too", "Remove one of the two.")
    return value


FormatName = Annotated[str | None, AfterValidator(_format_exists), Field(json_schema_extra=names_of(FORMATS))]
Template = Annotated[str | None, AfterValidator(_question_has_a_place)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


def _revision(value: str | None, model: str, info: ValidationInfo) -> str | None:
    if value is not None and is_local(info.data.get(model) or ""):
        raise rule(f"model.{model} is local and has no revisions", "Remove it, or give a hub name.")
    return value


class Finetuning(Section):
    """How the initial and the retain model are fine-tuned from a base model; `adapter` trains LoRA and merges it."""

    epochs: Epochs
    learning_rate: LearningRate
    batch_size: Count
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.01
    adapter: Adapter | None = None


class FinetunedModel(Section):
    """A causal language model that the study fine-tunes on its corpus: on all of it (initial), and without the forget set."""

    kind: Literal["finetuned"]
    base: Name
    finetune: Finetuning
    retain: bool = True
    revision: Name | None = None
    prompt_format: FormatName = None
    prompt_template: Template = None
    trust_remote_code: bool = False
    dtype: Dtype = "auto"
    device: Device = "auto"

    @property
    def start(self) -> str:
        """Where the weights come from that everything starts with."""
        return self.base

    def places(self) -> dict[str, str]:
        """Return the models that are named, by key."""
        return {"base": self.base}

    @field_validator("revision")
    @classmethod
    def _only_the_hub_has_revisions(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _revision(value, "base", info)


class PretrainedModel(Section):
    """A causal language model from the hub or a folder, and the retain model (or its evaluation log, ``*.json``; none for
    multiple choice)."""

    kind: Literal["pretrained"]
    initial: Name
    retain: Name | None = None
    other_retain: Annotated[tuple[Name, ...], BeforeValidator(as_tuple), Field(max_length=MOST_CONTROLS)] = ()
    never_finetuned: Name | None = None
    revision: Name | None = None
    retain_revision: Name | None = None
    prompt_format: FormatName = None
    prompt_template: Template = None
    trust_remote_code: bool = False
    dtype: Dtype = "auto"
    device: Device = "auto"

    @property
    def start(self) -> str:
        """Where the weights come from that everything starts with."""
        return self.initial

    def places(self) -> dict[str, str]:
        """Return the models and logs that are named, by key."""
        others = {f"other_retain[{number}]": place for number, place in enumerate(self.other_retain)}
        given = {"initial": self.initial, "retain": self.retain, **others, "never_finetuned": self.never_finetuned}
        return {key: place for key, place in given.items() if place}

    @field_validator("revision", "retain_revision")
    @classmethod
    def _only_the_hub_has_revisions(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _revision(value, "initial" if info.field_name == "revision" else "retain", info)
