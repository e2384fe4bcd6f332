"""Format numbers for people, and style figures: palette, markers, fonts."""

import io
import math
from collections import Counter
from collections.abc import Iterable
from importlib import resources
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

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#B8527F", "#A87900", "#3B8FC7", "#6B4A2B", "#4B3B8F")
"""Colours of methods on white; every one has a contrast of 3 or more, as WCAG asks of what carries meaning."""

LIGHT = {
    "page": "#ffffff",
    "soft": "#f5f6f8",
    "warn": "#fdf3ec",
    "band": "#eceff3",
    "ink": "#1f2328",
    "muted": "#59626e",
    "accent": "#0064a0",
    "against": "#a34700",
    "held": "#1a7340",
    "line": "#dde1e6",
    "faint": "#8b929c",
    **{f"method-{place}": colour for place, colour in enumerate(PALETTE)},
    **{f"scale-{place}": c for place, c in enumerate(("#e16462", "#bf3984", "#8f0da4", "#5601a4", "#0d0887"))},
}
"""Colours of a page on light ground, by the name of their CSS variable: grounds, texts, lines, methods, a scale."""

_DARK_METHODS = ("#4DA3D9", "#FF8A3D", "#2FC397", "#E39AC4", "#F0B429", "#8FD0F7", "#C9A58A", "#A394E8")

DARK = {
    "page": "#14171c",
    "soft": "#1d2127",
    "warn": "#2c211a",
    "band": "#20252c",
    "ink": "#e6e9ed",
    "muted": "#a3abb6",
    "accent": "#6cb6f0",
    "against": "#ffa366",
    "held": "#6fce97",
    "line": "#333a43",
    "faint": "#737b86",
    **{f"method-{place}": colour for place, colour in enumerate(_DARK_METHODS)},
    **{f"scale-{place}": c for place, c in enumerate(("#b83289", "#d6556d", "#f2844b", "#feb72d", "#f0f921"))},
}
"""The same on dark ground."""


def page_style() -> str:
    """Return the style sheet of all pages: light or dark as the system asks, light on paper."""
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK))
    rules = resources.files("search.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{rules}"


WALKS = {
    "extrapolation": ("^", 46.0, "extrapolation (α > 0)"),
    "unlearned epoch": ("o", 40.0, "unlearned epoch (α = 0)"),
    "interpolation": ("v", 46.0, "interpolation (−1 < α < 0)"),
    "initial model": ("s", 34.0, "initial model (α = −1)"),
}
"""Matplotlib's marker of a walk, its area in points squared, and its name in legends."""

INK, MUTED, FAINT, BAND = "#1f2328", "#6b7280", "#a3a9b3", "#eceff3"


_LEFT_OUT: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""What programs and times matplotlib writes into files: without them the same study gives the same bytes."""


def picture(figure: "Figure", form: str = "png") -> bytes:
    """Return the figure as a file.

    Args:
        figure: The figure.
        form: ``png`` at `DPI` dots per inch, twice what a page at 100 pixels per inch shows; ``svg``; or ``pdf``
            with TrueType letters, as publishers ask for.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "uipe"}):
        figure.savefig(buffer, format=form, dpi=DPI, facecolor="white", metadata=_LEFT_OUT[form])
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
