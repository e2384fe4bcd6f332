"""Compute forget quality and model utility from scored losses.

Code bases compute these numbers differently, so each result has the name of its definition (`definitions.DEFINITIONS`).

Symbols, for a set of n items with k perturbed answers each:
    a: (n,) mean loss of the gold answer, nats per token.
    p: (n,) mean loss of the paraphrased answer.
    q: (n, k) mean losses of the perturbed answers.
    R: (n,) truth ratio, mean perturbed probability over paraphrase probability; small if the model knows the fact.

Source: TOFU (arXiv 2401.06121, section 2.2); `definitions` has those of each definition.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from uipe_core.corpora.types import KEPT_SETS, RELATED_SETS, UTILITY_SETS
from uipe_core.errors import UserError
from uipe_core.metrics.definitions import Definition, definition_named, log_geometric_mean
from uipe_core.metrics.scores import FloatArray, ScoreReport, SetScores, require_same_items

SET_TITLES = {
    "retain": "Retain",
    "real_authors": "Real Authors",
    "world_facts": "Real World",
    "forget": "Forget",
    "general": "General",
    "related": "Related",
    "unrelated": "Unrelated",
    "holdout": "Holdout",
}
"""Evaluation set to its name in tables; the first four are TOFU's."""

CHOICE_SETS = ("real_authors", "world_facts")
"""Sets whose probability is relative to the perturbed answers, as in a multiple choice (TOFU, section 2.2.1)."""

MEMORIZED_SETS = ("forget", "retain", *RELATED_SETS)
"""Sets whose memorisation is reported."""


@dataclass(frozen=True)
class ForgetQuality:
    """Two-sample Kolmogorov-Smirnov test between the truth ratios of a model and of its reference.

    Attributes:
        p_value: In [0, 1]; high means indistinguishable from the reference. May underflow to 0 above 500 items.
        log10_p: log10 of the p-value, from `log10_p_floor` of the sample sizes to 0.
        ks_statistic: Largest distance between the two empirical distribution functions, in [0, 1].
    """

    p_value: float
    log10_p: float
    ks_statistic: float

    def as_dict(self) -> dict[str, float]:
        """Return the three numbers under the keys of ``uipe metrics --json``."""
        quality = {"forget_quality": self.p_value, "log10_forget_quality": self.log10_p}
        return {**quality, "ks_statistic": self.ks_statistic}


@dataclass(frozen=True)
class Metrics:
    """The numbers of one model.

    Attributes:
        definition: Key of `definitions.DEFINITIONS`.
        model_utility: Harmonic mean of the nine components, in [0, 1]; None where one of their sets was not scored.
        components: Probability, ROUGE and truth ratio of every set that should be kept, by TOFU's names, each in [0, 1]; the
            nine numbers of model utility where its sets are there.
        forget: Probability, ROUGE and truth ratio of the forget set, each in [0, 1].
        forget_quality: Test against the reference, None without one.
        related: The same test on ``related`` and ``unrelated``, if both model and reference were scored on them.
        memorization: ``exact_memorization`` and ``extraction_strength`` by set of `MEMORIZED_SETS`, if known; equal in every
            definition.
        composites: Harmonic means of item means by name, of a caller that has names for them (`composites`).
    """

    definition: str
    model_utility: float | None
    components: Mapping[str, float]
    forget: Mapping[str, float]
    forget_quality: ForgetQuality | None = None
    related: Mapping[str, ForgetQuality] = field(default_factory=dict)
    memorization: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    composites: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``uipe metrics --json``; keys that need a reference are absent without one."""
        content: dict[str, Any] = {
            "definition": self.definition,
            "model_utility": self.model_utility,
            "components": dict(self.components),
            "forget": dict(self.forget),
        }
        if self.forget_quality is not None:
            content.update(self.forget_quality.as_dict())
        if self.related:
            content["related"] = {name: quality.as_dict() for name, quality in self.related.items()}
        if self.memorization:
            content["memorization"] = {name: dict(values) for name, values in self.memorization.items()}
        return content


def evaluate(
    report: ScoreReport,
    reference: ScoreReport | None = None,
    definition: str = "tofu",
    required: Sequence[str] = ("forget", *UTILITY_SETS),
) -> Metrics:
    """Compute every number of one model; with a reference (usually the retain model) forget quality too.

    Per set that should be kept, ``Prob`` is mean exp(-a), on the choice sets divided by the sum over gold and perturbed
    answers; ``ROUGE`` is the mean ROUGE-L recall; ``Truth Ratio`` is mean max(0, 1 - R).

    The reference needs paraphrase and perturbed losses on the forget set only.

    Args:
        report: The scores.
        reference: Those of the reference.
        definition: Key of `definitions.DEFINITIONS`.
        required: Sets that must be there, the forget set among them. Without one of `UTILITY_SETS` there is no model utility.

    Raises:
        UserError: Unknown definition, a missing set or ROUGE, losses that are not finite, or a reference of other items.
    """
    _require_sets(report, required)
    chosen = definition_named(definition)
    kept = [name for name in KEPT_SETS if name in report.sets]
    by_set = {name: _set_components(report.sets[name], name, chosen) for name in kept}
    components = {key: value for part in by_set.values() for key, value in part.items()}
    nine = {key: value for name in UTILITY_SETS for key, value in by_set.get(name, {}).items()}
    utility = model_utility(nine) if set(UTILITY_SETS) <= set(kept) else None
    values = Metrics(definition, utility, components, forget_components(report, definition), memorization=memorization(report))
    if reference is None:
        return values
    _require_sets(reference, ("forget",), "of the reference ")
    names = ("forget", *(name for name in RELATED_SETS if name in report.sets and name in reference.sets))
    tests = {name: quality_of_set(report, reference, name, definition_named(definition)) for name in names}
    return replace(values, forget_quality=tests.pop("forget"), related=tests)


def truth_ratio(paraphrase_loss: FloatArray, perturbed_loss: FloatArray, definition: str = "tofu") -> FloatArray:
    """Return the truth ratio R per item, (n,) in [0, inf]: mean perturbed probability over paraphrase probability.

    For ``tofu`` exp(p - mean q), the geometric form; for ``tofu-utils`` with the arithmetic mean; for ``open-unlearning`` 1e-10
    is added to the paraphrase probability. Differences beyond about 709 nats give inf or 0, never NaN; `forget_quality` accepts
    these, since only the order counts.

    Args:
        paraphrase_loss: (n,) finite, nats per token.
        perturbed_loss: (n, k) finite, k >= 1.
        definition: Key of `definitions.DEFINITIONS`.
    """
    chosen = definition_named(definition)
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(_log_divide(chosen.log_mean_perturbed(perturbed_loss), -paraphrase_loss, chosen.epsilon))


def forget_components(report: ScoreReport, definition: str = "tofu") -> dict[str, float]:
    """Return probability, ROUGE-L recall and truth ratio of the forget set, each in [0, 1].

    The truth ratio is mean min(R, 1/R): 1 when true and false answers are equally likely.

    Raises:
        UserError: Unknown definition, no forget set or ROUGE, or losses that are not finite.
    """
    _require_sets(report, ("forget",))
    return _set_components(report.sets["forget"], "forget", definition_named(definition))


def memorization(report: ScoreReport) -> dict[str, dict[str, float]]:
    """Return mean exact memorisation and extraction strength, each in [0, 1], of `MEMORIZED_SETS`, if the report has them.

    Extraction strength in open-unlearning's convention has a name of its own (`uipe_core.metrics.answers`).
    """
    found: dict[str, dict[str, float]] = {}
    for name in MEMORIZED_SETS:
        scores = report.sets.get(name)
        for key in ("exact_memorization", "extraction_strength", "extraction_strength_open_unlearning"):
            values = None if scores is None else getattr(scores, key)
            if values is not None and len(values):
                found.setdefault(name, {})[key] = float(np.mean(values))
    return found


def harmonic_mean(values: FloatArray) -> FloatArray:
    """Return the harmonic mean over the first axis; 0 where a value is 0. Values are finite and at least 0."""
    least = values.min(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(least > 0, len(values) * least / np.sum(least / values, axis=0), 0.0)


def model_utility(components: Mapping[str, float]) -> float:
    """Return the harmonic mean of the components, in [0, 1]; 0 if any of them is 0 (TOFU, section 2.2.1).

    Raises:
        ValueError: No components, or one that is negative or not finite.
    """
    values = np.array(list(components.values()), dtype=np.float64)
    if not len(values) or not np.all(np.isfinite(values)) or values.min() < 0:
        raise ValueError(f"model utility needs finite components of at least 0, got {dict(components)}")
    return float(harmonic_mean(values))


def forget_quality(ratios: FloatArray, reference_ratios: FloatArray) -> ForgetQuality:
    """Run the two-sided two-sample KS test between two samples of truth ratios (TOFU, section 2.2.2).

    Only the order counts: ratios, their inverses or logarithms give the same, and infinities may occur.

    Args:
        ratios, reference_ratios: (n,) of the scored model and (m,) of the reference.

    Raises:
        ValueError: An empty sample, or a NaN.
    """
    from scipy.stats import ks_2samp  # half a second, which commands that only read a study do not need

    n, m = len(ratios), len(reference_ratios)
    if not n or not m or np.isnan(ratios).any() or np.isnan(reference_ratios).any():
        raise ValueError(f"the KS test needs two non-empty samples without NaN, got {n} and {m} values")
    with warnings.catch_warnings():
        # If rounding lifts scipy's exact p above 1, it warns and uses the asymptotic one, 1 to 1e-4.
        warnings.filterwarnings("ignore", message="ks_2samp: Exact calculation unsuccessful")
        test = ks_2samp(ratios, reference_ratios)
    p_value, statistic = float(test.pvalue), float(test.statistic)
    if p_value > 0:
        log10_p = float(np.log10(p_value))
    elif n == m:
        # If p underflows, all but the first term of the reflection sum (Gnedenko and Korolyuk 1951) are negligible.
        log10_p = log10_p_floor(n, n) + _log_binomial(2 * n, n - round(statistic * n)) / float(np.log(10.0))
    else:
        log10_p = -np.inf
    return ForgetQuality(p_value, max(log10_p, log10_p_floor(n, m)), statistic)


def log10_p_floor(n: int, m: int) -> float:
    """Return log10 of the smallest p-value of samples of n and m, 2 / C(n + m, n): all values separated.

    The smallest p-value is 1.86e-23 for n = m = 40, 1.94e-119 for 200, 1.06e-239 for 400.
    """
    return float((np.log(2.0) - _log_binomial(n + m, n)) / np.log(10.0))


def _log_binomial(n: int, k: int) -> float:
    # Exact integers: SciPy's gammaln gives the same to 1e-15, and takes longer to import than a study to read.
    return math.log(math.comb(n, k))


def _log_divide(log_numerator: FloatArray, log_denominator: FloatArray, epsilon: float) -> FloatArray:
    if epsilon > 0:
        log_denominator = np.logaddexp(log_denominator, np.log(epsilon))
    return log_numerator - log_denominator


def item_components(scores: SetScores, name: str, definition: Definition) -> dict[str, FloatArray]:
    """Return the components of one set per item: (n,) arrays by component.

    Raises:
        UserError: No ROUGE, or losses that are not finite.
    """
    probability, closeness = loss_components(scores, name, definition).items()
    if scores.rouge_l_recall is None:
        raise UserError(f"set {name!r} has no ROUGE-L recall (rougeL_recall): score the model with generation on")
    _check_finite(scores.rouge_l_recall, name, "rouge_l_recall")
    return dict([probability, (f"ROUGE {SET_TITLES[name]}", scores.rouge_l_recall), closeness])


def loss_components(scores: SetScores, name: str, definition: Definition) -> dict[str, FloatArray]:
    """Return the components that need losses only, probability and truth ratio, in this order, each (n,) in [0, 1].

    Raises:
        UserError: Losses that are not finite.
    """
    _check_losses(scores, name, ("answer_loss", "paraphrase_loss", "perturbed_loss"))
    log_probability = -scores.answer_loss
    if name in CHOICE_SETS:
        choices = np.concatenate([log_probability[:, None], -scores.perturbed_loss], axis=1)
        log_probability = _log_divide(log_probability, np.logaddexp.reduce(choices, axis=1), definition.epsilon)
    log_perturbed = definition.log_mean_perturbed(scores.perturbed_loss)
    log_ratio = _log_divide(log_perturbed, -scores.paraphrase_loss, definition.epsilon)
    if name == "forget":
        log_inverse = _log_divide(np.zeros_like(log_ratio), log_ratio, definition.epsilon)
        closeness = np.exp(np.minimum(log_ratio, log_inverse))
    else:
        closeness = 1.0 - np.exp(np.minimum(log_ratio, 0.0))
    return {f"Prob {SET_TITLES[name]}": np.exp(log_probability), f"Truth Ratio {SET_TITLES[name]}": closeness}


def quality_ratios(scores: SetScores, definition: Definition) -> FloatArray:
    """Return (n,) log truth ratios for forget quality, geometric in every definition.

    Logarithms have the order of the ratios without ties by overflow.
    """
    return _log_divide(log_geometric_mean(scores.perturbed_loss), -scores.paraphrase_loss, definition.epsilon)


def truth_share(scores: SetScores, name: str, definition: Definition) -> FloatArray:
    """Return (n,) p / (p + q), in [0, 1]: p of the paraphrase, q the mean of the perturbed answers; 1 where the fact is known.

    The truth ratio of OpenUnlearning's memorisation score (arXiv 2506.12618, section 4).

    Raises:
        UserError: Losses that are not finite.
    """
    _check_losses(scores, name, ("paraphrase_loss", "perturbed_loss"))
    log_perturbed = definition.log_mean_perturbed(scores.perturbed_loss)
    log_sum = np.logaddexp(log_perturbed, -scores.paraphrase_loss)
    return np.asarray(np.exp(_log_divide(-scores.paraphrase_loss, log_sum, definition.epsilon)))


def _set_components(scores: SetScores, name: str, definition: Definition) -> dict[str, float]:
    return {key: float(np.mean(values)) for key, values in item_components(scores, name, definition).items()}


def _require_sets(report: ScoreReport, names: Sequence[str], whose: str = "") -> None:
    missing = [name for name in names if name not in report.sets]
    if missing:
        present = ", ".join(report.sets) or "none"
        raise UserError(f"missing evaluation sets {whose}for the metrics: {', '.join(missing)}; present: {present}")


def _check_losses(scores: SetScores, name: str, measurements: Sequence[str]) -> None:
    if not len(scores):
        raise UserError(f"set {name!r} has no items")
    if scores.perturbed_loss.ndim != 2 or scores.perturbed_loss.shape[1] == 0:
        raise UserError(f"set {name!r} has no perturbed answers, which the truth ratio needs")
    for measurement in measurements:
        _check_finite(getattr(scores, measurement), name, measurement)


def _check_finite(values: FloatArray, name: str, what: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise UserError(f"set {name!r}, item {bad[0][0]}: {what} has {values[tuple(bad[0])]}, need finite numbers")


def quality_of_set(report: ScoreReport, reference: ScoreReport, name: str, definition: Definition) -> ForgetQuality:
    """Return the forget quality of one evaluation set; raises UserError as `evaluate`."""
    scores, expected = report.sets[name], reference.sets[name]
    compared = ("paraphrase_loss", "perturbed_loss")
    _check_losses(scores, name, compared)
    _check_losses(expected, f"{name} of the reference", compared)
    require_same_items(scores, expected, name)
    return forget_quality(quality_ratios(scores, definition), quality_ratios(expected, definition))
