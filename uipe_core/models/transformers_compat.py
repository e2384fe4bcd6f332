"""Hold everything that relies on internals of transformers, accelerate and peft.

``tests/core/models/test_transformers_compat.py`` pins each assumption. Heavy libraries are imported on use.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
"""Name under which a function of ours takes the place of a model's attention."""

_DOWN_PROJECTION = re.compile(r"(^|\.)(down_proj|fc2|dense_4h_to_h|mlp\.c_proj|w2)(\.weight)?$")
"""Last weight of a feed-forward block in Llama, Phi, GPT-NeoX, GPT-2 and Mixtral."""


def tied_names(model: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the other names of tied weights, each with its name in ``named_parameters()``."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return {(one if other in parameters else other): (other if other in parameters else one) for one, other in pairs.items()}


def no_weights(model: Any) -> re.Pattern[str]:
    """Match stored tensors that are no parameters: buffers, and names that loading ignores."""
    named = [f"^{re.escape(name)}$" for name, _ in model.named_buffers()]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    # Older versions of transformers stored rotary frequencies.
    return re.compile("|".join([*named, *ignored, r"rotary_emb\.inv_freq$"]))


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's forward, that of the model underneath an adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def accepts_logits_to_keep(model: Any) -> bool:
    """Return True if forward can compute the logits of chosen positions only."""
    return "logits_to_keep" in forward_parameters(model)


def select_cache_rows(cache: Any, rows: Tensor) -> None:
    """Keep only some rows of a ``DynamicCache``, in place."""
    cache.batch_select_indices(rows)


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


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts of all special tokens, those of ``added_tokens_decoder`` included."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def weight_name(module: str) -> str:
    """Return the parameter name of a module's weight from its name in an adapter state."""
    return f"{module.removeprefix(ADAPTER_PREFIX)}.weight"


def lora_defaults() -> dict[str, Any]:
    """Return the default of every field of LoraConfig."""
    from dataclasses import fields

    from peft import LoraConfig

    return {field.name: field.default for field in fields(LoraConfig)}


def wrap_adapter(model: Any, adapter: Mapping[str, Any]) -> Any:
    """Wrap a model with a LoRA adapter of the given configuration."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**adapter))


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return the adapter weights of a PEFT model by PEFT's names, without embeddings."""
    from peft import get_peft_model_state_dict

    # By default PEFT asks the hub for the base model's vocabulary size to decide about the embeddings.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def scale_adapter(model: Any, factor: float) -> None:
    """Multiply B A of every adapted module by `factor`, on top of PEFT's lora_alpha / r."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                module.set_scale(name, factor)


def make_accelerator(device: torch.device) -> Any:
    """Return an Accelerator for a model already on `device`: bf16 autocast on GPUs that have it, else fp32."""
    import torch
    from accelerate import Accelerator

    threads = torch.get_num_threads()
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    # Without device_placement=False it would move the model to the first device.
    accelerator = Accelerator(cpu=device.type == "cpu", device_placement=False, mixed_precision="bf16" if bf16 else "no")
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
