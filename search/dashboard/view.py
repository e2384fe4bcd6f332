"""Show Optuna's storage as its dashboard needs it, and change nothing in it.

What is known of a trial is stored as one attribute, which the dashboard would cut off; here it becomes a dozen. A collapsed
trial becomes infeasible. Controls cannot be chosen, so theirs lose their values: the dashboard would show random directions as
the best trials, and divides by the number of their parameters, which is 0.
"""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from search.store.trials import CONSTRAINTS, EVIDENCE

IDENTITY = ("kind", "base", "epoch", "alpha", "walk", "model", "of_trial", "temperature", "seed")
"""Attributes that say what a trial is; a point of the search space has five of them."""

PLAIN = ("forget_probability", "forget_rouge", "logit_scale")
"""Numbers that tables can be sorted by."""

ENDS = ("reason", "traceback", "pruned", "untested", "warm_start", "floor", "settings")

OF_SET = re.compile("(?P<set>[a-z_]+?)_(?P<name>exact_memorization|extraction_strength|log10_forget_quality)")
COMPONENT = re.compile("(?P<name>Prob|ROUGE|Truth Ratio) (?P<set>.+)")

TITLES = {
    "Prob": "probability",
    "Truth Ratio": "truth",
    "exact_memorization": "exact",
    "extraction_strength": "extraction",
    "log10_forget_quality": "log10 FQ",
}

HIDDEN = re.compile(
    "method|definition|dtype|device|seconds|batch_size|items_hash|collapsed|flagged|paired_p|update_norm|forget_quality|one_minus_.*"
)
"""Said elsewhere, or of no use there: the base run names the method, the study its definition, values their complement.
The dashboard breaks no line, and the page gets as wide as the longest."""


def named_attributes(facts: Mapping[str, Any], objectives: Collection[str], valued: bool) -> dict[str, Any]:
    """Return what is known of a trial as about a dozen attributes; those of evaluation sets are mappings.

    Args:
        facts: All that is known of it, with its evidence among it.
        objectives: Names of what the study maximises.
        valued: Whether the trial has values, which the dashboard shows by themselves.
    """
    own = () if valued else tuple(objectives)
    found = {name: facts[name] for name in (*IDENTITY, *ENDS) if facts.get(name) is not None}
    found.update({name: _rounded(facts[name], 5) for name in (*own, *PLAIN) if facts.get(name) is not None})
    flags = [f"collapsed: {facts['collapsed']}"] if facts.get("collapsed") else []
    flags += [name for name, value in facts.items() if value is True and name != "collapsed"]
    if flags:
        found["flags"] = "; ".join(flags)
    known = {name: value for name, value in facts.items() if not isinstance(value, Mapping)}
    for group in ("components", "forget_components"):
        known.update(facts[group] if isinstance(facts.get(group), Mapping) else {})
    groups: dict[str, dict[str, Any]] = {}
    for name, value in known.items():
        if name in found or name in objectives or isinstance(value, bool) or HIDDEN.fullmatch(name):
            continue
        place = COMPONENT.fullmatch(name) or OF_SET.fullmatch(name)
        item_set = "numbers" if place is None else place["set"].lower().replace(" ", "_")
        title = name if place is None else TITLES.get(place["name"], place["name"])
        groups.setdefault(item_set, {})[title] = _rounded(value)
    others = groups.pop("numbers", {})
    return {**found, **groups, **({"numbers": others} if others else {})}


def _rounded(value: Any, digits: int = 3) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


class StudyView:
    """A storage with the studies of this program shown as its dashboard needs them; everything else is passed through.

    Args:
        storage: The storage.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._kinds: dict[int, tuple[bool, bool, list[str]]] = {}

    def __getattr__(self, name: str) -> Any:
        """Return the storage's attribute."""
        if name in ("_storage", "__setstate__"):
            raise AttributeError(name)  # a copy in the making has none yet
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Sequence[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials of a study, as they are shown."""
        trials = [self._shown(study_id, trial) for trial in self._storage.get_all_trials(study_id, deepcopy=False)]
        return [trial for trial in trials if states is None or trial.state in states]

    def _shown(self, study_id: int, trial: FrozenTrial) -> FrozenTrial:
        ours, controls, objectives = self._kind(study_id)
        evidence = trial.user_attrs.get(EVIDENCE, {})
        if not ours or not isinstance(evidence, Mapping):
            return trial
        shown = copy.copy(trial)
        facts = {**{name: value for name, value in trial.user_attrs.items() if name != EVIDENCE}, **evidence}
        valued = trial.state == TrialState.COMPLETE
        if valued and controls:
            facts = {**facts, **dict(zip(objectives, trial.values, strict=False))}
            shown.state, valued = TrialState.PRUNED, False
            shown.values = None
        shown.user_attrs = named_attributes(facts, objectives, valued)
        if facts.get("collapsed"):
            shown.system_attrs = {**trial.system_attrs, CONSTRAINTS: [*trial.system_attrs.get(CONSTRAINTS, []), 1.0]}
        return shown

    def _kind(self, study_id: int) -> tuple[bool, bool, list[str]]:
        """Return whether a study is one of this program's, whether it is one of controls, and its objectives."""
        if study_id not in self._kinds:
            study = optuna.load_study(study_name=self._storage.get_study_name_from_id(study_id), storage=self._storage)
            ours = "fingerprint" in study.user_attrs
            self._kinds[study_id] = ours, ours and study.study_name.endswith(".controls"), study.metric_names or []
        return self._kinds[study_id]


# Code that asks for the type gets it; nothing of Optuna's own is inherited.
BaseStorage.register(StudyView)
