"""Write a study's trials through Optuna's storage interface, and read them in parts.

What is known when a trial begins goes into its creation, in one transaction. When it ends, its evidence follows as one
attribute, then its state with its values. An attribute of its own would cost each of some thirty facts a transaction.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.problem.pareto import non_dominated_from
from search.problem.trial import INITIAL
from search.store import optuna_compat
from uipe_core.errors import UserError

if TYPE_CHECKING:
    from search.store.database import Database

SHOWN_FIRST = ("definition", "logit_scale", "collapsed", "ks_statistic", "components")
"""Evidence that the dashboard should show: it cuts an attribute off after 1024 characters."""

EVIDENCE = "evidence"
"""The attribute that holds everything else that is known of a trial."""

CONSTRAINTS = "constraints"
"""System attribute in which Optuna and its dashboard look for constraints; at most 0 is feasible."""

READABLE = frozenset(("kind", "base", "method", "epoch", "alpha", "walk", "collapsed", "reason", "traceback"))
"""Attributes of their own, as are flags that are set, for those who read the dashboard: it cuts long values."""

INTERRUPTED = "interrupted: the run that started this trial ended before it finished"

WRITTEN_TWICE = "written twice: the database did not confirm the first time"


def is_interrupted(trial: FrozenTrial) -> bool:
    """Return True for a trial that did not fail by itself: its run ended first, and the next one makes up for it."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == INTERRUPTED


class TrialReader:
    """Trials of a study, read in parts.

    Args:
        rows: Asks the database.
        study_id: The storage's id of the study.
    """

    def __init__(self, rows: optuna_compat.Rows, study_id: int) -> None:
        self._rows = rows
        self._study_id = study_id

    def newest(self) -> tuple[int, int] | None:
        """Return the storage's id and the number of the newest trial; None if there is none."""
        return optuna_compat.newest_trial(self._rows, self._study_id)

    def read(self, states: Collection[TrialState] | None = None, names: Collection[str] | None = None) -> Iterator[FrozenTrial]:
        """Yield trials by number, their evidence among their user attributes; some hundred are in memory at a time.

        Args:
            states: Only trials in these states.
            names: Only user attributes of these names.
        """
        asked = names if names is None or READABLE.issuperset(names) else {*names, EVIDENCE}
        after = -1
        while batch := optuna_compat.read_trials(self._rows, self._study_id, after, states, asked):
            after = batch[-1][0]
            for _, trial in batch:
                attributes = trial.user_attrs
                evidence = attributes.pop(EVIDENCE, {})
                if not isinstance(evidence, dict):
                    raise damaged(trial.number, f"{EVIDENCE} is no mapping")
                attributes.update(evidence)
                if names is not None:
                    trial.user_attrs = {name: value for name, value in attributes.items() if name in names}
                yield trial


class TrialTable:
    """Trials of a study, written by the only one who writes them.

    Args:
        database: Where the study is stored.
        study_id: The storage's id of the study.
        storage: The database's name in errors.

    Attributes:
        trials: The study's trials, to be read.
    """

    def __init__(self, database: "Database", study_id: int, storage: str) -> None:
        self.trials = TrialReader(database.rows, study_id)
        self._database = database
        self._name = storage
        self._study_id = study_id
        self._begun: dict[int, tuple[int, Mapping[str, Any]]] = {}

    def begin(self, number: int, trial: FrozenTrial) -> int:
        """Write a running trial with its parameters and attributes.

        Args:
            number: The number it should get.
            trial: What is written.

        Returns:
            Its number. A higher one than asked for if an answer of the database was lost and Optuna wrote the trial again.

        Raises:
            UserError: If another program writes trials into the study.
        """

        def create(again: bool) -> int:
            newest = self.trials.newest() if again else None
            # Perhaps only the answer was lost.
            if newest is not None and newest[1] == number:
                return newest[0]
            return self._database.backend.create_new_trial(self._study_id, trial)

        identifier = self._database.with_retry(create)
        if self.trials.newest() != (identifier, number):
            number = self._number_of_twin(number, identifier, trial)
        self._begun[number] = (identifier, trial.user_attrs)
        return number

    def begin_next(self, attributes: Mapping[str, Any]) -> int:
        """Write a running trial without parameters; returns its number."""
        newest = self.trials.newest()
        number = 0 if newest is None else newest[1] + 1
        return self.begin(number, create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes)))

    def end(
        self,
        number: int,
        state: TrialState,
        attributes: Mapping[str, object],
        values: list[float] | None = None,
        constraint: float | None = None,
    ) -> None:
        """Write what is known of a trial, then its state with its values. Ending it in the same state again changes nothing.

        Args:
            number: The trial.
            state: How it ended.
            attributes: JSON-able values by name; None is not written.
            values: Its objectives, finite; None where it has none.
            constraint: Above 0 where the trial is infeasible; None where nothing is constrained.

        Raises:
            UpdateFinishedTrialError: If it has ended in another state.
        """
        storage = self._database.optuna
        identifier, written = self._begun.get(number, (None, {}))
        if identifier is None:
            identifier = storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        known = {name: value for name, value in attributes.items() if value is not None}
        own = {name: known.pop(name) for name in [*known] if name in READABLE or known[name] is True}
        evidence = {name: value for name, value in known.items() if written.get(name) != value}
        evidence = {name: evidence[name] for name in (*SHOWN_FIRST, *evidence) if name in evidence}
        try:
            for name, value in own.items():
                if written.get(name) != value:
                    storage.set_trial_user_attr(identifier, name, value)
            if evidence:
                storage.set_trial_user_attr(identifier, EVIDENCE, evidence)
            if constraint is not None:
                # A list, as before Optuna 5, which reads both: the dashboard knows no other.
                storage.set_trial_system_attr(identifier, CONSTRAINTS, [constraint])
            storage.set_trial_state_values(identifier, state, values)
        except UpdateFinishedTrialError:
            if storage.get_trial(identifier).state != state:
                raise
        self._begun.pop(number, None)

    def _number_of_twin(self, number: int, identifier: int, trial: FrozenTrial) -> int:
        """Return the number of a trial that got another than it should; fail what Optuna's own retries wrote before it."""
        storage = self._database.optuna
        while True:
            found = storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
            if found == identifier:
                return number
            twin = storage.get_trial(found)
            if (twin.state, twin.params, twin.user_attrs) != (TrialState.RUNNING, trial.params, trial.user_attrs):
                break
            self._begun[number] = (found, {})
            self.end(number, TrialState.FAIL, {"reason": WRITTEN_TWICE})
            number += 1
        reason = "another program writes trials into this study"
        storage.set_trial_user_attr(identifier, "reason", reason)
        storage.set_trial_state_values(identifier, TrialState.FAIL)
        raise UserError(f"storage {self._name}: {reason}; end it and run again")


def evidence_table(
    trials: Iterable[FrozenTrial],
    objectives: Sequence[str],
    names: Collection[str] | None = None,
    controls: bool = False,
) -> pd.DataFrame:
    """Return a row per complete trial: ``trial``, its evidence with components as columns of their own, its objectives.

    Args:
        trials: The trials.
        objectives: Names of the study's objectives.
        names: The attributes that were read; None for all.
        controls: Whether they are controls, which need not have a place in the search space.

    Raises:
        UserError: A trial lacks what every complete one has: somebody else wrote it, or the database is damaged.
    """
    rows = []
    for trial in trials:
        complete = trial.state == TrialState.COMPLETE
        if complete and (flaw := evidence_flaw(trial, objectives, names, controls)) is not None:
            raise damaged(trial.number, flaw)
        facts = dict(trial.user_attrs)
        facts.update(facts.pop("components", {}))
        facts.update(facts.pop("forget_components", {}))
        facts.update(zip(objectives, trial.values, strict=True) if complete else ())
        rows.append({"trial": trial.number, **facts})
    return pd.DataFrame(rows)


PLACE = {"base": str, "epoch": int, "alpha": int | float}
"""What says where a point is in the search space."""


def evidence_flaw(
    trial: FrozenTrial, objectives: Sequence[str], names: Collection[str] | None = None, controls: bool = False
) -> str | None:
    """Return what a complete trial lacks, of what every one has; None for a sound one. Arguments as `evidence_table`."""
    values, facts = trial.values or [], trial.user_attrs
    if len(values) != len(objectives) or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return f"it has the values {values}, and needs a finite one of each of {', '.join(objectives)}"
    for name, kind in {"kind": str, **({} if controls else PLACE)}.items():
        if (names is None or name in names) and not isinstance(facts.get(name), kind):
            return f"its attribute {name} is {facts.get(name)!r}"
    if "of_trial" in facts and not (isinstance(facts["of_trial"], int) and 0 <= facts["of_trial"] < 2**31):
        return f"its attribute of_trial is {facts['of_trial']!r}"
    for name in ("components", "forget_components"):
        if not isinstance(facts.get(name, {}), dict):
            return f"its attribute {name} is no mapping"
    for name, value in zip(objectives, values, strict=True):
        if name in facts and facts[name] != value:
            return f"it has {value!r} as {name}, and {facts[name]!r} among its evidence"
    return None


def damaged(number: int, flaw: str) -> UserError:
    """Return the error of a trial that is not as its driver wrote it."""
    return UserError(f"trial {number} is damaged: {flaw}; `uipe doctor` lists what is wrong, restore the database from a copy")


def on_front(trials: pd.DataFrame, controls: pd.DataFrame, objectives: Sequence[str]) -> NDArray[np.bool_]:
    """Return which trials are on the Pareto front: no other trial dominates them, and they beat the initial model somewhere.

    Before the initial model is scored, trials are compared with each other alone.

    Args:
        trials, controls: Tables of a study.
        objectives: Names of its objectives.
    """
    initial = controls[controls["kind"] == INITIAL] if "kind" in controls else controls
    start = None if initial.empty else initial.iloc[0][list(objectives)].to_numpy(dtype=float)
    return non_dominated_from(trials[list(objectives)].to_numpy(dtype=float), start)


def searched(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table of trials that the sampler proposed."""
    return table[table["kind"] == "search"] if len(table) else pd.DataFrame(columns=["kind", "base"])


def collapsed(table: pd.DataFrame) -> pd.Series:
    """Return which rows of a table have collapsed: none of a study that was scored before collapse was looked for."""
    if "collapsed" not in table:
        return pd.Series(False, index=table.index)
    return table["collapsed"].map(lambda reason: isinstance(reason, str)).astype(bool)
