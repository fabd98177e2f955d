"""What the demo prints after training: best runs by the Python API, the same by SQL, a curve, and what to try next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from runstream_schemas.layout import DEFAULT_DIRECTORY

from ..cli.metrics import bucketed, picture
from ..cli.output import Column, terminal_width
from ..cli.text import duration, number, short_id

if TYPE_CHECKING:
    from ..cli.session import Session
    from .progress import State

__all__ = ["Report", "shown_address"]

_BEST: Final = 5
_ORDER: Final = ["metrics.final_accuracy DESC", "metrics.val_loss ASC"]
_SQL: Final = """SELECT r.run_id AS run_id, r.name AS name, r.experiment_name AS experiment,
    a.value AS accuracy, l.value AS val_loss
FROM runs AS r
JOIN latest_metrics AS a ON a.run_id = r.run_id AND a.key = 'final_accuracy'
JOIN latest_metrics AS l ON l.run_id = r.run_id AND l.key = 'val_loss'
JOIN tags AS t ON t.run_id = r.run_id AND t.key = 'demo.session'
WHERE t.value = '{mark}'
ORDER BY accuracy DESC, val_loss ASC
LIMIT {limit}"""
_COLUMNS: Final = (
    Column("RUN", style="bold"),
    Column("EXPERIMENT"),
    Column("ACCURACY", right=True),
    Column("VAL LOSS", right=True),
    Column("ID", keep=True),
)
Row = tuple[str, str, float, float, str]
"""Run name, experiment name, accuracy, validation loss, run id."""


class Report:
    """Reads back what one demo logged and prints it."""

    def __init__(self, session: Session, states: Sequence[State], mark: str, *, trained_seconds: float) -> None:
        self._session = session
        self._out = session.output
        self._states = states
        self._mark = mark
        self._seconds = trained_seconds

    def show(self, *, hints: bool) -> bool:
        """Print everything.

        Returns:
            Whether every run finished, SQL counts exactly the points that were logged, and both ways of reading agree.
        """
        finished = [state for state in self._states if state.done]
        logged = sum(state.points for state in finished)
        stored = self._stored_points([state.run_id for state in finished])
        through_python = self._best_by_python()
        through_sql = self._best_by_sql()
        agree = through_python == through_sql
        complete = len(finished) == len(self._states) and stored == logged
        if self._out.json:
            self._out.value(
                {
                    "session": self._mark,
                    "seconds": round(self._seconds, 3),
                    "runs": [
                        {"name": s.job.name, "run_id": s.run_id, "points": s.points, "error": s.error or None}
                        for s in self._states
                    ],
                    "points_logged": logged,
                    "points_stored": stored,
                    "best": [
                        dict(zip(("name", "experiment", "accuracy", "val_loss", "run_id"), row, strict=True))
                        for row in through_python
                    ],
                    "python_and_sql_agree": agree,
                }
            )
            return complete and agree
        out = self._out
        out.write(
            f"\n{len(finished)} runs in {duration(self._seconds)}: {logged:,} metric points logged, "
            f"{stored:,} in the store."
        )
        if stored != logged:
            out.write("These two numbers should be equal.")
        out.write()
        out.heading("The best runs, through the Python API")
        self._code(
            f"runstream.search_runs(search_all_experiments=True, max_results={_BEST},\n"
            f"    filter_string=\"tags.`demo.session` = '{self._mark}'\",\n"
            f"    order_by={_ORDER!r})"
        )
        out.table(_COLUMNS, [_shown(row) for row in through_python])
        out.write()
        out.heading("The same question in SQL")
        self._code(_SQL.format(mark=self._mark, limit=_BEST))
        out.table(_COLUMNS, [_shown(row) for row in through_sql])
        out.write("\nBoth answers are the same." if agree else "\nThe two answers differ, and they must not.")
        out.write()
        if through_python:
            self._curve(through_python[0])
            if hints:
                self._next(through_python)
        return complete and agree

    def _stored_points(self, run_ids: Sequence[str]) -> int:
        rows = self._session.sql(
            "SELECT count() AS points FROM metrics WHERE run_id IN {ids:Array(String)}", ids=list(run_ids)
        )
        return int(rows[0]["points"])

    def _best_by_python(self) -> list[Row]:
        import runstream

        found: Any = runstream.search_runs(
            search_all_experiments=True,
            filter_string=f"tags.`demo.session` = '{self._mark}'",
            order_by=_ORDER,
            max_results=_BEST,
        )
        names = {each.experiment_id: each.name for each in runstream.search_experiments()}
        return [
            (
                row["tags.mlflow.runName"],
                names.get(row["experiment_id"], ""),
                float(row["metrics.final_accuracy"]),
                float(row["metrics.val_loss"]),
                row["run_id"],
            )
            for _, row in found.iterrows()
        ]

    def _best_by_sql(self) -> list[Row]:
        rows = self._session.sql(_SQL.format(mark=self._mark, limit=_BEST))
        return [(row["name"], row["experiment"], row["accuracy"], row["val_loss"], row["run_id"]) for row in rows]

    def _curve(self, best: Row) -> None:
        name, _, _, _, run_id = best
        width = min(terminal_width(), 120)
        known = {
            row["key"]
            for row in self._session.sql("SELECT key FROM latest_metrics WHERE run_id = {id:String}", id=run_id)
        }
        keys = [key for key in ("train_loss", "val_loss") if key in known]
        series = {key: bucketed(self._session, run_id, key, width * 2) for key in keys}
        self._out.heading(f"How {name} learned")
        self._out.write(picture(self._out, series, width=width, height=12, title="", log_y=True))
        self._out.write()

    def _next(self, best: Sequence[Row]) -> None:
        command = self._command()
        first = short_id(best[0][4])
        second = short_id(best[1][4]) if len(best) > 1 else first
        out = self._out
        out.heading("What to try next")
        for remark, rest in (
            ("all runs, best first", "runs list -o 'metrics.final_accuracy DESC'"),
            ("one run with everything it logged", f"runs show {first}"),
            ("two runs side by side", f"runs compare {first} {second}"),
            ("its curves in the terminal", f"metrics show {first} train_loss val_loss"),
            ("its confusion matrix as a picture", f"artifacts download {first} confusion_matrix.png"),
            ("any question at all", 'sql "SELECT key, count() FROM metrics GROUP BY key"'),
            ("is everything in order here?", "doctor"),
        ):
            out.write(f"  # {remark}")
            self._code(f"{command} {rest}")

    def _command(self) -> str:
        """How the user calls this very `runstream` from here."""
        import runstream

        own = Path(sys.executable).with_name("runstream")
        on_path = shutil.which("runstream")
        if on_path is not None and Path(on_path).resolve() == own.resolve():
            command = "runstream"
        elif own.exists():
            command = shlex.quote(_from_here(own))
        else:
            command = f"{shlex.quote(_from_here(Path(sys.executable)))} -m runstream"
        uri = runstream.get_tracking_uri()
        default = Path(DEFAULT_DIRECTORY).resolve()
        if Path(uri.removeprefix("file://")).resolve() == default or self._session.tracking_uri is None:
            return command
        return f"{command} --tracking-uri {shlex.quote(uri)}"

    def _code(self, text: str) -> None:
        """Something that may be pasted: indented by two, dim on a terminal."""
        for line in text.splitlines():
            self._out.write(f"\x1b[2m  {line}\x1b[0m" if self._out.colors else f"  {line}")


def _shown(row: Row) -> list[str]:
    name, experiment, accuracy, loss, run_id = row
    return [name, experiment, f"{accuracy:.4f}", number(loss), short_id(run_id)]


def shown_address(uri: str) -> str:
    """A tracking address as short as it can be understood from here."""
    if not uri.startswith("file://"):
        return uri
    place = _from_here(Path(unquote(uri.removeprefix("file://"))))
    return place if place.startswith("/") else f"./{place}"


def _from_here(path: Path) -> str:
    """`path` relative to the current folder where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
