"""Validate the corpus section of a study file and load the corpus it names."""

from collections.abc import Collection
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import InitErrorDetails

from search.spec.errors import rule
from search.spec.sections import Count, Name, OneOrMore, PeopleCorpus, Section, TofuCorpus, is_local
from search.spec.study import StudySpec
from uipe_core.corpora.files import DataSet
from uipe_core.corpora.multiple_choice import WMDP_AND_MMLU, load_multiple_choice
from uipe_core.corpora.people import load_people
from uipe_core.corpora.tofu import load_tofu
from uipe_core.corpora.types import Corpus


def load_corpus(spec: StudySpec) -> Corpus:
    """The corpus of a study."""
    if isinstance(spec.corpus, MultipleChoiceCorpus):
        chosen = spec.corpus
        return load_multiple_choice(
            chosen.forget.data_set(),
            chosen.utility.data_set(),
            None if chosen.forget_texts is None else chosen.forget_texts.data_set(),
            None if chosen.retain_texts is None else chosen.retain_texts.data_set(),
            chosen.texts,
            chosen.text_characters,
        )
    if isinstance(spec.corpus, PeopleCorpus):
        sizes = spec.corpus
        return load_people(spec.seed, sizes.forget_people, sizes.retain_people, sizes.pretraining_people)
    tofu = spec.corpus
    return load_tofu(tofu.source, tofu.split, tofu.retain_train, tofu.first_items)


def fetched_sources(spec: StudySpec) -> list[tuple[str, str]]:
    """Keys and names of the corpus's data sets that must be fetched."""
    corpus = spec.corpus
    if isinstance(corpus, TofuCorpus):
        sources = [("source", corpus.source)]
    elif isinstance(corpus, MultipleChoiceCorpus):
        given = {key: getattr(corpus, key) for key in SOURCES}
        sources = [(f"{key}.source", data.source) for key, data in given.items() if data is not None]
    else:
        sources = []
    return [(key, source) for key, source in sources if not is_local(source)]


SOURCES = ("forget", "utility", "forget_texts", "retain_texts")
"""Keys of the corpus that say where data lie; each may name a path."""


class DataSource(Section):
    """A data set of the hub, a folder laid out as there, or a file (then `source` is an absolute path)."""

    source: Name
    subset: Annotated[tuple[Name, ...], *OneOrMore] | None = None
    split: Name = "test"

    @field_validator("subset", "split")
    @classmethod
    def _stays_inside(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        for name in (value,) if isinstance(value, str) else value or ():
            if ".." in PurePath(name).parts or PurePath(name).is_absolute():
                raise rule(
                    "must be a name inside the data set", "Write the name of the subset or split, without a way out of it."
                )
        return value

    @classmethod
    def of(cls, data_set: DataSet) -> "DataSource":
        """The section that means a data set."""
        return cls(source=data_set.source, subset=data_set.subsets, split=data_set.split)

    def data_set(self) -> DataSet:
        """What the corpus reads."""
        return DataSet(self.source, self.subset or (), self.split)


class MultipleChoiceCorpus(Section):
    """Questions to forget and to keep, and the texts that are trained on: WMDP and MMLU unless told otherwise."""

    kind: Literal["multiple_choice"]
    forget: DataSource = Field(default_factory=lambda: DataSource.of(WMDP_AND_MMLU[0]))
    utility: DataSource = Field(default_factory=lambda: DataSource.of(WMDP_AND_MMLU[1]))
    forget_texts: DataSource | None = None
    retain_texts: DataSource | None = None
    texts: Count | None = None
    text_characters: Annotated[int, Field(ge=50)] = 2000

    def misfits(self, third_objective: str | None, methods: Collection[str]) -> list[InitErrorDetails]:
        """Parts of the study that multiple choice has no use for."""
        found: list[InitErrorDetails] = []
        if third_objective is not None:
            error = rule("a multiple-choice corpus has no related facts", "Remove it.")
            found.append({"type": error, "loc": ("search", "third_objective"), "input": third_objective})
        if self.forget_texts is not None and "idk_dpo" in methods:
            error = rule("it answers questions, and corpus.forget_texts are none", "Remove the method, or forget_texts.")
            found.append({"type": error, "loc": ("unlearning", "methods", "idk_dpo"), "input": {}})
        return found
