"""Numbers and texts as people read them, with their units."""

from __future__ import annotations

import math

UNKNOWN = "-"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a few significant digits; very small and very large ones with an exponent."""
    if value is None:
        return UNKNOWN
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
        return f"{value:,.{max(0, places)}f}"
    return f"{value:.{digits - 1}e}"


def ratio(value: float | None) -> str:
    """A share of 1 in per cent."""
    return UNKNOWN if value is None else f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def size(num_bytes: float | None) -> str:
    """Bytes with the unit that fits."""
    if num_bytes is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{number(num_bytes)} TB"


def duration(seconds: float | None) -> str:
    """A while, with the two units that matter."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length:,} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def counted(counts: dict[str, int]) -> str:
    """A total and what it is made of."""
    total = sum(counts.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"{total:,} ({parts})" if parts else f"{total:,}"


def printable(text: str) -> str:
    """A text of others in one line that a terminal takes for nothing but text."""
    return "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
