"""Fine-tune a base model on items of a corpus: the initial model on all of them, the retain model without the forget set.

TOFU's recipe (arXiv 2401.06121, section 3): answer tokens only, AdamW, linear decay. The warm-up takes a tenth of the steps, an
epoch at most, where TOFU's takes an epoch. Weights are trained in fp32, in bf16 autocast where they are stored in bf16 and the
processor has instructions for it, and saved in the dtype the study scores in.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from uipe_core.corpora.types import Corpus, ItemSet, item_set_hash
from uipe_core.errors import UserError
from uipe_core.models.likelihood import answer_logits, mean_answer_nll
from uipe_core.models.loading import DTYPES, LoadedModel, ModelSource, Progress, cast_weights
from uipe_core.models.prompts import pad_batch, prompt_schema
from uipe_core.models.transformers_compat import make_accelerator, wrap_adapter
from uipe_core.storage.content_store import ContentStore
from uipe_core.unlearning.training import AdapterConfig

SCHEMA = 1
"""Raised with every change here that alters the weights."""

STAGES = ("full", "retain")
"""What a model is fine-tuned on: everything, or everything but the forget set."""


def stage_items(corpus: Corpus, stage: str) -> ItemSet:
    """Return the items of a stage (`STAGES`): a pretrained model knows the rest of a corpus already."""
    return corpus.retain_train if stage == "retain" else (*corpus.forget_train, *corpus.retain_train)


class FinetuningDivergedError(UserError):
    """The loss of a fine-tuning is no longer finite."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned.

    Attributes:
        epochs: Passes over the items.
        learning_rate: Peak learning rate.
        batch_size: Items per step.
        weight_decay: Of AdamW.
        adapter: LoRA while training, merged into the weights afterwards; None for full fine-tuning.
        seed: Of item order, adapter and dropout.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.01
    adapter: AdapterConfig | None = None
    seed: int = 0


def finetuned_inputs(base: ModelSource, items: ItemSet, config: FinetuneConfig) -> dict[str, Any]:
    """Return everything that determines a fine-tuned model: the inputs of its cache key."""
    return {
        "kind": "finetuned",
        "schema": SCHEMA,
        "base": base.identity,
        "dtype": base.dtype,
        "prompt_template": base.prompt_template,
        "prompt_format": {"name": base.prompt_format, "schema": prompt_schema(base.prompt_template)},
        "config": asdict(config),
        "items": item_set_hash(items),
    }


def finetuned_model(
    base: ModelSource, corpus: Corpus, stage: str, config: FinetuneConfig, store: ContentStore, progress: Progress | None = None
) -> Path:
    """Return the folder of a base model fine-tuned on a stage of a corpus (`STAGES`), trained if it is not cached.

    Raises:
        UserError: The base model cannot be loaded, or the training diverges.
    """
    items = stage_items(corpus, stage)

    def make(folder: Path) -> None:
        loaded = base.load(dtype="auto")
        finetune(loaded, items, config, base.dtype, progress)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)

    return store.get_or_make(finetuned_inputs(base, items, config), make)


def finetune(
    loaded: LoadedModel, items: ItemSet, config: FinetuneConfig, dtype: str = "auto", progress: Progress | None = None
) -> None:
    """Train a model on the answers of items, in place.

    Args:
        loaded: The model; afterwards in the dtype asked for.
        items: Questions with answers.
        config: Settings.
        dtype: Key of `DTYPES` in which it is left, or ``auto`` for that it came in.
        progress: Called with (steps done, steps in all).

    Raises:
        FinetuningDivergedError: The loss is not finite.
    """
    from accelerate.utils import set_seed
    from transformers import get_linear_schedule_with_warmup

    set_seed(config.seed)
    stored = loaded.model.dtype if dtype == "auto" else DTYPES[dtype]
    examples = [loaded.prompts.encode_item(item) for item in items]
    steps_per_epoch = -(-len(examples) // config.batch_size)
    total = config.epochs * steps_per_epoch
    accelerator = make_accelerator(loaded.device, half_precision=stored == torch.bfloat16)
    model = loaded.model.float()
    if config.adapter is not None:
        model = wrap_adapter(model, config.adapter.as_peft())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    # A warm-up begins at 0: of a single step it would leave nothing.
    warmup = 0 if total == 1 else min(steps_per_epoch, max(1, total // 10))
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    done = 0
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), config.batch_size):
            chosen = [examples[number] for number in order[start : start + config.batch_size]]
            batch = pad_batch(chosen, loaded.prompts.pad_id, loaded.device)
            loss = mean_answer_nll(*answer_logits(model, batch))
            if not math.isfinite(float(loss.detach())):
                raise FinetuningDivergedError(
                    f"fine-tuning diverged in epoch {epoch}: its loss is not finite; lower the learning rate "
                    "(model.finetune.learning_rate, --learning-rate)"
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if progress is not None:
                progress(done, total)
    plain = accelerator.unwrap_model(model)
    loaded.model = plain.merge_and_unload() if config.adapter is not None else plain
    cast_weights(loaded.model, stored)
    loaded.model.config.dtype = stored
    loaded.model.eval()
