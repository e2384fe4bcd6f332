"""All attributes of a trial in one transaction: Optuna's storages write them one by one, each with a transaction of its own.

For some thirty attributes that is thirty times the price of one, and the greater part of what a trial costs its driver.
"""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, Integer, String, column, delete, insert, table

# The schema Optuna keeps its databases to; it refuses one of another version when it opens it.
_ATTRIBUTES = table("trial_user_attributes", column("trial_id", Integer), column("key", String), column("value_json", String))


def write_attributes(engine: Engine, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Sets user attributes of a trial: all of them or, if anything fails, none. Writing them again changes nothing.

    Unlike Optuna's own it does not ask whether the trial is still running; its caller is the only one who ends trials.

    Args:
        engine: The database of an `optuna.storages.RDBStorage`.
        trial_id: The storage's own id of the trial.
        attributes: JSON-able values by name. Those that the trial has under other names stay.
    """
    if not attributes:
        return
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    with engine.begin() as connection:
        same = (_ATTRIBUTES.c.trial_id == trial_id) & _ATTRIBUTES.c.key.in_(list(attributes))
        connection.execute(delete(_ATTRIBUTES).where(same))
        connection.execute(insert(_ATTRIBUTES), rows)
