"""Draw the parts of the figures: grids, lines with bands, axes, legends."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from search.paper.measures import CEILING, World
from search.paper.settings import TUNINGS, PaperSettings
from search.report.style import BAND, DPI, INK, PALETTE, WIDTH, style, title

SETS = {
    "k1": ("K1, to forget", PALETTE[0], "o"),
    "k2": ("K2, related", PALETTE[1], "s"),
    "k0": ("K0, unrelated", PALETTE[2], "D"),
}
MODELS = {
    "M1": ("M1: learned K1 and K2, K1 unlearned", PALETTE[0], "o"),
    "M2": ("M2: learned K1 only, K1 unlearned", PALETTE[1], "s"),
    "M3": ("M3: learned K1 and K2, both unlearned", PALETTE[2], "D"),
}
DASHES = (0, (3, 2))

Worlds = Sequence[World]


def grid_of(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    """A figure of the report's width with rows times columns panels, as an array of axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def by_tuning(worlds: Worlds) -> list[tuple[str, list[World]]]:
    """Name and results of every way of fine-tuning."""
    return [(name, [world for world in worlds if world.tuning == tuning]) for tuning, name in TUNINGS.items()]


def table_columns(settings: PaperSettings, worlds: Worlds) -> Iterator[tuple[int, str, str, list[World]]]:
    """(column, title, method, results) of pictures with a column per way of fine-tuning and method of the table."""
    pairs = [(name, method, group) for name, group in by_tuning(worlds) for method in settings.table_methods]
    for column, (name, method, group) in enumerate(pairs):
        yield column, f"{name}, {method}", method, group


def draw_line(axes: Axes, series: Sequence[pd.Series], colour: Any, marker: str, dashes: Any = "-") -> None:
    """Mean over seeds as a line, one standard error to each side as a band."""
    if not series:
        return
    table = pd.concat(series, axis=1).sort_index().astype(float)
    middle = table.mean(axis=1)
    across = table.index.to_numpy(dtype=float)
    axes.plot(across, middle, color=colour, marker=marker, markersize=3.8, linewidth=1.4, linestyle=dashes, zorder=3)
    if table.shape[1] > 1:
        error = table.std(axis=1, ddof=1) / np.sqrt(table.shape[1])
        axes.fill_between(across, middle - error, middle + error, color=colour, alpha=0.18, linewidth=0, zorder=2)


def finish(axes: Axes, name: str | None = None, across: str | None = None, up: str | None = None) -> None:
    """Style, title and labels of a panel."""
    style(axes)
    if name is not None:
        title(axes, name)
        axes.title.set_fontsize(9)
    if across is not None:
        axes.set_xlabel(across)
    if up is not None:
        axes.set_ylabel(up)


def share_heights(row: Sequence[Axes]) -> None:
    """One vertical range for the panels of a row, labelled on the left only."""
    limits = np.array([axes.get_ylim() for axes in row])
    for place, axes in enumerate(row):
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
        axes.tick_params(labelleft=place == 0)


def whole_epochs(row: Sequence[Axes]) -> None:
    """Ticks at whole epochs."""
    for axes in row:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def noise_band(row: Sequence[Axes], vertical: bool = False) -> None:
    """The band of forget quality above the noise ceiling, without moving the limits."""
    for axes in row:
        if vertical:
            low, high = axes.get_xlim()
            axes.axvspan(np.log10(CEILING), 10, color=BAND, zorder=0)
            axes.set_xlim(low, max(high, 0.5))
        else:
            low, high = axes.get_ylim()
            axes.axhspan(np.log10(CEILING), 10, color=BAND, zorder=0)
            axes.set_ylim(low, max(high, 0.5))


def epoch_shades(settings: PaperSettings) -> dict[int, Any]:
    """Colour of every epoch that is walked from, light to dark."""
    epochs = range(1, settings.epochs + 1)
    return dict(zip(epochs, colormaps["viridis_r"](np.linspace(0.12, 1.0, len(epochs))), strict=True))


def epoch_handles(shades: Mapping[int, Any]) -> list[Any]:
    """Legend entries of the first, a middle and the last epoch."""
    chosen = sorted({1, max(1, len(shades) // 2), len(shades)})
    return [
        Line2D([], [], color=shades[epoch], marker="^", markersize=5, linewidth=1.1, label=f"walk from epoch {epoch}")
        for epoch in chosen
    ]


def handle(label: str, colour: Any, marker: str = "", dashes: Any = "-") -> Line2D:
    """Legend entry of a line."""
    return Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.4, linestyle=dashes, label=label)


def legend(figure: Figure, handles: Sequence[Any], noise: bool = True) -> None:
    """Legend below the panels, with the noise band where there is one."""
    band = [Patch(color=BAND, label=f"noise: forget quality above {CEILING:g}")] if noise else []
    figure.legend(handles=[*handles, *band], loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, labelcolor=INK)
