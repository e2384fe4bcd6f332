"""A trial in the database: written whole at its beginning and at its end, in one transaction each, and read in parts.

Optuna's storages write attributes, values and state one by one, each with a transaction or several questions of its own. For
a trial with some thirty attributes that costs its driver more than all the rest, and leaves moments in which half of it is
there. They read all of every trial, and keep it. What is written here is what Optuna would have written, and what is read
here is what Optuna would have read, or as much of it as is asked for.
"""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from math import inf
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Enum,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    insert,
    select,
    update,
)

from search.store.database import Database
from uipe_core.errors import UserError

# The schema Optuna keeps its databases to; it refuses one of another version when it opens it.
_SCHEMA = MetaData()

_TRIALS = Table(
    "trials",
    _SCHEMA,
    Column("trial_id", Integer, primary_key=True),
    Column("number", Integer),
    Column("study_id", Integer),
    Column("state", Enum(TrialState)),
    Column("datetime_start", DateTime),
    Column("datetime_complete", DateTime),
)

_PARAMETERS = Table(
    "trial_params",
    _SCHEMA,
    Column("param_id", Integer, primary_key=True),
    Column("trial_id", Integer),
    Column("param_name", String),
    Column("param_value", Float),
    Column("distribution_json", String),
)

_VALUES = Table(
    "trial_values",
    _SCHEMA,
    Column("trial_id", Integer),
    Column("objective", Integer),
    Column("value", Float),
    Column("value_type", Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")),
)

_USER, _SYSTEM = (
    Table(name, _SCHEMA, Column("trial_id", Integer), Column("key", String), Column("value_json", String))
    for name in ("trial_user_attributes", "trial_system_attributes")
)

_OPEN = (TrialState.RUNNING, TrialState.WAITING)

_INFINITE = {"INF_POS": inf, "INF_NEG": -inf}

READ_AT_ONCE = 500
"""Trials of one answer of `read_trials`."""


def last_trial(engine: Engine, study_id: int) -> tuple[int, int] | None:
    """The storage's own id and the number of a study's newest trial; None if it has none."""
    with engine.connect() as connection:
        return _last(connection, study_id)


def read_trials(
    engine: Engine,
    study_id: int,
    after: int = -1,
    states: Collection[TrialState] | None = None,
    names: Collection[str] | None = None,
) -> list[tuple[int, FrozenTrial]]:
    """Some trials of a study, in order, each with the storage's own id of it.

    Args:
        engine: The database of an `optuna.storages.RDBStorage`.
        study_id: The storage's own id of the study.
        after: Ids up to this one are left out. The next trials are those after the last that were read.
        states: Trials in other states are left out; None leaves none out.
        names: User attributes that are read; None reads all.

    Returns:
        At most `READ_AT_ONCE`; none if there are no more. Intermediate values, which none of ours has, are not read.
    """
    wanted = select(_TRIALS).where(_TRIALS.c.study_id == study_id, _TRIALS.c.trial_id > after)
    if states is not None:
        wanted = wanted.where(_TRIALS.c.state.in_(states))
    with engine.connect() as connection:
        # The state before the rest: a trial that ends between two questions has all of it, and is called running at worst.
        rows = connection.execute(wanted.order_by(_TRIALS.c.trial_id).limit(READ_AT_ONCE)).all()
        if not rows:
            return []
        parts: list[dict[int, list[Any]]] = []
        for table in (_PARAMETERS, _VALUES, _USER, _SYSTEM):
            theirs = select(table).where(table.c.trial_id.between(rows[0].trial_id, rows[-1].trial_id))
            if table is _USER and names is not None:
                theirs = theirs.where(table.c.key.in_(names))
            found: dict[int, list[Any]] = {row.trial_id: [] for row in rows}
            for part in connection.execute(theirs):
                if part.trial_id in found:
                    found[part.trial_id].append(part)
            parts.append(found)
    return [(row.trial_id, _trial(row, *(found[row.trial_id] for found in parts))) for row in rows]


def _trial(row: Any, parameters: list[Any], values: list[Any], user: list[Any], system: list[Any]) -> FrozenTrial:
    parameters.sort(key=lambda part: part.param_id)
    told = {sys.intern(part.param_name): (_distribution(part.distribution_json), part.param_value) for part in parameters}
    values.sort(key=lambda part: part.objective)
    return FrozenTrial(
        number=row.number,
        state=row.state,
        value=None,
        values=[_INFINITE.get(part.value_type, part.value) for part in values] or None,
        datetime_start=_local(row.datetime_start),
        datetime_complete=_local(row.datetime_complete),
        params={name: distribution.to_external_repr(value) for name, (distribution, value) in told.items()},
        distributions={name: distribution for name, (distribution, _) in told.items()},
        user_attrs={sys.intern(part.key): _from_json(part.value_json) for part in user},
        system_attrs={sys.intern(part.key): _from_json(part.value_json) for part in system},
        intermediate_values={},
        trial_id=row.trial_id,
    )


@lru_cache
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _from_json(text: str) -> Any:
    """As `json.loads`; names that trial after trial has are kept once."""
    return json.loads(text, object_pairs_hook=_interned) if text.startswith("{") else json.loads(text)


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {sys.intern(name): value for name, value in pairs}


def begin_trial(engine: Engine, study_id: int, number: int, trial: FrozenTrial) -> int | None:
    """Writes a running trial with its parameters and attributes.

    Args:
        engine: The database of an `optuna.storages.RDBStorage`.
        study_id: The storage's own id of the study.
        number: Of the trial: one more than that of the newest.
        trial: What is written.

    Returns:
        The storage's own id of the trial; None, and nothing is written, if the study has one of this or a higher number.
    """
    with engine.begin() as connection:
        newest = _last(connection, study_id)
        if newest is not None and newest[1] >= number:
            return None
        facts = {"number": number, "study_id": study_id, "state": TrialState.RUNNING, "datetime_start": _now()}
        key = connection.execute(insert(_TRIALS).values(facts)).inserted_primary_key
        assert key is not None
        identifier = int(key[0])
        parameters = [
            {
                "trial_id": identifier,
                "param_name": name,
                "param_value": trial.distributions[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(trial.distributions[name]),
            }
            for name, value in trial.params.items()
        ]
        if parameters:
            connection.execute(insert(_PARAMETERS), parameters)
        _write(connection, _USER, identifier, trial.user_attrs)
        _write(connection, _SYSTEM, identifier, trial.system_attrs)
    return identifier


def end_trial(
    engine: Engine, trial_id: int, state: TrialState, attributes: Mapping[str, Any], values: Sequence[float] | None = None
) -> None:
    """Ends a trial with all there is to say of it: everything or, if anything fails, nothing. Doing it again changes nothing.

    Args:
        engine: The database of an `optuna.storages.RDBStorage`.
        trial_id: The storage's own id of the trial.
        state: How it ended.
        attributes: JSON-able values of user attributes by name. Those that the trial has under other names stay.
        values: Its objectives, finite; None where it has none.

    Raises:
        UpdateFinishedTrialError: It has ended otherwise.
    """
    with engine.begin() as connection:
        ended = update(_TRIALS).where(_TRIALS.c.trial_id == trial_id, _TRIALS.c.state.in_(_OPEN))
        if not connection.execute(ended.values(state=state, datetime_complete=_now())).rowcount:
            found = connection.execute(select(_TRIALS.c.state).where(_TRIALS.c.trial_id == trial_id)).scalar_one_or_none()
            if found != state:
                raise UpdateFinishedTrialError(f"trial {trial_id} of the storage cannot end {state.name}: it is {found}")
            return
        if attributes:
            same = (_USER.c.trial_id == trial_id) & _USER.c.key.in_(list(attributes))
            connection.execute(delete(_USER).where(same))
            _write(connection, _USER, trial_id, attributes)
        if values is not None:
            rows = [
                {"trial_id": trial_id, "objective": objective, "value": value, "value_type": "FINITE"}
                for objective, value in enumerate(values)
            ]
            connection.execute(insert(_VALUES), rows)


def _last(connection: Connection, study_id: int) -> tuple[int, int] | None:
    newest = select(_TRIALS.c.trial_id, _TRIALS.c.number).where(_TRIALS.c.study_id == study_id)
    row = connection.execute(newest.order_by(_TRIALS.c.trial_id.desc()).limit(1)).first()
    return None if row is None else (int(row[0]), int(row[1]))


def _write(connection: Connection, table: Table, trial_id: int, attributes: Mapping[str, Any]) -> None:
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    if rows:
        connection.execute(insert(table), rows)


def _now() -> datetime:
    """As Optuna's databases have times: UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def _local(time: datetime | None) -> datetime | None:
    """As Optuna's trials have times: of this machine's zone, without saying so."""
    return None if time is None else time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


class TrialTable:
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
        newest = self._database.with_retry(lambda: last_trial(self._database.engine, self._study_id))
        number = 0 if newest is None else newest[1] + 1
        self.begin(number, create_trial(state=TrialState.RUNNING))
        return number

    def end(self, number: int, state: TrialState, attributes: Mapping[str, object], values: list[float] | None = None) -> None:
        """Ends a trial with all there is to say of it; attributes that are None are not written."""
        identifier = self._identifiers.get(number)
        if identifier is None:
            identifier = self._database.optuna.get_trial_id_from_study_id_trial_number(self._study_id, number)
        known = {name: value for name, value in attributes.items() if value is not None}
        self._database.with_retry(lambda: end_trial(self._database.engine, identifier, state, known, values))
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
