"""Train one base run in several processes: split batches, shard weights, sum results.

The processes are those of torch.distributed's process group (Ray Train, torchrun); without a group there is one process, and
nothing here has an effect. Full fine-tuning shards weights, gradients and optimiser state (FSDP2: layers are gathered while
they compute), and the frozen initial model if a method needs it. With LoRA every process has the whole model, and the adapter's
gradients are summed. All processes draw the same order, retain items and refusals from one seed; only gradients, sums and
weights are sent.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from uipe_core.deltas.update_vectors import DENSE, UpdateVector
from uipe_core.models.prompts import Example
from uipe_core.models.transformers_compat import find_decoder_layers
from uipe_core.unlearning.inputs import Shares

Step = TypeVar("Step")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
        count: Number of processes.
        rank: Number of this one, from 0.
        device: Device of each; None in a single process, whose model decides.
    """

    count: int = 1
    rank: int = 0
    device: torch.device | None = None

    def split_batch(
        self, forget: Sequence[Example], retain: Sequence[Example], refusals: Sequence[Example]
    ) -> tuple[list[int], Shares]:
        """Return the batch positions that this process reads, and their shares of the whole batch.

        With fewer items than processes, a process without an item reads the first one with weight 0: sharded weights are
        gathered by all processes together, so each has to take every step.

        Args:
            forget: Forget items of the batch.
            retain: As many retain items, or none.
            refusals: As many forget questions with refusals, or none.
        """
        size = len(forget)
        mine = list(range(self.rank * size // self.count, (self.rank + 1) * size // self.count))
        if not mine:
            return [0], Shares(0.0, 0.0, 0.0, 0.0)
        parts = (_token_share(examples, mine) if examples else 1.0 for examples in (forget, retain, refusals))
        return mine, Shares(len(mine) / size, *parts)

    def sum(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        return value if self.count == 1 else float(self.sum_tensor(torch.tensor(value, dtype=torch.float64)))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all processes."""
        if self.count > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor = moved.cpu()
        return tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients of unsharded weights over all processes; the backward pass sums those of shards itself.

        A weight without a gradient in any process keeps none: with a gradient of 0 the optimiser would decay it.
        """
        if self.count == 1:
            return
        found = self.sum_tensor(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        for parameter, holders in zip(parameters, found.tolist(), strict=True):
            if holders:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def shard(self, model: Any, dtype: torch.dtype | None = None) -> None:
        """Shard a model's weights over all processes by rows, in place, layer by layer, moved to `device` and cast on the way.

        Only one layer at a time is whole on the device.

        Args:
            model: The same model in every process.
            dtype: Dtype to cast the weights to; None keeps it.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        assert self.device is not None
        mesh = init_device_mesh(self.device.type, (self.count,))
        for part in (*(find_decoder_layers(model) or ()), model):
            if dtype is not None:
                part.to(dtype)
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def run_on_first(self, steps: Iterable[Step], take: Callable[[Iterable[Step]], Result]) -> Result | None:
        """Pass steps that all processes make together to a function of the first process, which may also skip them.

        Args:
            steps: Run by all processes, or by none.
            take: Called in the first process; consumes all steps, or none.

        Returns:
            The result of `take` in the first process, None in the others.
        """
        if self.count == 1:
            return take(steps)
        if self.rank > 0:
            for _ in steps if self._from_first(False) else ():
                pass
            return None
        begun = False

        def announced() -> Iterator[Step]:
            nonlocal begun
            begun = self._from_first(True)
            yield from steps

        result = take(announced())
        if not begun:
            self._from_first(False)
        return result

    def _from_first(self, value: bool) -> bool:
        """Broadcast the first process's value."""
        return bool(self.sum(float(value and self.rank == 0)))


def current_processes() -> Processes:
    """Return the processes of torch.distributed's group, or this one alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Processes()
    on_gpus = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")
    return Processes(dist.get_world_size(), dist.get_rank(), device)


def local_snapshot(model: Any) -> dict[str, Tensor]:
    """Copy this process's shards of all weights by parameter name to the CPU; tied weights once."""
    return {name: parameter.detach().to_local().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@torch.no_grad()
def take_sharded_update(model: Any, initial: Mapping[str, Tensor], rank: int) -> UpdateVector:
    """Return the dense update of a sharded fp32 model, and set every shard to theta_init + delta (see `take_update`).

    The update is gathered tensor by tensor; only the first process gets it, in the others it has no tensors.

    Args:
        model: The model in training.
        initial: `local_snapshot` of the initial model.
        rank: Number of this process.
    """
    from torch.distributed.tensor import DTensor

    tensors = {}
    for name, parameter in model.named_parameters():
        shard = parameter.detach().to_local()
        start = initial[name].to(shard.device)
        delta = shard - start
        shard.copy_(start + delta)
        mesh, layout = parameter.device_mesh, {"shape": parameter.shape, "stride": parameter.stride()}
        whole = DTensor.from_local(delta, mesh, parameter.placements, run_check=False, **layout).full_tensor()
        if rank == 0:
            tensors[name] = whole.cpu()
    return UpdateVector(DENSE, tensors)


def _token_share(examples: Sequence[Example], mine: Sequence[int]) -> float:
    return sum(examples[i].answer_length for i in mine) / sum(example.answer_length for example in examples)
