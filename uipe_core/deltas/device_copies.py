"""Copy weights to a GPU: streamed through page-locked memory, or kept there if there is room.

A copy from ordinary memory blocks both sides and reaches a fraction of the bus rate. With two page-locked buffers in turn, one
is filled while the other is copied.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from uipe_core.models.memory import free_memory, is_out_of_memory
from uipe_core.storage.safetensors_files import PART, parts

ROOM = 2 / 3
"""Share of a GPU's free memory for resident weights; the rest is for scoring."""

BUFFERS = 2


class HostToDeviceCopier:
    """Copy tensors to a device; tensors already there are returned as they are."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._sent: list[Any] = []
        self._turn = 0

    def copy(self, part: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of at most about `PART` elements on a device; on a GPU for work queued after this call."""
        if part.device == device:
            return part
        if device.type != "cuda" or part.device.type != "cpu":
            return part.to(device)
        if part.is_pinned():
            return part.to(device, non_blocking=True)
        if not self._buffers or part.nbytes > self._buffers[0].nbytes:
            self._allocate(max(part.nbytes, 4 * PART))
        turn = self._turn = (self._turn + 1) % BUFFERS
        self._sent[turn].synchronize()  # wait for the last copy from this buffer
        buffer = self._buffers[turn][: part.nbytes].view(part.dtype).view(part.shape)
        buffer.copy_(part)
        arriving = buffer.to(device, non_blocking=True)
        self._sent[turn] = torch.cuda.Event()
        self._sent[turn].record(torch.cuda.current_stream(device))
        return arriving

    def _allocate(self, size: int) -> None:
        for event in self._sent:
            event.synchronize()
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in range(BUFFERS)]

    def copy_all(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copy tensors to the GPUs of the parameters of the same names; return them as they are if these have no room."""
        if any(parameter.device.type != "cuda" for parameter in parameters.values()) or not _fit(tensors, parameters):
            return tensors
        found: dict[str, Tensor] = {}
        try:
            for name, tensor in tensors.items():
                device = parameters[name].device
                found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                for target, part in zip(parts(found[name]), parts(tensor), strict=True):
                    target.copy_(self.copy(part, device))
            return found
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        found.clear()
        free_memory()
        return tensors


def _fit(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> bool:
    """Return True if the GPUs have room for fp32 copies, counting memory that torch caches as free."""
    wanted: Counter[torch.device] = Counter()
    for name in tensors:
        wanted[parameters[name].device] += 4 * parameters[name].numel()
    for device, size in wanted.items():
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if size > ROOM * free:
            return False
    return True
