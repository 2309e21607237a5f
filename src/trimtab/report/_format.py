"""Numbers as a reader sees them: short, never rounded across a threshold, non-finite ones by name."""

from __future__ import annotations

import math

MISSING = "-"


def number(value: float | None, digits: int = 3) -> str:
    """Format with `digits` significant digits; None is "-", non-finite values are "inf", "-inf" and "nan"."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if 1e-3 <= size < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(size)))
        return _trim(f"{value:,.{places}f}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{_trim(mantissa)}e{int(exponent)}"


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def signed(value: float | None, digits: int = 3) -> str:
    """`number` with a plus sign where it is positive."""
    return f"+{number(value, digits)}" if value is not None and value > 0 else number(value, digits)


def percent(ratio: float | None) -> str:
    """Format a ratio as a percentage cut (not rounded) to one decimal: 0.99999 never reads 100 %, nor 0.8999 90 %."""
    if ratio is None or not math.isfinite(ratio):
        return number(ratio)
    tenths = math.floor(abs(ratio) * 1000 + 1e-9) if abs(ratio) != 1 else 1000
    if abs(ratio) < 1:
        tenths = min(tenths, 999)
    if tenths == 0 and ratio != 0:
        return "< 0.1 %"
    text = f"{tenths // 10} %" if tenths % 10 == 0 else f"{tenths / 10:.1f} %"
    return f"-{text}" if ratio < 0 else text


def points(difference: float) -> str:
    """Format a difference of two ratios in percentage points."""
    return f"{signed(100 * difference, 2)} pp" if math.isfinite(difference) else number(difference)


def count(value: int, noun: str, plural: str = "") -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def clip(text: str, limit: int) -> str:
    """Return at most `limit` characters, saying how many there were when some are left out."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def one_line(text: str, limit: int = 60) -> str:
    """White space collapsed and clipped, for labels."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


def visible(text: str) -> str:
    """Control characters and lone surrogates as escapes, so that no text can move a terminal's cursor."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
