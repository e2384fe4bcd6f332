"""The pictures of the experiments: means over seeds with standard errors, walks as means over seeds, attacks as points."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from search.paper.attacks import ATTACKS, PUSHED, WALK
from search.paper.measures import left_out_gains, matched_points
from search.paper.panels import (
    DASHES,
    MODELS,
    SETS,
    Worlds,
    by_tuning,
    draw_line,
    epoch_handles,
    epoch_shades,
    finish,
    grid_of,
    handle,
    legend,
    noise_band,
    share_heights,
    table_columns,
    whole_epochs,
)
from search.paper.settings import PaperSettings
from search.paper.survival import Attacked
from search.report.style import BAND, FAINT, INK, MUTED, PALETTE

KINDS = {
    "matched": "its own\nK2",
    "same person": "K2, same\nperson",
    "same attribute": "K2, same\nattribute",
    "unrelated": "K0",
}


def models_figure(settings: PaperSettings, worlds: Worlds) -> Figure:
    """Table 1 and figure 2: forget quality on K1 and utility over epochs of M1, M2 and M3."""
    figure, grid = grid_of(2, 2 * len(settings.table_methods), 5.6)
    for column, title, method, group in table_columns(settings, worlds):
        for row, name in enumerate(("k1", "utility")):
            for model, (_, colour, marker) in MODELS.items():
                curves = [world.curve(model, method).set_index("epoch")[name] for world in group]
                draw_line(grid[row, column], curves, colour, marker)
        finish(grid[0, column], title)
        finish(grid[1, column], across="epoch")
    finish(grid[0, 0], up=f"log10 FQ of K1 ({settings.definition})")
    finish(grid[1, 0], up=f"model utility ({settings.definition})")
    for row in grid:
        share_heights(row)
        whole_epochs(row)
    noise_band(grid[0])
    legend(figure, [handle(*entry) for entry in MODELS.values()])
    return figure


def related_figure(settings: PaperSettings, worlds: Worlds) -> Figure:
    """Figure 3: forget quality and loss of K1, K2 and K0 over the epochs of M1."""
    figure, grid = grid_of(2, 2 * len(settings.table_methods), 5.6)
    for column, title, method, group in table_columns(settings, worlds):
        for row, suffix in enumerate(("", "_loss")):
            for name, (_, colour, marker) in SETS.items():
                curves = [world.curve("M1", method).set_index("epoch")[name + suffix] for world in group]
                draw_line(grid[row, column], curves, colour, marker)
        grid[1, column].set_yscale("log")
        finish(grid[0, column], title)
        finish(grid[1, column], across="epoch")
    finish(grid[0, 0], up=f"log10 FQ ({settings.definition})")
    finish(grid[1, 0], up="loss, nats per token")
    for row in grid:
        share_heights(row)
        whole_epochs(row)
    noise_band(grid[0])
    legend(figure, [handle(*entry) for entry in SETS.values()])
    return figure


def weights_figure(settings: PaperSettings, worlds: Worlds) -> Figure:
    """Equation 2 (gradient cosines), 4 (projections over epochs) and 6 (rise of the loss over alpha)."""
    figure, grid = grid_of(2, 3, 6.6)
    method, epoch = settings.table_methods[0], max(1, settings.epochs // 2)
    for row, (title, group) in zip(grid, by_tuning(worlds), strict=True):
        _cosines(row[0], group)
        finish(row[0], f"Equation 2, {title}", up="gradient cosine with K1")
        finish(row[1], f"Equation 4, {title}", up="length along the gradient")
        finish(row[2], f"Equation 6, {title}", up="rise of the loss, nats per token")
        whole_epochs([row[1]])
        for name, key in (("related", "k2"), ("unrelated", "k0")):
            _, colour, marker = SETS[key]
            frames = [world.projections for world in group]
            frames = [frame[(frame["method"] == method) & (frame["set"] == name)] for frame in frames]
            for part in ("measured", "predicted"):
                lines = [frame[frame["alpha"] == 0].set_index("epoch")[part] for frame in frames]
                draw_line(row[1], lines, colour, marker if part == "measured" else "", "-" if part == "measured" else DASHES)
            for part in ("rise", "first_order"):
                lines = [frame[frame["epoch"] == epoch].set_index("alpha")[part] for frame in frames]
                draw_line(row[2], lines, colour, marker if part == "rise" else "", "-" if part == "rise" else DASHES)
    finish(grid[-1, 1], across=f"epoch of {method}")
    finish(grid[-1, 2], across=f"alpha, from epoch {epoch} of {method}")
    entries = [handle(*SETS[key]) for key in ("k2", "k0")]
    entries += [handle("measured", MUTED), handle("predicted from gradients of the initial model", MUTED, dashes=DASHES)]
    legend(figure, entries, noise=False)
    return figure


def _cosines(axes: Axes, group: Worlds) -> None:
    for place, kind in enumerate(KINDS):
        values = [world.cosines[kind] for world in group]
        axes.bar(place, float(np.mean(values)), width=0.62, color=PALETTE[0] if kind == "matched" else FAINT, zorder=2)
        axes.scatter([place] * len(values), values, s=12, color=INK, zorder=3)
    axes.axhline(0, color=MUTED, linewidth=1, zorder=2)
    axes.set_xticks(range(len(KINDS)), list(KINDS.values()))


def tradeoff_figure(settings: PaperSettings, worlds: Worlds) -> Figure:
    """Figure 6: utility over forget quality on K1, a column per method: training and the walks that leave it."""
    figure, grid = grid_of(2, len(settings.methods), 6.4)
    shades = epoch_shades(settings)
    for row, (title, group) in zip(grid, by_tuning(worlds), strict=True):
        for axes, method in zip(row, settings.methods, strict=True):
            points = _mean_points(group, method)
            for epoch, shade in shades.items():
                walk = points[points["epoch"] == epoch].sort_values("alpha")
                axes.plot(walk["k1"], walk["utility"], color=shade, linewidth=0.9, zorder=2)
                above = walk[walk["alpha"] > 0]
                axes.scatter(above["k1"], above["utility"], marker="^", s=18, color=shade, linewidths=0, zorder=3)
            curve = points[points["alpha"] == 0].sort_values("epoch")
            axes.plot(curve["k1"], curve["utility"], color=INK, linewidth=1.3, marker="o", markersize=3.4, zorder=4)
            finish(axes, f"{title}, {method}", across=f"log10 FQ of K1 ({settings.definition})")
        row[0].set_ylabel(f"model utility ({settings.definition})")
        share_heights(row)
        noise_band(row, vertical=True)
    legend(figure, [handle("training, epoch by epoch", INK, "o"), *epoch_handles(shades)])
    return figure


def alpha_figure(settings: PaperSettings, worlds: Worlds) -> Figure:
    """Figure 7: forget quality on K1 over alpha, a column per method, with the next epoch as the paper's comparison."""
    figure, grid = grid_of(2, len(settings.methods), 6.4)
    shades = epoch_shades(settings)
    for row, (title, group) in zip(grid, by_tuning(worlds), strict=True):
        for axes, method in zip(row, settings.methods, strict=True):
            points, lengths = _mean_points(group, method), _lengths(group, method)
            trained = points[points["alpha"] == 0].set_index("epoch")["k1"]
            for epoch, shade in shades.items():
                walk = points[points["epoch"] == epoch].sort_values("alpha")
                axes.plot(walk["alpha"], walk["k1"], color=shade, linewidth=1.1, marker="^", markersize=3.2, zorder=3)
                where = lengths[epoch + 1] / lengths[epoch] - 1.0
                axes.scatter([where], [trained[epoch + 1]], marker="+", s=46, linewidths=1.5, color=shade, zorder=4)
            finish(axes, f"{title}, {method}", across="alpha")
            axes.set_xlim(-0.08, max(settings.alphas) + 0.08)
        row[0].set_ylabel(f"log10 FQ of K1 ({settings.definition})")
        share_heights(row)
        noise_band(row)
    mark = Line2D([], [], color=MUTED, marker="+", linestyle="", markersize=8, label="next epoch, at the alpha of its length")
    legend(figure, [*epoch_handles(shades), mark])
    return figure


def stall_figure(settings: PaperSettings, worlds: Worlds) -> Figure:
    """Figure 8: K1, K2, K0 and utility over alpha, from the epoch at which K2 forgetting stalls."""
    figure, grid = grid_of(2, 2 * len(settings.table_methods), 5.6)
    for column, title, method, group in table_columns(settings, worlds):
        walks = [world.walk(method, world.stall(method)).set_index("alpha") for world in group]
        for name, (_, colour, marker) in SETS.items():
            draw_line(grid[0, column], [walk[name] for walk in walks], colour, marker)
        draw_line(grid[1, column], [walk["utility"] for walk in walks], INK, "o")
        stalls = ", ".join(str(world.stall(method)) for world in group)
        finish(grid[0, column], f"{title}\nfrom epoch {stalls}")
        finish(grid[1, column], across="alpha")
    finish(grid[0, 0], up=f"log10 FQ ({settings.definition})")
    finish(grid[1, 0], up=f"model utility ({settings.definition})")
    for row in grid:
        share_heights(row)
    noise_band(grid[0])
    legend(figure, [*(handle(*entry) for entry in SETS.values()), handle("utility", INK, "o")])
    return figure


def matched_figure(settings: PaperSettings, worlds: Worlds) -> Figure:
    """K2 forgetting of extrapolated points less that of plain training at the same K1 forget quality and utility."""
    figure, grid = grid_of(1, 2, 3.8)
    colours = dict(zip(settings.methods, PALETTE, strict=False))
    for axes, (title, group) in zip(grid[0], by_tuning(worlds), strict=True):
        found = [point for world in group for point in matched_points(world)]
        for method, colour in colours.items():
            points = [point for point in found if point["method"] == method]
            gains = [point["k2_gain"] for point in points]
            axes.scatter([point["k1"] for point in points], gains, s=16, marker="^", color=colour, linewidths=0, zorder=3)
        wrong = [gain for world in group for gain in left_out_gains(world)]
        spread = float(np.sqrt(np.mean(np.square(wrong)))) if wrong else 0.0
        axes.axhspan(-spread, spread, color=BAND, zorder=0)
        axes.axhline(0, color=MUTED, linewidth=1)
        finish(axes, title, across=f"log10 FQ of K1 ({settings.definition})")
    grid[0, 0].set_ylabel("log10 FQ of K2: walk less training")
    share_heights(grid[0])
    entries = [Line2D([], [], marker="^", linestyle="", color=colour, label=method) for method, colour in colours.items()]
    band = Patch(color=BAND, label="error of straight lines between epochs (root mean square)")
    legend(figure, [*entries, band], noise=False)
    return figure


def attacks_figure(worlds: Sequence[Attacked]) -> Figure:
    """Forgetting after every attack over forgetting before it, coloured by alpha."""
    figure, grid = grid_of(1, len(ATTACKS), 3.6)
    points = pd.concat([world.points[world.points["collapsed"].isna()] for world in worlds])
    walks, pushed = points[points["kind"] == WALK], points[points["kind"] == PUSHED]
    norm = TwoSlopeNorm(0.0, min(-0.1, walks["alpha"].min()), max(0.1, walks["alpha"].max()))
    shades = colormaps["coolwarm"]
    for axes, (attack, title) in zip(grid[0], ATTACKS.items(), strict=True):
        after = f"after_{attack}"
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, zorder=1)
        axes.scatter(pushed["forgetting"], pushed[after], s=18, marker="x", color=MUTED, linewidths=0.9, zorder=2)
        for rows, edge in ((walks[walks["alpha"] != 0], "none"), (walks[walks["alpha"] == 0], INK)):
            shade = shades(norm(rows["alpha"].to_numpy(dtype=float)))
            axes.scatter(rows["forgetting"], rows[after], s=15, color=shade, edgecolors=edge, linewidths=0.7, zorder=3)
        finish(axes, title.replace(": ", "\n"), across="forgetting before")
        axes.set(xlim=(0, None), ylim=(0, None), xticks=(0, 0.5))
    grid[0, 0].set_ylabel("forgetting after")
    share_heights(grid[0])
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=grid[0], label="alpha", aspect=30, pad=0.01)
    bar.set_ticks(sorted({float(walks["alpha"].min()), 0.0, float(walks["alpha"].max())}))
    bar.outline.set_visible(False)
    trained = Line2D([], [], marker="o", linestyle="", markerfacecolor=shades(0.5), markeredgecolor=INK, markersize=5)
    trained.set_label("trained epoch")
    step = Line2D([], [], marker="x", linestyle="", color=MUTED, markersize=5, label="trained epoch and a random step")
    legend(figure, [trained, step, handle("nothing undone", MUTED)], noise=False)
    return figure


def _mean_points(group: Worlds, method: str) -> pd.DataFrame:
    """Means over seeds of M1's numbers, a row per epoch and alpha."""
    rows = [world.points[(world.points["model"] == "M1") & (world.points["method"] == method)] for world in group]
    return pd.concat(rows).groupby(["epoch", "alpha"], as_index=False)[["k1", "utility"]].mean()


def _lengths(group: Worlds, method: str) -> Mapping[int, float]:
    """Mean length of the update by epoch."""
    rows = pd.concat([world.projections for world in group])
    rows = rows[(rows["method"] == method) & (rows["alpha"] == 0) & (rows["set"] == "related")]
    means = rows.groupby("epoch", as_index=False)["norm"].mean()
    return dict(zip(means["epoch"].astype(int), means["norm"].astype(float), strict=True))
