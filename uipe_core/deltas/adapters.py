"""A PEFT adapter folder as a low-rank update vector: LoRA of linear layers, and nothing that such a vector cannot say."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from uipe_core.deltas.update_vectors import LOW_RANK, UpdateVector
from uipe_core.errors import UserError
from uipe_core.storage.safetensors_files import FLOATS, ShardReader, StoredTensor, read_headers, weight_files

ADAPTER_CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")

_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"}
_SAID_BY_THE_TENSORS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_NO_EFFECT = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
_NO_EFFECT |= {"fan_in_fan_out", "megatron_core", "megatron_config", "runtime_config", "ensure_weight_tying"}
_NO_EFFECT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
_MERGE = "merge it into its model (merge_and_unload), and give the merged model as the checkpoint"

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to start LoRA that leave the weights underneath as they are; pissa, olora, corda and others move them."""


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds an adapter rather than a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_weights(folder: Path, skeleton: Any) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """PEFT's arguments for an adapter, and where its factors are; by the headers alone.

    The modules are those the file has factors for, by full name: what the configuration says about them (a pattern, a
    choice of layers) comes to the same. With ``use_rslora`` PEFT scales by lora_alpha / sqrt(r), which is the plain
    lora_alpha / r of a greater lora_alpha.

    Args:
        folder: The adapter.
        skeleton: The initial model on torch's meta device.

    Raises:
        UserError: If it is damaged, does not fit the model, or is more than LoRA factors of linear layers.
    """
    config = _config(folder)
    _require_plain_lora(folder, config)
    rank, scale = config["r"], config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    stored = read_headers(weight_files(folder, "adapter_model"))
    strange = sorted(name for name in stored if not name.startswith(_PREFIX) or not name.endswith(_ENDS))
    if strange:
        raise UserError(
            f"adapter {folder}: besides LoRA factors of linear layers it holds {len(strange)} tensors, first {strange[0]}; "
            f"{_MERGE}"
        )
    modules = sorted({name.removeprefix(_PREFIX).removesuffix(end) for name in stored for end in _ENDS if name.endswith(end)})
    wrong = [problem for module in modules if (problem := _misfit(module, stored, skeleton, rank))]
    if not modules:
        raise UserError(f"adapter {folder}: it is empty; fetch or save it again")
    if wrong:
        what = f"{len(wrong)} of {len(modules)} modules do not fit the initial model, first {wrong[0]}"
        raise UserError(f"adapter {folder}: {what}; give an adapter of this initial model")
    packed = sorted({place.dtype for place in stored.values()} - set(FLOATS))
    if packed:
        raise UserError(f"adapter {folder}: it holds weights as {', '.join(packed)}; save it as float32, bfloat16 or float16")
    adapter = {
        "r": rank,
        "lora_alpha": config.get("lora_alpha", 8) * rank / scale,
        "target_modules": modules,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "task_type": "CAUSAL_LM",
    }
    return adapter, stored


def read_adapter(folder: Path, skeleton: Any) -> UpdateVector:
    """An adapter as an update vector, with its factors in fp32.

    Raises:
        UserError: As `adapter_weights`, or if a factor is not finite.
    """
    adapter, stored = adapter_weights(folder, skeleton)
    reader = ShardReader()
    tensors = {name: reader.read(place).to(torch.float32, copy=True) for name, place in stored.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"adapter {folder}: {name} is not finite; it diverged, so give an earlier one")
    return UpdateVector(LOW_RANK, tensors, adapter)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); fetch or save the adapter again") from error
    rank = config.get("r", 8) if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{path}: not the configuration of an adapter; fetch or save the adapter again")
    return {**config, "r": rank}


def _require_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    from peft import LoraConfig

    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder}: it is of the type {config.get('peft_type')}, not LORA; {_MERGE}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"adapter {folder}: init_lora_weights {start!r} moves the weights underneath too, so the adapter alone is not the "
            f"update; {_MERGE}"
        )
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    for key, value in config.items():
        if key in _READ | _SAID_BY_THE_TENSORS | _NO_EFFECT or not value or value == defaults.get(key):
            continue
        raise UserError(f"adapter {folder}: {key} ({value!r}) is more than a low-rank update vector can say; {_MERGE}")


def _misfit(module: str, stored: Mapping[str, StoredTensor], skeleton: Any, rank: int) -> str | None:
    """What keeps the factors of a module from its weight, or None."""
    a, b = (stored.get(f"{_PREFIX}{module}{end}") for end in _ENDS)
    if a is None or b is None:
        return f"{module}: one of its two factors is missing"
    try:
        layer = skeleton.get_submodule(module)
    except AttributeError:
        return f"{module}: no such module"
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return f"{module}: factors {list(a.shape)} and {list(b.shape)} are not of rank {rank}"
    transposed = type(layer).__name__ == "Conv1D"
    if not transposed and not isinstance(layer, torch.nn.Linear):
        return f"{module}: a {type(layer).__name__}, not a linear layer"
    wanted = tuple(layer.weight.shape)
    found = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
    return None if found == wanted else f"{module}: update of shape {list(found)}, weight {list(wanted)}"
