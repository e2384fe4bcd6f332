"""The trials of a study as tables."""

from collections.abc import Iterable, Sequence

import pandas as pd
from optuna.trial import FrozenTrial


def evidence_table(trials: Iterable[FrozenTrial], objectives: Sequence[str]) -> pd.DataFrame:
    """A row per complete trial: ``trial``, its evidence with components as columns of their own, and its objectives by name."""
    rows = []
    for trial in trials:
        facts = dict(trial.user_attrs)
        facts.update(facts.pop("components", {}))
        facts.update(facts.pop("forget_components", {}))
        facts.update(zip(objectives, trial.values, strict=True))
        rows.append({"trial": trial.number, **facts})
    return pd.DataFrame(rows)


def certificate_table(trials: Iterable[FrozenTrial]) -> pd.DataFrame:
    """A row per pruned trial with what is known of it: ``pruned`` is its certificate (`search.evaluation.pruning`)."""
    # Another program may prune trials of a study in a database; those have no certificate, and are none of ours.
    return pd.DataFrame([{"trial": trial.number, **trial.user_attrs} for trial in trials if "pruned" in trial.user_attrs])


def searched(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table of trials that are the search's own, not given."""
    return table[table["kind"] == "search"] if len(table) else pd.DataFrame(columns=["kind", "base"])
