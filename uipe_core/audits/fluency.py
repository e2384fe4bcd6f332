"""Count texts that are empty, repeated or garbled, by entropies of n-grams; strings in, numbers out.

Shows whether a model that no longer gives an answer still writes text. Cannot show whether the text is true, or answers the
question, or is grammatical: fluent nonsense passes, and so may pieces of words in a wrong order. Costs nothing beyond texts
that scoring has generated already.

- empty: no letter or digit of any script.
- repeated: the entropy of word 2-grams and 3-grams is low for the number of words. Entropy of n-grams is that of Zhang et al.
  2018 (arXiv 1809.05972), weighted as the "generation entropy" of ROME (Meng et al. 2022, arXiv 2202.05262): (H2 + 2 * H3) / 3
  in bits. It grows with the logarithm of a text's length, so it is divided here by the largest value that so many words allow.
- garbled: the cross-entropy of characters, each given the one before it, is high under the characters of the initial model's
  texts. Pairs are smoothed by single characters (Dirichlet prior, MacKay and Peto 1995).

Limits come from the initial model's own texts. `TAIL` of them are beyond the limit of repetition, so a model that writes as it
does has about that share, not zero. The limit of garbled text is halfway between its own texts and the same texts with their
characters in random order. Words are `uipe_core.metrics.answers.unicode_words`: a character of a script without spaces is one.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from uipe_core.errors import UserError
from uipe_core.metrics.answers import unicode_words

T = TypeVar("T")

TAIL = 0.01
"""Share of the initial model's texts at the end of their distribution, from which limits are taken."""

FEWEST_WORDS = 4
"""Texts with fewer words are not judged repeated: they have a single 3-gram, or none."""

PRIOR = 10.0
"""Pseudocounts that single characters give each pair."""

MOST_EVEN = 0.9
"""The limit of repetition is never above: texts that never repeat a word would make one repeated pair a fault."""


def ngram_entropy(words: Sequence[T], length: int) -> float:
    """Return the entropy of the n-grams of a sequence in bits; 0 without n-grams."""
    counts = np.array(list(Counter(_ngrams(words, length)).values()), dtype=np.float64)
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    return abs(float(-(shares * np.log2(shares)).sum()))


def _ngrams(words: Sequence[T], length: int) -> list[tuple[T, ...]]:
    return list(zip(*(words[start:] for start in range(length)), strict=False))


def generation_entropy(text: str) -> float:
    """Return (H2 + 2 * H3) / 3 of a text's words in bits, at least 0."""
    words = unicode_words(text)
    return (ngram_entropy(words, 2) + 2.0 * ngram_entropy(words, 3)) / 3.0


def evenness(text: str) -> float:
    """Return `generation_entropy` as a share of the largest that so many words allow, in [0, 1]; 1 below `FEWEST_WORDS`."""
    words = len(unicode_words(text))
    if words < FEWEST_WORDS:
        return 1.0
    return min(1.0, generation_entropy(text) / ((math.log2(words - 1) + 2.0 * math.log2(words - 2)) / 3.0))


class CharacterModel:
    """Probabilities of a character given the one before it, counted in texts.

    Counts of pairs are smoothed by those of single characters (`PRIOR`), and these by one for each kind of character.

    Args:
        texts: Reference texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._counts = _Counts([pair for text in texts for pair in _pairs(text)])
        # And one for all characters never seen.
        self._kinds = len(self._counts.second) + 1

    def cross_entropy(self, text: str, without: bool = False) -> float:
        """Return the mean surprise of a text's characters in bits, at least 0; 0 for an empty text.

        Args:
            text: The text.
            without: Take the text's own counts out first; it must be one of the reference texts.
        """
        pairs, all_ = _pairs(text), self._counts
        own = _Counts(pairs if without else [])
        total = all_.total - own.total + self._kinds
        bits = 0.0
        for pair in pairs:
            first, second = pair
            single = (all_.second[second] - own.second[second] + 1) / total
            seen = all_.pairs[pair] - own.pairs[pair]
            bits -= math.log2((seen + PRIOR * single) / (all_.first[first] - own.first[first] + PRIOR))
        return bits / len(pairs) if pairs else 0.0


class _Counts:
    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.pairs = Counter(pairs)
        self.first = Counter(first for first, _ in pairs)
        self.second = Counter(second for _, second in pairs)
        self.total = len(pairs)


def _pairs(text: str) -> list[tuple[str, str]]:
    """Return each character with the one before it; white space counts as one space, and one is in front."""
    whole = " ".join(text.casefold().split())
    return list(zip(f" {whole}", whole, strict=False))


@dataclass(frozen=True)
class FluencyLimits:
    """Limits that the initial model's texts set.

    Attributes:
        evenness: Texts below are repeated, in [0, `MOST_EVEN`].
        surprise: Texts above are garbled, in bits per character.
        characters: Counts of the initial model's characters.
    """

    evenness: float
    surprise: float
    characters: CharacterModel


@dataclass(frozen=True)
class Fluency:
    """Shares of n texts, each in [0, 1]; a text is at most one of empty, repeated and garbled, in this order.

    Attributes:
        texts: Number of texts.
        empty, repeated, garbled: Shares.
    """

    texts: int
    empty: float
    repeated: float
    garbled: float

    @property
    def faulty(self) -> float:
        """Share of texts that are any of the three."""
        return self.empty + self.repeated + self.garbled


def fluency_limits(initial: Sequence[str], others: Sequence[str] = (), tail: float = TAIL) -> FluencyLimits:
    """Return the limits that the initial model's own texts set.

    Args:
        initial: Its texts, empty ones included. Each is compared with the characters of all others.
        others: Texts that are no fault either, such as gold answers and refusals. Their characters are known then, and the
            limit of garbled text is not below theirs.
        tail: Share of the initial model's texts at the end of their distribution.

    Raises:
        UserError: None of its texts has a word.
    """
    written = [text for text in initial if unicode_words(text)]
    if not written:
        raise UserError("fluency: the initial model wrote no word, so there is nothing to compare with; leave out this audit")
    characters = CharacterModel([*written, *others])
    least = float(np.quantile([evenness(text) for text in written], tail))
    good = [[characters.cross_entropy(text, without=True) for text in texts] for texts in (written, others) if texts]
    usual = max(float(np.quantile(bits, 1.0 - tail)) for bits in good)
    shuffled = float(np.median([characters.cross_entropy(text) for text in _shuffled(written)]))
    return FluencyLimits(min(least, MOST_EVEN), max(usual, (usual + shuffled) / 2.0), characters)


def _shuffled(texts: Sequence[str]) -> list[str]:
    """Return texts with their characters in random order, always the same."""
    source = np.random.default_rng(0)
    return ["".join(source.permutation(list(text))) for text in texts]


def fault(text: str, limits: FluencyLimits) -> str | None:
    """Return ``empty``, ``repeated`` or ``garbled``; None for a text without these faults."""
    if not unicode_words(text):
        return "empty"
    if evenness(text) < limits.evenness:
        return "repeated"
    return "garbled" if limits.characters.cross_entropy(text) > limits.surprise else None


def fluency(texts: Sequence[str], limits: FluencyLimits) -> Fluency:
    """Return the shares of faulty texts.

    Raises:
        UserError: There are no texts.
    """
    if not texts:
        raise UserError("fluency: there are no texts; score the model with generation first")
    faults = Counter(fault(text, limits) for text in texts)
    return Fluency(len(texts), **{name: faults[name] / len(texts) for name in ("empty", "repeated", "garbled")})
