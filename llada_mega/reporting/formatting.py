"""Numbers as people read them: in tables, on axes and in the terminal."""

from __future__ import annotations

import math
from typing import Any

MISSING = "\N{EN DASH}"  # in the place of a number that is not there
MINUS = "\N{MINUS SIGN}"  # as wide as the plus sign, so that columns align


def finite(value: Any) -> float | None:
    """``value`` as a float, or None when it is missing, not a number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: float) -> str:
    """12345 -> '12,345'."""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """134515008 -> '134.5M'; below ten thousand the number itself."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "K" else limit)
            return f"{scaled:.3g}{unit}" if abs(scaled) < 100 else f"{scaled:.1f}".removesuffix(".0") + unit
    return f"{value:,.0f}"


def significant(value: float | None, digits: int = 4) -> str:
    """A measured number with about ``digits`` significant digits; an en dash when there is none."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(digits - 2, 1)}e}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}"


def nats(value: float | None) -> str:
    """A loss in nats, three decimals."""
    return MISSING if value is None else f"{value:.3f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return MISSING if value is None else f"{100 * value:.{decimals}f} %"


def duration(seconds: float) -> str:
    """3725 -> '1 h 02 min'; 75 -> '1 min 15 s'; 5.2 -> '5.2 s'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s"


def signed(value: float | None, decimals: int = 3) -> str:
    """A difference with its sign."""
    return MISSING if value is None else f"{value:+.{decimals}f}".replace("-", MINUS)
