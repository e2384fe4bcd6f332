"""The page of the experiments: one self-contained HTML file, its pictures as files, and all numbers as JSON."""

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from search.paper import measures
from search.paper.attacks import AttackSettings
from search.paper.claims import LOG_FQ, SHARE, UTILITY, judged
from search.paper.experiment import OTHER_RETAIN
from search.paper.measures import CEILING, FLOOR, STEP, World
from search.paper.settings import PAPER_LORA, TUNINGS, PaperSettings
from search.paper.statistics import CONFIDENCE, FAILS, HOLDS, OPEN, at, best_above, estimate, finite_mean
from search.paper.survival import summarise as summarise_attacks
from search.report.style import alpha, count, decimal, page_style, seconds
from uipe_core.errors import UserError
from uipe_core.metrics.tofu import log10_p_floor
from uipe_core.storage.files import write_atomic

MODEL_ROWS = {
    "full": "M1 and M3 before unlearning: K1 and K2 learned",
    "full_k1": "M2 before unlearning: K1 learned",
    "full_k2": "K2 learned, K1 never seen",
    "retain": "retain model: neither seen (the reference)",
    OTHER_RETAIN: "retain model of another seed: the noise ceiling",
}

RULE = (
    f"holds where Student's {CONFIDENCE:.0%} interval of the mean over seeds is above the threshold, does not hold where it "
    "is below, is not decided otherwise"
)


def write_page(
    out: Path,
    attacks: AttackSettings,
    parts: Sequence[dict[str, Any]],
    uipe: tuple[PaperSettings, Sequence[dict[str, Any]]] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write ``paper.html``, ``results.json`` and a PNG per picture into a folder.

    Args:
        out: The folder; must exist.
        attacks: What was attacked.
        parts: One per base run and seed, as `run_attacks` gives them.
        uipe: What was run of UIPE's experiments, and one result per task, as `run_task` gives them; None for a page of
            attacks alone.

    Returns:
        The path of the page, and the content of ``results.json`` without its points.

    Raises:
        UserError: If the folder cannot be written, or nothing was attacked.
    """
    from search.paper import pictures
    from search.report import style as plot_style  # matplotlib comes with it

    attacked, survival = summarise_attacks(attacks, parts)
    summary: dict[str, Any] = {"survival": survival}
    points: dict[str, Any] = {"attacked_points": list(parts)}
    drawn = {}
    if uipe is not None:
        settings, results = uipe
        worlds = [World(settings, result) for result in results]
        drawn = {
            "models": pictures.models_figure(settings, worlds),
            "related": pictures.related_figure(settings, worlds),
            "weights": pictures.weights_figure(settings, worlds),
            "tradeoff": pictures.tradeoff_figure(settings, worlds),
            "matched": pictures.matched_figure(settings, worlds),
            "alpha": pictures.alpha_figure(settings, worlds),
            "stall": pictures.stall_figure(settings, worlds),
        }
        summary = {**summarise(settings, worlds, results), **summary}
        points["points"] = [
            {"seed": result["seed"], "tuning": result["tuning"], **point} for result in results for point in result["points"]
        ]
    drawn["attacks"] = pictures.attacks_figure(attacked)
    pngs = {name: plot_style.picture(figure) for name, figure in drawn.items()}
    page = _render(None if uipe is None else uipe[0], summary, pngs, round(plot_style.WIDTH * plot_style.DPI / 2))
    files = {f"{name}.png": picture for name, picture in pngs.items()}
    files["results.json"] = json.dumps({**summary, **points}, indent=1, allow_nan=False).encode()
    files["paper.html"] = page.encode()
    _write(files, out)
    return out / "paper.html", summary


def _write(files: Mapping[str, bytes], out: Path) -> None:
    try:
        for name, content in files.items():
            write_atomic(out / name, content)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}; choose another folder") from error


def summarise(settings: PaperSettings, worlds: Sequence[World], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All numbers of the page, as strict JSON."""
    claims = judged(worlds)
    return {
        "definition": settings.definition,
        "seeds": sorted({world.seed for world in worlds}),
        "rule": RULE,
        "claims": claims,
        "verdicts": {
            tuning: {verdict: sum(claim[tuning]["verdict"] == verdict for claim in claims) for verdict in (HOLDS, FAILS, OPEN)}
            for tuning in TUNINGS
        },
        "models": _models(worlds),
        "table_1": _table_1(settings, worlds),
        "epochs": _epochs(settings, worlds),
        "matched": {tuning: _matched([world for world in worlds if world.tuning == tuning]) for tuning in TUNINGS},
        "by_method": _by_method(settings, worlds),
        "items": worlds[0].items,
        "log10_floor": log10_p_floor(worlds[0].items["forget"], worlds[0].items["forget"]),
        "ceiling": CEILING,
        "utility_floor": FLOOR,
        "match_step": STEP,
        "settings": settings.as_dict(),
        "seconds": sum(result["seconds"] for result in results),
    }


def _models(worlds: Sequence[World]) -> list[dict[str, Any]]:
    """Mean over seeds of the models before unlearning; both ways of fine-tuning start from the same ones."""
    first = [world for world in worlds if world.tuning == next(iter(TUNINGS))]
    columns = ("k1", "k2", "k0", "utility", "k1_log_truth_ratio", "k2_log_truth_ratio")
    return [
        {"name": name, "title": title, **{key: finite_mean([world.models[name][key] for world in first]) for key in columns}}
        for name, title in MODEL_ROWS.items()
    ]


def _table_1(settings: PaperSettings, worlds: Sequence[World]) -> list[dict[str, Any]]:
    """Where each model has used up the utility it may lose: means over seeds."""
    rows = []
    for tuning, title in TUNINGS.items():
        group = [world for world in worlds if world.tuning == tuning]
        for method in settings.table_methods:
            for model in ("M1", "M2", "M3"):
                curves = [world.curve(model, method) for world in group]
                places = [world.kept_until(model, method) for world in group]
                best = [best_above(curve["k1"], curve["utility"], FLOOR * float(curve["utility"].iloc[0])) for curve in curves]
                there = {
                    name: finite_mean([at(curve[name], place) for curve, place in zip(curves, places, strict=True)])
                    for name in ("k1", "k2", "k0", "utility")
                }
                rows.append(
                    {
                        "tuning": title,
                        "method": method,
                        "model": model,
                        "epoch": finite_mean(places),
                        "best_k1": finite_mean(best),
                        **there,
                    }
                )
    return rows


def _epochs(settings: PaperSettings, worlds: Sequence[World]) -> list[dict[str, Any]]:
    """Forget quality on K1 and utility by epoch: means over seeds."""
    rows = []
    for tuning, title in TUNINGS.items():
        group = [world for world in worlds if world.tuning == tuning]
        for method in settings.table_methods:
            for model in ("M1", "M2", "M3"):
                table = pd.concat([world.curve(model, method) for world in group])
                by_epoch = table.groupby("epoch")[["k1", "k2", "utility"]].mean()
                columns = {name: by_epoch[name].tolist() for name in ("k1", "k2", "utility")}
                rows.append({"tuning": title, "method": method, "model": model, **columns})
    return rows


def _matched(group: Sequence[World]) -> dict[str, Any]:
    found = [measures.matched_points(world) for world in group]
    wrong = [gain for world in group for gain in measures.left_out_gains(world)]
    total = sum(len(world.walks()) * len(world.settings.alphas) for world in group)
    return {
        "points": sum(len(points) for points in found),
        "of": total,
        "left_out_mean": finite_mean(wrong),
        "left_out_root_mean_square": float(np.sqrt(np.mean(np.square(wrong)))) if wrong else None,
    }


def _by_method(settings: PaperSettings, worlds: Sequence[World]) -> list[dict[str, Any]]:
    """Return what extrapolation gains over plain training, method by method: the claims on figure 6 and on K2 in detail."""
    rows = []
    for tuning, title in TUNINGS.items():
        group = [world for world in worlds if world.tuning == tuning]
        for method in settings.methods:
            k2 = [
                measures.mean([point["k2_gain"] for point in measures.matched_points(world) if point["method"] == method])
                for world in group
            ]
            utility = [measures.at_same_k1(world, "utility", [method]) for world in group]
            gains = {"k2": estimate(k2).as_dict(), "utility": estimate(utility).as_dict()}
            rows.append({"tuning": title, "method": method, **gains})
    return rows


def effect_text(claim: dict[str, Any], tuning: str) -> str:
    """Mean and standard error of a claim's effect, as people read them."""
    return estimate_text(claim[tuning], claim["unit"])


def estimate_text(found: dict[str, Any], unit: str) -> str:
    """Mean and standard error; one seed has none."""
    error = "" if found["error"] is None else f" ± {_effect(found['error'], unit)}"
    return f"{_effect(found['mean'], unit)}{error}"


def _effect(value: Any, unit: str) -> str:
    return decimal(value, {LOG_FQ: 2, UTILITY: 4, SHARE: 4}.get(unit, 3))


def _render(settings: PaperSettings | None, summary: dict[str, Any], pngs: dict[str, bytes], width: int) -> str:
    source = resources.files("search.paper").joinpath("paper.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        alpha=alpha, decimal=decimal, effect=_effect, effect_text=effect_text, estimate_text=estimate_text, seconds=seconds
    )
    return environment.from_string(source).render(
        style=page_style(),
        summary=summary,
        tunings=TUNINGS,
        settings=settings,
        lora=PAPER_LORA,
        seeds=count(len((summary if settings else summary["survival"])["seeds"]), "seed"),
        pictures={name: base64.b64encode(picture).decode() for name, picture in pngs.items()},
        width=width,
    )
