"""Format numbers and blocks of text for readers. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

WIDTH = 100
INDENT = 12


def count(number: int) -> str:
    """Format with four significant digits: 950, 12.5k, 124.4M, 8.03B, 15T."""
    return _scaled(number, ["", "k", "M", "B", "T"], base=1000, spec=".4g")


def bytes_(number: int) -> str:
    """Format with one decimal in binary units: 512 B, 1.5 GiB."""
    return _scaled(number, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"], base=1024, spec=".1f")


def rate(tokens_per_second: float) -> str:
    """Format with three significant digits: 950 tok/s, 12.3k tok/s, 1.20M tok/s; `? tok/s` if not finite."""
    if not math.isfinite(tokens_per_second):
        return "? tok/s"
    return _scaled(tokens_per_second, ["", "k", "M", "B", "T"], base=1000, spec="#.3g") + " tok/s"


def duration(seconds: float) -> str:
    """Format in the two largest units: 0.4s, 12s, 4m12s, 2h05m, 3d04h; `?` when not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest_seconds = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days}d{rest_hours:02d}h"
    if hours:
        return f"{hours}h{rest_minutes:02d}m"
    return f"{minutes}m{rest_seconds:02d}s" if minutes else f"{rest_seconds}s"


def block(heading: str, sections: Mapping[str, str]) -> str:
    """Format named sections, their texts in one column; empty ones are left out."""
    lines = [heading, "-" * WIDTH]
    for name, text in sections.items():
        for i, line in enumerate(text.splitlines()):
            lines.append(f"{name if i == 0 else '':<{INDENT}}{line}".rstrip())
    return "\n".join(lines)


def table(values: Mapping[str, str], align: str = "<") -> str:
    """Format one `name  value` line per item, in two aligned columns."""
    name_width = max(map(len, values), default=0)
    value_width = max(map(len, values.values()), default=0) if align == ">" else 0
    return "\n".join(f"{name:<{name_width}}  {value:{align}{value_width}}" for name, value in values.items())


def plural(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def _scaled(number: float, units: list[str], base: int, spec: str) -> str:
    """Format `number` in the first unit in which its text stays below `base`: 999,999 is 1M, not 1000k."""
    scaled = float(number)
    if scaled == int(scaled) and scaled < base:
        return f"{int(scaled)}{units[0]}"
    for unit in units:
        text = format(scaled, spec).rstrip(".")
        if float(text) < base:
            return text + unit
        scaled /= base
    return f"{scaled * base:.0f}{units[-1]}"
