"""Draw the figures of a study's report. The marker shows the walk, so that colour alone never does."""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from search.evaluation.controls import CONTROLS, Marker
from search.problem.objectives import Objective
from search.report.data import FORGETTING, UTILITY, ReportData, shown_bases
from search.report.style import BAND, DPI, FAINT, INK, MUTED, PALETTE, WALKS, WIDTH, padded, plain, style, title

COLUMNS = 4
_GUIDE = (0, (2, 2))
SURFACES = ("#d3d3d3", "#a9a9a9", "#7a7a7a")
"""Colours of the attainment surfaces, from that of the fewest seeds."""
_PLACES = [(8, 8), (-8, 8), (8, -8), (-8, -8), (0, 11), (0, -11)]


def _markers(named: bool) -> dict[str, Marker]:
    """Return the markers of the controls that figures draw: the reference models, named in the figure, or the others."""
    drawn = {kind: control.marker for kind, control in CONTROLS.items() if control.marker is not None}
    return {kind: marker for kind, marker in drawn.items() if (marker.size is not None) is named}


def front_figure(view: ReportData) -> Figure:
    """Utility over forgetting: every trial, the front, the references and the controls.

    A second panel shows the third objective in place of forgetting where there is one; else it looks closer at the front
    where other points crowd it out of the first.
    """
    trials, controls = view.by_role(view.trials), view.by_role(_drawn(view.controls))
    third = view.objectives[2] if len(view.objectives) > 2 else None
    front = trials[trials["on_front"]].dropna(subset=[FORGETTING, UTILITY])
    full = _window(pd.concat([trials, controls])[[FORGETTING, UTILITY]].dropna(), view.objectives[0])
    near = pd.concat([front, controls[controls["kind"].isin(_markers(named=True))]])[[FORGETTING, UTILITY]].dropna()
    close = _window(near, view.objectives[0])
    zoomed = third is None and len(front) > 1 and _area(close) < 0.55 * _area(full)
    figure = Figure(figsize=(WIDTH, 6.3), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(1, 1 + (zoomed or third is not None), squeeze=False)[0])
    colours = method_colours(trials)
    shown = [(view.objectives[0], trials, controls, full)]
    if zoomed:
        shown.append((view.objectives[0], trials, controls, close))
    elif third is not None:
        points, references = (table.assign(**{FORGETTING: table[third.name].astype(float)}) for table in (trials, controls))
        shown.append(
            (third, points, references, _window(pd.concat([points, references])[[FORGETTING, UTILITY]].dropna(), third))
        )
    definition = view.summary["definition"]
    for axes, (objective, points, references, window) in zip(panels, shown, strict=True):
        _scatter_controls(axes, references)
        _scatter_trials(axes, points, colours)
        if third is None:
            _surfaces(axes, view, window)
            _step_line(axes, front)
        axes.set(xlim=window[0], ylim=window[1], xlabel=f"{objective.title} ({definition})")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=objective.quality_of is not None))
        ceiling = objective.ceiling(view.summary["forget_quality_cap"])
        if math.isfinite(ceiling):
            axes.axvspan(ceiling, max(ceiling, window[0][1]), color=BAND, zorder=0)
        style(axes)
    panels[0].set_ylabel(f"{view.objectives[1].title} ({definition})")
    if zoomed:
        title(panels[0], "All trials")
        title(panels[1], "Close-up of the front; numbers are trials")
    handles = _front_legend(view, colours, lined=third is None)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    # Labels are placed by pixels, and those stand only once the layout is done.
    figure.draw_without_rendering()
    for axes, (_, points, references, _) in zip(panels, shown, strict=True):
        chosen = points[points["on_front"]].dropna(subset=[FORGETTING, UTILITY])
        _label(axes, chosen, references, numbered=axes is panels[-1])
    return figure


def comparison_figure(found: Mapping[str, Any]) -> Figure:
    """Utility over forgetting of several fronts, as `search.results.comparison.compare_studies` has them."""
    forgetting, utility = found["objectives"]
    figure = Figure(figsize=(WIDTH * 0.62, 5.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for place, study in enumerate(found["studies"]):
        rows = [{FORGETTING: point["numbers"][forgetting], UTILITY: point["numbers"][utility]} for point in study["points"]]
        front = pd.DataFrame(rows, columns=[FORGETTING, UTILITY]).sort_values(FORGETTING, ascending=False)
        colour, marker = PALETTE[place % len(PALETTE)], "o^sDvP"[place % 6]
        axes.step(front[FORGETTING], front[UTILITY], where="post", color=colour, linewidth=1.2, alpha=0.6)
        label = f"{study['study']} ({study['out']})"
        axes.scatter(front[FORGETTING], front[UTILITY], color=colour, marker=marker, s=42.0, label=label, zorder=3)
    if (ceiling := found["ceilings"][forgetting]) is not None:
        axes.axvspan(ceiling, max(ceiling, axes.get_xlim()[1]), color=BAND, zorder=0)
    axes.set(xlabel=f"{forgetting.replace('_', ' ')} ({found['definition']})", ylabel=utility.replace("_", " "))
    style(axes)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def alpha_figure(view: ReportData) -> Figure:
    """Forgetting and utility over alpha: a column per base run, a line per epoch, at most `COLUMNS` side by side."""
    trials, controls = view.by_role(view.trials), view.by_role(view.controls)
    bases = shown_bases(trials)
    columns = max(1, min(COLUMNS, len(bases)))
    blocks = max(1, -(-len(bases) // columns))
    figure = Figure(figsize=(WIDTH, 0.9 + 4.2 * blocks), dpi=DPI, layout="constrained")
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    crosses = controls[controls["kind"] == "random_direction"]
    start = controls[controls["kind"] == "initial"]
    everything = pd.concat([trials, crosses, start])[[FORGETTING, UTILITY]].dropna()
    limits = dict(zip((FORGETTING, UTILITY), _window(everything, view.objectives[0]), strict=True))
    alphas = np.append(trials["alpha"].dropna().to_numpy(dtype=float), [-0.02, 0.02])
    across = padded(float(alphas.min()), float(alphas.max()), 0.04, 0.05)
    epochs = sorted({int(epoch) for epoch in trials["epoch"].dropna()})
    shades = dict(zip(epochs, colormaps["viridis_r"](np.linspace(0.12, 1.0, len(epochs))), strict=True))
    definition = view.summary["definition"]
    for place in range(blocks * columns):
        pair = grid[2 * (place // columns) : 2 * (place // columns) + 2, place % columns]
        if place >= max(1, len(bases)):
            for axes in pair:
                axes.remove()
            continue
        for axes, metric in zip(pair, (FORGETTING, UTILITY), strict=True):
            _alpha_guides(axes, controls, metric, view.ceiling)
            if bases:
                of_base = crosses[crosses["base"] == bases[place]]
                axes.scatter(of_base["alpha"], of_base[metric], marker="x", s=22, color=FAINT, linewidths=1.1, zorder=1.5)
                for epoch, shade in shades.items():
                    line = trials[(trials["base"] == bases[place]) & (trials["epoch"] == epoch)]
                    _alpha_line(axes, line, start, metric, shade)
            axes.set(xlim=across, ylim=limits[metric])
            axes.xaxis.set_major_locator(MaxNLocator(4))
            style(axes)
        name = bases[place].replace("[", " [", 1) if bases else "no trial yet"
        title(pair[0], "\n".join(textwrap.wrap(name, 100 // columns)))
        pair[0].tick_params(labelbottom=False)
        pair[1].set_xlabel("alpha")
        for axes, objective in zip(pair, view.objectives, strict=False):
            if place % columns == 0:
                axes.set_ylabel(textwrap.fill(f"{objective.title} ({definition})", 30))
            else:
                axes.tick_params(labelleft=False)
    handles = _alpha_legend(shades, view)
    figure.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _drawn(controls: pd.DataFrame) -> pd.DataFrame:
    """The controls with a place in the picture: not those on other items or with other logits than the trials."""
    return controls[controls["kind"].isin([*_markers(named=False), *_markers(named=True)])]


def method_colours(trials: pd.DataFrame) -> dict[str, str]:
    """Colour of each method, in alphabetical order, so that the same methods look the same in every report."""
    methods = sorted(trials["method"].dropna().unique())
    return {method: PALETTE[place % len(PALETTE)] for place, method in enumerate(methods)}


def _scatter_trials(axes: Axes, trials: pd.DataFrame, colours: dict[str, str]) -> None:
    for walk, (marker, size, _) in WALKS.items():
        for on_front in (False, True):
            group = trials[(trials["walk"] == walk) & (trials["on_front"] == on_front)]
            axes.scatter(
                group[FORGETTING],
                group[UTILITY],
                marker=marker,
                s=size * (1.5 if on_front else 0.8),
                c=[colours[method] for method in group["method"]],
                alpha=1.0 if on_front else 0.5,
                edgecolors=INK if on_front else "none",
                linewidths=0.9,
                zorder=4 if on_front else 2,
            )
    flagged = trials[trials["flagged"]]
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": INK, "linewidths": 0.9, "zorder": 5}
    axes.scatter(flagged[FORGETTING], flagged[UTILITY], s=170, **ring)


def _scatter_controls(axes: Axes, controls: pd.DataFrame) -> None:
    for kind, marker in _markers(named=False).items():
        group = controls[controls["kind"] == kind]
        axes.scatter(group[FORGETTING], group[UTILITY], marker=marker.shape, s=38, color=FAINT, linewidths=1.2, zorder=1.5)
    for kind, marker in _markers(named=True).items():
        group = controls[controls["kind"] == kind]
        edge: dict[str, Any] = {"edgecolors": INK, "linewidths": 1.3, "zorder": 6}
        axes.scatter(group[FORGETTING], group[UTILITY], marker=marker.shape, s=marker.size, color="white", **edge)


def _step_line(axes: Axes, front: pd.DataFrame) -> None:
    line = front.sort_values([FORGETTING, UTILITY], ascending=[True, False])
    axes.plot(line[FORGETTING], line[UTILITY], drawstyle="steps-pre", color=INK, linewidth=1.3, zorder=3)


def _surfaces(axes: Axes, view: ReportData, window: tuple[tuple[float, float], tuple[float, float]]) -> None:
    """Draw what shares of the seeds attain, within the window: the larger the share, the darker."""
    for corners, shade in zip(view.attainment.values(), SURFACES, strict=False):
        if corners:
            across, up = np.array(corners)[::-1].T
            across = np.concatenate([[min(window[0][0], across[0])], across, across[-1:]])
            up = np.concatenate([up[:1], up, [min(window[1][0], up[-1])]])
            axes.plot(across, up, drawstyle="steps-pre", color=shade, linewidth=1.6, zorder=1.2)


def _label(axes: Axes, front: pd.DataFrame, controls: pd.DataFrame, numbered: bool) -> None:
    """Name the references and, where there is room, numbers the front points."""
    references = controls[controls["kind"].isin(_markers(named=True))].dropna(subset=[FORGETTING, UTILITY])
    line = front.sort_values([FORGETTING, UTILITY], ascending=[True, False])[[FORGETTING, UTILITY]].to_numpy(dtype=float)
    corners = np.column_stack([line[:-1, 0], line[1:, 1]])
    drawn = [line, references[[FORGETTING, UTILITY]].to_numpy(dtype=float)]
    for share in np.linspace(0, 1, 25):
        drawn += [line[:-1] + share * (corners - line[:-1]), corners + share * (line[1:] - corners)]
    obstacles = axes.transData.transform(np.concatenate(drawn))
    taken: list[Any] = []
    for _, row in references.iterrows():
        text = _text(axes, _markers(named=True)[row["kind"]].label, row, "bold")
        if not _placed(axes, text, obstacles, taken):
            text.xyann = _PLACES[0]
    for _, row in front.sort_values(UTILITY, ascending=False).iterrows() if numbered else ():
        text = _text(axes, str(int(row["trial"])), row, "normal")
        if not _placed(axes, text, obstacles, taken):
            text.remove()


def _text(axes: Axes, text: str, row: pd.Series, weight: str) -> Annotation:
    halo = [withStroke(linewidth=2.5, foreground="white")]
    place = (float(row[FORGETTING]), float(row[UTILITY]))
    style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "fontweight": weight, "path_effects": halo, "zorder": 7}
    return axes.annotate(text, place, _PLACES[0], textcoords="offset points", va="center", annotation_clip=True, **style)


def _placed(axes: Axes, text: Annotation, obstacles: np.ndarray, taken: list[Any]) -> bool:
    """Move a label to the first place around its point where it hides nothing."""
    frame = axes.get_window_extent()
    for across, up in _PLACES:
        text.xyann = (across, up)
        text.set_horizontalalignment("center" if across == 0 else "left" if across > 0 else "right")
        box = text.get_window_extent().padded(4)
        inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
        x, y = obstacles.T
        if inside and not box.count_overlaps(taken) and not np.any((box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1)):
            taken.append(box)
            return True
    return False


def _front_legend(view: ReportData, colours: dict[str, str], lined: bool) -> list[Any]:
    trials, controls = view.trials, view.controls
    handles: list[Any] = [
        Line2D([], [], marker="o", linestyle="", color=colour, markersize=7, label=plain(method))
        for method, colour in colours.items()
    ]
    walks = set(trials["walk"])
    for walk, (shape, _, label) in WALKS.items():
        if walk in walks:
            handles.append(Line2D([], [], marker=shape, linestyle="", color=MUTED, markersize=7, label=label))
    kinds = set(controls["kind"])
    for kind, marker in _markers(named=False).items():
        if kind in kinds:
            handles.append(Line2D([], [], marker=marker.shape, linestyle="", color=FAINT, markersize=7, label=marker.label))
    if trials["on_front"].any():
        drawn = {"linewidth": 1.3} if lined else {"marker": "o", "linestyle": "", "fillstyle": "none"}
        handles.append(Line2D([], [], color=INK, label="Pareto front (edged points)", **drawn))
    if lined:
        for share, shade in zip(view.attainment, SURFACES, strict=False):
            handles.append(Line2D([], [], color=shade, linewidth=1.6, label=f"attained by {share} of the seeds"))
    if trials["flagged"].any():
        label = f"flagged: {view.flag.meaning}"
        handles.append(Line2D([], [], marker="o", linestyle="", color=INK, fillstyle="none", markersize=12, label=label))
    return [*handles, *_noise_legend(view)]


def _noise_legend(view: ReportData) -> list[Any]:
    if not math.isfinite(view.ceiling):
        return []
    return [Patch(color=BAND, label=f"noise: forget quality above {view.summary['forget_quality_cap']:.2g}")]


def _alpha_legend(shades: dict[int, Any], view: ReportData) -> list[Any]:
    every = -(-len(shades) // 12) or 1
    handles: list[Any] = [
        Line2D([], [], marker="o", markersize=4.5, linewidth=1.4, color=shade, label=f"epoch {epoch}")
        for epoch, shade in list(shades.items())[::every]
    ]
    kinds = set(view.controls["kind"])
    if "random_direction" in kinds:
        handles.append(Line2D([], [], marker="x", linestyle="", color=FAINT, label="random direction"))
    for kind, marker in _markers(named=True).items():
        if kind in kinds:
            label = f"utility of the {marker.label}"
            handles.append(Line2D([], [], linewidth=1.1, linestyle=marker.dashes, color=MUTED, label=label))
    return [*handles, *_noise_legend(view)]


def _alpha_guides(axes: Axes, controls: pd.DataFrame, metric: str, ceiling: float) -> None:
    for alpha in (-1.0, 0.0):
        axes.axvline(alpha, color=FAINT, linewidth=0.9, linestyle=_GUIDE, zorder=1)
    if metric == FORGETTING:
        if math.isfinite(ceiling):
            axes.axhspan(ceiling, 10.0, color=BAND, zorder=0)
        return
    for kind, marker in _markers(named=True).items():
        for level in controls.loc[controls["kind"] == kind, metric].dropna():
            axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=marker.dashes, zorder=1)


def _alpha_line(axes: Axes, line: pd.DataFrame, start: pd.DataFrame, metric: str, colour: Any) -> None:
    points = line[["alpha", metric]].dropna().sort_values("alpha")
    axes.plot(points["alpha"], points[metric], marker="o", markersize=3.6, linewidth=1.1, color=colour, zorder=3)
    known = start[metric].dropna()
    if len(points) and len(known) and -1.0 < points["alpha"].iloc[0] < 0.0:
        # Every line leaves the initial model at alpha = -1 by construction; dashes, since nothing was scored between.
        ends = [[-1.0, points["alpha"].iloc[0]], [known.iloc[0], points[metric].iloc[0]]]
        axes.plot(*ends, linewidth=0.9, linestyle=(0, (3, 2)), color=colour, alpha=0.6, zorder=2)


def _window(points: pd.DataFrame, forgetting: Objective) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of both axes with a margin that markers and labels fit into."""
    if points.empty:
        return (-1.0, 0.1), (0.0, 1.0)
    low, high = points.min(), points.max()
    least = 1.0 if forgetting.quality_of is not None else 0.01
    across = padded(float(low[FORGETTING]), float(high[FORGETTING]), 0.06, least)
    return across, padded(float(low[UTILITY]), float(high[UTILITY]), 0.07, 0.01)


def _area(window: tuple[tuple[float, float], tuple[float, float]]) -> float:
    (left, right), (bottom, top) = window
    return (right - left) * (top - bottom)
