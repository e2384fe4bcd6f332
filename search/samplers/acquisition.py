"""Choose the next point: the candidate whose score is expected to add most to the hypervolume of the front.

Pure: arrays in, a place out; nothing is drawn but from the generator given. The sampler of a study (`search.samplers.line`) and
replays on recorded tables use the same object.

Sources: Emmerich, Giannakoglou and Naujoks, IEEE Trans. Evol. Comput. 10, 2006 (expected hypervolume improvement); Ginsbourger,
Le Riche and Carraro, "Kriging is well-suited to parallelize optimization", 2010 (points under way count as scored as expected).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from search.problem.pareto import non_dominated
from search.samplers.gaussian_process import MultiOutputGP, Prediction
from search.samplers.kernels import FloatArray, Geometry, Kernel, Points
from search.samplers.outcomes import OutcomeModel

FEW_DRAWS, MANY_DRAWS = 6, 64
"""Draws that a first look at all candidates takes, and a second look at the best of them."""
SHORTLIST = 32
FIT_AGAIN = 1.15
"""The kernel is fitted again when there are so many times the points it was fitted on."""
_WIDER = (1.0, 2.0, 4.0)


class LineSearch:
    """The points scored so far, and what they say of all others.

    Args:
        geometry: Of the update vectors.
        curves: What is modelled, and how objectives come of it.
        reference: (m,) reference point of the hypervolume.
        ceiling: (m,) values above which a gain counts for nothing; infinite where there is none.
    """

    def __init__(self, geometry: Geometry, curves: OutcomeModel, reference: Sequence[float], ceiling: Sequence[float]) -> None:
        self._geometry, self._curves = geometry, curves
        self._reference, self._ceiling = np.asarray(reference, dtype=float), np.asarray(ceiling, dtype=float)
        self._places: list[tuple[int, float]] = []
        self._values: list[Mapping[str, FloatArray]] = []
        self._units: list[Mapping[str, float]] = []
        self._widths: dict[str, int] = {}
        self._model: MultiOutputGP | None = None
        self._front = np.zeros((0, len(self._reference)))
        self._kernel: Kernel | None = None
        self._fitted_on = 0

    def __len__(self) -> int:
        return len(self._places)

    def tell(self, vector: int, scale: float, values: Mapping[str, FloatArray], units: Mapping[str, float]) -> None:
        """Take in what was scored at a point.

        Args:
            vector, scale: The point: theta_init + scale * update vector.
            values: `OutcomeModel.of` its item scores; some may be missing.
            units: `OutcomeModel.units` of them.

        Raises:
            ValueError: No values, or of other items than the points before; nothing is taken in then.
        """
        other = [name for name, each in values.items() if len(each) != self._widths.get(name, len(each))]
        if other or not values:
            raise ValueError(f"curves of other items than before: {', '.join(other)}" if other else "no curves")
        self._widths |= {name: len(each) for name, each in values.items()}
        self._places.append((vector, scale))
        self._values.append(values)
        self._units.append(units)
        self._model = None

    @property
    def places(self) -> Points:
        """Of the points scored so far."""
        return Points(
            np.array([each[0] for each in self._places], dtype=np.int64), np.array([each[1] for each in self._places])
        )

    @property
    def error(self) -> float:
        """Relative error of the losses, as far as the scores show it."""
        return self._current_model().error

    def propose(self, candidates: Points, pending: Points | None, generator: np.random.Generator) -> int:
        """The candidate to score next, by its number.

        Args:
            candidates: At least one, none of them scored or pending.
            pending: Points that are being scored.
            generator: Of the draws.

        Raises:
            ValueError: No candidate, or nothing has been scored as a whole yet.
        """
        if not len(candidates):
            raise ValueError("no candidates to choose from")
        model = self._current_model()
        prediction = model.predict(candidates, pending)
        front = self._front_with(model, pending)
        few, many = (model.errors(generator, draws) for draws in (FEW_DRAWS, MANY_DRAWS))
        for wider in _WIDER:
            first = self._gain(prediction, few, front, wider)
            shortlist = np.argsort(-first, kind="stable")[:SHORTLIST]
            gain = self._gain(prediction.take(shortlist), many, front, wider)
            if gain.max() > 0:
                return int(shortlist[np.argmax(gain)])
        # Nothing is expected to help: learn where least is known.
        return int(np.argmax(np.max(list(prediction.deviation.values()), axis=0)))

    def expect(self, candidates: Points) -> FloatArray:
        """(C, m) objectives at the mean of what is expected."""
        return self._curves.objectives(self._current_model().expect(candidates))

    def _gain(self, prediction: Prediction, errors: Mapping[str, FloatArray], front: FloatArray, wider: float) -> FloatArray:
        """(C,) mean growth of the hypervolume over the draws."""
        drawn = {}
        for name, mean in prediction.mean.items():
            # In single precision: there are millions, and they are guesses.
            deviation = (wider * prediction.deviation[name]).astype(np.float32)
            drawn[name] = deviation[:, None, None] * errors[name].astype(np.float32)
            drawn[name] += mean.astype(np.float32)[:, None, :]
        values = self._curves.objectives(drawn)
        return growth(np.minimum(values, self._ceiling), front, self._reference).mean(axis=1)

    def _front_with(self, model: MultiOutputGP, pending: Points | None) -> FloatArray:
        """The front of what has been scored, and of points under way as expected."""
        if pending is None or not len(pending):
            return self._front
        return self._front_of(np.concatenate([self._front, self._curves.objectives(model.expect(pending))]))

    def _front_of(self, points: FloatArray) -> FloatArray:
        capped = np.minimum(points, self._ceiling)
        return capped[non_dominated(capped)]

    def _current_model(self) -> MultiOutputGP:
        if not self._values:
            raise ValueError("nothing has been scored yet")
        if self._model is None:
            missing = {name: np.full(width, np.nan) for name, width in self._widths.items()}
            values = {name: np.stack([each.get(name, missing[name]) for each in self._values]) for name in missing}
            again = len(self) >= FIT_AGAIN * self._fitted_on
            units = {
                name: float(np.median([each[name] for each in self._units if name in each]))
                for name in values
                if name not in self._curves.noisy
            }
            self._model = MultiOutputGP(self._geometry, self.places, values, units, None if again else self._kernel)
            self._kernel = self._model.kernel
            # As expected, not as measured: against what errors made too good nothing would be worth a score.
            whole = np.array([each.keys() >= self._curves.names for each in self._values])
            if whole.any():
                self._front = self._front_of(self._curves.objectives(self._model.expect(self.places.take(whole))))
            self._fitted_on = len(self) if again else self._fitted_on
        return self._model


def growth(points: FloatArray, front: FloatArray, reference: FloatArray) -> FloatArray:
    """(...) hypervolume that each point alone would add to a front.

    Args:
        points: (..., m), m of 2 or more, maximised.
        front: (f, m) non-dominated points, in any order; f may be 0.
        reference: (m,) reference point.
    """
    above = front[np.all(front > reference, axis=1)] if len(front) else front
    if len(reference) > 2:
        # In slabs of the last objective: within each, those count that reach it.
        levels = np.unique(np.concatenate([reference[-1:], above[:, -1]]))
        upper = np.append(levels[1:], np.inf)
        total = np.zeros(points.shape[:-1])
        for low, high in zip(levels, upper, strict=True):
            depth = np.clip(points[..., -1], low, high) - low
            total += depth * growth(points[..., :-1], above[above[:, -1] > low, :-1], reference[:-1])
        return total
    kept = above[non_dominated(above)] if len(above) else above
    kept = kept[np.argsort(kept[:, 0])]
    edges = np.concatenate([reference[:1], kept[:, 0]])
    heights = np.append(kept[:, 1], reference[1])
    ends = np.append(kept[:, 0], np.inf)
    total = np.zeros(points.shape[:-1])
    for low, high, height in zip(edges, ends, heights, strict=True):
        total += (np.clip(points[..., 0], low, high) - low) * np.maximum(points[..., 1] - height, 0.0)
    return total
