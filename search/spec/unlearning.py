"""Validate section ``unlearning``, and list the base runs it stands for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails

from search.problem.space import Range
from search.problem.trial import retrained
from search.spec.bounds import (
    MOST_BASE_EPOCHS,
    MOST_BASE_RUNS,
    MOST_CONTROLS,
    Count,
    Epochs,
    LearningRate,
    Positive,
    Seed,
    Weight,
)
from search.spec.errors import did_you_mean, rule
from search.spec.sections import Adapter, OneOrMore, Section, Values, all_different, as_tuple
from uipe_core.unlearning.methods import BOUNDS, FORMER, METHODS


@dataclass(frozen=True)
class BaseRunSpec:
    """One training of one method.

    Attributes:
        label: The method, with the values that tell it from its other variants, and its seed where a study has several:
            ``npo[beta=0.1]@1``.
        method: A name in `uipe_core.unlearning.methods.METHODS`.
        hyperparameters: Everything that can vary: what the method takes, complete, and ``learning_rate``.
        seed: It is trained with this seed.
    """

    label: str
    method: str
    hyperparameters: dict[str, float | str]
    seed: int

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return float(self.hyperparameters["learning_rate"])

    @property
    def loss_hyperparameters(self) -> dict[str, float | str]:
        """Hyperparameters of the loss."""
        return {key: value for key, value in self.hyperparameters.items() if key != "learning_rate"}


def _methods_by_name(schema: dict[str, Any]) -> None:
    """Offer every method with its hyperparameters, as `json_schema_extra`; nothing stands for the defaults."""

    def value(key: str, default: float | str) -> dict[str, Any]:
        bound = BOUNDS[key]
        limit = "exclusiveMinimum" if bound.above else "minimum"
        one: dict[str, Any] = {"type": "integer" if bound.whole else "number", limit: bound.low}
        if bound.choices:
            one = {"enum": list(bound.choices)}
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}], "default": default}

    schema["additionalProperties"] = False
    schema["minProperties"] = 1
    schema["properties"] = {
        name: {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {key: value(key, default) for key, default in method.hyperparameters.items()},
        }
        for name, method in METHODS.items()
    }


def _several(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) == 1:
        raise rule("a single seed is the study's own", f"Write seed: {value[0]} at the top of the file, or more seeds here.")
    return tuple(int(seed) for seed in all_different(value))


class Unlearning(Section):
    """The base runs: every method with every combination of the values listed for it and for the learning rate, from each of
    the seeds where several are given; else from the study's own.

    `methods` comes out in the order of `uipe_core.unlearning.methods.METHODS`, with defaults filled in, however it was written;
    those of `FORMER` are filled in by `filled`, because an earlier run of the study may have had others.
    """

    methods: Annotated[
        dict[str, dict[str, Annotated[tuple[Weight, ...], *OneOrMore]]], Field(json_schema_extra=_methods_by_name)
    ]
    epochs: Epochs
    seeds: Annotated[
        tuple[Seed, ...], BeforeValidator(as_tuple), AfterValidator(_several), Field(max_length=MOST_CONTROLS)
    ] = ()
    learning_rate: Annotated[tuple[LearningRate, ...], *OneOrMore]
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    schedule: Literal["constant", "linear"] = "constant"
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.01
    max_grad_norm: Positive = 1.0
    adapter: Adapter | None = None

    @field_validator("learning_rate")
    @classmethod
    def _not_too_many(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        methods = info.data.get("methods", {})
        count = (
            max(len(info.data.get("seeds", ())), 1)
            * len(value)
            * sum(math.prod(map(len, own.values())) for own in methods.values())
        )
        if count > MOST_BASE_RUNS:
            allowed = f"the lists of this study make {count} base runs, and {MOST_BASE_RUNS} are the most"
            raise rule(allowed, "Give fewer values here or to the methods, or make several studies of it.")
        epochs = count * info.data.get("epochs", 0)
        if epochs > MOST_BASE_EPOCHS:
            allowed = f"the base runs of this study have {epochs} epochs together, and {MOST_BASE_EPOCHS} are the most"
            raise rule(allowed, "Give fewer epochs, or fewer values here or to the methods.")
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _nothing_means_defaults(cls, value: object) -> object:
        if isinstance(value, dict):
            return {name: {} if settings is None else settings for name, settings in value.items()}
        return value

    @field_validator("methods")
    @classmethod
    def _methods_exist(cls, value: dict[str, dict[str, Values]]) -> dict[str, dict[str, Values]]:
        if not value:
            raise rule("there must be at least one method", f"Choose from {', '.join(METHODS)}.")
        errors = [error for name, settings in value.items() for error in _method_errors(name, settings)]
        if errors:
            raise ValidationError.from_exception_data("methods", errors)
        return {
            name: {
                key: value[name].get(key, (default if isinstance(default, str) else float(default),))
                for key, default in method.hyperparameters.items()
                if key in value[name] or key not in FORMER
            }
            for name, method in METHODS.items()
            if name in value
        }

    def filled(self, earlier: Mapping[str, Mapping[str, Values]] | None = None) -> "Unlearning":
        """Return the section with every hyperparameter: where the file has none, the earlier run's, else the default.

        Args:
            earlier: Values of an earlier run of the study, by method and name.
        """

        def values(name: str, key: str) -> Values:
            before = {} if earlier is None else earlier.get(name, {})
            return self.methods[name].get(key) or before.get(key) or (METHODS[name].hyperparameters[key],)

        methods = {name: {key: values(name, key) for key in METHODS[name].hyperparameters} for name in self.methods}
        return self.model_copy(update={"methods": methods})

    def identifying_methods(self) -> dict[str, dict[str, list[float | str]]]:
        """Return the values of every method as they identify a study: without those that had no name before."""
        former = {key: (value,) for key, value in FORMER.items()}
        return {
            name: {key: list(values) for key, values in own.items() if former.get(key) != values}
            for name, own in self.filled().methods.items()
        }

    def own_ranges(self, given: Mapping[str, Range]) -> dict[str, Range]:
        """Return both ends of alpha of the methods that have a range of their own: a given one, else the registry's."""
        found = {name: given.get(name, METHODS[name].alpha) for name in self.methods}
        return {name: ends for name, ends in found.items() if ends is not None}

    def base_runs(self, seed: int) -> list[BaseRunSpec]:
        """Return the base runs: by method, by value in the order of the file, by seed; from `seed` where none are given."""
        runs: list[BaseRunSpec] = []
        for method, own in self.filled().methods.items():
            grid: dict[str, Values] = {**own, "learning_rate": self.learning_rate}
            varying = [key for key, values in grid.items() if len(values) > 1]
            for values in product(*grid.values()):
                chosen: dict[str, float | str] = dict(zip(grid, values, strict=True))
                shown = ",".join(f"{key}={_short(chosen[key])}" for key in varying)
                label = f"{method}[{shown}]" if shown else method
                runs += [BaseRunSpec(retrained(label, each), method, chosen, each) for each in self.seeds]
                runs += [] if self.seeds else [BaseRunSpec(label, method, chosen, seed)]
        return runs


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _method_errors(name: str, settings: dict[str, Values]) -> list[InitErrorDetails]:
    if name not in METHODS:
        error = rule(f"there is no method {name}", did_you_mean(name, list(METHODS)))
        return [{"type": error, "loc": (name,), "input": name}]
    errors: list[InitErrorDetails] = []
    known = list(METHODS[name].hyperparameters)
    for key, values in settings.items():
        if key not in known:
            remedy = did_you_mean(key, known) if known else "Remove it; this method has no hyperparameters."
            errors.append({"type": rule(f"{name} does not take {key}", remedy), "loc": (name, key), "input": values})
            continue
        bound = BOUNDS[key]
        for index, value in enumerate(values):
            if isinstance(value, str) and not bound.choices:
                errors.append({"type": "float_type", "loc": (name, key, index), "input": value})
            elif not bound.holds(value):
                remedy = f"Choose {bound}." if bound.whole or bound.choices else f"Choose a value {bound}."
                errors.append({"type": rule(f"must be {bound}", remedy), "loc": (name, key, index), "input": value})
    return errors
