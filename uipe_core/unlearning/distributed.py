"""One base run in several processes: who reads which part of a batch, weights in shards, sums over all of them.

The processes are those of torch.distributed's process group, whoever started them (Ray Train, torchrun); without a group there
is one process, and nothing here changes anything. In full fine-tuning weights, gradients and the state of the optimiser are in
shards (FSDP2: every process holds its part, layers are gathered while they compute), and so is the frozen initial model where a
method asks it. An adapter is small: with LoRA every process has the whole model, and the adapter's gradients are summed. All
processes draw the same order, retain items and refusals from the same seed; only gradients, sums and weights travel.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from uipe_core.deltas.update_vectors import DENSE, UpdateVector
from uipe_core.models.prompts import Example
from uipe_core.unlearning.methods import Shares
from uipe_core.unlearning.steering import find_decoder_layers

Step = TypeVar("Step")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
        count: How many.
        rank: Number of this one, from 0.
        device: Where each of them computes; of a single process its model decides.
    """

    count: int = 1
    rank: int = 0
    device: torch.device | None = None

    def deal(self, forget: Sequence[Example], retain: Sequence[Example]) -> tuple[list[int], Shares]:
        """Positions in a batch that this process reads, and what part of the whole they are.

        Where a batch has fewer items than there are processes, one that gets none reads the first item once more and gives it
        no weight: sharded weights are gathered by all processes together, so that each has to take every step.

        Args:
            forget: The forget items of the batch.
            retain: As many retain items, or none.
        """
        size = len(forget)
        mine = list(range(self.rank * size // self.count, (self.rank + 1) * size // self.count))
        if not mine:
            return [0], Shares(0.0, 0.0, 0.0)
        return mine, Shares(len(mine) / size, _token_share(forget, mine), _token_share(retain, mine) if retain else 1.0)

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value if self.count == 1 else float(self.add_up(torch.tensor(value, dtype=torch.float64)))

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a CPU tensor over all processes."""
        if self.count > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor = moved.cpu()
        return tensor

    def add_up_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sums the gradients of weights that every process has whole; shards are summed by the backward pass itself.

        A weight without a gradient anywhere stays without one: the optimiser would let one with a gradient of 0 decay.
        """
        if self.count == 1:
            return
        found = self.add_up(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        for parameter, holders in zip(parameters, found.tolist(), strict=True):
            if holders:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def shard(self, model: Any, dtype: torch.dtype | None = None) -> None:
        """Deals the weights of a model to all processes, in place: layer by layer, moved to `device` and cast as they go.

        Afterwards its parameters are distributed tensors (one dimension, by rows). Only a layer at a time is ever whole there.

        Args:
            model: The same model in every process.
            dtype: What to cast the weights to; as they are when not given.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        assert self.device is not None
        mesh = init_device_mesh(self.device.type, (self.count,))
        for part in (*(find_decoder_layers(model) or ()), model):
            if dtype is not None:
                part.to(dtype)
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def lead(self, steps: Iterable[Step], take: Callable[[Iterable[Step]], Result]) -> Result | None:
        """Gives steps that all processes make together to a function of the first one, which may also do without them.

        Args:
            steps: What all processes go through, or none of them.
            take: Called in the first process; goes through the steps to their end, or does not begin.

        Returns:
            What `take` returns in the first process, None in the others.
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
        """What the first process says."""
        return bool(self.total(float(value and self.rank == 0)))


def current_processes() -> Processes:
    """The processes of torch.distributed's group, or this one alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Processes()
    on_gpus = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")
    return Processes(dist.get_world_size(), dist.get_rank(), device)


def local_snapshot(model: Any) -> dict[str, Tensor]:
    """Copies of this process's shards of all weights by parameter name, on the CPU; tied weights once."""
    return {name: parameter.detach().to_local().to("cpu", copy=True) for name, parameter in model.named_parameters()}


@torch.no_grad()
def take_sharded_update(model: Any, initial: Mapping[str, Tensor], rank: int) -> UpdateVector:
    """`uipe_core.deltas.update_vectors.take_update` of an fp32 model in shards: every process sets its own onto theta_init +
    delta.

    The update is gathered one tensor at a time. The first process gets it; in the others it has no tensors.

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
        whole = DTensor.from_local(
            delta,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()
        if rank == 0:
            tensors[name] = whole.cpu()
    return UpdateVector(DENSE, tensors)


def _token_share(examples: Sequence[Example], mine: Sequence[int]) -> float:
    return sum(examples[i].answer_length for i in mine) / sum(example.answer_length for example in examples)
