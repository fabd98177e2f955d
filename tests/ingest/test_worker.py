"""The worker end to end: exact under batching, faults, rebalances, restarts and kills."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runstream_ingest.batch import BatchLimits
from runstream_ingest.commit import DeadLetterLimits, Retry, read_positions
from runstream_ingest.dead_letter import DirectoryDeadLetters
from runstream_ingest.errors import StoreBusy, SystemicFailure
from runstream_ingest.log import LogError, LogRecord
from runstream_ingest.log.directory import DirectoryLog, end_positions
from runstream_ingest.log.memory import MemoryLog
from runstream_ingest.migration import migrate
from runstream_ingest.store import Store
from runstream_ingest.worker import Worker, WorkerSettings
from runstream_schemas import codec
from runstream_schemas.names import STREAM_OF
from tests.contract.test_event_log import DirectoryHarness
from tests.services.chdb_process import ChdbProcess
from tests.services.events import METRICS, NOW, body, created, points, started, until

FAST = WorkerSettings(min_gap_seconds=0.001, flush_interval_seconds=0.02, retry=Retry(0.01, 0.05))


@contextmanager
def running(worker: Worker) -> Iterator[Callable[[], None]]:
    """Run `worker` in a thread; the value stops it. What it raises is raised here."""
    stop = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            worker.run(stop)
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run)
    thread.start()

    def finish() -> None:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()

    try:
        yield finish
    finally:
        finish()
    if failure:
        raise failure[0]


def append(log: MemoryLog, event: tuple[Any, dict[str, Any]], partition: int = 0) -> int:
    name = event[0]
    return log.append(
        STREAM_OF[name], codec.current(name).fingerprint, body(event), time_ms=NOW + 10, partition=partition
    )


def memory() -> MemoryLog:
    return MemoryLog([("control", 0), ("metrics", 0), ("metrics", 1)])


def caught_up(log: MemoryLog) -> bool:
    ends = log.end_positions()
    return bool(ends) and all(log.committed.get(place, 0) >= end for place, end in ends.items())


class Wrapped:
    """A store that a test can break."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.database = store.database
        self.before: Callable[[str, str], None] = lambda method, what: None
        self.after: Callable[[str, str], None] = lambda method, what: None

    def insert(self, table: str, columns: Sequence[str], chunks: Sequence[bytes]) -> None:
        self.before("insert", table)
        self._store.insert(table, columns, chunks)
        self.after("insert", table)

    def execute(self, sql: str, parameters: Mapping[str, Any] | None = None) -> None:
        self.before("execute", sql)
        self._store.execute(sql, parameters)
        self.after("execute", sql)

    def rows(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        self.before("rows", sql)
        return self._store.rows(sql, parameters)

    def close(self) -> None:
        self._store.close()


@pytest.fixture
def dead(tmp_path: Path) -> DirectoryDeadLetters:
    return DirectoryDeadLetters(tmp_path / "log")


def test_everything_arrives_exactly_once(store: Store, dead: DirectoryDeadLetters) -> None:
    """Points, params and state of several partitions, in many small batches."""
    log = memory()
    append(log, created())
    append(log, started("a"))
    for number in range(300):
        append(log, points("a", [float(number)], first_step=number, first_seq=number), partition=number % 2)
    settings = WorkerSettings(BatchLimits(max_batch_records=7), 0.001, 0.02)
    worker = Worker(log, store, dead, settings)
    with running(worker):
        until(lambda: caught_up(log))
    assert store.rows("SELECT count(), sum(value), max(step) FROM metrics") == [(300, float(sum(range(300))), 299)]
    assert store.rows("SELECT run_id, experiment_name, name FROM runs") == [("a", "vision", "name-a")]
    assert store.rows("SELECT step, value FROM latest_metrics") == [(299, 299.0)]
    assert read_positions(store) == {("metrics", 0): 150, ("metrics", 1): 150, ("control", 0): 2}
    assert list(dead.letters()) == []
    assert worker.metrics.values["runstream_ingest_records_total"] == 302
    assert worker.trouble() is None


def test_stop_drains_what_was_polled(store: Store, dead: DirectoryDeadLetters) -> None:
    """A polite end inserts and commits the open batch instead of reading it again."""
    log = memory()
    settings = WorkerSettings(min_gap_seconds=30, flush_interval_seconds=60)
    worker = Worker(log, store, dead, settings)
    with running(worker) as finish:
        append(log, points("a", [1.0]))
        until(lambda: log.committed.get(("metrics", 0)) == 1)
        append(log, points("a", [2.0], first_step=1, first_seq=2))  # waits for the gap of 30 seconds
        until(lambda: bool(worker._open), what="the second record in the open batch")
        began = time.monotonic()
        finish()
        assert time.monotonic() - began < 15
    assert store.rows("SELECT count() FROM metrics") == [(2,)]
    assert log.committed["metrics", 0] == 2


def test_a_store_that_is_away_is_waited_for(store: Store, dead: DirectoryDeadLetters) -> None:
    """Transient errors repeat the same batch until it goes; nothing is lost, doubled or dead-lettered."""
    log = memory()
    broken = Wrapped(store)
    failures = iter([StoreBusy("connection refused"), StoreBusy("too many parts", code=252)] * 5)

    def fail(method: str, what: str) -> None:
        if method in ("insert", "execute") or "ingest_positions" in what:
            error = next(failures, None)
            if error is not None:
                raise error

    broken.before = fail
    worker = Worker(log, broken, dead, FAST)
    for number in range(20):
        append(log, points("a", [1.0], first_step=number, first_seq=number))
    with running(worker):
        until(lambda: log.committed.get(("metrics", 0)) == 20)
    assert next(failures, None) is None
    assert store.rows("SELECT count() FROM metrics") == [(20,)]
    assert list(dead.letters()) == []
    assert worker.metrics.values["runstream_ingest_retries_total"] >= 8


def test_trouble_says_that_the_store_is_away_and_stop_does_not_wait_for_it(
    store: Store, dead: DirectoryDeadLetters
) -> None:
    """A worker that cannot insert ends when told to, with nothing committed."""
    log = memory()
    broken = Wrapped(store)

    def refuse(method: str, what: str) -> None:
        if method == "insert":
            raise StoreBusy("connection refused")

    broken.before = refuse
    worker = Worker(log, broken, dead, WorkerSettings(retry=Retry(10, 60)))
    append(log, points("a", [1.0]))
    began = time.monotonic()
    with running(worker) as finish:
        until(lambda: worker.trouble() is not None)
        assert "away" in (worker.trouble() or "")
        finish()
    assert time.monotonic() - began < 8
    assert log.committed == {}


def run_to_its_end(worker: Worker, seconds: float = 20.0) -> None:
    """Run `worker` here until it raises; ends it after a while so that a test that waits in vain fails."""
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    try:
        worker.run(stop)
    finally:
        timer.cancel()


class Killed(BaseException):
    """What a test throws where a process would be killed."""


def kill_after(moment: str) -> Callable[[str, str], None]:
    def kill(method: str, what: str) -> None:
        if moment == "rows" and method == "insert" and "metric_batch" in what:
            raise Killed
        if moment == "positions" and "INTO ingest_positions" in what:
            raise Killed

    return kill


def test_a_crash_between_insert_and_commit_repeats_harmlessly(store: Store, dead: DirectoryDeadLetters) -> None:
    """Killed after the rows but before the positions, and after the positions but before the log's commit."""
    log = memory()
    append(log, created())
    append(log, started("a"))
    for number in range(50):
        append(log, points("a", [float(number)], first_step=number, first_seq=number))
    for moment in ("rows", "positions"):
        broken = Wrapped(store)
        broken.after = kill_after(moment)
        with pytest.raises(Killed):
            run_to_its_end(Worker(log, broken, dead, FAST))
        assert log.committed == {}
        log.assign(("control", 0), ("metrics", 0), ("metrics", 1))
    append(log, started("a", seq=2))
    with running(Worker(log, store, dead, FAST)):
        until(lambda: log.committed.get(("control", 0)) == 3)
    assert read_positions(store) == {("control", 0): 3, ("metrics", 0): 50}
    assert store.rows("SELECT count(), sum(value) FROM metrics") == [(50, float(sum(range(50))))]
    assert store.rows("SELECT min, max, value FROM latest_metrics") == [(0.0, 49.0, 49.0)]


def test_a_lost_partition_is_not_committed_and_its_next_owner_reads_it(
    store: Store, dead: DirectoryDeadLetters
) -> None:
    """A rebalance in the middle of an insert: rows may land twice, positions stay true, nothing is missing."""
    log = memory()
    broken = Wrapped(store)
    inserting, go_on = threading.Event(), threading.Event()

    def hold(method: str, what: str) -> None:
        if method == "insert" and "metric_batch" in what and not go_on.is_set():
            inserting.set()
            assert go_on.wait(20)

    broken.before = hold
    for number in range(10):
        append(log, points("a", [float(number)], first_step=number, first_seq=number), partition=number % 2)
    with running(Worker(log, broken, dead, FAST)):
        assert inserting.wait(20)
        for number in range(10, 20):
            append(log, points("a", [float(number)], first_step=number, first_seq=number), partition=number % 2)
        log.revoke(("metrics", 1))
        time.sleep(0.3)  # the worker notices while its insert hangs; without it the test only proves less
        go_on.set()
        until(lambda: log.committed.get(("metrics", 0)) == 10)
        assert ("metrics", 1) not in log.committed
        log.assign(("metrics", 1))
        until(lambda: log.committed.get(("metrics", 1)) == 10)
    assert store.rows("SELECT count(), sum(value) FROM metrics") == [(20, float(sum(range(20))))]


def test_reading_starts_at_the_smaller_of_store_and_log(store: Store, dead: DirectoryDeadLetters) -> None:
    """A log commit beyond the store's position must not skip records, nor the other way round."""
    log = memory()
    for number in range(10):
        append(log, points("a", [float(number)], first_step=number, first_seq=number))
    log.committed["metrics", 0] = 8
    with running(Worker(log, store, dead, FAST)):
        until(lambda: caught_up(log))
    assert store.rows("SELECT count() FROM metrics") == [(10,)]


def test_memory_stays_bounded_when_the_store_is_slow(store: Store, dead: DirectoryDeadLetters) -> None:
    """With the batch full and an insert under way the log is paused, and goes on afterwards."""
    log = MemoryLog([("control", 0), ("metrics", 0), ("metrics", 1)], max_poll_records=5)
    broken = Wrapped(store)
    go_on = threading.Event()

    def hold(method: str, what: str) -> None:
        if method == "insert":
            assert go_on.wait(20)

    broken.before = hold
    for number in range(200):
        append(log, points("a", [1.0], first_step=number, first_seq=number))
    worker = Worker(log, broken, dead, WorkerSettings(BatchLimits(max_batch_records=20), 0.001, 0.02))
    with running(worker):
        until(lambda: worker._paused, what="the pause")
        assert len(worker._open.records) <= 25
        go_on.set()
        until(lambda: caught_up(log))
    assert store.rows("SELECT count() FROM metrics") == [(200,)]


@pytest.mark.parametrize(
    "statement", ["DROP TABLE landing_metric_batch", "DROP TABLE points", "DROP TABLE ingest_positions"]
)
def test_a_systemic_failure_stops_loudly(store: Store, dead: DirectoryDeadLetters, statement: str) -> None:
    """A database that lacks a table is no body's fault: nothing is dead-lettered or committed."""
    log = memory()
    with running(Worker(log, store, dead, FAST)):
        append(log, points("a", [1.0]))
        until(lambda: caught_up(log))
    store.execute(statement)
    log.assign(("control", 0), ("metrics", 0), ("metrics", 1))
    append(log, points("a", [2.0]))
    before = dict(log.committed)
    with pytest.raises((SystemicFailure, RuntimeError)):
        run_to_its_end(Worker(log, store, dead, FAST))
    assert log.committed == before
    assert list(dead.letters()) == []


def test_too_many_refusals_stop_the_worker(store: Store, dead: DirectoryDeadLetters) -> None:
    """Another program that floods the topic must not drain into the dead letters without end."""
    log = MemoryLog([("control", 0), ("metrics", 0)], max_poll_records=50)
    for _ in range(500):
        log.append("metrics", None, b"not ours")
    settings = WorkerSettings(
        BatchLimits(max_batch_records=50), 0.001, 0.01, dead_letters=DeadLetterLimits(max_consecutive=200)
    )
    with pytest.raises(SystemicFailure, match="no schema header"):
        run_to_its_end(Worker(log, store, dead, settings))
    assert 100 <= len(list(dead.letters())) <= 250


def test_many_poison_records_take_a_probe_each(store: Store, dead: DirectoryDeadLetters) -> None:
    """Not a bisection each: 40 among 400 would take some 300 probes."""
    log = memory()
    for offset in range(400):
        _, fields = points(f"run{offset}", [1.0], first_seq=offset)
        data = codec.encode("metric_batch", fields)
        log.append("metrics", METRICS, data[:-3] if offset % 10 == 5 else data, time_ms=NOW)
    probes: list[str] = []
    watched = Wrapped(store)
    watched.before = lambda method, what: probes.append(what) if what.startswith("probe_") else None
    settings = WorkerSettings(BatchLimits(), 0.2, 0.2, dead_letters=DeadLetterLimits(max_ratio=1.0))
    with running(Worker(log, watched, dead, settings)):
        until(lambda: log.committed.get(("metrics", 0)) == 400, seconds=60)
    assert sorted(letter.source.offset for letter in dead.letters()) == list(range(5, 400, 10))
    assert store.rows("SELECT count() FROM points FINAL") == [(360,)]
    assert len(probes) <= 40 + 2 * 3, len(probes)  # a canary and the sound ones, in at most three batches


def mutate(rng: random.Random, data: bytes) -> bytes | None:
    """Damage of the kinds that happen: cut, flipped, grown, emptied, gone, nonsense."""
    kind = rng.randrange(8)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind in (1, 2, 3):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 4:
        return data + rng.randbytes(rng.randrange(1, 40))
    if kind == 5:
        return rng.choice([b"", None])
    if kind == 6:
        return rng.randbytes(rng.randrange(1, 300))
    return data[:10] + rng.randbytes(5) + data[10:]


def nonsense(rng: random.Random, run_id: str) -> bytes:
    """Valid Avro that makes no sense."""
    _, good = points(run_id, [1.0, 2.0, 3.0])
    wrong: dict[str, Any] = rng.choice(
        [
            {"ki": [0, 0, 7]},
            {"ki": [0, 0, -1]},
            {"ci": [0, 1, 3]},
            {"values": [1.0]},
            {"steps": [1]},
            {"times": [-1, 0, 0]},
            {"times": [1 << 60, 0, 0]},
            {"keys": [""]},
            {"keys": ["k" * 1_001]},
            {"keys": ["k" * 900_000]},
            {"run_id": ""},
            {"run_id": "r" * 300},
            {"seqs": [1, 2]},
        ]
    )
    return codec.encode("metric_batch", {**good, **wrong})


@pytest.mark.parametrize("seed", range(4))
def test_fuzz_stored_or_dead_never_both_never_neither(store: Store, dead: DirectoryDeadLetters, seed: int) -> None:
    """Every record is accounted for by its offset, and sound neighbours are untouched."""
    rng = random.Random(seed)
    log = memory()
    sound: dict[int, float] = {}
    count = 400
    for offset in range(count):
        run_id = f"run{offset:04d}"
        _, fields = points(run_id, [float(offset)] * 5, first_seq=offset)
        data = codec.encode("metric_batch", fields)
        choice = rng.random()
        if choice < 0.15:
            log.append("metrics", METRICS, mutate(rng, data), time_ms=NOW)
        elif choice < 0.2:
            log.append("metrics", METRICS, nonsense(rng, run_id), time_ms=NOW)
        elif choice < 0.22:
            log.append("metrics", rng.choice([None, b"", b"12345678", METRICS[:7]]), data, time_ms=NOW)
        else:
            log.append("metrics", METRICS, data, time_ms=NOW)
            sound[offset] = float(offset)
    settings = WorkerSettings(BatchLimits(max_batch_records=97), 0.001, 0.02)
    with running(Worker(log, store, dead, settings)):
        until(lambda: log.committed.get(("metrics", 0)) == count, seconds=60)
    letters = {letter.source.offset: letter for letter in dead.letters()}
    stored = {offset for (offset,) in store.rows("SELECT DISTINCT log_offset FROM points")}
    # A mutated body may be a sound body that says something else, or one with no values at all.
    empty = {
        offset for offset in range(count) if offset not in stored and offset not in letters and offset not in sound
    }
    for offset in empty:
        _, fields = codec.decode(METRICS, _body(log, offset))
        assert fields["values"] == []
    assert not stored & letters.keys()
    assert stored | letters.keys() | empty == set(range(count))
    assert sound.keys() <= stored
    exact = store.rows("SELECT log_offset, count(), min(value), max(value) FROM points FINAL GROUP BY log_offset")
    for offset, rows, low, high in exact:
        if offset in sound:
            assert (rows, low, high) == (5, sound[offset], sound[offset])
    assert all(letter.reason for letter in letters.values())
    for offset, letter in letters.items():
        assert letter.body == _body(log, offset)


def _body(log: MemoryLog, offset: int) -> Any:
    item = log._items["metrics", 0][offset]
    assert isinstance(item, LogRecord)
    return item.body


def test_kill_of_the_store_in_the_middle_of_inserts_is_exact(tmp_path: Path, dead: DirectoryDeadLetters) -> None:
    """The engine's process is killed again and again while a worker feeds it: every point once, every rollup right."""
    rng = random.Random(5)
    harness = DirectoryHarness(tmp_path / "log", segment_bytes=20_000)
    total = 0
    for _ in range(4):
        process = ChdbProcess(tmp_path / "db")
        store = process.store("runstream")
        migrate(store)
        log = DirectoryLog(tmp_path / "log", boot_id="x")
        worker = Worker(log, store, dead, FAST)
        with running(worker):
            killer = threading.Timer(rng.uniform(0.05, 0.6), process.kill)
            killer.start()
            while killer.is_alive():
                event = points("a", [float(total)] * 3, first_step=total, first_seq=total)
                harness.append("metrics", body(event), fingerprint=METRICS)
                total += 3
            killer.join()
        log.close()
        store.close()
        process.close()
    process = ChdbProcess(tmp_path / "db")
    store = process.store("runstream")
    log = DirectoryLog(tmp_path / "log", boot_id="x")
    ends = end_positions(tmp_path / "log")
    with running(Worker(log, store, dead, FAST)):
        until(lambda: read_positions(store).get(("metrics", 0), 0) >= ends["metrics", 0], seconds=60)
    assert total > 20
    assert store.rows("SELECT count(), uniqExact(step), min(step), max(step) FROM metrics") == [
        (total, total, 0, total - 1)
    ]
    assert store.rows("SELECT step, min, max FROM latest_metrics") == [(total - 1, 0.0, float(total - 3))]
    assert list(dead.letters()) == []
    log.close()
    store.close()
    process.close()


def control_events(number: int) -> list[tuple[Any, dict[str, Any]]]:
    """One sound event of every kind on the control stream, about things of their own."""
    run_id, stamp = f"run{number}", {"time_ms": NOW, "seq": number, "writer": 7}
    return [
        created(str(1_000 + number), f"experiment {number}", seq=number),
        started(run_id, str(1_000 + number), seq=number),
        ("run_updated", {"run_id": run_id, "status": "FINISHED", "ended_at": NOW + 1, **stamp}),
        ("params", {"run_id": run_id, "keys": ["lr", "n"], "values": ["0.1", "2"], **stamp}),
        ("run_tags", {"run_id": run_id, "keys": ["t"], "values": ["v"], "deleted_keys": ["gone"], **stamp}),
        ("experiment_tags", {"experiment_id": str(1_000 + number), "keys": ["t"], "values": ["v"], **stamp}),
        ("experiment_updated", {"experiment_id": str(1_000 + number), "name": f"renamed {number}", **stamp}),
        ("artifact_logged", {"run_id": run_id, "path": "a/b", "size_bytes": 5, **stamp}),
        ("input_logged", {"run_id": run_id, "name": "d", "digest": "x", "source_type": "", "source": "", **stamp}),
        ("purged", {"kind": "run", "id": f"other{number}", **stamp}),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_fuzz_of_control_events_harms_no_sound_one(store: Store, dead: DirectoryDeadLetters, seed: int) -> None:
    """Damaged bodies of every kind between sound ones: the worker goes on, sound facts are exact, refusals are kept."""
    rng = random.Random(seed)
    log = memory()
    rounds = 12
    for number in range(rounds):
        for name, fields in control_events(number):
            append(log, (name, fields))
            if rng.random() < 0.6:
                # About things of their own, so that a body that survives its damage changes no sound fact.
                other = {
                    key: "zz" if key in ("run_id", "experiment_id", "id") else value for key, value in fields.items()
                }
                data = mutate(rng, codec.encode(name, other))
                log.append("control", codec.current(name).fingerprint, data, time_ms=NOW + 10)
    end = log._end(("control", 0))
    with running(Worker(log, store, dead, WorkerSettings(BatchLimits(max_batch_records=41), 0.001, 0.02))):
        until(lambda: log.committed.get(("control", 0)) == end, seconds=60)
    runs = f"run_id IN ({', '.join(repr(f'run{number}') for number in range(rounds))})"
    assert store.rows(f"SELECT count(), uniqExact(run_id), min(status), max(status) FROM runs WHERE {runs}") == [
        (rounds, rounds, "FINISHED", "FINISHED")
    ]
    assert store.rows(
        f"SELECT key, count(), any(value), max(conflict) FROM params WHERE {runs} GROUP BY key ORDER BY key"
    ) == [
        ("lr", rounds, "0.1", 0),
        ("n", rounds, "2", 0),
    ]
    assert store.rows(f"SELECT count(), any(value) FROM tags WHERE {runs}") == [(rounds, "v")]
    assert store.rows(f"SELECT count(), any(size_bytes) FROM artifacts WHERE {runs}") == [(rounds, 5)]
    assert store.rows(f"SELECT count(), any(digest) FROM inputs WHERE {runs}") == [(rounds, "x")]
    experiments = store.rows(
        "SELECT experiment_id, name, tags['t'] FROM experiments WHERE length(experiment_id) = 4 ORDER BY experiment_id"
    )
    assert set(experiments) >= {(str(1_000 + n), f"renamed {n}", "v") for n in range(rounds)}
    rejected = {offset for (offset,) in store.rows("SELECT log_offset FROM rejects")}
    letters = {letter.source.offset for letter in dead.letters()}
    assert rejected <= letters
    assert letters


def test_a_log_made_anew_is_refused_by_its_identity(store: Store, dead: DirectoryDeadLetters) -> None:
    """Longer than what was stored, without any commit, under the same name: nothing of it is taken for the old one."""
    first = memory()
    first.identity = {"metrics": "old", "control": "same"}
    append(first, points("a", [1.0]))
    with running(Worker(first, store, dead, FAST)):
        until(lambda: caught_up(first))
    second = memory()
    second.identity = {"metrics": "new", "control": "same"}
    for number in range(5):
        append(second, points("b", [2.0], first_step=number, first_seq=number))
    with pytest.raises(LogError, match=r"metrics was deleted and made anew.*runstream rebuild"):
        run_to_its_end(Worker(second, store, dead, FAST))
    assert store.rows("SELECT run_id FROM points") == [("a",)]
    second.identity = {"metrics": "old"}  # the same log, whose commits were forgotten
    with running(Worker(second, store, dead, FAST)):
        until(lambda: caught_up(second))
    assert store.rows("SELECT count() FROM points WHERE run_id = 'b'") == [(4,)]


def test_a_store_that_holds_nothing_takes_any_log(store: Store, dead: DirectoryDeadLetters) -> None:
    """Remembered, but without a position: a new topic may take the place of an empty one."""
    for name in ("one", "other"):
        log = memory()
        log.identity = {"metrics": name}
        if name == "other":
            append(log, points("a", [1.0]))
        with running(Worker(log, store, dead, FAST)):
            until(lambda log=log, name=name: caught_up(log) and store.rows(
                "SELECT value FROM settings FINAL WHERE name = 'log_identity.metrics'") == [(name,)])  # fmt: skip
    assert store.rows("SELECT count() FROM points") == [(1,)]
