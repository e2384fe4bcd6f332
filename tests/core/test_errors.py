"""What an error says, in a line."""

import pytest

from uipe_core.errors import first_line, printable


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one line"), "one line"),
        (OSError("first\nsecond"), "first"),
        (RuntimeError("\n\n  after empty lines\nmore"), "after empty lines"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("  \n "), "ValueError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error, said):
    assert first_line(error) == said


def test_control_characters_are_printed_as_escapes():
    named = "npo\x1b]0;title\x07\x1b[31m\r\x9b2J\u202eevil\ttab\nline"
    assert printable(named) == "npo\\x1b]0;title\\x07\\r\\x9b2J\\u202eevil\ttab\nline"
    assert printable("Ünïcode \u00e9 \U0001f600") == "Ünïcode \u00e9 \U0001f600"
