"""Read a PEFT adapter folder as a low-rank update vector; only LoRA of linear layers can be one.

Factors that are not finite are found when the adapter is checked: they are small, so all of them are read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from uipe_core.deltas.update_vectors import LOW_RANK, UpdateVector
from uipe_core.errors import UserError
from uipe_core.models.transformers_compat import ADAPTER_PREFIX, LORA_A, LORA_B, PLAIN_LORA_STARTS, is_transposed, lora_defaults
from uipe_core.storage.files import read_json
from uipe_core.storage.safetensors_files import FLOATS, ShardReader, StoredTensor, read_headers, weight_files

ADAPTER_CONFIG = "adapter_config.json"

LARGEST = 10**9
"""No number of an adapter's configuration is as large."""

_READ = {"base_model_name_or_path", "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"}
_SEEN_IN_TENSORS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_NO_EFFECT = {"auto_mapping", "revision", "task_type", "inference_mode", "peft_version"}
_NO_EFFECT |= {"fan_in_fan_out", "megatron_core", "megatron_config", "runtime_config", "ensure_weight_tying"}
_NO_EFFECT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
_NUMBERS: dict[str, tuple[float, Callable[[float], bool], str]] = {
    "r": (8, lambda value: isinstance(value, int) and value >= 1, "a whole number of at least 1"),
    "lora_alpha": (8, lambda value: value > 0, "a number above 0"),
    "lora_dropout": (0.0, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
}
"""Numbers of a configuration that are computed with: PEFT's default, what holds of them, and the same in words."""
_MERGE = "merge it into its model (merge_and_unload), and give the merged model as the checkpoint"


def is_adapter(folder: Path) -> bool:
    """Return True if a checkpoint folder holds an adapter, not a model.

    A whole model may have the ``adapter_config.json`` of an adapter that was merged into it.

    Raises:
        UserError: If it holds the weights of both.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    own = any(folder.glob("adapter_model*"))
    if whole and own:
        raise UserError(f"{folder}: it holds a whole model and an adapter; keep one of them there, and move the other away")
    return not whole


def other_base(folder: Path, *names: str) -> str | None:
    """Return the model that an adapter was trained on by its own words, where that has none of the given names.

    Only the last part of names is compared: the same model may be on the hub and in a folder.

    Raises:
        UserError: If the adapter's configuration cannot be read.
    """
    base = _config(folder).get("base_model_name_or_path")
    known = {_last_part(name) for name in names}
    return None if not isinstance(base, str) or not base or _last_part(base) in known else base


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def adapter_weights(folder: Path, skeleton: Any) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return PEFT's arguments for an adapter, and where its factors are stored.

    Target modules are those with factors in the file, by full name. With ``use_rslora`` PEFT scales by lora_alpha / sqrt(r);
    the returned lora_alpha is raised so that lora_alpha / r is the same.

    Args:
        folder: The adapter.
        skeleton: The initial model on torch's meta device.

    Raises:
        UserError: If it is damaged, not finite, does not fit the model, or is more than LoRA factors of linear layers.
    """
    config = _config(folder)
    _require_plain_lora(folder, config)
    rank, scale = config["r"], config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    stored = read_headers(weight_files(folder, "adapter_model"))
    ends = (LORA_A, LORA_B)
    strange = sorted(name for name in stored if not name.startswith(ADAPTER_PREFIX) or not name.endswith(ends))
    if strange:
        found = f"{len(strange)} tensors, first {strange[0]}"
        raise UserError(f"adapter {folder}: apart from LoRA factors of linear layers it holds {found}; {_MERGE}")
    if not stored:
        raise UserError(f"adapter {folder}: it is empty; fetch or save it again")
    modules = sorted({name.removeprefix(ADAPTER_PREFIX).removesuffix(LORA_A).removesuffix(LORA_B) for name in stored})
    wrong = [problem for module in modules if (problem := _misfit(module, stored, skeleton, rank))]
    if wrong:
        what = f"{len(wrong)} of {len(modules)} modules do not fit the initial model, first {wrong[0]}"
        raise UserError(f"adapter {folder}: {what}; give an adapter of this initial model")
    packed = sorted({place.dtype for place in stored.values()} - set(FLOATS))
    if packed:
        raise UserError(f"adapter {folder}: it holds weights as {', '.join(packed)}; save it as float32, bfloat16 or float16")
    reader = ShardReader()
    for name, place in stored.items():
        if not torch.isfinite(reader.read(place)).all():
            raise UserError(f"adapter {folder}: {name} is not finite; it diverged, so give an earlier one")
    adapter = {
        "r": rank,
        "lora_alpha": config["lora_alpha"] * rank / scale,
        "target_modules": modules,
        "lora_dropout": config["lora_dropout"],
        "task_type": "CAUSAL_LM",
    }
    return adapter, stored


def read_adapter(folder: Path, skeleton: Any) -> UpdateVector:
    """Read an adapter as an update vector in fp32; raise UserError as `adapter_weights`."""
    adapter, stored = adapter_weights(folder, skeleton)
    reader = ShardReader()
    tensors = {name: reader.read(place).to(torch.float32, copy=True) for name, place in stored.items()}
    return UpdateVector(LOW_RANK, tensors, adapter)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); fetch or save the adapter again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the configuration of an adapter; fetch or save the adapter again")
    found = {**{key: default for key, (default, _, _) in _NUMBERS.items()}, **config}
    for key, (_, holds, rule) in _NUMBERS.items():
        value = found[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST or not holds(value):
            raise UserError(
                f"{path}: not the configuration of an adapter: {key} is {value!r}, and must be {rule}; fetch or save the "
                "adapter again"
            )
    return found


def _require_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder}: it is of the type {config.get('peft_type')}, not LORA; {_MERGE}")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_LORA_STARTS:
        why = "moves the weights underneath too, so the adapter alone is not the update"
        raise UserError(f"adapter {folder}: init_lora_weights {start!r} {why}; {_MERGE}")
    defaults, ignored = lora_defaults(), _READ | _SEEN_IN_TENSORS | _NO_EFFECT
    for key, value in config.items():
        if key not in ignored and value and value != defaults.get(key):
            raise UserError(f"adapter {folder}: {key} ({value!r}) is more than a low-rank update vector can say; {_MERGE}")


def _misfit(module: str, stored: Mapping[str, StoredTensor], skeleton: Any, rank: int) -> str | None:
    """Say why the factors of a module do not fit its weight, or return None."""
    a, b = (stored.get(f"{ADAPTER_PREFIX}{module}{end}") for end in (LORA_A, LORA_B))
    if a is None or b is None:
        return f"{module}: one of its two factors is missing"
    try:
        layer = skeleton.get_submodule(module)
    except AttributeError:
        return f"{module}: no such module"
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return f"{module}: factors {list(a.shape)} and {list(b.shape)} are not of rank {rank}"
    if not is_transposed(layer) and not isinstance(layer, torch.nn.Linear):
        return f"{module}: a {type(layer).__name__}, not a linear layer"
    wanted = tuple(layer.weight.shape)
    found = (a.shape[1], b.shape[0]) if is_transposed(layer) else (b.shape[0], a.shape[1])
    return None if found == wanted else f"{module}: update of shape {list(found)}, weight {list(wanted)}"
