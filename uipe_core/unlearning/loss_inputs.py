"""Run the forward passes of one step that a loss needs, of the model in training and of the initial model."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uipe_core.corpora.types import REFUSALS, Corpus, ItemSet, draw_refusals
from uipe_core.errors import UserError
from uipe_core.models.likelihood import (
    answer_kl,
    answer_logits,
    answer_logp,
    answer_rows,
    item_kl,
    item_logits,
    mean_answer_nll,
)
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import IGNORED, Batch, Example, pad_batch
from uipe_core.unlearning.alternates import draw_alternates
from uipe_core.unlearning.distributed import Processes
from uipe_core.unlearning.inputs import LossInputs
from uipe_core.unlearning.methods import METHODS
from uipe_core.unlearning.steering import control_direction, decoder_layer, outputs_of

INITIAL_BEFORE_TRAINING = {"initial_forget_logp", "initial_refusal_logp"}
"""Fields of `LossInputs` that the initial model computes once, before training."""

INITIAL_ON_RETAIN = {"retain_kl", "retain_item_kl", "initial_retain_activations"}
"""Fields of `LossInputs` for which the initial model reads the retain batch of every step."""

INITIAL_ON_FORGET = {"initial_forget_rows"}
"""Fields of `LossInputs` for which it reads the forget batch of every step."""


def reads_initial(needs: frozenset[str], has_retain: bool = True) -> bool:
    """Return True if the initial model takes part in every step.

    Args:
        needs: Of a method.
        has_retain: Whether its objective has a retain term.
    """
    return bool(needs & INITIAL_ON_FORGET or (has_retain and needs & INITIAL_ON_RETAIN))


def encode(loaded: LoadedModel, items: ItemSet) -> list[Example]:
    """Tokenize questions and answers."""
    return [loaded.prompts.encode_item(item) for item in items]


def encode_substitutes(loaded: LoadedModel, corpus: Corpus, epochs: int, seed: int, method: str) -> list[list[Example]]:
    """Tokenize, for every epoch, the forget questions with what a method puts in place of their answers; empty if nothing.

    Raises:
        UserError: If the model's vocabulary lacks words of a refusal, or the corpus alternate answers.
    """
    entry, items = METHODS[method], corpus.forget_train
    if not entry.substitutes or not epochs:
        return []
    if entry.alternates:
        if len(corpus.alternates) != len(items):
            raise UserError(
                f"{method}: the corpus has alternate answers of {len(corpus.alternates)} of {len(items)} forget items; "
                "sample or give them first (uipe_core.unlearning.alternates)"
            )
        drawn = [draw_alternates(corpus.alternates, seed, epoch) for epoch in range(1, epochs + 1)]
    else:
        _check_vocabulary(loaded, method)
        drawn = [draw_refusals(len(items), seed, epoch) for epoch in range(1, epochs + 1)]
    return [[loaded.prompts.encode(item.question, text) for item, text in zip(items, texts, strict=True)] for texts in drawn]


def _check_vocabulary(loaded: LoadedModel, method: str) -> None:
    unknown = loaded.tokenizer.unk_token_id
    for text in REFUSALS if unknown is not None else ():
        if unknown in loaded.tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError(f"{method}: the model's vocabulary lacks words of the refusal {text!r}; choose another method")


@torch.no_grad()
def initial_logp(loaded: LoadedModel, examples: list[Example], batch_size: int, processes: Processes) -> Tensor:
    """Return (n,) log-probabilities of the answers under the initial model, before training.

    Processes take batches in turn. If fewer are left than processes, the others read the last one without effect, because all
    of them gather the weights of a sharded model together.
    """
    loaded.model.eval()
    logp = torch.zeros(len(examples))
    starts = range(0, len(examples), batch_size)
    for turn in range(processes.rank, -(-len(starts) // processes.count) * processes.count, processes.count):
        rows = slice(starts[min(turn, len(starts) - 1)], starts[min(turn, len(starts) - 1)] + batch_size)
        batch = pad_batch(examples[rows], loaded.prompts.pad_id, loaded.device)
        read = answer_logp(*answer_logits(loaded.model, batch))[0].cpu()
        if turn < len(starts):
            logp[rows] = read
    return processes.sum_tensor(logp)


def frozen_copy(loaded: LoadedModel) -> Any:
    """Return a frozen copy of the initial model."""
    return deepcopy(loaded.model).eval().requires_grad_(False)


@dataclass(frozen=True)
class Forward:
    """The forward passes of a step.

    Attributes:
        model: The model in training.
        reference: A frozen copy of the initial model; None if that is `model` with its adapter switched off.
        needs: Optional fields of `LossInputs` to fill.
        reads_forget: Whether the forget answers are read (`Method.reads_forget`).
        pad_id: Padding id of batches.
        layer, reference_layer: The steered decoder layer of `model` and of `reference`; None if no method steers.
        direction: (d,) direction it is steered to.
    """

    model: Any
    reference: Any
    needs: frozenset[str]
    pad_id: int
    layer: nn.Module | None = None
    reference_layer: nn.Module | None = None
    direction: Tensor | None = None
    reads_forget: bool = True

    def __call__(self, forget: list[Example], retain: list[Example], refusals: list[Example]) -> LossInputs:
        """Return the inputs of a loss, except what the initial model computes on forget items before training.

        Args:
            forget: Forget items of the step.
            retain: Retain items drawn for it; empty without a retain term.
            refusals: Forget questions with refusals as answers; empty if the method does not use them.
        """
        inputs = self._forget(self._batch(forget)) if self.reads_forget else LossInputs(torch.empty(0), torch.empty(0))
        if refusals:
            logp, tokens = answer_logp(*answer_logits(self.model, self._batch(refusals)))
            inputs = replace(inputs, refusal_logp=logp, refusal_tokens=tokens)
        return self._with_retain(inputs, self._batch(retain)) if retain else inputs

    def _forget(self, batch: Batch) -> LossInputs:
        logits, labels, activations = self._pass(self.model, self.layer, batch)
        logp, tokens = answer_logp(logits, labels)
        inputs = LossInputs(logp, tokens, forget_activations=activations, direction=self.direction)
        if "forget_rows" in self.needs:
            targets = labels[:, 1:][labels[:, 1:] != IGNORED]
            inputs = replace(inputs, forget_rows=answer_rows(logits, labels), forget_targets=targets)
        if "initial_forget_rows" in self.needs:
            with self._initial() as (model, layer):
                inputs = replace(inputs, initial_forget_rows=answer_rows(*self._pass(model, layer, batch)[:2]))
        return inputs

    def _with_retain(self, inputs: LossInputs, batch: Batch) -> LossInputs:
        whole = "retain_item_kl" in self.needs
        logits, labels, activations = self._pass(self.model, self.layer, batch, whole)
        found: dict[str, Any] = {}
        if "retain_nll" in self.needs:
            found["retain_nll"] = mean_answer_nll(logits, labels)
        if self.needs & INITIAL_ON_RETAIN:
            with self._initial() as (model, layer):
                initial_logits, _, initial_activations = self._pass(model, layer, batch, whole)
            if whole:
                found["retain_item_kl"] = item_kl(initial_logits, logits, batch.attention_mask)
            if "retain_kl" in self.needs:
                found["retain_kl"] = answer_kl(initial_logits, logits, labels)
            found |= {"retain_activations": activations, "initial_retain_activations": initial_activations}
        return replace(inputs, **found)

    def _batch(self, examples: list[Example]) -> Batch:
        return pad_batch(examples, self.pad_id, self.model.device)

    def _pass(
        self, model: Any, layer: nn.Module | None, batch: Batch, whole: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `answer_logits`, and the layer's activations at the positions that predict answer tokens.

        With `whole` logits and labels are those of all positions, and there are no activations.
        """
        if whole:
            return item_logits(model, batch), batch.labels, None
        if layer is None:
            return *answer_logits(model, batch), None
        with outputs_of(layer) as outputs:
            logits, labels = answer_logits(model, batch)
        return logits, labels, answer_rows(outputs[0], batch.labels)

    @contextmanager
    def _initial(self) -> Iterator[tuple[Any, nn.Module | None]]:
        """Yield the initial model and its steered layer, without gradients."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference, self.reference_layer
                return
            self.model.eval()  # without dropout, as the initial model
            with self.model.disable_adapter():
                yield self.model, self.layer
            self.model.train()


def make_forward(
    model: Any, reference: Any, needs: frozenset[str], pad_id: int, layer: int | None, seed: int, reads_forget: bool = True
) -> Forward:
    """Make the forward passes of a base run; raise UserError if the model lacks the steered layer.

    Args:
        model, reference, needs, pad_id, reads_forget: As in `Forward`.
        layer: Index of the steered layer, or None.
        seed: Seed of its direction.
    """
    if layer is None:
        return Forward(model, reference, needs, pad_id, reads_forget=reads_forget)
    size = model.config.get_text_config().hidden_size
    other = None if reference is None else decoder_layer(reference, layer)
    direction = control_direction(size, seed).to(model.device)
    return Forward(model, reference, needs, pad_id, decoder_layer(model, layer), other, direction)
