"""Read the activations of one decoder layer, select the weights that move them, and draw the direction to steer to.

Li et al., "The WMDP Benchmark" (arXiv 2403.03218), section 4, and the authors' code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uipe_core.errors import UserError
from uipe_core.models.transformers_compat import find_decoder_layers, is_down_projection

TRAINED_LAYERS = 3
"""The steered layer and the two before it."""


def model_depth(source: str, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """Return the number of decoder layers of a saved model from its configuration; None if it cannot be read (an adapter)."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return int(config.get_text_config().num_hidden_layers)


def check_layer(index: int, depth: int) -> None:
    """Raise UserError if a model of `depth` decoder layers has no layer of that index, from 0."""
    if not 0 <= index < depth:
        layers = f"{depth} decoder layer{'' if depth == 1 else 's'}"
        raise UserError(
            f"unlearning.methods.rmu.layer: found {index}, but the model has {layers}, counted from 0; "
            f"choose {f'0 to {depth - 1}' if depth > 1 else '0'}"
        )


def decoder_layer(model: Any, index: int) -> nn.Module:
    """Return the decoder layer of that index, from 0, of a transformers model, bare or with an adapter.

    Raises:
        UserError: If the model has no such layer.
    """
    layers = _decoder_layers(model)
    check_layer(index, len(layers))
    return layers[index]


def _decoder_layers(model: Any) -> nn.ModuleList:
    layers = find_decoder_layers(model)
    if layers is None:
        depth = model.config.get_text_config().num_hidden_layers
        raise UserError(f"rmu: cannot find the {depth} decoder layers of {type(model).__name__}; choose another method")
    return layers


def train_down_projections(model: Any, layer: int) -> None:
    """Make only the feed-forward down projections of `layer` and the two layers before it trainable.

    Raises:
        UserError: If the model has no such layer, or its layers have no down projection under a known name.
    """
    layers = _decoder_layers(model)
    check_layer(layer, len(layers))
    model.requires_grad_(False)
    found = [
        parameter
        for steering in layers[max(0, layer - TRAINED_LAYERS + 1) : layer + 1]
        for name, parameter in steering.named_parameters()
        if is_down_projection(name)
    ]
    if not found:
        raise UserError(
            f"rmu: the layers of {type(model).__name__} have no down projection under a known name; use a LoRA adapter "
            "(unlearning.adapter), whose weights are all trained"
        )
    for parameter in found:
        parameter.requires_grad_(True)


@contextmanager
def outputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the (b, t, d) outputs of a layer, one per forward pass made inside the block.

    A hook, because the last entry of ``output_hidden_states`` comes after the final norm.
    """
    collected: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        collected.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(keep)
    try:
        yield collected
    finally:
        handle.remove()


def control_direction(size: int, seed: int) -> Tensor:
    """Draw a (size,) direction of length 1: uniform in [0, 1) per entry, then normalised, as in the authors' code."""
    vector = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()
