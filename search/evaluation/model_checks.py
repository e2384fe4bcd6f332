"""Hold a study's models against what it asks of them: layers, modules, positions, given checkpoints.

Code that comes with a model runs only where the caller trusts it. Heavy libraries are imported where they are used.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.spec.models import FinetunedModel, PretrainedModel, TinyModel
from search.spec.sections import is_local, lacks_package
from search.spec.study import StudySpec
from uipe_core.corpora.types import Corpus
from uipe_core.errors import UserError, did_you_mean
from uipe_core.logs.tofu import read_log
from uipe_core.models.gguf import is_gguf

if TYPE_CHECKING:
    from uipe_core.models.loading import ModelSource


LATER = "is on the hub and is fetched when the study runs"
"""What a note says of an input that is not on this machine."""


def check_models(spec: StudySpec, corpus: Corpus | None) -> list[str]:
    """Check the models of a study that are on this machine; return notes on what only the run can check.

    Args:
        spec: The study.
        corpus: Its items; None if they are not on this machine.

    Raises:
        UserError: A model, a log or a checkpoint is missing, broken or does not fit.
    """
    if isinstance(spec.model, TinyModel):
        check_target_modules(spec, small_llama)
        check_steered_layers(spec, "", None, trusted=False)
        return []
    section = spec.model
    found = [_checked_place(key, value, section) for key, value in section.places().items()]
    notes = [note for note in found if note is not None]
    # What the checks below read: a folder here, without code of its own.
    start = section.start
    readable = is_local(start) and not any(f": {start} " in note for note in notes) and not is_gguf(start)
    remote = [place for places in spec.checkpoints.values() for place in places if not is_local(place)]
    notes += [f"checkpoints: {place} {LATER}" for place in remote]
    if spec.checkpoints and (remote or not readable):
        notes.append("checkpoints: they are held against model.initial when the study runs")
    elif spec.checkpoints:
        notes += check_checkpoints(spec, Path(start), trusted=False)
    if readable:
        if corpus is not None:
            from uipe_core.models.loading import ModelSource

            source = ModelSource(start, "", prompt_template=section.prompt_template, prompt_format=section.prompt_format)
            check_positions(spec, corpus, source, trusted=False)
        check_target_modules(spec, partial(_local_skeleton, start))
    if is_local(start) and not is_gguf(start):
        check_steered_layers(spec, start, None, trusted=False)
    return notes


def _checked_place(key: str, place: str, section: PretrainedModel | FinetunedModel) -> str | None:
    """Check a model or log that is on this machine; return a note on what only the run can check."""
    if lacks_package(place):
        return f"model.{key}: {place} is a file of a package that is not installed here; the run needs it (pip install)"
    if not is_local(place):
        return f"model.{key}: {place} {LATER}"
    if place.endswith(".json"):
        read_log(place)
        return None
    if is_gguf(place):
        from uipe_core.models.gguf import check_gguf

        return f"model.{key}: {check_gguf(Path(place))} from GGUF, dequantised: what quantisation took stays lost"
    from uipe_core.models.loading import brings_code, check_model_folder

    if section.trust_remote_code and brings_code(Path(place)):
        return f"model.{key}: {place} brings code of its own, so it is checked when the study runs"
    check_model_folder(place, section.prompt_template, section.prompt_format)
    return None


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
    given = {
        "unlearning.adapter": None if spec.unlearning is None else spec.unlearning.adapter,
        "audit.relearning.adapter": None if spec.audit is None else spec.audit.relearning.adapter,
    }
    named = {
        key: adapter.target_modules for key, adapter in given.items() if adapter and not isinstance(adapter.target_modules, str)
    }
    if not named:
        return
    from uipe_core.models.transformers_compat import linear_names, unmatched_targets

    try:
        model = skeleton()
    except UserError:
        return  # an adapter, whose base model is elsewhere
    known = linear_names(model)
    for key, targets in named.items():
        wrong = [
            f"{target!r} is " + (f"a {kind}, not a linear layer" if kind else f"no module of it.{did_you_mean(target, known)}")
            for target, kind in unmatched_targets(model, targets).items()
        ]
        if wrong:
            raise UserError(
                f"{key}.target_modules: {'; '.join(wrong)} The linear layers of the model are {', '.join(known)}; choose from "
                "these, or write all-linear"
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


def check_checkpoints(spec: StudySpec, initial_folder: Path, trusted: bool) -> list[str]:
    """Hold every given checkpoint against the initial model by configurations and headers; of adapters all is read.

    Returns:
        Notes: adapters that say they were trained on another model.

    Raises:
        UserError: With everything that does not fit.
    """
    from search.evaluation.models import checkpoint_folder
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
