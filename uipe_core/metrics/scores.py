"""Hold what scoring yields as numpy arrays, and check that two sets of scores are of the same items."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from uipe_core.errors import UserError

FloatArray = NDArray[np.float64]

IntArray = NDArray[np.int64]


TEXTS = "texts"
"""In place of an evaluation set in names of arrays: a few answers as text, which are no scores."""


class _Items:
    """Scores with arrays of one value or row per item."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array by name."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def take(self, rows: Sequence[int], item_hash: str | None) -> Self:
        """Return the scores of some items, in the order of `rows`; `item_hash` is that of the items taken."""
        taken: dict[str, Any] = {"item_hash": item_hash}
        for part in fields(self):  # type: ignore[arg-type]
            value = getattr(self, part.name)
            if isinstance(value, np.ndarray):
                taken[part.name] = value[list(rows)]
            elif isinstance(value, tuple):
                taken[part.name] = tuple(value[row] for row in rows)
        return replace(self, **taken)  # type: ignore[type-var]


OVERFLOW_LOSS = 1000.0
"""Nats per token in place of a loss that is not finite: its probability is 0 in double precision. Letters of multiple choice
have twice of it, but the one that counts as the answer."""


@dataclass(frozen=True)
class SetScores(_Items):
    """Scores of one evaluation set of n items with k perturbed answers each.

    Attributes:
        answer_loss: (n,) mean negative log-likelihood of the gold answer, nats per answer token, end token included; NaN
            if a log that serves as a reference lacks it.
        answer_tokens: (n,) number of answer tokens behind each mean.
        paraphrase_loss, paraphrase_tokens: (n,) the same for the paraphrased answer.
        perturbed_loss, perturbed_tokens: (n, k) the same for the perturbed answers.
        rouge_l_recall, rouge_1_recall: (n,) of the greedy generation against the gold answer; None if not generated.
        generated: n generated texts, or None.
        questions, answers: Texts of the items, written to evaluation logs, or None if unknown.
        item_hash: Item-set hash; None for logs without one.
        exact_memorization, extraction_strength: (n,) in [0, 1] of the gold answer, see `memorization`; None if unknown.
        logit_spread: (n,) standard deviation of the logits over the vocabulary, mean over the gold answer's tokens; utility
            sets only.
        initial_kl: (n,) KL(initial || model) over the vocabulary, mean over the gold answer's tokens in nats; None if not
            measured.
        min_k: (n,) Min-K% of the gold answer, nats per token (`uipe_core.metrics.answers.min_k`); None if not measured.
        rouge_l_f1: (n,) ROUGE-L F1 of the greedy generation, both cut at `Item.length`; None for items without a length.
        extraction_strength_open_unlearning: (n,) as `extraction_strength`, but at least 1 / tokens; of logs that have it alone.
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
    extraction_strength_open_unlearning: FloatArray | None = None
    initial_kl: FloatArray | None = None
    min_k: FloatArray | None = None
    rouge_l_f1: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.paraphrase_loss)

    @property
    def is_finite(self) -> bool:
        """Return True if every loss and every logit spread is finite."""
        measured = (self.answer_loss, self.paraphrase_loss, self.perturbed_loss, self.logit_spread, self.initial_kl, self.min_k)
        return all(values is None or bool(np.isfinite(values).all()) for values in measured)

    def without_overflow(self) -> "SetScores":
        """Return the scores as `ScoreReport.without_overflow` says."""

        def bounded(losses: FloatArray) -> FloatArray:
            return np.where(np.isfinite(losses), losses, OVERFLOW_LOSS)

        known = self.logit_spread is None or bool(np.isfinite(self.logit_spread).all())
        return replace(
            self,
            answer_loss=bounded(self.answer_loss),
            paraphrase_loss=bounded(self.paraphrase_loss),
            perturbed_loss=bounded(self.perturbed_loss),
            initial_kl=None if self.initial_kl is None else bounded(self.initial_kl),
            min_k=None if self.min_k is None else bounded(self.min_k),
            logit_spread=self.logit_spread if known else None,
        )


@dataclass(frozen=True)
class ScoreReport:
    """Everything measured on one model.

    Attributes:
        sets: Scores by evaluation set (``forget``, ``retain``, ``real_authors``, ``world_facts``, and if the corpus has them
            ``related``, ``unrelated``).
        logit_scale: Standard deviation of the logits over the vocabulary, mean over gold answer tokens of the utility sets;
            None if not measured.
        seconds: Wall-clock seconds by stage of scoring (`uipe_core.scoring.scorer.LOSS_STAGES` and later ones), in their order.
    """

    sets: Mapping[str, SetScores]
    logit_scale: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def take(self, rows: Mapping[str, Sequence[int]], hashes: Mapping[str, str]) -> "ScoreReport":
        """Return the scores of some items of the sets in `rows`, with the item-set hashes of those items.

        The logit scale is that of the items taken, if it was kept per item.
        """
        sets = {name: self.sets[name].take(rows[name], hashes.get(name)) for name in rows if name in self.sets}
        return replace(self, sets=sets, logit_scale=logit_scale(sets) or self.logit_scale)

    @property
    def is_finite(self) -> bool:
        """Return True if every loss and every logit spread is finite."""
        return all(scores.is_finite for scores in self.sets.values())

    def without_overflow(self) -> "ScoreReport":
        """Return the scores with `OVERFLOW_LOSS` for losses that are not finite, because hidden states or logits overflowed.

        Such a model has collapsed. Spreads of its logits are unknown.
        """
        if self.is_finite:
            return self
        scale = self.logit_scale if self.logit_scale is not None and np.isfinite(self.logit_scale) else None
        return replace(self, sets={name: scores.without_overflow() for name, scores in self.sets.items()}, logit_scale=scale)

    def compared_with_itself(self, names: Sequence[str]) -> "ScoreReport":
        """Return the initial model's scores with its divergence from itself, 0, for the items of these sets."""
        zeros = {name: replace(scores, initial_kl=np.zeros(len(scores))) for name, scores in self.sets.items() if name in names}
        return replace(self, sets={**self.sets, **zeros})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return every per-item array by ``set/measurement``."""
        return {f"{name}/{key}": value for name, scores in self.sets.items() for key, value in scores.arrays.items()}


def set_scores(arrays: Mapping[str, NDArray[Any]], name: str) -> SetScores:
    """Return the scores of one evaluation set, from arrays named as in `ScoreReport.arrays`."""
    fields_of_set: dict[str, Any] = {key.partition("/")[2]: each for key, each in arrays.items() if key.startswith(f"{name}/")}
    return SetScores(**fields_of_set)


def logit_scale(sets: Mapping[str, SetScores]) -> float | None:
    """Return the mean logit spread over all gold answer tokens of the sets that have it, end tokens included; None without."""
    known = [scores for scores in sets.values() if scores.logit_spread is not None]
    if not known:
        return None
    spreads = np.concatenate([np.asarray(scores.logit_spread) for scores in known])
    return float(np.average(spreads, weights=np.concatenate([scores.answer_tokens for scores in known])))


CHOICE_DEFINITION = "letters"
"""Metric definition of multiple choice: by letters, without examples, as in lm-evaluation-harness's wmdp and mmlu tasks."""


@dataclass(frozen=True)
class ChoiceScores(_Items):
    """Scores of one set of n questions with up to k choices.

    Attributes:
        log_likelihood: (n, k) log-likelihood of each choice's letter after the question, nats; -inf beyond its choices.
        answers: (n,) index of the right choice.
        choices: (n,) number of choices.
        logit_spread: (n,) standard deviation of the logits over the vocabulary at the position that predicts the letter; None
            if unknown.
        item_hash: Item-set hash of the questions; None if unknown.
    """

    log_likelihood: FloatArray
    answers: IntArray
    choices: IntArray
    logit_spread: FloatArray | None
    item_hash: str | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def offered(self) -> NDArray[np.bool_]:
        """(n, k) whether the question has this choice."""
        return np.arange(self.log_likelihood.shape[1]) < self.choices[:, None]

    @property
    def is_finite(self) -> bool:
        """Return True if every log-likelihood and every logit spread is finite."""
        spreads = self.logit_spread is None or bool(np.isfinite(self.logit_spread).all())
        return spreads and bool((np.isfinite(self.log_likelihood) | ~self.offered).all())

    @property
    def overflowed(self) -> NDArray[np.bool_]:
        """(n,) whether `without_overflow` replaced the log-likelihoods of the question."""
        return np.equal(self.log_likelihood.max(axis=1, initial=-np.inf), -OVERFLOW_LOSS)

    def without_overflow(self, right: bool) -> "ChoiceScores":
        """Return the scores as `ChoiceReport.without_overflow` says; questions that overflowed count as right or wrong."""
        broken = np.asarray((self.offered & ~np.isfinite(self.log_likelihood)).any(axis=1))
        table = np.where(broken[:, None] & self.offered, -2 * OVERFLOW_LOSS, self.log_likelihood)
        table[broken, (self.answers if right else (self.answers + 1) % self.choices)[broken]] = -OVERFLOW_LOSS
        known = self.logit_spread is not None and bool(np.isfinite(self.logit_spread).all())
        return replace(self, log_likelihood=table, logit_spread=self.logit_spread if known else None)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) whether the right letter is the most likely; of equally likely ones the first counts."""
        return self.log_likelihood.argmax(axis=1) == self.answers

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array by name, `correct` included."""
        return {**super().arrays, "correct": self.correct}


@dataclass(frozen=True)
class ChoiceReport:
    """Everything measured on one model that answered multiple-choice questions.

    Attributes:
        sets: Scores by set, ``forget`` and ``utility``.
        seconds: Wall-clock seconds by stage (``letters``).
    """

    sets: Mapping[str, ChoiceScores]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def logit_scale(self) -> float | None:
        """Mean logit spread over the utility questions; None without any, or where logits overflowed."""
        utility = self.sets.get("utility")
        return (
            None if utility is None or utility.logit_spread is None or not len(utility) else float(utility.logit_spread.mean())
        )

    @property
    def is_finite(self) -> bool:
        """Return True if every log-likelihood and every logit spread is finite."""
        return all(scores.is_finite for scores in self.sets.values())

    def without_overflow(self) -> "ChoiceReport":
        """Return the scores with finite numbers for questions whose logits overflowed.

        Such a model has collapsed. So that it looks good nowhere, these questions count as known in the forget set, where
        accuracy 0 would be the best forgetting there is, and as failed in the others. Spreads of its logits are unknown.
        """
        if self.is_finite:
            return self
        return replace(self, sets={name: each.without_overflow(right=name == "forget") for name, each in self.sets.items()})

    def take(self, rows: Mapping[str, Sequence[int]], hashes: Mapping[str, str]) -> "ChoiceReport":
        """Return the scores of some questions of the sets in `rows`, with the item-set hashes of those questions."""
        sets = {name: self.sets[name].take(rows[name], hashes.get(name)) for name in rows if name in self.sets}
        return ChoiceReport(sets, self.seconds)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return every array by ``set/measurement``."""
        return {f"{name}/{key}": value for name, scores in self.sets.items() for key, value in scores.arrays.items()}


REMEDY = "score the reference on the same corpus and split"


def require_same_items(scores: SetScores, expected: SetScores, name: str) -> None:
    """Raise UserError if a reference was scored on other items.

    Counts must agree, and item-set hashes if both have one. Without both hashes texts are compared if both have them: an item
    differs if neither question nor answer agrees. Only letters and digits count then, and a question may be inside a prompt,
    because code bases log questions with their prompt format and decode tokens with other spaces.

    Args:
        scores: One set of the scored model.
        expected: The same set of the reference.
        name: Name of the set, for the error.

    Raises:
        UserError: Other items; gives both counts and the first differing item, with both questions if known.
    """
    hashed = scores.item_hash is not None and expected.item_hash is not None
    same_hash = hashed and scores.item_hash == expected.item_hash
    first = None if same_hash else _first_difference(scores, expected)
    if len(scores) == len(expected) and (same_hash or (first is None and not hashed)):
        return
    counts = f"set {name!r} has {len(scores)} items, the reference has {len(expected)}"
    hashes = f" (item-set hash {scores.item_hash} against {expected.item_hash})" if hashed and not same_hash else ""
    raise UserError(
        f"the reference was scored on other items: {counts}{hashes}; {_described(scores, expected, first)}; {REMEDY}"
    )


def _first_difference(scores: SetScores, expected: SetScores) -> int | None:
    """Return the index of the first differing item, None if the texts of all shared items agree or are unknown."""
    shared = min(len(scores), len(expected))
    if scores.questions is None or expected.questions is None:
        return None
    exact = scores.item_hash is not None and expected.item_hash is not None
    for index in range(shared):
        questions = scores.questions[index], expected.questions[index]
        answers = None
        if scores.answers is not None and expected.answers is not None:
            answers = scores.answers[index], expected.answers[index]
        if exact:
            # Both logs are written by this code, so texts of equal items are equal.
            agrees = questions[0] == questions[1] and (answers is None or answers[0] == answers[1])
        else:
            agrees = _contained(*questions) or (answers is not None and _plain(answers[0]) == _plain(answers[1]))
        if not agrees:
            return index
    return None if len(scores) == len(expected) else shared


def _described(scores: SetScores, expected: SetScores, first: int | None) -> str:
    if scores.questions is None or expected.questions is None:
        return "which item differs first is not known, because the texts are not in both"
    if first is None:
        return "questions and answers are the same, so the first difference is in a paraphrased or perturbed answer"
    shared = min(len(scores), len(expected))
    if first == shared:
        longer = scores.questions if len(scores) > shared else expected.questions
        return f"the first item that differs is {first}, which only one of them has: {longer[first]!r}"
    return f"the first item that differs is {first}: {scores.questions[first]!r} against {expected.questions[first]!r}"


def _contained(first: str, second: str) -> bool:
    one, two = _plain(first), _plain(second)
    return one == two or (one != "" and two != "" and (one in two or two in one))


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).casefold()
