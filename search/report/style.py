"""Numbers as people read them, in tables and sentences."""

import math
from typing import Any

import pandas as pd


def number(value: Any, missing: float = math.nan) -> float:
    """A number, or `missing` for None and NaN."""
    return missing if value is None or pd.isna(value) else float(value)


def decimal(value: Any, places: int = 4) -> str:
    """A number with fixed places; a dash where there is none."""
    known = number(value)
    return "–" if math.isnan(known) else f"{known:.{places}f}".replace("-", "−")


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
