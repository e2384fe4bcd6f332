"""The one set of types every corpus is made of: items, named sets of items, and what models are trained on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question with its gold answer and, for evaluation, the answers it is compared with.

    Attributes:
        question: The question as asked, without any prompt format.
        answer: The gold answer.
        paraphrased_answer: The answer in other words; None where a corpus has none (the answer itself then stands in).
        perturbed_answers: Wrong answers in the form of the paraphrase; empty for items only trained on.
        group: Whom the item is about (a person, an author), where several items are about the same: they are not independent of
            each other, so intervals resample groups. No part of what the item says, nor of its hash.
        plain: Question and answer are one running text, without a model's prompt format and without an end: a piece of
            prose (then the question is empty), or a prompt that has its own format.
    """

    question: str
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    group: str | None = field(default=None, compare=False)
    plain: bool = False

    @property
    def paraphrase(self) -> str:
        """The paraphrased answer, or the answer where there is no paraphrase (TOFU's real_authors and world_facts)."""
        return self.answer if self.paraphrased_answer is None else self.paraphrased_answer

    @property
    def content(self) -> list[Any]:
        """Everything that makes the item what it is, ready for JSON."""
        parts = [self.question, self.answer, self.paraphrased_answer, list(self.perturbed_answers)]
        return [*parts, "plain"] if self.plain else parts


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice question.

    Attributes:
        question: The question as asked, without choices or letters.
        choices: What there is to choose from, at least two.
        answer: Index of the right choice, from 0.
        topic: What the question is about, as the first line of its prompt says; empty where nobody knows.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    topic: str = ""

    @property
    def group(self) -> str | None:
        """What it shares with others: its topic, so that halves of a set have their share of every topic."""
        return self.topic or None

    @property
    def content(self) -> list[Any]:
        """Everything that makes the item what it is, ready for JSON."""
        return [self.question, list(self.choices), self.answer, self.topic]


ItemSet = tuple[Item, ...]
ChoiceSet = tuple[ChoiceItem, ...]

UTILITY_SETS = ("retain", "real_authors", "world_facts")
"""Evaluation sets that make up model utility, in the order of TOFU."""

RELATED_SETS = ("related", "unrelated")
"""K2 and K0 in the terms of UIPE: forgetting wanted, damage not wanted. Not every corpus has them."""

MULTIPLE_CHOICE_SETS = ("forget", "utility")
"""Evaluation sets of a multiple-choice corpus."""


def item_set_hash(items: Sequence[Item | ChoiceItem]) -> str:
    """Hash of what is asked and answered, in order: 16 hexadecimal digits.

    Index, question and every answer go in, because one TOFU question string occurs twice: text alone is no key. For a
    multiple choice that is question, choices in order, the index of the right one, and topic.
    """
    rows = [[index, *item.content] for index, item in enumerate(items)]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """What to forget and what to keep.

    Attributes:
        name: Human-readable name with everything that determines the content, for example ``people(seed=0)``.
        sets: Evaluation sets by name: ``forget``, the three of `UTILITY_SETS`, and where known ``related``, ``unrelated``.
        forget_train: Question-answer pairs an unlearning method pushes away from.
        retain_train: Question-answer pairs an unlearning method may use to hold the rest.
        build: Training texts for models built here, by stage: ``base`` (may be empty), ``full``, ``retain``.
        choices: Multiple-choice sets by name, ``forget`` and ``utility``, in place of `sets`; empty for other corpora.
    """

    name: str
    sets: Mapping[str, ItemSet]
    forget_train: ItemSet
    retain_train: ItemSet
    build: Mapping[str, ItemSet] = field(default_factory=dict)
    choices: Mapping[str, ChoiceSet] = field(default_factory=dict)

    @property
    def set_hashes(self) -> dict[str, str]:
        """Item-set hash of every evaluation set."""
        of_sets = {name: item_set_hash(items) for name, items in self.sets.items()}
        return {**of_sets, **{name: item_set_hash(items) for name, items in self.choices.items()}}

    @property
    def training_hash(self) -> str:
        """Hash of what a base run sees (`forget_train` and `retain_train`): 16 hexadecimal digits."""
        parts = f"{item_set_hash(self.forget_train)}/{item_set_hash(self.retain_train)}"
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def hash(self) -> str:
        """Hash of evaluation and training items together: 16 hexadecimal digits."""
        parts = [*sorted(self.set_hashes.items()), ("forget_train", item_set_hash(self.forget_train))]
        parts.append(("retain_train", item_set_hash(self.retain_train)))
        parts.extend((f"build/{stage}", item_set_hash(items)) for stage, items in sorted(self.build.items()))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
