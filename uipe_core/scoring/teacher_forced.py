"""Take losses, spreads and the most likely tokens from the logits of teacher-forced passes, batch by batch."""

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from uipe_core.metrics.answers import min_k, without_end
from uipe_core.metrics.scores import FloatArray
from uipe_core.models.prompts import Example
from uipe_core.scoring.divergence import InitialAnswers
from uipe_core.scoring.packing import Rows


class TeacherForcedScores:
    """Results of teacher-forced passes over n examples, by example number.

    Args:
        examples: All examples.
        gold: Numbers of the gold answers.
        scaled: Numbers of the examples whose logit spread is wanted.
        initial: What the initial model says of some gold answers, if divergences from it are wanted.
        members: Gold answers whose Min-K% is wanted, by number: True where the last token is an end token, which is left out.

    Attributes:
        losses: (n,) mean loss, nats per answer token.
        spreads: (n,) standard deviation of the logits over the vocabulary, mean over the answer's tokens.
        best: Of each gold answer the most likely token at every position.
        min_k: Min-K% (`uipe_core.metrics.answers.min_k`) of each answer of `members`.
        divergences: KL(initial || model), nats per answer token, of each answer that `initial` keeps.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        gold: Collection[int],
        scaled: Collection[int],
        initial: InitialAnswers | None = None,
        members: Mapping[int, bool] | None = None,
    ) -> None:
        self._examples, self._gold, self._scaled, self._initial = examples, gold, scaled, initial
        self._members = {} if members is None else members
        self.min_k: dict[int, float] = {}
        self.divergences: dict[int, float] = {}
        self.losses = np.zeros(len(examples))
        self.spreads = np.zeros(len(examples))
        self.best: dict[int, list[int]] = {}

    def record(self, rows: Rows, logits: Tensor) -> None:
        """Record a batch; repeating one changes nothing. Logits are (predicting positions, vocabulary)."""
        which = rows.which
        nll = logits.float().logsumexp(dim=-1)[which] - logits[which, rows.targets].float()
        self.losses[list(rows.owners)] = _means(nll, rows.lengths)
        if self._initial is not None:
            self.divergences |= self._initial.divergences(rows, logits)
        if any(number in self._members for number in rows.owners):
            each = zip(rows.owners, nll.double().split(list(rows.lengths)), strict=True)
            found = {number: -own.cpu().numpy() for number, own in each if number in self._members}
            self.min_k |= {number: min_k(without_end(own) if self._members[number] else own) for number, own in found.items()}
        tokens = np.repeat(rows.owners, rows.lengths)
        scaled = [pair for pair in zip(rows.owners, rows.lengths, strict=True) if pair[0] in self._scaled]
        if scaled:
            chosen = torch.from_numpy(np.isin(tokens, [number for number, _ in scaled])).to(logits.device)
            spread = _standard_deviation(logits[which[chosen]].float())
            self.spreads[[number for number, _ in scaled]] = _means(spread, [length for _, length in scaled])
        gold = [number for number in rows.owners if number in self._gold]
        if gold:
            chosen = torch.from_numpy(np.isin(tokens, gold)).to(logits.device)
            best = iter(logits[which[chosen]].argmax(dim=-1).tolist())
            self.best.update({number: list(islice(best, self._examples[number].answer_length)) for number in gold})


def _standard_deviation(values: Tensor) -> Tensor:
    """Return (n,) standard deviations of (n, v) values; `Tensor.std` takes three times as long on the CPU."""
    centred = values - values.mean(dim=-1, keepdim=True)
    return (centred.square_().sum(dim=-1) / (values.shape[-1] - 1)).sqrt()


def _means(values: Tensor, lengths: Sequence[int]) -> FloatArray:
    """Return means over consecutive groups of `lengths` values."""
    counts = torch.tensor(lengths, device=values.device)
    return torch.segment_reduce(values.double(), "mean", lengths=counts).cpu().numpy()
