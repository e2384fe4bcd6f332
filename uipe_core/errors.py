"""Define the errors a user meets and the pieces of their messages."""

import difflib
import re
from collections.abc import Iterable

_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, and those that turn the direction of what follows."""


LONGEST_REASON = 500
"""Characters of a reason that goes over several lines."""


class UserError(ValueError):
    """Bad input: the message names key, value and remedy. The command line exits with 2, without traceback."""


class StudyInterrupted(Exception):
    """A study was interrupted; finished work is kept. The command line exits with 130."""


class ExportMismatchError(Exception):
    """An export, scored again, does not have the trial's numbers. The command line exits with 1, without traceback."""


def without_colours(text: str) -> str:
    """Return a text without the escapes that colour it in a terminal."""
    return _COLOURS.sub("", text)


def printable(text: str) -> str:
    """Return a text for a terminal, with control characters as escapes; colours are left out.

    Names come out of files: they must not move the cursor, change colours or turn the direction of what follows.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], without_colours(text))


def first_line(error: object) -> str:
    """Return the first line of an error's message, or its type where the message is empty.

    A line that ends in a colon announces the next ones, which are taken with it: one line of at most `LONGEST_REASON`
    characters.
    """
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    if not first.rstrip().endswith(":"):
        return first
    whole = " ".join(line.strip() for line in (first, *rest) if line.strip())
    return whole if len(whole) <= LONGEST_REASON else f"{whole[: LONGEST_REASON - 4].rstrip()} ..."


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to a misspelt one, ignoring case; None where none is similar."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'X'?`` with the closest known name, or an empty text."""
    found = closest(name, known)
    return f" Did you mean {found!r}?" if found else ""
