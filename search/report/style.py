"""Format numbers for people, and style figures: palette, markers, fonts."""

import io
import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def number(value: Any, missing: float = math.nan) -> float:
    """A number, or `missing` for None and NaN."""
    return missing if value is None or pd.isna(value) else float(value)


def decimal(value: Any, places: int = 4) -> str:
    """A number with fixed places; a dash where there is none."""
    known = number(value)
    return "–" if math.isnan(known) else f"{known:z.{places}f}".replace("-", "−")


def probability(value: Any) -> str:
    """A p-value: three places, or two digits and an exponent."""
    known = number(value)
    if math.isnan(known):
        return "–"
    return f"{known:.3f}" if known >= 0.001 or known == 0 else f"{known:.1e}".replace("e-0", "e-").replace("e-", "e−")


def alpha(value: Any) -> str:
    """An alpha with its sign."""
    known = number(value)
    if math.isnan(known):
        return "–"
    return "0" if known == 0 else f"{known:+.3f}".replace("-", "−")


def whole(value: Any) -> str:
    """A number without places."""
    known = number(value)
    return "–" if math.isnan(known) else f"{known:.0f}"


def seconds(value: Any) -> str:
    """A time in the unit people would use."""
    known = number(value)
    if math.isnan(known):
        return "–"
    if known >= 5400:
        return f"{known / 3600:.1f} h"
    if known >= 90:
        return f"{known / 60:.1f} min"
    return f"{known:.1f} s" if known >= 1 else f"{1000 * known:.0f} ms"


def table_text(value: Any) -> str:
    """A text; a dash where there is none."""
    return "–" if value is None or (not isinstance(value, str) and pd.isna(value)) else str(value)


def count(amount: int, noun: str) -> str:
    """A number with its noun in the right form."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


DPI = 200

WIDTH = 11.0

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#4B3B8F")

INK, MUTED, FAINT, BAND = "#1f2328", "#6b7280", "#a3a9b3", "#eceff3"


def png(figure: "Figure") -> bytes:
    """The picture as PNG at `DPI` dots per inch, twice what a page at 100 pixels per inch shows."""
    buffer = io.BytesIO()
    # Without the software stamp the same study gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def style(axes: "Axes") -> None:
    """A light grid, two spines, small type."""
    axes.grid(color="#e3e6ea", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9.5, color=INK)


def title(axes: "Axes", text: str) -> None:
    """A bold title on the left."""
    axes.set_title(plain(text), fontsize=10, fontweight="bold", loc="left", color=INK)


def plain(text: str) -> str:
    """Keep a dollar sign in a label from starting a formula."""
    return text.replace("$", r"\$")


def padded(low: float, high: float, share: float, least: float) -> tuple[float, float]:
    """Limits with a margin: a share of the span, at least `least`."""
    margin = max((high - low) * share, least)
    return low - margin, high + margin


LONGEST_REASON = 160
"""Characters of a reason that are shown where reasons are counted."""


def counted(reasons: Iterable[str]) -> list[tuple[str, int]]:
    """Reasons of failure, each cut to a line, and how often each came; the commonest first, equal ones as they came."""
    lines = (reason.strip().partition("\n")[0] for reason in reasons)
    return Counter(line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 4]} ..." for line in lines).most_common()
