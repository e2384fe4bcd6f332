"""Generate texts for audits, and compare several texts of each item with its gold answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from uipe_core.errors import UserError
from uipe_core.metrics.answers import contains_answer, rouge_recall
from uipe_core.metrics.scores import FloatArray
from uipe_core.models.loading import LoadedModel
from uipe_core.models.transformers_compat import position_limit
from uipe_core.scoring.batch_sizes import USUAL, BatchSize
from uipe_core.scoring.generation import Choose, GreedyText, complete, most_likely
from uipe_core.scoring.half_precision import fast_products


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


@torch.inference_mode()
def write_texts(
    loaded: LoadedModel, texts: Sequence[GreedyText], size: BatchSize | None = None, choose: Choose = most_likely
) -> list[str]:
    """Generate texts and return them, in order.

    Args:
        loaded: The model with its current weights.
        texts: Prompts and limits; completed in place.
        size: Rows per batch; `USUAL` by default.
        choose: Chooses the next tokens.

    Raises:
        UserError: A prompt with its text has more tokens than the model has positions.
    """
    loaded.model.eval()
    limit = position_limit(loaded.model.config)
    # The last token is not fed.
    longest = max((len(text.prompt) + text.limit - 1 for text in texts), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"audit: a prompt and its text have up to {longest} tokens, and the model has {limit} positions; ask for shorter "
            "texts, or leave out this way to ask"
        )
    prompts = loaded.prompts
    with fast_products(loaded.model.dtype, loaded.device):
        complete(loaded.model, texts, prompts.stop_ids, prompts.pad_id, size or BatchSize(USUAL), choose)
    found = prompts.tokenizer.batch_decode([text.tokens for text in texts], skip_special_tokens=True)
    return [str(text) for text in found]
