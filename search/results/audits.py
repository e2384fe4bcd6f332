"""Read what audits found: which trials to audit, the audit table, and the trial that is strongest after the worst of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from optuna.trial import TrialState

from search.evaluation.controls import CONTROLS
from search.problem.trial import AUDITS as TESTS
from search.problem.trial import INITIAL, RETAIN, UNTESTED, TrialSpec
from uipe_core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from search.results.study_result import StudyResult

AUDITS = {kind: control.audit for kind, control in CONTROLS.items() if control.audit is not None}

NOT_TESTED = "not tested"

RECOVERED = "recovered"
"""Key of the share of forgetting that an attack undid."""


def audit_kinds(tests: Sequence[str]) -> list[str]:
    """Return the kinds of control that some tests consist of.

    Raises:
        UserError: There is no such test.
    """
    for name in tests:
        if name not in TESTS:
            raise UserError(f"--tests: {name!r} is none of {', '.join(TESTS)}.{did_you_mean(name, list(TESTS))}")
    return [kind for name in dict.fromkeys(tests) for kind in TESTS[name]]


def audit_jobs(result: "StudyResult", trials: Sequence[int], top: int | None, tests: Sequence[str]) -> list[TrialSpec]:
    """Return the audits of some trials, of the initial model and of the retain model, whether they are done or not.

    Args:
        result: The study.
        trials: Numbers of complete trials; none for the finalists.
        top: How many finalists; None is the study's own number.
        tests: Names of `search.problem.trial.AUDITS`; none for the study's own, or all that the corpus allows.

    Raises:
        UserError: An unknown test or trial, nothing to audit, or a test named that the corpus has no items for.
    """
    section = result.spec.audit
    if top is None:
        top = 3 if section is None else section.top
    if top < 1:
        raise UserError(f"--top: {top} is too few; give at least 1")
    named = tuple(tests) or (() if section is None else section.tests)
    kinds, lacking = [], {}
    for kind in audit_kinds(named or tuple(TESTS)):
        missing = why_not(result, kind)
        if missing is None:
            kinds.append(kind)
        else:
            lacking[kind] = missing
    if tests and lacking and not kinds:
        raise UserError("; ".join(f"{AUDITS[kind].title}: {why}" for kind, why in lacking.items()))
    rows = [result.trial(number) for number in trials] or [row for _, row in result.finalists(top).iterrows()]
    if not rows:
        raise UserError(f"{result.out}: nothing to audit: no trial beats the initial model, or those that do have collapsed")
    points: list[dict[str, Any]] = [
        {"base": row["base"], "epoch": int(row["epoch"]), "alpha": float(row["alpha"]), "of_trial": int(row["trial"])}
        for row in rows
    ]
    compared = [{"model": name} for name in (INITIAL, RETAIN) if name == INITIAL or has_retain_weights(result)]
    # Model by model, so that a worker moves or loads each once for all its audits.
    return [TrialSpec(kind, **place) for place in [*points, *compared] for kind in kinds]


def why_not(result: "StudyResult", kind: str) -> str | None:
    """Return why an audit cannot be done in a study; None where it can."""
    if result.spec.corpus.task not in AUDITS[kind].tasks:
        return "needs answers that are texts, and this study scores letters"
    missing = [name for name in AUDITS[kind].needs if name not in result.store.record.corpus.items["select"]]
    return f"needs {', '.join(missing)} items, and the corpus has none" if missing else None


def has_retain_weights(result: "StudyResult") -> bool:
    """Return True if the study has scored a retain model, and not its evaluation log alone."""
    return result.control(RETAIN) is not None and not str(getattr(result.spec.model, "retain", "")).endswith(".json")


def audit_table(result: "StudyResult") -> pd.DataFrame:
    """Return the audits of a study, a row per number of an audit.

    Columns: ``kind``, ``audit`` (its title), ``number`` (its title), ``key``, ``places``; then by model its value, NaN where
    nothing was measured: ``initial``, ``retain``, and the number of every trial that was audited. Rows of every audit are
    there, done or not.
    """
    done = result.controls[result.controls["kind"].isin(AUDITS)] if len(result.controls) else result.controls
    trials = sorted({int(number) for number in done["of_trial"].dropna()}) if len(done) and "of_trial" in done else []
    rows = []
    for kind, audit in AUDITS.items():
        own = done[done["kind"] == kind] if len(done) else done
        by_model: dict[Any, pd.Series] = {}
        for _, row in own.iterrows():
            by_model[row["model"] if pd.isna(row["of_trial"]) else int(row["of_trial"])] = row
        for key, title, places in _numbers(result, audit):
            models: list[Any] = [INITIAL, RETAIN, *trials]
            values = {name: _value(result, kind, key, name, by_model.get(name)) for name in models}
            facts: dict[Any, Any] = {"kind": kind, "audit": audit.title, "number": title, "key": key, "places": places}
            rows.append({**facts, **values})
    return pd.DataFrame(rows)


def _numbers(result: "StudyResult", audit: Any) -> list[tuple[str, str, int]]:
    if audit.measured is not None:
        return [(each.key, each.title, each.places) for each in audit.numbers]
    shown = [(each.name, each.title, each.places) for each in result.objectives[:2]]
    return [shown[0], (RECOVERED, "share of forgetting undone", 2), shown[1]]


def _value(result: "StudyResult", kind: str, key: str, name: Any, row: pd.Series | None) -> float:
    if row is None or isinstance(row.get(UNTESTED), str):
        return float("nan")
    if key != RECOVERED:
        return float(row[key]) if key in row and not pd.isna(row[key]) else float("nan")
    initial: pd.Series | None = result.control(INITIAL)
    if initial is None or not isinstance(name, int):
        return float("nan")
    forgetting = result.objectives[0].name
    before, start = float(result.trial(name)[forgetting]), float(initial[forgetting])
    return (before - float(row[forgetting])) / (before - start) if before > start else float("nan")


def audit_facts(result: "StudyResult") -> dict[str, Any]:
    """Return the audit table for JSON: an entry per audit, its numbers by model, what it shows and what it cannot."""
    table = audit_table(result)
    models = [column for column in table.columns if column in (INITIAL, RETAIN) or isinstance(column, int)]
    audits, untested = [], _reasons(result)
    for kind, audit in AUDITS.items():
        rows = table[table["kind"] == kind].to_dict("records")
        numbers = [
            {
                "key": row["key"],
                "title": row["number"],
                "places": int(row["places"]),
                "values": {str(name): None if pd.isna(row[name]) else float(row[name]) for name in models},
            }
            for row in rows
        ]
        tested = any(value is not None for number in numbers for value in number["values"].values())
        facts = {"kind": kind, "title": audit.title, "shows": audit.shows, "cannot_show": audit.cannot_show}
        reasons = {"all": why} if (why := why_not(result, kind)) is not None else untested.get(kind, {})
        audits.append({**facts, "state": "done" if tested else NOT_TESTED, "reasons": reasons, "numbers": numbers})
    attacked = _worst(result, table).to_dict("records")
    retain = None if has_retain_weights(result) else "no retain model"
    return {"study": result.store.record.name, "retain": retain, "models": models, "audits": audits, "after_attacks": attacked}


def card_table(result: "StudyResult", number: int) -> list[list[str]]:
    """Return the audits of a trial as rows of a model card, the head first; none where it was not audited."""
    facts = result.audits
    if facts is None or number not in facts["models"]:
        return []
    rows = [["audit", "number", "initial model", "this trial", "retain model"]]
    for audit in facts["audits"]:
        done = any(each["values"][str(number)] is not None for each in audit["numbers"])
        for each in audit["numbers"] if done else ():
            applies = each["key"] != RECOVERED
            values = [
                (NOT_TESTED if applies or name == str(number) else "-") if value is None else f"{value:.{each['places']}f}"
                for name in (INITIAL, str(number), RETAIN)
                for value in [each["values"].get(name)]
            ]
            rows.append([audit["title"], each["title"], *values])
        if not done:
            rows.append([audit["title"], NOT_TESTED, *3 * [""]])
    return rows


def _reasons(result: "StudyResult") -> dict[str, dict[str, str]]:
    """Return why audits could not be done, by kind and model, where they were tried or their trials failed."""
    found: dict[str, dict[str, str]] = {}
    for trial in result.store.trials(names=("kind", "model", "of_trial", "reason", UNTESTED), controls=True):
        known = trial.user_attrs
        reason = known.get(UNTESTED) or (known.get("reason") if trial.state == TrialState.FAIL else None)
        if known.get("kind") in AUDITS and reason:
            found.setdefault(known["kind"], {})[str(known.get("of_trial", known.get("model")))] = str(reason)
    return found


def after_attacks(result: "StudyResult") -> pd.DataFrame:
    """Return, of every audited trial, its forgetting after the worst attack that changed its weights.

    Columns: ``trial``, ``worst`` (forgetting), ``attack`` (the kind), ``attacks`` (how many were tried); the strongest first.
    """
    if "of_trial" not in result.controls or not result.controls["kind"].isin(AUDITS).any():
        return pd.DataFrame(columns=["trial", "worst", "attack", "attacks"])
    return _worst(result, audit_table(result))


def _worst(result: "StudyResult", table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["key"] == result.objectives[0].name].set_index("kind")
    found = []
    for number in (column for column in table.columns if isinstance(column, int)):
        values = rows[number].astype(float).dropna()
        if len(values):
            found.append(
                {"trial": number, "worst": float(values.min()), "attack": str(values.idxmin()), "attacks": len(values)}
            )
    frame = pd.DataFrame(found, columns=["trial", "worst", "attack", "attacks"])
    return frame.sort_values("worst", ascending=False, ignore_index=True)
