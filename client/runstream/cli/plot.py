"""Curves drawn with characters: axes, legend and braille dots (2 x 4 dots a character).

Our own hundred lines: the drawing must fit any width exactly, work without a terminal, and stay the same from one
release of a library to the next (deploy/decisions/terminal.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Curve", "draw"]

_COLORS: Final = (36, 33, 35, 32, 34, 31)
"""ANSI foreground colours, in the order of the curves."""
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the braille character for (row, column) of a cell."""
_ASCII_MARKS: Final = "*o+x#@"


@dataclass(frozen=True, slots=True)
class Curve:
    """One series of points, ordered by x. NaN and infinite values leave a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


class _Canvas:
    """A grid of characters, each of 2 x 4 dots (1 x 1 in ASCII)."""

    def __init__(self, columns: int, rows: int, *, ascii_only: bool) -> None:
        self.ascii_only = ascii_only
        self.width = columns * (1 if ascii_only else 2)
        self.height = rows * (1 if ascii_only else 4)
        self._bits = [[0] * columns for _ in range(rows)]
        self._owner = [[0] * columns for _ in range(rows)]

    def dot(self, x: int, y: int, owner: int) -> None:
        """Set the dot at `x` from the left and `y` from the bottom."""
        down = self.height - 1 - y
        row, column = (down, x) if self.ascii_only else (down // 4, x // 2)
        self._bits[row][column] |= 1 if self.ascii_only else _DOTS[down % 4][x % 2]
        self._owner[row][column] = owner

    def line(self, start: tuple[int, int], end: tuple[int, int], owner: int) -> None:
        """Dots from `start` to `end`, both included."""
        steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for step in range(steps + 1):
            x = round(start[0] + (end[0] - start[0]) * step / steps)
            y = round(start[1] + (end[1] - start[1]) * step / steps)
            self.dot(x, y, owner)

    def row(self, at: int, *, colors: bool) -> str:
        """Row `at` from the top as text."""
        text = []
        for bits, owner in zip(self._bits[at], self._owner[at], strict=True):
            mark = " " if not bits else _ASCII_MARKS[owner % 6] if self.ascii_only else chr(0x2800 + bits)
            text.append(_paint(mark, owner) if colors and bits else mark)
        return "".join(text)


def _paint(text: str, curve: int) -> str:
    return f"\x1b[{_COLORS[curve % len(_COLORS)]}m{text}\x1b[0m"


def draw(
    curves: Sequence[Curve],
    *,
    width: int,
    height: int = 14,
    title: str = "",
    x_label: str = "step",
    log_y: bool = False,
    colors: bool = False,
    ascii_only: bool = False,
) -> str:
    """The picture of `curves` as lines of at most `width` characters.

    Args:
        height: Rows of the drawing area; title, axis and legend come on top of it.
        log_y: Logarithmic y axis; values of 0 and less leave a gap.

    Raises:
        ValueError: `width` is less than 30, or no point can be drawn.
    """
    if width < 30:
        raise ValueError(f"a plot needs 30 columns, here are {width}")
    points = [_drawable(curve, log_y=log_y) for curve in curves]
    flat = [point for series in points for point in series if point is not None]
    if not flat:
        raise ValueError("no value can be drawn: all are NaN, infinite" + (" or not above 0" if log_y else ""))
    x_low, x_high = _spread(min(x for x, _ in flat), max(x for x, _ in flat), pad=False)
    y_low, y_high = _spread(min(y for _, y in flat), max(y for _, y in flat), pad=True)
    tick_rows = sorted({0, height // 2, height - 1})
    ticks = {row: _tick(y_high - (y_high - y_low) * row / max(height - 1, 1), log_y=log_y) for row in tick_rows}
    margin = max(len(label) for label in ticks.values())
    canvas = _Canvas(width - margin - 2, height, ascii_only=ascii_only)
    for owner, series in enumerate(points):
        _draw_series(canvas, series, owner, (x_low, x_high), (y_low, y_high))

    bar, corner, dash = ("|", "+", "-") if ascii_only else ("┤", "└", "─")
    side = "|" if ascii_only else "│"
    lines = [title.center(width)[:width].rstrip()] if title else []
    for row in range(height):
        label = ticks.get(row, "").rjust(margin)
        lines.append(f"{label} {bar if row in ticks else side}{canvas.row(row, colors=colors)}".rstrip())
    lines.append(" " * (margin + 1) + corner + dash * (width - margin - 2))
    lines.append(" " * (margin + 2) + _x_axis(x_low, x_high, x_label, width - margin - 2))
    if len(curves) > 1:
        lines.extend(_legend(curves, width, margin + 2, colors=colors, ascii_only=ascii_only))
    return "\n".join(lines)


def _drawable(curve: Curve, *, log_y: bool) -> list[tuple[float, float] | None]:
    """Points in drawing units; None is a gap."""
    series: list[tuple[float, float] | None] = []
    for x, y in zip(curve.x, curve.y, strict=True):
        if not math.isfinite(y) or (log_y and y <= 0):
            series.append(None)
        else:
            series.append((float(x), math.log10(y) if log_y else float(y)))
    return series


def _spread(low: float, high: float, *, pad: bool) -> tuple[float, float]:
    """A range with an extent, for a curve that is one point or constant."""
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return (low - margin, high + margin) if pad else (low, low + 1.0)
    return low, high


def _draw_series(
    canvas: _Canvas,
    series: Sequence[tuple[float, float] | None],
    owner: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> None:
    before: tuple[int, int] | None = None
    for point in series:
        if point is None:
            before = None
            continue
        at = (
            _scale(point[0], x_range, canvas.width),
            _scale(point[1], y_range, canvas.height),
        )
        canvas.line(before or at, at, owner)
        before = at


def _scale(value: float, limits: tuple[float, float], size: int) -> int:
    # Halved first: the difference of two large floats of opposite sign may overflow.
    share = (value / 2 - limits[0] / 2) / (limits[1] / 2 - limits[0] / 2)
    return min(max(round(share * (size - 1)), 0), size - 1)


def _tick(value: float, *, log_y: bool) -> str:
    return f"{10**value:.4g}" if log_y else f"{value:.4g}"


def _x_axis(low: float, high: float, label: str, width: int) -> str:
    left, right = f"{low:.10g}", f"{high:.10g}"
    room = width - len(left) - len(right)
    middle = label.center(room) if room > len(label) + 2 else " " * max(room, 1)
    return f"{left}{middle}{right}"


def _legend(curves: Sequence[Curve], width: int, indent: int, *, colors: bool, ascii_only: bool) -> list[str]:
    lines: list[str] = []
    used = width
    for owner, curve in enumerate(curves):
        mark = _ASCII_MARKS[owner % 6] if ascii_only else "●" if colors else "-"
        label = curve.label[: width - indent - 4]
        if used + len(label) + 4 > width:
            lines.append(" " * indent)
            used = indent
        lines[-1] += f"{_paint(mark, owner) if colors else mark} {label}  "
        used += len(label) + 4
    return [line.rstrip() for line in lines]
