"""Load a user's own data: questions with answers, conversations or texts to forget and to keep.

`uipe_core.corpora.question_rows` has the shapes of the rows.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from uipe_core.corpora.files import DataSet, Problems, described
from uipe_core.corpora.question_rows import RowReader
from uipe_core.corpora.types import Corpus, Item, ItemSet
from uipe_core.errors import UserError

SETS = ("forget", "retain", "general", "holdout", "related", "unrelated")
"""Evaluation sets; only the first two are needed."""

STAND_INS = 5
"""Answers of other items that stand in for perturbed answers; TOFU has five a question."""


def load_questions(
    sources: Mapping[str, DataSet], prompt_words: int = 150, continuation_words: int = 100, seed: int = 0
) -> Corpus:
    """Load a corpus from data sets of questions or texts.

    All rows of ``forget`` and ``retain`` are trained on and evaluated, those of the other sets evaluated. A text is cut into
    windows: an evaluation item has the beginning of a window as prompt and the rest as its continuation (MUSE,
    arXiv 2407.06460), a training item the whole window.

    Where an item has no perturbed answers, answers of other items of its set stand in: `STAND_INS` of them, or as many as its
    set's own perturbed answers or its number of different answers allow, the nearest in length. Where it has no paraphrased
    answer, the answer itself does. `Corpus.stand_ins` says where.

    Args:
        sources: Data sets by a name of `SETS`.
        prompt_words: Words of a window that are the prompt.
        continuation_words: Words after them that are to be continued.
        seed: Orders answers of the same length, before the nearest stand in.

    Raises:
        UserError: With everything that is wrong with all of the data sets, each with file, line and remedy.
    """
    sets: dict[str, ItemSet] = {}
    trained: dict[str, ItemSet] = {}
    stand_ins: dict[str, tuple[str, ...]] = {}
    lines: list[str] = []
    count = 0
    forgotten: Collection[tuple[str, str]] = frozenset()
    for name in (name for name in SETS if name in sources):
        problems = Problems(sources[name])
        reader = RowReader(prompt_words, continuation_words, problems.report)
        kept_apart = forgotten if name != "related" else frozenset()
        sets[name], trained[name] = _read(reader, problems, kept_apart, keep=name in ("forget", "retain"))
        if name == "forget":
            forgotten = {(item.question, item.answer) for item in sets[name]}
        if not problems.count:
            stand_ins[name] = _lacking(sets[name])
            try:
                sets[name] = with_stand_ins(sets[name], seed)
            except UserError as error:
                problems.report(UserError(f"{sources[name]}: {error}"))
        lines += problems.lines()
        count += problems.count
    if count:
        raise described("corpus", count, lines)
    given = ", ".join(f"{name}={sources[name]}" for name in sets)
    return Corpus(
        name=f"questions({given}, prompt_words={prompt_words}, continuation_words={continuation_words}, seed={seed})",
        sets=sets,
        forget_train=trained["forget"],
        retain_train=trained["retain"],
        build={"base": (), "full": (*trained["forget"], *trained["retain"]), "retain": trained["retain"]},
        stand_ins={name: lacking for name, lacking in stand_ins.items() if lacking},
    )


def _read(
    reader: RowReader, problems: Problems, kept_apart: Collection[tuple[str, str]], keep: bool
) -> tuple[ItemSet, ItemSet]:
    """Return the items of a data set to evaluate, and if `keep` those to train on."""
    evaluated: list[Item] = []
    trained: list[Item] = []
    try:
        for _, row in problems.source.rows(problems.report):
            for entry in reader.entries(row):
                item = entry.evaluated
                if item is not None and (item.question, item.answer) in kept_apart:
                    remedy = "what is to be forgotten must not be kept: take it out of one of the two"
                    problems.report(
                        UserError(f"{row.where}: {_shown(item.question)} with its answer is in forget too; {remedy}")
                    )
                if item is not None:
                    evaluated.append(item)
                if keep:
                    trained.append(entry.trained)
    except UserError as error:
        problems.report(error)
    return tuple(evaluated), tuple(trained)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _lacking(items: ItemSet) -> tuple[str, ...]:
    """Return what stands in for something in a set: ``paraphrased``, ``perturbed``."""
    lacks = {
        "paraphrased": any(item.paraphrased_answer is None for item in items),
        "perturbed": any(not item.perturbed_answers for item in items),
    }
    return tuple(name for name, is_so in lacks.items() if is_so)


def with_stand_ins(items: ItemSet, seed: int) -> ItemSet:
    """Return the items, each with perturbed answers: its own, or different answers of other items nearest in length.

    Answers that differ in case or outer spaces alone are the same. Items that share everything keep their order, and equal
    arguments give the same answers.

    Args:
        items: One evaluation set. Items with perturbed answers of their own all have the same number.
        seed: Orders answers of the same length.

    Raises:
        UserError: There are too few different answers.
    """
    lacking = sum(not item.perturbed_answers for item in items)
    if not lacking:
        return items
    answers = list({_normal(item.answer): item.answer for item in items}.values())
    random.Random(f"stand-ins/{seed}").shuffle(answers)
    answers.sort(key=len)
    own = max(len(item.perturbed_answers) for item in items)
    wanted = own or min(STAND_INS, len(answers) - 1)
    if not 1 <= wanted < len(answers):
        have = f"{lacking} of its {len(items)} items have no perturbed_answers, and its {len(answers)} different answers"
        raise UserError(f"{have} are too few to stand in; give perturbed_answers, or at least {max(wanted, 1) + 1} answers")
    places = {_normal(answer): place for place, answer in enumerate(answers)}
    return tuple(
        item
        if item.perturbed_answers
        else replace(item, perturbed_answers=_nearest(answers, places[_normal(item.answer)], wanted))
        for item in items
    )


def _normal(answer: str) -> str:
    return answer.strip().casefold()


def _nearest(answers: Sequence[str], place: int, count: int) -> tuple[str, ...]:
    """Return the `count` answers nearest in length to the one at a place, of answers in the order of their lengths."""
    length, low, high = len(answers[place]), place - 1, place + 1
    found: list[str] = []
    while len(found) < count:
        if low < 0 or (high < len(answers) and len(answers[high]) - length <= length - len(answers[low])):
            found.append(answers[high])
            high += 1
        else:
            found.append(answers[low])
            low -= 1
    return tuple(found)
