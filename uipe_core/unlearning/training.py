"""Train one base run: an unlearning method, giving an update vector per epoch.

The loop follows TOFU (arXiv 2401.06121): an epoch is one pass over the forget set, each step pairs its forget batch with as
many random retain items, AdamW warms up linearly over the first epoch. A last, incomplete step of an epoch is taken at its
share of the learning rate, its items over those of a whole step: an epoch walks as far as its items say.

The processes of a process group (`uipe_core.unlearning.distributed`) train one base run together; the summed gradient is that
of the whole batch. Up to rounding, the update vectors equal those of one process (with dropout in distribution only), so the
number of processes is no input of a base run.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uipe_core.corpora.types import Corpus
from uipe_core.deltas.store import EpochResult
from uipe_core.deltas.update_vectors import LOW_RANK, UpdateVector, reverse, snapshot, take_update
from uipe_core.models.loading import LoadedModel, Progress
from uipe_core.models.transformers_compat import adapter_state, make_accelerator, wrap_adapter
from uipe_core.unlearning.distributed import Processes, current_processes, local_snapshot, take_sharded_update
from uipe_core.unlearning.loss_inputs import (
    INITIAL_BEFORE_TRAINING,
    encode,
    encode_substitutes,
    frozen_copy,
    initial_logp,
    make_forward,
    reads_initial,
)
from uipe_core.unlearning.methods import FORMER, METHODS, identifying
from uipe_core.unlearning.steering import train_down_projections

TRAINING_SCHEMA = 3
"""Raised with every change in this file or in methods.py that alters the update vectors."""


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA (PEFT): rank, alpha (scale = alpha / rank), linear modules to adapt, dropout in training."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    dropout: float = 0.0

    def as_peft(self) -> dict[str, Any]:
        """Return the arguments of peft.LoraConfig."""
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
        hyperparameters: Of the method, for example ``{"beta": 0.1}``; those not named have the method's defaults.
        epochs: Passes over the forget set.
        learning_rate: Peak learning rate.
        batch_size: Forget items per forward pass.
        gradient_accumulation: Forward passes per optimisation step, each weighted by its share of the step's items.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        schedule: ``constant`` or ``linear`` (to 0 at the last epoch) after the warm-up. With ``constant`` an epoch's update
            does not depend on the number of epochs.
        weight_decay, max_grad_norm: Of AdamW; clipping threshold.
        adapter: LoRA configuration; None for full fine-tuning on fp32 master weights.
        seed: Seed of item order, retain sampling, adapter initialisation, dropout.
        whole_last_step: Take the last, incomplete step of an epoch at the whole rate: base runs from before its share.
    """

    method: str
    hyperparameters: Mapping[str, float | str]
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
    whole_last_step: bool = False

    def whole_step(self, items: int) -> int:
        """Return the forget items of a whole optimisation step, of so many in all: an epoch has one at least."""
        return min(self.batch_size * self.gradient_accumulation, max(items, 1))

    def as_inputs(self, items: int) -> dict[str, Any]:
        """Return a JSON-able form for content addressing.

        A base run from before a hyperparameter could be named has the same form as one that names the value of then, and one
        whose epochs end in a whole step the same as before steps had shares.

        Args:
            items: Number of forget items.
        """
        later = {name: value for name, value in METHODS[self.method].hyperparameters.items() if name in FORMER}
        inputs = {**asdict(self), "schema": TRAINING_SCHEMA}
        inputs["hyperparameters"] = identifying({**later, **self.hyperparameters})
        if not inputs.pop("whole_last_step") and items % self.whole_step(items):
            inputs["last_step"] = "share"
        return inputs


class DivergedError(RuntimeError):
    """The loss or the weights of a base run are no longer finite."""


def train_base_run(
    loaded: LoadedModel, corpus: Corpus, config: UnlearningConfig, progress: Progress | None = None
) -> Iterator[EpochResult]:
    """Unlearn the forget set and yield an update vector after every epoch.

    Args:
        loaded: The initial model, trained in place; load it again for the next run. In a process group every process loads it:
            on the CPU for full fine-tuning (shards are moved to the GPUs), on its own device for LoRA.
        corpus: Its `forget_train` is unlearned, its `retain_train` serves retain terms.
        config: Method and hyperparameters.
        progress: Called with (optimisation steps done, steps in all), first with 0 when the model is ready.

    Yields:
        EpochResult for epochs 1, 2, ...; theta_init + delta are the trained weights to the bit, of a method that walks back
        theta_init - delta.

    Raises:
        DivergedError: If a loss or a weight is not finite; names the epoch and the remedy.
        UserError: If the model lacks the steered layer, its vocabulary words of a refusal, or the corpus alternate answers.
    """
    from accelerate.utils import set_seed

    method = METHODS[config.method]
    hyperparameters = {**method.hyperparameters, **config.hyperparameters}
    needs = method.needs_under(hyperparameters)
    set_seed(config.seed)
    processes = current_processes()
    device = processes.device or loaded.device
    # Gradients are accumulated here: Accelerate's fixed divisor would weigh the last, shorter group of an epoch less.
    accelerator = make_accelerator(device, half_precision=loaded.model.dtype == torch.bfloat16)
    forget = encode(loaded, corpus.forget_train)
    retain = encode(loaded, corpus.retain_train) if method.needs_retain(hyperparameters) else []
    refusals = encode_substitutes(loaded, corpus, config.epochs, config.seed, config.method)
    initial_forget, initial_refusals, reference = None, [], None
    frozen = _frozen(loaded, config, processes, needs, bool(retain))
    with accelerator.autocast():
        if "initial_forget_logp" in needs:
            initial_forget = initial_logp(frozen, forget, config.batch_size, processes)
        if "initial_refusal_logp" in needs:
            initial_refusals = [initial_logp(frozen, examples, config.batch_size, processes) for examples in refusals]
    if reads_initial(needs, bool(retain)) and config.adapter is None:
        reference = accelerator.prepare_model(frozen.model, evaluation_mode=True)
    del frozen
    layer = int(hyperparameters["layer"]) if "forget_activations" in needs else None

    model, initial = _trainable(loaded, config, layer, processes)
    if processes.rank > 0:
        torch.manual_seed(config.seed + processes.rank)  # other items, other dropout
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    whole_step = config.whole_step(len(forget))
    steps_per_epoch = -(-len(forget) // whole_step)
    scheduler = _schedule(optimizer, config, steps_per_epoch)
    if processes.count == 1:
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        # Gradients are summed by FSDP or here, so Accelerate must not wrap the model again.
        model, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
    # FSDP averages gradients over processes.
    gain = processes.count if config.adapter is None else 1
    forward = make_forward(model, reference, needs, loaded.prompts.pad_id, layer, config.seed, method.reads_forget)

    generator = torch.Generator().manual_seed(config.seed)
    retain_order = _endless_order(len(retain), generator)
    done = 0
    if progress is not None:
        progress(done, config.epochs * steps_per_epoch)
    for epoch in range(1, config.epochs + 1):
        model.train()
        order = torch.randperm(len(forget), generator=generator).tolist()
        losses = []
        for group in _chunks(order, whole_step):
            retain_nll = 0.0
            for chosen in _chunks(group, config.batch_size):
                drawn = [retain[next(retain_order)] for _ in chosen] if retain else []
                refused = [refusals[epoch - 1][i] for i in chosen] if refusals else []
                positions, shares = processes.split_batch([forget[i] for i in chosen], drawn, refused)
                mine = [chosen[position] for position in positions]
                inputs = forward(
                    [forget[i] for i in mine],
                    [drawn[position] for position in positions] if drawn else [],
                    [refused[position] for position in positions] if refused else [],
                )
                inputs = replace(inputs, shares=shares)
                if initial_forget is not None:
                    inputs = replace(inputs, initial_forget_logp=initial_forget[mine].to(device))
                if initial_refusals:
                    inputs = replace(inputs, initial_refusal_logp=initial_refusals[epoch - 1][mine].to(device))
                loss = method.loss(inputs, hyperparameters)
                losses.append(processes.sum(float(loss.detach())))
                if not math.isfinite(losses[-1]):
                    raise DivergedError(_diverged(config, epoch))
                accelerator.backward(loss * (gain * len(chosen) / len(group)))
                if method.after_step is not None and inputs.retain_nll is not None:
                    own_share = shares.retain_tokens * float(inputs.retain_nll.detach())
                    retain_nll += processes.sum(own_share) * len(chosen) / len(group)
            if config.adapter is not None:
                processes.sum_gradients(trainable)
            accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
            if len(group) < whole_step and not config.whole_last_step:
                # Of the rate, because AdamW divides a factor of the gradient out again. The scheduler sets the next step's.
                for parameters in optimizer.param_groups:
                    parameters["lr"] *= len(group) / whole_step
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if method.after_step is not None:
                hyperparameters = dict(method.after_step(hyperparameters, retain_nll))
            done += 1
            if progress is not None:
                progress(done, config.epochs * steps_per_epoch)
        update = _epoch_update(accelerator.unwrap_model(model), initial, config, processes)
        if processes.sum(float(not all(torch.isfinite(tensor).all() for tensor in update.tensors.values()))):
            raise DivergedError(_diverged(config, epoch))
        yield EpochResult(epoch, update, sum(losses) / len(losses))
        del update  # its memory is needed for the gradients of the next epoch


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
    """Return the initial model for reference passes, a frozen copy if it is still needed or sharded during training."""
    sharded = processes.count > 1
    if config.adapter is not None or not (reads_initial(needs, has_retain) or (sharded and needs & INITIAL_BEFORE_TRAINING)):
        return loaded
    frozen = frozen_copy(loaded)
    if sharded:
        processes.shard(frozen)
    return replace(loaded, model=frozen)


def _trainable(
    loaded: LoadedModel, config: UnlearningConfig, layer: int | None, processes: Processes
) -> tuple[Any, dict[str, Tensor]]:
    """Return the model to train, and the initial weights (of several processes their own shards) of dense updates.

    Full fine-tuning with a steered layer trains only that method's weights.
    """
    model = loaded.model
    if config.adapter is not None:
        model = wrap_adapter(model, config.adapter.as_peft())
        initial: dict[str, Tensor] = {}
    else:
        if layer is not None:
            train_down_projections(model, layer)
        # fp32 master weights: bf16 would round away updates of 1e-3 of a weight.
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
    """Return the update vector of an epoch: what was trained, or its negative where the method walks back."""
    if config.adapter is None:
        update = take_update(model, initial) if processes.count == 1 else take_sharded_update(model, initial, processes.rank)
    else:
        state = adapter_state(model) if processes.rank == 0 else {}
        tensors = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in state.items()}
        update = UpdateVector(LOW_RANK, tensors, config.adapter.as_peft())
    return reverse(update) if METHODS[config.method].walks_back else update


def _schedule(optimizer: Any, config: UnlearningConfig, steps_per_epoch: int) -> Any:
    from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

    # A warm-up starts at rate 0: in an epoch of a single step nothing would change.
    warmup = steps_per_epoch if steps_per_epoch > 1 else 0
    if config.schedule == "linear":
        return get_linear_schedule_with_warmup(optimizer, warmup, config.epochs * steps_per_epoch)
    return get_constant_schedule_with_warmup(optimizer, warmup)


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while count:
        yield from torch.randperm(count, generator=generator).tolist()
