"""Format numbers with units, and untrusted text, for people."""

import math

UNKNOWN = "-"


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; very small and very large ones in scientific notation."""
    if value is None:
        return UNKNOWN
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
        return f"{value:,.{max(0, places)}f}"
    return f"{value:.{digits - 1}e}"


def format_percent(value: float | None) -> str:
    """A ratio in per cent."""
    return UNKNOWN if value is None else f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def format_bytes(num_bytes: float | None) -> str:
    """Bytes with a decimal unit."""
    if num_bytes is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{format_number(num_bytes)} TB"


def format_duration(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, length, smaller_unit, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length:,} {unit}" + (f" {rest} {smaller_unit}" if rest else "")
    return f"{whole} s"


def format_counts(counts: dict[str, int]) -> str:
    """A total and its non-zero parts."""
    total = sum(counts.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"{total:,} ({parts})" if parts else f"{total:,}"


def printable(text: str) -> str:
    """Untrusted text on one line, without control characters."""
    return "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
