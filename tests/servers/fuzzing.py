"""How many random inputs a test tries: a fixed number, or as many as ``UIPE_EXAMPLES`` says."""

import os


def examples(usual):
    """The usual number, unless the environment asks for another (docs/log.md has what ran with 10,000)."""
    return int(os.environ.get("UIPE_EXAMPLES", usual))
