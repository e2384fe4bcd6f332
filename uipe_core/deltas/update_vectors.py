"""Define update vectors, dense or low-rank, their norms, and random directions of the same norms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uipe_core.models.transformers_compat import LORA_A, LORA_B
from uipe_core.storage.safetensors_files import PART, LazyTensors, shapes_of, temporary_zeros

DENSE, LOW_RANK = "dense", "low_rank"


@dataclass(frozen=True)
class UpdateVector:
    """delta = theta_unlearned - theta_init of one epoch of a base run.

    Attributes:
        kind: ``dense`` (a tensor per weight) or ``low_rank`` (the LoRA factors A and B of each adapted module).
        tensors: fp32 tensors on the CPU. Dense: by parameter name, possibly read on access (`LazyTensors`). Low-rank: by PEFT's
            adapter state names.
        adapter: PEFT's adapter configuration; None for dense vectors.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Any] | None = None
    _norms: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, without reading any."""
        return shapes_of(self.tensors)

    @property
    def norms(self) -> dict[str, float]:
        """Frobenius norm of the update per weight; for low-rank vectors that of scale * B A, by module."""
        if not self._norms:
            if self.kind == DENSE:
                self._norms.update((name, tensor_norm(self.tensors[name])) for name in self.tensors)
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
    """Return PEFT's factor of B A: lora_alpha / r."""
    if update.adapter is None:
        raise ValueError("a dense update vector has no adapter")
    return float(update.adapter["lora_alpha"]) / float(update.adapter["r"])


def factors(update: UpdateVector) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A (r, in), B (out, r)) of a low-rank update by module name."""
    names = [name.removesuffix(LORA_A) for name in update.tensors if name.endswith(LORA_A)]
    return {name: (update.tensors[name + LORA_A], update.tensors[name + LORA_B]) for name in names}


def tensor_norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, summed in double precision in chunks: torch would copy the whole tensor to doubles."""
    parts = tensor.flatten().split(PART)
    doubles = temporary_zeros(parts[0].shape, torch.float64)
    return math.hypot(*(float(torch.linalg.vector_norm(doubles[: len(part)].copy_(part))) for part in parts))


def _product_norm(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of B A without forming it: trace((B^T B)(A A^T)) in double precision."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def snapshot(model: Any) -> dict[str, Tensor]:
    """Copy all weights by parameter name to the CPU, as stored; tied weights once."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@torch.no_grad()
def take_update(model: Any, initial: Mapping[str, Tensor]) -> UpdateVector:
    """Return the dense update of an fp32 model since `initial`, and set the model to theta_init + delta.

    A difference of two floats, added back, may miss the second by one unit in the last place. Setting the model to the sum
    makes the epoch's unlearned model and theta(0) equal to the bit.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        start = initial[name].float()
        delta = parameter.detach().to("cpu", torch.float32) - start
        parameter.copy_(start + delta)
        tensors[name] = delta
    return UpdateVector(DENSE, tensors)


def reverse(update: UpdateVector) -> UpdateVector:
    """Return the update that walks the other way, -delta. Its tensors are changed in place: no second update is held."""
    for name, tensor in update.tensors.items():
        if update.kind == DENSE or name.endswith(LORA_B):  # B A changes its sign with one of its factors
            tensor.neg_()
    return UpdateVector(update.kind, update.tensors, update.adapter)


def random_direction(update: UpdateVector, seed: int) -> UpdateVector:
    """Return a Gaussian direction with the same norm per tensor (per module for low-rank updates), the control of a search.

    A dense one is drawn on access, a tensor at a time.
    """
    if update.kind == DENSE:
        return UpdateVector(DENSE, LazyTensors(update.shapes, _Noise(update, seed).draw))
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for module, (a, b) in factors(update).items():
        new_a, new_b = torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator)
        drawn[module + LORA_A] = new_a
        drawn[module + LORA_B] = new_b * (update.norms[module] / (adapter_scale(update) * _product_norm(new_a, new_b)))
    return UpdateVector(update.kind, drawn, update.adapter)


class _Noise:
    """A random direction of a dense update's norms, tensor by tensor from one random stream.

    Access out of order draws the tensors before it again; the numbers are the same.
    """

    def __init__(self, update: UpdateVector, seed: int) -> None:
        self._update, self._seed = update, seed
        self._names = list(update.shapes)
        self._next = 0
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, name: str) -> Tensor:
        wanted = self._names.index(name)
        if wanted < self._next:
            self._next = 0
            self._generator.manual_seed(self._seed)
        while self._next < wanted:
            self._randn()
        noise = self._randn()
        return noise.mul_(self._update.norms[name] / max(tensor_norm(noise), 1e-30))

    def _randn(self) -> Tensor:
        shape = self._update.shapes[self._names[self._next]]
        self._next += 1
        return temporary_zeros(shape).normal_(generator=self._generator)
