"""Weights on their way to a GPU: streamed through page-locked memory, or kept there where there is room for them.

A copy from ordinary memory stops both sides and goes at a fraction of the bus's rate. Two page-locked buffers in turn let
one be filled while the other is on its way.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from uipe_core.models.memory import give_back, ran_out
from uipe_core.storage.safetensors_files import PART, parts

ROOM = 2 / 3
"""Share of a GPU's free memory that weights kept beside the model may take; the rest is for scoring."""

BUFFERS = 2


class HostToDeviceCopier:
    """Brings tensors to the device they are wanted on; what is there already is left as it is."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._sent: list[Any] = []
        self._turn = 0

    def bring(self, part: Tensor, device: torch.device) -> Tensor:
        """A tensor of about `PART` entries at most on a device. On a GPU it is there for what is queued after this call."""
        if part.device == device:
            return part
        if device.type != "cuda" or part.device.type != "cpu":
            return part.to(device)
        if part.is_pinned():
            return part.to(device, non_blocking=True)
        if not self._buffers or part.nbytes > self._buffers[0].nbytes:
            self._make(max(part.nbytes, 4 * PART))
        turn = self._turn = (self._turn + 1) % BUFFERS
        self._sent[turn].synchronize()  # what was sent from here last has arrived
        buffer = self._buffers[turn][: part.nbytes].view(part.dtype).view(part.shape)
        buffer.copy_(part)
        arriving = buffer.to(device, non_blocking=True)
        self._sent[turn] = torch.cuda.Event()
        self._sent[turn].record(torch.cuda.current_stream(device))
        return arriving

    def _make(self, size: int) -> None:
        for event in self._sent:
            event.synchronize()
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in range(BUFFERS)]

    def synchronize(self, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copies of some tensors on the GPUs of their namesakes, if all of these lie on GPUs that have room; else as they are.

        Args:
            tensors: Weights or an update, perhaps read one at a time.
            beside: Parameters of the same names and shapes.
        """
        if any(parameter.device.type != "cuda" for parameter in beside.values()) or not _fit(tensors, beside):
            return tensors
        found: dict[str, Tensor] = {}
        try:
            for name, tensor in tensors.items():
                device = beside[name].device
                found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                for target, part in zip(parts(found[name]), parts(tensor), strict=True):
                    target.copy_(self.bring(part, device))
            return found
        except Exception as error:
            if not ran_out(error):
                raise
        found.clear()
        give_back()
        return tensors


def _fit(tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> bool:
    """Whether GPUs have room for tensors, reckoned in fp32: what is free, and what torch keeps for later."""
    wanted: Counter[torch.device] = Counter()
    for name in tensors:
        wanted[beside[name].device] += 4 * beside[name].numel()
    for device, size in wanted.items():
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if size > ROOM * free:
            return False
    return True
