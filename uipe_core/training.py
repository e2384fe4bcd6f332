"""One base run: an unlearning method trained once, giving an update vector per epoch.

The loop follows TOFU (arXiv 2401.06121): an epoch is one pass over the forget set, each step pairs its forget batch with as
many retain items drawn at random, AdamW warms up linearly over the first epoch.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uipe_core.corpora.types import Corpus, ItemSet
from uipe_core.losses import METHODS, LossInputs, answer_kl, answer_logp
from uipe_core.models import LoadedModel, Progress
from uipe_core.prompts import Batch, Example, pad_batch
from uipe_core.update_vectors import LOW_RANK, UpdateVector, adapter_state, snapshot, take_update, wrap_adapter

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
        method: Key of `uipe_core.losses.METHODS`.
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


@dataclass(frozen=True)
class EpochResult:
    """The outcome of one epoch: its update vector and the mean of its training losses in nats."""

    epoch: int
    update: UpdateVector
    loss: float


class DivergedError(RuntimeError):
    """A base run whose loss or weights stopped being finite."""


def train_base_run(
    loaded: LoadedModel, corpus: Corpus, config: UnlearningConfig, progress: Progress | None = None
) -> Iterator[EpochResult]:
    """Unlearns the forget set and yields an update vector after every epoch.

    Args:
        loaded: The initial model. It is trained in place; load it anew for the next run.
        corpus: Its `forget_train` is unlearned, its `retain_train` serves the retain terms.
        config: The method and its hyperparameters.
        progress: Called with (optimisation steps done, steps in all).

    Yields:
        EpochResult for epochs 1, 2, ...; its update is exact: theta_init + delta are the trained weights to the bit.

    Raises:
        DivergedError: If a loss or a weight is not finite; names the epoch and the remedy.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    method = METHODS[config.method]
    hyperparameters = {**method.hyperparameters, **config.hyperparameters}
    set_seed(config.seed)
    # Accelerate would train on the first device whichever the model is on; and it divides by a fixed number of accumulation
    # steps, which makes the last, shorter group of an epoch count less. Both are done here.
    device = loaded.device
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,
        mixed_precision="bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no",
    )
    forget = _encode(loaded, corpus.forget_train)
    retain = _encode(loaded, corpus.retain_train) if method.needs_retain(hyperparameters) else []
    initial_logp, reference = None, None
    if method.initial == "forget":
        with accelerator.autocast():
            initial_logp = _initial_forget_logp(loaded, forget, config.batch_size)
    elif method.initial == "retain" and retain and config.adapter is None:
        reference = accelerator.prepare_model(_frozen_copy(loaded), evaluation_mode=True)

    model, initial = _trainable(loaded, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    step_size = config.batch_size * config.gradient_accumulation
    steps_per_epoch = -(-len(forget) // step_size)
    scheduler = _schedule(optimizer, config, steps_per_epoch)
    model, optimizer = accelerator.prepare(model, optimizer)

    generator = torch.Generator().manual_seed(config.seed)
    retain_order = _endless_order(len(retain), generator)
    done = 0
    for epoch in range(1, config.epochs + 1):
        model.train()
        order = torch.randperm(len(forget), generator=generator).tolist()
        losses = []
        for group in _chunks(order, step_size):
            for chosen in _chunks(group, config.batch_size):
                forget_batch = pad_batch([forget[i] for i in chosen], loaded.prompts.pad_id, device)
                retain_batch = None
                if retain:
                    drawn = [retain[next(retain_order)] for _ in chosen]
                    retain_batch = pad_batch(drawn, loaded.prompts.pad_id, device)
                inputs = _forward(model, forget_batch, retain_batch, method.initial == "retain", reference)
                if initial_logp is not None:
                    inputs = replace(inputs, initial_forget_logp=initial_logp[chosen].to(device))
                loss = method.loss(inputs, hyperparameters)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise DivergedError(_diverged(config, epoch))
                accelerator.backward(loss * (len(chosen) / len(group)))
            accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if progress is not None:
                progress(done, config.epochs * steps_per_epoch)
        update = _epoch_update(accelerator.unwrap_model(model), initial, config)
        if not all(torch.isfinite(tensor).all() for tensor in update.tensors.values()):
            raise DivergedError(_diverged(config, epoch))
        yield EpochResult(epoch, update, sum(losses) / len(losses))


def _diverged(config: UnlearningConfig, epoch: int) -> str:
    return (
        f"{config.method} with learning rate {config.learning_rate:g} diverged in epoch {epoch}: its loss or weights are not "
        "finite; lower unlearning.learning_rate or unlearning.epochs"
    )


def _chunks(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _encode(loaded: LoadedModel, items: ItemSet) -> list[Example]:
    return [loaded.prompts.encode(item.question, item.answer) for item in items]


def _trainable(loaded: LoadedModel, config: UnlearningConfig) -> tuple[Any, dict[str, Tensor]]:
    """The model to train, and the weights dense updates are measured from."""
    model = loaded.model
    if config.adapter is not None:
        model = wrap_adapter(model, config.adapter.as_peft())
        initial: dict[str, Tensor] = {}
    else:
        # bf16 weights would swallow updates of 1e-3 of their size, so the master weights are fp32.
        initial = snapshot(model)
        model.float()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model, initial


def _epoch_update(model: Any, initial: Mapping[str, Tensor], config: UnlearningConfig) -> UpdateVector:
    if config.adapter is None:
        return take_update(model, initial)
    state = adapter_state(model)
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


def _logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits


def _forward(model: Any, forget: Batch, retain: Batch | None, with_kl: bool, reference: Any) -> LossInputs:
    logp, tokens = answer_logp(_logits(model, forget), forget.labels)
    if retain is None:
        return LossInputs(logp, tokens)
    logits = _logits(model, retain)
    if with_kl:
        return LossInputs(logp, tokens, retain_kl=answer_kl(_initial_logits(model, reference, retain), logits, retain.labels))
    retain_logp, retain_tokens = answer_logp(logits, retain.labels)
    return LossInputs(logp, tokens, retain_nll=-retain_logp.sum() / retain_tokens.sum())


@torch.no_grad()
def _initial_logits(model: Any, reference: Any, batch: Batch) -> Tensor:
    if reference is not None:
        return _logits(reference, batch)
    # A reference blurred by dropout would not be the initial model.
    model.eval()
    with model.disable_adapter():
        logits = _logits(model, batch)
    model.train()
    return logits


def _frozen_copy(loaded: LoadedModel) -> Any:
    from copy import deepcopy

    return deepcopy(loaded.model).eval().requires_grad_(False)


@torch.no_grad()
def _initial_forget_logp(loaded: LoadedModel, forget: list[Example], batch_size: int) -> Tensor:
    """(n,) log-probability of every forget answer under the initial model, computed once: its weights never change."""
    loaded.model.eval()
    parts = []
    for start in range(0, len(forget), batch_size):
        batch = pad_batch(forget[start : start + batch_size], loaded.prompts.pad_id, loaded.device)
        parts.append(answer_logp(_logits(loaded.model, batch), batch.labels)[0].cpu())
    return torch.cat(parts)
