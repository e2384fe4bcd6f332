"""Compare several texts of each item with its gold answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uipe_core.errors import UserError
from uipe_core.metrics.answers import contains_answer, rouge_recall
from uipe_core.metrics.scores import FloatArray


@dataclass(frozen=True)
class AnswerScores:
    """How much of the gold answers of n items stands in k texts of each.

    Attributes:
        recall: (n, k) ROUGE-L recall of each text, in [0, 1].
        contained: (n, k) whether the text has all words of the answer, one after the other.
    """

    recall: FloatArray
    contained: NDArray[np.bool_]

    @property
    def highest_recall(self) -> FloatArray:
        """(n,) highest recall of an item's texts."""
        return self.recall.max(axis=1)

    @property
    def contained_in_any(self) -> NDArray[np.bool_]:
        """(n,) whether any of an item's texts contains the answer."""
        return np.asarray(self.contained.any(axis=1))

    @property
    def mean_highest_recall(self) -> float:
        """Mean over items of the highest recall, in [0, 1]."""
        return float(self.highest_recall.mean())

    @property
    def contained_share(self) -> float:
        """Share of items whose answer any text contains, in [0, 1]."""
        return float(self.contained_in_any.mean())


def judge(gold: Sequence[str], texts: Sequence[Sequence[str]], unicode: bool = False) -> AnswerScores:
    """Compare texts with gold answers.

    Args:
        gold: n answers.
        texts: n times k texts.
        unicode: ROUGE counts words of any script; containment always does.

    Raises:
        UserError: There are no items or no texts.
    """
    if not gold or not all(texts):
        raise UserError(
            "audit: there are no texts to compare with answers; give at least one item, and ask for one text of each"
        )
    pairs = list(zip(gold, texts, strict=True))
    recall = [[rouge_recall(answer, text, unicode)[0] for text in own] for answer, own in pairs]
    contained = [[contains_answer(answer, text) for text in own] for answer, own in pairs]
    return AnswerScores(np.array(recall, dtype=np.float64), np.array(contained, dtype=np.bool_))
