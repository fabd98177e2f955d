"""`runstream metrics`: list, show as a plot in the terminal, export."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .command import Group, RunId, session_of
from .failure import ExitCode, Failure
from .output import DEFAULT_WIDTH, Column, Output, terminal_width
from .text import age, number, short_id

if TYPE_CHECKING:
    import pyarrow

    from .session import Session

__all__ = ["metrics", "picture"]

_BUCKETED = """
SELECT avg(step) AS x, avg(value) AS mean, min(value) AS low, max(value) AS high
FROM (
    SELECT step, value,
        intDiv((toInt128(step) - first) * {buckets:UInt32}, greatest(last - first, 1)) AS bucket
    FROM metrics,
        (SELECT toInt128(min(step)) AS first, toInt128(max(step)) + 1 AS last
         FROM metrics WHERE run_id = {run:String} AND key = {key:String}) AS ends
    WHERE run_id = {run:String} AND key = {key:String} AND isFinite(value)
)
GROUP BY bucket ORDER BY bucket
"""


@click.group(cls=Group)
def metrics() -> None:
    """Look at metrics (numeric series of a run) and export them."""


@metrics.command("list")
@click.argument("run", type=RunId())
@click.pass_context
def list_(context: click.Context, run: str) -> None:
    """List the metrics of RUN with their latest value and range."""
    session = session_of(context)
    run_id = session.run_id(run)
    rows = session.sql(
        "SELECT l.key AS key, l.value AS value, l.min AS min, l.max AS max, l.step AS step, l.timestamp AS timestamp, "
        "c.points AS points FROM latest_metrics AS l LEFT JOIN (SELECT key, count() AS points FROM metrics "
        "WHERE run_id = {id:String} GROUP BY key) AS c ON c.key = l.key WHERE l.run_id = {id:String} ORDER BY key",
        id=run_id,
    )
    if session.output.json:
        session.output.value(rows)
        return
    columns = [
        Column("KEY", style="bold"),
        *(Column(t, right=True) for t in ("LAST", "MIN", "MAX", "LAST STEP", "POINTS")),
    ]
    session.output.table(
        [*columns, Column("UPDATED")],
        [
            [
                row["key"],
                *(number(row[name]) for name in ("value", "min", "max", "step", "points")),
                age(int(row["timestamp"].timestamp() * 1000)),
            ]
            for row in rows
        ],
        "This run has no metrics.",
    )


@metrics.command()
@click.argument("run", type=RunId())
@click.argument("key", nargs=-1)
@click.option("--width", type=click.IntRange(30, 1000), help="Columns; the terminal's width if left out.")
@click.option("--height", type=click.IntRange(4, 200), default=14, show_default=True, help="Rows of the drawing area.")
@click.option("--log-y", is_flag=True, help="Logarithmic y axis.")
@click.pass_context
def show(context: click.Context, run: str, key: tuple[str, ...], width: int | None, height: int, log_y: bool) -> None:
    """Draw metrics KEY ... of RUN in the terminal (bucket means, one for each dot column).

    Without KEY the first metric is drawn. With --json the drawn points are printed: step, mean, low, high.
    """
    session = session_of(context)
    run_id = session.run_id(run)
    known = [
        str(row["key"])
        for row in session.sql("SELECT key FROM latest_metrics WHERE run_id = {id:String} ORDER BY key", id=run_id)
    ]
    keys = list(key) or known[:1]
    if not keys:
        raise Failure(f"run {run_id} has no metrics", ExitCode.NOT_FOUND)
    _check_keys(keys, known, run_id)
    # A script gets the same points wherever it runs.
    columns = width or (DEFAULT_WIDTH if session.output.json else max(terminal_width(), 30))
    series = {name: bucketed(session, run_id, name, columns * 2) for name in keys}
    if session.output.json:
        session.output.value({"run_id": run_id, "series": series})
        return
    session.output.write(
        picture(
            session.output,
            series,
            width=columns,
            height=height,
            title=f"{', '.join(keys)}  {short_id(run_id)}",
            log_y=log_y,
        )
    )


@metrics.command()
@click.argument("run", nargs=-1, required=True, type=RunId())
@click.option("-k", "--key", "keys", multiple=True, help="Only this metric (repeatable); all if left out.")
@click.option(
    "--format", "form", type=click.Choice(["csv", "parquet"]), help="If left out, taken from the file's name; csv."
)
@click.option(
    "-o", "--output", "path", type=click.Path(dir_okay=False, path_type=Path), help="File to write; stdout if left out."
)
@click.pass_context
def export(
    context: click.Context, run: tuple[str, ...], keys: tuple[str, ...], form: str | None, path: Path | None
) -> None:
    """Write every point of RUN ... as CSV or Parquet: run_id, key, step, timestamp, value.

    Rows are exact and ordered by run, key, step and timestamp. Timestamps are UTC (ISO 8601 in CSV).
    """
    session = session_of(context)
    chosen = form or ("parquet" if path is not None and path.suffix == ".parquet" else "csv")
    if chosen == "parquet" and path is None and sys.stdout.isatty():
        raise click.UsageError("parquet is binary: name a file with --output, or pipe it", context)
    ids = [session.run_id(text) for text in run]
    points = 0
    with session.output.progress("exporting", total=len(ids)) as advance:
        blocks = _blocks(session, ids, keys, advance)
        points = _write_parquet(blocks, path) if chosen == "parquet" else _write_csv(blocks, path)
    if path is not None:
        session.output.done(
            f"Wrote {points} points to {path}.", {"path": str(path), "format": chosen, "points": points, "runs": ids}
        )


def bucketed(session: Session, run_id: str, key: str, buckets: int) -> list[dict[str, float]]:
    """At most `buckets` points of one metric: mean step, mean, lowest and highest value of each bucket of steps."""
    rows = session.sql(_BUCKETED, run=run_id, key=key, buckets=buckets)
    return [{"step": row["x"], "mean": row["mean"], "low": row["low"], "high": row["high"]} for row in rows]


def picture(
    output: Output,
    series: dict[str, list[dict[str, float]]],
    *,
    width: int,
    height: int,
    title: str,
    log_y: bool = False,
) -> str:
    """Curves of bucket means, in colours where the terminal has them and with different marks where not."""
    from .plot import Curve, draw

    curves = [Curve(name, [p["step"] for p in points], [p["mean"] for p in points]) for name, points in series.items()]
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    try:
        return draw(
            curves,
            width=width,
            height=height,
            title=title,
            log_y=log_y,
            colors=output.colors,
            ascii_only=not unicode or (len(curves) > 1 and not output.colors),
        )
    except ValueError as exc:
        raise Failure(str(exc)) from exc


def _check_keys(keys: Sequence[str], known: Sequence[str], run_id: str) -> None:
    from difflib import get_close_matches

    for name in keys:
        if name not in known:
            near = get_close_matches(name, known, n=3) or known[:5]
            hint = f"; it has {', '.join(near)}{', ...' if len(known) > len(near) else ''}" if near else ""
            raise Failure(f"run {run_id} has no metric {name!r}{hint}", ExitCode.NOT_FOUND)


def _blocks(
    session: Session, ids: Sequence[str], keys: Sequence[str], advance: Callable[[float, str], None]
) -> Iterator[tuple[str, str, pyarrow.Table]]:
    """Run, key and points (step, timestamp, value) of one series at a time: the longest one bounds memory."""
    total = 0
    for done, run_id in enumerate(ids):
        known = [
            str(row["key"])
            for row in session.sql("SELECT key FROM latest_metrics WHERE run_id = {id:String} ORDER BY key", id=run_id)
        ]
        _check_keys(keys, known, run_id)
        for key in keys or known:
            points = session.arrow(
                "SELECT step, timestamp, value FROM metrics WHERE run_id = {id:String} AND key = {key:String} "
                "ORDER BY step, timestamp",
                {"id": run_id, "key": key},
            )
            total += points.num_rows
            advance(done, f"{total} points")
            yield run_id, key, points
        advance(done + 1, f"{total} points")


_COLUMNS: Final = ("run_id", "key", "step", "timestamp", "value")


def _write_csv(blocks: Iterator[tuple[str, str, pyarrow.Table]], path: Path | None) -> int:
    from .output import plain

    total = 0
    file = sys.stdout if path is None else path.open("w", encoding="utf-8", newline="")
    try:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for run_id, key, points in blocks:
            for batch in points.to_batches(max_chunksize=10_000):
                columns = (column.to_pylist() for column in batch.columns)
                writer.writerows((run_id, key, step, plain(at), repr(v)) for step, at, v in zip(*columns, strict=True))
            total += points.num_rows
    finally:
        if path is not None:
            file.close()
    return total


def _write_parquet(blocks: Iterator[tuple[str, str, pyarrow.Table]], path: Path | None) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.dictionary(pa.int32(), pa.string())
    kinds = (text, text, pa.int64(), pa.timestamp("ms", tz="UTC"), pa.float64())
    schema = pa.schema(list(zip(_COLUMNS, kinds, strict=True)))
    total = 0
    target: Any = sys.stdout.buffer if path is None else str(path)
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for run_id, key, points in blocks:
            rows = points.num_rows
            names = [pa.array([name] * rows, pa.string()).cast(text) for name in (run_id, key)]
            columns = [points.column(name).cast(kind) for name, kind in zip(_COLUMNS[2:], kinds[2:], strict=True)]
            writer.write_table(pa.Table.from_arrays([*names, *columns], schema=schema))
            total += rows
    return total
