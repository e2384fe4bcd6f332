"""Models moved along update vectors.

theta(alpha) = theta_init + (1 + alpha) * delta, UIPE (arXiv 2503.04693). Arithmetic is fp32, from pristine
weights every time, so a walk of any length leaves no drift; the result is cast to the dtype the model is scored in.
Dense updates go through part by part: beside the model, memory holds a few parts of one tensor.
"""

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from uipe_core.deltas.device_copies import HostToDeviceCopier
from uipe_core.deltas.update_vectors import LOW_RANK, UpdateVector, adapter_state, snapshot, wrap_adapter
from uipe_core.storage.safetensors_files import parts, shapes_of

PIECE = 1 << 16
"""Entries widened at once on the CPU: 256 KiB in fp32."""


@torch.no_grad()
def extrapolate(
    target: Tensor, initial: Tensor, delta: Tensor, alpha: float, courier: HostToDeviceCopier | None = None
) -> None:
    """Sets `target` to theta_init + (1 + alpha) * delta, summed in fp32 and rounded once; exactly theta_init at alpha = -1.

    One pass on the target's device that reads theta_init and delta and writes the target; part by part where they come from
    another.

    Args:
        target: Weights, set in place.
        initial: theta_init, in the target's dtype or a wider one.
        delta: The update, fp32.
        alpha: How far.
        courier: Brings parts that lie elsewhere to the target's device.
    """
    if target.device.type == "cpu" and not (target.dtype == initial.dtype == torch.float32):
        _widen(target, initial, delta, alpha)
        return
    if target.device == initial.device == delta.device:
        torch.add(initial, delta, alpha=1.0 + alpha, out=target)  # in one: on a GPU a part takes no longer than its launch
        return
    courier = courier or HostToDeviceCopier()
    for part, start, change in zip(parts(target), parts(initial), parts(delta), strict=True):
        start, change = courier.bring(start, part.device), courier.bring(change, part.device)
        torch.add(start, change, alpha=1.0 + alpha, out=part)


def _widen(target: Tensor, initial: Tensor, delta: Tensor, alpha: float) -> None:
    """`extrapolate` on the CPU, where torch would widen by making a copy of all, while GPUs widen as they read.

    In pieces that stay in the processor's cache between the steps.
    """
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
    """Moves one model along update vectors, always from its pristine weights.

    Dense updates are written into the weights. On GPUs with room for it, theta_init and the last update are kept beside them,
    so that another alpha moves nothing over the bus; elsewhere both are streamed. Low-rank updates are loaded as a PEFT adapter
    whose scale is set; they are never merged, so the weights underneath stay as they are.

    Args:
        model: A transformers model holding theta_init. It is changed in place (and wrapped for low-rank updates).
        initial: The weights theta_init as stored, perhaps read one at a time (`uipe_core.deltas.initial_weights`); copied
        from the
            model when not given. Give them when the model was cast to another dtype, so that extrapolation still starts
            from the stored values.
    """

    def __init__(self, model: Any, initial: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self._initial = initial if initial is not None else snapshot(model)
        self._courier = HostToDeviceCopier()
        self._settled = False
        # Not the update itself: whoever lets go of it wants its file closed.
        self._near: tuple[ref[UpdateVector], Mapping[str, Tensor]] | None = None
        self._moved = False
        self._adapter: Mapping[str, Any] | None = None
        self._loaded: UpdateVector | None = None

    def apply(self, update: UpdateVector, alpha: float) -> Any:
        """Sets the model to theta(alpha) and returns it.

        Raises:
            ValueError: If the update does not fit the model's weights; the model is then as it was.
            UserError: If a file of the update or of theta_init is gone or damaged; the next walk sets all weights again.
        """
        if update.kind == LOW_RANK:
            return self._apply_low_rank(update, alpha)
        self._unwrap()
        parameters = dict(self.model.named_parameters())
        _check_fit(update.shapes, shapes_of(parameters))
        tensors = self._brought_near(update, parameters)
        self._moved = True
        # In the update's order: what is drawn or read is then asked for as it comes.
        for name in tensors:
            extrapolate(parameters[name], self._initial[name], tensors[name], alpha, self._courier)
        return self.model

    def _brought_near(self, update: UpdateVector, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The update's tensors, and theta_init too, on GPUs with room for them."""
        if not self._settled:
            self._initial = self._courier.synchronize(self._initial, parameters)
            self._settled = True
        if self._near is None or self._near[0]() is not update:
            self._near = None  # first: the last one's room is the next one's
            tensors = self._courier.synchronize(update.tensors, parameters)
            if tensors is update.tensors:
                return tensors
            self._near = (ref(update), tensors)
        return self._near[1]

    def reset(self) -> Any:
        """Sets the model back to theta_init and returns it."""
        if self._adapter is not None:
            _scale_adapter(self.model, 0.0)
        elif self._moved:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    for target, start in zip(parts(parameter), parts(self._initial[name]), strict=True):
                        target.copy_(self._courier.bring(start, target.device))
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
            _check_fit(update.shapes, shapes_of(adapter_state(self.model)))
            set_peft_model_state_dict(self.model, dict(update.tensors))
            self._loaded = update
        _scale_adapter(self.model, 1.0 + alpha)
        return self.model

    def _unwrap(self) -> None:
        """Takes the adapter off: dense updates name the plain modules, and another adapter may have other ones."""
        if self._adapter is not None:
            self.model = self.model.unload()
            self._adapter, self._loaded = None, None


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


def _scale_adapter(model: Any, factor: float) -> None:
    """Multiplies B A of every adapted module by `factor` on top of PEFT's own lora_alpha / r."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                module.set_scale(name, factor)
