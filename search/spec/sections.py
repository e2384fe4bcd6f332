"""The parts of a study: one immutable model per section of the file, each checked against the code that will use it."""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticKnownError, core_schema

from search.problem.objectives import FUNCTION, ROLES, THIRD_OBJECTIVES, objective_named
from search.problem.space import Range
from search.samplers.registry import SAMPLERS
from search.spec.bounds import (
    MOST_CONTROLS,
    MOST_RANK,
    NARROWEST_ALPHA,
    Count,
    Positive,
    Temperature,
)
from search.spec.errors import did_you_mean, rule
from uipe_core.errors import UserError
from uipe_core.metrics.definitions import DEFINITIONS


def is_local(source: str) -> bool:
    """Return True if a corpus source or model is a path; otherwise it is a hub name."""
    return Path(source).is_absolute()


Values = tuple[float | str, ...]
"""The values listed for a hyperparameter; each gives a base run."""

PACKAGE = "package:"
"""Begins the place of a file that an installed Python package brings along: ``package:NAME/FILE``."""


def lacks_package(source: str) -> bool:
    """Return True for a file of a package that is not installed here: of one that is, the study has the path."""
    return source.startswith(PACKAGE)


class ByKind:
    """Pydantic annotation of a section whose class is chosen by its ``kind`` from a registry.

    Unlike a discriminated union it sees entries that are added later.

    Args:
        registry: Section classes by kind.
    """

    def __init__(self, registry: Mapping[str, type[BaseModel]]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: object, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        any_of: Any = reduce(or_, self.registry.values())
        return handler(TypeAdapter(any_of).core_schema)

    def _validate(self, value: object) -> BaseModel:
        if isinstance(value, BaseModel) and type(value) in self.registry.values():
            return value
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_attributes_type")
        if "kind" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "kind"})
        if not isinstance(value["kind"], str) or value["kind"] not in self.registry:
            shown = str(value["kind"]).encode(errors="replace").decode()  # half of a surrogate pair is no text to pydantic
            context = {"discriminator": "kind", "tag": shown, "expected_tags": ", ".join(self.registry)}
            raise PydanticKnownError("union_tag_invalid", context)
        return self.registry[value["kind"]].model_validate(value)


def names_of(registry: Mapping[str, object]) -> Callable[[dict[str, Any]], None]:
    """Return a `json_schema_extra` that offers the names of a registry, those that are added later too."""

    def offer(schema: dict[str, Any]) -> None:
        nullable = any(each.get("type") == "null" for each in schema.pop("anyOf", ()))
        schema.pop("type", None)
        schema["enum"] = [*registry, *([None] if nullable else [])]

    return offer


def _objectives_of(role: str) -> Callable[[dict[str, Any]], None]:
    """Return a `json_schema_extra` that offers the objectives of a role, and functions of the user's own."""

    def offer(schema: dict[str, Any]) -> None:
        own = {"type": "string", "pattern": f"^{FUNCTION.pattern}$", "description": "package.module:function"}
        schema["anyOf"] = [{"enum": [*ROLES[role], None]}, own]

    return offer


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def all_different(values: Values) -> Values:
    if len(set(values)) < len(values):
        raise rule("the values must differ from each other", "Remove the repeated one.")
    return values


def _target_modules(value: object) -> tuple[str, ...] | str:
    if value == "all-linear":
        return "all-linear"
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise rule("must be a list of module names or all-linear", "Write for example [q_proj, v_proj].")


def _batch_size(value: object) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000):
        return value
    raise rule("must be a whole number of at most 1000000 and at least 1, or auto", "Write for example 32.")


_Targets = Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
_Rows = Literal["auto"] | Count

OneOrMore = (BeforeValidator(as_tuple), Field(min_length=1), AfterValidator(all_different))

Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of a study: immutable, no unknown keys, no conversions between types, no NaN or infinity."""

    # defer_build: only what is validated is built, which saves every short command a tenth of a second.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, defer_build=True
    )


class Adapter(Section):
    """LoRA in place of full fine-tuning."""

    rank: Annotated[int, Field(ge=1, le=MOST_RANK)] = 8
    alpha: Positive = 16
    target_modules: Annotated[tuple[str, ...] | str, PlainValidator(_target_modules, json_schema_input_type=_Targets)] = (
        "all-linear"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0


class Scoring(Section):
    """How a model is scored, and the temperatures of the controls. `max_new_tokens` is None for the definition's length."""

    definition: Annotated[str, Field(json_schema_extra=names_of(DEFINITIONS))] = "tofu"
    batch_size: Annotated[int | str, PlainValidator(_batch_size, json_schema_input_type=_Rows)] = 32
    max_new_tokens: Count | None = None
    temperatures: Annotated[
        tuple[Temperature, ...], BeforeValidator(as_tuple), Field(max_length=MOST_CONTROLS), AfterValidator(all_different)
    ] = (0.67, 1.5)

    @property
    def rows(self) -> int | None:
        """Answers per batch; None is as many as are found to be best."""
        return self.batch_size if isinstance(self.batch_size, int) else None

    @field_validator("definition")
    @classmethod
    def _definition_exists(cls, value: str) -> str:
        if value not in DEFINITIONS:
            names = list(DEFINITIONS)
            raise rule("there is no such definition", did_you_mean(value, names))
        return value

    @field_validator("temperatures")
    @classmethod
    def _one_is_no_control(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 in value:
            raise rule("a temperature of 1 is the initial model itself", "Remove the 1.")
        return value


class AlphaRange(Section):
    """Both ends of the extrapolation coefficient; -1 is the initial model; below it is learning, not unlearning."""

    low: Annotated[float, Field(ge=-1, le=1000)] = -1.0
    high: Annotated[float, Field(le=1000)] = 2.0

    @property
    def ends(self) -> Range:
        """Lowest and highest alpha."""
        return self.low, self.high

    @field_validator("high")
    @classmethod
    def _not_reversed(cls, value: float, info: ValidationInfo) -> float:
        low = info.data.get("low")
        if low is not None and not low < value:
            raise rule(f"must be above low ({low:g})", "Swap the two if they are reversed, or widen the range.")
        if low is not None and value - low < NARROWEST_ALPHA:
            allowed = f"must be at least {NARROWEST_ALPHA:g} above low ({low!r})"
            raise rule(allowed, "Widen the range; a single alpha needs no search.")
        return value


class Search(Section):
    """Section ``search``: range of alpha, trials, sampler. `prune` None follows the sampler (`SamplerEntry.sees_pruned`).

    `alpha_by_method` has ranges of single methods; without one a method has that of its registry entry, or `alpha`.
    """

    alpha: AlphaRange = Field(default_factory=AlphaRange)
    trials: Annotated[int, Field(ge=0, le=1_000_000)] = 25
    sampler: Annotated[str, Field(json_schema_extra=names_of(SAMPLERS))] = "line"
    third_objective: Annotated[str | None, Field(json_schema_extra=names_of(THIRD_OBJECTIVES))] = None
    prune: bool | None = None
    alpha_by_method: dict[str, AlphaRange] = Field(default_factory=dict)

    @field_validator("third_objective")
    @classmethod
    def _objective_exists(cls, value: str | None) -> str | None:
        if value is not None and value not in THIRD_OBJECTIVES:
            names = " or ".join(repr(name) for name in THIRD_OBJECTIVES)
            raise rule(f"must be one of {names}", "Choose one of them, or leave it out.")
        return value

    @field_validator("sampler")
    @classmethod
    def _sampler_exists(cls, value: str) -> str:
        if value not in SAMPLERS:
            raise rule("there is no such sampler", did_you_mean(value, list(SAMPLERS)))
        return value


class Objectives(Section):
    """Name what is maximised (`search.problem.objectives.ROLES`), or ``package.module:function``; None is the default.

    With a ``floor``, a share of the initial model's utility, trials below it are infeasible to Optuna: a constraint of each.
    """

    forgetting: Annotated[str | None, Field(json_schema_extra=_objectives_of("forgetting"))] = None
    utility: Annotated[str | None, Field(json_schema_extra=_objectives_of("utility"))] = None
    third: Annotated[str | None, Field(json_schema_extra=_objectives_of("third"))] = None
    floor: Annotated[float, Field(gt=0, le=1)] | None = None

    @field_validator("forgetting", "utility", "third")
    @classmethod
    def _objective_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            known = ROLES[str(info.field_name)]
            try:
                objective_named(str(info.field_name), value)
            except UserError:
                remedy = f"{did_you_mean(value, list(known))} An objective of your own is written package.module:function."
                raise rule(f"there is no such objective of {info.field_name}", remedy) from None
        return value


class Harness(Section):
    """Section ``lm_eval``: tasks of lm-evaluation-harness, whose accuracy the objective ``lm_eval`` is."""

    tasks: Annotated[tuple[Name, ...], *OneOrMore]
    limit: Count | None = None
    batch_size: Count = 8
    include_path: Name | None = None
    chat: bool = False


class Split(Section):
    """Halves of every evaluation set: `select` is the share of items that trials are scored on, the rest is for reporting."""

    select: Annotated[float, Field(gt=0, lt=1)] = 0.5


class ReferencePoint(Section):
    """Reference point of hypervolume; None is the lowest value that so many items can give."""

    log10_forget_quality: Annotated[float, Field(ge=-1e6, le=0)] | None = None
    model_utility: Annotated[float, Field(ge=0, lt=1)] = 0.0
    related_log10_forget_quality: Annotated[float, Field(ge=-1e6, le=0)] | None = None
    forgetting_to_chance: Annotated[float, Field(ge=-1, lt=0)] = -1.0
    utility_accuracy: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Hypervolume(Section):
    """How a front becomes one number. The cap is the noise ceiling; None takes it from the other retain models."""

    reference_point: ReferencePoint = Field(default_factory=ReferencePoint)
    forget_quality_cap: Annotated[float, Field(gt=0, le=1)] | None = 0.3

    @field_validator("forget_quality_cap")
    @classmethod
    def _leaves_an_area(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None:
            return None
        point = info.data.get("reference_point")
        floors = () if point is None else (point.log10_forget_quality, point.related_log10_forget_quality)
        for floor in floors:
            if floor is not None and math.log10(value) <= floor:
                raise rule(f"its log10 must be above the reference point ({floor:g})", "Lower the reference point.")
        return value
