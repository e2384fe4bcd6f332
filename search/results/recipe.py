"""Recipes: everything needed to rebuild a trial's model, as a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from search.evaluation.task import TASKS
from search.spec.study import RUNNING_KEYS, StudySpec
from search.store.record import StudyRecord
from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import read_regular

RECIPE_FILE = "recipe.yaml"


RECIPE_SCHEMA = 1


@dataclass(frozen=True)
class Recipe:
    """Everything needed to rebuild a trial's model.

    Attributes:
        spec: The study.
        fingerprint: Its fingerprint, by which a changed corpus or model is found out.
        trial, base, epoch, alpha: Which point.
        expected: The trial's numbers: model_utility, log10_forget_quality, forget_quality, ks_statistic, definition; its
            batch_size where that is not what the study asks for; losses: probabilities and truth ratios of the sets, by name.
        provenance: Models, corpus, delta key and versions, for people to read.
    """

    spec: StudySpec
    fingerprint: str
    trial: int
    base: str
    epoch: int
    alpha: float
    expected: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def as_yaml(self) -> str:
        """The recipe as a file, without what the study says about how it is run."""
        import yaml  # here and below: a status needs neither

        content = {
            "uipe_recipe": RECIPE_SCHEMA,
            "fingerprint": self.fingerprint,
            "point": {"trial": self.trial, "base": self.base, "epoch": self.epoch, "alpha": self.alpha},
            "expected": dict(self.expected),
            "provenance": dict(self.provenance),
            "study": self.spec.model_dump(mode="json", exclude=set(RUNNING_KEYS)),
        }
        head = "# Rebuild this model with: uipe rebuild recipe.yaml --to DIR --as model\n"
        return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UserError: If it is missing, not a recipe, or damaged.
    """
    import yaml

    try:
        content = yaml.safe_load(read_regular(path).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a {RECIPE_FILE} that `uipe export --as recipe` wrote") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("uipe_recipe") != RECIPE_SCHEMA:
        raise UserError(f"{path}: not a recipe of this version; give a {RECIPE_FILE} that `uipe export --as recipe` wrote")
    try:
        point = content["point"]
        recipe = Recipe(
            # A recipe comes from elsewhere: where its maker kept caches and trials is no place to write to here.
            spec=StudySpec.recorded({key: value for key, value in content["study"].items() if key not in RUNNING_KEYS}),
            fingerprint=content["fingerprint"],
            trial=int(point["trial"]),
            base=str(point["base"]),
            epoch=int(point["epoch"]),
            alpha=float(point["alpha"]),
            expected=dict(content["expected"]),
            provenance=dict(content["provenance"]),
        )
        _require_whole(recipe)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the recipe is damaged ({type(error).__name__}: {error}); export it again") from error
    return recipe


def _require_whole(recipe: Recipe) -> None:
    epochs = recipe.spec.base_epochs()
    if recipe.base not in epochs:
        raise ValueError(f"point.base is {recipe.base!r}, its study has {', '.join(epochs)}")
    if not 1 <= recipe.epoch <= epochs[recipe.base]:
        raise ValueError(f"point.epoch is {recipe.epoch}, its study has 1 to {epochs[recipe.base]}")
    numbers = [
        recipe.alpha,
        *(float(recipe.expected[name]) for name in TASKS[recipe.spec.corpus.task].checked(recipe.spec.maximised)),
    ]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("alpha or an expected number is not finite")


def recipe_of(record: StudyRecord, spec: StudySpec, row: Mapping[Any, Any]) -> Recipe:
    """The recipe of a trial.

    Args:
        record: The study's record.
        spec: The study's spec.
        row: The trial as a row of `search.results.study_result.StudyResult.trials`.
    """
    objectives = spec.maximised
    p_values = [objective.p_value for objective in objectives if objective.p_value is not None]
    names = dict.fromkeys(
        ["definition", *(objective.name for objective in objectives), *p_values, *TASKS[spec.corpus.task].checked(objectives)]
    )
    expected = {name: row[name] if isinstance(row[name], str) else float(row[name]) for name in names}
    if not pd.isna(size := row.get("batch_size")):
        expected["batch_size"] = int(size)
    means = {name: value for name, value in row.items() if str(name).startswith(("Prob ", "Truth Ratio "))}
    if means:
        expected["losses"] = {name: float(value) for name, value in means.items() if not pd.isna(value)}
    run = record.base_runs.get(row["base"])  # none where the folder was lost, and its trials came with their database
    delta = None if run is None else run.delta
    provenance = {"models": record.models, "versions": record.versions, "corpus": record.corpus.name, "delta": delta}
    return Recipe(
        spec=spec,
        fingerprint=record.fingerprint,
        trial=int(row["trial"]),
        base=row["base"],
        epoch=int(row["epoch"]),
        alpha=float(row["alpha"]),
        expected=expected,
        provenance=provenance,
    )
