"""Tell whether two configurations of a model compute in the same way."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from uipe_core.models.transformers_compat import reads_key

_NO_EFFECT = re.compile(
    r"_name_or_path|architectures|transformers_version|(torch_)?dtype|use_cache|\w+_token_id|initializer_range|\w*dropout|\w+_pdrop"
    r"|pretraining_tp|problem_type|output_\w+|return_dict|(id2label|label2id|num_labels)|\w*gradient_checkpointing"
    r"|_?attn_implementation\w*|_?experts_implementation\w*|quantization_config|tokenizer_class|torchscript|finetuning_task"
)
"""Keys without effect on what a loaded model computes. A quantisation is said by the dtype of the stored tensors."""

PLAIN_ROTARY = ("default", "linear")
"""Rotary embeddings whose angles do not depend on the number of positions."""


def differences(model: Any, theirs: Any) -> list[str]:
    """Return the keys by which another configuration computes differently from a model's, with both values.

    Left out are keys without effect on a loaded model, and those that neither the class nor the model reads.
    """
    return list(_differences(model, model.config, theirs, ""))


def _differences(model: Any, ours: Any, theirs: Any, where: str) -> Iterator[str]:
    if type(ours) is not type(theirs):
        yield f"{where}model_type: {theirs.model_type!r}, initial model {ours.model_type!r}"
        return
    mine, other = _values(ours), _values(theirs)
    # In sections of their own class, keys are known by that class.
    nested = [key for key in mine if hasattr(mine[key], "to_dict") and hasattr(other.get(key), "to_dict")]
    for key in sorted(mine.keys() | other.keys()):
        if key in nested:
            yield from _differences(model, mine[key], other[key], f"{where}{key}.")
        elif mine.get(key) != other.get(key) and _counts(model, ours, key):
            yield f"{where}{key}: {other.get(key)!r}, initial model {mine.get(key)!r}"


def _counts(model: Any, config: Any, key: str) -> bool:
    """Return True if a key may change what the model computes."""
    if _NO_EFFECT.fullmatch(key) or (key == "max_position_embeddings" and _plain_rotary(config)):
        return False
    return reads_key(model, config, key)


def _values(config: Any) -> dict[str, Any]:
    """Return the values of a configuration by key, its sections as configurations."""
    # Not by getattr, which raises where a value differs from layer to layer.
    plain, held = config.to_dict(), vars(config)
    return {key: held[key] if hasattr(held.get(key), "to_dict") else value for key, value in plain.items()}


def _plain_rotary(config: Any) -> bool:
    """Return True if the positions enter by rotary embeddings only, whose angles do not depend on how many there are."""
    rotary = getattr(config, "rope_parameters", None)
    if not isinstance(rotary, Mapping) or not rotary:
        return False
    kinds = [rotary, *(each for each in rotary.values() if isinstance(each, Mapping))]
    return all(each.get("rope_type", "default") in PLAIN_ROTARY for each in kinds)
