"""Conclude what won, in plain sentences: the same in the report, on the terminal and in the dashboard."""

import math
import shlex
from pathlib import Path

import pandas as pd

from search.problem.objectives import Objective
from search.problem.pareto import non_dominated, utility_floor
from search.problem.trial import INITIAL, NEVER_FINETUNED, OTHER_RETAIN
from search.report.data import ReportData, recommended, report_data
from search.report.style import alpha, count, decimal, number, probability
from search.results.study_result import StudyResult
from search.store.trials import collapsed
from uipe_core.errors import UserError

# Gains below this share of the hypervolume at alpha = 0 are rounding, not results.
_NOTHING = 1e-6
AS_MUCH = 0.9
_NEAR = 0.02
"""Share of the range of alpha that counts as its edge."""
_GAMED = 0.05
"""Forget quality that passes the usual test, reached by a model that was never taught."""


def conclusions(result: StudyResult) -> list[str]:
    """Conclude from a study's results what won, in plain sentences."""
    return conclude(report_data(result))


def next_step(result: StudyResult) -> str:
    """Return the command that exports a point, or what can be done where no rule can choose one."""
    if result.healthy_front.empty and not collapsed(result.trials).all():
        return (
            "no trial beats the initial model, so no rule chooses one: train more (a higher unlearning.learning_rate, more "
            "epochs) or search alpha above 0"
        )
    if result.healthy_front.empty:
        return (
            "every trial has collapsed, so no rule chooses one: train less (a lower unlearning.learning_rate, fewer epochs) or "
            "search alpha below 0; --allow-collapsed exports a collapsed one"
        )
    found = recommended(result)
    if found is None:
        return export_command(result.out, "--trial N", "N")
    rule = found["rule"].split()[0]
    return export_command(result.out, f"--rule {rule}", rule)


def choice(view: ReportData) -> str | None:
    """Return which trial is recommended, and by which rule; None where the initial model is to be kept, or no rule chooses."""
    found = None if view.trials.empty or nothing_won(view) else view.summary.get("recommended")
    return None if found is None else f"trial {found['trial']}, by the rule {found['rule']}"


def export_command(out: Path | str, chosen: str, folder: str) -> str:
    """Return a command that exports a model, to be pasted into a shell."""
    return f"uipe export {shlex.quote(str(out))} {chosen} --to {shlex.quote(str(Path(out, 'export', folder)))} --as model"


def conclude(view: ReportData) -> list[str]:
    """Conclude what alpha gained over the unlearned epochs, and whether random directions gain as much.

    Gains are hypervolumes over what is given without a search: the initial model and every epoch at alpha = 0.
    """
    if view.trials.empty:
        return ["No trial is complete yet, so there is no front to judge."]
    front = view.trials[view.trials["on_front"]]
    walks = front["walk"].value_counts()
    longer, shorter = int(walks.get("extrapolation", 0)), int(walks.get("interpolation", 0))
    given = len(front) - longer - shorter
    nothing = nothing_won(view)
    won, floor = (nothing, []) if nothing else (_gain_sentences(view), _floor_sentences(view))
    sentences = [
        *won,
        *_next_epoch_sentences(view),
        *floor,
        *_held_out_sentences(view),
        *_noise_sentences(view),
        f"The front has {count(len(front), 'point')}: {given} given at alpha = 0, {shorter} by interpolation "
        f"(alpha below 0) and {longer} by extrapolation (alpha above 0).",
        *_beaten_sentences(view),
        *edge_sentences(view, front),
        *_audit_sentences(view),
    ]
    flagged = int(front["flagged"].sum())
    if flagged:
        sentences.append(
            f"{flagged} of {count(len(front), 'front point')} {'is' if flagged == 1 else 'are'} flagged: "
            f"{view.flag.meaning}, {view.flag.caution}."
        )
    return [*sentences, *_collapse_sentences(front)]


def _collapse_sentences(front: pd.DataFrame) -> list[str]:
    broken = front[collapsed(front)]
    if broken.empty:
        return []
    first = broken.iloc[0]
    return [
        f"{len(broken)} of {count(len(front), 'front point')} {'has' if len(broken) == 1 else 'have'} collapsed, "
        f"whatever the metrics say, and {'is' if len(broken) == 1 else 'are'} never selected unless asked for; "
        f"trial {int(first['trial'])}: {first['collapsed']}."
    ]


def edge_sentences(view: ReportData, front: pd.DataFrame) -> list[str]:
    """Say where the front ends because the search did: sound points near the highest alpha that was allowed."""
    ends: dict[tuple[str, float], list[int]] = {}
    for row in front[~collapsed(front)].to_dict("records"):
        allowed = view.summary["alpha_by_base"][row["base"]]
        low, high = float(allowed["low"]), float(allowed["high"])
        if row["alpha"] >= high - _NEAR * (high - low):
            ends.setdefault((allowed["key"], high), []).append(int(row["trial"]))
    return [
        f"{'Trial' if len(trials) == 1 else 'Trials'} {', '.join(map(str, sorted(trials)))} of the front "
        f"{'is' if len(trials) == 1 else 'are'} at the edge of the search, alpha {alpha(high)}: what is beyond it is not "
        f"known; raise {key}.high."
        for (key, high), trials in ends.items()
    ]


def _audit_sentences(view: ReportData) -> list[str]:
    """Say how much of a finalist's forgetting the worst change of its weights undid."""
    undone = [
        (value, name, audit["title"])
        for audit in (view.audits or {}).get("audits", ())
        for number in audit["numbers"]
        if number["key"] == "recovered"
        for name, value in number["values"].items()
        if value is not None
    ]
    if not undone:
        return []
    share, trial, title = max(undone)
    attacks, trials = len({title for *_, title in undone}), len({name for _, name, _ in undone})
    return [
        f"Of the forgetting of {count(trials, 'audited trial')} the worst of {count(attacks, 'attack')} on the weights undid "
        f"{max(share, 0.0):.0%} (trial {trial}, {title})."
    ]


def nothing_won(view: ReportData) -> list[str]:
    """Say so where no sound trial forgets more than the initial model, beyond noise where that is known."""
    forgetting = view.objectives[0]
    start = _initial(view, forgetting)
    sound = view.trials[~collapsed(view.trials)].dropna(subset=[forgetting.name])
    if start is None:
        return []
    ahead = sound[sound[forgetting.name] > start]
    broken = " that has not collapsed" if len(sound) < len(view.trials) else ""
    nothing = f"Nothing was won: no trial{broken} forgets more than the initial model"
    if ahead.empty:
        return [f"{nothing}."]
    if (ahead[forgetting.name].clip(upper=view.ceiling) <= min(start, view.ceiling)).all():
        return [f"{nothing}, because it is at the noise ceiling of {forgetting.title} itself."]
    if "beats_initial" not in view.certainty:
        return []
    known = view.certainty[view.certainty["trial"].isin(ahead["trial"])]["beats_initial"].dropna()
    if len(known) < len(ahead) or known.astype(bool).any():
        return []
    best = ahead.sort_values(forgetting.name).iloc[-1]
    return [
        f"{nothing}, beyond noise: the strongest, trial {int(best['trial'])}, has {_strength(forgetting, best)}, and "
        "another draw of items may take that away (95%, corrected for the number of trials)."
    ]


def _beaten_sentences(view: ReportData) -> list[str]:
    """Trials that no other trial beats, and the initial model does: Optuna's own front has them."""
    start = [_initial(view, objective) for objective in view.objectives]
    points = view.trials[[objective.name for objective in view.objectives]].dropna()
    if None in start or points.empty:
        return []
    beaten = int((non_dominated(points) & (points <= start).all(axis=1).to_numpy()).sum())
    if not beaten:
        return []
    return [
        f"{count(beaten, 'trial')} that no other trial beats {'is' if beaten == 1 else 'are'} not on it, because the initial "
        "model is at least as good in everything."
    ]


def _initial(view: ReportData, objective: Objective) -> float | None:
    known = view.controls.loc[view.controls["kind"] == INITIAL, objective.name].dropna()
    return None if known.empty else float(known.iloc[0])


def _gain_sentences(view: ReportData) -> list[str]:
    gain, scale = view.summary["gain"], view.summary["hypervolume"].get("alpha_zero")
    everything, longer, chance = (number(gain.get(key)) for key in ("all", "extrapolation_only", "random_direction"))
    nothing = _NOTHING * max(abs(number(scale, 0.0)), _NOTHING)
    if math.isnan(everything):
        return ["The gain over alpha = 0 was not measured."]
    if everything <= nothing:
        return ["The search won nothing: no alpha, above or below 0, beats the unlearned epochs as they were trained."]
    share = f" ({everything / scale:.1%} of theirs)" if number(scale, 0.0) > 0 else ""
    sentences = [
        f"Choosing alpha won {decimal(everything)} of hypervolume{share} over the unlearned epochs as they were trained."
    ]
    if view.summary["alpha"]["low"] < 0 and not math.isnan(longer):
        if longer <= nothing:
            sentences.append(
                "Extrapolation won nothing: all of the gain comes from alpha below 0, from scaling an update down."
            )
        else:
            sentences.append(f"Alpha of 0 and above alone won {decimal(longer)}, {longer / everything:.0%} of it.")
    drawn_controls = int((view.controls["kind"] == "random_direction").sum())
    if math.isnan(chance) or drawn_controls == 0:
        return [*sentences, "No random direction was scored, so the gain is not yet distinguished from chance."]
    drawn = f"{count(drawn_controls, 'random direction')} of the same size"
    if chance >= AS_MUCH * everything:
        sentences.append(
            f"But {drawn} won {decimal(chance)}, as much as the search: the gain is no evidence for the unlearning direction."
        )
    elif chance <= nothing:
        sentences.append(f"{drawn[0].upper()}{drawn[1:]} won nothing, so the direction carries the gain.")
    else:
        sentences.append(f"{drawn[0].upper()}{drawn[1:]} won {decimal(chance)}, {chance / everything:.0%} of it.")
    return sentences


def _next_epoch_sentences(view: ReportData) -> list[str]:
    """The paper's control: whether training one epoch longer goes where no alpha went."""
    objectives = [objective.name for objective in view.objectives]
    controls = view.controls[view.controls["kind"] == "next_epoch"]
    further = controls[objectives].dropna().to_numpy(dtype=float)
    if len(further) == 0:
        return []
    initial = view.controls.loc[view.controls["kind"] == INITIAL, objectives].dropna()
    front = pd.concat([view.trials.loc[view.trials["on_front"], objectives], initial]).to_numpy(dtype=float)
    beyond = sum(not any((point >= other).all() for point in front) for other in further)
    of_all = f"of {count(len(further), 'next epoch')} of plain training"
    if beyond == 0:
        return [f"None {of_all} is beyond the front."]
    return [f"{beyond} {of_all} {'is' if beyond == 1 else 'are'} beyond the front: there training on beats every alpha tried."]


def _floor_sentences(view: ReportData) -> list[str]:
    """The gain as one deployable point: the strongest forgetting at nearly the initial model's utility."""
    forgetting, utility = view.objectives[:2]
    initial, start = _initial(view, utility), _initial(view, forgetting)
    scored = view.trials[~collapsed(view.trials)].dropna(subset=[forgetting.name, utility.name])
    if initial is None or start is None:
        return []
    picks = []
    for table in (scored, scored[scored["kind"] == "alpha_zero"]):
        try:
            row = utility_floor(table[forgetting.name], table[utility.name], view.floor * initial)
        except UserError:
            break
        picks.append(table.iloc[row])
    if not picks:
        return [f"No trial keeps {view.floor:.0%} of the initial {utility.title}."]
    best = picks[0]
    if best[forgetting.name] <= start:
        return [
            f"No trial that keeps {view.floor:.0%} of the initial {utility.title} forgets more than the initial model: "
            "nothing was won at that floor."
        ]
    point = f"{best['base']}, epoch {int(best['epoch'])}, alpha {alpha(best['alpha'])}"
    sentence = (
        f"At {view.floor:.0%} or more of the initial {utility.title} the strongest forgetting is "
        f"trial {int(best['trial'])} ({point}) with {_strength(forgetting, best)}"
    )
    if len(picks) == 1:
        return [f"{sentence}; no unlearned epoch as trained keeps that much."]
    if picks[1][forgetting.name] <= start:
        return [f"{sentence}; no unlearned epoch as trained that keeps that much forgets more than the initial model."]
    if picks[1][forgetting.name] >= best[forgetting.name]:
        return [f"{sentence}; no other alpha forgets more than the best unlearned epoch there."]
    reached = f"{sentence}; the best unlearned epoch as trained reaches {_strength(forgetting, picks[1], named=False)}."
    return [reached, *_held_out_gain(view, best, picks[1])]


def _held_out_gain(view: ReportData, best: pd.Series, trained: pd.Series) -> list[str]:
    """Compare the two points on items that nothing was chosen by, or say which of them was not scored on those."""
    forgetting = view.objectives[0]
    column = f"{forgetting.name}_held_out"
    if view.held_out.empty:
        return []
    known = view.held_out.drop_duplicates("trial").set_index("trial")[column].astype(float)
    named = ((best, ""), (trained, ", that unlearned epoch,"))
    missing = [f"trial {int(row['trial'])}{which}" for row, which in named if row["trial"] not in known.index]
    if missing:
        were = "was" if len(missing) == 1 else "were"
        return [f"Whether that holds on the held-out items is not known: {' and '.join(missing)} {were} not scored on them."]
    here, there = (float(known[int(row["trial"])]) for row in (best, trained))
    if here <= there:
        return ["On the held-out items that gain is nothing: there the unlearned epoch as trained forgets as much."]
    title, places = forgetting.title, forgetting.places
    return [f"On the held-out items {title} is {decimal(here, places)} against {decimal(there, places)}."]


def _held_out_sentences(view: ReportData) -> list[str]:
    """How far front points fall back on the items nothing was chosen by, and how far the initial model itself does."""
    if view.held_out.empty:
        return []
    utility = view.objectives[1]
    here, there = _initial(view, utility), initial_held_out(view, utility)
    if here and there:
        shares = view.held_out[utility.name].astype(float) / here
        again = view.held_out[f"{utility.name}_held_out"].astype(float) / there
        row = int((again - shares).argmin())
        return [
            f"On the held-out items the initial model's {utility.title} is {decimal(there, utility.places)}, against "
            f"{decimal(here, utility.places)} on those for selection. Of that the front has {again.mean():.0%} on average, "
            f"against {shares.mean():.0%}; trial {int(view.held_out['trial'].iloc[row])} goes from {shares.iloc[row]:.0%} to "
            f"{again.iloc[row]:.0%}, the worst change."
        ]
    change = view.held_out[f"{utility.name}_difference"].astype(float)
    worst = int(view.held_out["trial"].iloc[int(change.argmin())])
    return [
        f"On the held-out items the front's {utility.title} changes by {decimal(change.mean(), utility.places)} on average, "
        f"at worst by {decimal(change.min(), utility.places)} (trial {worst})."
    ]


def initial_held_out(view: ReportData, objective: Objective) -> float | None:
    """Return the initial model's value on the held-out items; None where it was not scored on them."""
    if "model" not in view.controls:
        return None
    own = (view.controls["kind"] == "held_out") & (view.controls["model"] == INITIAL)
    known = view.controls.loc[own, objective.name].dropna()
    return None if known.empty else float(known.iloc[0])


def _noise_sentences(view: ReportData) -> list[str]:
    """Where forgetting stops meaning anything: perfect forgetting from other seeds, and a model that never learned."""
    forgetting, utility = view.objectives[:2]
    known = view.controls.dropna(subset=[forgetting.name]) if forgetting.name in view.controls else view.controls.iloc[:0]
    others, never = (known[known["kind"] == kind] for kind in (OTHER_RETAIN, NEVER_FINETUNED))
    sentences = []
    if not others.empty:
        first, *more = (row for _, row in others.sort_values(forgetting.name).iterrows())
        reached = ", ".join([_strength(forgetting, first), *(_strength(forgetting, row, named=False) for row in more)])
        seeds = count(len(others), "other seed")
        sentences.append(f"Retain models of {seeds} reach {reached}: differences up there mean nothing.")
    if not never.empty:
        row = never.iloc[0]
        gamed = forgetting.p_value is not None and row[forgetting.p_value] >= _GAMED
        sentences.append(
            f"A model never fine-tuned has {_strength(forgetting, row)} at {utility.title} {decimal(row[utility.name])}"
            + (": forget quality alone can be had for nothing." if gamed else ".")
        )
    return sentences


def _strength(forgetting: Objective, row: pd.Series, named: bool = True) -> str:
    if forgetting.p_value is not None:
        name, value = forgetting.title.removeprefix("log10 "), probability(row[forgetting.p_value])
    elif forgetting.companions:
        (key, name), *_ = forgetting.companions
        value = decimal(row[key], forgetting.places)
    else:
        name, value = forgetting.title, decimal(row[forgetting.name], forgetting.places)
    return f"{name} {value}" if named else value
