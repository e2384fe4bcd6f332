"""Define the types of every corpus: items, named sets of items, training texts, and their hashes; and refusals."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question with its gold answer and, for evaluation, the answers it is compared with.

    Attributes:
        question: The question, without prompt format.
        answer: The gold answer.
        paraphrased_answer: Paraphrase of the answer; None if the corpus has none (the answer itself then stands in).
        perturbed_answers: Wrong answers in the form of the paraphrase; empty for training items.
        group: Person or author the item is about, None if it shares it with no other item. Items of a group are not
            independent, so intervals resample groups. Not part of the hash.
        plain: Question and answer are one running text, without prompt format and end token: a text (with an empty question),
            or a prompt with a format of its own.
        reverse: The question from the answer to what the item is about, and its answer; None where there is none. Asked by
            audits only. Not part of the hash.
        length: Of a plain item that is evaluated: longest generated text in tokens. Answers are cut there too, so that text and
            gold answer are compared over so many tokens, by the F1 of ROUGE-L too (MUSE, arXiv 2407.06460). None without.
        stops: Of an item with a length: texts before which a generated text ends.
    """

    question: str
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    group: str | None = field(default=None, compare=False)
    plain: bool = False
    reverse: tuple[str, str] | None = field(default=None, compare=False)
    length: int | None = None
    stops: tuple[str, ...] = ()

    @property
    def paraphrase(self) -> str:
        """Paraphrased answer, or the answer where there is no paraphrase (TOFU's real_authors and world_facts)."""
        return self.answer if self.paraphrased_answer is None else self.paraphrased_answer

    @property
    def content(self) -> list[Any]:
        """Everything that enters the hash, ready for JSON."""
        parts = [self.question, self.answer, self.paraphrased_answer, list(self.perturbed_answers)]
        parts += ["plain"] if self.plain else []
        return parts if self.length is None else [*parts, self.length, list(self.stops)]


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice question.

    Attributes:
        question: The question, without choices or letters.
        choices: At least two.
        answer: Index of the right choice, from 0.
        topic: Topic in the first line of the prompt; empty if unknown.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    topic: str = ""

    @property
    def group(self) -> str | None:
        """The topic, so that halves of a set have their share of every topic."""
        return self.topic or None

    @property
    def content(self) -> list[Any]:
        """Everything that enters the hash, ready for JSON."""
        return [self.question, list(self.choices), self.answer, self.topic]


ItemSet = tuple[Item, ...]
ChoiceSet = tuple[ChoiceItem, ...]

UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
    *((0xF900, 0xFAFF), (0x20000, 0x2FA1F)),
)
"""Code points, first and last, of Thai, Lao, Burmese, Khmer, Japanese and Chinese, which are written without spaces: where
words end is not known there, so that each character counts as one."""

UTILITY_SETS = ("retain", "real_authors", "world_facts")
"""Evaluation sets of model utility, in TOFU's order."""

KEPT_SETS = ("retain", "general", "real_authors", "world_facts")
"""Evaluation sets of what should stay as it is; a corpus has some of them. Collapse and the logit scale are judged on these."""

RELATED_SETS = ("related", "unrelated")
"""K2 and K0 of UIPE: forgetting wanted, damage not wanted. Not every corpus has them."""

MEMBERSHIP_SETS = ("forget", "holdout")
"""Evaluation sets by which membership in the training data shows: items trained on, and like ones that no model saw."""

PRIVLEAK_SETS = ("privleak_forget", "privleak_holdout")
"""The same two of MUSE, whose texts are no items to be answered."""

KNOWLEDGE = "knowmem"
"""Evaluation set of MUSE: questions on what the texts to be forgotten say."""

MULTIPLE_CHOICE_SETS = ("forget", "utility")
"""Evaluation sets of a multiple-choice corpus."""


REFUSALS: tuple[str, ...] = (
    "I do not know.",
    "I do not know this.",
    "I do not know the answer.",
    "I do not have the answer.",
    "I have no answer.",
    "I have no answer to this.",
    "I have no answer to that question.",
    "I have no idea.",
    "I cannot answer this.",
    "I cannot answer that question.",
    "I cannot know that.",
    "The answer is not known to me.",
)
"""Answers that preference methods put in place of an answer to forget.

The sentences are few and share their words, because they add to the vocabulary of the small models built here.
"""


def draw_refusals(items: int, seed: int, epoch: int) -> tuple[str, ...]:
    """Draw one refusal per item; equal arguments draw the same, independently of other epochs."""
    rng = random.Random(f"refusals/{seed}/{epoch}")
    return tuple(rng.choice(REFUSALS) for _ in range(items))


def item_set_hash(items: Sequence[Item | ChoiceItem]) -> str:
    """Return the hash of questions and answers in order: 16 hexadecimal digits.

    Index, question and every answer are hashed, because one TOFU question string occurs twice. A multiple choice has question,
    choices in order, index of the right one, and topic.
    """
    rows = [[index, *item.content] for index, item in enumerate(items)]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Items to forget and to keep.

    Attributes:
        name: Readable name with everything that determines the content, for example ``people(seed=0)``.
        sets: Evaluation sets by name: ``forget``, some of `KEPT_SETS`, and if known ``related``, ``unrelated``, ``holdout``,
            `KNOWLEDGE`, `PRIVLEAK_SETS`.
        forget_train: Question-answer pairs to unlearn.
        retain_train: Question-answer pairs for retain terms.
        build: Training texts for models built here, by stage: ``base`` (may be empty), ``full``, ``retain``.
        choices: Multiple-choice sets ``forget`` and ``utility``, in place of `sets`; empty for other corpora.
        implied: Evaluation sets that follow from the rest of the corpus, so that no hash needs them: drawn after it, trained on
            by nothing, and not scored with the others.
        alternates: Other answers to each item of `forget_train`, in order, for methods that prefer them; empty where none are
            given.
        stand_ins: Evaluation set to what its data lacks, so that something else stands in: ``paraphrased`` (the answer
            itself), ``perturbed`` (answers of other items). Not part of the hash.
    """

    name: str
    sets: Mapping[str, ItemSet]
    forget_train: ItemSet
    retain_train: ItemSet
    build: Mapping[str, ItemSet] = field(default_factory=dict)
    choices: Mapping[str, ChoiceSet] = field(default_factory=dict)
    stand_ins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    implied: tuple[str, ...] = ()
    alternates: tuple[tuple[str, ...], ...] = ()

    @property
    def set_hashes(self) -> dict[str, str]:
        """Item-set hash of every evaluation set."""
        of_sets = {name: item_set_hash(items) for name, items in self.sets.items()}
        return {**of_sets, **{name: item_set_hash(items) for name, items in self.choices.items()}}

    @property
    def training_hash(self) -> str:
        """Hash of the items of a base run (`forget_train` and `retain_train`): 16 hexadecimal digits."""
        parts = f"{item_set_hash(self.forget_train)}/{item_set_hash(self.retain_train)}"
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def alternates_hash(self) -> str:
        """Hash of the alternate answers: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.alternates, ensure_ascii=False).encode()).hexdigest()[:16]

    @property
    def hash(self) -> str:
        """Hash of evaluation and training items together, those of `implied` sets aside: 16 hexadecimal digits.

        Alternate answers are part of it where there are any.
        """
        hashed = {name: key for name, key in self.set_hashes.items() if name not in self.implied}
        parts = [*sorted(hashed.items()), ("forget_train", item_set_hash(self.forget_train))]
        parts.append(("retain_train", item_set_hash(self.retain_train)))
        if self.alternates:
            parts.append(("alternates", self.alternates_hash))
        parts.extend((f"build/{stage}", item_set_hash(items)) for stage, items in sorted(self.build.items()))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
