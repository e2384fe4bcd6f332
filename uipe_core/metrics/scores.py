"""What scoring one model on one corpus yields: numpy arrays per evaluation set, free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class SetScores:
    """Scores of one evaluation set of n items with k perturbed answers each.

    Attributes:
        answer_loss: (n,) mean negative log-likelihood of the gold answer, nats per answer token, end token included; NaN
            where a log that serves as a reference lacks it.
        answer_tokens: (n,) number of answer tokens behind each mean.
        paraphrase_loss, paraphrase_tokens: (n,) the same for the paraphrased answer.
        perturbed_loss, perturbed_tokens: (n, k) the same for the perturbed answers.
        rouge_l_recall, rouge_1_recall: (n,) of the greedy generation against the gold answer; None where not generated.
        generated: n generated texts, or None.
        questions, answers: the texts the scores belong to (written to evaluation logs), or None when unknown.
        item_hash: item-set hash of the items; None for logs that do not carry one.
        exact_memorization, extraction_strength: (n,) in [0, 1] of the gold answer, see `memorization`; None where a log
            lacks them.
        logit_spread: (n,) standard deviation of the logits over the vocabulary, mean over the gold answer's tokens; of the sets
            of model utility only.
    """

    answer_loss: FloatArray
    answer_tokens: IntArray
    paraphrase_loss: FloatArray
    paraphrase_tokens: IntArray
    perturbed_loss: FloatArray
    perturbed_tokens: IntArray
    rouge_l_recall: FloatArray | None = None
    rouge_1_recall: FloatArray | None = None
    generated: tuple[str, ...] | None = None
    questions: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    item_hash: str | None = None
    exact_memorization: FloatArray | None = None
    extraction_strength: FloatArray | None = None
    logit_spread: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.paraphrase_loss)

    def take(self, rows: Sequence[int], item_hash: str | None) -> "SetScores":
        """The scores of some items, in the order of `rows`; `item_hash` is that of the items taken."""
        taken: dict[str, Any] = {"item_hash": item_hash}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, np.ndarray):
                taken[part.name] = value[list(rows)]
            elif isinstance(value, tuple):
                taken[part.name] = tuple(value[row] for row in rows)
        return replace(self, **taken)


@dataclass(frozen=True)
class ScoreReport:
    """Everything measured on one model.

    Attributes:
        sets: Scores by evaluation set name (``forget``, ``retain``, ``real_authors``, ``world_facts``, and where the
            corpus has them ``related``, ``unrelated``).
        logit_scale: Mean over gold answer tokens of the utility sets of the standard deviation of the logits over the
            vocabulary; None where it was not measured.
        seconds: Wall-clock seconds by stage of scoring (`uipe_core.scoring.scorer.LOSS_STAGES` and those that follow), in their order.
    """

    sets: Mapping[str, SetScores]
    logit_scale: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def take(self, rows: Mapping[str, Sequence[int]], hashes: Mapping[str, str]) -> "ScoreReport":
        """The scores of some items of every set in `rows` that the report has; `hashes` are the item-set hashes of those items.

        The logit scale is that of the items taken, where it was kept per item.
        """
        sets = {name: self.sets[name].take(rows[name], hashes.get(name)) for name in rows if name in self.sets}
        return replace(self, sets=sets, logit_scale=logit_scale(sets) or self.logit_scale)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every per-item array by ``set/measurement``, for a file beside the trial."""
        return {
            f"{name}/{part.name}": value
            for name, scores in self.sets.items()
            for part in fields(scores)
            if isinstance(value := getattr(scores, part.name), np.ndarray)
        }


def set_scores(arrays: Mapping[str, NDArray[Any]], name: str) -> SetScores:
    """The scores of one evaluation set, from arrays as `ScoreReport.arrays` names them."""
    fields_of_set: dict[str, Any] = {key.partition("/")[2]: each for key, each in arrays.items() if key.startswith(f"{name}/")}
    return SetScores(**fields_of_set)


def logit_scale(sets: Mapping[str, SetScores]) -> float | None:
    """Mean logit spread over all gold answer tokens of the sets that have it, end tokens included; None where none has."""
    known = [scores for scores in sets.values() if scores.logit_spread is not None]
    if not known:
        return None
    spreads = np.concatenate([np.asarray(scores.logit_spread) for scores in known])
    return float(np.average(spreads, weights=np.concatenate([scores.answer_tokens for scores in known])))
