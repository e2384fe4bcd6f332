"""What scoring one model on multiple-choice questions yields: numpy arrays per set, free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.metrics.scores import FloatArray, IntArray

CHOICE_DEFINITION = "letters"
"""Metric definition of multiple choice: by the letters, without examples, as lm-evaluation-harness's wmdp and mmlu tasks."""


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of one set of n questions, the one with most having k choices.

    Attributes:
        log_likelihood: (n, k) log-likelihood of each choice's letter after the question, nats; -inf where a question has fewer.
        answers: (n,) index of the right choice.
        choices: (n,) number of choices.
        logit_spread: (n,) standard deviation of the logits over the vocabulary, where the letter is predicted.
        item_hash: Item-set hash of the questions; None for results that do not carry one.
    """

    log_likelihood: FloatArray
    answers: IntArray
    choices: IntArray
    logit_spread: FloatArray
    item_hash: str | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) whether the right letter is the likeliest; of equally likely ones the first counts."""
        return self.log_likelihood.argmax(axis=1) == self.answers

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array by name."""
        names = ("log_likelihood", "answers", "choices", "logit_spread", "correct")
        return {name: getattr(self, name) for name in names}

    def take(self, rows: Sequence[int], item_hash: str | None) -> "ChoiceScores":
        """The scores of some questions, in the order of `rows`; `item_hash` is that of the questions taken."""
        kept = list(rows)
        taken = (self.log_likelihood[kept], self.answers[kept], self.choices[kept], self.logit_spread[kept])
        return ChoiceScores(*taken, item_hash)


@dataclass(frozen=True)
class ChoiceReport:
    """Everything measured on one model that answered multiple-choice questions.

    Attributes:
        sets: Scores by set name, ``forget`` and ``utility``.
        seconds: Wall-clock seconds by stage (``letters``).
    """

    sets: Mapping[str, ChoiceScores]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def logit_scale(self) -> float | None:
        """Mean logit spread over the utility questions; None without any."""
        utility = self.sets.get("utility")
        return None if utility is None or not len(utility) else float(np.mean(utility.logit_spread))

    def take(self, rows: Mapping[str, Sequence[int]], hashes: Mapping[str, str]) -> "ChoiceReport":
        """The scores of some questions of every set in `rows`; `hashes` are the item-set hashes of those questions."""
        sets = {name: self.sets[name].take(rows[name], hashes.get(name)) for name in rows if name in self.sets}
        return ChoiceReport(sets, self.seconds)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array by ``set/measurement``, for a file beside the trial."""
        return {f"{name}/{key}": value for name, scores in self.sets.items() for key, value in scores.arrays.items()}
