"""Compute objectives from item scores: harmonic means of item means (model utility, retain utility, memorisation), and privacy.

A `Component` is the mean over the items of one evaluation set of a measure in [0, 1], or of one minus it. A composite is the
harmonic mean of components; one component is its own composite. Bounds, bootstrap draws and the curves of the sampler follow
from this form, so that an objective needs no code of its own. Privacy is none: it compares the scores of two sets.

Sources: TOFU (arXiv 2401.06121, section 2.2.1) for model utility; OpenUnlearning (arXiv 2506.12618, section 4) for the
memorisation score, the harmonic mean of one minus extraction strength, exact memorisation, paraphrase probability and truth
ratio, where the truth ratio is p / (p + q): p of the paraphrase, q the mean of the perturbed answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uipe_core.corpora.types import MEMBERSHIP_SETS, PRIVLEAK_SETS
from uipe_core.errors import UserError
from uipe_core.metrics.definitions import Definition, definition_named
from uipe_core.metrics.scores import FloatArray, ScoreReport, SetScores
from uipe_core.metrics.tofu import harmonic_mean, item_components, loss_components, truth_share

PROBABILITY, ROUGE, CLOSENESS = "probability", "rouge", "truth_ratio"
"""Measures of TOFU: of a utility set its three components; of the forget set, `CLOSENESS` is min(R, 1 / R)."""

PARAPHRASE, TRUTH_SHARE = "paraphrase_probability", "truth_share"
EXTRACTION, EXACT = "extraction_strength", "exact_memorization"

ROUGE_F1 = "rouge_f1"
"""ROUGE-L F1 over so many tokens as `Item.length` says, MUSE's measure of memorisation; items without a length have none."""

AGREEMENT = "agreement_with_initial"
"""exp(-KL(initial || model)) of an item, in [0, 1]: 1 where the model says what the initial one says."""

SLACK = 1e-9
"""Relative allowance of a bound for rounding in other sums."""

OF_LOSSES = (PROBABILITY, CLOSENESS, PARAPHRASE, TRUTH_SHARE, EXTRACTION, EXACT, AGREEMENT)
"""Measures that are known as soon as the losses of their set are."""


@dataclass(frozen=True)
class Component:
    """The mean of a measure over the items of an evaluation set.

    Attributes:
        item_set: Evaluation set.
        measure: One of the names above.
        inverted: One minus the measure, for what should be low.
    """

    item_set: str
    measure: str
    inverted: bool = False

    def of_items(self, scores: SetScores, definition: Definition) -> FloatArray:
        """Return the (n,) values of the items of its set, in [0, 1].

        Raises:
            UserError: The scores lack what the measure is made of, or are not finite.
        """
        values = _measured(scores, self.item_set, self.measure, definition)
        return 1.0 - values if self.inverted else values

    def is_known(self, scores: SetScores | None) -> bool:
        """Return True if scores of its set, of a model scored in part, already tell it."""
        if self.measure == AGREEMENT:
            return scores is not None and scores.initial_kl is not None
        if self.measure == ROUGE_F1:
            return scores is not None and scores.rouge_l_f1 is not None
        return scores is not None and (self.measure in OF_LOSSES or scores.rouge_l_recall is not None)


def _measured(scores: SetScores, name: str, measure: str, definition: Definition) -> FloatArray:
    if measure in (PROBABILITY, CLOSENESS):
        return list(loss_components(scores, name, definition).values())[measure == CLOSENESS]
    if measure == ROUGE:
        return list(item_components(scores, name, definition).values())[1]
    if measure == PARAPHRASE:
        return np.asarray(np.exp(-scores.paraphrase_loss))
    if measure == TRUTH_SHARE:
        return truth_share(scores, name, definition)
    named = {AGREEMENT: "initial_kl", ROUGE_F1: "rouge_l_f1"}
    found: FloatArray | None = getattr(scores, named.get(measure, measure))
    if found is None:
        raise UserError(f"set {name!r} has no {measure.replace('_', ' ')}: score the model with this version")
    return np.asarray(np.exp(-found)) if measure == AGREEMENT else found


def composite(report: ScoreReport, components: Sequence[Component], definition: str) -> float:
    """Return the harmonic mean of the components, in [0, 1]; 0 if one of them is 0.

    Args:
        report: Scores of every set the components name.
        components: At least one.
        definition: Key of `definitions.DEFINITIONS`.

    Raises:
        UserError: A set is missing, or lacks what a component is made of.
    """
    chosen = definition_named(definition)
    missing = sorted({each.item_set for each in components} - report.sets.keys())
    if missing:
        raise UserError(f"missing evaluation sets: {', '.join(missing)}; present: {', '.join(report.sets) or 'none'}")
    means = [float(np.mean(each.of_items(report.sets[each.item_set], chosen))) for each in components]
    return float(harmonic_mean(np.array(means)))


def composite_bound(report: ScoreReport, components: Sequence[Component], definition: str) -> float:
    """Return an upper bound, in [0, 1], on the composite of a model scored in part.

    Components that are not known count as 1: a harmonic mean grows with each of them, and none exceeds 1.

    Raises:
        UserError: Unknown definition, or losses that are not finite.
    """
    chosen = definition_named(definition)
    means = []
    for each in components:
        scores = report.sets.get(each.item_set)
        known = scores is not None and each.is_known(scores)
        means.append(float(np.mean(each.of_items(scores, chosen))) if known and scores is not None else 1.0)
    return min(1.0, float(harmonic_mean(np.array(means))) * (1.0 + SLACK))


def auc(members: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]) -> FloatArray:
    """Return the probability that a random other scores higher than a random member, ties counted half; in [0, 1].

    Args:
        members: (..., m) scores of forget items.
        others: (..., n) scores of holdout items.

    Returns:
        (...) areas under the ROC curve; NaN where a score is NaN, as those of a broken model are.

    Raises:
        UserError: One of them is empty.
    """
    m, n = members.shape[-1], others.shape[-1]
    if not m or not n:
        raise UserError("membership: needs at least one forget and one holdout item; give a corpus with a holdout set")
    # Sorted with either first where values tie: a tie then counts once as won and once as lost.
    first = np.argsort(np.concatenate([members, others], axis=-1), axis=-1, kind="stable") < m
    last = np.argsort(np.concatenate([others, members], axis=-1), axis=-1, kind="stable") >= n
    won = sum((is_member.cumsum(axis=-1) * ~is_member).sum(axis=-1) for is_member in (first, last))
    broken = np.isnan(members).any(axis=-1) | np.isnan(others).any(axis=-1)
    return np.where(broken, np.nan, won / (2 * m * n))


def membership_auc(sets: Mapping[str, SetScores], pair: Sequence[str] = MEMBERSHIP_SETS) -> float | None:
    """Return the AUC of the Min-K% of two sets, members first; None where one of the two was not measured."""
    members, others = (sets[name].min_k if name in sets else None for name in pair)
    return None if members is None or others is None else float(auc(members, others))


EPSILON = 1e-10
"""Added to PrivLeak's denominator by open-unlearning."""


def privleak(found: float, reference: float = 0.5) -> float:
    """Return PrivLeak in percent: how much less (below 0) or more (above 0) private than the reference a model is.

    Source: MUSE (arXiv 2407.06460, section 3), with `EPSILON`.

    Args:
        found: AUC of Min-K% of the unlearned model (`auc`).
        reference: That of the retain model, or 0.5 without one. Towards 1 the result has no bound.

    Returns:
        100 * ((1 - found) - (1 - reference)) / (1 - reference); 0 is ideal.
    """
    return 100.0 * ((1.0 - found) - (1.0 - reference)) / (1.0 - reference + EPSILON)


def privacy(found: FloatArray | float, reference: FloatArray | float | None) -> FloatArray:
    """Return how little membership shows, in [0, 1]: 1 - |AUC - reference|, scaled so that the worst AUC gives 0.

    Args:
        found: (...) AUC of the model: unlearning too much shows as too little does.
        reference: (...) that of the retain model on the same items; None is 0.5, where nothing can be distinguished.
    """
    ideal = np.asarray(0.5 if reference is None else reference)
    return np.asarray(1.0 - np.abs(found - ideal) / np.maximum(ideal, 1.0 - ideal))


def membership(sets: Mapping[str, SetScores], reference: Mapping[str, SetScores] | None) -> dict[str, float]:
    """Return AUC and privacy of a model, against the retain model's scores where these tell its AUC.

    Returns:
        ``membership_auc`` and ``privacy`` by `MEMBERSHIP_SETS`; ``privleak_auc``, ``privleak_privacy`` and, in percent,
        ``privleak`` by `PRIVLEAK_SETS`. Nothing of a pair whose Min-K% is not known.
    """
    numbers: dict[str, float] = {}
    named = {MEMBERSHIP_SETS: ("membership_auc", "privacy"), PRIVLEAK_SETS: ("privleak_auc", "privleak_privacy")}
    for pair, (own, private) in named.items():
        found = membership_auc(sets, pair)
        if found is None:
            continue
        ideal = None if reference is None else membership_auc(reference, pair)
        numbers |= {own: found, private: float(privacy(found, ideal))}
        if pair == PRIVLEAK_SETS:
            numbers["privleak"] = privleak(found, 0.5 if ideal is None else ideal)
    return numbers
