"""Validate where the items of a corpus come from: data sets of the hub, folders and files."""

from pathlib import PurePath
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler, field_validator, model_validator

from search.spec.errors import rule
from search.spec.sections import Name, OneOrMore, Section, is_local
from uipe_core.corpora.files import DataSet


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
        """Describe a data set as a section."""
        return cls(source=data_set.source, subset=data_set.subsets, split=data_set.split)

    def data_set(self) -> DataSet:
        """Return the data set as `uipe_core` reads it."""
        return DataSet(self.source, self.subset or (), self.split)


class OwnSource(DataSource):
    """A data set as in `DataSource`, or a folder of documents; a text alone is the source."""

    split: Name = "train"

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, super().__get_pydantic_json_schema__(schema, handler)]}

    @model_validator(mode="before")
    @classmethod
    def _text_is_the_source(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _is_found_somewhere(cls, value: str) -> str:
        if not is_local(value) and "/" not in value:
            remedy = f"Write ./{value} for what is next to the study file."
            raise rule("there is no such file or folder, and a name on the hub has the form owner/name", remedy)
        return value
