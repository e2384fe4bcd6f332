"""Move models along update vectors: theta(alpha) = theta_init + (1 + alpha) * delta, UIPE (arXiv 2503.04693).

Arithmetic is fp32 from pristine weights every time, so repeated moves do not drift; the result is cast to the scored dtype.
Dense updates are applied in chunks: apart from the model, memory holds a few chunks of one tensor.
"""

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from uipe_core.deltas.device_copies import HostToDeviceCopier
from uipe_core.deltas.update_vectors import LOW_RANK, UpdateVector, snapshot
from uipe_core.models.transformers_compat import LORA_B, adapter_state, merge_adapter, wrap_adapter
from uipe_core.storage.safetensors_files import parts, shapes_of

PIECE = 1 << 16
"""Elements widened at once on the CPU: 256 KiB in fp32."""

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""Integers by the bytes of a float."""


@torch.no_grad()
def extrapolate(target: Tensor, initial: Tensor, delta: Tensor, alpha: float, copier: HostToDeviceCopier | None = None) -> None:
    """Set `target` to theta_init + (1 + alpha) * delta, summed in fp32 and rounded once; exactly theta_init at alpha = -1.

    Args:
        target: Weights, set in place.
        initial: theta_init, in the target's dtype or a wider one.
        delta: The update, fp32.
        alpha: Extrapolation coefficient.
        copier: Copies chunks from other devices.
    """
    if target.device.type == "cpu" and not (target.dtype == initial.dtype == torch.float32):
        _widen(target, initial, delta, alpha)
        return
    if target.device == initial.device == delta.device:
        torch.add(initial, delta, alpha=1.0 + alpha, out=target)  # whole: on a GPU a chunk costs a kernel launch
        return
    copier = copier or HostToDeviceCopier()
    for part, start, change in zip(parts(target), parts(initial), parts(delta), strict=True):
        start, change = copier.copy(start, part.device), copier.copy(change, part.device)
        torch.add(start, change, alpha=1.0 + alpha, out=part)


def _widen(target: Tensor, initial: Tensor, delta: Tensor, alpha: float) -> None:
    """Run `extrapolate` on the CPU in cache-sized pieces; torch would widen there by copying the whole tensor."""
    flat = all(tensor.is_contiguous() for tensor in (target, initial, delta))
    pieces = zip(*(t.view(-1).split(PIECE) if flat else parts(t) for t in (target, initial, delta)), strict=True)
    scratch: Tensor | None = None
    for piece, start, change in pieces:
        if piece.dtype == torch.float32:
            piece.copy_(start).add_(change, alpha=1.0 + alpha)
            continue
        if scratch is None:
            scratch = torch.empty(piece.numel())  # the first is the largest
        total = scratch[: piece.numel()].view(piece.shape)
        piece.copy_(total.copy_(start).add_(change, alpha=1.0 + alpha))


class Extrapolator:
    """Move one model along update vectors, always from its pristine weights.

    Dense updates are written into the weights. GPUs with room keep theta_init and the last update, so that another alpha copies
    nothing; elsewhere both are streamed. Low-rank updates are loaded as a PEFT adapter, never merged: 1 + alpha is multiplied
    into the B factors in fp32, and factors are rounded to the dtype of the weights, as transformers loads a saved adapter.

    Args:
        model: A transformers model holding theta_init; changed in place (and wrapped for low-rank updates).
        initial: The weights theta_init as stored (`uipe_core.deltas.initial_weights`); copied from the model by default. Give
            them if the model was cast, so that extrapolation starts from the stored values.
    """

    def __init__(self, model: Any, initial: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self._initial = initial if initial is not None else snapshot(model)
        self._copier = HostToDeviceCopier()
        self._initial_copied = False
        # A weak reference, so that the file of an update closes when its owner drops it.
        self._resident: tuple[ref[UpdateVector], Mapping[str, Tensor]] | None = None
        self._moved = False
        self._adapter: Mapping[str, Any] | None = None
        self._loaded: UpdateVector | None = None

    def apply(self, update: UpdateVector, alpha: float) -> Any:
        """Set the model to theta(alpha) and return it.

        Raises:
            ValueError: If the update does not fit the model's weights; the model is then unchanged.
            UserError: If a file of the update or of theta_init is gone or damaged; the next call sets all weights again.
        """
        if update.kind == LOW_RANK:
            return self._apply_low_rank(update, alpha)
        self._unwrap()
        parameters = dict(self.model.named_parameters())
        _check_fit(update.shapes, shapes_of(parameters))
        tensors = self._on_device(update, parameters)
        self._moved = True
        # In the update's order, in which its tensors are drawn or read fastest.
        for name in tensors:
            extrapolate(parameters[name], self._initial[name], tensors[name], alpha, self._copier)
        return self.model

    def _on_device(self, update: UpdateVector, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the update's tensors, copied (as theta_init) to GPUs with room."""
        if not self._initial_copied:
            self._initial = self._copier.copy_all(self._initial, parameters)
            self._initial_copied = True
        if self._resident is None or self._resident[0]() is not update:
            self._resident = None  # free the last one first
            tensors = self._copier.copy_all(update.tensors, parameters)
            if tensors is update.tensors:
                return tensors
            self._resident = (ref(update), tensors)
        return self._resident[1]

    def reset(self) -> Any:
        """Set the model back to theta_init and return it."""
        self._unwrap()
        if self._moved:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    for target, start in zip(parts(parameter), parts(self._initial[name]), strict=True):
                        target.copy_(self._copier.copy(start, target.device))
            self._moved = False
        return self.model

    def _apply_low_rank(self, update: UpdateVector, alpha: float) -> Any:
        from peft import set_peft_model_state_dict

        if self._adapter is None or self._adapter != update.adapter:
            self.reset()
            self.model = wrap_adapter(self.model, update.adapter or {}, rounded=True)
            self.model.eval()
            self._adapter = update.adapter
        if self._loaded is not update:
            _check_fit(update.shapes, shapes_of(adapter_state(self.model)))
            self._loaded = update
        set_peft_model_state_dict(self.model, scaled_factors(update, alpha))
        return self.model

    def _unwrap(self) -> None:
        """Remove the adapter: dense updates name the plain modules, and another adapter may target other ones."""
        if self._adapter is not None:
            self.model = self.model.unload()
            self._adapter, self._loaded = None, None


def scaled_factors(update: UpdateVector, alpha: float) -> dict[str, Tensor]:
    """Return the factors of theta(alpha) in fp32: 1 + alpha is multiplied into B; at alpha = 0 they are the update's own."""
    return {name: tensor * (1.0 + alpha) if name.endswith(LORA_B) else tensor for name, tensor in update.tensors.items()}


def merge(model: Any, seed: int | None = None) -> Any:
    """Merge the adapter of a model at theta(alpha) and return the plain model.

    Args:
        model: As `Extrapolator.apply` returns it for a low-rank update; its weights are changed.
        seed: Round each sum up or down at random, on average to the sum itself, and not to the nearest number. What differs
            between two such models is rounding alone.
    """
    if seed is None:
        return merge_adapter(model, lambda total, dtype: total.to(dtype))
    generator = torch.Generator().manual_seed(seed)
    return merge_adapter(model, lambda total, dtype: _round_at_random(total, dtype, generator))


def _round_at_random(total: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    nearest = total.to(dtype)
    missing = total - nearest
    # Floats of one sign are ordered as their bits are: the next integer is the next number away from zero.
    away = (missing.sign() * nearest.sign()).to(_INTEGERS[nearest.element_size()])
    other = (nearest.view(away.dtype) + away).view(dtype)
    gap = (other.double() - nearest).abs()
    drawn = torch.rand(total.shape, dtype=torch.float64, generator=generator).to(total.device)
    return torch.where(drawn * gap < missing.abs(), other, nearest)


Shapes = Mapping[str, tuple[int, ...]]


def _check_fit(update: Shapes, model: Shapes) -> None:
    unknown, uncovered = sorted(update.keys() - model.keys()), sorted(model.keys() - update.keys())
    if unknown:
        raise ValueError(f"update vector has {len(unknown)} weights the model has not, first {unknown[0]!r}")
    if uncovered:
        raise ValueError(f"update vector lacks {len(uncovered)} weights of the model, first {uncovered[0]!r}")
    for name, shape in update.items():
        if shape != model[name]:
            raise ValueError(f"{name}: update has shape {shape}, model {model[name]}")
