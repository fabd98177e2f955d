"""How single values are written for people: numbers, sizes, durations, times, abbreviated run ids."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Final

__all__ = ["age", "duration", "moment", "number", "one_line", "short_id", "size"]

SHORT_ID_CHARS: Final = 14
"""Shown characters of a run id: the 8 that its experiment's runs share and 6 of its own."""


def number(value: float | int | None) -> str:
    """`value` with six significant digits; an integer in full."""
    if value is None:
        return ""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e9):
        return str(int(value))
    return f"{value:.6g}"


def size(bytes_: int | None) -> str:
    """Bytes in powers of 1024: `512 B`, `1.5 KiB`."""
    if bytes_ is None:
        return ""
    amount = float(bytes_)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def duration(seconds: float | None) -> str:
    """`0.8s`, `12s`, `3m 05s`, `2h 10m`, `4d 03h`."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def age(timestamp_ms: int | None, now_ms: int | None = None) -> str:
    """How long ago, in one unit: `5s ago`, `3h ago`, `2d ago`; beyond 30 days the date."""
    if timestamp_ms is None:
        return ""
    seconds = ((now_ms if now_ms is not None else time.time_ns() // 1_000_000) - timestamp_ms) / 1000
    if seconds < 0:
        return "now"
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "m"), (86400, 3600, "h"), (30 * 86400, 86400, "d")):
        if seconds < limit:
            return f"{int(seconds // divisor)}{unit} ago"
    return moment(timestamp_ms)[:10]


def moment(timestamp_ms: int) -> str:
    """UTC in ISO 8601 with milliseconds: `2026-11-21T09:50:00.123Z`."""
    at = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def short_id(run_id: str) -> str:
    """The beginning of `run_id`, long enough to name it in nearly every experiment."""
    return run_id[:SHORT_ID_CHARS]


def one_line(value: str) -> str:
    """`value` without line breaks and control characters, which could move the cursor of a terminal."""
    return "".join(char if char.isprintable() else " " for char in value)
