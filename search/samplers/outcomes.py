"""From the scores of single items to curves that are smooth along a walk, and from curves to objectives.

What a Gaussian process can follow goes straight where weights go straight: the logits do, so log odds of probabilities do too,
far better than probabilities or losses, which flatten out at a right answer; so do logarithms of truth ratios, and what of
ROUGE the probability of the answers does not tell already. Objectives are made from them in the end: means, harmonic means of
those, and KS tests, by the formulas of `uipe_core.metrics.tofu`. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.samplers.gaussian_process import FloatArray
from uipe_core.corpora.types import UTILITY_SETS
from uipe_core.metrics.definitions import definition_named
from uipe_core.metrics.scores import set_scores
from uipe_core.metrics.tofu import CHOICE_SETS, loss_components, quality_ratios, truth_ratio
from uipe_core.metrics.uncertainty import log10_p_table

LEAST_LOG = -30.0
"""Log odds of probabilities and logarithms of ratios are kept above: below it they count for nothing."""
LEAST_LOSS = 1e-3
"""Losses in nats are kept above, so that log odds end: how sure a model is beyond it counts for nothing."""
BEND = 0.5
"""Where curves of ratios turn from linear to logarithmic: nats; for forget quality, standard deviations of the retain model's.

What happens in a collapse is large and counts for nothing; unbent it would set the scale that all else is judged by.
"""

ANSWER, CHOICE, RATIO, TEXT = "answer", "choice", "ratio", "text"
"""Curves of a utility set: log odds of the answers, and of them among the choices; truth ratios; text beyond answers."""


class OutcomeModel:
    """How arrays of item scores become curves, and curves objectives.

    Args:
        definition: Metric definition.
        qualities: The evaluation set of each objective that is a forget quality; None for model utility.
        reference: Item arrays of the retain model by ``set/measurement``, on the same items.

    Raises:
        UserError: The reference lacks what the forget qualities need.
    """

    def __init__(self, definition: str, qualities: Sequence[str | None], reference: Mapping[str, NDArray[Any]]) -> None:
        self._definition = definition
        self._qualities = tuple(qualities)
        named = definition_named(definition)
        ratios = {name: quality_ratios(set_scores(reference, name), named) for name in self._qualities if name is not None}
        self._centre = {name: (float(np.median(each)), BEND * max(float(each.std()), 1e-6)) for name, each in ratios.items()}
        self._expected = {name: np.sort(self._bent(name, each)) for name, each in ratios.items()}

    @property
    def noisy(self) -> frozenset[str]:
        """Curves that are steps: text changes at once."""
        return frozenset(f"{name}/{TEXT}" for name in UTILITY_SETS)

    @property
    def names(self) -> frozenset[str]:
        """All curves of a model that was scored as a whole."""
        found = {f"{name}/quality" for name in self._expected}
        if None in self._qualities:
            found |= {f"{name}/{part}" for name in UTILITY_SETS for part in (ANSWER, RATIO, TEXT)}
            found |= {f"{name}/{CHOICE}" for name in CHOICE_SETS}
        return frozenset(found)

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
        for name in UTILITY_SETS if None in self._qualities else ():
            if f"{name}/answer_loss" not in arrays:
                continue
            scores = set_scores(arrays, name)
            probability, _ = loss_components(scores, name, definition).values()
            ratios = truth_ratio(scores.paraphrase_loss, scores.perturbed_loss, self._definition)
            with np.errstate(divide="ignore"):
                answer = curves[f"{name}/{ANSWER}"] = _log_odds(scores.answer_loss)
                if name in CHOICE_SETS:
                    curves[f"{name}/{CHOICE}"] = _log_odds(-np.log(probability))
                curves[f"{name}/{RATIO}"] = _bend(np.log(ratios))
            if scores.rouge_l_recall is not None:
                # Its mean is all that utility takes of it, so there is nothing to gain by single items.
                curves[f"{name}/{TEXT}"] = np.array([scores.rouge_l_recall.mean() - _probability(answer).mean()])
        bad = [name for name, values in curves.items() if not np.isfinite(values).all()]
        if bad:
            raise ValueError(f"curves that are not finite: {', '.join(bad)}")
        return curves

    def objectives(self, curves: Mapping[str, NDArray[np.floating[Any]]]) -> FloatArray:
        """(..., m) objectives of curves (..., n)."""
        return np.stack(
            [self._utility(curves) if name is None else self._quality(curves, name) for name in self._qualities], axis=-1
        )

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

    def _utility(self, curves: Mapping[str, NDArray[np.floating[Any]]]) -> FloatArray:
        inverse: FloatArray | float = 0.0
        for name in UTILITY_SETS:
            answer = _probability(curves[f"{name}/{ANSWER}"]).mean(axis=-1)
            chosen = _probability(curves[f"{name}/{CHOICE}"]).mean(axis=-1) if name in CHOICE_SETS else answer
            ratio = _unbend(curves[f"{name}/{RATIO}"])
            truth = 1.0 - np.exp(ratio, out=ratio).mean(axis=-1)
            text = np.clip(curves[f"{name}/{TEXT}"].mean(axis=-1) + answer, 0.0, 1.0)
            inverse = inverse + sum(1.0 / np.maximum(part, 1e-12) for part in (chosen, truth, text))
        return np.asarray(3.0 * len(UTILITY_SETS) / inverse)


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
