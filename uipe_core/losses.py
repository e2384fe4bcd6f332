"""The unlearning objectives: one function each, one dict of them.

Symbols: b sequences, t positions, v vocabulary entries. Losses are in nats and are minimised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from uipe_core.prompts import IGNORED


@dataclass(frozen=True)
class LossInputs:
    """What one optimisation step has computed for its forget batch and, where a method needs it, its retain batch.

    Attributes:
        forget_logp: (b,) log-probability of each forget answer, summed over its tokens.
        forget_tokens: (b,) number of answer tokens.
        initial_forget_logp: (b,) `forget_logp` under the initial model; for methods with ``initial="forget"``.
        retain_nll: () mean negative log-likelihood per answer token of the retain batch.
        retain_kl: () mean over retain answer tokens of KL(initial || current); for ``initial="retain"``.
    """

    forget_logp: Tensor
    forget_tokens: Tensor
    initial_forget_logp: Tensor | None = None
    retain_nll: Tensor | None = None
    retain_kl: Tensor | None = None

    @property
    def forget_nll(self) -> Tensor:
        """() mean negative log-likelihood per answer token of the forget batch."""
        return -self.forget_logp.sum() / self.forget_tokens.sum()


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


def answer_kl(initial_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over answer tokens of KL(initial || current), () in nats; both logits (b, t, v)."""
    chosen = labels[:, 1:] != IGNORED
    initial = F.log_softmax(initial_logits[:, :-1][chosen].float(), dim=-1)
    current = F.log_softmax(logits[:, :-1][chosen].float(), dim=-1)
    return (initial.exp() * (initial - current)).sum(dim=-1).mean()


Hyperparameters = Mapping[str, float]


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this objective needs {name}")
    return value


def _retain_term(hyper: Hyperparameters, value: Tensor | None, name: str) -> Tensor | float:
    weight = hyper["retain_weight"]
    return weight * _needed(value, name) if weight > 0 else 0.0


def grad_ascent(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Gradient ascent on the forget set: -NLL(forget). TOFU (arXiv 2401.06121), section 4."""
    return -inputs.forget_nll


def grad_diff(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Gradient difference: -NLL(forget) + retain_weight * NLL(retain). TOFU (arXiv 2401.06121), section 4."""
    return -inputs.forget_nll + _retain_term(hyper, inputs.retain_nll, "retain_nll")


def kl_min(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """KL minimisation: -NLL(forget) + retain_weight * KL(initial || current) on retain answers. TOFU, section 4."""
    return -inputs.forget_nll + _retain_term(hyper, inputs.retain_kl, "retain_kl")


def npo(inputs: LossInputs, hyper: Hyperparameters) -> Tensor:
    """Negative preference optimisation: -(2 / beta) E log sigmoid(-beta (log pi - log pi_init)) [+ retain term].

    Sequence log-probabilities are summed over answer tokens. Zhang et al. (arXiv 2404.05868), section 3; with
    ``retain_weight`` > 0 the variant with a retain term (NPO+RT).
    """
    beta = hyper["beta"]
    log_ratio = inputs.forget_logp - _needed(inputs.initial_forget_logp, "initial_forget_logp")
    forget = -(2 / beta) * F.logsigmoid(-beta * log_ratio).mean()
    return forget + _retain_term(hyper, inputs.retain_nll, "retain_nll")


@dataclass(frozen=True)
class Method:
    """An unlearning objective and what it needs.

    Attributes:
        loss: The objective.
        hyperparameters: Names and defaults of what the objective takes.
        initial: Where the initial model is evaluated too: on ``"forget"`` answers, on ``"retain"`` answers, or nowhere.
    """

    loss: Callable[[LossInputs, Hyperparameters], Tensor]
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    initial: Literal["forget", "retain"] | None = None

    def needs_retain(self, hyper: Hyperparameters) -> bool:
        """Whether the objective has a retain term under these hyperparameters."""
        return hyper.get("retain_weight", 0) > 0


METHODS: dict[str, Method] = {
    "grad_ascent": Method(grad_ascent),
    "grad_diff": Method(grad_diff, {"retain_weight": 1.0}),
    "kl_min": Method(kl_min, {"retain_weight": 1.0}, initial="retain"),
    "npo": Method(npo, {"beta": 0.1, "retain_weight": 0.0}, initial="forget"),
}


def mean_answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """() mean negative log-likelihood per answer token over the whole batch, in nats."""
    logp, tokens = answer_logp(logits, labels)
    return -logp.sum() / tokens.sum()
