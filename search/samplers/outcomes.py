"""From the scores of single items to curves that are smooth along a walk, and from curves to objectives.

What a Gaussian process can follow goes straight where weights go straight: the logits do, so log odds of probabilities do too,
far better than probabilities or losses, which flatten out at a right answer; so do logarithms of truth ratios, and what of
ROUGE the probability of the answers does not tell already. Objectives are made from them in the end: means, harmonic means of
those, KS tests, and the AUC of two sets, by the formulas of `uipe_core.metrics`. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.problem.objectives import Objective
from search.samplers.kernels import FloatArray
from uipe_core.metrics.composites import (
    AGREEMENT,
    CLOSENESS,
    EXACT,
    EXTRACTION,
    PARAPHRASE,
    PROBABILITY,
    ROUGE,
    ROUGE_F1,
    TRUTH_SHARE,
    Component,
    auc,
    membership_auc,
    privacy,
)
from uipe_core.metrics.definitions import Definition, definition_named
from uipe_core.metrics.scores import SetScores, set_scores
from uipe_core.metrics.tofu import CHOICE_SETS, quality_ratios, truth_ratio
from uipe_core.metrics.uncertainty import log10_p_table

LEAST_LOG = -30.0
"""Log odds of probabilities and logarithms of ratios are kept above: below it they count for nothing."""
LEAST_LOSS = 1e-3
"""Losses in nats are kept above, so that log odds end: how sure a model is beyond it counts for nothing."""
BEND = 0.5
"""Where curves of ratios turn from linear to logarithmic: nats; for forget quality, standard deviations of the retain model's.

What happens in a collapse is large and counts for nothing; unbent it would set the scale that all else is judged by.
"""

ANSWER, CHOICE, RATIO, SHARE, SHORT = "answer", "choice", "ratio", "share", "paraphrase"
"""Curves of a set: log odds of the answers, of them among the choices, of the paraphrases; truth ratios, as a utility set has
them and as a share."""
LEAST_LIKELY = "least"
"""Curve of a set for `privacy`: log odds of its answers' least likely tokens. An AUC sees their order alone."""
ROOT = "divergence"
"""Curve of the divergence from the initial model: its square root, since near that model it is quadratic in the weights."""

_BEYOND = {ROUGE: "text", ROUGE_F1: "text_f1", EXTRACTION: "extracted", EXACT: "exact"}
"""Curves of measures that change in steps, by measure: their mean over the items beyond that of the answers' probability."""


_SMALL, _DRAWS = 1e-4, 2
"""Relative errors of losses that show what they do to curves, and how often they are drawn for one point."""
_OF_LOSSES = ("_loss", "/min_k")
"""Ends of the names of arrays that are losses."""

_ORDER = (PROBABILITY, PARAPHRASE, CLOSENESS, TRUTH_SHARE, ROUGE, EXTRACTION, EXACT, AGREEMENT, ROUGE_F1)


def _curve(component: Component) -> str:
    """Return the curve that a component is made of, next to the answers where it is a step."""
    if component.measure in _BEYOND:
        return f"{component.item_set}/{_BEYOND[component.measure]}"
    own = {PROBABILITY: CHOICE if component.item_set in CHOICE_SETS else ANSWER, PARAPHRASE: SHORT, TRUTH_SHARE: SHARE}
    own[AGREEMENT] = ROOT
    return f"{component.item_set}/{own.get(component.measure, RATIO)}"


class OutcomeModel:
    """How arrays of item scores become curves, and curves objectives.

    Args:
        definition: Metric definition.
        objectives: What is maximised: forget qualities, composites and privacy.
        reference: Item arrays of the retain model by ``set/measurement``, on the same items; None where nothing compares
            with them.

    Raises:
        UserError: The reference lacks what the forget qualities need.
    """

    def __init__(self, definition: str, objectives: Sequence[Objective], reference: Mapping[str, NDArray[Any]] | None) -> None:
        self._definition = definition
        self._objectives = tuple(objectives)
        self._components = list(dict.fromkeys(part for each in objectives for part in each.components))
        named = definition_named(definition)
        qualities = dict.fromkeys(each.quality_of for each in objectives if each.quality_of is not None)
        ratios = {name: quality_ratios(set_scores(reference or {}, name), named) for name in qualities}
        self._centre = {name: (float(np.median(each)), BEND * max(float(each.std()), 1e-6)) for name, each in ratios.items()}
        self._expected = {name: np.sort(self._bent(name, each)) for name, each in ratios.items()}
        pairs = dict.fromkeys(each.membership for each in objectives if each.membership)
        self._compared = tuple(dict.fromkeys(name for pair in pairs for name in pair))
        there = {name: set_scores(reference or {}, name) for name in self._compared if f"{name}/min_k" in (reference or {})}
        self._ideal = {pair: membership_auc(there, pair) for pair in pairs}

    @property
    def noisy(self) -> frozenset[str]:
        """Curves that are steps: text and most likely tokens change at once."""
        return frozenset(_curve(each) for each in self._components if each.measure in _BEYOND)

    @property
    def names(self) -> frozenset[str]:
        """All curves of a model that was scored as a whole."""
        found = {f"{name}/quality" for name in self._expected} | {_curve(each) for each in self._components}
        found |= {f"{name}/{LEAST_LIKELY}" for name in self._compared}
        return frozenset(found | {f"{name}/{ANSWER}" for name in self._stepped})

    @property
    def _stepped(self) -> set[str]:
        """Sets whose answers are needed under a step."""
        return {each.item_set for each in self._components if each.measure in _BEYOND}

    def of(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, FloatArray]:
        """(n,) by curve of one scored model; sets, or the text of a set, may be missing.

        Raises:
            KeyError, UserError, ValueError: Arrays that are not what a scorer writes, or not finite.
        """
        definition = definition_named(self._definition)
        curves = {}
        for name in self._expected:
            if f"{name}/paraphrase_loss" in arrays:
                curves[f"{name}/quality"] = self._bent(name, quality_ratios(set_scores(arrays, name), definition))
        # In one order whatever the objectives: the draws of a seed go by it.
        for name in dict.fromkeys(each.item_set for each in self._components):
            if f"{name}/answer_loss" not in arrays:
                continue
            scores = set_scores(arrays, name)
            if name in self._stepped:
                curves[f"{name}/{ANSWER}"] = _log_odds(scores.answer_loss)
            own = [each for each in self._components if each.item_set == name and each.is_known(scores)]
            for each in sorted(own, key=lambda each: _ORDER.index(each.measure)):
                curves[_curve(each)] = self._measured(each, scores, definition)
        for name in self._compared:
            if f"{name}/min_k" in arrays:
                curves[f"{name}/{LEAST_LIKELY}"] = _log_odds(arrays[f"{name}/min_k"])
        bad = [name for name, values in curves.items() if not np.isfinite(values).all()]
        if bad:
            raise ValueError(f"curves that are not finite: {', '.join(bad)}")
        return curves

    def units(self, arrays: Mapping[str, NDArray[Any]], start: Mapping[str, FloatArray]) -> dict[str, float]:
        """Mean variance that a relative error of 1 in every loss, each by itself, would give the values of each curve.

        Args:
            arrays: Item scores.
            start: Their curves, `of` them.
        """
        generator = np.random.default_rng(0)
        found = dict.fromkeys(start, 0.0)
        for _ in range(_DRAWS):
            moved = {
                name: each * (1.0 + _SMALL * generator.standard_normal(each.shape)) if name.endswith(_OF_LOSSES) else each
                for name, each in arrays.items()
            }
            for name, each in self.of(moved).items():
                found[name] += float(np.square((each - start[name]) / _SMALL).mean()) / _DRAWS
        return found

    def _measured(self, component: Component, scores: SetScores, definition: Definition) -> FloatArray:
        measure = component.measure
        if measure in _BEYOND:
            # Its mean is all that a composite takes of it, so there is nothing to gain by single items.
            values = replace(component, inverted=False).of_items(scores, definition)
            return np.array([values.mean() - _probability(_log_odds(scores.answer_loss)).mean()])
        if measure == PROBABILITY:
            if component.item_set not in CHOICE_SETS:
                return _log_odds(scores.answer_loss)
            with np.errstate(divide="ignore"):
                return _log_odds(-np.log(component.of_items(scores, definition)))
        if measure == PARAPHRASE:
            return _log_odds(scores.paraphrase_loss)
        if measure == AGREEMENT:
            return _bend(np.sqrt(np.asarray(scores.initial_kl)))
        with np.errstate(divide="ignore"):
            ratios = np.log(truth_ratio(scores.paraphrase_loss, scores.perturbed_loss, self._definition))
        if measure == TRUTH_SHARE:
            return np.asarray(np.clip(-ratios, LEAST_LOG, -LEAST_LOG))  # its log odds
        if component.item_set == "forget":
            raise ValueError("the truth ratio of the forget set has no curve; its share has one")
        return _bend(ratios)

    def objectives(self, curves: Mapping[str, NDArray[np.floating[Any]]]) -> FloatArray:
        """(..., m) objectives of curves (..., n)."""
        means: dict[str, FloatArray] = {}
        found = []
        for each in self._objectives:
            if each.quality_of is not None:
                found.append(self._quality(curves, each.quality_of))
            elif each.membership:
                # Of log odds, which fall as losses rise: the order of the two sets turns, too.
                others_first = (curves[f"{name}/{LEAST_LIKELY}"] for name in reversed(each.membership))
                found.append(privacy(auc(*others_first), self._ideal[each.membership]))
            else:
                found.append(self._composite(curves, each, means))
        return np.stack(found, axis=-1)

    def _composite(
        self, curves: Mapping[str, NDArray[np.floating[Any]]], objective: Objective, means: dict[str, FloatArray]
    ) -> FloatArray:
        """Return the harmonic mean of an objective's components; `means` keeps those of curves that others share."""
        inverse: FloatArray | float = 0.0
        for each in objective.components:
            curve = _curve(each)
            if curve not in means:
                means[curve] = self._mean(curves, each, means)
            value = means[curve]
            inverse = inverse + 1.0 / np.maximum(1.0 - value if each.inverted else value, 1e-12)
        return np.asarray(len(objective.components) / inverse)

    def _mean(
        self, curves: Mapping[str, NDArray[np.floating[Any]]], component: Component, means: dict[str, FloatArray]
    ) -> FloatArray:
        """Return (...,) the mean over the items of a component, before it is inverted."""
        name, curve = component.item_set, _curve(component)
        if component.measure in _BEYOND:
            answer = f"{name}/{ANSWER}"
            if answer not in means:
                means[answer] = np.asarray(_probability(curves[answer]).mean(axis=-1))
            return np.asarray(np.clip(curves[curve].mean(axis=-1) + means[answer], 0.0, 1.0))
        if component.measure == CLOSENESS:
            ratio = _unbend(curves[curve])
            return np.asarray(1.0 - np.exp(ratio, out=ratio).mean(axis=-1))
        if component.measure == AGREEMENT:
            root = -_unbend(-np.asarray(curves[curve]))
            return np.asarray(np.exp(-(root**2)).mean(axis=-1))
        return np.asarray(_probability(curves[curve]).mean(axis=-1))

    def _bent(self, name: str, ratios: FloatArray) -> FloatArray:
        """Ratios in an order that stays, which is all that a KS test sees of them."""
        centre, width = self._centre[name]
        return np.arcsinh((ratios - centre) / width)

    def _quality(self, curves: Mapping[str, NDArray[np.floating[Any]]], name: str) -> FloatArray:
        ratios = np.sort(curves[f"{name}/quality"], axis=-1)
        expected = self._expected[name].astype(ratios.dtype)
        count = ratios.shape[-1]
        # The distance of two distribution functions is greatest at, or just below, a value of the sample.
        ahead = np.searchsorted(expected, ratios, side="right")
        ahead -= np.arange(count)
        distances = np.maximum(ahead.max(axis=-1), 1 - ahead.min(axis=-1))
        return np.asarray(log10_p_table(count)[np.clip(distances, 0, count)])


def _log_odds(losses: FloatArray) -> FloatArray:
    """log(p / (1 - p)) of p = exp(-loss)."""
    kept = np.clip(losses, LEAST_LOSS, -LEAST_LOG)
    return np.asarray(-kept - np.log(-np.expm1(-kept)))


def _probability(log_odds: NDArray[np.floating[Any]]) -> FloatArray:
    # In place: there are millions of them, and a fresh array of that size costs as much as the arithmetic.
    grown = np.clip(log_odds, LEAST_LOG, -LEAST_LOG)
    np.exp(np.negative(grown, out=grown), out=grown)
    grown += 1.0
    return np.asarray(np.reciprocal(grown, out=grown))


def _bend(logarithms: FloatArray) -> FloatArray:
    return np.asarray(BEND * np.arcsinh(np.clip(logarithms, LEAST_LOG, -LEAST_LOG) / BEND))


def _unbend(curves: NDArray[np.floating[Any]]) -> FloatArray:
    """Logarithms again, as far as they are negative: what is above 0 counts as 0."""
    grown = np.clip(curves, BEND * math.asinh(LEAST_LOG / BEND), 0.0)  # a scalar of numpy's would make it double precision
    grown /= BEND
    np.exp(grown, out=grown)
    grown -= np.reciprocal(grown)
    grown *= 0.5 * BEND
    return np.asarray(grown)
