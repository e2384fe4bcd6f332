"""A study as its sampler sees it: in memory, without the trials' evidence.

Asked for a point, a study of Optuna reads each of its running trials from the database again, and keeps all it has read,
evidence included. With many workers that costs more than the rest of a trial, and memory grows with all a trial has to say.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial


class InMemoryStudy:
    """Proposes points, and is told how they ended. Numbers trials as the study does that it stands for.

    Args:
        directions: Of the objectives.
        sampler: Proposes the points.
        trials: All trials of the study so far, in order.
    """

    def __init__(self, directions: Sequence[StudyDirection], sampler: BaseSampler, trials: Iterable[FrozenTrial]) -> None:
        self._study = optuna.create_study(directions=list(directions), sampler=sampler)
        for trial in trials:
            self._study.add_trial(_sketch(trial, {}))

    def ask(self, space: dict[str, BaseDistribution], given: Mapping[str, Any] | None, kind: str) -> tuple[int, FrozenTrial]:
        """Number of a new running trial, and the trial, to be written into the study.

        Args:
            space: What it has parameters of.
            given: Some of them; the sampler proposes the rest.
            kind: Goes with the trial if something is given.
        """
        if given is not None:
            # Without skip_if_exists: a point whose trial failed would be skipped, and the sampler's proposal taken for it.
            self._study.enqueue_trial(dict(given), user_attrs={"kind": kind})
        number = self._study.ask(fixed_distributions=space).number
        trial = self._study.get_trials(deepcopy=False)[number]
        return number, _sketch(trial, trial.user_attrs)

    def end(self, number: int, state: TrialState, values: Sequence[float] | None) -> None:
        """Notes how a trial ended."""
        self._study.tell(number, values, state=state)


def _sketch(trial: FrozenTrial, user_attrs: Mapping[str, Any]) -> FrozenTrial:
    """A trial as samplers see it: state, values, parameters, and what samplers note with it."""
    return create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=dict(user_attrs),
        system_attrs=trial.system_attrs,
    )
