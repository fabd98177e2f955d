"""Messages that can never be stored, on a real broker: each one in the dead letters, and no neighbour touched."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runstream_schemas import codec
from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import SCHEMA_HEADER, topic
from tests.e2e.accounting import account
from tests.e2e.kafka_line import Line
from tests.ingest.test_worker import mutate, nonsense
from tests.services.events import METRICS, body, created, points, started
from tests.services.kafka import admin, collect_refused_sockets, local_broker, producer
from tests.services.kafka_files import batches

__all__ = ["collect_refused_sockets"]

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.usefixtures("collect_refused_sockets"),
    pytest.mark.chdb,
    pytest.mark.timeout(240),
    # kafka-python leaves sockets of refused connections to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

Message = tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]
"""Key, body, headers."""
MARKED = [(SCHEMA_HEADER, METRICS)]


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """A store and topics of its own on a local broker; workers are the test's."""
    with Line(local_broker().bootstrap, tmp_path, f"poison{time.time_ns()}", metrics_partitions=1) as made:
        yield made


def one_point(number: int) -> bytes:
    return body(points(f"run{number % 5}", [number + 0.5], first_step=number, first_seq=number))


def send_as_one_batch(line: Line, messages: list[Message], compression: str | None = None) -> None:
    """All of them in one record batch, which the broker's own file proves."""
    name = topic(line.address.prefix, "metrics")
    cluster = local_broker().cluster
    assert cluster is not None
    before = len(batches(cluster, name))
    options = {"linger_ms": 5_000, "batch_size": 1 << 20, "compression_type": compression}
    with producer(line.address, **options) as sender:
        sender.partitions_for(name)
        for key, value, headers in messages:
            sender.send(name, key=key, value=value, headers=headers, partition=0)
    new = batches(cluster, name)[before:]
    assert [(batch.records, batch.codec) for batch in new] == [(len(messages), compression)]


def test_poison_among_sound_records_of_one_batch(line: Line) -> None:
    """500 bodies of one point in one record batch, nine of them poison: 491 stored, nine letters; in every codec."""
    poison = [0, 17, 18, 100, 101, 102, 103, 250, 499]
    codecs = [None, "lz4", "gzip", "zstd"]
    for turn, compression in enumerate(codecs):
        send_as_one_batch(line, mixed_batch(500 * turn), compression)
    line.start_worker()
    line.wait_stored()
    result = account(line)
    assert sorted(offset for _, offset in result.dead) == [500 * turn + at for turn in range(4) for at in poison]
    assert len(result.stored) == 4 * 491
    for turn in range(4):
        reasons = {offset - 500 * turn: reason for (_, offset), reason in result.dead.items()}
        assert "longer or shorter" in reasons[18] or "does not decode" in reasons[18]
        assert "is empty" in reasons[100] and "no body" in reasons[101]
        assert "unknown schema fingerprint 0101010101010101" in reasons[102] and "no schema header" in reasons[103]


def mixed_batch(first: int) -> list[Message]:
    """The 500 records, numbered from `first`."""
    sound = [one_point(first + number) for number in range(500)]
    messages: list[Message] = [(b"run", value, MARKED) for value in sound]
    for number, length in ((0, len(sound[0]) - 1), (250, len(sound[250]) // 2), (499, len(sound[499]) - 9)):
        messages[number] = (b"run", sound[number][:length], MARKED)
    flipped = bytearray(sound[17])
    flipped[0] ^= 0x80  # the length of the run's id
    messages[17] = (b"run", bytes(flipped), MARKED)
    messages[18] = (b"run", sound[18] + b"garbage", MARKED)
    messages[100] = (b"run", b"", MARKED)
    messages[101] = (b"run", None, MARKED)
    messages[102] = (b"run", sound[102], [(SCHEMA_HEADER, b"\x01" * 8)])
    messages[103] = (b"run", sound[103], [])
    # Not poison: headers of others around ours, and a record without a key.
    messages[300] = (None, sound[300], [("trace", b"1"), *MARKED, ("more", b"")])
    return messages


def test_poison_at_the_edges_of_many_batches(line: Line) -> None:
    """Batches that begin, end, or consist of poison alone, between sound ones, small and large, in two codecs."""
    number = 0
    for compression in (None, "lz4"):
        for where in ("first", "last", "all", "none"):
            messages: list[Message] = []
            for at in range(40):
                bad = where == "all" or (where == "first" and at == 0) or (where == "last" and at == 39)
                values = [float(number)] * (300 if at % 10 == 5 else 1)
                value = body(points(f"run{number}", values, first_step=number, first_seq=number))
                messages.append((b"k", value[:-3] if bad else value, MARKED))
                number += 1
            send_as_one_batch(line, messages, compression)
    line.start_worker()
    line.wait_stored()
    result = account(line)
    assert len(result.dead) == 2 * (1 + 1 + 40)


@pytest.mark.parametrize("seed", [1, 2])
def test_seeded_damage_through_a_broker(line: Line, seed: int) -> None:
    """Cut, flipped, grown, emptied and senseless bodies, wrong headers, odd keys, in several batches and codecs."""
    rng = random.Random(seed)
    name = topic(line.address.prefix, "metrics")
    line.start_worker()
    for compression in rng.sample([None, "lz4", "gzip", "zstd"], 3):
        with producer(line.address, linger_ms=30, batch_size=200_000, compression_type=compression) as sender:
            for number in range(100):
                event = points(
                    f"run{number % 7}", [number / 3] * rng.choice([1, 1, 1, 40]), first_seq=rng.getrandbits(40)
                )
                value: bytes | None = codec.encode(*event)
                headers = MARKED
                dice = rng.random()
                if dice < 0.15:
                    value = mutate(rng, codec.encode(*event))
                elif dice < 0.2:
                    value = nonsense(rng, "odd")
                elif dice < 0.24:
                    headers = rng.choice(
                        [[], [("other", b"x")], [(SCHEMA_HEADER, b"")], [(SCHEMA_HEADER, METRICS[:7])],
                         [(SCHEMA_HEADER, bytes(8))], [(SCHEMA_HEADER, codec.current("params").fingerprint)]]
                    )  # fmt: skip
                key = rng.choice([None, b"", b"run"]) if value is not None else b"run"
                sender.send(name, key=key, value=value, headers=headers, partition=0)
    line.wait_stored()
    result = account(line)
    assert len(result.stored) > 200 and len(result.dead) > 25


def test_very_large_keys_and_bodies(line: Line) -> None:
    """Record keys of 1 MB, a body at the limit, and one above it on a topic that was opened for more."""
    from kafka.admin import ConfigResource, ConfigResourceType

    name = topic(line.address.prefix, "metrics")
    with admin(line.address) as client:
        client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, {"max.message.bytes": "4000000"})])
    _, fields = points("large", [1.0], first_seq=1)
    wide = codec.encode("metric_batch", {**fields, "keys": ["loss", "k" * 1_000_000]})
    with producer(line.address, max_request_size=4_000_000) as sender:
        sender.send(name, key=b"k" * 1_000_000, value=one_point(1), headers=MARKED)
        sender.send(name, key=b"k" * 1_000_000, value=b"not ours")
        sender.send(name, key=b"run", value=wide, headers=MARKED)
        sender.send(name, key=b"run", value=one_point(2) + bytes(MAX_MESSAGE_BYTES), headers=MARKED)
        sender.send(name, key=b"run", value=bytes(2_000_000), headers=MARKED)
        sender.send(name, key=b"run", value=one_point(3), headers=MARKED)
    line.start_worker()
    line.wait_stored()
    result = account(line)
    assert [offset for _, offset in sorted(result.stored)] == [0, 5]
    assert sum("bytes, more than" in reason for reason in result.dead.values()) == 2


def test_another_programs_messages_on_both_topics(line: Line) -> None:
    """JSON, text, protobuf-like bytes and our events on the wrong topic are set aside; our state and points go on."""
    names = {stream: topic(line.address.prefix, stream) for stream in ("control", "metrics")}
    others = [b'{"level": "info"}', b"plain", b"\x00\x00\x00\x00\x01\x02abc", bytes(300), b"\xff" * 20]

    def mark(event: Any) -> list[tuple[str, bytes]]:
        return [(SCHEMA_HEADER, codec.current(event[0]).fingerprint)]

    with producer(line.address) as sender:
        for number in range(60):
            for name in names.values():
                sender.send(name, key=b"x", value=others[number % 5], headers=[("content-type", b"x")], partition=0)
            if number == 10:
                for event in (created(), started("run0")):
                    sender.send(names["control"], value=body(event), headers=mark(event), partition=0)
            if number % 7 == 0:
                sender.send(names["metrics"], value=one_point(number * 5), headers=MARKED, partition=0)
            if number % 20 == 0:
                sender.send(names["control"], value=one_point(number), headers=MARKED, partition=0)
                event = started("stray")
                sender.send(names["metrics"], value=body(event), headers=mark(event), partition=0)
    line.start_worker()
    line.wait_stored()
    result = account(line)
    assert (len(result.stored), len(result.dead)) == (9, 63)
    control = [letter for letter in line.dead_letters() if letter.source.stream == "control"]
    assert len(control) == 63 and all(letter.reason for letter in control)
    assert line.sql("SELECT run_id, name FROM runs") == [("run0", "name-run0")]
