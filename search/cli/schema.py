"""Print the JSON schema of study files, for editors and other programs: `uipe schema`."""

import json
from typing import Any

import typer

from search.cli.tables import echo


def study_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of study files, with what installed extensions add.

    It knows keys, types, bounds and names. What spans sections, and whether files exist, only `load_study` checks.
    """
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
    from pydantic_core import core_schema

    from search.spec.plugins import load_plugins
    from search.spec.study import StudySpec

    class OfFiles(GenerateJsonSchema):
        """Describe what a file may hold: of a list that a single value can stand for, that value too."""

        def field_title_should_be_set(self, schema: Any) -> bool:
            """Leave out titles, which would repeat the keys."""
            return False

        def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
            listed = super().function_before_schema(schema)
            return {"anyOf": [listed["items"], listed]} if listed.get("type") == "array" else listed

    load_plugins()
    described = StudySpec.model_json_schema(schema_generator=OfFiles)
    _bound_lists(described)
    return {"$schema": OfFiles.schema_dialect, **described, "title": "UIPE Search study"}


def _bound_lists(schema: Any) -> None:
    """Give bounds of a list's length, which pydantic writes next to its alternatives as those of a text, to the list."""
    if isinstance(schema, dict):
        for choice in schema.get("anyOf", ()):
            if choice.get("type") == "array":
                named = {"minItems": "minLength", "maxItems": "maxLength"}
                choice |= {mine: schema.pop(theirs) for mine, theirs in named.items() if theirs in schema}
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _bound_lists(inner)


def schema() -> None:
    """Print the JSON schema of study files (draft 2020-12), for completion and checks in an editor.

    A first line `# yaml-language-server: $schema=FILE` in a study file names it to editors with a YAML language server.
    What spans sections, and whether files exist, is checked by uipe validate alone.
    """
    echo(json.dumps(study_schema(), indent=2, ensure_ascii=False))


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: uipe schema > study.schema.json")(schema)
