"""Read Optuna's databases in parts, with queries of its tables.

`BaseStorage.get_all_trials` builds all trials of a study at once, with several objects per attribute. At 10,000 trials that
takes a quarter of a minute and some 300 MB, even where only their states are wanted. Nothing is written here.

Everything the store assumes of Optuna beyond its documentation is pinned by ``tests/search/store/test_optuna_compat.py``.
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from math import inf
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from uipe_core.errors import UserError, first_line
from uipe_core.storage.files import require_whole_characters

Rows = Callable[[str, Mapping[str, Any]], list[Any]]
"""Answer a query that has parameters by name (``:name``)."""

SCHEMA = "v3.2.0.a"
"""Optuna's name of the tables that the queries are written for."""

_INFINITE = {"INF_POS": inf, "INF_NEG": -inf}

BATCH = 500
"""Trials that `read_trials` returns at most."""


def has_known_schema(rows: Rows) -> bool:
    """Return whether a database has the tables that the queries are written for."""
    return rows("SELECT version_num FROM alembic_version", {}) == [(SCHEMA,)]


def find_study(rows: Rows, name: str) -> int | None:
    """Return the storage's id of a study; None if it has none of this name."""
    found = rows("SELECT study_id FROM studies WHERE study_name = :name", {"name": name})
    return int(found[0][0]) if found else None


def study_facts(rows: Rows, study_id: int) -> tuple[dict[str, Any], list[str]]:
    """Return the attributes of a study, the system's own among them, and its directions by objective."""
    facts = {}
    for table in ("study_user_attributes", "study_system_attributes"):
        for key, value in rows(
            f"SELECT part.key, part.value_json FROM {table} AS part WHERE part.study_id = :study", {"study": study_id}
        ):
            try:
                facts[str(key)] = _from_json(value)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"attribute {key} of the study cannot be read ({first_line(error)})") from None
    directions = "SELECT direction FROM study_directions WHERE study_id = :study ORDER BY objective"
    return facts, [str(row[0]) for row in rows(directions, {"study": study_id})]


METRIC_NAMES = "study:metric_names"
"""Attribute of a study in which Optuna keeps the names of its objectives."""


def newest_trial(rows: Rows, study_id: int) -> tuple[int, int] | None:
    """Return the storage's id and the number of a study's newest trial; None if it has none."""
    query = "SELECT trial_id, number FROM trials WHERE study_id = :study ORDER BY trial_id DESC LIMIT 1"
    found = rows(query, {"study": study_id})
    return (int(found[0][0]), int(found[0][1])) if found else None


def read_trials(
    rows: Rows,
    study_id: int,
    after: int = -1,
    states: Collection[TrialState] | None = None,
    names: Collection[str] | None = None,
) -> list[tuple[int, FrozenTrial]]:
    """Read the next batch of a study's trials, in order, each with the storage's id of it.

    Args:
        rows: Asks the database of an `optuna.storages.RDBStorage`.
        study_id: The storage's id of the study.
        after: Ids up to this one are left out: the last id of the batch before.
        states: Only trials in these states; None for all.
        names: Only these user attributes; None for all.

    Returns:
        At most `BATCH` trials without intermediate values, as Optuna would have read them; none if there are no more.
    """
    # Names of states stand in the query itself: PostgreSQL compares its type for them with literals, not with texts.
    among = "" if states is None else f"AND state IN ({', '.join(repr(state.name) for state in states)})"
    trials = rows(
        "SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials "
        f"WHERE study_id = :study AND trial_id > :after {among} ORDER BY trial_id LIMIT {BATCH}",
        {"study": study_id, "after": after},
    )
    if not trials:
        return []
    # The state before the rest: a trial that ends between two queries has all of it, and counts as running at worst.
    span = {"first": trials[0][0], "last": trials[-1][0]}
    own = {trial[0] for trial in trials}

    def parts(table: str, columns: str, order: str = "", named: Collection[str] | None = None) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {identifier: [] for identifier in own}
        if named is not None and not named:
            return found
        keys = {f"key{index}": name for index, name in enumerate(named or ())}
        only = f"AND part.key IN ({', '.join(f':{key}' for key in keys)})" if keys else ""
        # A name that is reserved in MySQL, as `key` is, needs no quotes behind a dot.
        source = f"{table} AS part WHERE part.trial_id BETWEEN :first AND :last"
        query = f"SELECT part.trial_id, {columns} FROM {source} {only} {order}"
        for identifier, *part in rows(query, {**span, **keys}):
            if identifier in own:
                found[identifier].append(part)
        return found

    given = parts("trial_params", "param_name, distribution_json, param_value", "ORDER BY param_id")
    values = parts("trial_values", "value, value_type", "ORDER BY objective")
    user = parts("trial_user_attributes", "part.key, part.value_json", named=names)
    system = parts("trial_system_attributes", "part.key, part.value_json")
    found = []
    for trial in trials:
        try:
            found.append((trial[0], _trial(trial, *(part[trial[0]] for part in (given, values, user, system)))))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            what = f"trial {trial[1]} cannot be read ({type(error).__name__}: {first_line(error)})"
            raise UserError(f"{what}; `uipe doctor` lists what is wrong, restore the database from a copy") from None
    return found


def _trial(row: Any, parameters: list[Any], values: list[Any], user: list[Any], system: list[Any]) -> FrozenTrial:
    identifier, number, state, start, complete = row
    # SQLite keeps whatever is written into a column, of any type.
    numbers = [*(value for value, _ in values), *(value for _, _, value in parameters)]
    if not isinstance(number, int) or any(not isinstance(each, int | float | None) for each in numbers):
        raise ValueError(f"number {number!r}, with the values and parameters {numbers}")
    given = {sys.intern(name): (_distribution(text), value) for name, text, value in parameters}
    return FrozenTrial(
        number=number,
        state=TrialState[state],
        value=None,
        values=[_INFINITE.get(kind, value) for value, kind in values] or None,
        datetime_start=_local(start),
        datetime_complete=_local(complete),
        params={name: distribution.to_external_repr(value) for name, (distribution, value) in given.items()},
        distributions={name: distribution for name, (distribution, _) in given.items()},
        user_attrs={sys.intern(key): _from_json(text) for key, text in user},
        system_attrs={sys.intern(key): _from_json(text) for key, text in system},
        intermediate_values={},
        trial_id=identifier,
    )


@lru_cache
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _from_json(text: str) -> Any:
    """Parse JSON; names that trial after trial has are kept in memory once. Half of a surrogate pair is a ValueError."""
    found = json.loads(text, object_pairs_hook=_interned) if text.startswith("{") else json.loads(text)
    if "\\ud" in text.lower():
        require_whole_characters(found)
    return found


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {sys.intern(name): value for name, value in pairs}


def _local(time: datetime | str | None) -> datetime | None:
    """Convert a time of the database (UTC without a zone) to one of Optuna's trials (local without a zone).

    SQLite has no type for times: its own are texts.
    """
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return None if time is None else time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
