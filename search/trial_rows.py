"""A trial in the database: written whole at its beginning and at its end, in one transaction each.

Optuna's storages write attributes, values and state one by one, each with a transaction or several questions of its own. For
a trial with some thirty attributes that costs its driver more than all the rest, and leaves moments in which half of it is
there. What is written here is what Optuna would have written, and Optuna reads it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
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


def last_trial(engine: Engine, study_id: int) -> tuple[int, int] | None:
    """The storage's own id and the number of a study's newest trial; None if it has none."""
    with engine.connect() as connection:
        return _last(connection, study_id)


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
