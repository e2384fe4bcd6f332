"""What an error says, in a line."""

import pytest

from uipe_core.errors import first_line


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
