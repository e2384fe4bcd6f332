"""Compare checkpoints with the initial model by names and shapes of its parameters, without reading weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uipe_core.errors import UserError, first_line
from uipe_core.models.transformers_compat import no_weights, tied_names
from uipe_core.storage.safetensors_files import FLOATS, ShardReader, StoredTensor, read_headers, weight_files

SHOWN = 3
"""Names shown of each kind of mismatch."""

_NO_EFFECT = re.compile(
    r"_name_or_path|architectures|transformers_version|(torch_)?dtype|use_cache|\w+_token_id|initializer_range|\w*dropout|\w+_pdrop"
    r"|pretraining_tp|problem_type|output_\w+|return_dict|(id2label|label2id|num_labels)|\w*gradient_checkpointing"
)
"""Configuration keys without effect on the computation of a loaded model."""


@dataclass(frozen=True)
class InitialModel:
    """Names, shapes and files of the initial model's parameters.

    Attributes:
        folder: Folder of the model.
        skeleton: The model on torch's meta device, without weights.
        shapes: Shape of every parameter by name; tied weights once.
        weights: Where each parameter is stored.
        trust_remote_code: Run code that comes with a model.
    """

    folder: Path
    skeleton: Any
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, StoredTensor]
    trust_remote_code: bool = False


def open_initial(folder: Path, trust_remote_code: bool = False) -> InitialModel:
    """Open the initial model of a folder without its weights.

    Raises:
        UserError: If the folder is no saved model, or its files do not hold its parameters.
    """
    skeleton = meta_model(str(folder), trust_remote_code=trust_remote_code)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    weights = _match(folder, skeleton, shapes, "its own configuration asks for")
    return InitialModel(folder, skeleton, shapes, weights, trust_remote_code)


def meta_model(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Build a causal language model on torch's meta device, without weights, from its configuration.

    Raises:
        UserError: If there is no readable configuration, or it makes no causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = _config(source, trust_remote_code, revision)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        skeleton.tie_weights()
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise UserError(f"{source}: its configuration makes no causal language model: {first_line(error)}") from error
    return skeleton


def dense_weights(initial: InitialModel, folder: Path) -> dict[str, StoredTensor]:
    """Return where a checkpoint stores each parameter of the initial model, in the order of its files; reads headers only.

    Raises:
        UserError: If the configurations compute differently, or names, shapes or dtypes do not match; says what differs.
    """
    ours = initial.skeleton.config.to_dict()
    theirs = _config(str(folder), initial.trust_remote_code).to_dict()
    differing = [
        f"{key}: {theirs.get(key)!r}, initial model {ours.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not _NO_EFFECT.fullmatch(key)
    ]
    if differing:
        raise UserError(
            f"{folder}: its config.json is not that of the initial model: {_some(differing, '; ')}; both must "
            "compute in the same way, so give checkpoints of this initial model"
        )
    return _match(folder, initial.skeleton, initial.shapes, "the initial model has")


def _match(folder: Path, skeleton: Any, shapes: Mapping[str, tuple[int, ...]], owner: str) -> dict[str, StoredTensor]:
    """Return where each parameter of the model is stored in a folder, in the order of its files."""
    no_weight = no_weights(skeleton)
    stored = {name: place for name, place in read_headers(weight_files(folder)).items() if not no_weight.search(name)}
    for alias, name in tied_names(skeleton, shapes).items():
        if alias in stored:
            copy = stored.pop(alias)
            if name in stored:
                _require_equal(folder, stored[name], copy)
            stored.setdefault(name, copy)
    parts = []
    if missing := sorted(shapes.keys() - stored.keys()):
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected := sorted(stored.keys() - shapes.keys()):
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    other = [
        f"{name} {list(place.shape)}, {owner} {list(shapes[name])}"
        for name, place in stored.items()
        if name in shapes and place.shape != shapes[name]
    ]
    if other:
        parts.append(f"{len(other)} of another shape ({_some(other, '; ')})")
    if parts:
        raise UserError(f"{folder}: its tensors are not what {owner}: {', '.join(parts)}")
    packed = sorted({place.dtype for place in stored.values()} - set(FLOATS))
    if packed:
        raise UserError(f"{folder}: it holds weights as {', '.join(packed)}; save it again as float32, bfloat16 or float16")
    return stored


def _require_equal(folder: Path, stored: StoredTensor, copy: StoredTensor) -> None:
    if stored.shape != copy.shape or not torch.equal(ShardReader().read(stored), ShardReader().read(copy)):
        raise UserError(
            f"{folder}: {stored.name} and {copy.name} are tied by config.json but differ in its files; "
            "set tie_word_embeddings: false in config.json if they were trained apart"
        )


def _config(source: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: its config.json cannot be read: {first_line(error)}") from error


def _some(names: Sequence[str], separator: str = ", ") -> str:
    rest = len(names) - SHOWN
    return separator.join(names[:SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")
