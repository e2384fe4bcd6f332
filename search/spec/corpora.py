"""Validate the corpus section of a study file, and load the corpus it describes.

One class per kind. A class knows its data sources, which of its keys may be paths, its task, and how to load the corpus.
`CORPORA` lists them by the name a study file gives (``corpus.kind``).
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from search.problem.objectives import (
    CHOICE_FORGETTING,
    CHOICE_UTILITY,
    FORGET_QUALITY,
    KNOWMEM_RETAIN,
    MODEL_UTILITY,
    RETAIN_UTILITY,
    VERBMEM,
    Objective,
)
from search.spec.data_sources import DataSource, OwnSource
from search.spec.errors import KeyPath, did_you_mean, rule
from search.spec.sections import Count, Name, Section, is_local, names_of
from uipe_core.corpora.files import SUFFIXES, TEXTS
from uipe_core.corpora.multiple_choice import WMDP_AND_MMLU, load_multiple_choice
from uipe_core.corpora.muse import FORGET_TEXTS, WINDOW_WORDS, load_muse
from uipe_core.corpora.muse import SETS as MUSE_SETS
from uipe_core.corpora.questions import SETS, load_questions
from uipe_core.corpora.types import MULTIPLE_CHOICE_SETS, RELATED_SETS, UTILITY_SETS
from uipe_core.metrics.composites import ROUGE_F1
from uipe_core.unlearning.methods import METHODS

if TYPE_CHECKING:
    from uipe_core.corpora.types import Corpus

FREE_TEXT = "free_text"
MULTIPLE_CHOICE = "multiple_choice"
"""Tasks: how models answer, and so how they are scored (`search.evaluation.task`)."""


class CorpusSection(Protocol):
    """Describe what a study needs of its corpus section, of any kind.

    Attributes:
        kind: Name in `CORPORA`.
        task: `FREE_TEXT` or `MULTIPLE_CHOICE`.
        objectives: Forgetting and utility, in this order, of a study that names none; those that compare with a retain model
            only where it has one.
        sets: Evaluation sets that the corpus has.
        definition: Metric definition of a study that names none; ``tofu`` for a class without it.
        measures: Measures that only items of this corpus have (`uipe_core.metrics.composites`); none for a class without it.
        path_keys: Keys below ``corpus`` whose value may be a path, and the endings of files allowed there.
    """

    task: ClassVar[str]
    objectives: ClassVar[tuple[Objective, ...]]
    definition: ClassVar[str]
    path_keys: ClassVar[Mapping[KeyPath, tuple[str, ...]]]

    @property
    def kind(self) -> str: ...

    @property
    def sets(self) -> tuple[str, ...]: ...

    def load(self, seed: int) -> "Corpus":
        """Load the corpus.

        Args:
            seed: The study's seed.
        """

    @classmethod
    def model_errors(cls, model: Mapping[str, Any]) -> list[InitErrorDetails]:
        """List what is wrong with the model section (as plain data) for this corpus."""

    def study_errors(self, third_objective: str | None, methods: Collection[str]) -> list[InitErrorDetails]:
        """List what is wrong with the rest of the study for this corpus."""


def sources(section: CorpusSection) -> dict[KeyPath, str]:
    """Return the data sources of a corpus by key: hub names and absolute paths."""
    found = {}
    for key in section.path_keys:
        value: Any = section
        for part in key:
            value = None if value is None else getattr(value, str(part))
        if isinstance(value, str):
            found[key] = value
    return found


def fetched_sources(section: CorpusSection) -> list[tuple[str, str]]:
    """Return keys and names of the data sets that must be fetched from the hub."""
    return [(".".join(map(str, key)), source) for key, source in sources(section).items() if not is_local(source)]


def path_sites(corpus: Mapping[str, Any]) -> list[tuple[KeyPath, dict[str, Any], tuple[str, ...]]]:
    """List the places in a corpus section as plain data that may hold a path.

    Returns:
        Per place: its key below ``corpus``, the mapping that holds the last part of the key, and the file endings allowed.
    """
    kind = CORPORA.get(str(corpus.get("kind")))
    sites = []
    for key, endings in ({} if kind is None else kind.path_keys).items():
        holder: Any = corpus
        for part in key[:-1]:
            holder = holder.get(part) if isinstance(holder, Mapping) else None
        if isinstance(holder, dict) and isinstance(holder.get(key[-1]), str) and holder[key[-1]]:
            sites.append((key, holder, endings))
    return sites


People = Annotated[int, Field(ge=1, le=100_000)]


class PeopleCorpus(Section):
    """Fictitious people, generated from the seed of the study."""

    task: ClassVar = FREE_TEXT
    objectives: ClassVar = (FORGET_QUALITY, MODEL_UTILITY)
    definition: ClassVar = "tofu"
    path_keys: ClassVar[Mapping[KeyPath, tuple[str, ...]]] = {("alternates",): SUFFIXES}

    kind: Literal["people"]
    forget_people: People = 6
    retain_people: People = 34
    pretraining_people: People = 60
    alternates: Name | None = None

    @property
    def sets(self) -> tuple[str, ...]:
        """Evaluation sets; people for the holdout where there are names for them."""
        from uipe_core.corpora.people import has_holdout

        there = has_holdout(self.forget_people, self.retain_people, self.pretraining_people)
        return ("forget", *UTILITY_SETS, *RELATED_SETS, *(["holdout"] if there else []))

    def load(self, seed: int) -> "Corpus":
        """Generate the corpus."""
        from uipe_core.corpora.people import load_people

        return _with_alternates(
            load_people(seed, self.forget_people, self.retain_people, self.pretraining_people), self.alternates
        )

    @classmethod
    def model_errors(cls, model: Mapping[str, Any]) -> list[InitErrorDetails]:
        """Require a base stage of a tiny model."""
        if model.get("kind") == "tiny" and model.get("base") is None:
            example = "{epochs: 12, learning_rate: 0.005, batch_size: 64}"
            error = rule(
                "the people corpus needs a base stage, where the model learns to read", f"Write for example {example}."
            )
            return [{"type": error, "loc": ("model", "base"), "input": None}]
        return []

    def study_errors(self, third_objective: str | None, methods: Collection[str]) -> list[InitErrorDetails]:
        """Everything else fits."""
        return []


class TofuCorpus(Section):
    """TOFU from the hub, or from a folder (then `source` is an absolute path)."""

    task: ClassVar = FREE_TEXT
    objectives: ClassVar = (FORGET_QUALITY, MODEL_UTILITY)
    sets: ClassVar = ("forget", *UTILITY_SETS, *RELATED_SETS)
    definition: ClassVar = "tofu"
    path_keys: ClassVar[Mapping[KeyPath, tuple[str, ...]]] = {("source",): (), ("alternates",): SUFFIXES}

    kind: Literal["tofu"]
    source: Name = "locuslab/TOFU"
    split: Literal["forget01", "forget05", "forget10"] = "forget01"
    retain_train: Literal["retain_perturbed"] | None = None
    first_items: Count | None = None
    alternates: Name | None = None

    def load(self, seed: int) -> "Corpus":
        """Read the corpus; `seed` plays no part."""
        from uipe_core.corpora.tofu import load_tofu

        return _with_alternates(load_tofu(self.source, self.split, self.retain_train, self.first_items), self.alternates)

    @classmethod
    def model_errors(cls, model: Mapping[str, Any]) -> list[InitErrorDetails]:
        """Refuse a base stage of a tiny model."""
        return _base_refused(model, "TOFU has no texts for a base stage")

    def study_errors(self, third_objective: str | None, methods: Collection[str]) -> list[InitErrorDetails]:
        """Everything else fits."""
        return []


class MultipleChoiceCorpus(Section):
    """Questions to forget and to keep, and the texts that are trained on; by default WMDP-Bio and MMLU from the hub."""

    task: ClassVar = MULTIPLE_CHOICE
    objectives: ClassVar = (CHOICE_FORGETTING, CHOICE_UTILITY)
    sets: ClassVar = MULTIPLE_CHOICE_SETS
    definition: ClassVar = "tofu"
    path_keys: ClassVar[Mapping[KeyPath, tuple[str, ...]]] = {
        (name, "source"): SUFFIXES for name in ("forget", "utility", "forget_texts", "retain_texts")
    }

    kind: Literal["multiple_choice"]
    forget: DataSource = Field(default_factory=lambda: DataSource.of(WMDP_AND_MMLU[0]))
    utility: DataSource = Field(default_factory=lambda: DataSource.of(WMDP_AND_MMLU[1]))
    forget_texts: DataSource | None = None
    retain_texts: DataSource | None = None
    texts: Count | None = None
    text_characters: Annotated[int, Field(ge=50, le=10_000_000)] = 2000

    def load(self, seed: int) -> "Corpus":
        """Read the corpus; `seed` plays no part."""
        texts = [None if source is None else source.data_set() for source in (self.forget_texts, self.retain_texts)]
        return load_multiple_choice(
            self.forget.data_set(), self.utility.data_set(), texts[0], texts[1], self.texts, self.text_characters
        )

    @classmethod
    def model_errors(cls, model: Mapping[str, Any]) -> list[InitErrorDetails]:
        """Refuse a base stage of a tiny model, and reference models: chance is the reference."""
        error = rule("multiple choice is held against chance, not against models that never saw the forget set", "Remove it.")
        given = ("retain", "other_retain", "other_retain_seeds", "never_finetuned")
        found: list[InitErrorDetails] = [
            {"type": error, "loc": ("model", key), "input": model[key]} for key in given if model.get(key)
        ]
        return [*_base_refused(model, "a multiple-choice corpus has no texts for a base stage"), *found]

    def study_errors(self, third_objective: str | None, methods: Collection[str]) -> list[InitErrorDetails]:
        """Refuse a third objective, and a method that answers questions where texts are trained on."""
        found: list[InitErrorDetails] = []
        if third_objective is not None:
            error = rule("a multiple-choice corpus has no related facts", "Remove it.")
            found.append({"type": error, "loc": ("search", "third_objective"), "input": third_objective})
        error = rule("it answers questions, and corpus.forget_texts are none", "Remove the method, or forget_texts.")
        return found + (_refusing(methods, error) if self.forget_texts is not None else [])


Words = Annotated[int, Field(ge=1, le=1_000_000)]


class QuestionsCorpus(Section):
    """A user's own questions, conversations or texts (`uipe_core.corpora.questions`)."""

    task: ClassVar = FREE_TEXT
    objectives: ClassVar = (FORGET_QUALITY, RETAIN_UTILITY)
    definition: ClassVar = "tofu-unicode"
    path_keys: ClassVar[Mapping[KeyPath, tuple[str, ...]]] = {
        **{key: (*SUFFIXES, *TEXTS) for name in SETS for key in ((name,), (name, "source"))},
        ("alternates",): SUFFIXES,
    }

    kind: Literal["questions"]
    forget: OwnSource
    retain: OwnSource
    general: OwnSource | None = None
    holdout: OwnSource | None = None
    related: OwnSource | None = None
    unrelated: OwnSource | None = None
    prompt_words: Words = 150
    continuation_words: Words = 100
    alternates: Name | None = None

    @property
    def sets(self) -> tuple[str, ...]:
        """Evaluation sets that are given."""
        return tuple(name for name in SETS if getattr(self, name) is not None)

    def load(self, seed: int) -> "Corpus":
        """Read the corpus; of the answers that may stand in for perturbed ones, `seed` chooses among equally long ones."""
        given: dict[str, OwnSource | None] = {name: getattr(self, name) for name in SETS}
        found = {name: source.data_set() for name, source in given.items() if source is not None}
        return _with_alternates(load_questions(found, self.prompt_words, self.continuation_words, seed), self.alternates)

    @classmethod
    def model_errors(cls, model: Mapping[str, Any]) -> list[InitErrorDetails]:
        """Refuse a base stage of a tiny model; a retain model is not needed."""
        return _base_refused(model, "own data has no texts for a base stage")

    def study_errors(self, third_objective: str | None, methods: Collection[str]) -> list[InitErrorDetails]:
        """Everything else fits; an objective on sets that are not given is refused by the study."""
        return []


class MuseCorpus(Section):
    """MUSE from the hub, or from a folder (then `source` is an absolute path): texts, and questions on them."""

    task: ClassVar = FREE_TEXT
    objectives: ClassVar = (VERBMEM, KNOWMEM_RETAIN)
    sets: ClassVar = MUSE_SETS
    definition: ClassVar = "tofu"
    measures: ClassVar = (ROUGE_F1,)
    path_keys: ClassVar[Mapping[KeyPath, tuple[str, ...]]] = {("source",): ()}

    kind: Literal["muse"]
    source: Name = "muse-bench/MUSE-News"
    forget: Annotated[str, Field(json_schema_extra=names_of(FORGET_TEXTS))] = "raw"
    window_words: Words = WINDOW_WORDS

    @field_validator("forget")
    @classmethod
    def _texts_exist(cls, value: str) -> str:
        if value not in FORGET_TEXTS:
            raise rule("there are no such texts to forget", did_you_mean(value, list(FORGET_TEXTS)))
        return value

    def load(self, seed: int) -> "Corpus":
        """Read the corpus; of the answers that may stand in for perturbed ones, `seed` chooses among equally long ones."""
        return load_muse(self.source, self.forget, self.window_words, seed)

    @classmethod
    def model_errors(cls, model: Mapping[str, Any]) -> list[InitErrorDetails]:
        """Refuse a base stage of a tiny model; a retain model is not needed."""
        return _base_refused(model, "MUSE has no texts for a base stage")

    def study_errors(self, third_objective: str | None, methods: Collection[str]) -> list[InitErrorDetails]:
        """Refuse a method that answers questions: texts are trained on."""
        return _refusing(methods, rule("it answers questions, and MUSE trains on texts", "Remove the method."))


def _refusing(methods: Collection[str], error: PydanticCustomError) -> list[InitErrorDetails]:
    """List the methods that answer questions with refusals."""
    refusing = [name for name in methods if METHODS[name].substitutes]
    return [{"type": error, "loc": ("unlearning", "methods", name), "input": {}} for name in refusing]


def _with_alternates(corpus: "Corpus", source: str | None) -> "Corpus":
    """Add the alternate answers that the section names, which the method `alt_po` would else sample."""
    if source is None:
        return corpus
    from uipe_core.unlearning.alternates import given_alternates

    return replace(corpus, alternates=given_alternates(source, corpus.forget_train))


def _base_refused(model: Mapping[str, Any], why: str) -> list[InitErrorDetails]:
    if model.get("kind") != "tiny" or model.get("base") is None:
        return []
    return [{"type": rule(why, "Write base: null."), "loc": ("model", "base"), "input": model["base"]}]


CORPORA: dict[str, Any] = {
    "people": PeopleCorpus,
    "tofu": TofuCorpus,
    "multiple_choice": MultipleChoiceCorpus,
    "questions": QuestionsCorpus,
    "muse": MuseCorpus,
}
"""Corpus sections by the name a study file gives (``corpus.kind``)."""
