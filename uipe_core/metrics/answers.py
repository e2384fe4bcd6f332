"""Measure one answer: ROUGE of its text against the gold answer; of the gold answer's own tokens exact memorisation, extraction
strength and Min-K%.

ROUGE (Lin 2004) is Google's rouge-score, which every code base of the field uses, or counts words of any script: rouge-score's
own tokens are runs of a-z and 0-9, so that texts in Cyrillic, Chinese or Hindi have none and every recall is 0. Memorisation
comes from one teacher-forced pass: the most likely tokens against the answer's own, its end token left out, as open-unlearning
does.
"""

import re
import unicodedata
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.corpora.types import UNSPACED
from uipe_core.metrics.scores import FloatArray

_LATIN = re.compile(r"[a-z0-9]")

_UNSPACED = re.compile(f"[{''.join(f'{chr(first)}-{chr(last)}' for first, last in UNSPACED)}]")


@cache
def rouge_recall(gold: str, text: str, unicode: bool = False) -> tuple[float, float]:
    """Return ROUGE-L and ROUGE-1 recall of a text against the gold answer, each in [0, 1].

    Args:
        gold: The gold answer.
        text: The text.
        unicode: Take the words of `unicode_words`, unstemmed, in place of rouge-score's stemmed tokens of a-z and 0-9.
    """
    scores = _scorer(unicode, True).score(gold, text)
    return scores["rougeL"].recall, scores["rouge1"].recall


def rouge_l_f1(gold: str, text: str, stemmed: bool = True, unicode: bool = False) -> float:
    """Return the ROUGE-L F1 of a text against the gold answer, in [0, 1].

    Args:
        gold: The gold answer.
        text: The text.
        stemmed: Take rouge-score's tokens stemmed, as open-unlearning does; MUSE takes them as they are.
        unicode: As in `rouge_recall`.
    """
    return float(_scorer(unicode, stemmed).score(gold, text)["rougeL"].fmeasure)


def has_latin_word(text: str) -> bool:
    """Return True if rouge-score's own tokenizer finds anything in a text."""
    return _LATIN.search(text.lower()) is not None


class UnicodeWords:
    """Tokenizer for rouge-score whose tokens are the words of any script."""

    def tokenize(self, text: str) -> list[str]:
        """Return `unicode_words`."""
        return unicode_words(text)


def unicode_words(text: str) -> list[str]:
    """Split a text into words: runs of letters, digits and their marks, in NFKC and without case.

    A character of a script without spaces is a word of its own, with the marks that follow it.
    """
    words: list[str] = []
    open_word = False
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(character)[0]
        if kind not in "LNM":
            open_word = False
        elif kind == "M" and words and open_word:
            words[-1] += character
        elif _UNSPACED.match(character) or not open_word:
            words.append(character)
            open_word = True
        elif _UNSPACED.match(words[-1][0]):
            words.append(character)
        else:
            words[-1] += character
    return words


def contains_answer(gold: str, text: str) -> bool:
    """Return True if all words of the gold answer stand in a text, one after the other (`unicode_words`).

    An answer without words, such as a sign, is looked for as it is; an empty one is in no text.
    """
    wanted, words = unicode_words(gold), unicode_words(text)
    if not wanted:
        return bool(gold.strip()) and gold.strip() in text
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1))


@cache
def _scorer(unicode: bool, stemmed: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = UnicodeWords() if unicode else None
    return RougeScorer(["rougeL", "rouge1"], use_stemmer=stemmed and not unicode, tokenizer=tokenizer)


Matches = NDArray[np.bool_]
"""(t,) whether the most likely token at each answer position is the answer's."""


def exact_memorization(matches: Matches) -> float:
    """Return the share of answer tokens that are the most likely ones, in [0, 1]; 0 without tokens.

    Source: Tirumala et al. 2022 (arXiv 2205.10770, section 3); for unlearning, Wang et al. 2025 (arXiv 2406.09179).
    """
    return float(matches.mean()) if len(matches) else 0.0


def extraction_strength(matches: Matches) -> float:
    """Return 1 - k / t, where k is the shortest prefix of the answer after which greedy decoding gives the rest; in [0, 1].

    Greedy decoding after k tokens gives the rest exactly if each further token is the most likely one after the true tokens
    before it, so one teacher-forced pass suffices. A total mismatch gives 0, and so does an answer whose last token is missed;
    open-unlearning gives 1 / t there, because its search stops one short of the whole answer.

    Source: Carlini et al. 2021 (arXiv 2012.07805) for extraction by prefix; the measure is that of Wang et al. 2025 (arXiv
    2406.09179, section 3).
    """
    missed = np.flatnonzero(~matches)
    prefix = int(missed[-1]) + 1 if len(missed) else 0
    return (len(matches) - prefix) / len(matches) if len(matches) else 0.0


SHARE = 0.4
"""K of Min-K% and Min-K%++: the share of the least likely tokens that counts."""


def min_k(log_probabilities: FloatArray, share: float = SHARE) -> float:
    """Return the mean negative log-likelihood of the least likely of (t,) tokens, at least one; nats per token."""
    return -mean_of_least(log_probabilities, share)


def without_end(values: FloatArray) -> FloatArray:
    """Return (t,) values of an answer's tokens without the last, its end token, unless it is the only one."""
    return values[: max(1, len(values) - 1)]


def mean_of_least(values: FloatArray, share: float) -> float:
    """Return the mean of so large a share of the lowest of (t,) values, of one at least."""
    return float(np.mean(np.sort(values)[: max(1, int(len(values) * share))]))
