"""The section of a study about multiple-choice questions."""

from collections.abc import Collection
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import InitErrorDetails

from search.spec.errors import rule
from search.spec.sections import Count, Name, OneOrMore, Section
from uipe_core.corpora.files import DataSet
from uipe_core.corpora.multiple_choice import WMDP_AND_MMLU

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
