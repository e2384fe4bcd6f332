"""Compute log-likelihoods of answers from logits: per token, per answer, and the KL divergence between two models."""

import torch
from torch import Tensor
from torch.nn import functional as F

from uipe_core.models.prompts import IGNORED


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every target token, in nats.

    Only answer positions go through the softmax: on them alone it is a matrix of contiguous rows, several times faster than
    over all positions with the vocabulary in the middle.

    Args:
        logits: (b, t, v); position i predicts target i.
        targets: (b, t) with `IGNORED` outside answers.

    Returns:
        (b, t) fp32, 0 outside answers.
    """
    chosen = targets != IGNORED
    nll = F.cross_entropy(logits[chosen].float(), targets[chosen], reduction="none")
    return torch.zeros(targets.shape, dtype=nll.dtype, device=nll.device).masked_scatter(chosen, nll)


def answer_logp(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer and its number of tokens.

    Args:
        logits: (b, t, v); position i predicts token i + 1.
        labels: (b, t) with `IGNORED` outside answers.

    Returns:
        (b,) summed log-probabilities in nats, (b,) token counts.
    """
    targets = labels[:, 1:]
    return -token_nll(logits[:, :-1], targets).sum(dim=1), (targets != IGNORED).sum(dim=1)


def answer_rows(values: Tensor, labels: Tensor) -> Tensor:
    """The rows of (b, t, n) values that answer tokens are predicted from, (k, n) in fp32; labels are (b, t)."""
    return values[:, :-1][labels[:, 1:] != IGNORED].float()


def answer_kl(initial_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over answer tokens of KL(initial || current), () in nats; both logits (b, t, v)."""
    initial = F.log_softmax(answer_rows(initial_logits, labels), dim=-1)
    current = F.log_softmax(answer_rows(logits, labels), dim=-1)
    return (initial.exp() * (initial - current)).sum(dim=-1).mean()


def mean_answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """() mean negative log-likelihood per answer token over the whole batch, in nats."""
    logp, tokens = answer_logp(logits, labels)
    return -logp.sum() / tokens.sum()
