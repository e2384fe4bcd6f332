"""What reading answers teacher-forced tells: losses, logit spread, most likely tokens."""

from collections.abc import Collection, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uipe_core.metrics.scores import FloatArray
from uipe_core.models.prompts import Example
from uipe_core.scoring.packing import Rows


class Readings:
    """What n examples have told so far, by their number.

    Args:
        examples: All of them.
        gold: Numbers of the gold answers.
        scaled: Numbers of those whose logit spread is wanted.

    Attributes:
        losses: (n,) mean loss, nats per answer token.
        spreads: (n,) standard deviation of the logits over the vocabulary, mean over the answer's tokens.
        best: Of each gold answer the most likely token at every place.
    """

    def __init__(self, examples: Sequence[Example], gold: Collection[int], scaled: Collection[int]) -> None:
        self._examples, self._gold, self._scaled = examples, gold, scaled
        self.losses = np.zeros(len(examples))
        self.spreads = np.zeros(len(examples))
        self.best: dict[int, list[int]] = {}

    def note(self, rows: Rows, logits: Tensor) -> None:
        """Notes what a batch tells; doing it again changes nothing.

        Args:
            rows: The batch.
            logits: (answer tokens, vocabulary) what predicts its answer tokens.
        """
        nll = F.cross_entropy(logits.float(), rows.targets, reduction="none")
        self.losses[list(rows.owners)] = _means(nll, rows.lengths)
        tokens = np.repeat(rows.owners, rows.lengths)
        scaled = [pair for pair in zip(rows.owners, rows.lengths, strict=True) if pair[0] in self._scaled]
        if scaled:
            chosen = torch.from_numpy(np.isin(tokens, [number for number, _ in scaled])).to(logits.device)
            spread = logits[chosen].float().std(dim=-1)
            self.spreads[[number for number, _ in scaled]] = _means(spread, [length for _, length in scaled])
        gold = [number for number in rows.owners if number in self._gold]
        if gold:
            chosen = torch.from_numpy(np.isin(tokens, gold)).to(logits.device)
            likeliest = iter(logits[chosen].argmax(dim=-1).tolist())
            self.best.update({number: list(islice(likeliest, self._examples[number].answer_length)) for number in gold})


def _means(values: Tensor, lengths: Sequence[int]) -> FloatArray:
    """Means of so many values each, one group after the other."""
    counts = torch.tensor(lengths, device=values.device)
    return torch.segment_reduce(values.double(), "mean", lengths=counts).cpu().numpy()
