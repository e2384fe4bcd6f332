"""Hold what a loss reads: the results of one step's forward passes.

Importing this module does not import torch. Symbols: b sequences, v vocabulary entries, d entries of a hidden state, k answer
tokens of a whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """Shares of a whole batch that this process reads; 1 in a single process.

    A loss multiplies each mean by the share of its elements. The losses and gradients of all processes then add up to those of
    the whole batch, however it was split.

    Attributes:
        items: Of the forget items.
        tokens: Of the forget answers' tokens.
        retain_tokens: Of the retain answers' tokens.
        refusal_tokens: Of the refusals' tokens.
    """

    items: float = 1.0
    tokens: float = 1.0
    retain_tokens: float = 1.0
    refusal_tokens: float = 1.0


@dataclass(frozen=True)
class LossInputs:
    """Results of one step's forward passes: the first two unless `Method.reads_forget` is False, the others if `Method.needs`
    names them.

    Attributes:
        forget_logp: (b,) log-probability of each forget answer, summed over its tokens.
        forget_tokens: (b,) number of answer tokens.
        forget_rows: (k, v) logits from which the forget answers' tokens are predicted, fp32.
        forget_targets: (k,) these tokens.
        initial_forget_rows: (k, v) `forget_rows` under the initial model.
        initial_forget_logp: (b,) `forget_logp` under the initial model.
        retain_nll: () mean negative log-likelihood per answer token of the retain batch.
        retain_kl: () mean over retain answer tokens of KL(initial || current).
        retain_item_kl: () mean over retain items of the mean of that KL over all tokens of an item, prompt and answer.
        refusal_logp: (b,) log-probability of a refusal, or an alternate answer, in place of each forget answer, summed over its
            tokens.
        refusal_tokens: (b,) number of their tokens.
        initial_refusal_logp: (b,) `refusal_logp` under the initial model.
        forget_activations: (k, d) outputs of the steered layer at positions that predict forget answer tokens.
        direction: (d,) direction of length 1 to steer to.
        retain_activations: (k, d) the same for the retain batch.
        initial_retain_activations: (k, d) `retain_activations` under the initial model.
        shares: Shares of the whole batch; a loss multiplies its means by them.
    """

    forget_logp: Tensor
    forget_tokens: Tensor
    forget_rows: Tensor | None = None
    forget_targets: Tensor | None = None
    initial_forget_rows: Tensor | None = None
    initial_forget_logp: Tensor | None = None
    retain_nll: Tensor | None = None
    retain_kl: Tensor | None = None
    retain_item_kl: Tensor | None = None
    refusal_logp: Tensor | None = None
    refusal_tokens: Tensor | None = None
    initial_refusal_logp: Tensor | None = None
    forget_activations: Tensor | None = None
    direction: Tensor | None = None
    retain_activations: Tensor | None = None
    initial_retain_activations: Tensor | None = None
    shares: Shares = Shares()

    @property
    def forget_nll(self) -> Tensor:
        """() mean negative log-likelihood per answer token of the forget batch, times its share of the tokens."""
        return self.shares.tokens * (-self.forget_logp.sum() / self.forget_tokens.sum())
