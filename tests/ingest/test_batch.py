"""Batches: what is refused without decoding, when a batch is full, how fast inserts follow each other."""

from __future__ import annotations

import pytest

from runstream_ingest.batch import Batch, BatchLimits, Pace, refusal
from runstream_ingest.log import LogRecord, Unreadable
from runstream_schemas.limits import MAX_MESSAGE_BYTES
from tests.services.events import created, points, record

GOOD = record(points("a", [1.0]), 7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": None}, "no schema header"),
        ({"fingerprint": b"12345678"}, "unknown schema fingerprint 3132333435363738"),
        ({"fingerprint": b""}, "unknown schema fingerprint"),
        ({"body": None}, "the record has no body"),
        ({"body": b""}, "the body is empty"),
        ({"body": bytes(MAX_MESSAGE_BYTES + 1)}, f"more than {MAX_MESSAGE_BYTES}"),
        ({"stream": "control"}, "metric_batch does not belong into stream control"),
    ],
)
def test_refusal_names_the_reason(changes: dict[str, object], reason: str) -> None:
    """What can be told without decoding goes to the dead letters, whole, with its reason."""
    broken = GOOD._replace(**changes)
    letter = refusal(broken)
    assert letter is not None
    assert reason in letter.reason
    assert (letter.source.stream, letter.source.partition, letter.source.offset) == (broken.stream, 0, 7)
    assert letter.body == broken.body
    assert letter.fingerprint == broken.fingerprint


def test_a_sound_record_is_not_refused() -> None:
    """Neither a metric batch nor a control event."""
    assert refusal(GOOD) is None
    assert refusal(record(created())) is None


def test_an_unreadable_range_is_a_dead_letter() -> None:
    """With its whole range, though there is no body to keep."""
    letter = refusal(Unreadable("metrics", 2, 10, 25, "bad checksum"))
    assert letter is not None
    assert (letter.source.partition, letter.source.offset, letter.next_offset) == (2, 10, 25)
    assert letter.reason == "unreadable: bad checksum"


def test_a_batch_knows_its_positions() -> None:
    """Positions are behind the last item of each partition, also where that item was refused."""
    batch = Batch()
    assert not batch
    batch.add([record(points("a", [1.0]), 3)])
    batch.add([record(points("a", [1.0]), 9, partition=1)])
    batch.add([LogRecord("metrics", 0, 4, 5, 0, None, None, b"x")])
    batch.add([Unreadable("control", 0, 0, 40, "x")])
    assert batch
    assert batch.positions == {("metrics", 0): 5, ("metrics", 1): 10, ("control", 0): 40}
    assert (len(batch.records), len(batch.dead)) == (2, 2)


def test_a_lost_partition_leaves_nothing_behind() -> None:
    """Records, refusals, positions and bytes of a lost partition go; the others stay."""
    batch = Batch()
    kept = record(points("a", [1.0]), 3)
    batch.add([kept])
    batch.add([record(points("b", [1.0]), 9, partition=1)])
    batch.add([Unreadable("metrics", 1, 10, 40, "x")])
    batch.drop({("metrics", 1)})
    assert batch.records == [kept]
    assert batch.dead == []
    assert batch.positions == {("metrics", 0): 4}
    assert batch.body_bytes == len(kept.body or b"")


@pytest.mark.parametrize(
    ("limits", "records"),
    [
        (BatchLimits(max_batch_bytes=2 * len(GOOD.body or b"")), 2),
        (BatchLimits(max_batch_points=3 * len(GOOD.body or b"") // 10), 3),
        (BatchLimits(max_batch_records=4), 4),
    ],
)
def test_a_batch_is_full_at_each_limit(limits: BatchLimits, records: int) -> None:
    """Bytes, points (estimated from above) and records each close a batch."""
    batch = Batch()
    while batch.fullness(limits) < 1.0:
        batch.add([GOOD])
    assert len(batch.records) == records


def test_the_pace_is_quick_when_idle_and_slower_under_load() -> None:
    """The gap starts at the shortest, grows with cost and parts up to the longest, and falls again."""
    pace = Pace(0.01, 0.5)
    assert pace.gap_seconds == 0.01
    pace.inserted(0.001, 0.0, max_parts=0)
    assert pace.gap_seconds == 0.01
    pace.inserted(0.05, 0.0, max_parts=0)
    assert pace.gap_seconds == pytest.approx(0.2)
    pace.inserted(0.05, 0.25, max_parts=0)
    assert pace.gap_seconds == pytest.approx(0.1)
    pace.inserted(3.0, 0.0, max_parts=0)
    assert pace.gap_seconds == 0.5
    pace.inserted(3.0, 0.6, max_parts=0)
    assert pace.gap_seconds == 0.01, "the next batch is large already"
    pace.inserted(0.001, 0.0, max_parts=100)
    assert pace.gap_seconds == pytest.approx(0.25)
    pace.inserted(3.0, 1.0, max_parts=1_000)
    assert pace.gap_seconds == 0.5
    pace.inserted(0.001, 0.0, max_parts=10)
    assert pace.gap_seconds == 0.01
