"""Write what notes say, as Markdown. The dashboard shows them, so texts that are not ours are escaped."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from search.evaluation.controls import CONTROLS
from search.problem.objectives import flag_of
from search.problem.trial import INITIAL
from search.report.conclusions import conclusions
from search.report.style import alpha, decimal
from search.results.study_result import FORGET_NUMBERS, StudyResult

OURS = "*Written by `uipe dashboard`. Delete this line, and your text is kept.*"
"""Ends every note of a trial that may be written again."""

TEXTS = "texts"
"""Where item scores keep a few answers as text: rows of question, expected and generated answer, by evaluation set."""

EXAMPLES = 2
"""Items of each set whose answers a note shows."""

LONGEST = 300
"""Characters of a text that a note shows."""

SETS = {
    "forget": "to forget",
    "retain": "to keep",
    "real_authors": "general",
    "world_facts": "general",
    "utility": "to keep",
    "related": "related",
    "unrelated": "unrelated",
}
"""What evaluation sets are for."""


def plain(text: Any) -> str:
    """Return a text as Markdown shows it letter by letter, on one line, cut at `LONGEST`."""
    shown = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 4]} ..."
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+\-.!|~:@])", r"\\\1", shown), quote=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)])


def study_note(result: StudyResult) -> str:
    """Summarise a study: what won, and its front."""
    record = result.store.record
    names = {objective.name: objective for objective in result.objectives}
    audits = (result.audits or {"front": []})["front"]
    heads = ["trial", "base run", "epoch", "alpha", *(objective.title for objective in names.values())]
    heads += [each["about"] for each in audits]
    cells = [
        [
            *(str(row[name]) for name in ("trial", "base", "epoch")),
            f"{row['alpha']:.3f}",
            *(f"{row[name]:.{objective.places}f}" for name, objective in names.items()),
            *(each["texts"][str(row["trial"])] for each in audits),
        ]
        for row in result.front.to_dict("records")
    ]
    lines = [
        f"# {record.name}",
        *conclusions(result),
        f"Corpus: {record.corpus.name}. Metric definition: {result.spec.definition}.",
        f"Report: {result.report_path}",
        table(heads, cells),
        f"Controls are in the study **{record.name}.controls**.",
    ]
    return "\n\n".join(lines)


def controls_note(result: StudyResult) -> str:
    """Say what the trials of the controls study are, and what stands in for their values."""
    lines = [
        f"# Controls of {result.store.record.name}",
        "What its trials are compared with: the initial and the retain model, the next epoch of plain training, random "
        "directions of the same size, the initial model at other logit temperatures, and audits of finalists. None of them can "
        "be chosen, so they are kept out of the study and its Pareto front. **They are shown as Pruned: their numbers are "
        "attributes, not values.**",
    ]
    done = result.controls["kind"].value_counts()
    kinds = [(kind, control) for kind, control in CONTROLS.items() if control.title and kind in done]
    rows = [[kind, control.title, str(done[kind]), control.purpose] for kind, control in kinds]
    return "\n\n".join([*lines, table(["kind", "control", "trials", "what for"], rows)] if rows else lines)


def trial_note(result: StudyResult, row: Mapping[str, Any]) -> str:
    """Say what a trial is: its place, its numbers next to the initial model's, answers before and after, and its flags.

    Args:
        result: The study.
        row: The trial, a row of `StudyResult.trials`.
    """
    number = int(row["trial"])
    where = f"{plain(row['base'])}, epoch {int(row['epoch'])}, alpha {alpha(row['alpha'])}"
    front = "It is on the Pareto front." if row["on_front"] else "It is not on the Pareto front."
    lines = [f"# Trial {number}: {where}", f"{_walk(row)} {front}", *(f"**{flag}**" for flag in _flags(result, row))]
    lines += [_numbers(result, row), *_answers(result, number), *_tests(result, number)]
    lines.append(f"Its model: `uipe export OUT --trial {number} --to exported --as model`")
    return "\n\n".join([*lines, "---", OURS])


def _walk(row: Mapping[str, Any]) -> str:
    size = f"{1 + float(row['alpha']):.3g}"
    return {
        "extrapolation": f"Extrapolation: the initial model plus {size} times the update that training gave.",
        "interpolation": f"Interpolation: the initial model plus {size} times the update that training gave.",
        "unlearned epoch": "The model as that epoch of training left it.",
        "initial model": "The initial model itself.",
    }.get(str(row["walk"]), "")


def _flags(result: StudyResult, row: Mapping[str, Any]) -> list[str]:
    found = []
    if isinstance(row.get("collapsed"), str):
        found.append(f"Collapsed, so no rule chooses it: {plain(row['collapsed'])}")
    if row.get("flagged") is True:
        flag = flag_of(result.objectives)
        found.append(f"Flagged: {flag.meaning}, {flag.caution}")
    return found


def _numbers(result: StudyResult, row: Mapping[str, Any]) -> str:
    initial = result.control(INITIAL)
    sure = result.certainty[result.certainty["trial"] == row["trial"]]
    named = [(objective.name, objective.title, objective.places) for objective in result.objectives]
    named += [(name, head, 3) for name, head in FORGET_NUMBERS.items()]
    rows = []
    for name, title, places in named:
        if name not in row or pd.isna(row[name]):
            continue
        low = sure[f"{name}_low"].iloc[0] if f"{name}_low" in sure and len(sure) else None
        interval = "" if low is None else f"{decimal(low, places)} to {decimal(sure[f'{name}_high'].iloc[0], places)}"
        before = None if initial is None or name not in initial else initial[name]
        rows.append([title, decimal(before, places), decimal(row[name], places), interval])
    return table(["", "initial model", "this trial", "95% interval"], rows)


def _answers(result: StudyResult, number: int) -> list[str]:
    """Show how many answers are still given, and some of them before and after, where they were kept as texts."""
    control = result.control(INITIAL)
    if control is None:
        return []
    first = int(control["trial"])
    after, before = result.store.items(number) or {}, result.store.items(first, control=True) or {}
    texts = result.store.items(number, item_set=TEXTS) or {}
    earlier = result.store.items(first, control=True, item_set=TEXTS) or {}
    shares = []
    for name in after:
        item_set, _, measurement = name.partition("/")
        if measurement == "rouge_l_recall" and name in before:
            given = [f"{int((each[name] == 1.0).sum())} of {len(each[name])}" for each in (before, after)]
            shares.append([item_set.replace("_", " "), SETS.get(item_set, ""), *given])
    rows = []
    for name, kept in texts.items():
        item_set = name.removeprefix(f"{TEXTS}/")
        known = {str(question): str(answer) for question, _, answer in earlier.get(name, [])}
        rows += [
            [SETS.get(item_set, item_set), plain(question), plain(known.get(str(question), "–")), plain(answer)]
            for question, _, answer in kept[:EXAMPLES]
        ]
    found = [table(["answers given in full", "", "before", "after"], shares)] if shares else []
    found += [table(["", "question", "before", "after"], rows)] if rows else []
    return ["## Answers", *found] if found else []


def _tests(result: StudyResult, number: int) -> list[str]:
    done, missing = result.audits_of(number)
    if not done:
        return ["Not tested by audits (`uipe audit`)."]
    names = ", ".join(each["title"] for each in done)
    untested = f" Not tested: {', '.join(each['title'] for each in missing)}." if missing else ""
    return [f"Audited: {names}.{untested}"]
