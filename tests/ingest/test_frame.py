"""Framing: raw bodies become Avro files that ClickHouse reads, one body a block."""

from __future__ import annotations

import io
import random

import fastavro
import pytest

from runstream_ingest.frame import CHUNK_BYTES, LOG_MARK, frame, varint
from runstream_ingest.log import LogRecord
from runstream_schemas.limits import MAX_TIME_MS
from tests.services.events import METRICS, NOW, body, created, points, record, started


@pytest.mark.parametrize("number", [0, 1, 63, 64, 8191, 8192, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 62) + 12345])
def test_varint_is_avros_long(number: int) -> None:
    """The fast encoder writes what Avro's own does."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, "long", number)
    assert varint(number) == out.getvalue()


def test_varint_of_random_numbers() -> None:
    """Also for numbers whose upper parts come from the cache."""
    rng = random.Random(3)
    for _ in range(10_000):
        number = rng.getrandbits(rng.randrange(1, 62))
        out = io.BytesIO()
        fastavro.schemaless_writer(out, "long", number)
        assert varint(number) == out.getvalue()


def test_frame_is_an_avro_file_with_one_body_a_block() -> None:
    """Another Avro reader gets every field back, with the log's coordinates around it."""
    records = [record(points(f"run{i}", [float(i)] * (i + 1)), offset=i * 1000, partition=i % 3) for i in range(50)]
    [framed] = frame(records)
    data = b"".join(framed.chunks)
    blocks = list(fastavro.block_reader(io.BytesIO(data)))
    assert [block.num_records for block in blocks] == [1] * 50
    for index, row in enumerate(fastavro.reader(io.BytesIO(data))):
        assert row["log_offset"] == index * 1000
        assert row["log_partition"] == index % 3
        assert row["log_time"] == NOW
        assert row["log_mark"] == LOG_MARK
        assert row["run_id"] == f"run{index}"
        assert row["values"] == [float(index)] * (index + 1)
        assert tuple(row) == tuple(framed.columns)


def test_frame_groups_by_schema_with_control_first() -> None:
    """One file for each schema; metrics last."""
    first, second = record(points("a", [1.0]), 0), record(points("a", [2.0]), 1)
    records = [first, record(created(), 0), record(started("a"), 1), second]
    framed = frame(records)
    assert [one.event for one in framed][-1] == "metric_batch"
    assert {one.event: len(one.records) for one in framed} == {
        "experiment_created": 1,
        "run_started": 1,
        "metric_batch": 2,
    }


def test_frame_cuts_into_pieces() -> None:
    """A file of several megabytes comes in pieces near the stated size, and none is lost."""
    event = points("a", [0.5] * 20_000)
    records = [record(event, i) for i in range(12)]
    [framed] = frame(records)
    assert len(framed.chunks) > 2
    assert all(len(chunk) < CHUNK_BYTES + len(body(event)) + 1_000 for chunk in framed.chunks)
    rows = list(fastavro.reader(io.BytesIO(b"".join(framed.chunks))))
    assert len(rows) == 12


def test_frame_without_a_log_time_caps_nothing() -> None:
    """A record without a broker's time must not pull versions to zero, and gives the same on every replay."""
    for time_ms in (-1, 0):
        [framed] = frame([record(points("a", [1.0]), time_ms=time_ms)])
        [row] = fastavro.reader(io.BytesIO(b"".join(framed.chunks)))
        assert row["log_time"] == MAX_TIME_MS - 1


def test_frame_refuses_a_record_without_a_fingerprint() -> None:
    """Such records are dead letters; framing one is a bug of ours."""
    with pytest.raises(ValueError, match="metrics/0/5 has no fingerprint"):
        frame([LogRecord("metrics", 0, 5, 6, NOW, None, None, b"x")])


def test_frame_of_nothing_is_nothing() -> None:
    """No records, no files."""
    assert frame([]) == []
    assert METRICS is not None
