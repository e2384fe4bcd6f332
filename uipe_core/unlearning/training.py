"""One base run: an unlearning method trained once, giving an update vector per epoch.

The loop follows TOFU (arXiv 2401.06121): an epoch is one pass over the forget set, each step pairs its forget batch with as
many retain items drawn at random, AdamW warms up linearly over the first epoch.

In a process group (`uipe_core.unlearning.distributed`) all processes train one base run together: each reads its part of
every batch, and
the summed gradient is that of the whole one. Rounding apart, the update vectors are those of one process, so that the number of
processes is no input of a base run (with dropout they are so in distribution only).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uipe_core.corpora.types import Corpus
from uipe_core.deltas.store import EpochResult
from uipe_core.deltas.update_vectors import LOW_RANK, UpdateVector, adapter_state, snapshot, take_update, wrap_adapter
from uipe_core.models.loading import LoadedModel, Progress
from uipe_core.unlearning.distributed import Processes, current_processes, local_snapshot, take_sharded_update
from uipe_core.unlearning.loss_inputs import (
    INITIAL_BEFORE_TRAINING,
    INITIAL_ON_RETAIN,
    encode,
    encode_refusals,
    frozen_copy,
    initial_logp,
    make_forward,
)
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.steering import train_down_projections

TRAINING_SCHEMA = 3
"""Raised whenever a change in this file or in losses.py alters the update vectors it yields."""


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA (PEFT): rank, alpha (scale = alpha / rank), which linear modules, dropout while training."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    dropout: float = 0.0

    def as_peft(self) -> dict[str, Any]:
        """Arguments of peft.LoraConfig."""
        targets = self.target_modules if isinstance(self.target_modules, str) else sorted(self.target_modules)
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": targets,
            "lora_dropout": self.dropout,
            "task_type": "CAUSAL_LM",
        }


@dataclass(frozen=True)
class UnlearningConfig:
    """Everything that determines a base run, given model and corpus.

    Attributes:
        method: Key of `uipe_core.unlearning.methods.METHODS`.
        hyperparameters: What the method takes, for example ``{"beta": 0.1}``.
        epochs: Passes over the forget set.
        learning_rate: Peak learning rate.
        batch_size: Forget items per forward pass.
        gradient_accumulation: Forward passes per optimiser step, each weighted by its share of the step's items.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        schedule: ``constant`` or ``linear`` (to 0 at the last epoch) after the warm-up. With ``constant`` an epoch's update
            does not depend on how many epochs follow.
        weight_decay, max_grad_norm: Of AdamW; clipping threshold.
        adapter: LoRA configuration; None for full fine-tuning on fp32 master weights.
        seed: Order of items, retain sampling, adapter initialisation, dropout.
    """

    method: str
    hyperparameters: Mapping[str, float]
    epochs: int
    learning_rate: float
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    schedule: str = "constant"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    adapter: AdapterConfig | None = None
    seed: int = 0

    def as_inputs(self) -> dict[str, Any]:
        """JSON-able form for content addressing."""
        return {**asdict(self), "schema": TRAINING_SCHEMA}


class DivergedError(RuntimeError):
    """A base run whose loss or weights stopped being finite."""


def train_base_run(
    loaded: LoadedModel, corpus: Corpus, config: UnlearningConfig, progress: Progress | None = None
) -> Iterator[EpochResult]:
    """Unlearns the forget set and yields an update vector after every epoch.

    Args:
        loaded: The initial model. It is trained in place; load it anew for the next run. In a process group every process
            loads it: for full fine-tuning on the CPU (its shards go to the GPUs by themselves), for LoRA on its own device.
        corpus: Its `forget_train` is unlearned, its `retain_train` serves the retain terms.
        config: The method and its hyperparameters.
        progress: Called with (optimisation steps done, steps in all).

    Yields:
        EpochResult for epochs 1, 2, ...; its update is exact: theta_init + delta are the trained weights to the bit.

    Raises:
        DivergedError: If a loss or a weight is not finite; names the epoch and the remedy.
        UserError: If the method steers a layer the model does not have, or refuses in words its vocabulary lacks.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    method = METHODS[config.method]
    hyperparameters = {**method.hyperparameters, **config.hyperparameters}
    set_seed(config.seed)
    # Accelerate would train on the first device whichever the model is on; and it divides by a fixed number of accumulation
    # steps, which makes the last, shorter group of an epoch count less. Both are done here.
    processes = current_processes()
    device = processes.device or loaded.device
    threads = torch.get_num_threads()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,
        mixed_precision="bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no",
    )
    torch.set_num_threads(threads)  # for several processes on the CPU Accelerate chooses a number of its own
    forget = encode(loaded, corpus.forget_train)
    retain = encode(loaded, corpus.retain_train) if method.needs_retain(hyperparameters) else []
    epochs_refused = config.epochs if "refusal_logp" in method.needs else 0
    refusals = encode_refusals(loaded, corpus.forget_train, epochs_refused, config.seed)
    initial_forget, initial_refusals, reference = None, [], None
    frozen = _frozen(loaded, config, processes, method.needs, bool(retain))
    with accelerator.autocast():
        if "initial_forget_logp" in method.needs:
            initial_forget = initial_logp(frozen, forget, config.batch_size, processes)
        initial_refusals = [initial_logp(frozen, examples, config.batch_size, processes) for examples in refusals]
    if retain and method.needs & INITIAL_ON_RETAIN and config.adapter is None:
        reference = accelerator.prepare_model(frozen.model, evaluation_mode=True)
    del frozen
    layer = int(hyperparameters["layer"]) if "forget_activations" in method.needs else None

    model, initial = _trainable(loaded, config, layer, processes)
    if processes.rank > 0:
        torch.manual_seed(config.seed + processes.rank)  # other items, other dropout
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    step_size = config.batch_size * config.gradient_accumulation
    steps_per_epoch = -(-len(forget) // step_size)
    scheduler = _schedule(optimizer, config, steps_per_epoch)
    if processes.count == 1:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        # Gradients are summed by the shards or here, so that Accelerate must not wrap the model once more.
        model, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
    # Shards get the mean of the processes' gradients.
    gain = processes.count if config.adapter is None else 1
    forward = make_forward(model, reference, method.needs, loaded.prompts.pad_id, layer, config.seed)

    generator = torch.Generator().manual_seed(config.seed)
    retain_order = _endless_order(len(retain), generator)
    done = 0
    for epoch in range(1, config.epochs + 1):
        model.train()
        order = torch.randperm(len(forget), generator=generator).tolist()
        losses = []
        for group in _chunks(order, step_size):
            for chosen in _chunks(group, config.batch_size):
                drawn = [retain[next(retain_order)] for _ in chosen] if retain else []
                positions, shares = processes.deal([forget[i] for i in chosen], drawn)
                mine = [chosen[position] for position in positions]
                inputs = forward(
                    [forget[i] for i in mine],
                    [drawn[position] for position in positions] if drawn else [],
                    [refusals[epoch - 1][i] for i in mine] if refusals else [],
                )
                inputs = replace(inputs, shares=shares)
                if initial_forget is not None:
                    inputs = replace(inputs, initial_forget_logp=initial_forget[mine].to(device))
                if refusals:
                    inputs = replace(inputs, initial_refusal_logp=initial_refusals[epoch - 1][mine].to(device))
                loss = method.loss(inputs, hyperparameters)
                losses.append(processes.total(float(loss.detach())))
                if not math.isfinite(losses[-1]):
                    raise DivergedError(_diverged(config, epoch))
                accelerator.backward(loss * (gain * len(chosen) / len(group)))
            if config.adapter is not None:
                processes.add_up_gradients(trainable)
            accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if progress is not None:
                progress(done, config.epochs * steps_per_epoch)
        update = _epoch_update(accelerator.unwrap_model(model), initial, config, processes)
        if processes.total(float(not all(torch.isfinite(tensor).all() for tensor in update.tensors.values()))):
            raise DivergedError(_diverged(config, epoch))
        yield EpochResult(epoch, update, sum(losses) / len(losses))
        # Gradients take its place in memory while the next epoch trains.
        del update


def _diverged(config: UnlearningConfig, epoch: int) -> str:
    return (
        f"{config.method} with learning rate {config.learning_rate:g} diverged in epoch {epoch}: its loss or weights are not "
        "finite; lower unlearning.learning_rate or unlearning.epochs"
    )


def _chunks(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _frozen(
    loaded: LoadedModel, config: UnlearningConfig, processes: Processes, needs: frozenset[str], has_retain: bool
) -> LoadedModel:
    """The initial model for what it says before and while another is trained: a frozen copy where it needs to be one."""
    on_retain = has_retain and needs & INITIAL_ON_RETAIN
    sharded = processes.count > 1
    if config.adapter is not None or not (on_retain or (sharded and needs & INITIAL_BEFORE_TRAINING)):
        return loaded
    frozen = frozen_copy(loaded)
    if sharded:
        processes.shard(frozen)
    return replace(loaded, model=frozen)


def _trainable(
    loaded: LoadedModel, config: UnlearningConfig, layer: int | None, processes: Processes
) -> tuple[Any, dict[str, Tensor]]:
    """The model to train, and the weights (of several processes each one's shards) dense updates are measured from.

    Where a layer is steered, full fine-tuning trains only the weights the method steers it with.
    """
    model = loaded.model
    if config.adapter is not None:
        model = wrap_adapter(model, config.adapter.as_peft())
        initial: dict[str, Tensor] = {}
    else:
        if layer is not None:
            train_down_projections(model, layer)
        # bf16 weights would swallow updates of 1e-3 of their size, so the master weights are fp32.
        if processes.count > 1:
            processes.shard(model, torch.float32)
            initial = local_snapshot(model)
        else:
            initial = snapshot(model)
            model.float()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model, initial


def _epoch_update(model: Any, initial: Mapping[str, Tensor], config: UnlearningConfig, processes: Processes) -> UpdateVector:
    if config.adapter is None:
        return take_update(model, initial) if processes.count == 1 else take_sharded_update(model, initial, processes.rank)
    state = adapter_state(model) if processes.rank == 0 else {}
    tensors = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in state.items()}
    return UpdateVector(LOW_RANK, tensors, config.adapter.as_peft())


def _schedule(optimizer: Any, config: UnlearningConfig, steps_per_epoch: int) -> Any:
    from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

    # A warm-up starts at rate 0: where an epoch is a single step, its update would be nothing.
    warmup = steps_per_epoch if steps_per_epoch > 1 else 0
    if config.schedule == "linear":
        return get_linear_schedule_with_warmup(optimizer, warmup, config.epochs * steps_per_epoch)
    return get_constant_schedule_with_warmup(optimizer, warmup)


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while count:
        yield from torch.randperm(count, generator=generator).tolist()
