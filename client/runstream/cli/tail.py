"""`runstream tail`: follow a run while it trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from .command import Command, RunId, session_of
from .failure import ExitCode, Failure
from .output import Output, terminal_width
from .text import duration, number

if TYPE_CHECKING:
    from .session import Session

__all__ = ["tail"]

OVERLAP_SECONDS: Final = 10
"""A point may arrive this much later than newer ones and is still shown."""
_LINES_AT_ONCE: Final = 20
"""Steps printed for one look at the store, on a terminal; of more only the newest are shown."""
_ENDED: Final = {"FINISHED": ExitCode.OK, "FAILED": ExitCode.FAILED, "KILLED": ExitCode.FAILED}

_POINTS: Final = """
SELECT key, step, timestamp, value FROM metrics
WHERE run_id = {run:String} AND timestamp >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
    AND (empty({keys:Array(String)}) OR key IN {keys:Array(String)})
ORDER BY step, timestamp, key
"""
_NEWEST: Final = """
SELECT toUnixTimestamp64Milli(max(timestamp)) AS newest FROM latest_metrics
WHERE run_id = {run:String} AND (empty({keys:Array(String)}) OR key IN {keys:Array(String)})
"""


@click.command(cls=Command)
@click.argument("run", type=RunId())
@click.argument("key", nargs=-1)
@click.option(
    "--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--from-start", is_flag=True, help="Print what was logged before, too; else the last ten seconds of it.")
@click.option("--no-follow", is_flag=True, help="Print what is there and stop.")
@click.pass_context
def tail(
    context: click.Context, run: str, key: tuple[str, ...], interval: float, from_start: bool, no_follow: bool
) -> None:
    """Print the metrics of RUN as they arrive, one line for each step, until the run ends.

    Exit code 0 when the run has finished, 1 when it failed, was killed or is lost. With --json each point is one
    line: {"key", "step", "timestamp", "value"}; the last line is {"status"}.
    """
    session = session_of(context)
    run_id = session.run_id(run)
    follower = _Follower(session, run_id, key, from_start=from_start)
    while True:
        # The state is read first: what a finished run logged is then surely in the points read after it.
        status, name, seconds = _state(session, run_id)
        _print(session.output, follower.new_points())
        ended = status in _ENDED or status == "LOST"
        if ended or no_follow:
            break
        time.sleep(interval)
    if session.output.json:
        session.output.line({"run_id": run_id, "status": status})
    sentence = f"{name or run_id}: {status} after {duration(seconds)}"
    if ended and not no_follow and status != "FINISHED":
        raise Failure(sentence, _ENDED.get(status, ExitCode.FAILED))
    session.output.note(sentence)


class _Follower:
    """Remembers which points of one run were shown."""

    def __init__(self, session: Session, run_id: str, keys: Sequence[str], *, from_start: bool) -> None:
        self._session = session
        self._run_id = run_id
        self._keys = list(keys)
        self._since: int | None = 0 if from_start else None
        self._shown: set[tuple[Any, ...]] = set()

    def new_points(self) -> list[dict[str, Any]]:
        """Points that arrived since the last call, ordered by step."""
        asked = {"run": self._run_id, "keys": self._keys}
        if self._since is None:
            newest = int(self._session.sql(_NEWEST, **asked)[0]["newest"])
            self._since = max(0, newest - OVERLAP_SECONDS * 1000)
        rows = self._session.sql(_POINTS, since=self._since, **asked)
        fresh = [row for row in rows if _identity(row) not in self._shown]
        if rows:
            newest = max(int(row["timestamp"].timestamp() * 1000) for row in rows)
            self._since = max(self._since, newest - OVERLAP_SECONDS * 1000)
            self._shown = {_identity(row) for row in rows if int(row["timestamp"].timestamp() * 1000) >= self._since}
        return fresh


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["key"], row["step"], row["timestamp"], repr(row["value"]))


def _state(session: Session, run_id: str) -> tuple[str, str, float]:
    """Status (LOST included), name, and seconds from start to end or to the last sign of life."""
    row = session.sql(
        "SELECT status, lost, name, started_at, coalesce(ended_at, heartbeat_at) AS until FROM runs "
        "WHERE run_id = {run:String}",
        run=run_id,
    )[0]
    return "LOST" if row["lost"] else row["status"], row["name"], (row["until"] - row["started_at"]).total_seconds()


def _print(out: Output, points: Sequence[dict[str, Any]]) -> None:
    if out.json:
        for point in points:
            out.line(point)
        return
    steps: dict[int, list[str]] = {}
    for point in points:
        steps.setdefault(point["step"], []).append(f"{point['key']}={number(point['value'])}")
    hidden = max(0, len(steps) - _LINES_AT_ONCE) if out.terminal else 0
    if hidden:
        out.write(f"... {hidden} more steps")
    for step, values in list(steps.items())[hidden:]:
        line = f"step {step:>8}  {'  '.join(values)}"
        width = terminal_width()
        out.write(line if not out.terminal or len(line) <= width else line[: width - 3] + "...")
    if points:
        import sys

        sys.stdout.flush()
