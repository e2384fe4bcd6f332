"""The report of a study: one self-contained HTML page with its pictures beside it."""

import base64
import math
import os
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from search.pareto import utility_floor
from uipe_core.errors import UserError

METRIC_COLUMNS = ["log10_forget_quality", "forget_quality", "ks_statistic", "model_utility", "logit_scale"]
TRIAL_COLUMNS = [
    "trial",
    "kind",
    "base",
    "method",
    "epoch",
    "alpha",
    "walk",
    *METRIC_COLUMNS,
    "flagged",
    "seconds",
    "on_front",
]
CONTROL_COLUMNS = ["kind", "base", "method", "epoch", "alpha", "temperature", "of_trial", *METRIC_COLUMNS]

STAGES = {
    "models": "models: load or train the initial and the retain model",
    "base_runs": "base runs: train each unlearning method once",
    "baselines": "baselines: score alpha = 0 and the controls",
    "trials": "trials: re-apply cached updates and score",
}
CONTROLS = {
    "initial": ("Initial model", "Still knows everything: where every walk starts, and the utility worth keeping."),
    "retain": ("Retain model", "Never saw the forget set: what perfect forgetting looks like, by definition."),
    "next_epoch": (
        "Next epoch",
        "One more epoch of plain training: a longer walk must beat what training on would have given.",
    ),
    "random_direction": (
        "Random direction",
        "Same norm in every tensor, same alpha, drawn at random: what the size of a step does without its direction.",
    ),
    "temperature": (
        "Logit temperature",
        "The initial model with scaled logits: how much utility sharper probabilities give with nothing learned.",
    ),
}

# Gains below this share of the hypervolume at alpha = 0 are rounding, not results.
_NOTHING = 1e-6
_AS_MUCH = 0.9
_FLOOR = 0.95


@dataclass(frozen=True, eq=False)
class ReportData:
    """All that a report shows, read from a study by the caller.

    Attributes:
        trials: a row per complete point of the search space with the columns of `TRIAL_COLUMNS`. `kind` is
            "alpha_zero" or "search"; `walk` is "initial model", "interpolation", "unlearned epoch" or "extrapolation";
            `seconds` is the time of the trial. Optional: `related_log10_forget_quality`,
            `unrelated_log10_forget_quality` and the components of utility.
        controls: a row per scored control with the columns of `CONTROL_COLUMNS`, NaN or None where one does not apply.
            `kind` is a key of `CONTROLS`; `of_trial` is the trial that a random direction mirrors.
        summary: study, definition, corpus, model, seed, dtype, forget_items, log10_floor, reference_point,
            forget_quality_cap, alpha {low, high}, trials {complete, pruned, failed, running}, hypervolume, gain
            {all, extrapolation_only, random_direction}, seconds by stage, base_run_seconds [training only], storage,
            created (ISO time), versions; and,
            where there are any, selections [{rule, trial, ...}], notes [text], failures [{trial, reason}].
    """

    trials: pd.DataFrame
    controls: pd.DataFrame
    summary: dict[str, Any]


def write_report(view: ReportData, folder: Path) -> Path:
    """Writes `report.html`, `front.png` and `alpha_curves.png` into a folder, each whole or not at all.

    Args:
        view: the study's tables and summary.
        folder: created where it is missing; an older report in it is replaced.

    Returns:
        The path of `report.html`, which needs no other file and no network.

    Raises:
        UserError: the folder cannot be written.
        ValueError: a column that the report needs is missing, or a walk or kind of control has an unknown name.
    """
    from search import plots  # matplotlib comes with it, which writes into the home folder unless told otherwise before

    missing = [column for column in TRIAL_COLUMNS if column not in view.trials.columns]
    if missing:
        raise ValueError(f"trials lack the columns {missing}")
    strange = set(view.trials["walk"]) - set(plots.WALKS) | set(view.controls.get("kind", ())) - set(CONTROLS)
    if strange:
        raise ValueError(f"walks or kinds of control that the report does not know: {sorted(map(str, strange))}")
    trials = view.trials.astype({"on_front": bool, "flagged": bool})
    controls = view.controls.reindex(columns=list(dict.fromkeys([*CONTROL_COLUMNS, *view.controls.columns])))
    cap, definition = view.summary["forget_quality_cap"], view.summary["definition"]
    pictures = {
        "front": plots.png(plots.front_figure(trials, controls, cap, definition)),
        "alpha_curves": plots.png(plots.alpha_figure(trials, controls, cap, definition)),
    }
    page = _render(ReportData(trials, controls, view.summary), pictures)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            _replace(folder / f"{name}.png", picture)
        _replace(folder / "report.html", page.encode())
    except OSError as error:
        raise UserError(f"cannot write the report into {folder}: {error.strerror}; free space or choose another") from error
    return folder / "report.html"


def verdict(view: ReportData) -> list[str]:
    """What won, in plain sentences: what alpha gained over the unlearned epochs, and whether chance gains as much.

    Gains are hypervolumes over what is given without a search: the initial model and every epoch at alpha = 0.
    """
    front = view.trials[view.trials["on_front"]]
    if front.empty:
        return ["No trial is complete yet, so there is no front to judge."]
    walks = front["walk"].value_counts()
    longer, shorter = int(walks.get("extrapolation", 0)), int(walks.get("interpolation", 0))
    given = len(front) - longer - shorter
    sentences = [
        *_gain_sentences(view),
        *_next_epoch_sentences(view),
        *_floor_sentences(view),
        f"The front has {_count(len(front), 'point')}: {given} given at alpha = 0, {shorter} by interpolation "
        f"(alpha below 0) and {longer} by extrapolation (alpha above 0).",
    ]
    flagged = int(front["flagged"].sum())
    if flagged:
        sentences.append(
            f"{flagged} of {_count(len(front), 'front point')} {'is' if flagged == 1 else 'are'} flagged: "
            "utility above both the initial and the retain model, which sharper logits alone can bring about."
        )
    return sentences


def _gain_sentences(view: ReportData) -> list[str]:
    gain, scale = view.summary["gain"], view.summary["hypervolume"].get("alpha_zero")
    everything, longer, chance = (_number(gain.get(key)) for key in ("all", "extrapolation_only", "random_direction"))
    nothing = _NOTHING * max(abs(_number(scale, 0.0)), _NOTHING)
    if math.isnan(everything):
        return ["The gain over alpha = 0 was not measured."]
    if everything <= nothing:
        return ["The search won nothing: no alpha, above or below 0, beats the unlearned epochs as they were trained."]
    sentences = [f"Choosing alpha won {_decimal(everything)} of hypervolume over the unlearned epochs as they were trained."]
    if view.summary["alpha"]["low"] < 0 and not math.isnan(longer):
        if longer <= nothing:
            sentences.append(
                "Extrapolation won nothing: all of the gain comes from alpha below 0, from scaling an update down."
            )
        else:
            sentences.append(f"Alpha of 0 and above alone won {_decimal(longer)}, {longer / everything:.0%} of it.")
    mirrored = int((view.controls["kind"] == "random_direction").sum())
    if math.isnan(chance) or mirrored == 0:
        return [*sentences, "No random direction was scored, so the gain is not yet told from chance."]
    drawn = f"{_count(mirrored, 'random direction')} of the same size"
    if chance >= _AS_MUCH * everything:
        sentences.append(
            f"But {drawn} won {_decimal(chance)}, as much as the search: the gain is no evidence for the unlearning direction."
        )
    elif chance <= nothing:
        sentences.append(f"{drawn[0].upper()}{drawn[1:]} won nothing, so the direction carries the gain.")
    else:
        sentences.append(f"{drawn[0].upper()}{drawn[1:]} won {_decimal(chance)}, {chance / everything:.0%} of it.")
    return sentences


def _next_epoch_sentences(view: ReportData) -> list[str]:
    """The paper's control: whether training one epoch longer goes where no alpha went."""
    objectives = ["log10_forget_quality", "model_utility"]
    controls = view.controls[view.controls["kind"] == "next_epoch"]
    further = controls[objectives].dropna().to_numpy(dtype=float)
    if len(further) == 0:
        return []
    front = view.trials.loc[view.trials["on_front"], objectives].to_numpy(dtype=float)
    beyond = sum(not any((point >= other).all() for point in front) for other in further)
    of_all = f"of {_count(len(further), 'next epoch')} of plain training"
    if beyond == 0:
        return [f"None {of_all} lies beyond the front."]
    return [
        f"{beyond} {of_all} {'lies' if beyond == 1 else 'lie'} beyond the front: there training on beats every alpha tried."
    ]


def _floor_sentences(view: ReportData) -> list[str]:
    """The gain as one deployable point: the strongest forgetting at nearly the initial model's utility."""
    initial = view.controls.loc[view.controls["kind"] == "initial", "model_utility"].dropna()
    scored = view.trials.dropna(subset=["log10_forget_quality", "model_utility"])
    if initial.empty:
        return []
    picks = []
    for table in (scored, scored[scored["kind"] == "alpha_zero"]):
        try:
            row = utility_floor(table["log10_forget_quality"], table["model_utility"], _FLOOR * float(initial.iloc[0]))
        except UserError:
            break
        picks.append(table.iloc[row])
    if not picks:
        return [f"No trial keeps {_FLOOR:.0%} of the initial model's utility."]
    best = picks[0]
    sentence = (
        f"At {_FLOOR:.0%} or more of the initial model's utility the strongest forgetting is "
        f"trial {int(best['trial'])} "
        f"({best['base']}, epoch {int(best['epoch'])}, alpha {_alpha(best['alpha'])}) with forget quality "
        f"{_probability(best['forget_quality'])}"
    )
    if len(picks) == 1:
        return [f"{sentence}; no unlearned epoch as trained keeps that much."]
    if picks[1]["log10_forget_quality"] >= best["log10_forget_quality"]:
        return [f"{sentence}; no other alpha forgets more than the best unlearned epoch there."]
    return [f"{sentence}; the best unlearned epoch as trained reaches {_probability(picks[1]['forget_quality'])}."]


def _render(view: ReportData, pictures: dict[str, bytes]) -> str:
    from search import plots

    source = resources.files("search").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        probability=_probability, decimal=_decimal, alpha=_alpha, seconds=_seconds, whole=_whole, table_text=_table_text
    )
    front = view.trials[view.trials["on_front"]].sort_values(["log10_forget_quality", "model_utility"])
    by_trial = {int(row["trial"]): row for row in view.trials.to_dict("records")}
    bases = int(view.trials["base"].nunique())
    return environment.from_string(source).render(
        summary={"selections": [], "notes": [], "failures": [], **view.summary},
        verdict=verdict(view),
        gains=_gain_bars(view.summary),
        front=front.to_dict("records"),
        extra=[name for name in ("related", "unrelated") if f"{name}_log10_forget_quality" in view.trials.columns],
        by_trial=by_trial,
        controls=[
            {"name": name, "purpose": purpose, "rows": view.controls[view.controls["kind"] == kind].to_dict("records")}
            for kind, (name, purpose) in CONTROLS.items()
        ],
        cost=_cost(view),
        bases=bases,
        bases_shown=len(plots.shown_bases(view.trials)),
        picture_width=round(plots.WIDTH * plots.DPI / 2),
        front_picture=base64.b64encode(pictures["front"]).decode(),
        alpha_picture=base64.b64encode(pictures["alpha_curves"]).decode(),
    )


def _gain_bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    labels = {"all": "all alpha", "extrapolation_only": "alpha ≥ 0", "random_direction": "random directions"}
    gains = {key: _number(summary["gain"].get(key)) for key in labels}
    longest = max([value for value in gains.values() if value > 0], default=1.0)
    shares = {key: 0.0 if math.isnan(value) else max(value, 0.0) / longest for key, value in gains.items()}
    return [{"label": labels[key], "gain": gains[key], "share": 100 * shares[key]} for key in labels]


def _cost(view: ReportData) -> dict[str, Any]:
    spent = {stage: _number(view.summary["seconds"].get(stage), 0.0) for stage in STAGES}
    total = sum(spent.values())
    search = view.trials[view.trials["kind"] == "search"]
    trained = view.summary["base_run_seconds"]
    base_run = sum(trained) / len(trained) if trained else math.nan
    trial = float(search["seconds"].median())
    return {
        "stages": [
            {"label": label, "seconds": spent[stage], "share": 100 * spent[stage] / total if total else 0.0}
            for stage, label in STAGES.items()
        ],
        "total": total,
        "trials_per_second": len(search) / spent["trials"] if spent["trials"] else math.nan,
        "trial": trial,
        "base_run": base_run,
        "ratio": base_run / trial if trial > 0 and base_run > 0 else math.nan,
    }


def _replace(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files that only the owner may read; a report is there to be passed on.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _number(value: Any, missing: float = math.nan) -> float:
    return missing if value is None or pd.isna(value) else float(value)


def _decimal(value: Any, places: int = 4) -> str:
    number = _number(value)
    return "–" if math.isnan(number) else f"{number:.{places}f}".replace("-", "−")


def _probability(value: Any) -> str:
    number = _number(value)
    if math.isnan(number):
        return "–"
    return f"{number:.3f}" if number >= 0.001 or number == 0 else f"{number:.1e}".replace("e-0", "e-").replace("e-", "e−")


def _alpha(value: Any) -> str:
    number = _number(value)
    if math.isnan(number):
        return "–"
    return "0" if number == 0 else f"{number:+.3f}".replace("-", "−")


def _whole(value: Any) -> str:
    number = _number(value)
    return "–" if math.isnan(number) else f"{number:.0f}"


def _seconds(value: Any) -> str:
    number = _number(value)
    if math.isnan(number):
        return "–"
    if number >= 5400:
        return f"{number / 3600:.1f} h"
    if number >= 90:
        return f"{number / 60:.1f} min"
    return f"{number:.1f} s" if number >= 1 else f"{1000 * number:.0f} ms"


def _table_text(value: Any) -> str:
    return "–" if value is None or (not isinstance(value, str) and pd.isna(value)) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
