"""Keep a study in memory for its sampler, without the trials' evidence.

At each ask, a study of Optuna reads its running trials from the database again and keeps all it has read, evidence included.
With many workers that costs more than the rest of a trial, and memory grows with the evidence.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial


class InMemoryStudy:
    """Study in memory that proposes points. It numbers trials as the study in the database does.

    Args:
        directions: Of the objectives.
        sampler: Proposes the points.
        trials: All trials of the study so far, in order.
    """

    def __init__(self, directions: Sequence[StudyDirection], sampler: BaseSampler, trials: Iterable[FrozenTrial]) -> None:
        self.sampler = sampler
        self._study = optuna.create_study(directions=list(directions), sampler=sampler)
        for trial in trials:
            self._study.add_trial(_sketch(trial))

    def ask(self, space: dict[str, BaseDistribution], given: Mapping[str, Any] | None) -> tuple[int, FrozenTrial]:
        """Return the number of a new running trial, and the trial, to be written into the study.

        Args:
            space: What it has parameters of.
            given: Some of them; the sampler proposes the rest.
        """
        if given is not None:
            # Without skip_if_exists: a point whose trial failed would be skipped, and the sampler's proposal taken for it.
            self._study.enqueue_trial(dict(given))
        number = self._study.ask(fixed_distributions=space).number
        trial = self._study.get_trials(deepcopy=False)[number]
        return number, _sketch(trial)

    def end(self, number: int, state: TrialState, values: Sequence[float] | None) -> None:
        """Record how a trial ended."""
        self._study.tell(number, values, state=state)


def _sketch(trial: FrozenTrial) -> FrozenTrial:
    """Copy what samplers see of a trial: state, values, parameters, and what samplers note with it."""
    return create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        system_attrs=trial.system_attrs,
    )
