"""Read Optuna's databases in parts, through the tables that Optuna itself declares.

`BaseStorage.get_all_trials` builds all trials of a study at once, with several objects per attribute. At 10,000 trials that
takes a quarter of a minute and some 300 MB, even where only their states are wanted. Nothing is written here.

Everything the store assumes of Optuna beyond its documentation is pinned by ``tests/search/store/test_optuna_compat.py``.
"""

import json
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from functools import lru_cache
from math import inf
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, select

_TRIALS, _PARAMETERS, _VALUES, _USER, _SYSTEM = (
    model.__table__
    for model in (
        models.TrialModel,
        models.TrialParamModel,
        models.TrialValueModel,
        models.TrialUserAttributeModel,
        models.TrialSystemAttributeModel,
    )
)

_INFINITE = {"INF_POS": inf, "INF_NEG": -inf}

BATCH = 500
"""Trials that `read_trials` returns at most."""


def newest_trial(engine: Engine, study_id: int) -> tuple[int, int] | None:
    """Return the storage's id and the number of a study's newest trial; None if it has none."""
    newest = select(_TRIALS.c.trial_id, _TRIALS.c.number).where(_TRIALS.c.study_id == study_id)
    with engine.connect() as connection:
        row = connection.execute(newest.order_by(_TRIALS.c.trial_id.desc()).limit(1)).first()
    return None if row is None else (int(row[0]), int(row[1]))


def read_trials(
    engine: Engine,
    study_id: int,
    after: int = -1,
    states: Collection[TrialState] | None = None,
    names: Collection[str] | None = None,
) -> list[tuple[int, FrozenTrial]]:
    """Read the next batch of a study's trials, in order, each with the storage's id of it.

    Args:
        engine: The database of an `optuna.storages.RDBStorage`.
        study_id: The storage's id of the study.
        after: Ids up to this one are left out: the last id of the batch before.
        states: Only trials in these states; None for all.
        names: Only these user attributes; None for all.

    Returns:
        At most `BATCH` trials without intermediate values, as Optuna would have read them; none if there are no more.
    """
    wanted = select(_TRIALS).where(_TRIALS.c.study_id == study_id, _TRIALS.c.trial_id > after)
    if states is not None:
        wanted = wanted.where(_TRIALS.c.state.in_(states))
    with engine.connect() as connection:
        # The state before the rest: a trial that ends between two queries has all of it, and counts as running at worst.
        rows = connection.execute(wanted.order_by(_TRIALS.c.trial_id).limit(BATCH)).all()
        if not rows:
            return []
        parts: list[dict[int, list[Any]]] = []
        for table in (_PARAMETERS, _VALUES, _USER, _SYSTEM):
            found: dict[int, list[Any]] = {row.trial_id: [] for row in rows}
            parts.append(found)
            if table is _USER and names is not None and not names:
                continue
            query = select(table).where(table.c.trial_id.between(rows[0].trial_id, rows[-1].trial_id))
            if table is _USER and names is not None:
                query = query.where(table.c.key.in_(names))
            for part in connection.execute(query):
                if part.trial_id in found:
                    found[part.trial_id].append(part)
    return [(row.trial_id, _trial(row, *(found[row.trial_id] for found in parts))) for row in rows]


def _trial(row: Any, parameters: list[Any], values: list[Any], user: list[Any], system: list[Any]) -> FrozenTrial:
    parameters.sort(key=lambda part: part.param_id)
    given = {sys.intern(part.param_name): (_distribution(part.distribution_json), part.param_value) for part in parameters}
    values.sort(key=lambda part: part.objective)
    return FrozenTrial(
        number=row.number,
        state=row.state,
        value=None,
        values=[_INFINITE.get(part.value_type.name, part.value) for part in values] or None,
        datetime_start=_local(row.datetime_start),
        datetime_complete=_local(row.datetime_complete),
        params={name: distribution.to_external_repr(value) for name, (distribution, value) in given.items()},
        distributions={name: distribution for name, (distribution, _) in given.items()},
        user_attrs={sys.intern(part.key): _from_json(part.value_json) for part in user},
        system_attrs={sys.intern(part.key): _from_json(part.value_json) for part in system},
        intermediate_values={},
        trial_id=row.trial_id,
    )


@lru_cache
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _from_json(text: str) -> Any:
    """Parse JSON; names that trial after trial has are kept in memory once."""
    return json.loads(text, object_pairs_hook=_interned) if text.startswith("{") else json.loads(text)


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {sys.intern(name): value for name, value in pairs}


def _local(time: datetime | None) -> datetime | None:
    """Convert a time of the database (UTC without a zone) to one of Optuna's trials (local without a zone)."""
    return None if time is None else time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
