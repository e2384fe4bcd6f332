"""Detect a collapsed model: it may score well on forget quality and on some definitions of utility.

Only the sets that should be kept are examined: on the forget set, large losses and odd answers are wanted.
"""

import re

import numpy as np

from uipe_core.corpora.types import KEPT_SETS
from uipe_core.metrics.scores import OVERFLOW_LOSS, ChoiceReport, ScoreReport

LOSS_LIMIT = 20.0
"""Mean nats per token of the gold answers. Guessing among 128 thousand tokens costs 11.8; from about 20 (probability 2e-9) the
epsilon of definition ``open-unlearning`` lifts the truth ratio towards 1."""

BROKEN_SHARE = 0.5
"""Least share of empty or repeated generations in a set."""

PERIODIC_SHARE = 0.8
"""Least share of a text's characters that equal those one period before: one phrase five times or more."""

SHORTEST_REPEATED, LONGEST_PERIOD = 16, 80
"""Characters: texts below the first are never repeated; longer phrases than the second are not looked for."""


def collapse_reason(report: ScoreReport) -> str | None:
    """Return why a model counts as collapsed, or None.

    It does if on any set of `KEPT_SETS` the mean loss of the gold answers is above `LOSS_LIMIT`, or at least `BROKEN_SHARE` of
    the generations are empty (no letter or digit) or repeated (`is_repeated`), or if its logits overflowed for an answer of any
    set (`ScoreReport.without_overflow`). Sets without generations are judged by losses alone, those without losses by
    generations.
    """
    reasons = []
    for name, each in report.sets.items():
        losses = np.column_stack([each.answer_loss, each.paraphrase_loss, each.perturbed_loss])
        overflowed = float(np.mean((losses == OVERFLOW_LOSS).any(axis=1))) if len(each) else 0.0
        if overflowed:
            reasons.append(_overflow(overflowed, name))
    if reasons:
        return "; ".join(reasons)
    for name in KEPT_SETS:
        scores = report.sets.get(name)
        if scores is None or not len(scores):
            continue
        loss = float(np.mean(scores.answer_loss))
        # A NaN counts as collapsed, unless the log has no losses at all.
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


def choice_collapse_reason(report: ChoiceReport) -> str | None:
    """Return why a model that answered multiple-choice questions counts as collapsed, or None.

    It does if its logits overflowed for any question (`ChoiceReport.without_overflow`).
    """
    shares = {name: float(np.mean(scores.overflowed)) for name, scores in report.sets.items() if len(scores)}
    return "; ".join(_overflow(share, name) for name, share in shares.items() if share) or None


def _overflow(share: float, name: str) -> str:
    return f"logits that are not finite for {share:.0%} of {name}"


def is_empty(text: str) -> bool:
    """Return True if a generation has no letter and no digit."""
    return re.search(r"[^\W_]", text) is None


def is_repeated(text: str) -> bool:
    """Return True if a generation repeats one phrase: `PERIODIC_SHARE` of its characters equal those a period before.

    The period is at most a fifth of the text, so a list or a name that occurs twice does not count; nor do empty texts.
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
