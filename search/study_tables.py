"""The trials of a study as tables."""

from collections.abc import Sequence

import optuna
import pandas as pd
from optuna.trial import TrialState


def evidence_table(study: optuna.Study, objectives: Sequence[str]) -> pd.DataFrame:
    """A row per complete trial: ``trial``, its evidence with components as columns of their own, and its objectives by name."""
    rows = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        facts = dict(trial.user_attrs)
        facts.update(facts.pop("components", {}))
        facts.update(facts.pop("forget_components", {}))
        facts.update(zip(objectives, trial.values, strict=True))
        rows.append({"trial": trial.number, **facts})
    return pd.DataFrame(rows)


def certificate_table(study: optuna.Study) -> pd.DataFrame:
    """A row per pruned trial with what is known of it: ``pruned`` is its certificate (`search.pruning`)."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    # Another program may prune trials of a study in a database; those have no certificate, and are none of ours.
    return pd.DataFrame([{"trial": trial.number, **trial.user_attrs} for trial in trials if "pruned" in trial.user_attrs])


def searched(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table of trials that are the search's own, not given."""
    return table[table["kind"] == "search"] if len(table) else pd.DataFrame(columns=["kind", "base"])
