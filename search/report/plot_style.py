"""How the pictures look: palette, type, frames, and a figure as PNG. Drawn with matplotlib's objects and no global state.

The colours are those of Okabe and Ito, "Color Universal Design", 2008.
"""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 200
WIDTH = 11.0

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#4B3B8F")
INK, MUTED, FAINT, BAND = "#1f2328", "#6b7280", "#a3a9b3", "#eceff3"


def png(figure: Figure) -> bytes:
    """The picture as PNG at `DPI` dots per inch, twice what a page at 100 pixels per inch shows."""
    buffer = io.BytesIO()
    # Without the software stamp the same study gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def style(axes: Axes) -> None:
    """A light grid, two spines, small type."""
    axes.grid(color="#e3e6ea", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9.5, color=INK)


def title(axes: Axes, text: str) -> None:
    """A bold title on the left."""
    axes.set_title(plain(text), fontsize=10, fontweight="bold", loc="left", color=INK)


def plain(text: str) -> str:
    """Keeps a dollar sign in a label from starting a formula."""
    return text.replace("$", r"\$")


def padded(low: float, high: float, share: float, least: float) -> tuple[float, float]:
    """Limits with a margin: a share of the span, at least `least`."""
    margin = max((high - low) * share, least)
    return low - margin, high + margin
