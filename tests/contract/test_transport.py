"""One contract for every `Transport`: run against the fake and every real one.

An implementation joins with a `Bench` in `BENCHES`: how to open a transport and how to read back what lies in its log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from runstream.config import Settings
from runstream.remote.server import Server
from runstream.transport import Event, Positions, Transport, TransportError
from runstream.transport.directory import DirectoryTransport
from runstream.transport.http import HttpTransport
from runstream.transport.kafka import open_kafka
from runstream.transport.memory import MemoryTransport
from runstream.transport.server import ServerTransport
from runstream_ingest.log.kafka_topics import TopicSettings
from runstream_query.server.delivery import Checked
from runstream_schemas.kafka_address import KafkaAddress
from runstream_schemas.names import CONTROL, METRICS, SCHEMA_HEADER, Stream, topic
from runstream_schemas.segment import Frame, base_offset, read_frames
from tests.services.delivery_server import delivery_server
from tests.services.kafka import read_all, shared_broker

FINGERPRINT = bytes(range(8))
"""Of metric batches here; a server tells streams apart by it."""
CONTROL_FINGERPRINT = bytes(range(1, 9))
FIRST_FINGERPRINT = bytes(range(2, 10))
SECONDS = 30.0


@dataclass(frozen=True)
class Bench:
    """One implementation under test. All transports of one bench write to the same, at first empty log."""

    open: Callable[[], Transport]
    read: Callable[[], dict[tuple[Stream, int], list[Event]]]
    """Everything in the log, in order, by (stream, partition); `first_partition` is not kept."""


@contextmanager
def memory(tmp_path: Path) -> Iterator[Bench]:
    transport = MemoryTransport(partitions=3)
    yield Bench(lambda: transport, lambda: {place: list(events) for place, events in transport.log.items()})


@contextmanager
def directory(tmp_path: Path) -> Iterator[Bench]:
    log = tmp_path / "data" / "log"
    yield Bench(lambda: DirectoryTransport(log), lambda: read_directory(log))


@contextmanager
def small_directory(tmp_path: Path) -> Iterator[Bench]:
    log = tmp_path / "data" / "log"
    yield Bench(lambda: DirectoryTransport(log, segment_bytes=300), lambda: read_directory(log))


@contextmanager
def kafka(tmp_path: Path) -> Iterator[Bench]:
    address = shared_broker().prefix(TopicSettings(metrics_partitions=3, control_partitions=2))
    yield Bench(lambda: open_kafka(str(address), {}), lambda: read_kafka(address))


def lenient(frame: Frame) -> Checked:
    """The server's check of an event, for bodies that are none: what it makes of real ones is tested elsewhere."""
    stream: Stream = METRICS if frame.fingerprint == FINGERPRINT else CONTROL
    first = frame.fingerprint == FIRST_FINGERPRINT
    return Checked(Event(stream, frame.key, frame.fingerprint, frame.body, first), "metric_batch", {})


@contextmanager
def http(tmp_path: Path) -> Iterator[Bench]:
    log = tmp_path / "data" / "log"
    with delivery_server(log, lenient) as url:
        settings = Settings.from_environment({}, tracking_uri=url)
        yield Bench(lambda: HttpTransport(Server(settings)), lambda: read_directory(log))


@contextmanager
def server(tmp_path: Path) -> Iterator[Bench]:
    log = tmp_path / "data" / "log"
    with delivery_server(log, lenient) as url:
        settings = Settings.from_environment({"RUNSTREAM_DELIVERY": "server"}, tracking_uri=url)
        yield Bench(lambda: ServerTransport(settings, Server(settings)), lambda: read_directory(log))


BENCHES: dict[str, Callable[[Path], AbstractContextManager[Bench]]] = {
    "memory": memory,
    "directory": directory,
    "directory of small segments": small_directory,
    "kafka": kafka,
    "http": http,
    "server": server,
}


def read_kafka(address: KafkaAddress) -> dict[tuple[Stream, int], list[Event]]:
    """The topics as a bare consumer finds them."""
    found: dict[tuple[Stream, int], list[Event]] = {}
    for stream in (CONTROL, METRICS):
        for record in read_all(address, topic(address.prefix, stream)):
            [(name, fingerprint)] = record.headers
            assert name == SCHEMA_HEADER
            found.setdefault((stream, record.partition), []).append(
                Event(stream, record.key.decode(), fingerprint, record.value)
            )
    return found


def read_directory(log: Path) -> dict[tuple[Stream, int], list[Event]]:
    """The frames of a directory log; fails on anything else in it."""
    found: dict[tuple[Stream, int], list[Event]] = {}
    for stream in (CONTROL, METRICS):
        events: list[Event] = []
        folder = log / stream
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        at = 0
        for name in names:
            base = base_offset(name)
            if base is None:
                continue
            assert base == at, "segments leave no gap"
            data = (folder / name).read_bytes()
            for item in read_frames(data, base):
                assert isinstance(item, Frame), item
                events.append(Event(stream, item.key, item.fingerprint, item.body))
            at = base + len(data)
        found[stream, 0] = events
    return found


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.kafka] if name == "kafka" else []) for name in BENCHES])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    with BENCHES[request.param](tmp_path) as made:
        yield made


def event(number: int, key: str = "run", stream: Stream = METRICS, *, first: bool = False) -> Event:
    fingerprint = FIRST_FINGERPRINT if first else CONTROL_FINGERPRINT if stream == CONTROL else FINGERPRINT
    return Event(stream, key, fingerprint, f"body {number}".encode(), first)


def bodies(bench: Bench, stream: Stream, key: str | None = None) -> list[bytes]:
    found = [item for place, items in bench.read().items() if place[0] == stream for item in items]
    return [item.body for item in found if key is None or item.key == key]


def test_what_is_acknowledged_lies_in_the_log(bench: Bench) -> None:
    """Fingerprint, key and body come back as they were sent."""
    transport = bench.open()
    transport.send([event(1), event(2, "other", CONTROL)]).result(SECONDS)
    found = [item for items in bench.read().values() for item in items]
    assert sorted((item.stream, item.key, item.fingerprint, item.body) for item in found) == [
        (CONTROL, "other", CONTROL_FINGERPRINT, b"body 2"),
        (METRICS, "run", FINGERPRINT, b"body 1"),
    ]
    transport.close(SECONDS)


def test_order_is_kept_per_key(bench: Bench) -> None:
    """Events of one key are read in the order they were sent, over many sends that overlap."""
    transport = bench.open()
    receipts = [transport.send([event(number, key) for key in ("a", "b", "c")]) for number in range(50)]
    for receipt in receipts:
        receipt.result(SECONDS)
    for key in ("a", "b", "c"):
        assert bodies(bench, METRICS, key) == [f"body {number}".encode() for number in range(50)]
    transport.close(SECONDS)


def test_positions_grow_and_reach_the_end(bench: Bench) -> None:
    """A receipt's positions lie behind its events; the log's end is the largest of them."""
    transport = bench.open()
    reached: dict[tuple[Stream, int], int] = {}
    for number in range(10):
        positions = transport.send([event(number, f"key {number}")]).result(SECONDS)
        assert positions
        for place, offset in positions.items():
            assert offset > reached.get(place, 0)
            reached[place] = offset
    end = transport.end_positions(SECONDS)
    assert {place: offset for place, offset in end.items() if offset} == reached
    transport.close(SECONDS)


def test_a_receipt_can_be_asked_again(bench: Bench) -> None:
    """The second answer is the first."""
    transport = bench.open()
    receipt = transport.send([event(1)])
    assert receipt.result(SECONDS) == receipt.result(SECONDS)
    transport.close(SECONDS)


def test_the_end_counts_all_writers(bench: Bench) -> None:
    """One transport's end covers what another has appended."""
    one, other = bench.open(), bench.open()
    positions = other.send([event(1)]).result(SECONDS)
    end = one.end_positions(SECONDS)
    assert all(end[place] >= offset for place, offset in positions.items())
    one.close(SECONDS)
    other.close(SECONDS)


def test_an_empty_log_ends_somewhere(bench: Bench) -> None:
    """end_positions answers for a log in which nothing lies yet, and only with offsets from 0."""
    transport = bench.open()
    assert all(offset == 0 for offset in transport.end_positions(SECONDS).values())
    transport.close(SECONDS)


def test_first_partition_events_share_one_order(bench: Bench) -> None:
    """Whatever their keys, they lie in partition 0 in the order they were sent."""
    transport = bench.open()
    sent = [event(number, f"experiment {number}", CONTROL, first=True) for number in range(20)]
    for item in sent:
        transport.send([item]).result(SECONDS)
    assert [item.body for item in bench.read()[CONTROL, 0]] == [item.body for item in sent]
    transport.close(SECONDS)


def test_keys_and_bodies_may_be_anything(bench: Bench) -> None:
    """Unicode keys, empty bodies and the largest legal body arrive unchanged."""
    from runstream_schemas.limits import MAX_BODY_BYTES

    transport = bench.open()
    odd = [
        Event(METRICS, "läuft/🚀", FINGERPRINT, b""),
        Event(METRICS, "large", FINGERPRINT, b"RSF1" * (MAX_BODY_BYTES // 4)),
        Event(METRICS, "x" * 256, FINGERPRINT, bytes(range(256))),
    ]
    transport.send(odd).result(SECONDS)
    found = {item.key: item.body for items in bench.read().values() for item in items}
    assert found == {item.key: item.body for item in odd}
    transport.close(SECONDS)


def test_threads_do_not_mix_bytes(bench: Bench) -> None:
    """Several transports at once: every event arrives whole and once."""
    failures: list[BaseException] = []

    def work(writer: int) -> None:
        try:
            transport = bench.open()
            for number in range(50):
                transport.send([event(number, f"writer {writer}")]).result(SECONDS)
            transport.close(SECONDS)
        except BaseException as exc:
            failures.append(exc)

    crew = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for member in crew:
        member.start()
    for member in crew:
        member.join()
    assert not failures
    for writer in range(4):
        assert bodies(bench, METRICS, f"writer {writer}") == [f"body {number}".encode() for number in range(50)]


def test_sync_and_close_may_come_at_any_time(bench: Bench) -> None:
    """Before anything was sent, after it, and twice."""
    transport = bench.open()
    transport.sync()
    positions: Positions = transport.send([event(1)]).result(SECONDS)
    transport.sync()
    transport.close(SECONDS)
    transport.close(SECONDS)
    assert positions and bodies(bench, METRICS) == [b"body 1"]


def test_errors_say_whether_to_try_again() -> None:
    """A TransportError carries `retryable`."""
    assert TransportError("away", retryable=True).retryable
    assert not TransportError("too large", retryable=False).retryable
