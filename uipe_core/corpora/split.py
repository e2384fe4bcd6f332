"""Split a corpus into halves for selection and for reporting: points picked at a threshold fall back below it elsewhere."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from uipe_core.corpora.types import ChoiceItem, Corpus, Item
from uipe_core.errors import UserError

Rows = Mapping[str, tuple[int, ...]]
"""Evaluation set to the positions of the chosen items."""


@dataclass(frozen=True)
class Split:
    """Items of a corpus for selection and for reporting; both hold all items if nothing is split.

    Attributes:
        select, report: Rows of the two.
    """

    select: Rows
    report: Rows


def split_corpus(corpus: Corpus, share: float | None, seed: int) -> Split:
    """Split every evaluation set of a corpus at random, within groups: each person or author is in both halves.

    Sets with the same groups in the same order (target facts and their related facts) are split alike. Training items are not
    split.

    Args:
        corpus: The corpus.
        share: Share of the items for selection, in (0, 1); None takes all items for both.
        seed: Seed of the split.

    Raises:
        UserError: If a half of a set would be empty.
    """
    if share is None:
        whole = {name: tuple(range(len(items))) for name, items in _evaluated(corpus).items()}
        return Split(whole, whole)
    select, report = {}, {}
    for name, items in _evaluated(corpus).items():
        select[name] = _chosen(items, share, seed)
        taken = set(select[name])
        report[name] = tuple(row for row in range(len(items)) if row not in taken)
        if not select[name] or not report[name]:
            raise UserError(
                f"split.select: {share:g} leaves one half of the {len(items)} {name!r} items empty; choose a share nearer to "
                "0.5, or leave split out"
            )
    return Split(select, report)


def _evaluated(corpus: Corpus) -> Mapping[str, Sequence[Item | ChoiceItem]]:
    return {**corpus.sets, **corpus.choices}


def _chosen(items: Sequence[Item | ChoiceItem], share: float, seed: int) -> tuple[int, ...]:
    generator = random.Random(f"split/{seed}")
    groups: dict[str | None, list[int]] = {}
    for row, item in enumerate(items):
        groups.setdefault(item.group, []).append(row)
    chosen: list[int] = []
    seen = 0
    for rows in groups.values():
        generator.shuffle(rows)
        seen += len(rows)
        # Rounding carries over to the next group, so that the whole set has its share.
        chosen += rows[: max(0, min(len(rows), round(share * seen) - len(chosen)))]
    return tuple(sorted(chosen))


def take_items(corpus: Corpus, rows: Rows) -> Corpus:
    """Return the corpus with only some items of its evaluation sets, and all of its training items."""
    sets = {name: tuple(items[row] for row in rows[name]) for name, items in corpus.sets.items()}
    choices = {name: tuple(items[row] for row in rows[name]) for name, items in corpus.choices.items()}
    return replace(corpus, sets=sets, choices=choices)
