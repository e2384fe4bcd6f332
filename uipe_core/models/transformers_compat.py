"""Hold everything that relies on internals of transformers, accelerate and peft.

``tests/core/models/test_transformers_compat.py`` pins each assumption. Heavy libraries are imported on use.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ADAPTER_PREFIX = "base_model.model."
"""Prefix of module names in PEFT's adapter states and files."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""Suffixes of a module's factors there: A (r, in) and B (out, r)."""

PLAIN_LORA_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weights alone; pissa, olora, corda and others change them."""

_ATTENTION = "uipe_tree"
"""Name under which the tree's function takes the place of a model's attention."""

_DOWN_PROJECTION = re.compile(r"(^|\.)(down_proj|fc2|dense_4h_to_h|mlp\.c_proj|w2)(\.weight)?$")
"""Last weight of a feed-forward block in Llama, Phi, GPT-NeoX, GPT-2 and Mixtral."""


def tied_names(model: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the other names of tied weights, each with its name in ``named_parameters()``."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return {(one if other in parameters else other): (other if other in parameters else one) for one, other in pairs.items()}


def no_weights(model: Any) -> re.Pattern[str]:
    """Match stored tensors that loading ignores: buffers that are not saved, and names from older versions.

    Only for names that are no parameter: GPT-2 ignores ``attn.bias``, which stands in ``c_attn.bias`` too.
    """
    named = [f"^{re.escape(name)}$" for name, _ in model.named_buffers()]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    # Older versions of transformers stored rotary frequencies and positions.
    return re.compile("|".join([*named, *ignored, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]))


@dataclass(frozen=True)
class StoredGroup:
    """Tensors of a file that loading makes one parameter or several of.

    Attributes:
        target: Name that loading gives it in the model's state; of several, the first.
        names: Names in the file.
    """

    target: str
    names: tuple[str, ...]
    _model: Any
    _patterns: tuple[str, ...] = ()
    _converter: Any = None

    def make(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the group's parameters by name, from its tensors by name in the file (on the meta device: their shapes).

        Raises:
            Exception: Whatever an operation of transformers raises for tensors that it cannot convert.
        """
        if self._converter is None:
            return {self.target: tensors[self.names[0]]}
        converter = deepcopy(self._converter)
        for pattern, name in zip(self._patterns, self.names, strict=True):
            converter.add_tensor(self.target, name, pattern, tensors[name])
        made = converter.convert(self.target, model=self._model, config=self._model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}


def stored_groups(model: Any, names: Iterable[str]) -> list[StoredGroup]:
    """Group the names in a file by what loading makes of them, by transformers' own key mapping of the model.

    As in ``convert_and_load_state_dict_in_model`` of ``transformers.core_model_loading``. A module that is no model of
    transformers has the names of its parameters.
    """
    if not hasattr(model, "base_model_prefix"):
        return [StoredGroup(name, (name,), model) for name in names]
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    plain: list[StoredGroup] = []
    collected: dict[str, list[tuple[str, str]]] = {}
    # Experts are stacked in the order of their numbers.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            plain.append(StoredGroup(target, (name,), model))
        else:
            collected.setdefault(target, []).append((pattern, name))
    return plain + [
        StoredGroup(
            target, tuple(name for _, name in found), model, tuple(pattern for pattern, _ in found), by_pattern[found[0][0]]
        )
        for target, found in collected.items()
    ]


def loaded_dtypes(model: Any) -> dict[str, torch.dtype]:
    """Return the dtype that loading gives each parameter of a model built from its configuration, by name.

    Some stay in fp32 in a model of half precision (``_keep_in_fp32_modules``).
    """
    from transformers.core_model_loading import build_glob_alternation

    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    plan = model._get_dtype_plan(model.config.dtype)
    if plan:
        matching, by_group, _ = build_glob_alternation(list(plan))
        dtypes |= {name: plan[by_group[found.lastgroup]] for name in dtypes if (found := matching.search(name))}
    return dtypes


def reads_key(model: Any, config: Any, key: str) -> bool:
    """Return True if a key of a configuration may change what the model computes.

    That is a key the configuration's class knows, or that the model's module names: some read keys that no class declares.
    Every key of a class from outside transformers counts.
    """
    if not type(config).__module__.startswith("transformers.models.") or model.is_custom_code():
        return True
    if key in {field.name for field in fields(config)} or key in config.attribute_map:
        return True
    return any(re.search(rf"\b{re.escape(key)}\b", source) for source in _sources(type(model)))


def _sources(model_class: type) -> list[str]:
    """Return the source texts that read the configuration of a model: its own, and that of rotary embeddings."""
    modules = {sys.modules[base.__module__] for base in model_class.__mro__ if ".models." in base.__module__}
    return [inspect.getsource(module) for module in (*modules, sys.modules["transformers.modeling_rope_utils"])]


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's forward, that of the model underneath an adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def position_limit(config: Any) -> int | None:
    """Return how many positions a model can take; None without a limit (rotary embeddings, ALiBi, state-space models).

    Learned positions and tables of them end there with an index error, on a GPU with a failed assertion.
    """
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None) or getattr(text, "alibi", False):
        return None
    named = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return min((limit for limit in named if isinstance(limit, int) and limit > 0), default=None)


def accepts_logits_to_keep(model: Any) -> bool:
    """Return True if forward can compute the logits of chosen positions only."""
    return "logits_to_keep" in forward_parameters(model)


def select_cache_rows(cache: Any, rows: Tensor) -> None:
    """Keep only some rows of a ``DynamicCache``, in place."""
    cache.batch_select_indices(rows)


def generates_alone(model: Any) -> bool:
    """Return True if `generate` is wrong for several prompts at once: RWKV takes no attention mask and mixes up the rows."""
    return bool(model.config.model_type == "rwkv")


def keep_weights_as_loaded(model: Any) -> None:
    """Stop RWKV from halving weights in place when it is first evaluated, which update vectors know nothing of."""
    if model.config.model_type == "rwkv":
        model.config.rescale_every = 0


@contextmanager
def no_generation_defaults(model: Any) -> Iterator[None]:
    """Keep a model's ``generation_config.json``, from which come unset values, out of `generate` inside the block."""
    from transformers import GenerationConfig

    # An adapter's `generate` sets that of the model underneath.
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


def find_decoder_layers(model: Any) -> nn.ModuleList | None:
    """Return the outermost ModuleList as long as the configuration's number of layers, or None."""
    from torch import nn

    depth = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if len(module) == depth), None)


def is_down_projection(name: str) -> bool:
    """Return True for the parameter name of a feed-forward block's last weight, in the architectures known here."""
    return _DOWN_PROJECTION.search(name) is not None


def is_transposed(layer: Any) -> bool:
    """Return True for GPT-2's Conv1D, a linear layer whose weight is stored as (in, out)."""
    return type(layer).__name__ == "Conv1D"


def unmatched_targets(model: Any, targets: Iterable[str]) -> dict[str, str | None]:
    """Return the names of a LoRA's target modules that no linear layer has, each with the kind of module that has it, if any.

    PEFT takes a module by its full name or by its last parts, and passes over names that no module has.
    """
    from torch import nn

    wrong: dict[str, str | None] = {}
    modules = dict(model.named_modules())
    for target in targets:
        found = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not any(isinstance(module, nn.Linear) or is_transposed(module) for module in found):
            wrong[target] = type(found[0]).__name__ if found else None
    return wrong


def linear_names(model: Any) -> list[str]:
    """Return the last parts of the names of a model's linear layers, each once."""
    from torch import nn

    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_transposed(module))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts of all special tokens, those of ``added_tokens_decoder`` included."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def weight_name(module: str) -> str:
    """Return the parameter name of a module's weight from its name in an adapter state."""
    return f"{module.removeprefix(ADAPTER_PREFIX)}.weight"


def lora_defaults() -> dict[str, Any]:
    """Return the default of every field of LoraConfig."""
    from peft import LoraConfig

    return {field.name: field.default for field in fields(LoraConfig)}


def wrap_adapter(model: Any, adapter: Mapping[str, Any], *, rounded: bool = False) -> Any:
    """Wrap a model with a LoRA adapter of the given configuration.

    Args:
        model: A transformers model.
        adapter: Arguments of PEFT's LoraConfig.
        rounded: Hold the factors in the dtype of the weights, as transformers loads a saved adapter; else in fp32, to train.
    """
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**adapter), autocast_adapter_dtype=not rounded)


def has_adapter(model: Any) -> bool:
    """Return True if a model carries a LoRA adapter that is not merged."""
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in model.modules())


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return the adapter weights of a PEFT model by PEFT's names, without embeddings."""
    from peft import get_peft_model_state_dict

    # By default PEFT asks the hub for the base model's vocabulary size to decide about the embeddings.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


@contextmanager
def _wide_factors(layer: Any) -> Iterator[None]:
    """Hold the factors of a LoRA layer in double precision inside the block."""
    factors = [parameter for kind in (layer.lora_A, layer.lora_B) for parameter in kind.parameters()]
    before = [factor.data for factor in factors]
    for factor in factors:
        factor.data = factor.data.double()
    try:
        yield
    finally:
        for factor, data in zip(factors, before, strict=True):
            factor.data = data


def merge_adapter(model: Any, rounding: Callable[[Tensor, torch.dtype], Tensor]) -> Any:
    """Add the adapter's products to the weights and return the plain model; each sum is computed in double precision.

    PEFT's own merge rounds the product and then the sum.

    Args:
        model: A model from `wrap_adapter`.
        rounding: Rounds a sum to the dtype of its weight.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                with _wide_factors(layer):
                    total = layer.get_delta_weight("default").add_(weight)
                weight.copy_(rounding(total, weight.dtype))
    return model.unload()


def forget_quantization(model: Any) -> None:
    """Make a dequantised model one that can be saved: transformers takes what came from a GGUF file for quantised."""
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False


def make_accelerator(device: torch.device, half_precision: bool = False) -> Any:
    """Return an Accelerator for a model already on `device`: bf16 autocast on GPUs that have it, else fp32.

    Args:
        device: Where the model is.
        half_precision: Autocast on a CPU too, where it has instructions for bf16: for weights that are stored so.
    """
    import torch
    from accelerate import Accelerator

    threads = torch.get_num_threads()
    bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else half_precision and torch.cpu._is_avx512_bf16_supported()
    from accelerate.state import AcceleratorState

    wanted = "bf16" if bf16 else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # one per process, and a worker trains models of other dtypes one after another
    # Without device_placement=False it would move the model to the first device.
    accelerator = Accelerator(cpu=device.type == "cpu", device_placement=False, mixed_precision=wanted)
    torch.set_num_threads(threads)  # Accelerate sets a number of its own for several processes on the CPU
    return accelerator


@contextmanager
def attention_by(model: Any, attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Let `attend` take the place of a model's attention function while the context lasts.

    It is called with module, query, key, value, attention mask and options, as the functions that transformers registers. No
    mask is made for it. Models whose attention does not go through that registry are not changed.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, attend)
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def scaled_dot_product_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """Return (b, q, h, d) outputs of transformers' own function; query is (b, h, q, d), the mask (b, 1, q, k) of booleans.

    Raises:
        ValueError: Options of a model that this function does not know, such as soft caps.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
