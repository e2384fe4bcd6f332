"""Say what a study file may hold: `uipe objectives` and `uipe schema`."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from search.cli.tables import Json, echo, print_json
from search.report.display import new_table
from uipe_core.errors import printable

if TYPE_CHECKING:
    from search.problem.objectives import Objective

OWN = {
    "name": "package.module:function",
    "signature": "function(scores: dict[str, numpy.ndarray], references: dict[str, dict[str, numpy.ndarray]]) -> float",
    "scores": "item scores of the trial by set/measurement, for example scores['forget/answer_loss']",
    "references": "the same of every reference model by name, for example references['initial']",
    "returns": "a finite number, which is maximised",
}
"""How an objective of the user's own is given; `search.evaluation.metrics.own_value` calls it."""

_CHOICES = "multiple_choice"


@dataclass(frozen=True)
class Listed:
    """An objective as a study file names it.

    Attributes:
        role: Key of section ``objectives``; ``multiple_choice`` for the two of such a corpus, which no file names.
        name: What the file gives.
        objective: What is maximised.
    """

    role: str
    name: str
    objective: "Objective"

    @property
    def price(self) -> str:
        """Price of computing it: losses are read for every trial anyway."""
        if self.objective.reads_text:
            return "text"
        if self.objective.compares_with_initial:
            return "once"
        if self.objective.membership or self.objective.sets != self.objective.scored_sets:
            return "pass"
        known = self.objective.components or self.objective.quality_of or self.objective.from_items
        return "free" if known else "other"

    @property
    def needs(self) -> str:
        """Sets that the corpus must have, and a retain model where it compares with one."""
        found = [name if name not in self.objective.optional else f"({name})" for name in self.objective.sets]
        if self.role == _CHOICES:
            found = [self.objective.name.partition("_")[0].replace("forgetting", "forget")]
        found += ["retain model"] if self.objective.needs_retain_model else []
        found += ["(retain model)"] if self.objective.membership else []
        return ", ".join(found)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        objective = self.objective
        return {
            "role": self.role,
            "name": self.name,
            "number": objective.name,
            "direction": "maximize",
            "needs_retain_model": objective.needs_retain_model,
            "sets": [name for name in objective.sets if name not in objective.optional],
            "optional_sets": list(objective.optional),
            "price": {
                "text": "generated text",
                "free": "losses",
                "once": "one pass per worker",
                "pass": "one more pass",
                "other": "other",
            }[self.price],
            "about": objective.about,
        }


def listed() -> list[Listed]:
    """Return every objective there is, those of installed extensions too."""
    from search.problem.objectives import CHOICE_FORGETTING, CHOICE_UTILITY, ROLES

    found = [Listed(role, name, each) for role, known in ROLES.items() for name, each in known.items()]
    return [*found, *(Listed(_CHOICES, each.name, each) for each in (CHOICE_FORGETTING, CHOICE_UTILITY))]


def objectives(as_json: Json = False) -> None:
    """List the objectives that a study can maximise, by role: what each needs, its range and its price.

    A study file names them in its section objectives: {forgetting: NAME, utility: NAME, third: NAME}.
    """
    from search.spec.plugins import load_plugins

    load_plugins()
    if as_json:
        print_json({"objectives": [each.as_dict() for each in listed()], "own": OWN})
        return
    _print_objectives(listed())


def _print_objectives(found: list[Listed]) -> None:
    from rich.markup import escape

    from search.problem.objectives import ROLES

    titles = {role: f"objectives.{role}" for role in ROLES}
    titles["third"] += " (optional)"
    for role, title in {**titles, _CHOICES: "corpus.kind: multiple_choice has these two, and takes no others"}.items():
        table, console = new_table(title, width=80)
        for head, width in (("name", 28), ("price", 7), ("what it is, and what it needs", None)):
            table.add_column(head, overflow="fold", width=width)
        for each in found:
            if each.role == role:
                needs = f"needs {each.needs}" if each.needs else ""
                texts = (each.name, each.price, "\n".join(filter(None, (each.objective.about, needs))))
                table.add_row(*(escape(printable(text)) for text in texts))
        console.print(table)
    for line in _FOOT:
        echo(line)


_FOOT = (
    "All are maximised. They need evaluation sets of the corpus; what is in brackets",
    "counts where it is given. The price is free (from losses, which every trial",
    "reads), text (answers are generated), pass (one more, over the forget or holdout",
    "set), once (one pass of the initial model per worker) or other (as its own line",
    "says).",
    "A study that names none maximises log10_forget_quality and, by its corpus,",
    "model_utility or retain_utility (kind: questions); without a retain model",
    "memorization and retain_utility.",
    "",
    "An objective of your own, in any role: package.module:function",
    "    def function(scores, references):",
    '        # scores: arrays over items, scores["forget/answer_loss"];',
    '        # references: the same by model, references["initial"]',
    "        return a finite number, which is maximised",
    "Its package must be installed where the study runs.",
)


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
    """Add the commands to the command line."""
    app.command(epilog="Example: uipe objectives --json")(objectives)
    app.command(epilog="Example: uipe schema > study.schema.json")(schema)
