"""Find the items of one set nearest to another set: those that unlearning the other set is most likely to damage."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from uipe_core.corpora.types import ItemSet

FloatArray = NDArray[np.float64]


def nearest_rows(items: ItemSet, to: ItemSet, count: int) -> tuple[int, ...]:
    """Return positions of the `count` items nearest to the set `to`, ascending: half by group, half by text.

    By group: whole groups (authors) in the order of their greatest cosine similarity to a group of `to`. By text: single items
    in the order of their greatest cosine similarity to an item of `to`. Texts are question and answer as TF-IDF vectors (term
    frequency times ln(documents / documents with the term), over both sets, length 1).

    Args:
        items: Candidates.
        to: The set to be near to.
        count: Number of neighbours; all items if there are fewer.
    """
    if count >= len(items):
        return tuple(range(len(items)))
    vectors = _tf_idf([f"{item.question} {item.answer}" for item in (*items, *to)])
    mine, other = vectors[: len(items)], vectors[len(items) :]
    my_groups, my_means = _group_means([item.group for item in items], mine)
    _, other_means = _group_means([item.group for item in to], other)
    by_group = (my_means @ other_means.T).max(axis=1)
    by_text = (mine @ other.T).max(axis=1)
    # Ties go to the earlier item, so that the choice depends on the texts alone.
    near_groups = [row for group in np.argsort(-by_group, kind="stable") for row in np.flatnonzero(my_groups == group)]
    chosen = near_groups[: count // 2]
    taken = set(chosen)
    chosen += [row for row in np.argsort(-by_text, kind="stable") if row not in taken][: count - len(chosen)]
    return tuple(sorted(int(row) for row in chosen))


def _tf_idf(texts: list[str]) -> FloatArray:
    """Return (n, v) TF-IDF vectors of length 1, one per text; zero if all its terms are in every text."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    places = {term: place for place, term in enumerate(sorted({term for count in counts for term in count}))}
    vectors = np.zeros((len(texts), len(places)))
    documents = Counter(term for count in counts for term in count)
    for row, count in enumerate(counts):
        for term, times in count.items():
            vectors[row, places[term]] = times * math.log(len(texts) / documents[term])
    return _unit(vectors)


def _group_means(groups: Iterable[str | None], vectors: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
    """Return (n,) the group number of each item and (g, v) group means of length 1; an item without group is its own group."""
    names = [group if group is not None else f"\0{row}" for row, group in enumerate(groups)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_item = np.array([numbers[name] for name in names])
    means = np.stack([vectors[of_item == number].mean(axis=0) for number in range(len(numbers))])
    return of_item, _unit(means)


def _unit(vectors: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)
