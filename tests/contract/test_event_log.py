"""What every `EventLog` promises. An implementation joins with a `LogHarness` in the `harness` fixture's parameters."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import pytest

from runstream_ingest.log import EventLog, LogError, LogRecord, Unreadable
from runstream_ingest.log.directory import DirectoryLog
from runstream_ingest.log.kafka import KafkaLog
from runstream_ingest.log.memory import MemoryLog
from runstream_schemas.names import SCHEMA_HEADER, STREAMS, Stream, consumer_group, topic
from runstream_schemas.segment import base_offset, encode_frame, segment_name
from tests.services.kafka import flip_last_byte, local_broker

MARK = b"\x01\x02\x03\x04\x05\x06\x07\x08"


class LogHarness(Protocol):
    """One log, and the other side of it."""

    def append(self, stream: Stream, body: bytes, *, key: str = "", fingerprint: bytes = MARK) -> None:
        """Append one record to partition 0; readable once this returns."""
        ...

    def damage(self, stream: Stream) -> None:
        """Put something unreadable at the end of partition 0; records appended later are sound."""
        ...

    def open(self) -> EventLog:
        """Another reader of the same log; earlier ones have been closed."""
        ...

    def close(self) -> None: ...


class MemoryHarness:
    """Readers share one fake, as group members share a broker."""

    def __init__(self) -> None:
        self._log = MemoryLog([(stream, 0) for stream in STREAMS])

    def append(self, stream: Stream, body: bytes, *, key: str = "", fingerprint: bytes = MARK) -> None:
        self._log.append(stream, fingerprint, body, key=key.encode())

    def damage(self, stream: Stream) -> None:
        self._log.damage(stream, 1, "damaged by a test")

    def open(self) -> EventLog:
        self._log.assign(*[(stream, 0) for stream in STREAMS])
        return self._log

    def close(self) -> None:
        self._log.close()


class DirectoryHarness:
    """Appends as the client's transport does: whole frames under the stream's lock."""

    def __init__(self, root: Path, segment_bytes: int = 1_000) -> None:
        self.root = root
        self._segment_bytes = segment_bytes

    def append(self, stream: Stream, body: bytes, *, key: str = "", fingerprint: bytes = MARK) -> None:
        self.write(stream, encode_frame(time.time_ns() // 1_000_000, fingerprint, key, body))

    def damage(self, stream: Stream) -> None:
        frame = bytearray(encode_frame(1, MARK, "k", b"body"))
        frame[-1] ^= 0x40
        self.write(stream, bytes(frame))

    def write(self, stream: Stream, data: bytes) -> None:
        folder = self.root / stream
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            segments = sorted(path for path in folder.iterdir() if base_offset(path.name) is not None)
            path = segments[-1] if segments else folder / segment_name(0)
            size = path.stat().st_size if path.exists() else 0
            if size >= self._segment_bytes:
                path = folder / segment_name((base_offset(path.name) or 0) + size)
            with open(path, "ab", buffering=0) as file:
                file.write(data)

    def open(self) -> EventLog:
        return DirectoryLog(self.root)

    def close(self) -> None:
        """Nothing is held open."""


class KafkaHarness:
    """Topics of their own on the session's broker; damage is done to the broker's file."""

    def __init__(self) -> None:
        from kafka import KafkaProducer

        broker = local_broker()
        assert broker.cluster is not None
        self._cluster = broker.cluster
        self.address = broker.prefix()
        self._producer = KafkaProducer(bootstrap_servers=list(self.address.brokers), metrics_enabled=False)

    def append(self, stream: Stream, body: bytes, *, key: str = "", fingerprint: bytes = MARK) -> None:
        self._producer.send(
            topic(self.address.prefix, stream),
            key=key.encode(),
            value=body,
            headers=[(SCHEMA_HEADER, fingerprint)],
        ).get(30)

    def damage(self, stream: Stream) -> None:
        self.append(stream, b"soon damaged")
        flip_last_byte(self._cluster, topic(self.address.prefix, stream))

    def open(self) -> EventLog:
        return KafkaLog(self.address, consumer_group(self.address.prefix, "tests"))

    def close(self) -> None:
        self._producer.close(10)


HARNESSES: dict[str, Callable[[Path], LogHarness]] = {
    "memory": lambda _: MemoryHarness(),
    "directory": lambda folder: DirectoryHarness(folder / "log"),
    "kafka": lambda _: KafkaHarness(),
}


@pytest.fixture(params=["memory", "directory", pytest.param("kafka", marks=pytest.mark.kafka)])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LogHarness]:
    """One fresh log of each kind."""
    made = HARNESSES[request.param](tmp_path)
    yield made
    made.close()


Opener = Callable[..., EventLog]


@pytest.fixture
def reader(harness: LogHarness) -> Iterator[Opener]:
    """Opens readers, started at given positions, and closes them."""
    opened: list[EventLog] = []

    def open_one(positions: dict[tuple[Stream, int], int] | None = None) -> EventLog:
        for log in opened:
            log.close()
        log = harness.open()
        opened.append(log)
        deadline = time.monotonic() + 30
        while not log.assigned():
            log.poll(0.1)
            assert time.monotonic() < deadline, "no partition was assigned"
        log.start(positions or {})
        return log

    yield open_one
    for log in opened:
        log.close()


def take(log: EventLog, count: int, seconds: float = 20.0) -> list[LogRecord | Unreadable]:
    """Poll until `count` items came."""
    found: list[LogRecord | Unreadable] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        found += log.poll(0.2)
        assert time.monotonic() < deadline, f"{len(found)} of {count} items came"
    return found


def bodies(items: list[LogRecord | Unreadable]) -> list[bytes | None]:
    return [item.body for item in items if isinstance(item, LogRecord)]


def test_nothing_is_polled_before_start(harness: LogHarness) -> None:
    """Partitions wait for the store's positions."""
    harness.append("metrics", b"one")
    log = harness.open()
    try:
        deadline = time.monotonic() + 30
        while ("metrics", 0) not in log.assigned():
            assert not log.poll(0.05)
            assert time.monotonic() < deadline, "no partition was assigned"
        assert not log.poll(0.05)
        log.start({})
        assert log.assigned() == frozenset()
        assert bodies(take(log, 1)) == [b"one"]
    finally:
        log.close()


def test_records_come_whole_and_in_order(harness: LogHarness, reader: Opener) -> None:
    """Bodies, keys, fingerprints and times, in the order of appending, with offsets that join up."""
    before = time.time_ns() // 1_000_000
    for number in range(200):
        harness.append("metrics", b"%d" % number * (number + 1), key=f"key{number}")
    records = [item for item in take(reader(), 200) if isinstance(item, LogRecord)]
    assert [record.body for record in records] == [b"%d" % n * (n + 1) for n in range(200)]
    assert [record.key for record in records] == [b"key%d" % n for n in range(200)]
    assert {record.fingerprint for record in records} == {MARK}
    assert all(before - 1_000 <= record.time_ms <= time.time_ns() // 1_000_000 + 1_000 for record in records)
    for record, following in pairwise(records):
        assert record.next_offset == following.offset > record.offset


def test_streams_are_apart(harness: LogHarness, reader: Opener) -> None:
    """Each record says its stream, and each stream has its own offsets."""
    harness.append("control", b"c")
    harness.append("metrics", b"m")
    items = take(reader(), 2)
    assert {(item.stream, item.body) for item in items if isinstance(item, LogRecord)} == {
        ("control", b"c"),
        ("metrics", b"m"),
    }


def test_an_empty_poll_returns_after_its_time(reader: Opener) -> None:
    """Not at once (that would spin), and not much later."""
    log = reader()
    began = time.monotonic()
    assert log.poll(0.2) == []
    assert 0.1 < time.monotonic() - began < 5


def test_new_records_are_seen_while_tailing(harness: LogHarness, reader: Opener) -> None:
    """Records appended after the reader caught up come with the next polls."""
    log = reader()
    for number in range(30):
        harness.append("metrics", b"%d" % number)
        assert bodies(take(log, 1)) == [b"%d" % number]


def test_reading_begins_at_the_stores_positions(harness: LogHarness, reader: Opener) -> None:
    """What the store holds is not read again; a partition that it does not know is read from the beginning."""
    for number in range(10):
        harness.append("metrics", b"%d" % number)
        harness.append("control", b"c%d" % number)
    log = reader()
    first = take(log, 20)
    middle = next(item for item in first if isinstance(item, LogRecord) and item.body == b"4")
    log.commit({("metrics", 0): middle.next_offset, ("control", 0): first[-1].next_offset})
    again = take(reader({("metrics", 0): middle.next_offset}), 15)
    assert [body for body in bodies(again) if not (body or b"").startswith(b"c")] == [b"5", b"6", b"7", b"8", b"9"]
    assert [body for body in bodies(again) if (body or b"").startswith(b"c")] == [b"c%d" % n for n in range(10)]


def test_a_position_at_the_end_reads_only_what_is_new(harness: LogHarness, reader: Opener) -> None:
    """The usual restart: all was stored."""
    harness.append("metrics", b"old")
    log = reader()
    [old] = take(log, 1)
    log.commit({("metrics", 0): old.next_offset})
    log = reader({("metrics", 0): old.next_offset})
    assert log.poll(0.05) == []
    harness.append("metrics", b"new")
    assert bodies(take(log, 1)) == [b"new"]


def test_damage_is_reported_and_stepped_over(harness: LogHarness, reader: Opener) -> None:
    """What cannot be read is a range between its neighbours, never a silent gap."""
    harness.append("metrics", b"before")
    harness.damage("metrics")
    harness.append("metrics", b"behind")
    before, damage, behind = take(reader(), 3)
    assert isinstance(damage, Unreadable)
    assert damage.reason
    assert (before.next_offset, damage.next_offset) == (damage.offset, behind.offset)
    assert bodies([before, behind]) == [b"before", b"behind"]


def test_end_positions_are_what_a_reader_of_everything_reaches(harness: LogHarness, reader: Opener) -> None:
    """Lag is their difference to the positions, and 0 when all is read."""
    for number in range(5):
        harness.append("metrics", b"%d" % number)
    log = reader()
    items = take(log, 5)
    assert log.end_positions()["metrics", 0] == items[-1].next_offset
    assert log.end_positions()["control", 0] == 0


def test_a_paused_log_gives_nothing_and_loses_nothing(harness: LogHarness, reader: Opener) -> None:
    """Pausing is for back pressure."""
    log = reader()
    log.pause()
    harness.append("metrics", b"one")
    assert log.poll(0.05) == []
    log.resume()
    assert bodies(take(log, 1)) == [b"one"]


def test_nothing_is_lost_without_a_rebalance(harness: LogHarness, reader: Opener) -> None:
    """`lost` is empty for a reader that keeps its partitions."""
    log = reader()
    harness.append("metrics", b"one")
    take(log, 1)
    assert log.lost() == frozenset()


def test_close_may_be_called_twice(reader: Opener) -> None:
    """The second call does nothing."""
    log = reader()
    log.close()
    log.close()


def test_a_revoked_partition_is_lost_and_comes_back_at_its_commit() -> None:
    """The fake plays rebalances as a broker does (the real one is tested with Kafka)."""
    log = MemoryLog([("metrics", 0), ("metrics", 1)])
    for number in range(4):
        log.append("metrics", MARK, b"%d" % number, partition=number % 2)
    log.start({})
    items = take(log, 4)
    assert len(items) == 4
    log.revoke(("metrics", 1))
    assert log.lost() == {("metrics", 1)}
    assert log.lost() == frozenset()
    log.commit({("metrics", 0): 2, ("metrics", 1): 2})
    assert log.committed == {("metrics", 0): 2}
    log.assign(("metrics", 1))
    assert log.assigned() == {("metrics", 1)}
    log.start({("metrics", 1): 1})
    assert bodies(take(log, 1)) == [b"3"]


def test_the_fake_refuses_positions_behind_its_end() -> None:
    """As a broker whose topic was recreated would."""
    log = MemoryLog([("metrics", 0)])
    with pytest.raises(LogError, match="read up to 5 but ends at 0"):
        log.start({("metrics", 0): 5})
