"""Read what audits found: which trials to audit, the audit table, and the trial that is strongest after the worst of them."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from optuna.trial import TrialState

from search.evaluation.controls import CONTROLS
from search.problem.trial import AUDITS as TESTS
from search.problem.trial import INITIAL, RETAIN, UNTESTED, TrialSpec
from search.spec.runtime import Audit
from uipe_core.errors import UserError, did_you_mean
from uipe_core.metrics.composites import privleak

if TYPE_CHECKING:
    from search.results.study_result import StudyResult

AUDITS = {kind: control.audit for kind, control in CONTROLS.items() if control.audit is not None}

NOT_TESTED, NOT_ASKED, NO_RETAIN, COLLAPSED = "not tested", "not asked for", "no retain model", "collapsed"

NOTHING = "-"
"""In place of a number that a tested model cannot have."""

RECOVERED = "recovered"
"""Key of the share of forgetting that an attack undid."""

PRIVLEAK = "privleak"
"""Key of PrivLeak, which the retain model's AUC is the reference of, as open-unlearning has it, and 0.5 where there is none."""


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
    settings = {kind: AUDITS[kind].settings_text(section or Audit()) for kind in kinds}
    return [TrialSpec(kind, **place, settings=settings[kind]) for place in [*points, *compared] for kind in kinds]


def why_not(result: "StudyResult", kind: str) -> str | None:
    """Return why an audit cannot be done in a study; None where it can."""
    if result.spec.corpus.task not in AUDITS[kind].tasks:
        return "needs answers that are texts, and this study scores letters"
    # What the corpus has by now may be more than it had when the study was begun.
    there = {*result.store.record.corpus.items["select"], *result.spec.corpus.sets}
    missing = [name for name in AUDITS[kind].needs if name not in there]
    return f"needs {', '.join(missing)} items, and the corpus has none" if missing else None


def has_retain_weights(result: "StudyResult") -> bool:
    """Return True if the study has scored a retain model, and not its evaluation log alone."""
    return result.control(RETAIN) is not None and not str(getattr(result.spec.model, "retain", "")).endswith(".json")


def audit_table(result: "StudyResult") -> pd.DataFrame:
    """Return the audits of a study, a row per number of an audit.

    Columns: ``kind``, ``audit`` (its title), ``number`` (its title), ``key``, ``places``, ``settings`` (of section ``audit``);
    then by model its value, NaN where nothing was measured: ``initial``, ``retain``, and the number of every trial that was
    audited. Rows of every audit are there, done or not. Those of one audit have the same settings: the study's own where some
    model was held against these, else those of the last time.
    """
    done = result.controls[result.controls["kind"].isin(AUDITS)] if len(result.controls) else result.controls
    trials = sorted({int(number) for number in done["of_trial"].dropna()}) if len(done) and "of_trial" in done else []
    rows = []
    for kind, audit in AUDITS.items():
        by_model, settings = _done(result, kind, done)
        reference = _number(by_model.get(RETAIN), "min_k_auc")
        said = {"samples": "k", "reference": "0.5" if math.isnan(reference) else "the retain model's AUC", **settings}
        for key, title, places in _numbers(result, audit):
            models: list[Any] = [INITIAL, RETAIN, *trials]
            values = {name: _value(result, key, name, by_model.get(name), reference) for name in models}
            facts: dict[Any, Any] = {"kind": kind, "audit": audit.title, "number": title.format(**said)}
            rows.append({**facts, "key": key, "places": places, "settings": settings, **values})
    return pd.DataFrame(rows)


def _done(result: "StudyResult", kind: str, done: pd.DataFrame) -> tuple[dict[Any, pd.Series], dict[str, Any]]:
    """Return the controls of an audit by model, those with the same settings, and these settings."""
    own = done[done["kind"] == kind] if len(done) else done
    texts = [_settings_of(row) for _, row in own.iterrows()]
    wanted = AUDITS[kind].settings_text(result.spec.audit or Audit())
    chosen = wanted if wanted in texts or not texts else texts[-1]
    by_model: dict[Any, pd.Series] = {}
    for text, (_, row) in zip(texts, own.iterrows(), strict=True):
        if text == chosen:
            by_model[row["model"] if pd.isna(row["of_trial"]) else int(row["of_trial"])] = row
    return by_model, {} if chosen is None else json.loads(chosen)


def _settings_of(row: pd.Series) -> str | None:
    """Return the settings that a control carries; of studies before they were kept, the number of samples alone."""
    if isinstance(row.get("settings"), str):
        return str(row["settings"])
    return None if pd.isna(row.get("samples")) else json.dumps({"samples": int(row["samples"])})


def _numbers(result: "StudyResult", audit: Any) -> list[tuple[str, str, int]]:
    if audit.measured is not None:
        return [(each.key, each.title, each.places) for each in audit.numbers]
    shown = [(each.name, each.title, each.places) for each in result.objectives[:2]]
    return [shown[0], (RECOVERED, "share of forgetting undone", 2), shown[1]]


def _number(row: pd.Series | None, key: str) -> float:
    """Return a number of an audit; NaN where it was not done, or ruined the model: what says nothing brought nothing back."""
    if row is None or isinstance(row.get(UNTESTED), str) or key not in row or pd.isna(row[key]):
        return float("nan")
    if isinstance(row.get("collapsed"), str) and AUDITS[row["kind"]].measured is None:
        return float("nan")
    return float(row[key])


def _value(result: "StudyResult", key: str, name: Any, row: pd.Series | None, reference: float) -> float:
    if key == PRIVLEAK:
        return privleak(_number(row, "min_k_auc"), 0.5 if math.isnan(reference) else reference)
    initial: pd.Series | None = result.control(INITIAL)
    if key != RECOVERED:
        return _number(row, key)
    forgetting = result.objectives[0].name
    after = _number(row, forgetting)
    if initial is None or not isinstance(name, int) or math.isnan(after):
        return float("nan")
    before, start = float(result.trial(name)[forgetting]), float(initial[forgetting])
    return (before - after) / (before - start) if before > start else float("nan")


def audit_facts(result: "StudyResult") -> dict[str, Any]:
    """Return the audit table for JSON and for all that shows it.

    Returns:
        ``columns``, the models that tables have: ``name`` and ``title``. ``audits``, an entry for each, done or not: what it
        shows and cannot show, settings (``settings_text`` is a sentence), ``reasons`` why it was not done by model (``all`` for
        every one), ``numbers`` with ``values`` by model, and ``rows`` of a table: ``title``, and ``texts`` by model, which say
        in a word what has no number. ``front``, columns for tables of the front, of the audits that were done: ``key``,
        ``head``, ``about`` and ``texts``, by front point and reference model.
    """
    table = audit_table(result)
    models = [column for column in table.columns if column in (INITIAL, RETAIN) or isinstance(column, int)]
    retain = None if has_retain_weights(result) else NO_RETAIN
    audits, untested = [], _reasons(result, dict(zip(table["kind"], table["settings"], strict=True)))
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
        tested = {str(name) for name in models if any(each["values"][str(name)] is not None for each in numbers)}
        why = why_not(result, kind)
        given = {"all": why} if why is not None else untested.get(kind, {})
        reasons = {name: reason for name, reason in given.items() if name not in tested}

        def word(name: Any, number: dict[str, Any], tested: set[str] = tested, reasons: dict[str, str] = reasons) -> str:
            value = number["values"][str(name)]
            if value is not None:
                return f"{value:z.{number['places']}f}"
            if name == RETAIN and retain is not None:
                return retain
            # What an attack undid is a share of what a trial forgot: reference models, and some trials, forgot nothing.
            nothing = number["key"] == RECOVERED and str(name) in tested
            return NOTHING if nothing else _word(reasons.get(str(name)))

        shown = [{"title": each["title"], "texts": {str(name): word(name, each) for name in models}} for each in numbers]
        if not tested:
            said = "; ".join(dict.fromkeys(reasons.values())) or NOT_ASKED
            shown = [{"title": said, "texts": shown[0]["texts"]}]
        audits.append(
            {
                "kind": kind,
                "title": audit.title,
                "shows": audit.shows,
                "cannot_show": audit.cannot_show,
                "settings": rows[0]["settings"],
                "settings_text": _settings_text(rows[0]["settings"]),
                "state": "done" if tested else NOT_TESTED,
                "reasons": reasons,
                "numbers": numbers,
                "rows": shown,
            }
        )
    columns = [
        {"name": str(name), "title": f"{name} model" if isinstance(name, str) else f"trial {name}"}
        for name in models
        if name != RETAIN or retain is None
    ]
    facts = {"study": result.store.record.name, "retain": retain, "models": models, "columns": columns}
    return {
        **facts,
        "audits": audits,
        "front": _front_columns(result, table, audits),
        "forgetting": {"title": result.objectives[0].title, "places": result.objectives[0].places},
        "after_attacks": _worst(result, table).to_dict("records"),
    }


_FRONT = {
    "min_k_auc": ("AUC\nMin-K%", "AUC of Min-K% of forget against holdout items"),
    "prompts_contained": ("other\nprompts", "share of answers given when asked otherwise"),
    "sampling_contained": ("in some\nsample", "share of answers given in some sample"),
}
"""Numbers of audits in tables of the front: head and meaning. Before them stands forgetting after the worst attack."""


def _front_columns(result: "StudyResult", table: pd.DataFrame, audits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    forgetting = result.objectives[0]
    done = [each for each in audits if each["state"] == "done"]  # the others have a single row
    rows = {number["key"]: row for each in done for row, number in zip(each["rows"], each["numbers"], strict=True)}
    shown = [str(number) for number in result.front["trial"]] + [INITIAL, RETAIN]
    columns = []
    attacked = table[table["key"] == forgetting.name]
    worst = {
        str(name): attacked[name].astype(float).min() for name in attacked if name in (INITIAL, RETAIN) or isinstance(name, int)
    }
    known = {name: f"{value:z.{forgetting.places}f}" for name, value in worst.items() if not math.isnan(value)}
    if known:
        about = f"{forgetting.title} after the worst attack on the weights"
        texts = {name: known.get(name, NOT_TESTED) for name in shown}
        columns.append({"key": "audit_worst", "head": "after\nattack", "about": about, "texts": texts})
    for key, (head, about) in _FRONT.items():
        if key in rows:
            texts = {name: rows[key]["texts"].get(name, NOT_TESTED) for name in shown}
            columns.append({"key": f"audit_{key}", "head": head, "about": about, "texts": texts})
    return columns


def _settings_text(settings: dict[str, Any]) -> str:
    """Return settings as a sentence that follows on others; empty without any."""
    said = [f"{name.replace('_', ' ')} {json.dumps(value)}" for name, value in settings.items() if value is not None]
    return f" With {', '.join(said)}." if said else ""


def _word(reason: str | None) -> str:
    """Return the word that a table has in place of a number; the reason stands next to the table."""
    if reason is None:
        return NOT_TESTED
    if reason.startswith(COLLAPSED):
        return COLLAPSED
    return "diverged" if "diverged" in reason else "not possible"


def of_trial(facts: dict[str, Any] | None, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the audits of one trial that were done, and those that were not, from `audit_facts`.

    Each of the latter has the ``reason``: that of the trial or of all, or that it was not asked for.
    """
    if facts is None:
        every = [{"kind": kind, "title": each.title, "shows": each.shows} for kind, each in AUDITS.items()]
        return [], [{**each, "reason": NOT_ASKED} for each in every]
    done, missing = [], []
    for audit in facts["audits"]:
        if any(each["values"].get(str(number)) is not None for each in audit["numbers"]):
            done.append(audit)
        else:
            reason = audit["reasons"].get("all") or audit["reasons"].get(str(number)) or NOT_ASKED
            missing.append({**audit, "reason": reason})
    return done, missing


def card_table(result: "StudyResult", number: int) -> list[list[str]]:
    """Return the audits of a trial as rows of a model card, the head first; none where it was not audited."""
    facts = result.audits
    if facts is None or number not in facts["models"]:
        return []
    rows = [["audit", "number", "initial model", "this trial", "retain model"]]
    names = (INITIAL, str(number), RETAIN)
    for audit in facts["audits"]:
        rows += [[audit["title"], row["title"], *(row["texts"][name] for name in names)] for row in audit["rows"]]
    return rows


def _reasons(result: "StudyResult", settings: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return why audits could not be done, by kind and model, where they were tried, or failed, with these settings by kind."""
    found: dict[str, dict[str, str]] = {}
    names = ("kind", "model", "of_trial", "reason", "settings", "collapsed", UNTESTED)
    for trial in result.store.trials(names=names, controls=True):
        known = trial.user_attrs
        if isinstance(known.get("settings"), str) and json.loads(known["settings"]) != settings.get(known.get("kind", "")):
            continue
        reason = known.get(UNTESTED) or (known.get("reason") if trial.state == TrialState.FAIL else None)
        if reason is None and isinstance(known.get("collapsed"), str):
            reason = f"{COLLAPSED} under it: {known['collapsed']}"
        if known.get("kind") in AUDITS and reason:
            found.setdefault(known["kind"], {})[str(known.get("of_trial", known.get("model")))] = str(reason)
    return found


_ATTACKED = ("trial", "before", "worst", "attack", "attacks")


def after_attacks(result: "StudyResult") -> pd.DataFrame:
    """Return, of every audited trial, its forgetting after the worst attack that changed its weights.

    Columns: ``trial``, ``before`` and ``worst`` (forgetting), ``attack`` (the kind), ``attacks`` (how many were tried); the
    strongest first.
    """
    if "of_trial" not in result.controls or not result.controls["kind"].isin(AUDITS).any():
        return pd.DataFrame(columns=list(_ATTACKED))
    return _worst(result, audit_table(result))


def unlike_attacks(result: "StudyResult", trials: pd.Series) -> str | None:
    """Return what is to be said where some of these trials were held against more attacks than others: more find more."""
    attacked = after_attacks(result)
    counts = attacked.loc[attacked["trial"].isin(trials), "attacks"]
    if counts.nunique() < 2:
        return None
    command = f"uipe audit {result.out} --tests quantisation,relearning --trial N"
    return f"they were held against {counts.min()} to {counts.max()} attacks, and more find more; {command} does the others"


def _worst(result: "StudyResult", table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["key"] == result.objectives[0].name].set_index("kind")
    found = []
    for number in (column for column in table.columns if isinstance(column, int)):
        values = rows[number].astype(float).dropna()
        if len(values):
            before = float(result.trial(int(number))[result.objectives[0].name])
            known = (number, before, float(values.min()), str(values.idxmin()), len(values))
            found.append(dict(zip(_ATTACKED, known, strict=True)))
    frame = pd.DataFrame(found, columns=list(_ATTACKED))
    return frame.sort_values("worst", ascending=False, ignore_index=True)
