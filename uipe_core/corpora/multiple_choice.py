"""Load multiple-choice questions to forget and to keep: WMDP (arXiv 2403.03218), MMLU (arXiv 2009.03300), or own files.

Questions have the fields of ``cais/wmdp`` and ``cais/mmlu``: ``question``, ``choices`` (a list of texts), ``answer`` (index of
the right one) and, in MMLU, ``subject``. Texts to unlearn have a field ``text``, as in ``cais/wmdp-corpora``.
"""

from pathlib import Path
from string import ascii_uppercase

from uipe_core.corpora.files import SUFFIXES, DataSet
from uipe_core.corpora.rows import Row
from uipe_core.corpora.types import MULTIPLE_CHOICE_SETS, ChoiceItem, ChoiceSet, Corpus, Item, ItemSet
from uipe_core.errors import UserError

TOPICS = {"wmdp-bio": "biology", "wmdp-chem": "chemistry", "wmdp-cyber": "cybersecurity"}
"""Topic in the prompt by subset, for data sets whose questions have no subject."""

SHORTEST_TEXT = 50
"""Characters below which a text is skipped, as in WMDP's code: headings and blank lines of wikitext teach nothing."""


WMDP_AND_MMLU = (DataSet("cais/wmdp", ("wmdp-bio",)), DataSet("cais/mmlu", ("all",)))
"""Questions to forget and to keep in the WMDP paper: hazardous biology, and all subjects of MMLU."""


def sets_in_folder(folder: Path) -> tuple[DataSet, DataSet]:
    """Return the data sets ``forget`` and ``utility`` of a folder, each a file or a folder in the hub's layout.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"folder {folder}: no such folder; give one with the files forget.jsonl and utility.jsonl")
    files = {
        name: [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()] for name in MULTIPLE_CHOICE_SETS
    }
    forget, utility = (DataSet(str(found[0])) if found else DataSet(str(folder), (name,)) for name, found in files.items())
    return forget, utility


def letter_prompt(item: ChoiceItem) -> str:
    """Return the question in the letter format: topic, question, one line per choice with its letter, and ``Answer:``.

    The format of Hendrycks et al. (arXiv 2009.03300) without examples, as in the tasks ``wmdp`` and ``mmlu/default`` of
    EleutherAI/lm-evaluation-harness. The scored answer is a space and the letter.
    """
    about = f" about {item.topic}" if item.topic else ""
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, item.choices, strict=False)]
    head = f"The following are multiple choice questions (with answers){about}."
    return "\n".join([head, "", item.question.strip(), *lines, "Answer:"])


def letter_answers(count: int) -> tuple[str, ...]:
    """Return the possible answers of a question with `count` choices: a space and a letter each."""
    return tuple(f" {letter}" for letter in ascii_uppercase[:count])


def load_multiple_choice(
    forget: DataSet,
    utility: DataSet,
    forget_texts: DataSet | None = None,
    retain_texts: DataSet | None = None,
    texts: int | None = None,
    text_characters: int = 2000,
) -> Corpus:
    """Load a corpus of multiple-choice questions.

    Models built here learn all questions in the letter format and all training items; a retain model learns those to keep.

    Args:
        forget: Questions whose answers are to be forgotten.
        utility: Questions that must still be answered.
        forget_texts: Texts to unlearn; by default the forget questions with the text of their right answer.
        retain_texts: Texts to keep; by default the utility questions with the text of their right answer.
        texts: Number of texts to use of each, the first ones; None for all.
        text_characters: Length at which texts are cut.

    Raises:
        UserError: A data set is missing or broken (names file, line and field), a set has no items, or a question is in both
            sets.
    """
    choices = {"forget": _questions(forget), "utility": _questions(utility)}
    both = {(item.question, item.choices) for item in choices["utility"]}
    shared = [item for item in choices["forget"] if (item.question, item.choices) in both]
    if shared:
        raise UserError(
            f"{len(shared)} questions of {forget} are in {utility} too, first {shared[0].question!r}; what is to be "
            "forgotten must not count as utility: take them out of one of the two"
        )
    sets = {"forget": forget_texts, "utility": retain_texts}
    trained = {
        name: _answered(choices[name]) if source is None else _prose(source, texts, text_characters)
        for name, source in sets.items()
    }
    given = {"forget_texts": forget_texts, "retain_texts": retain_texts}
    prose = [f"{key}={source}" for key, source in given.items() if source is not None]
    kept = (*_lettered(choices["utility"]), *trained["utility"])
    return Corpus(
        name=f"multiple_choice({', '.join([f'forget={forget}', f'utility={utility}', *prose])})",
        sets={},
        choices=choices,
        forget_train=trained["forget"],
        retain_train=trained["utility"],
        build={"base": (), "full": (*_lettered(choices["forget"]), *trained["forget"], *kept), "retain": kept},
    )


def _questions(source: DataSet) -> ChoiceSet:
    items = tuple(_question(row, subset) for subset, row in source.rows())
    if not items:
        raise UserError(f"data set {source}: holds no questions")
    return items


def _question(row: Row, subset: str) -> ChoiceItem:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise row.error("choices", choices, "give a list of texts")
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise row.error("choices", choices, f"give 2 to {len(ascii_uppercase)} choices, one for each letter")
    # JSON's true would pass for 1, since bool is an int in Python.
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise row.error("answer", answer, f"give the index of the right choice, 0 to {len(choices) - 1}")
    subject = row.fields.get("subject") or TOPICS.get(subset, "")
    if not isinstance(subject, str):
        raise row.error("subject", subject, "give a text, or leave the field out")
    return ChoiceItem(row.text("question"), tuple(choices), answer, subject.replace("_", " ").strip())


def _prose(source: DataSet, count: int | None, characters: int) -> ItemSet:
    items: list[Item] = []
    for _, row in source.rows():
        text = row.get("text")
        if not isinstance(text, str):
            raise row.error("text", text, "give a text")
        if len(text.strip()) >= SHORTEST_TEXT:
            items.append(Item("", text.strip()[:characters], plain=True))
        if len(items) == count:
            break
    if not items:
        raise UserError(f"data set {source}: holds no text of at least {SHORTEST_TEXT} characters")
    return tuple(items)


def _answered(items: ChoiceSet) -> ItemSet:
    return tuple(Item(item.question, item.choices[item.answer]) for item in items)


def _lettered(items: ChoiceSet) -> ItemSet:
    return tuple(Item(letter_prompt(item), letter_answers(len(item.choices))[item.answer], plain=True) for item in items)
