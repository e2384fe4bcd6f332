"""Update vectors: what unlearning changed, dense or low-rank, and models moved along them.

theta(alpha) = theta_init + (1 + alpha) * delta, UIPE (arXiv 2503.04693). Arithmetic is fp32, from pristine
weights every time, so a walk of any length leaves no drift; the result is cast to the dtype the model is scored in.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DENSE, LOW_RANK = "dense", "low_rank"

PART = 1 << 22
"""Entries handled at once where torch would otherwise make a copy of a whole tensor."""


@dataclass(frozen=True)
class UpdateVector:
    """delta = theta_unlearned - theta_init of one epoch of a base run.

    Attributes:
        kind: ``dense`` (a tensor per weight) or ``low_rank`` (the LoRA factors A and B of each adapted module).
        tensors: fp32 tensors on the CPU. Dense: by parameter name. Low-rank: by PEFT's adapter state names.
        adapter: PEFT's adapter configuration; None for dense vectors.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Any] | None = None
    _norms: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    @property
    def norms(self) -> dict[str, float]:
        """Frobenius norm of the update per weight; for low-rank vectors that of the product scale * B A, by module."""
        if not self._norms:
            if self.kind == DENSE:
                self._norms.update((name, _norm(tensor)) for name, tensor in self.tensors.items())
            else:
                scale = adapter_scale(self)
                for module, (a, b) in factors(self).items():
                    self._norms[module] = scale * _product_norm(a, b)
        return self._norms

    @property
    def norm(self) -> float:
        """Norm of the whole update."""
        return sum(value**2 for value in self.norms.values()) ** 0.5


def adapter_scale(update: UpdateVector) -> float:
    """The factor PEFT applies to B A: lora_alpha / r."""
    if update.adapter is None:
        raise ValueError("a dense update vector has no adapter")
    return float(update.adapter["lora_alpha"]) / float(update.adapter["r"])


def factors(update: UpdateVector) -> dict[str, tuple[Tensor, Tensor]]:
    """(A (r, in), B (out, r)) of a low-rank update by module name."""
    names = [name.removesuffix(".lora_A.weight") for name in update.tensors if name.endswith(".lora_A.weight")]
    return {n: (update.tensors[f"{n}.lora_A.weight"], update.tensors[f"{n}.lora_B.weight"]) for n in names}


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in double precision: an embedding has a hundred million entries.

    In parts, because torch would make a copy of the whole in that precision.
    """
    parts = tensor.flatten().split(PART)
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))


def _product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B A without forming it: trace((B^T B)(A A^T)) in double precision."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def snapshot(model: Any) -> dict[str, Tensor]:
    """Copies of all weights by parameter name, on the CPU, as stored; tied weights once."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@torch.no_grad()
def take_update(model: Any, initial: Mapping[str, Tensor]) -> UpdateVector:
    """The dense update of an fp32 model since `initial`, with the model set onto theta_init + delta.

    A difference of two floats, added back, may miss the second by one unit in the last place. Setting the model onto the sum
    (a change of one such unit at most) makes the epoch's unlearned model and theta(0) the same bits by construction.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        start = initial[name].float()
        delta = parameter.detach().to("cpu", torch.float32) - start
        parameter.copy_(start + delta)
        tensors[name] = delta
    return UpdateVector(DENSE, tensors)


def extrapolate(initial: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """theta_init + (1 + alpha) * delta in fp32; exactly theta_init at alpha = -1."""
    return torch.add(initial.float(), delta, alpha=1.0 + alpha)


def random_direction(update: UpdateVector, seed: int) -> UpdateVector:
    """A Gaussian direction with the same norm per tensor (per adapted module for low-rank updates): the control of a search.

    Args:
        update: The update whose norms to match.
        seed: Seed of the direction.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    if update.kind == DENSE:
        for name, tensor in update.tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            drawn[name] = noise * (update.norms[name] / max(_norm(noise), 1e-30))
    else:
        scale = adapter_scale(update)
        for module, (a, b) in factors(update).items():
            new_a, new_b = torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator)
            drawn[f"{module}.lora_A.weight"] = new_a
            drawn[f"{module}.lora_B.weight"] = new_b * (update.norms[module] / (scale * _product_norm(new_a, new_b)))
    return UpdateVector(update.kind, drawn, update.adapter)


def save_update(update: UpdateVector, path: Path) -> None:
    """Writes an update vector as one safetensors file; kind and adapter configuration are its metadata."""
    metadata = {"kind": update.kind, "adapter": json.dumps(update.adapter)}
    save_file({name: tensor.contiguous() for name, tensor in update.tensors.items()}, path, metadata=metadata)


def save_streamed(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]) -> float:
    """Writes a dense update vector as its tensors come, in the form of `save_update`, and returns its norm.

    The writer of safetensors wants all tensors at once. Its format is the length of the header in 8 bytes, the header as JSON,
    then the numbers; where names and shapes are known beforehand, one tensor at a time is all that needs to be in memory.

    Args:
        path: File to write.
        shapes: Shape of every tensor by name, in the order in which `tensors` brings them.
        tensors: Names and fp32 tensors on the CPU.

    Raises:
        ValueError: If a tensor comes out of turn, has another shape or is not fp32, or there are too few or too many.
    """
    header: dict[str, Any] = {"__metadata__": {"kind": DENSE, "adapter": json.dumps(None)}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    norm = 0.0
    source = iter(tensors)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for expected, shape in shapes.items():
            name, tensor = next(source, ("nothing", torch.empty(0)))
            if (name, tensor.dtype, list(tensor.shape)) != (expected, torch.float32, list(shape)):
                raise ValueError(f"{expected} {tuple(shape)} in fp32 expected, got {name} {tuple(tensor.shape)} {tensor.dtype}")
            stream.write(tensor.contiguous().numpy().data)
            norm = math.hypot(norm, _norm(tensor))
            # Let go before the next one is made: two large ones at once would double the peak.
            del tensor
    if (extra := next(source, None)) is not None:
        raise ValueError(f"no more tensors expected, got {extra[0]}")
    return norm


def load_update(path: Path) -> UpdateVector:
    """Reads an update vector written by `save_update` or `save_streamed`."""
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    return UpdateVector(metadata["kind"], tensors, json.loads(metadata["adapter"]))


class Extrapolator:
    """Moves one model along update vectors, always from its pristine weights.

    Dense updates are written into the weights. Low-rank updates are loaded as a PEFT adapter whose scale is set; they are
    never merged, so the weights underneath stay as they are.

    Args:
        model: A transformers model holding theta_init. It is changed in place (and wrapped for low-rank updates).
        initial: The weights theta_init as stored; taken from the model when not given. Give them when the model was cast to
            another dtype, so that extrapolation still starts from the stored values.
    """

    def __init__(self, model: Any, initial: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self._initial = dict(initial) if initial is not None else snapshot(model)
        self._moved = False
        self._adapter: Mapping[str, Any] | None = None
        self._loaded: UpdateVector | None = None

    def apply(self, update: UpdateVector, alpha: float) -> Any:
        """Sets the model to theta(alpha) and returns it.

        Raises:
            ValueError: If the update does not fit the model's weights.
        """
        if update.kind == LOW_RANK:
            return self._apply_low_rank(update, alpha)
        self._unwrap()
        parameters = dict(self.model.named_parameters())
        _check_fit(update.tensors, parameters)
        self._moved = True
        with torch.no_grad():
            for name, target in parameters.items():
                initial, delta = self._initial[name].to(target.device), update.tensors[name].to(target.device)
                target.copy_(extrapolate(initial, delta, alpha))
        return self.model

    def reset(self) -> Any:
        """Sets the model back to theta_init and returns it."""
        if self._adapter is not None:
            _scale_adapter(self.model, 0.0)
        elif self._moved:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self._initial[name])
            self._moved = False
        return self.model

    def _apply_low_rank(self, update: UpdateVector, alpha: float) -> Any:
        from peft import set_peft_model_state_dict

        if self._adapter is None or self._adapter != update.adapter:
            self._unwrap()
            self.reset()
            self.model = wrap_adapter(self.model, update.adapter or {})
            self.model.eval()
            self._adapter = update.adapter
        if self._loaded is not update:
            _check_fit(update.tensors, adapter_state(self.model))
            set_peft_model_state_dict(self.model, dict(update.tensors))
            self._loaded = update
        _scale_adapter(self.model, 1.0 + alpha)
        return self.model

    def _unwrap(self) -> None:
        """Takes the adapter off: dense updates name the plain modules, and another adapter may have other ones."""
        if self._adapter is not None:
            self.model = self.model.unload()
            self._adapter, self._loaded = None, None


def _check_fit(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    unknown, uncovered = sorted(tensors.keys() - places.keys()), sorted(places.keys() - tensors.keys())
    if unknown:
        raise ValueError(f"update vector has {len(unknown)} weights the model has not, first {unknown[0]!r}")
    if uncovered:
        raise ValueError(f"update vector lacks {len(uncovered)} weights of the model, first {uncovered[0]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape:
            raise ValueError(f"{name}: update has shape {tuple(tensor.shape)}, model {tuple(places[name].shape)}")


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapter weights of a PEFT model by PEFT's names, without the embeddings underneath."""
    from peft import get_peft_model_state_dict

    # Left to itself PEFT asks the hub for the base model's vocabulary size to decide about the embeddings.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def wrap_adapter(model: Any, adapter: Mapping[str, Any]) -> Any:
    """Wraps a transformers model with a PEFT LoRA adapter of the given configuration."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**adapter))


def _scale_adapter(model: Any, factor: float) -> None:
    """Multiplies B A of every adapted module by `factor` on top of PEFT's own lora_alpha / r."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                module.set_scale(name, factor)
