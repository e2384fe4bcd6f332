"""Turn rows into items: questions with answers, prompts with completions, conversations, running texts."""

import re
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from uipe_core.corpora.rows import Report, Row
from uipe_core.corpora.types import UNSPACED, Item
from uipe_core.errors import UserError, did_you_mean
from uipe_core.storage.files import parse_json

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "question and answer": ("question", "answer"),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Fields of every shape; a row that has those of two is of the first."""

ROLES = ("system", "user", "assistant")
"""Roles of the turns of a conversation, as in TRL."""

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """Hold what a row gives.

    Attributes:
        trained: Item to train on: question and answer alone, or a text with an empty question.
        evaluated: Item to score; None for what is left of a text and too short for a window.
    """

    trained: Item
    evaluated: Item | None


@dataclass
class RowReader:
    """Turn the rows of one data set into items; all rows have the shape of the first.

    Args:
        prompt_words: Words of a window of a text that are the prompt.
        continuation_words: Words after them that are to be continued.
        report: Called with every error; the row is left out.
    """

    prompt_words: int
    continuation_words: int
    report: Report
    _first: tuple[str, str] | None = None
    _is_mixed: bool = False
    _perturbed: tuple[int, str] | None = None
    _rows: int = 0

    def entries(self, row: Row) -> Iterator[Entry]:
        """Yield the items of a row: one, or for a text one per window."""
        self._rows += 1
        fields = {name: value for name, value in row.fields.items() if value is not None}
        shape = _shape(fields)
        if shape is None:
            self.report(UserError(f"{row.where}: {_no_shape(row.fields)}"))
            return
        if self._first is None:
            self._first = (shape, row.where)
        if shape != self._first[0]:
            if not self._is_mixed:
                both = f"has {shape}, and {self._first[1]} has {self._first[0]}"
                self.report(UserError(f"{row.where}: {both}; give rows of one shape, the others in a file of their own"))
            self._is_mixed = True
            return
        wrong: list[str] = []
        group = _group(fields, wrong)
        if shape == "text":
            text = _text("text", fields["text"], wrong)
            found = list(self._windows(text, group or f"text {self._rows}")) if text else []
            if text and found[0].evaluated is None:
                wrong.append("field 'text' has a single word; give two at least, for a beginning and a continuation")
        else:
            question, answer = _asked(shape, fields, wrong)
            paraphrase = _optional_text("paraphrased_answer", fields, wrong)
            perturbed = self._perturbed_answers(fields, row.where, wrong)
            item = Item(question, answer, paraphrase, perturbed, group)
            # One object where nothing differs: corpora may have many items.
            found = [Entry(Item(question, answer, group=group) if paraphrase or perturbed else item, item)]
        if wrong:
            self.report(UserError(f"{row.where}: {'; '.join(wrong)}"))
        else:
            yield from found

    def _windows(self, text: str, group: str) -> Iterator[Entry]:
        """Yield the windows of a text. The last is split in the same proportion, or if under half a window not evaluated."""
        size = self.prompt_words + self.continuation_words
        first = True
        for spans in windows(text, size):
            count, start, end = len(spans), spans[0][0], spans[-1][1]
            evaluated = None
            if count > 1 and (first or 2 * count >= size):
                cut = spans[max(1, count * self.prompt_words // size) - 1][1]
                evaluated = Item(text[start:cut], text[cut:end], group=group, plain=True)
            yield Entry(Item("", text[start:end], group=group, plain=True), evaluated)
            first = False

    def _perturbed_answers(self, fields: Fields, where: str, wrong: list[str]) -> tuple[str, ...]:
        name = next((name for name in ("perturbed_answers", "perturbed_answer") if fields.get(name)), None)
        if name is None:
            return ()
        found = _listed(fields[name])
        if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
            wrong.append(f"field {name!r} is {reprlib.repr(fields[name])}; give a list of texts, none blank, or leave it out")
            return ()
        if self._perturbed is None:
            self._perturbed = (len(found), where)
        if len(found) != self._perturbed[0]:
            other = f"{self._perturbed[1]} has {self._perturbed[0]}"
            wrong.append(f"field {name!r} has {len(found)} answers, and {other}; give every row the same number")
        return tuple(found)


def windows(text: str, words: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the windows of a text: of each of its words, so many at most, first and last character (exclusive)."""
    found = _word_pattern().finditer(text)
    while spans := [word.span() for word in islice(found, words)]:
        yield spans


def _shape(fields: Fields) -> str | None:
    """Return the shape of a row, or the first of which it has a part; None if it has nothing of any."""
    if "choices" in fields:
        return None
    for enough in (all, any):
        for shape, names in SHAPES.items():
            if enough(name in fields for name in names):
                return shape
    return None


def _no_shape(fields: Fields) -> str:
    names = {name for needed in SHAPES.values() for name in needed}
    if "choices" in fields:
        return "is a multiple-choice question; use corpus.kind: multiple_choice, or leave out the choices"
    close = [f"{found!r}:{hint}" for found in fields if (hint := did_you_mean(str(found), names))]
    hints = f" ({'; '.join(close)})" if close else ""
    return f"has the fields {', '.join(map(str, fields)) or 'none'}{hints}; give {', '.join(SHAPES)}"


def _asked(shape: str, fields: Fields, wrong: list[str]) -> tuple[str, str]:
    """Return question and answer of a row that is no text."""
    if shape == "messages":
        return _conversation("messages", _listed(fields["messages"]), wrong)
    names = SHAPES[shape]
    absent = [name for name in names if name not in fields]
    if absent:
        hint = did_you_mean(absent[0], fields)
        wrong.append(f"field {absent[0]!r} is missing, found {', '.join(fields)}; add it.{hint}")
        return "", ""
    first, second = (_listed(fields[name]) if shape == "prompt and completion" else fields[name] for name in names)
    if isinstance(first, list) and isinstance(second, list):
        return _conversation("prompt with completion", [*first, *second], wrong)
    return _text(names[0], first, wrong), _text(names[1], second, wrong)


def _conversation(name: str, turns: object, wrong: list[str]) -> tuple[str, str]:
    """Return what is before the last turn, and the last turn's content.

    A single user turn before it is the question. Several are joined by blank lines, each after its role: ``User: ...``.
    """
    if not isinstance(turns, list) or len(turns) < 2:
        wrong.append(f"field {name!r} is {reprlib.repr(turns)}; give a list of messages, the question and its answer at least")
        return "", ""
    for number, turn in enumerate(turns):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            allowed = f"give {{role, content}}, the role one of {', '.join(ROLES)} and the content a text that is not blank"
            wrong.append(f"message {number} of {name!r} is {reprlib.repr(turn)}; {allowed}")
            return "", ""
    if turns[-1]["role"] != "assistant" or all(turn["role"] != "user" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns)
        wrong.append(f"the roles of {name!r} are {reprlib.repr(roles)}; end it with the assistant's answer to a user")
        return "", ""
    *before, last = turns
    if len(before) == 1:
        return before[0]["content"], last["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in before), last["content"]


def _text(name: str, value: object, wrong: list[str]) -> str:
    if isinstance(value, str) and value.strip():
        return value
    wrong.append(f"field {name!r} is {reprlib.repr(value)}; give a text that is not blank")
    return ""


def _optional_text(name: str, fields: Fields, wrong: list[str]) -> str | None:
    # A cell of a table that is left out is an empty text.
    return _text(name, fields[name], wrong) if fields.get(name, "") != "" else None


def _group(fields: Fields, wrong: list[str]) -> str | None:
    value = fields.get("group", "")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _optional_text("group", fields, wrong)


def _listed(value: object) -> object:
    """Return the list of a cell of a CSV file, which has it as JSON; every other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


@cache
def _word_pattern() -> re.Pattern[str]:
    """Return a pattern of one word: characters between spaces, or one of an unspaced script with its marks."""
    unspaced = "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED)
    points = (point for first, last in UNSPACED[:4] for point in range(first, last + 1))
    marks = "".join(chr(point) for point in points if unicodedata.category(chr(point))[0] == "M")
    return re.compile(rf"[{unspaced}][{marks}]*|[^\s{unspaced}]+")
