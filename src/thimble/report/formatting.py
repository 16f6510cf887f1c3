"""Numbers, sizes, durations and tables as text, for the page and for the terminal.

Whatever was not measured (None, NaN, Inf) is shown as `NONE`.
"""

import math
from collections.abc import Sequence
from typing import Any

from thimble.errors import plural

NONE = "–"
THIN = "\u202f"  # narrow no-break space, between a number and its unit on the page
ARROW = "\u00a0→\u00a0"  # keeps both sides together


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A number with its thousands marked and a fixed count of digits, or in powers of ten from a million."""
    if not is_number(value):
        return NONE
    return f"{value:.2e}" if abs(value) >= 1e6 else f"{value:,.{digits}f}"


def percent(share: Any, space: str = THIN) -> str:
    """A share from 0 to 1 as percent; 0 and 100 are kept for what is exactly that."""
    if not is_number(share):
        return NONE
    shown = share * 100
    is_near_an_end = 0 < shown < 10 or 99 < shown < 100
    return (f"{min(max(shown, 0.1), 99.9):.1f}" if is_near_an_end else f"{shown:.0f}") + f"{space}%"


def signed_percent(share: float) -> str:
    """A change as percent, with its sign."""
    return f"{share * 100:+.1f}{THIN}%" if abs(share) < 0.1 else f"{share * 100:+.0f}{THIN}%"


def small_percent(share: float) -> str:
    """A share that may be tiny, as percent with two decimals or as a power of ten."""
    return f"{share:.2%}" if share >= 1e-4 or not share else f"{share:.0e}"


def size(count: Any, space: str = THIN) -> str:
    """Bytes as MB or GB, of 1e6 and 1e9 bytes."""
    if not is_number(count):
        return NONE
    return f"{count / 1e9:.2f}{space}GB" if count >= 1e9 else f"{count / 1e6:.0f}{space}MB"


def amount(count: float) -> str:
    """A count, in words from a million."""
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def duration(seconds: Any) -> str:
    """Seconds in words: `45 seconds`, `3 minutes`, `1 h 2 min`."""
    if not is_number(seconds):
        return NONE
    if seconds < 90:
        return plural(round(seconds), "second") if seconds >= 0.5 else "under a second"
    minutes = round(seconds / 60)
    return plural(minutes, "minute") if minutes < 90 else f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"


def clock(seconds: float) -> str:
    """Seconds as on a clock: `45 s`, `3:07`, `1:02:09`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    hours, rest = divmod(rounded, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def table(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Rows of cells as aligned text: the first column to the left, the others to the right.

    In a width, names are shortened and columns that find no room stand below, beside the first one again.
    """
    if width is None:
        return _aligned(rows)
    most = max(8, (width - 4) // 2)
    rows = [[shortened(cell, most) for cell in row] for row in rows]
    widths = [2 + max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    parts: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if parts[-1] and widths[0] + sum(widths[each] for each in (*parts[-1], column)) > width:
            parts.append([])
        parts[-1].append(column)
    return "\n\n".join(_aligned([[row[0], *(row[each] for each in part)] for row in rows]) for part in parts)


def shortened(text: str, most: int) -> str:
    """A name in a width, without its middle."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def clip(text: str, width: int) -> str:
    """A text on one line, cut to a width."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 4] + " ..."
