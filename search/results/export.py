"""Export of a trial: a recipe to rebuild it, the scaled adapter, or the full model; loaded afresh and scored again."""

import math
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.evaluation.evaluator import load_for_scoring
from search.evaluation.models import PretrainedModels, checkpoint_folder
from search.evaluation.prepared import PreparedStudy, prepare
from search.evaluation.task import TASKS, Report, task_of
from search.problem.trial import INITIAL, RETAIN
from search.results.recipe import RECIPE_FILE, Recipe, read_recipe
from search.spec.models import PretrainedModel
from search.spec.study import BaseRunSpec, StudySpec
from uipe_core.corpora.split import take_items
from uipe_core.corpora.types import Corpus
from uipe_core.deltas.adapters import is_adapter
from uipe_core.deltas.checkpoints import import_checkpoints
from uipe_core.deltas.extrapolation import Extrapolator
from uipe_core.deltas.store import BaseRun, DeltaStore
from uipe_core.deltas.update_vectors import DENSE, UpdateVector, adapter_scale
from uipe_core.errors import ExportMismatchError, UserError
from uipe_core.logs.tofu import read_log
from uipe_core.models.loading import LoadedModel, ModelSource
from uipe_core.models.skeleton import open_initial
from uipe_core.models.transformers_compat import wrap_adapter
from uipe_core.unlearning.training import train_base_run

Numbers = Any
"""Metrics of a model, of the class its task computes."""


SAME = 1e-6
"""Allowed difference in model utility and KS statistic of a full model: its weights are the trial's to the bit."""
MERGED = 1e-3
"""Allowed difference in model utility where an adapter was scaled or merged: W + BA rounds otherwise than Wx + B(Ax)."""


def export(recipe: Recipe, to: Path, form: str, reference: Report | None = None, trust_remote_code: bool = False) -> Path:
    """Write an export, load it afresh with transformers, and score it again.

    Args:
        recipe: What to export.
        to: Folder to write; must not exist, or be empty. It appears whole or not at all.
        form: A key of `EXPORTERS`: ``recipe`` (YAML), ``adapter`` (PEFT, scaled by 1 + alpha), ``model`` (safetensors).
        reference: Scores of the retain model; scored here where there is such a model and they are not given.
        trust_remote_code: As `search.evaluation.prepared.prepare`.

    Returns:
        `to`.

    Raises:
        UserError: If `to` is in use, the form is unknown, or a full fine-tuning is asked for as an adapter.
        ExportMismatchError: If the numbers of the written model are not the trial's. Nothing is left behind.
    """
    if form not in EXPORTERS:
        raise UserError(f"--as: {form!r} is unknown; choose one of {', '.join(EXPORTERS)}")
    exporter = EXPORTERS[form]
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to}: it exists and is not an empty folder; choose another")
    preparation = prepare(recipe.spec, trust_remote_code)
    if preparation.fingerprint != recipe.fingerprint:
        raise UserError(
            "the corpus, the models, the checkpoints or the code changed since the study was run (another fingerprint); "
            "restore them, or run the study again"
        )
    low_rank = _is_low_rank(recipe)
    if exporter.low_rank_only and not low_rank:
        raise UserError(f"--as {form}: {recipe.base} changed all weights, so there is no adapter; use --as model or recipe")
    temporary = to.parent / f".{to.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        (temporary / RECIPE_FILE).write_text(recipe.as_yaml())
        exporter.write(recipe, preparation, temporary)
        if exporter.checked:
            metrics, held_out = _score_afresh(preparation, temporary, reference)
            _require_same(recipe, metrics, _tolerances(recipe.spec, preparation, low_rank))
            (temporary / "README.md").write_text(_card(recipe, metrics, held_out, form, exporter))
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror or error}; choose another folder or free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to


def _is_low_rank(recipe: Recipe) -> bool:
    """Return True if the point's update vector is an adapter."""
    if recipe.base in recipe.spec.checkpoints:
        return is_adapter(checkpoint_folder(recipe.spec.checkpoints[recipe.base][recipe.epoch - 1]))
    return recipe.spec.unlearning is not None and recipe.spec.unlearning.adapter is not None


def _start(recipe: Recipe, preparation: PreparedStudy) -> tuple[LoadedModel, Extrapolator, UpdateVector]:
    """Load the initial model, what moves it, and the update vector of the trial."""
    source = preparation.models.ready_source(INITIAL)
    update = _base_run(preparation, recipe.base, source).load(recipe.epoch)
    return *load_for_scoring(source), update


def _write_recipe(recipe: Recipe, preparation: PreparedStudy, folder: Path) -> None:
    read_recipe(folder / RECIPE_FILE)


def _write_model(recipe: Recipe, preparation: PreparedStudy, folder: Path) -> None:
    loaded, extrapolator, update = _start(recipe, preparation)
    model = extrapolator.apply(update, recipe.alpha)
    (model if update.kind == DENSE else model.merge_and_unload()).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _write_adapter(recipe: Recipe, preparation: PreparedStudy, folder: Path) -> None:
    loaded, _, update = _start(recipe, preparation)
    model = wrap_adapter(loaded.model, update.adapter or {})
    _load_scaled(model, update, recipe.alpha)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _load_scaled(model: Any, update: UpdateVector, alpha: float) -> None:
    """Load an adapter with 1 + alpha multiplied into its B factors, so that any PEFT applies it as it is."""
    from peft import set_peft_model_state_dict

    scaled = {
        name: tensor * (1.0 + alpha) if name.endswith(".lora_B.weight") else tensor for name, tensor in update.tensors.items()
    }
    set_peft_model_state_dict(model, scaled)
    if not math.isclose(model.peft_config["default"].lora_alpha / model.peft_config["default"].r, adapter_scale(update)):
        raise ValueError("the adapter's scale is not that of the update vector")


def _base_run(preparation: PreparedStudy, label: str, source: ModelSource) -> BaseRun:
    """A base run of the study, trained or imported again if the delta store has lost it."""
    if label in preparation.spec.checkpoints:
        models = preparation.models
        assert isinstance(models, PretrainedModels)
        initial = open_initial(models.initial_folder(), models.trust_remote_code)
        return import_checkpoints(initial, preparation.checkpoints_of(label), DeltaStore(preparation.delta_root))
    runs: dict[str, BaseRunSpec] = {run.label: run for run in preparation.spec.variants()}
    run = runs[label]
    config = preparation.unlearning(run)
    inputs = preparation.base_run_inputs(config)
    store = DeltaStore(preparation.delta_root)
    found = store.find(inputs)
    if found is not None:
        return found
    return store.get_or_train(inputs, train_base_run(source.load(dtype="auto"), preparation.corpus, config))


def _score_afresh(preparation: PreparedStudy, folder: Path, reference: Report | None) -> tuple[Numbers, Numbers | None]:
    """Score the written folder as a stranger would load it: on the items trials are scored on, and on those for reporting."""
    if reference is None and RETAIN in preparation.models.identities:
        log = preparation.models.retain_log
        if log is not None:
            reference = read_log(log)
        else:
            reference = _score(preparation.corpus, preparation, preparation.models.ready_source(RETAIN).load())
    loaded = replace(preparation.models.ready_source(INITIAL), location=str(folder), revision=None).load()
    split, numbers = preparation.split, []
    for rows in (split.select,) if preparation.spec.split is None else (split.select, split.report):
        # The trial's own batches: in other company the last bits of an answer's loss may differ.
        corpus = take_items(preparation.corpus, rows)
        against = None if reference is None else reference.take(rows, corpus.set_hashes)
        numbers.append(task_of(corpus).evaluate(_score(corpus, preparation, loaded), against, preparation.spec.definition))
    return numbers[0], numbers[1] if len(numbers) > 1 else None


def _score(corpus: Corpus, preparation: PreparedStudy, loaded: LoadedModel) -> Report:
    task = task_of(corpus)
    scorer = task.scorer(corpus, loaded.prompts, preparation.scoring)
    return task.score(scorer, loaded, 1.0, (), {}, preparation.spec.definition)[0]


def _tolerances(spec: StudySpec, preparation: PreparedStudy, low_rank: bool) -> dict[str, float]:
    """How far each checked number may be from the trial's.

    KS statistic and accuracies move in steps of one item, so a merged adapter may differ by a step or two.
    """
    checked = TASKS[spec.corpus.task].checked
    if not low_rank:
        return dict.fromkeys(checked, SAME)
    steps = {name: 2 / len(rows) for name, rows in preparation.split.select.items()}
    allowed = {"ks_statistic": steps["forget"], "model_utility": MERGED}
    allowed |= {f"{name}_accuracy": step for name, step in steps.items()}
    return {name: allowed[name] for name in checked}


def _require_same(recipe: Recipe, metrics: Numbers, allowed: Mapping[str, float]) -> None:
    task = TASKS[recipe.spec.corpus.task]
    numbers = task.numbers(metrics)
    got = {name: float(numbers[name]) for name in task.checked}
    wrong = [
        f"{name}: trial {recipe.expected[name]:.6g}, export {value:.6g}, apart by {abs(value - recipe.expected[name]):.2g}"
        for name, value in got.items()
        if not abs(value - recipe.expected[name]) <= allowed[name]
    ]
    if wrong:
        raise ExportMismatchError(
            f"the export of trial {recipe.trial} was withdrawn; scored afresh, its numbers are not the trial's: "
            + "; ".join(wrong)
        )


def _prompts(spec: StudySpec) -> str:
    """How questions reach the model: what anyone needs who wants the same numbers."""
    if not isinstance(spec.model, PretrainedModel):
        return "the tokenizer's chat template"
    if spec.model.prompt_template is not None:
        return f"`{spec.model.prompt_template!r}`"
    return f"format `{spec.model.prompt_format or 'chat'}` of UIPE Search"


def _origin(recipe: Recipe) -> str:
    """Where the update vector comes from, in words."""
    if recipe.base in recipe.spec.checkpoints:
        folder = Path(recipe.spec.checkpoints[recipe.base][recipe.epoch - 1])
        return f"from the given checkpoint {recipe.epoch} of {recipe.base} (`{folder.name}`)"
    run = next(run for run in recipe.spec.variants() if run.label == recipe.base)
    hyperparameters = ", ".join(f"{name} {value:g}" for name, value in run.hyperparameters.items())
    return f"unlearned with {recipe.base} ({hyperparameters}), epoch {recipe.epoch}"


def _card(recipe: Recipe, metrics: Numbers, held_out: Numbers | None, form: str, exporter: "Exporter") -> str:
    card_rows = TASKS[recipe.spec.corpus.task].card_rows
    rows = card_rows(metrics)
    other = {} if held_out is None else card_rows(held_out)
    heads = (
        "| metric | value |\n|---|---|"
        if held_out is None
        else "| metric | items selected by | held-out items |\n|---|---|---|"
    )
    table = "\n".join(f"| {name} | {value} |" + (f" {other[name]} |" if other else "") for name, value in rows.items())
    retain = recipe.provenance["models"].get("retain")
    reference = "chance" if retain is None else f"retain model `{retain}`"
    return f"""---
tags: [unlearning, uipe]
library_name: {exporter.library}
---
# {recipe.spec.name}: trial {recipe.trial}

{exporter.title}, {_origin(recipe)}, and parameter extrapolation with
alpha = {recipe.alpha:.6g}: theta = theta_init + (1 + alpha) * delta (UIPE, arXiv 2503.04693).

- initial model: `{recipe.provenance["models"]["initial"]}`
- reference: {reference}
- corpus: {recipe.provenance["corpus"]}
- prompts: {_prompts(recipe.spec)}

Numbers by the metric definition `{metrics.definition}`, scored after this export was written and loaded afresh:

{heads}
{table}

Rebuild it from `{RECIPE_FILE}`: `uipe rebuild {RECIPE_FILE} --to DIR --as {form}`.
"""


@dataclass(frozen=True)
class Exporter:
    """A form of export.

    Attributes:
        write: Write a trial's model into a folder, which has the recipe already.
        title, library: What the model card calls it, and the library that loads it.
        checked: Load the folder afresh with transformers, score it, and compare it with the trial.
        low_rank_only: Only a low-rank update has this form.
    """

    write: Callable[[Recipe, PreparedStudy, Path], None]
    title: str = "Full model"
    library: str = "transformers"
    checked: bool = True
    low_rank_only: bool = False


EXPORTERS: dict[str, Exporter] = {
    "recipe": Exporter(_write_recipe, checked=False),
    "adapter": Exporter(_write_adapter, "LoRA adapter, already scaled by 1 + alpha", "peft", low_rank_only=True),
    "model": Exporter(_write_model),
}
"""Forms of export by the name ``uipe export --as`` takes."""
