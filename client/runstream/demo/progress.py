"""The screen of the demo while it trains: a live table on a terminal, a line for each finished run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..cli.output import terminal_width
from ..cli.text import duration, number

if TYPE_CHECKING:
    from rich.live import Live

    from .training import Job, Progress

__all__ = ["Screen", "State"]


@dataclass(slots=True)
class State:
    """What is known of one training process."""

    job: Job
    run_id: str = ""
    step: int = 0
    val_accuracy: float | None = None
    points: int = 0
    done: bool = False
    error: str = ""

    def update(self, progress: Progress) -> None:
        """Take over the newest message of the process."""
        self.run_id = progress.run_id or self.run_id
        self.step = max(self.step, progress.step)
        self.points = max(self.points, progress.points)
        self.done = progress.done
        self.error = progress.error
        if progress.val_accuracy is not None:
            self.val_accuracy = progress.val_accuracy


class Screen:
    """Shows `states`; used by the main thread only, except `stored`, which any thread may set."""

    def __init__(self, states: Sequence[State], *, plain: bool) -> None:
        """`plain`: no live table, whatever the terminal can do."""
        self._states = states
        self._started = time.monotonic()
        self._said: set[str] = set()
        self._live: Live | None = None
        self.stored: int | None = None
        """Metric points that SQL has seen so far; None before the first answer."""
        if not plain and sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive

            console = Console(width=terminal_width())
            self._live = RichLive(console=console, refresh_per_second=8, get_renderable=self._table, transient=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def refresh(self) -> None:
        """Show what has changed. The live table redraws by itself."""
        if self._live is not None:
            return
        for state in self._states:
            if (state.done or state.error) and state.job.name not in self._said:
                self._said.add(state.job.name)
                print(self._line(state), flush=True)

    def _line(self, state: State) -> str:
        at = f"[{duration(time.monotonic() - self._started)}]".rjust(8)
        if state.error:
            return f"{at} {state.job.name:<22} FAILED: {state.error}"
        count = f"{len(self._said)}/{len(self._states)}"
        return (
            f"{at} {count:>5}  {state.job.name:<22} {state.step} steps, {state.points} points, "
            f"val accuracy {number(state.val_accuracy)}"
        )

    def _table(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        wide = terminal_width() >= 100
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("RUN", style="bold", no_wrap=True)
        if wide:
            table.add_column("DATA", no_wrap=True)
        table.add_column("", width=28 if wide else 20)
        table.add_column("STEP", justify="right", no_wrap=True)
        table.add_column("VAL ACC", justify="right", no_wrap=True)
        table.add_column("POINTS", justify="right", no_wrap=True)
        for state in self._states:
            failed = bool(state.error)
            bar: Any = ProgressBar(total=state.job.steps, completed=state.step, width=28 if wide else 20)
            cells: list[Any] = [Text(state.job.name, style="green" if state.done else "red" if failed else "")]
            if wide:
                cells.append(state.job.dataset.replace("_", " "))
            cells += [
                Text("failed", style="red") if failed else bar,
                str(state.step),
                "" if state.val_accuracy is None else f"{state.val_accuracy:.4f}",
                f"{state.points:,}",
            ]
            table.add_row(*cells)
        logged = sum(state.points for state in self._states)
        done = sum(state.done for state in self._states)
        seen = "" if self.stored is None else f", {self.stored:,} already in SQL"
        elapsed = duration(time.monotonic() - self._started)
        return Group(table, Text(f"{done}/{len(self._states)} runs done in {elapsed}; {logged:,} points logged{seen}"))
