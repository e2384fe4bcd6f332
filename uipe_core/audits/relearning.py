"""Fine-tune a copy of an unlearned model for a little, and ask how much of the forgotten comes back.

Shows whether what was forgotten is a few steps away: from the forget set again, from a few of its items (does the rest come
back too?), or from harmless data of the retain set only. Cannot show that more steps, another learning rate or other data bring
back no more. Training on the forget set teaches any model something, so a share means most next to that of the retain model,
relearned alike. Costs one fine-tuning, in steps of `training_steps`, and one more scoring for each setting. Memory holds the
model twice, once in fp32, and for full fine-tuning AdamW's two moments.

Sources: Lynch et al. 2024 (arXiv 2402.16835); Hu et al. 2024 (arXiv 2406.13356: relearning from a part and from benign texts);
Deeb and Roger 2024 (arXiv 2410.08827: what comes back of facts that were not taught again). 1 epoch at a learning rate of 2e-5
as in open-unlearning (arXiv 2506.12618). The fine-tuning is that of `uipe_core.unlearning.finetuning`.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch

from uipe_core.corpora.types import Corpus, Item, ItemSet
from uipe_core.deltas.extrapolation import merge
from uipe_core.errors import UserError, did_you_mean
from uipe_core.models.loading import LoadedModel, Progress
from uipe_core.models.memory import free_memory, is_out_of_memory
from uipe_core.models.transformers_compat import has_adapter
from uipe_core.storage.safetensors_files import parts
from uipe_core.unlearning.finetuning import FinetuneConfig, FinetuningDivergedError, finetune
from uipe_core.unlearning.training import AdapterConfig

KINDS = ("forget", "few", "benign")
"""Items that are trained on: the forget set, a few of it, the retain set."""


@dataclass(frozen=True)
class RelearningConfig:
    """How a model is fine-tuned again.

    Attributes:
        kind: Key of `KINDS`.
        items: Most items, chosen at random; None for all.
        epochs: Passes over the items.
        learning_rate: Peak learning rate.
        batch_size: Items per step.
        adapter: LoRA while training; None for full fine-tuning.
        seed: Of the choice and order of items, adapter and dropout.
    """

    kind: str
    items: int | None
    epochs: int
    learning_rate: float
    batch_size: int
    adapter: AdapterConfig | None = None
    seed: int = 0


@dataclass(frozen=True)
class Relearned:
    """A fine-tuned copy.

    Attributes:
        loaded: The copy, ready to score; None if there is none.
        items: What it was trained on.
        steps: Optimisation steps done.
        problem: Why there is none, in a few words; None if there is.
    """

    loaded: LoadedModel | None
    items: ItemSet
    steps: int
    problem: str | None = None


def relearning_items(corpus: Corpus, config: RelearningConfig) -> ItemSet:
    """Return the items that are trained on, in the order of the corpus.

    Raises:
        UserError: The kind is unknown, or the corpus has no such items.
    """
    if config.kind not in KINDS:
        raise UserError(f"relearning: {config.kind!r} is unknown; known: {', '.join(KINDS)}.{did_you_mean(config.kind, KINDS)}")
    items = corpus.retain_train if config.kind == "benign" else corpus.forget_train
    if not items:
        what = "retain" if config.kind == "benign" else "forget"
        raise UserError(f"relearning: {corpus.name} has no {what} items to train on; leave out {config.kind}")
    if config.items is None or config.items >= len(items):
        return items
    chosen = np.random.default_rng(config.seed).permutation(len(items))[: config.items]
    return tuple(items[place] for place in sorted(chosen))


def unseen(items: Sequence[Item], trained: Sequence[Item]) -> list[int]:
    """Return the places of the items whose question was not trained on: what comes back of these was not taught again."""
    known = {(item.question, item.answer if item.plain else "") for item in trained}
    return [place for place, item in enumerate(items) if (item.question, item.answer if item.plain else "") not in known]


def training_steps(items: int, config: RelearningConfig) -> int:
    """Return the optimisation steps that so many items take."""
    return config.epochs * -(-items // config.batch_size)


def relearn(loaded: LoadedModel, corpus: Corpus, config: RelearningConfig, progress: Progress | None = None) -> Relearned:
    """Fine-tune a copy of a model; the model itself is left as it is, to the bit.

    Args:
        loaded: The unlearned model. An adapter is merged into the copy first.
        corpus: Where the items come from.
        config: Settings.
        progress: Called with (steps done, steps in all).

    Returns:
        The copy, or what went wrong: the training diverged, or memory ran out.

    Raises:
        UserError: As `relearning_items`.
    """
    items = relearning_items(corpus, config)
    done = 0

    def step(steps: int, total: int) -> None:
        nonlocal done
        done = steps
        if progress is not None:
            progress(steps, total)

    try:
        copy = _trained_copy(loaded, items, config, step)
        if all(torch.isfinite(part).all() for weight in copy.model.parameters() for part in parts(weight.detach())):
            return Relearned(copy, items, done)
        problem = "diverged: its weights are not finite"
    except FinetuningDivergedError:
        problem = "diverged: its loss is not finite"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        problem = "memory ran out; relearn with LoRA or smaller batches"
    # Outside the handler, because the traceback keeps the copy's tensors alive.
    free_memory()
    return Relearned(None, items, done, problem)


def _trained_copy(loaded: LoadedModel, items: ItemSet, config: RelearningConfig, progress: Progress) -> LoadedModel:
    model = deepcopy(loaded.model)
    if has_adapter(model):
        model = merge(model)
    copy = LoadedModel(model, loaded.tokenizer, loaded.prompts)
    # An adapter leaves the weights under it frozen.
    model.requires_grad_(True)
    settings = FinetuneConfig(
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        adapter=config.adapter,
        seed=config.seed,
    )
    finetune(copy, items, settings, progress=progress)
    return copy
