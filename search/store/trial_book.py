"""The trials of one Optuna study in a database: begun, ended and read, again and again while the database is locked or gone."""

from collections.abc import Collection, Iterator, Mapping

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.store.database import Database
from search.store.trials import begin_trial, end_trial, last_trial, read_trials
from uipe_core.errors import UserError


class TrialBook:
    """Trials of a study that nobody else writes to.

    Args:
        database: Where it is.
        study: The study.
        storage: The database as errors call it.
    """

    def __init__(self, database: Database, study: optuna.Study, storage: str) -> None:
        self.study = study
        self._database = database
        self._storage = storage
        self._study_id = database.optuna.get_study_id_from_name(study.study_name)
        self._identifiers: dict[int, int] = {}

    def begin(self, number: int, trial: FrozenTrial) -> None:
        """Writes a trial as running.

        Raises:
            UserError: If the study has one of this or a higher number.
        """
        engine = self._database.engine

        def begin(again: bool) -> int | None:
            identifier = begin_trial(engine, self._study_id, number, trial)
            newest = last_trial(engine, self._study_id) if identifier is None and again else None
            # Only the answer was lost, perhaps.
            return newest[0] if newest is not None and newest[1] == number else identifier

        identifier = self._database.insist(begin)
        if identifier is None:
            raise UserError(f"storage {self._storage}: another program writes trials into this study; end it and run again")
        self._identifiers[number] = identifier

    def begin_next(self) -> int:
        """Writes a trial without parameters as running; returns its number."""
        newest = self._database.patiently(lambda: last_trial(self._database.engine, self._study_id))
        number = 0 if newest is None else newest[1] + 1
        self.begin(number, create_trial(state=TrialState.RUNNING))
        return number

    def end(self, number: int, state: TrialState, attributes: Mapping[str, object], values: list[float] | None = None) -> None:
        """Ends a trial with all there is to say of it; attributes that are None are not written."""
        identifier = self._identifiers.get(number)
        if identifier is None:
            identifier = self._database.optuna.get_trial_id_from_study_id_trial_number(self._study_id, number)
        known = {name: value for name, value in attributes.items() if value is not None}
        self._database.patiently(lambda: end_trial(self._database.engine, identifier, state, known, values))
        self._identifiers.pop(number, None)

    def read(self, states: Collection[TrialState] | None = None, names: Collection[str] | None = None) -> Iterator[FrozenTrial]:
        """Trials by number, as the database has them; some hundred are in memory at a time.

        Args:
            states: Only those in these states.
            names: Only their user attributes of these names.
        """
        after = -1
        while some := self._some(after, states, names):
            yield from (trial for _, trial in some)
            after = some[-1][0]

    def _some(
        self, after: int, states: Collection[TrialState] | None, names: Collection[str] | None
    ) -> list[tuple[int, FrozenTrial]]:
        engine = self._database.engine
        # A database that is locked for writing can still be read.
        return self._database.insist(lambda _: read_trials(engine, self._study_id, after, states, names), proves=False)
