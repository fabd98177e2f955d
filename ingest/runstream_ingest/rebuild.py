"""A new database from the log, compared with the one in use and put in its place. Nothing is dropped.

    1. prepare   make the fresh database; copy what lies before the log's start from the old one; refuse a gap
    2. replay    run a worker over the log into the fresh database, up to the log's end
    3. compare   every public view, old beside fresh
    4. swap      take `ingest_positions` away, so that running workers stop; replay the rest; exchange the tables

Every table of either database is whole by itself at any moment, so a crash during the exchange leaves a mixture that is
right too; running the rebuild again finishes it. The old tables stay in the fresh database's name until `drop_old`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from runstream_schemas.names import Stream

from .commit import read_positions
from .dead_letter import DeadLetter, Source
from .errors import RebuildError
from .log import EventLog
from .migration import Engine, migrate
from .store import Store, quote_name
from .worker import Worker, WorkerSettings

__all__ = ["Difference", "RebuildReport", "drop_old", "rebuild"]

_log = logging.getLogger(__name__)

Positions = Mapping[tuple[Stream, int], int]
_KEPT_TABLES: Final = frozenset({"schema_migrations", "ingest_positions"})
_CLOSED: Final = "ingest_positions_closed"
_VOLATILE_COLUMNS: Final = frozenset({"lost"})
"""Columns that depend on the time of the query."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One public view that does not answer as before."""

    view: str
    old_rows: int
    fresh_rows: int


@dataclass(slots=True)
class RebuildReport:
    """What a rebuild did."""

    copied: dict[str, str] = field(default_factory=dict)
    """Table -> which rows of it came from the old database."""
    dead_letters: int = 0
    """Records that could not be stored; they have their dead letters from the first time."""
    differences: Sequence[Difference] = ()
    swapped: bool = False


class _Discard:
    """Dead letters of a replay: they exist already."""

    def __init__(self) -> None:
        self.count = 0

    def put(self, letters: Sequence[DeadLetter]) -> None:
        self.count += len(letters)

    def letters(self) -> Iterator[DeadLetter]:
        return iter(())

    def mark_replayed(self, sources: Sequence[Source]) -> None:
        raise NotImplementedError("a rebuild replays no dead letters")

    def close(self) -> None:
        pass


def rebuild(
    open_log: Callable[[], EventLog],
    log_starts: Positions,
    log_ends: Callable[[], Positions],
    old: Store,
    fresh: Store,
    *,
    swap: bool = True,
    accept_differences: bool = False,
    engine: Engine = "MergeTree",
    cluster: str | None = None,
    settings: WorkerSettings | None = None,
    progress: Callable[[str], None] = lambda line: None,
    stall_seconds: float = 300.0,
) -> RebuildReport:
    """Rebuild `old` from the log by way of `fresh`; blocks, for hours on a long log.

    Args:
        open_log: a reader of the whole log whose commits do not disturb the workers' (a consumer group of its own).
        log_starts: first offset that each partition still has.
        log_ends: asks where each partition ends now.
        old, fresh: two databases of one engine, which this call alone uses; `fresh` is made new (drop it first).
        swap: False stops after the comparison.
        accept_differences: swap although views differ, which is what one wants after a bug was mended.
        stall_seconds: give up when the replay makes no progress for so long.

    Raises:
        RebuildError: a gap between old database and log, a view that differs, a replay that stands still. `old` is
            as it was.
        SystemicFailure, LogError, StoreError: as from a worker.
    """
    report = RebuildReport()
    _reopen(old)
    cut = _cut(old, log_starts)
    migrate(fresh, engine, cluster)
    if read_positions(fresh):
        raise RebuildError(
            f"database {fresh.database!r} holds data: drop it first, it is left from another rebuild or its swap"
        )
    _prepare(old, fresh, cut, report, progress)
    _replay(open_log, log_ends(), fresh, report, settings, progress, stall_seconds)
    report.differences = _differences(old, fresh)
    if report.differences and not accept_differences:
        listed = ", ".join(f"{one.view} ({one.old_rows} rows, now {one.fresh_rows})" for one in report.differences)
        raise RebuildError(
            f"the rebuilt database answers otherwise in: {listed}. It stands in {fresh.database!r} to look at; "
            "the one in use is untouched. Workers that went on meanwhile explain more rows; if the difference is "
            "right, accept it"
        )
    if swap:
        _swap(open_log, log_ends, old, fresh, report, settings, progress, stall_seconds)
    return report


def drop_old(fresh: Store) -> None:
    """Drop the database that holds the old tables after a swap. There is no way back."""
    fresh.execute(f"DROP DATABASE IF EXISTS {quote_name(fresh.database)} SYNC")


def _cut(old: Store, log_starts: Positions) -> dict[Stream, dict[int, int]]:
    """Stream -> partition -> where the log begins, for partitions that no longer begin at 0; a gap is refused."""
    held = read_positions(old) if "ingest_positions" in _tables(old) else {}
    cut: dict[Stream, dict[int, int]] = {}
    for (stream, partition), start in log_starts.items():
        if start <= 0:
            continue
        reached = held.get((stream, partition), 0)
        if reached < start:
            raise RebuildError(
                f"a gap: {stream}/{partition} begins at {start} in the log, but the database has read up to {reached}; "
                "what lies between is in neither"
            )
        cut.setdefault(stream, {})[partition] = start
    return cut


def _prepare(
    old: Store,
    fresh: Store,
    cut: Mapping[Stream, Mapping[int, int]],
    report: RebuildReport,
    progress: Callable[[str], None],
) -> None:
    tables = _tables(old)
    common = [table for table in tables if table in set(_tables(fresh))]
    source = quote_name(old.database)
    if "settings" in common:
        _copy(fresh, source, "settings", "1", report)
    for table in ("purged_runs", "purged_experiments"):
        if table in common:
            _copy(fresh, source, table, "1", report)
    if "metrics" in cut:
        before = " OR ".join(f"(log_partition = {p} AND log_offset < {at})" for p, at in cut["metrics"].items())
        progress("copying metrics from before the log's start")
        _copy(fresh, source, "points", before, report)
        fresh.execute(
            "INSERT INTO rollup (run_id, key, last, min, max) SELECT run_id, key, "
            "max((step, timestamp, if(isNaN(value), 0, value + 0.0), isNaN(value))), "
            "min(value + 0.0), max(value + 0.0) "
            f"FROM {source}.points WHERE {before} GROUP BY run_id, key"
        )
        fresh.execute(
            f"INSERT INTO run_facts (run_id, heartbeat_at) SELECT run_id, heartbeat_at FROM {source}.run_facts FINAL"
        )
    if "control" in cut:
        # State has no offsets, but it only ever grows: all of it merged with a replay of the rest is the same state.
        progress("copying state from before the log's start")
        others = {"settings", "purged_runs", "purged_experiments", "points", "rejects"} | _KEPT_TABLES
        others |= {"rollup", "rollup_by_key"}
        for table in common:
            if table not in others:
                _copy(fresh, source, table, "1", report)
    for stream, partitions in cut.items():
        for partition, start in partitions.items():
            where = f"stream = '{stream}' AND partition = {partition} AND log_offset < {start}"
            _copy(fresh, source, "rejects", where, report)
            fresh.execute(
                "INSERT INTO ingest_positions (stream, partition, next_offset, updated_at) "
                f"SELECT '{stream}', {partition}, {start}, now64(3, 'UTC')"
            )


def _copy(fresh: Store, source: str, table: str, where: str, report: RebuildReport) -> None:
    columns = ", ".join(
        quote_name(name)
        for (name,) in fresh.rows(
            "SELECT name FROM system.columns WHERE database = {database:String} AND table = {table:String} "
            "ORDER BY position",
            {"database": fresh.database, "table": table},
        )
    )
    fresh.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {source}.{table} WHERE {where}")
    report.copied[table] = "all" if where == "1" else where


def _replay(
    open_log: Callable[[], EventLog],
    ends: Positions,
    fresh: Store,
    report: RebuildReport,
    settings: WorkerSettings | None,
    progress: Callable[[str], None],
    stall_seconds: float,
) -> None:
    log = open_log()
    discard = _Discard()
    stop = threading.Event()
    worker = Worker(log, fresh, discard, settings)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            worker.run(stop)
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, name="runstream-rebuild", daemon=True)
    thread.start()
    try:
        moved_at = time.monotonic()
        before: Positions = {}
        while thread.is_alive():
            positions = worker.positions()
            if all(positions.get(place, 0) >= end for place, end in ends.items()):
                break
            if positions != before:
                before, moved_at = positions, time.monotonic()
                behind = sum(max(0, end - positions.get(place, 0)) for place, end in ends.items())
                progress(f"replaying the log: {behind} to go")
            if time.monotonic() - moved_at > stall_seconds:
                raise RebuildError(f"the replay has stood still for {stall_seconds:.0f} seconds: {worker.trouble()}")
            thread.join(0.05)
    finally:
        stop.set()
        thread.join()
        log.close()
    if failure:
        raise failure[0]
    report.dead_letters += discard.count


def _differences(old: Store, fresh: Store) -> list[Difference]:
    found: list[Difference] = []
    for view in _views(fresh):
        if view not in set(_views(old)):
            continue
        columns = [
            quote_name(name)
            for (name,) in fresh.rows(
                "SELECT name FROM system.columns WHERE database = {database:String} AND table = {table:String} "
                "ORDER BY position",
                {"database": fresh.database, "table": view},
            )
            if name not in _VOLATILE_COLUMNS
        ]
        # Order does not matter to a sum; toString, because NULL would make a whole hash NULL.
        texts = ", ".join(f"toString({column})" for column in columns)
        sql = f"SELECT count(), sum(sipHash64(tuple({texts}))) FROM {view}"
        [was], [now] = old.rows(sql), fresh.rows(sql)
        if was != now:
            found.append(Difference(view, int(was[0]), int(now[0])))
    return found


def _swap(
    open_log: Callable[[], EventLog],
    log_ends: Callable[[], Positions],
    old: Store,
    fresh: Store,
    report: RebuildReport,
    settings: WorkerSettings | None,
    progress: Callable[[str], None],
    stall_seconds: float,
) -> None:
    # Without this table no worker can move a position over what only the old tables hold: it stops, and its next start
    # reads on from the new positions.
    progress("stopping workers: taking ingest_positions away")
    old.execute(f"RENAME TABLE ingest_positions TO {_CLOSED}")
    try:
        _replay(open_log, log_ends(), fresh, report, settings, progress, stall_seconds)
        progress("exchanging tables")
        old_name, fresh_name = quote_name(old.database), quote_name(fresh.database)
        in_old = set(_tables(old))
        for table in _tables(fresh):
            if table in _KEPT_TABLES:
                continue
            if table in in_old:
                old.execute(f"EXCHANGE TABLES {old_name}.{table} AND {fresh_name}.{table}")
        old.execute(
            f"RENAME TABLE {fresh_name}.ingest_positions TO {old_name}.ingest_positions, "
            f"{old_name}.{_CLOSED} TO {fresh_name}.ingest_positions"
        )
    except BaseException:
        _reopen(old)
        raise
    report.swapped = True
    _log.info("swapped the rebuilt database in; the old tables are in %s", fresh.database)


def _reopen(old: Store) -> None:
    """Undo what a rebuild that died in its swap left behind."""
    tables = _tables(old)
    if _CLOSED in tables and "ingest_positions" not in tables:
        old.execute(f"RENAME TABLE {_CLOSED} TO ingest_positions")


def _tables(store: Store) -> list[str]:
    return _named(store, "engine LIKE '%MergeTree'")


def _views(store: Store) -> list[str]:
    return _named(store, "engine = 'View'")


def _named(store: Store, condition: str) -> list[str]:
    rows = store.rows(
        f"SELECT name FROM system.tables WHERE database = {{database:String}} AND {condition} ORDER BY name",
        {"database": store.database},
    )
    return [name for (name,) in rows]
