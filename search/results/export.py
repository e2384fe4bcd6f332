"""Export a trial: a recipe to rebuild it, the scaled adapter, or the full model; loaded afresh and scored again."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.evaluation.evaluator import load_for_scoring
from search.evaluation.models import PretrainedModels, checkpoint_folder
from search.evaluation.prepared import PreparedStudy, prepare
from search.evaluation.task import Arrays, Report
from search.problem.trial import INITIAL
from search.results.card import CARD_FILE, card
from search.results.recipe import RECIPE_FILE, Recipe, read_recipe
from search.results.verification import LOSS, NONE, VERIFICATIONS, Verified, Verifier, Watch
from search.spec.sections import is_local
from search.spec.study import BaseRunSpec
from uipe_core.deltas.adapters import is_adapter
from uipe_core.deltas.checkpoints import import_checkpoints
from uipe_core.deltas.extrapolation import merge
from uipe_core.deltas.store import BaseRun, DeltaStore
from uipe_core.errors import UserError
from uipe_core.models.loading import BASE_FOLDER, LoadedModel, ModelSource, set_threads
from uipe_core.models.skeleton import open_initial
from uipe_core.storage.content_store import MANIFEST
from uipe_core.storage.files import whole_folder
from uipe_core.unlearning.training import train_base_run


def export(
    recipe: Recipe,
    to: Path,
    form: str,
    reference: Report | None = None,
    trust_remote_code: bool = False,
    *,
    verify: str = LOSS,
    items: Arrays | None = None,
    watch: Watch | None = None,
    audits: Sequence[Sequence[str]] = (),
    repository: str | None = None,
) -> Path:
    """Write an export, load it afresh with transformers, and score it again.

    Args:
        recipe: What to export.
        to: Folder to write; must not exist, or be empty. It appears whole or not at all.
        form: A key of `EXPORTERS`: ``recipe`` (YAML), ``adapter`` (PEFT, scaled by 1 + alpha), ``model`` (safetensors).
        reference: Scores of the retain model; scored here where there is such a model and they are not given.
        trust_remote_code: As `search.evaluation.prepared.prepare`.
        verify: One of `search.results.verification.VERIFICATIONS`: ``loss``, ``full`` or ``none``.
        items: Item scores of the trial by ``set/measurement``; compared with those of the export where they are given.
        watch: Hears how far it is, and the numbers that were compared.
        audits: Rows of the card's audit table (`search.results.audits.card_table`).
        repository: Name on the hub by which the card says how to use the model; that of the folder by default.

    Returns:
        `to`.

    Raises:
        UserError: If `to` is in use, the form is unknown, or a full fine-tuning is asked for as an adapter.
        ExportMismatchError: If the numbers of the written model are not the trial's. Nothing is left behind.
    """
    if form not in EXPORTERS:
        raise UserError(f"--as: {form!r} is unknown; choose one of {', '.join(EXPORTERS)}")
    if verify not in VERIFICATIONS:
        raise UserError(f"--verify: {verify!r} is unknown; choose one of {', '.join(VERIFICATIONS)}")
    exporter = EXPORTERS[form]
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to}: it exists and is not an empty folder; choose another")
    preparation = prepare(recipe.spec, trust_remote_code)
    if preparation.fingerprint != recipe.fingerprint:
        raise UserError(
            "the corpus, the models, the checkpoints or the code changed since the study was run (another fingerprint); "
            "restore them, or run the study again"
        )
    if (delta := recipe.provenance.get("delta")) is not None:
        preparation = replace(preparation, recorded={recipe.base: str(delta)})
    low_rank = _is_low_rank(recipe)
    if exporter.low_rank_only and not low_rank:
        raise UserError(f"--as {form}: {recipe.base} changed all weights, so there is no adapter; use --as model or recipe")
    set_threads(recipe.spec.resources.trial.threads)
    try:
        with whole_folder(to) as folder:
            (folder / RECIPE_FILE).write_text(recipe.as_yaml())
            verifier = Verifier(recipe, preparation, verify, reference, items, watch)
            checked = exporter.checked and verify != NONE
            if checked and exporter.merges and low_rank:
                loaded, model = _moved(recipe, preparation)
                verifier.measure_rounding(replace(loaded, model=model))
                del loaded, model  # before the next is loaded
            exporter.write(recipe, preparation, folder)
            verified = verifier.check(folder) if checked else Verified(NONE)
            if exporter.checked:
                titles = exporter.title, exporter.library
                text = card(recipe, verified, form, *titles, folder, repository or to.name, audits, repository is not None)
                (folder / CARD_FILE).write_text(text, encoding="utf-8")
            if watch is not None:
                for each in verified.compared:
                    watch.say(str(each))
                if verified.unread is not None:
                    watch.say(verified.unread)
    except OSError as error:
        raise UserError(f"--to {to}: {error.strerror or error}; choose another folder or free some space") from error
    return to


def _is_low_rank(recipe: Recipe) -> bool:
    """Return True if the point's update vector is an adapter."""
    if recipe.base in recipe.spec.checkpoints:
        return is_adapter(checkpoint_folder(recipe.spec.checkpoints[recipe.base][recipe.epoch - 1]))
    return recipe.spec.unlearning is not None and recipe.spec.unlearning.adapter is not None


def _moved(recipe: Recipe, preparation: PreparedStudy) -> tuple[LoadedModel, Any]:
    """Load the initial model, and return it with the model at theta(alpha), as trials score it."""
    source = preparation.models.ready_source(INITIAL)
    update = _base_run(preparation, recipe.base, source).load(recipe.epoch)
    loaded, extrapolator = load_for_scoring(source)
    return loaded, extrapolator.apply(update, recipe.alpha)


def _write_recipe(recipe: Recipe, preparation: PreparedStudy, folder: Path) -> None:
    read_recipe(folder / RECIPE_FILE)


def _write_model(recipe: Recipe, preparation: PreparedStudy, folder: Path) -> None:
    loaded, model = _moved(recipe, preparation)
    (merge(model) if _is_low_rank(recipe) else model).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _write_adapter(recipe: Recipe, preparation: PreparedStudy, folder: Path) -> None:
    loaded, model = _moved(recipe, preparation)
    named = next(iter(model.peft_config.values()))
    named.base_model_name_or_path, named.revision = _base_model(preparation, folder)
    # Else PEFT asks the hub for the base model's vocabulary size.
    model.save_pretrained(folder, save_embedding_layers=False)
    loaded.tokenizer.save_pretrained(folder)


def _base_model(preparation: PreparedStudy, folder: Path) -> tuple[str, str | None]:
    """Return how an adapter in `folder` names the model it belongs on, and its commit on the hub.

    A model that the study built has no name that means anything elsewhere: it is copied into the folder.
    """
    source = preparation.models.ready_source(INITIAL)
    if source.location != getattr(preparation.spec.model, "initial", None):
        shutil.copytree(source.location, folder / BASE_FOLDER, ignore=shutil.ignore_patterns(MANIFEST))
        return f"./{BASE_FOLDER}", None
    if not is_local(source.location):
        return source.location, source.revision
    place, here = Path(source.location), Path.cwd()
    return (f"./{place.relative_to(here).as_posix()}" if place.is_relative_to(here) else source.location), None


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
    corpus = preparation.training_corpus(run.method, source)
    return store.get_or_train(inputs, train_base_run(source.load(dtype="auto"), corpus, config))


@dataclass(frozen=True)
class Exporter:
    """A form of export.

    Attributes:
        write: Write a trial's model into a folder, which has the recipe already.
        title, library: What the model card calls it, and the library that loads it.
        checked: Load the folder afresh with transformers, score it, and compare it with the trial.
        low_rank_only: Only a low-rank update has this form.
        merges: A low-rank update is merged into the weights, whose sums are rounded: numbers of its own are shown.
    """

    write: Callable[[Recipe, PreparedStudy, Path], None]
    title: str = "Full model"
    library: str = "transformers"
    checked: bool = True
    low_rank_only: bool = False
    merges: bool = False


EXPORTERS: dict[str, Exporter] = {
    "recipe": Exporter(_write_recipe, checked=False),
    "adapter": Exporter(_write_adapter, "LoRA adapter, already scaled by 1 + alpha", "peft", low_rank_only=True),
    "model": Exporter(_write_model, merges=True),
}
"""Forms of export by the name ``uipe export --as`` takes."""
