"""What commands print: tables that fit the terminal, JSON for scripts, notes and progress on stderr.

On a terminal a table is cut to its width; in a pipe nothing is cut, and every row is one line of aligned columns.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import IO, Any, Final

from .text import one_line

__all__ = ["DEFAULT_WIDTH", "Column", "Output", "plain", "terminal_width"]


DEFAULT_WIDTH: Final = 100
"""Columns where there is no terminal."""
_GAP: Final = 3
"""Characters between two columns of a table on a terminal."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    right: bool = False
    style: str = ""
    """A rich style, such as `bold` or `dim`."""
    keep: bool = False
    """Never cut on a terminal (ids that are pasted)."""


def terminal_width(stream: IO[str] | None = None) -> int:
    """Columns to draw in: the terminal's, or COLUMNS, or `DEFAULT_WIDTH` in a pipe."""
    return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns


def plain(value: Any) -> Any:
    """`value` as JSON can carry it: times as ISO 8601 in UTC, non-finite numbers as "NaN", "Infinity", "-Infinity"."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, datetime):
        at = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy scalar
        return plain(value.item())
    return str(value)


class Output:
    """Where one command writes. `json` is the command's --json."""

    def __init__(self) -> None:
        self.json = False

    @property
    def terminal(self) -> bool:
        """Whether stdout is a terminal."""
        return sys.stdout.isatty()

    @property
    def colors(self) -> bool:
        """Whether stdout takes colours: a terminal, and NO_COLOR not set."""
        return self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def write(self, text: str = "") -> None:
        """One line or block to stdout."""
        sys.stdout.write(text + "\n")

    def value(self, value: Any) -> None:
        """`value` to stdout as one indented JSON document."""
        json.dump(plain(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write("\n")

    def line(self, value: Any) -> None:
        """`value` to stdout as one line of JSON, at once."""
        sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A remark for the person at the keyboard: on stderr, so that it never mixes with the answer."""
        if not self.json:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def done(self, sentence: str, value: Any) -> None:
        """The result of a command that changes something: a sentence, or its JSON."""
        if self.json:
            self.value(value)
        else:
            self.write(sentence)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], empty: str = "Nothing found.") -> None:
        """`rows` of display strings under `columns`; `empty` as a note where there are none."""
        if not rows:
            self.note(empty)
        elif self.terminal:
            self._rich_table(columns, rows)
        else:
            self._aligned(columns, rows)

    def fields(self, title: str, pairs: Sequence[tuple[str, str]]) -> None:
        """A heading and `name  value` lines; long values wrap at the terminal's edge."""
        if title:
            self.heading(title)
        width = max((len(name) for name, _ in pairs), default=0)
        room = max(terminal_width() - width - 4, 20) if self.terminal else None
        for name, value in pairs:
            parts = _wrap(one_line(value), room)
            self.write(f"  {name.ljust(width)}  {parts[0]}".rstrip())
            for part in parts[1:]:
                self.write(f"  {' ' * width}  {part}")

    def heading(self, title: str) -> None:
        """A heading line, bold on a terminal."""
        self.write(f"\x1b[1m{title}\x1b[0m" if self.colors else title)

    def _aligned(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        table = [[column.title for column in columns], *([one_line(cell) for cell in row] for row in rows)]
        widths = [max(len(row[at]) for row in table) for at in range(len(columns))]
        for row in table:
            cells = [
                cell.rjust(width) if column.right else cell.ljust(width)
                for cell, width, column in zip(row, widths, columns, strict=True)
            ]
            self.write("  ".join(cells).rstrip())

    def _rich_table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:  # the client alone, without runstream[server]
            self._aligned(columns, rows)
            return
        widths = _widths(columns, rows, terminal_width())
        fitting = len(widths)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
        for column, width in zip(columns, widths, strict=False):
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                style=column.style or None,
                no_wrap=True,
                overflow="ellipsis",
                width=width,
            )
        for row in rows:
            table.add_row(*(Text(one_line(cell)) for cell in row[:fitting]))
        Console(highlight=False, width=terminal_width()).print(table)
        if fitting < len(columns):
            hidden = ", ".join(column.title for column in columns[fitting:][:5])
            more = len(columns) - fitting
            self.note(
                f"{more} more column{'s' if more > 1 else ''} ({hidden}{', ...' if more > 5 else ''}): --json shows all"
            )

    @contextmanager
    def progress(self, label: str, total: float | None = None) -> Iterator[Callable[[float, str], None]]:
        """A progress bar on stderr while the body runs; silent where stderr is no terminal or --json is on.

        Yields:
            A function (amount done so far, text behind the bar) that may be called from any thread.
        """
        if self.json or not sys.stderr.isatty():
            yield lambda done, text: None
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
        except ImportError:
            yield lambda done, text: None
            return
        parts = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*parts, TextColumn("{task.fields[text]}"), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)


def _width_of(column: Column, rows: Sequence[Sequence[str]], at: int) -> int:
    return max([len(column.title), *(len(row[at]) for row in rows)])


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of the leading columns that fit `room`; at least one. Wide columns give way first, to 12 characters.

    Rich would rather make the last columns vanish.
    """
    full = [_width_of(column, rows, at) for at, column in enumerate(columns)]
    least = [width if column.keep else min(width, 12) for column, width in zip(columns, full, strict=True)]
    fitting = 1
    while fitting < len(columns) and sum(least[: fitting + 1]) + _GAP * fitting <= room:
        fitting += 1
    widths = full[:fitting]
    excess = sum(widths) + _GAP * (fitting - 1) - room
    while excess > 0:
        at = max(range(fitting), key=lambda each: widths[each] - least[each])
        if widths[at] <= least[at]:
            break  # one column alone is wider than the terminal
        widths[at] -= 1
        excess -= 1
    return widths


def _wrap(value: str, room: int | None) -> list[str]:
    if room is None or len(value) <= room:
        return [value]
    return [value[at : at + room] for at in range(0, len(value), room)]
