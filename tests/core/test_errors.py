"""What an error says, in a line."""

import pytest

from uipe_core.errors import LONGEST_REASON, first_line, printable


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


def test_a_first_line_that_ends_in_a_colon_takes_the_lines_it_announces():
    said = "Couldn't instantiate the tokenizer from one of: \n(1) a serialization file, \n\n  (2) a slow one. \nInstall it."
    expected = "Couldn't instantiate the tokenizer from one of: (1) a serialization file, (2) a slow one. Install it."
    assert first_line(ValueError(said)) == expected
    assert first_line("one: two\nthree") == "one: two"
    assert first_line("one:") == "one:"


def test_a_reason_over_many_lines_has_a_longest_length():
    line = first_line("reasons:\n" + "\n".join(f"reason {number}" for number in range(1000)))
    assert len(line) <= LONGEST_REASON and line.startswith("reasons: reason 0 reason 1 ") and line.endswith(" ...")
