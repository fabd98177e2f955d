"""Rebuild and gc: the same answers from the log in any order, gaps refused, purges kept, nothing dropped unasked."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runstream_ingest.batch import BatchLimits
from runstream_ingest.commit import read_positions
from runstream_ingest.dead_letter import DirectoryDeadLetters
from runstream_ingest.errors import RebuildError
from runstream_ingest.gc import purge, purged_runs
from runstream_ingest.log.memory import MemoryLog
from runstream_ingest.rebuild import drop_old, rebuild
from runstream_ingest.store import Store
from runstream_ingest.worker import Worker, WorkerSettings
from runstream_schemas.names import EventName, Stream
from tests.ingest.test_worker import FAST, append, memory, run_to_its_end, running
from tests.services.chdb_process import ChdbProcess
from tests.services.events import NOW, created, points, started, until, version

VIEWS = ("experiments", "runs", "params", "tags", "metrics", "latest_metrics", "inputs", "artifacts")
PLACES: list[tuple[Stream, int]] = [("control", 0), ("metrics", 0), ("metrics", 1)]


def answers(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Everything the public views say, in a fixed order, as text."""
    found = {}
    for view in VIEWS:
        columns = ", ".join(
            f"toString({name})"
            for (name,) in store.rows(
                "SELECT name FROM system.columns WHERE database = {d:String} AND table = {t:String} AND name != 'lost'",
                {"d": store.database, "t": view},
            )
        )
        found[view] = store.rows(f"SELECT {columns} FROM {view} ORDER BY ALL")
    return found


def history(rng: random.Random) -> list[tuple[EventName, dict[str, Any]]]:
    """Several runs' lives, with deletions, purges and late events."""
    events: list[tuple[EventName, dict[str, Any]]] = [created(), created("9", "speech", seq=2)]
    for number in range(6):
        run_id = f"run{number}"
        events.append(started(run_id, "5" if number % 2 else "9", seq=number + 10))
        events.append(("params", {"run_id": run_id, "keys": ["lr", "n"], "values": ["0.1", str(number)], **version()}))
        events.append(("run_tags", {"run_id": run_id, "keys": ["k"], "values": [str(number)], **version(seq=number)}))
        for part in range(4):
            values = [rng.choice([rng.random(), float("nan"), float("inf"), -0.0, 0.0]) for _ in range(20)]
            events.append(points(run_id, values, first_step=part * 20, first_seq=part * 20))
        events.append(
            ("run_updated", {"run_id": run_id, "status": "FINISHED", "ended_at": NOW + 5, **version(NOW + 5)})
        )
    events.append(("run_updated", {"run_id": "run1", "lifecycle_stage": "deleted", **version(NOW + 6)}))
    events.append(("purged", {"kind": "run", "id": "run2", **version(NOW + 7)}))
    events.append(points("run2", [1.0], first_step=999, first_seq=999))
    events.append(("experiment_updated", {"experiment_id": "5", "lifecycle_stage": "deleted", **version(NOW + 8)}))
    events.append(("artifact_logged", {"run_id": "run0", "path": "a/b", "size_bytes": 3, **version()}))
    return events


def fill(log: MemoryLog, store: Store, dead: DirectoryDeadLetters, settings: WorkerSettings = FAST) -> None:
    with running(Worker(log, store, dead, settings)):
        until(lambda: _all_stored(log, store))


def _all_stored(log: MemoryLog, store: Store) -> bool:
    positions = read_positions(store)
    return bool(log.end_positions()) and all(positions.get(p, 0) >= end for p, end in log.end_positions().items())


def reopen(log: MemoryLog) -> Callable[[], MemoryLog]:
    def open_log() -> MemoryLog:
        log.committed.clear()
        log.assign(*PLACES)
        return log

    return open_log


@pytest.fixture
def dead(tmp_path: Path) -> DirectoryDeadLetters:
    return DirectoryDeadLetters(tmp_path / "log")


@pytest.fixture
def fresh(chdb: ChdbProcess, store: Store) -> Store:
    return chdb.store(f"{store.database}_rebuild")


def ends(log: MemoryLog) -> dict[tuple[Stream, int], int]:
    return {place: log._end(place) for place in PLACES}


def append_all(log: MemoryLog, events: list[tuple[EventName, dict[str, Any]]]) -> None:
    for number, event in enumerate(events):
        append(log, event, number % 2 if event[0] == "metric_batch" else 0)


def test_a_rebuild_gives_the_same_answers_and_keeps_the_old(
    store: Store, fresh: Store, dead: DirectoryDeadLetters
) -> None:
    """Afterwards the database in use is the rebuilt one, and the old tables are still there until dropped."""
    log = memory()
    append_all(log, history(random.Random(1)))
    fill(log, store, dead)
    before = answers(store)
    assert len(before["runs"]) == 5
    store.execute("INSERT INTO points (run_id, key, step, value) SELECT 'run0', 'junk', 1, 2")
    with pytest.raises(RebuildError, match=r"answers otherwise in: .*metrics \(\d+ rows, now \d+\)"):
        rebuild(reopen(log), dict.fromkeys(PLACES, 0), lambda: ends(log), store, fresh, settings=FAST)
    assert ("run0", "junk") in store.rows("SELECT run_id, key FROM metrics")
    fresh.execute(f"DROP DATABASE {fresh.database}")
    store.execute(f"CREATE DATABASE {fresh.database}")
    report = rebuild(
        reopen(log), dict.fromkeys(PLACES, 0), lambda: ends(log), store, fresh, settings=FAST, accept_differences=True
    )
    assert report.swapped
    assert [one.view for one in report.differences] == ["metrics"]
    assert answers(store) == before
    assert read_positions(store) == ends(log)
    assert ("run0", "junk") in fresh.rows("SELECT run_id, key FROM points")
    drop_old(fresh)
    assert answers(store) == before
    log.assign(*PLACES)
    append(log, points("run0", [7.0], first_step=5_000, first_seq=5_000))
    fill(log, store, dead)
    assert store.rows("SELECT value FROM metrics WHERE step = 5000") == [(7.0,)]


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_and_differently_batched_logs_give_the_same_answers(
    chdb: ChdbProcess, store: Store, fresh: Store, dead: DirectoryDeadLetters, seed: int
) -> None:
    """Order, batching and duplicates of the same events do not matter."""
    rng = random.Random(seed)
    events = history(random.Random(1))
    log = memory()
    append_all(log, events)
    fill(log, store, dead)
    shuffled = events + rng.sample(events, 15)
    rng.shuffle(shuffled)
    other = memory()
    append_all(other, shuffled)
    settings = WorkerSettings(BatchLimits(max_batch_records=rng.randrange(1, 30)), 0.001, 0.01)
    report = rebuild(
        reopen(other), dict.fromkeys(PLACES, 0), lambda: ends(other), store, fresh, settings=settings, swap=False
    )
    assert report.differences == []
    assert answers(fresh) == answers(store)


def test_what_lies_before_the_logs_start_is_copied(store: Store, fresh: Store, dead: DirectoryDeadLetters) -> None:
    """After retention of both streams the old database gives the beginning, the log the rest."""
    log = memory()
    append_all(log, history(random.Random(2)))
    fill(log, store, dead)
    before = answers(store)
    starts = {("metrics", 0): 5, ("metrics", 1): 6, ("control", 0): 8}
    for (stream, partition), start in starts.items():
        log.expire(stream, start, partition=partition)  # type: ignore[arg-type]
    report = rebuild(reopen(log), starts, lambda: ends(log), store, fresh, settings=FAST)  # type: ignore[arg-type]
    assert report.swapped
    assert answers(store) == before
    assert report.copied["points"]


def test_a_gap_is_refused(store: Store, fresh: Store, dead: DirectoryDeadLetters) -> None:
    """What is neither in the database nor in the log any more cannot be rebuilt, and is named."""
    log = memory()
    append_all(log, history(random.Random(3)))
    fill(log, store, dead)
    [end] = [end for place, end in ends(log).items() if place == ("metrics", 1)]
    with pytest.raises(RebuildError, match=rf"a gap: metrics/1 begins at {end + 4} in the log, .* up to {end}"):
        rebuild(reopen(log), {("metrics", 1): end + 4}, lambda: ends(log), store, fresh, settings=FAST)


def test_a_rebuild_into_a_database_with_data_is_refused(store: Store, fresh: Store, dead: DirectoryDeadLetters) -> None:
    """What another rebuild left must be dropped by a person."""
    log = memory()
    append(log, points("a", [1.0]))
    fill(log, store, dead)
    rebuild(reopen(log), dict.fromkeys(PLACES, 0), lambda: ends(log), store, fresh, settings=FAST, swap=False)
    with pytest.raises(RebuildError, match="holds data: drop it first"):
        rebuild(reopen(log), dict.fromkeys(PLACES, 0), lambda: ends(log), store, fresh, settings=FAST)


def test_a_running_worker_is_stopped_by_the_swap_and_nothing_falls_between(
    store: Store, fresh: Store, dead: DirectoryDeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its positions table a worker cannot move them over what only the old tables hold."""
    log = memory()
    append(log, points("a", [1.0]))
    fill(log, store, dead)
    store.execute("RENAME TABLE ingest_positions TO ingest_positions_closed")
    log.assign(*PLACES)
    append(log, points("a", [2.0], first_step=1, first_seq=2))
    with pytest.raises(RuntimeError):
        run_to_its_end(Worker(log, store, dead, FAST))
    # A rebuild that died there is taken up again: the table comes back, and the whole thing runs through.
    log.assign(*PLACES)
    report = rebuild(
        reopen(log), dict.fromkeys(PLACES, 0), lambda: ends(log), store, fresh, settings=FAST, accept_differences=True
    )
    assert report.swapped
    assert store.rows("SELECT value FROM metrics ORDER BY step") == [(1.0,), (2.0,)]


def test_gc_deletes_the_rows_of_purged_runs_only(store: Store, dead: DirectoryDeadLetters) -> None:
    """A dry run counts, the real one deletes, views answer as before, late journals stay hidden."""
    log = memory()
    append_all(log, history(random.Random(4)))
    append(log, started("late", "77", seq=50))
    append(log, ("purged", {"kind": "experiment", "id": "77", **version(NOW + 9)}))
    append(log, points("late", [3.0]))
    fill(log, store, dead)
    before = answers(store)
    assert purged_runs(store) == ["late", "run2"]
    counted = purge(store, dry_run=True)
    assert counted["points"] >= 82
    assert {"points", "rollup", "run_facts", "param_facts", "run_tag_facts"} <= counted.keys()
    assert store.rows("SELECT count() > 0 FROM points WHERE run_id = 'run2'") == [(1,)]
    assert purge(store, dry_run=False) == counted
    for table in counted:
        assert store.rows(f"SELECT count() FROM {table} WHERE run_id IN ('run2', 'late')") == [(0,)]
    after = answers(store)
    assert {view: rows for view, rows in after.items() if view not in ("metrics", "latest_metrics")} == {
        view: rows for view, rows in before.items() if view not in ("metrics", "latest_metrics")
    }
    assert store.rows("SELECT count() FROM metrics WHERE run_id IN ('run2', 'late')") == [(0,)]
    assert purge(store, dry_run=False) == {}
    log.assign(*PLACES)
    append(log, points("run2", [4.0], first_step=7_000, first_seq=7_000))
    fill(log, store, dead)
    assert store.rows("SELECT count() FROM metrics WHERE run_id = 'run2'") == [(0,)]
