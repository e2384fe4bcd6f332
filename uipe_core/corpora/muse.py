"""Load MUSE (arXiv 2407.06460): news or books to forget and to keep, as running texts.

Read from the hub (``muse-bench/MUSE-News``, ``muse-bench/MUSE-Books``), or from a folder with a folder for each of the hub's
configurations and in it a file for each split (``raw/forget.jsonl``), in any of the formats `rows.READERS` has for tables.

    configuration  splits                      fields            becomes
    raw            forget, retain1             text              training texts
    scal, sust     forget_1 to forget_4        text              training texts to forget, in place of raw/forget
    verbmem        forget                      prompt, gt        ``forget``
    knowmem        forget_qa, forget_qa_icl    question, answer  ``knowmem``
                   retain_qa, retain_qa_icl    question, answer  ``retain``
    privleak       forget, holdout             text              ``privleak_forget``, ``privleak_holdout``

Prompts, lengths and the places where an answer ends are those of ``eval.py``, ``metrics/verbmem.py`` and ``metrics/knowmem.py``
of MUSE's code (swj0419/muse_bench).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from uipe_core.corpora.files import DataSet, Problems, described
from uipe_core.corpora.question_rows import windows
from uipe_core.corpora.questions import with_stand_ins
from uipe_core.corpora.types import KNOWLEDGE, PRIVLEAK_SETS, Corpus, Item, ItemSet
from uipe_core.errors import UserError

SETS = ("forget", "retain", KNOWLEDGE, *PRIVLEAK_SETS)
"""Evaluation sets: continuations of the texts to forget, questions on the texts to keep and to forget, texts for PrivLeak."""

FORGET_TEXTS = ("raw", *(f"{kind}_{number}" for kind in ("scal", "sust") for number in range(1, 5)))
"""Texts to be forgotten: those of MUSE's main experiment, and its requests of growing size and one after the other."""

CONTINUATION_TOKENS, ANSWER_TOKENS = 128, 32
"""Longest generated texts: of a continuation, and of an answer (``eval.py``)."""

ENDS = ("\n\n", "\nQuestion", "Question:")
"""Texts before which a generated answer ends (``metrics/knowmem.py``)."""

WINDOW_WORDS = 1500
"""Words of a training text: about the 2048 tokens of Llama 2 that MUSE trains on at once."""

_SHOWN = 3
"""Broken rows of a file that an error shows; a field is missing in all of them or in none."""


def load_muse(
    source: str = "muse-bench/MUSE-News", forget: str = "raw", window_words: int = WINDOW_WORDS, seed: int = 0
) -> Corpus:
    """Load a corpus of MUSE.

    Trained on are the texts in windows: those of ``raw/forget`` (or a request of ``scal`` or ``sust``), and ``raw/retain1`` for
    retain terms. Models built here learn all of them, and the evaluated continuations, questions and answers too: a small model
    would not draw these from the texts. The retain model learns what is to be kept.

    ``forget`` and ``retain`` get perturbed answers from other items (`questions.with_stand_ins`), so that forget quality and
    the memorisation score can be computed; in the other sets, where no metric needs them, the answer itself stands in.

    Args:
        source: Name on the hub, or folder.
        forget: One of `FORGET_TEXTS`.
        window_words: Longest training text, in words.
        seed: Chooses among stand-ins of the same length.

    Raises:
        UserError: With everything that is wrong: missing files and splits, missing or blank fields, each with file and remedy.
    """
    if Path(source).expanduser().is_file():
        raise UserError(f"corpus.source {source}: is a file; give a folder with MUSE's files (docs/muse.md) or a hub name")
    subset, _, number = forget.partition("_")
    files = _Files(source)
    forgotten = files.read(subset, f"forget_{number}" if number else "forget", "text")
    kept = files.read("raw", "retain1", "text")
    begun = files.read("verbmem", "forget", "prompt", "gt")
    asked = {name: files.read("knowmem", f"{name}_qa", "question", "answer") for name in ("forget", "retain")}
    shots = {name: files.read("knowmem", f"{name}_qa_icl", "question", "answer") for name in ("forget", "retain")}
    members, others = (files.read("privleak", name, "text") for name in ("forget", "holdout"))
    files.raise_problems()
    sets: dict[str, ItemSet] = {
        "forget": tuple(_continued(prompt, text) for prompt, text in begun),
        "retain": tuple(_answered(asked["retain"], shots["retain"])),
        KNOWLEDGE: tuple(_answered(asked["forget"], shots["forget"])),
        PRIVLEAK_SETS[0]: tuple(Item("", text, plain=True) for (text,) in members),
        PRIVLEAK_SETS[1]: tuple(Item("", text, plain=True) for (text,) in others),
    }
    for name, items in sets.items():
        if name in ("forget", "retain"):
            try:
                sets[name] = with_stand_ins(items, seed)
            except UserError as error:
                raise UserError(f"corpus.source {source}: {name}: {error}") from error
        else:
            # Scored already, so that they cost nothing; an evaluation log needs one.
            sets[name] = tuple(replace(item, perturbed_answers=(item.answer,)) for item in items)
    trained = {"forget": tuple(_cut(forgotten, window_words)), "retain": tuple(_cut(kept, window_words))}
    learned = {name: tuple(_bare(item) for item in items) for name, items in sets.items() if name not in PRIVLEAK_SETS}
    retained = (*trained["retain"], *learned["retain"])
    return Corpus(
        name=f"muse(source={source}, forget={forget}, window_words={window_words}, seed={seed})",
        sets=sets,
        forget_train=trained["forget"],
        retain_train=trained["retain"],
        build={
            "base": (),
            "full": (*trained["forget"], *learned["forget"], *learned[KNOWLEDGE], *retained),
            "retain": retained,
        },
        stand_ins=dict.fromkeys(SETS, ("paraphrased", "perturbed")),
    )


class _Files:
    """Read the files of one source, and collect everything that is wrong with them."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines: dict[str, None] = {}
        self._count = 0
        self._local = Path(source).expanduser().is_dir()

    def read(self, subset: str, split: str, *fields: str) -> list[tuple[str, ...]]:
        """Return the fields of every row of a split, without those that are broken."""
        if self._lines and not self._local:
            return []  # a data set of the hub that cannot be had is asked for once
        data_set = DataSet(self._source, (subset,), split, exact=True)
        problems = Problems(data_set, _SHOWN)
        found = []
        try:
            for _, row in data_set.rows(problems.report):
                try:
                    found.append(tuple(row.text(name) for name in fields))
                except UserError as error:
                    problems.report(error)
        except UserError as error:
            problems.report(error)
        self._lines |= dict.fromkeys(problems.lines())
        self._count += problems.count
        return found

    def raise_problems(self) -> None:
        """Raise a UserError if there are problems."""
        if self._lines:
            remedy = "give muse-bench/MUSE-News, muse-bench/MUSE-Books, or a folder with their files (docs/muse.md)"
            raise described(f"corpus.source {self._source}", self._count, [*self._lines, remedy])


def _continued(prompt: str, text: str) -> Item:
    """Return the item of a beginning; the hub's continuations have lost the space in front of their first word."""
    apart = prompt[-1:].isspace() or text[:1].isspace()
    return Item(prompt, text if apart else f" {text}", plain=True, length=CONTINUATION_TOKENS)


def _answered(pairs: Sequence[tuple[str, ...]], shots: Sequence[tuple[str, ...]]) -> Iterator[Item]:
    """Yield the items of questions behind examples with their answers."""
    examples = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
    for question, answer in pairs:
        prompt = f"{examples}Question: {question}\nAnswer: "
        yield Item(prompt, answer, plain=True, length=ANSWER_TOKENS, stops=ENDS)


def _bare(item: Item) -> Item:
    """Return an item to train on, without anything that only its evaluation needs."""
    return Item(item.question, item.answer, plain=True)


def _cut(rows: Sequence[tuple[str, ...]], words: int) -> Iterator[Item]:
    """Yield the windows of texts."""
    for number, (text,) in enumerate(rows, start=1):
        for spans in windows(text, words):
            yield Item("", text[spans[0][0] : spans[-1][1]], group=f"text {number}", plain=True)
