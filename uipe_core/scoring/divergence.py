"""Compute the Kullback-Leibler divergence of a moved model from the initial model, at the positions of given answers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uipe_core.scoring.packing import Rows

KEPT_TOKENS = 64
"""Tokens kept of each distribution; all others count as one."""

_LEAST = 1e-9
"""Probability of the others is kept above: in double precision 1 minus a sum of probabilities is no surer."""


@dataclass(frozen=True)
class Distributions:
    """The initial model's distributions at the t positions of an answer.

    Attributes:
        tokens: (t, k) the most likely tokens.
        log_probabilities: (t, k + 1) theirs and that of all others together, in double precision.
    """

    tokens: Tensor
    log_probabilities: Tensor


class InitialAnswers:
    """Keep the initial model's distributions over some answers, and compare those of other models with them.

    Of each distribution `KEPT_TOKENS` tokens are kept and the rest as one outcome: 1 kB a token where a vocabulary of
    128,000 takes 512. Merging outcomes never enlarges a divergence, so what is computed is a lower bound, and exact for a
    vocabulary no larger than that.

    Args:
        numbers: Example numbers of the answers.
    """

    def __init__(self, numbers: Collection[int]) -> None:
        self.numbers = frozenset(numbers)
        self._kept: dict[int, Distributions] = {}

    def keep(self, rows: Rows, logits: Tensor) -> None:
        """Keep the distributions of a batch. Logits are (predicting positions, vocabulary)."""
        for number, own in self._own(rows).items():
            found = logits[rows.which[own]].float().log_softmax(dim=-1)
            log_probabilities, tokens = found.topk(min(KEPT_TOKENS, found.shape[-1]), dim=-1)
            self._kept[number] = Distributions(tokens, _with_rest(log_probabilities))

    def divergences(self, rows: Rows, logits: Tensor) -> dict[int, float]:
        """Return KL(initial || model), the mean over an answer's tokens in nats, of the kept answers of a batch by number."""
        values = {}
        for number, own in self._own(rows).items():
            kept = self._kept[number]
            found = logits[rows.which[own]].float()
            chosen = found.gather(-1, kept.tokens.to(found.device)) - found.logsumexp(dim=-1, keepdim=True)
            expected = kept.log_probabilities.to(found.device)
            value = float((expected.exp() * (expected - _with_rest(chosen))).sum(dim=-1).mean())
            values[number] = 0.0 if value < 0 else value  # NaN stays
        return values

    def _own(self, rows: Rows) -> Mapping[int, slice]:
        """Return where the tokens of the answers that are kept stand among those of a batch, by number."""
        ends = np.cumsum(rows.lengths)
        spans: Sequence[tuple[int, int, int]] = list(zip(rows.owners, ends - rows.lengths, ends, strict=True))
        return {number: slice(int(start), int(end)) for number, start, end in spans if number in self.numbers}


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Append the log probability of all other outcomes."""
    known = log_probabilities.double()
    rest = (1.0 - known.exp().sum(dim=-1, keepdim=True)).clamp_min(_LEAST)
    return torch.cat([known, rest.log()], dim=-1)
