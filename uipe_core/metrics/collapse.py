"""Whether a model has collapsed: it may score well on forget quality, and on some definitions of utility, and yet be broken.

Looked at are the utility sets, which should remain as they were: on the forget set large losses and odd answers are wanted.
"""

import re

import numpy as np

from uipe_core.corpora.types import UTILITY_SETS
from uipe_core.metrics.scores import ScoreReport

LOSS_LIMIT = 20.0
"""Mean nats per token of the gold answers. Guessing among 128 thousand tokens costs 11.8; from about 20 on (probability 2e-9)
the epsilon of definition ``open-unlearning`` weighs in and lifts the truth ratio towards 1."""

BROKEN_SHARE = 0.5
"""Share of a set's generations that must be empty or repeated."""

PERIODIC_SHARE = 0.8
"""Share of a text's characters that must equal those one period before, so that it says one thing five times or more."""

SHORTEST_REPEATED, LONGEST_PERIOD = 16, 80
"""Characters: shorter texts are never called repeated, longer phrases are not looked for."""


def collapse_reason(report: ScoreReport) -> str | None:
    """Why a model counts as collapsed, as a sentence for people, or None.

    It does if on any of the utility sets the mean loss of the gold answers is above `LOSS_LIMIT`, or at least
    `BROKEN_SHARE` of the generations are empty (no letter or digit) or repeated (`is_repeated`). Sets without generations
    are judged by their losses alone, sets without losses by their generations.
    """
    reasons = []
    for name in UTILITY_SETS:
        scores = report.sets.get(name)
        if scores is None or not len(scores):
            continue
        loss = float(np.mean(scores.answer_loss))
        # Not simply above: a loss that is no number is no sign of health, unless a log never had any.
        if loss > LOSS_LIMIT or (np.isnan(loss) and not np.isnan(scores.answer_loss).all()):
            reasons.append(f"mean loss of {loss:.3g} nats per token on {name} (limit {LOSS_LIMIT:g})")
        if scores.generated:
            empty = float(np.mean([is_empty(text) for text in scores.generated]))
            repeated = float(np.mean([is_repeated(text) for text in scores.generated]))
            if empty + repeated >= BROKEN_SHARE:
                parts = {"empty": empty, "one phrase over and over": repeated}
                shares = " and ".join(f"{share:.0%} {what}" for what, share in parts.items() if share)
                reasons.append(f"generations on {name}: {shares} (limit {BROKEN_SHARE:.0%})")
    return "; ".join(reasons) or None


def is_empty(text: str) -> bool:
    """Whether a generation has no letter and no digit."""
    return re.search(r"[^\W_]", text) is None


def is_repeated(text: str) -> bool:
    """Whether a generation is one phrase over and over: `PERIODIC_SHARE` of its characters equal those a period before.

    The period is at most a fifth of the text, so a name that comes up twice or a list does not count; empty texts do not
    either, so that no generation counts twice.
    """
    text = " ".join(text.split())
    if len(text) < SHORTEST_REPEATED or is_empty(text):
        return False
    letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    longest = min(LONGEST_PERIOD, len(letters) // 5)
    return any(
        np.count_nonzero(letters[period:] == letters[:-period]) >= PERIODIC_SHARE * len(letters)
        for period in range(1, longest + 1)
    )
