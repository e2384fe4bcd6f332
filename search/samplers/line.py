"""The Optuna sampler `line`: a Gaussian process over theta_init + (1 + alpha) * delta proposes points.

Every proposal is an ordinary point of the flat space and is really scored. Where the model of the line does not apply, another
sampler proposes: for as long as the inner products of the update vectors are not there, or for good.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import ThreadpoolController

from search.problem.space import Range, in_flat_space, own_point
from search.samplers.acquisition import LineSearch
from search.samplers.kernels import FloatArray, Geometry, Points
from search.samplers.outcomes import OutcomeModel
from uipe_core.errors import UserError

CANDIDATES = 720
"""Points that are looked at for a proposal, spread over all update vectors; then some more around the best."""
_FEWEST, _MOST = 8, 48
_AROUND = 17
_SAME = 1e-3
"""Share of the range of alpha within which two points of one update vector are the same."""
_DIGITS = 4

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class UpdateVectors:
    """The update vectors that are there.

    Attributes:
        vectors: Their numbers, by base run and its own epoch.
        gram: (M, M) inner products, see `uipe_core.deltas.gram`.
    """

    vectors: Mapping[tuple[str, int], int]
    gram: FloatArray


@dataclass(frozen=True)
class LineStudy:
    """Hold what the sampler knows of a study in addition to its trials.

    Attributes:
        epochs: Epochs by base run.
        alpha: Both ends of the sampled range.
        curves: What is modelled of item scores.
        initial: Item scores of the initial model: the point where every line begins.
        reference: Reference point and noise ceilings, by objective; asked for once, with the first proposal.
        items: Item scores of a trial by its number, None where it has none.
        lines: The update vectors that are there now; None while nothing is known of them.
        ranges: Both ends of a base run's own range, where it is another one.
    """

    epochs: Mapping[str, int]
    alpha: Range
    curves: OutcomeModel
    initial: Arrays
    reference: Callable[[], tuple[Sequence[float], Sequence[float]]]
    items: Callable[[int], Arrays | None]
    lines: Callable[[], UpdateVectors | None]
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @cached_property
    def ends(self) -> dict[str, Range]:
        """Return both ends of every base run's range."""
        return {base: self.ranges.get(base, self.alpha) for base in self.epochs}


class LineSampler(BaseSampler):
    """Propose where the hypervolume is expected to grow most.

    Args:
        world: The study.
        space: Its search space.
        fallback: Proposes where this sampler cannot.
        seed: Of the draws.
        say: Called with a message, once, when the sampler lacks an input.
    """

    def __init__(
        self,
        world: LineStudy,
        space: Mapping[str, BaseDistribution],
        fallback: BaseSampler,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._world, self._space, self._fallback = world, dict(space), fallback
        self._generator = np.random.default_rng(seed)
        self._say = say
        self._said: set[str] = set()
        self._values: dict[int, tuple[Mapping[str, FloatArray], Mapping[str, float]] | None] = {}
        self._measure: tuple[Sequence[float], Sequence[float]] | None = None
        self._lines: UpdateVectors | None = None
        self._search: LineSearch | None = None
        self._told: set[int] = set()
        self._libraries = ThreadpoolController()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space: it is flat and known."""
        return dict(self._space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """A point for a trial, or nothing where all of it is given already; of its base run, where that is given."""
        given = trial.system_attrs.get("fixed_params", {})
        if set(self._space) <= set(given):
            return {}
        if not set(given) - {"base"}:
            try:
                # Matrices are small: threads wait for each other longer than they compute, and workers want the other cores.
                with self._libraries.limit(limits=1, user_api="blas"):
                    found = self._propose(study.get_trials(deepcopy=False), trial.number, given.get("base"))
            except np.linalg.LinAlgError as error:
                self._tell_once(f"sampler line: its model cannot be computed ({error}); another sampler proposes")
                found = None
            if found is not None:
                return found
        inferred = self._fallback.infer_relative_search_space(study, trial)
        return self._fallback.sample_relative(study, trial, inferred)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return what the other sampler proposes, for a trial it was asked for."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """As Optuna asks where several processes share a study: this sampler's draws then differ from all others'."""
        self._generator = np.random.default_rng()
        self._fallback.reseed_rng()

    def _propose(self, trials: Sequence[FrozenTrial], number: int, base: str | None) -> dict[str, Any] | None:
        lines = self._world.lines()
        if lines is None:
            return None
        search = self._taught(lines, trials)
        vectors = np.array(
            sorted(vector for (label, _), vector in lines.vectors.items() if base in (None, label)), dtype=np.int64
        )
        if search is None or not len(vectors):
            return None
        ends = np.zeros((max(lines.vectors.values()) + 1, 2))
        for (label, _), vector in lines.vectors.items():
            ends[vector] = self._world.ends[label]
        low, high = ends.T
        if len(vectors) > CANDIDATES // _FEWEST:
            vectors = np.sort(self._generator.choice(vectors, CANDIDATES // _FEWEST, replace=False))
        count = int(np.clip(CANDIDATES // len(vectors), _FEWEST, _MOST))
        step = (high - low) / count
        pending = self._places_of(trials, number, (TrialState.RUNNING, TrialState.WAITING))
        failed = self._places_of(trials, number, (TrialState.FAIL,))

        def around(vector: NDArray[np.int64], alpha: FloatArray) -> Points:
            rounded = np.round(np.clip(alpha, low[vector], high[vector]), _DIGITS)
            found = Points(vector, np.asarray(1.0 + rounded, dtype=np.float64))
            same = _SAME * (high - low)[vector]
            near = _near(found, search.places + pending, same) | _near(found, failed, 0.5 * step[vector])
            # theta_init is known, whatever the vector.
            return found.take(~near & (np.abs(found.scale) > same))

        # Another offset each time: in the end no alpha is left out.
        offsets = low[vectors, None] + (np.arange(count) + self._generator.random()) * step[vectors, None]
        everywhere = around(np.repeat(vectors, count), offsets.ravel())
        if not len(everywhere):
            return None
        best = everywhere.take(np.array([search.propose(everywhere, pending, self._generator)]))
        width = step[best.vector] * np.linspace(-1, 1, _AROUND)
        closer = best + around(np.repeat(best.vector, _AROUND), best.scale - 1.0 + width)
        chosen = search.propose(closer, pending, self._generator)
        label, own = next(place for place, vector in lines.vectors.items() if vector == closer.vector[chosen])
        # Rounded, because 1 + alpha - 1 is not alpha.
        alpha = float(np.clip(round(closer.scale[chosen] - 1.0, _DIGITS), *self._world.ends[label]))
        params = {"base": label, "epoch": own, "alpha": alpha}
        return in_flat_space(params, self._world.epochs, self._world.alpha, self._world.ends)

    def _taught(self, lines: UpdateVectors, trials: Sequence[FrozenTrial]) -> LineSearch | None:
        """Return the model of all scores; it is rebuilt where there are more update vectors than before."""
        if self._measure is None:
            self._measure = self._world.reference()
        if self._search is None or lines is not self._lines:
            self._search = LineSearch(Geometry(lines.gram), self._world.curves, *self._measure)
            self._search.tell(0, 0.0, *self._curves_of(self._world.initial))
            self._lines, self._told = lines, set()
        for trial in trials:
            if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or trial.number in self._told:
                continue
            place = self._place_of(trial)
            values = None if place is None else self._values_of(trial.number)
            if place is None or values is None:
                continue
            self._told.add(trial.number)
            try:
                self._search.tell(*place, *values)
            except ValueError as error:
                self._values[trial.number] = None
                self._tell_once(f"sampler line: trial {trial.number} tells it nothing: {error}")
        return self._search

    def _values_of(self, number: int) -> tuple[Mapping[str, FloatArray], Mapping[str, float]] | None:
        if number not in self._values:
            values = None
            try:
                arrays = self._world.items(number)
                values = None if arrays is None else self._curves_of(arrays)
            except (UserError, KeyError, TypeError, ValueError) as error:
                self._tell_once(f"sampler line: trial {number} tells it nothing, its item scores are no use: {error}")
            self._values[number] = values
        return self._values[number]

    def _curves_of(self, arrays: Arrays) -> tuple[Mapping[str, FloatArray], Mapping[str, float]]:
        curves = self._world.curves.of(arrays)
        return curves, self._world.curves.units(arrays, curves)

    def _place_of(self, trial: FrozenTrial) -> tuple[int, float] | None:
        """Update vector and 1 + alpha of a trial; None where it has no such point, or the vector is not there yet."""
        assert self._lines is not None
        params, epochs = trial.params, self._world.epochs
        if not set(self._space) <= set(params) or params["base"] not in epochs:
            return None
        point = own_point(params, epochs, self._world.alpha, self._world.ends)
        vector = self._lines.vectors.get((point.base, point.epoch))
        return None if vector is None else (vector, 1.0 + point.alpha)

    def _places_of(self, trials: Sequence[FrozenTrial], but: int, states: tuple[TrialState, ...]) -> Points:
        found = [self._place_of(trial) for trial in trials if trial.state in states and trial.number != but]
        there = [place for place in found if place is not None]
        return Points(
            np.array([place[0] for place in there], dtype=np.int64), np.array([place[1] for place in there], dtype=float)
        )

    def _tell_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._say(sentence)


def _near(points: Points, others: Points, distance: FloatArray) -> NDArray[np.bool_]:
    """(P,) whether another point of the same vector is within a distance, (P,) too."""
    same = points.vector[:, None] == others.vector[None, :]
    return np.asarray((same & (np.abs(points.scale[:, None] - others.scale[None, :]) < distance[:, None])).any(axis=1))
