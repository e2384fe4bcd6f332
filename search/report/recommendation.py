"""Say which model to ship: the trial that a rule chooses, its numbers before and after, and what speaks against it."""

import math
import shlex
from typing import Any

import pandas as pd

from search.problem.objectives import Objective
from search.problem.trial import INITIAL, RETAIN
from search.report.conclusions import AS_MUCH, edge_sentences, export_command, initial_held_out, nothing_won
from search.report.data import ReportData
from search.report.style import count, decimal, number, probability

AGAINST, UNTESTED, HELD = "against", "not tested", "held"
"""What a finding is: it speaks against the model, it is not known, or the model passed."""

MUCH_UNDONE = 0.25
"""Share of the forgetting that an attack undid, above which the attack speaks against the model."""

_NOTHING = 0.005

FAR_APART = 0.1
"""Difference of a share or an AUC from that of the model it is compared with, above which it speaks against the model."""

ROLES = {
    "forget": "to forget",
    "knowmem": "to forget, as a question",
    "retain": "to keep",
    "general": "general knowledge",
    "world_facts": "general knowledge",
    "real_authors": "general knowledge",
}
"""Sets of example answers in words, in the order they are shown."""


def recommendation(view: ReportData) -> dict[str, Any]:
    """Return what the first screen of the report says.

    Returns:
        ``verdict``, a sentence. Where a model is recommended also ``trial``, ``row``, ``rule``, ``note``, ``numbers`` (title,
        value, interval or None, before, share kept or None), ``command`` and ``findings`` ((kind, sentence), what speaks
        against it first); else ``trial`` is None.
    """
    if view.trials.empty:
        return {"trial": None, "verdict": "No trial is complete yet, so there is nothing to choose from."}
    nothing, chosen = nothing_won(view), view.summary.get("recommended")
    if nothing:
        return {"trial": None, "verdict": f"Keep the initial model. {nothing[0]}"}
    if chosen is None:
        return {"trial": None, "verdict": "No rule finds a model on this front that forgets more than the initial model."}
    row = view.trials[view.trials["trial"] == chosen["trial"]].iloc[0]
    findings = [*doubts(view, row), *attacks(view, int(row["trial"])), *_open_questions(view, row)]
    order = (AGAINST, UNTESTED, HELD)
    return {
        "trial": int(row["trial"]),
        "row": row.to_dict(),
        "rule": chosen["rule"],
        "note": chosen["note"],
        "verdict": _reason(view, chosen["rule"]),
        "numbers": [_before_and_after(view, row, objective) for objective in view.objectives],
        "command": export_command(view.summary["out"], f"--trial {row['trial']}", str(row["trial"])),
        "findings": sorted(findings, key=lambda finding: order.index(finding[0])),
    }


def _reason(view: ReportData, rule: str) -> str:
    forgetting, utility = view.objectives[:2]
    if rule.startswith("utility-floor"):
        return f"It forgets most among the models that keep {view.floor:.0%} or more of the initial {utility.title}."
    return (
        f"No model keeps {view.floor:.0%} of the initial {utility.title} and forgets; this one has the best balance of "
        f"{forgetting.title} and {utility.title}."
    )


def _before_and_after(view: ReportData, row: pd.Series, objective: Objective) -> dict[str, Any]:
    """Return an objective of a trial and of the initial model, as the p-value behind it where there is one."""
    sure = view.certainty[view.certainty["trial"] == row["trial"]] if "trial" in view.certainty else view.certainty
    ends = [f"{objective.name}_{end}" for end in ("low", "high")]
    interval = [float(sure[end].iloc[0]) for end in ends] if len(sure) and set(ends) <= set(sure) else None
    before = number((view.initial or {}).get(objective.name))
    value, title = float(row[objective.name]), objective.title
    known = objective.worst == 0.0 and before > 0
    if objective.p_value is not None:
        title = title.removeprefix("log10 ")

        def shown(log10: float) -> str:
            return "–" if math.isnan(log10) else probability(10.0**log10)

    else:

        def shown(log10: float) -> str:
            return decimal(log10, objective.places)

    return {
        "title": title,
        "value": shown(value),
        "interval": None if interval is None else [shown(end) for end in interval],
        "before": shown(before),
        "share": value / before if known else None,
    }


Finding = tuple[str, str]


def doubts(view: ReportData, row: pd.Series) -> list[Finding]:
    """Return what the study itself says against a trial."""
    forgetting, utility = view.objectives[:2]
    found: list[Finding] = []
    if bool(row["flagged"]):
        found.append((AGAINST, f"Flagged: {view.flag.meaning}, {view.flag.caution}."))
    if float(row[forgetting.name]) > view.ceiling:
        found.append((AGAINST, f"Its {forgetting.title} is in the range of noise: among such models more is not better."))
    found += [(AGAINST, sentence) for sentence in edge_sentences(view, row.to_frame().T)]
    gain = view.summary["gain"]
    everything, chance = number(gain.get("all")), number(gain.get("random_direction"))
    if (view.controls["kind"] == "random_direction").any() and everything > 0 and chance >= AS_MUCH * everything:
        found.append((AGAINST, "Random directions of the same size gain as much: chance explains the gain of the search."))
    return [*found, *_beyond_noise(view, row), *_held_out(view, row, utility), *_matched(view, row, utility)]


def _beyond_noise(view: ReportData, row: pd.Series) -> list[Finding]:
    known = view.certainty.reindex(columns=["trial", "beats_initial"])
    beats = known.loc[known["trial"] == row["trial"], "beats_initial"].dropna()
    if beats.empty:
        return [(UNTESTED, "Whether it forgets more than the initial model beyond noise: too few items or groups.")]
    if bool(beats.iloc[0]):
        return [(HELD, "It forgets more than the initial model beyond noise (95%, corrected for the number of trials).")]
    return [(AGAINST, "Within noise it forgets no more than the initial model.")]


def _held_out(view: ReportData, row: pd.Series, utility: Objective) -> list[Finding]:
    held = view.held_out
    own = held[held["trial"] == row["trial"]] if "trial" in held else held
    start = initial_held_out(view, utility)
    if own.empty or not start:
        return [(UNTESTED, "Items that nothing was chosen by: this trial was not scored on any.")]
    share = float(own[f"{utility.name}_held_out"].iloc[0]) / start
    said = f"On held-out items it keeps {share:.0%} of the initial {utility.title}"
    return [(AGAINST, f"{said}, below {view.floor:.0%}.") if share < view.floor else (HELD, f"{said}.")]


def _matched(view: ReportData, row: pd.Series, utility: Objective) -> list[Finding]:
    table, start = view.matched_scale, number((view.initial or {}).get(utility.name))
    own = table[table["trial"] == row["trial"]] if "trial" in table else table
    if own.empty or not start > 0:
        return []
    share = float(own[f"{utility.name}_matched"].iloc[0]) / start
    if share >= view.floor:
        return []
    return [(AGAINST, f"With logits as sharp as the initial model's it keeps {share:.0%} of the initial {utility.title}.")]


def attacks(view: ReportData, trial: int) -> list[Finding]:
    """Return what audits found: the worst attack on the weights, and every number that is far from its reference."""
    undone, found = [], []
    for audit in (view.audits or {}).get("audits", ()):
        for each in audit["numbers"]:
            value = each["values"].get(str(trial))
            if value is None:
                continue
            if each["key"] == "recovered":
                undone.append((float(value), audit["title"]))
            elif each["key"] in _COMPARED:
                found.append(_compared(each, float(value)))
    if undone:
        share, title = max(undone)
        said = f"The worst of {count(len(undone), 'attack')} on its weights undoes {share:.0%} of the forgetting ({title})."
        if share < _NOTHING:
            said = f"{count(len(undone), 'attack')} on its weights: none undoes any of the forgetting."
        found.insert(0, (AGAINST if share > MUCH_UNDONE else HELD, said))
    return found


_COMPARED = {
    "min_k_auc": ("Membership in the forget set", "AUC of Min-K%", RETAIN, 0.5, True),
    "prompts_contained": ("Asked in other ways", "share of answers given", RETAIN, 0.0, False),
    "sampling_contained": ("Asked many times", "share of answers given in some sample", RETAIN, 0.0, False),
    "faulty_forget": ("Fluency on the forget set", "share of faulty texts", INITIAL, 0.0, False),
    "faulty_kept": ("Fluency on what is kept", "share of faulty texts", INITIAL, 0.0, False),
}
"""Numbers of audits: subject, meaning, the model it is compared with, its value without one, whether too low is bad too."""


def _compared(each: dict[str, Any], value: float) -> Finding:
    subject, meaning, model, without, both = _COMPARED[each["key"]]
    known = each["values"].get(model)
    reference = without if known is None else float(known)
    apart = abs(value - reference) if both else value - reference
    against = f"{model} model {reference:.2f}" if known is not None else f"compared with {reference:g}"
    return (AGAINST if apart > FAR_APART else HELD, f"{subject}: {meaning} {value:.2f} ({against}).")


def _open_questions(view: ReportData, row: pd.Series) -> list[Finding]:
    """Return what was not done, with the command that does it."""
    out, trial = shlex.quote(view.summary["out"]), int(row["trial"])
    untested = view.summary.get("untested", ())
    open_ones = [each["title"] for each in untested if each["reason"] == "not asked for"]
    found = []
    if open_ones:
        found.append((UNTESTED, f"Attacks: {'; '.join(open_ones)}. Run: uipe audit {out} --trial {trial}"))
    found += [(UNTESTED, f"{each['title']}: {each['reason']}.") for each in untested if each["reason"] != "not asked for"]
    if view.confirmations.empty and view.over_seeds.empty:
        found.append((UNTESTED, f"Other training seeds. Run: uipe confirm {out}"))
    return found


def examples(view: ReportData, trial: int) -> list[dict[str, str]]:
    """Return an example answer for each of: to forget, to keep, general knowledge; before and after. Empty without texts."""
    if view.answers is None or trial not in view.answers.of_trials:
        return []
    found: dict[str, dict[str, str]] = {}
    pairs = list(zip(view.answers.items, view.answers.of_trials[trial], strict=True))
    for name, role in ROLES.items():
        for (of_set, question, expected, before), after in pairs:
            if of_set == name and role not in found:
                found[role] = {"role": role, "question": question, "expected": expected, "before": before, "after": after}
    return list(found.values())
