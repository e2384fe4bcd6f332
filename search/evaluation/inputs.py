"""Check local inputs and load warm-start points before anything is spent."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.problem.pareto import non_dominated
from search.problem.space import Point
from search.spec.corpora import fetched_sources
from search.spec.sections import PretrainedModel, TinyModel, is_local
from search.spec.study import StudySpec
from uipe_core.corpora.split import split_corpus
from uipe_core.corpora.types import UTILITY_SETS, Corpus
from uipe_core.errors import UserError
from uipe_core.logs.tofu import read_log
from uipe_core.metrics.answers import has_latin_word
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.uncertainty import detectable_shift
from uipe_core.models.gguf import check_gguf, did_you_mean, is_gguf

if TYPE_CHECKING:
    from uipe_core.models.loading import ModelSource


def require_trust(spec: StudySpec, granted: bool) -> None:
    """Refuse a study whose models bring code of their own, unless the one who starts it trusts that code.

    Args:
        spec: The study. A key of a file, which may be somebody else's, grants nothing by itself.
        granted: ``--trust-remote-code`` was given.

    Raises:
        UserError: The study asks for trust that is not granted.
    """
    if not isinstance(spec.model, TinyModel) and spec.model.trust_remote_code and not granted:
        raise UserError(
            f"model.trust_remote_code: true in a file runs nothing by itself; read the code that comes with "
            f"{spec.model.start}, then add --trust-remote-code (in Python: trust_remote_code=True), or set the key to false"
        )


def check_inputs(spec: StudySpec) -> list[str]:
    """Check the inputs of a study that are on this machine; return notes on what only the run can check.

    Code that comes with a model is never run here, whatever the study says.

    Raises:
        UserError: If an input is missing or broken.
    """
    later = "is on the hub and is fetched when the study runs"
    notes = [f"corpus.{key}: {source} {later}" for key, source in fetched_sources(spec.corpus)]
    corpus = None
    if not notes:
        corpus = spec.corpus.load(spec.seed)
        notes += check_items(spec, corpus)
    if not isinstance(spec.model, TinyModel):
        for key, value in spec.model.places().items():
            if not is_local(value):
                notes.append(f"model.{key}: {value} {later}")
            elif value.endswith(".json"):
                read_log(value)
            elif is_gguf(value):
                notes.append(f"model.{key}: {check_gguf(Path(value))} from GGUF, dequantised: its quantisation stays lost")
            else:
                from uipe_core.models.loading import brings_code, check_model_folder

                if spec.model.trust_remote_code and brings_code(Path(value)):
                    notes.append(f"model.{key}: {value} brings code of its own, so it is checked when the study runs")
                else:
                    check_model_folder(value, spec.model.prompt_template, spec.model.prompt_format)
    if isinstance(spec.model, PretrainedModel):
        remote = [place for places in spec.checkpoints.values() for place in places if not is_local(place)]
        notes += [f"checkpoints: {place} is on the hub and is fetched when the study runs" for place in remote]
        unseen = remote or any(note.startswith("model.initial:") for note in notes)
        if spec.checkpoints and unseen:
            notes.append("checkpoints: they are held against model.initial when the study runs")
        elif spec.checkpoints:
            notes += check_checkpoints(spec, Path(spec.model.initial), trusted=False)
        if corpus is not None and not any(note.startswith("model.initial:") for note in notes):
            from uipe_core.models.loading import ModelSource

            section = spec.model
            source = ModelSource(
                section.initial, "", prompt_template=section.prompt_template, prompt_format=section.prompt_format
            )
            check_positions(spec, corpus, source, trusted=False)
        if is_local(spec.model.initial) and not any(note.startswith("model.initial:") for note in notes):
            check_target_modules(spec, partial(_local_skeleton, spec.model.initial))
    if isinstance(spec.model, TinyModel):
        check_target_modules(spec, small_llama)
    place = "" if isinstance(spec.model, TinyModel) else spec.model.start
    if not place or (is_local(place) and not is_gguf(place)):
        check_steered_layers(spec, place, None, trusted=False)
    return [*notes, *earlier_fronts(spec).notes]


MANY_ITEMS = 100
"""Forget quality on so many items passes no untouched model (TOFU, two real logs); on 20 it passes 46% of them."""


def check_items(spec: StudySpec, corpus: Corpus) -> list[str]:
    """Check what a study that begins asks of its items; one that has begun is read, resumed and exported as it is.

    Raises:
        UserError: As `check_split` and `check_words`.
    """
    check_words(corpus, spec.definition)
    return check_split(spec, corpus)


def check_split(spec: StudySpec, corpus: Corpus) -> list[str]:
    """Refuse a split that leaves forget quality too few items where there are enough; return a note where there are too few.

    Raises:
        UserError: Fewer than `MANY_ITEMS` forget items to select on, of more than that; or an empty half.
    """
    split = split_corpus(corpus, None if spec.split is None else spec.split.select, spec.seed)
    if "forget" not in corpus.sets or spec.maximised[0].quality_of is None:
        return []
    whole, kept = len(corpus.sets["forget"]), len(split.select["forget"])
    if kept < MANY_ITEMS < whole:
        assert spec.split is not None
        enough = math.ceil(100 * MANY_ITEMS / whole) / 100
        raise UserError(
            f"split.select: {spec.split.select:g} leaves forget quality {kept} of {whole} forget items, and on fewer than "
            f"{MANY_ITEMS} it passes models that were never unlearned; give {enough:.2f} or more, or leave it out"
        )
    items = [corpus.sets["forget"][row] for row in split.select["forget"]]
    twice = len(items) - len({(item.question, item.answer) for item in items})
    notes = [f"corpus: {twice} forget items stand there more than once; forget quality counts each"] if twice else []
    if kept >= MANY_ITEMS:
        return notes
    half = "" if spec.split is None else f" `split` leaves {kept} of {whole} forget items; without it there are {whole}."
    return [*notes, f"{power_of_forget_quality(kept)}{half}"]


def check_words(corpus: Corpus, definition: str) -> None:
    """Refuse answers in which ROUGE sees no word: their recall is 0, and with it model utility, whatever a model answers.

    Raises:
        UserError: An evaluation set with such answers, where the definition counts runs of a-z and 0-9 alone.
    """
    if not corpus.sets or definition_named(definition).unicode_rouge:
        return  # multiple choice has letters, not words
    for name in (name for name in ("forget", *UTILITY_SETS) if name in corpus.sets):
        items = corpus.sets[name]
        without = [item.answer for item in items if not has_latin_word(item.answer)]
        if without:
            raise UserError(
                f"corpus: {len(without)} of {len(items)} {name} answers ({without[0]!r}) have no letter a-z and no digit, all "
                f"that ROUGE of the definition {definition} counts, so their recall is 0 for every model; set "
                "scoring.definition (--definition) to tofu-unicode"
            )


def power_of_forget_quality(items: int) -> str:
    """Say in a sentence what forget quality on so many items can see (`uipe_core.metrics.uncertainty.detectable_shift`)."""
    shift, distance = detectable_shift(items)
    if distance >= 1:
        return f"Forget quality on {items} items: no difference is seen, however large."
    return (
        f"Forget quality on {items} items: truth ratios {shift:.2g} standard deviations from the retain model's (KS distance "
        f"{distance:.2f}) are seen (p < 0.05) in nine of ten draws of items; what is closer may pass as unlearned."
    )


def check_steered_layers(spec: StudySpec, place: str, revision: str | None, trusted: bool) -> None:
    """Refuse layers that the initial model lacks, where a method steers one and the number of layers is known.

    Args:
        spec: The study.
        place: Folder or hub name of a model of the initial model's shape; any text for tiny models.
        revision: Commit that pins one from the hub.
        trusted: Code that comes with the model may run.

    Raises:
        UserError: A layer the model does not have.
    """
    layers = sorted({int(run.hyperparameters["layer"]) for run in spec.variants() if "layer" in run.hyperparameters})
    if not layers:
        return
    from uipe_core.unlearning.steering import check_layer, model_depth

    model = spec.model
    depth = model.layers if isinstance(model, TinyModel) else model_depth(place, revision, trusted)
    if depth is not None:
        for layer in layers:
            check_layer(layer, depth)


def _local_skeleton(folder: str) -> Any:
    from uipe_core.models.skeleton import meta_model

    return meta_model(folder)


def small_llama() -> Any:
    """Return a model with the module names of tiny models, whatever their size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape))


def check_target_modules(spec: StudySpec, skeleton: Callable[[], Any]) -> None:
    """Refuse names of a LoRA's target modules that the model's linear layers do not have.

    Args:
        spec: The study.
        skeleton: Makes the initial model without weights; called only where names are given.

    Raises:
        UserError: With every such name, and those there are.
    """
    adapter = None if spec.unlearning is None else spec.unlearning.adapter
    if adapter is None or isinstance(adapter.target_modules, str):
        return
    from uipe_core.models.transformers_compat import linear_names, unmatched_targets

    try:
        model = skeleton()
    except UserError:
        return  # an adapter, whose base model is elsewhere
    known = linear_names(model)
    wrong = [
        f"{target!r} is " + (f"a {kind}, not a linear layer" if kind else f"no module of it.{did_you_mean(target, known)}")
        for target, kind in unmatched_targets(model, adapter.target_modules).items()
    ]
    if wrong:
        raise UserError(
            f"unlearning.adapter.target_modules: {'; '.join(wrong)} The linear layers of the model are {', '.join(known)}; "
            "choose from these, or write all-linear"
        )


def check_positions(spec: StudySpec, corpus: Corpus, source: "ModelSource", trusted: bool) -> None:
    """Refuse items, and texts that may be generated, that are longer than the initial model has positions.

    Args:
        spec: The study.
        corpus: Its items.
        source: The initial model; its configuration and tokenizer are read.
        trusted: Code that comes with the model may run.

    Raises:
        UserError: With an item, its tokens, and the positions.
    """
    from uipe_core.models.skeleton import read_config
    from uipe_core.models.transformers_compat import position_limit
    from uipe_core.scoring.lengths import require_positions
    from uipe_core.scoring.scorer import ScoringConfig

    if is_local(source.location) and not (Path(source.location) / "config.json").is_file():
        return  # an adapter, whose base model is elsewhere
    try:
        limit = position_limit(read_config(source.location, trusted, source.revision))
    except UserError:
        return  # an adapter on the hub
    if limit is not None:
        scoring = ScoringConfig.of(spec.scoring.definition, spec.scoring.rows, spec.scoring.max_new_tokens)
        prompts = replace(source, trust_remote_code=trusted).prompts()
        require_positions(corpus, prompts, scoring, limit, trains=spec.unlearning is not None)


def checkpoint_folder(place: str) -> Path:
    """The folder of a given checkpoint: its own, or the hub's copy on this machine, fetched where it is missing."""
    if is_local(place):
        return Path(place)
    from uipe_core.models.loading import model_folder

    return model_folder(place)


def check_checkpoints(spec: StudySpec, initial_folder: Path, trusted: bool) -> list[str]:
    """Hold every given checkpoint against the initial model by configurations and headers; of adapters all is read.

    Returns:
        Notes: adapters that say they were trained on another model.

    Raises:
        UserError: With everything that does not fit.
    """
    from uipe_core.deltas.adapters import is_adapter, other_base
    from uipe_core.deltas.checkpoints import check_checkpoint
    from uipe_core.models.skeleton import open_initial

    initial = open_initial(initial_folder, trusted)
    named = [initial.skeleton.config.name_or_path, *([spec.model.initial] if isinstance(spec.model, PretrainedModel) else [])]
    problems, notes = [], []
    for label, folders in spec.checkpoints.items():
        for place, folder in enumerate(folders):
            try:
                found = checkpoint_folder(folder)
                check_checkpoint(initial, found)
                base = other_base(found, *named) if is_adapter(found) else None
            except UserError as error:
                problems.append(f"checkpoints.{label}[{place}]: {error}")
                continue
            if base is not None:
                said = f"by its adapter_config.json it was trained on {base}, and model.initial is {named[-1]}"
                notes.append(f"checkpoints.{label}[{place}]: {said}; on another model it would be no unlearning")
    if problems:
        raise UserError("\n  ".join(problems))
    return notes


@dataclass(frozen=True)
class EarlierFronts:
    """Hold what earlier studies offer.

    Attributes:
        points: Front points that exist in this study too, in the order of `warm_start`, each once.
        notes: What was left out, and why.
    """

    points: tuple[Point, ...]
    notes: tuple[str, ...]


def earlier_fronts(spec: StudySpec) -> EarlierFronts:
    """The fronts of the studies that `spec.warm_start` names, as points of this study.

    Numbers are not taken over: corpus, model or definition may be others here, so every point is scored again.

    Raises:
        UserError: If a folder holds no study or no trial, or its study maximises something else.
    """
    points: dict[Point, None] = {}
    notes: list[str] = []
    for place, folder in enumerate(spec.warm_start):
        name, front = _front_of(spec, f"warm_start[{place}]: ", Path(folder))
        for point in front:
            reason = _misfit(spec, point)
            if reason is not None:
                where = f"{point.base}, epoch {point.epoch}, alpha {point.alpha:.4g}"
                notes.append(f"warm_start: {where} of {name} is left out: {reason}")
            else:
                points.setdefault(point)
    return EarlierFronts(tuple(points), tuple(notes))


def _front_of(spec: StudySpec, where: str, folder: Path) -> tuple[str, list[Point]]:
    """Name of the study in a folder, and its front."""
    from search.store.study_store import StudyStore  # Optuna and pandas come with it, and most studies need none of it

    try:
        store = StudyStore.open(folder)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    ours = [objective.name for objective in spec.maximised]
    theirs = [objective.name for objective in store.objectives]
    if ours != theirs:
        raise UserError(
            f"{where}{folder}: its study maximises {', '.join(theirs)}, this one {', '.join(ours)}; give studies with the same "
            "objectives, or remove it"
        )
    trials = store.trials_frame()
    store.close()
    if trials.empty:
        raise UserError(f"{where}{folder}: no trial of this study is complete yet; finish it, or remove it")
    name = store.record.name
    front = trials[non_dominated(trials[ours].to_numpy())]
    return name, [
        Point(str(row["base"]), int(row["epoch"]), float(row["alpha"]), warm_start=name) for row in front.to_dict("records")
    ]


def _misfit(spec: StudySpec, point: Point) -> str | None:
    """Why a point is none of this study's search, or None."""
    epochs, alpha = spec.base_epochs(), spec.search.alpha
    if point.base not in epochs:
        return f"this study has no base run {point.base} (it has {', '.join(epochs)})"
    if point.epoch > epochs[point.base]:
        return f"{point.base} has {epochs[point.base]} epochs here"
    if not alpha.low <= point.alpha <= alpha.high:
        return f"search.alpha goes from {alpha.low:g} to {alpha.high:g}"
    return "it is scored anyway" if point.alpha == 0 else None
