"""Tell members of the training data from others by per-token log-probabilities: LOSS, ZLib, Min-K% and Min-K%++.

Shows whether the forget set still looks like data that the model was trained on, compared with holdout items of the same kind.
Cannot show that a stronger attack (shadow models, likelihood ratios) learns nothing. Where forget and holdout items differ in
kind, an AUC means nothing without the retain model's. Costs one teacher-forced pass over the answers of forget and holdout
items (`uipe_core.audits.token_scores`), no training and no text.

Scores are higher the less a text looks like a member, as in open-unlearning. An AUC near 1 says that forget items still look
like members. Near 0 they look stranger than texts never seen: unlearning too much is as visible as too little.

Sources: LOSS, Yeom et al. 2018 (arXiv 1709.01604); ZLib, Carlini et al. 2021 (arXiv 2012.07805); Min-K%, Shi et al. 2024 (arXiv
2310.16789); Min-K%++, Zhang et al. 2024 (arXiv 2404.02936). Reductions are those of open-unlearning (d3d7cf9): ZLib divides the
mean loss, not its sum. Min-K% leaves out the last token of an answer, which is its end token. PrivLeak follows from the AUC
(`uipe_core.metrics.composites.privleak`).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uipe_core.metrics.answers import SHARE, mean_of_least, min_k, without_end
from uipe_core.metrics.scores import FloatArray

LEAST_DEVIATION = 1e-3
"""Standard deviations are kept above: open-unlearning keeps variances above 1e-6."""


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities a model gives the t tokens of an answer, end token included; nats.

    Attributes:
        log_probabilities: (t,) of the answer's tokens.
        means: (t,) mean log-probability over the vocabulary, weighted by probability: minus the entropy.
        deviations: (t,) standard deviation of it, weighted alike.
    """

    log_probabilities: FloatArray
    means: FloatArray
    deviations: FloatArray


def loss(log_probabilities: FloatArray) -> float:
    """Return the mean negative log-likelihood of (t,) tokens, nats per token."""
    return -float(np.mean(log_probabilities))


def zlib_ratio(log_probabilities: FloatArray, text: str) -> float:
    """Return the mean negative log-likelihood of (t,) tokens over the compressed size of their text, nats per byte."""
    return loss(log_probabilities) / len(zlib.compress(text.encode()))


def min_k_plus_plus(log_probabilities: FloatArray, means: FloatArray, deviations: FloatArray, share: float = SHARE) -> float:
    """Return minus the mean of the lowest standardised log-probabilities; all (t,), the result without unit.

    Args:
        log_probabilities, means, deviations: As in `TokenScores`.
        share: Share of the tokens that counts, in (0, 1]; at least one does.
    """
    return -mean_of_least((log_probabilities - means) / np.maximum(deviations, LEAST_DEVIATION), share)


def membership_scores(tokens: Sequence[TokenScores], texts: Sequence[str], share: float = SHARE) -> dict[str, FloatArray]:
    """Return (n,) scores of n answers by name: ``loss``, ``zlib``, ``min_k``, ``min_k_plus_plus``.

    Args:
        tokens: What the model says of each answer.
        texts: The answers.
        share: As in `min_k`. The last token of an answer does not enter, unless it is the only one.
    """
    inner = [TokenScores(*map(without_end, (each.log_probabilities, each.means, each.deviations))) for each in tokens]
    plus = [min_k_plus_plus(each.log_probabilities, each.means, each.deviations, share) for each in inner]
    return {
        "loss": np.array([loss(each.log_probabilities) for each in tokens]),
        "zlib": np.array([zlib_ratio(each.log_probabilities, text) for each, text in zip(tokens, texts, strict=True)]),
        "min_k": np.array([min_k(each.log_probabilities, share) for each in inner]),
        "min_k_plus_plus": np.array(plus),
    }
