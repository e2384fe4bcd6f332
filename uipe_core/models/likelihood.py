"""Compute log-likelihoods of answers from logits: per token, per answer, and the KL divergence between two models.

Shapes: b sequences, t positions, v vocabulary entries. Labels and targets are `IGNORED` outside answers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uipe_core.models.prompts import IGNORED, Batch
from uipe_core.models.transformers_compat import accepts_logits_to_keep


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a forward pass; return (b, k, v) logits and (b, k) labels of the last k positions.

    The first of these is the first from which an answer token of the batch is predicted. Logits of the prompts before it, which
    no loss looks at, are not computed where the model can leave them out.
    """
    length = batch.labels.shape[1]
    kept = length - int((batch.labels != IGNORED).any(dim=0).nonzero().min()) + 1
    arguments = {"logits_to_keep": kept} if accepts_logits_to_keep(model) else {}
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **arguments).logits
    return logits[:, -kept:], batch.labels[:, -kept:]


def item_logits(model: Any, batch: Batch) -> Tensor:
    """Run a forward pass; return (b, t, v) logits of all positions, prompts included."""
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (b, t) negative log-likelihoods of the targets, nats, fp32, 0 outside answers.

    Only answer positions go through the softmax: contiguous rows are several times faster than all positions.

    Args:
        logits: (b, t, v); position i predicts target i.
        targets: (b, t).
    """
    chosen = targets != IGNORED
    nll = F.cross_entropy(logits[chosen].float(), targets[chosen], reduction="none")
    return torch.zeros(targets.shape, dtype=nll.dtype, device=nll.device).masked_scatter(chosen, nll)


def answer_logp(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (b,) log-probabilities of the answers in nats, summed over tokens, and (b,) their numbers of tokens.

    Args:
        logits: (b, t, v); position i predicts token i + 1.
        labels: (b, t).
    """
    targets = labels[:, 1:]
    return -token_nll(logits[:, :-1], targets).sum(dim=1), (targets != IGNORED).sum(dim=1)


def answer_rows(values: Tensor, labels: Tensor) -> Tensor:
    """Return (k, n) fp32 rows of (b, t, n) values from which answer tokens are predicted; labels are (b, t)."""
    return values[:, :-1][labels[:, 1:] != IGNORED].float()


def answer_kl(initial_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return () mean over answer tokens of KL(initial || current) in nats; both logits (b, t, v)."""
    initial = F.log_softmax(answer_rows(initial_logits, labels), dim=-1)
    current = F.log_softmax(answer_rows(logits, labels), dim=-1)
    return (initial.exp() * (initial - current)).sum(dim=-1).mean()


def item_kl(initial_logits: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Return () mean over items of each item's mean over tokens of KL(initial || current), in nats.

    Every token but the first counts, the prompt's too: TOFU (arXiv 2401.06121), section 4. An item of one token counts 0.

    Args:
        initial_logits, logits: (b, t, v); position i predicts token i + 1.
        mask: (b, t) 1 for tokens, 0 for padding.
    """
    predicted = mask[:, 1:].bool()
    initial = F.log_softmax(initial_logits[:, :-1][predicted].float(), dim=-1)
    current = F.log_softmax(logits[:, :-1][predicted].float(), dim=-1)
    per_token = (initial.exp() * (initial - current)).sum(dim=-1)
    sums = torch.zeros(predicted.shape, dtype=per_token.dtype, device=per_token.device).masked_scatter(predicted, per_token)
    return (sums.sum(dim=1) / predicted.sum(dim=1).clamp(min=1)).mean()


def mean_answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return () mean negative log-likelihood per answer token of the batch, in nats."""
    logp, tokens = answer_logp(logits, labels)
    return -logp.sum() / tokens.sum()
