"""`runstream sql`: any read-only query over the public views."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any, Final

import click

from .command import Command, session_of
from .output import Column, plain
from .text import number

__all__ = ["sql"]

_SHOWN_ROWS: Final = 1000
"""Rows of a table on a terminal; every other form prints all."""


@click.command(cls=Command)
@click.argument("query", required=False)
@click.option(
    "-f",
    "--file",
    "path",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="Read the query from a file (- for stdin).",
)
@click.option(
    "-p",
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value of {NAME:Type} in the query (repeatable).",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "tsv", "jsonl", "json", "parquet"]),
    default="table",
    show_default=True,
)
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; stdout if left out.",
)
@click.pass_context
def sql(
    context: click.Context,
    query: str | None,
    path: Path | None,
    params: tuple[str, ...],
    form: str,
    target: Path | None,
) -> None:
    """Answer QUERY, ClickHouse's SQL over the views experiments, runs, params, tags, metrics, latest_metrics, inputs
    and artifacts (deploy/schema.md describes every column). Reading only.

    \b
    runstream sql "SELECT name, status FROM runs ORDER BY started_at DESC LIMIT 5"
    runstream sql --param run=4f2a... "SELECT max(value) FROM metrics WHERE run_id = {run:String}"
    """
    session = session_of(context)
    out = session.output
    if (query is None) == (path is None):
        raise click.UsageError("give one query, as an argument or with --file", context)
    text = query if query is not None else sys.stdin.read() if str(path) == "-" else Path(str(path)).read_text("utf-8")
    values: dict[str, str] = {}
    for pair in params:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="'--param'")
        values[name] = value
    chosen = "json" if out.json else form
    if chosen == "table" and target is not None:
        chosen = "parquet" if target.suffix == ".parquet" else "csv"
    answer = session.arrow(text, values)
    if chosen == "parquet":
        import pyarrow.parquet as pq

        if target is None and sys.stdout.isatty():
            raise click.UsageError("parquet is binary: name a file with --output, or pipe it", context)
        pq.write_table(answer, str(target) if target is not None else sys.stdout.buffer, compression="zstd")
    else:
        _print(session, answer, chosen, target)
    if target is not None:
        out.note(f"Wrote {answer.num_rows} rows to {target}.")


def _print(session: Any, answer: Any, form: str, target: Path | None) -> None:
    """Print the Arrow table `answer` in any text form."""
    out = session.output
    names = list(answer.column_names)
    if form == "table":
        shown = answer.slice(0, _SHOWN_ROWS) if out.terminal else answer
        rights = [not isinstance(_first(shown, at), str) for at in range(len(names))]
        columns = [Column(name, right=right) for name, right in zip(names, rights, strict=True)]
        out.table(columns, [[_text(value) for value in row] for row in _rows(shown)], "No rows.")
        if shown.num_rows < answer.num_rows:
            out.note(f"These are the first {shown.num_rows} of {answer.num_rows} rows; --format csv prints all")
        return
    file = sys.stdout if target is None else target.open("w", encoding="utf-8", newline="")
    try:
        if form in ("csv", "tsv"):
            writer = csv.writer(file, delimiter="," if form == "csv" else "\t", lineterminator="\n")
            writer.writerow(names)
            writer.writerows([_cell(value) for value in row] for row in _rows(answer))
        else:
            import json

            rows = (dict(zip(names, (plain(value) for value in row), strict=True)) for row in _rows(answer))
            if form == "jsonl":
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                json.dump(list(rows), file, indent=2, ensure_ascii=False)
                file.write("\n")
    finally:
        if target is not None:
            file.close()


def _rows(table: Any) -> Any:
    """Rows as tuples of Python values, one batch in memory at a time; maps as dicts."""
    import pyarrow as pa

    maps = [pa.types.is_map(field.type) for field in table.schema]
    for batch in table.to_batches(max_chunksize=10_000):
        columns = [column.to_pylist() for column in batch.columns]
        for row in zip(*columns, strict=True):
            yield tuple(dict(v) if is_map and v is not None else v for v, is_map in zip(row, maps, strict=True))


def _first(table: Any, at: int) -> Any:
    return next((value for value in table.column(at).slice(0, 20).to_pylist() if value is not None), "")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    rendered = plain(value)
    return "" if rendered is None else rendered if isinstance(rendered, str) else str(rendered)


def _cell(value: Any) -> Any:
    """A value in CSV: floats exact, nothing for NULL, nested values as JSON."""
    if isinstance(value, float):
        return repr(value)
    rendered = plain(value)
    if isinstance(rendered, dict | list):
        import json

        return json.dumps(rendered, ensure_ascii=False)
    return "" if rendered is None else rendered
