"""What belongs into one insert, and when it goes: limits by bytes, points and records, and an adaptive pace.

Also decides which records never reach an insert, from what can be told without decoding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from runstream_schemas import codec
from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import STREAM_OF, Stream

from .dead_letter import DeadLetter, Source
from .log import LogBlock, LogItem, LogRecord, Unreadable

__all__ = ["Batch", "BatchLimits", "Pace", "refusal"]

MIN_POINT_BYTES: Final = 10
"""A metric point takes at least this much of a body (8 bytes of value, two indices), so bytes bound the points."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """When a batch is full. What is in memory is at most two batches and one framed copy."""

    max_batch_bytes: int = 8 * 1024 * 1024
    """Bytes of bodies."""
    max_batch_points: int = 1_000_000
    """Metric points, estimated from above by the bytes of the bodies."""
    max_batch_records: int = 100_000
    """Records: each costs about 400 bytes of Python objects, however small its body; a block counts as one."""


@dataclass(slots=True)
class Batch:
    """Records and dead letters on their way to one insert, and the positions that hold once it is done."""

    records: list[LogRecord] = field(default_factory=list)
    blocks: list[LogBlock] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    positions: dict[tuple[Stream, int], int] = field(default_factory=dict)
    """Next offset per partition, behind the last record taken in."""
    body_bytes: int = 0

    def add(self, items: Iterable[LogItem]) -> None:
        """Take in `items`; those of a partition come in order."""
        known = {(mark, STREAM_OF[schema.event]) for mark, schema in codec.schemas().items()}
        records, positions, size = self.records, self.positions, 0
        for item in items:
            positions[item.stream, item.partition] = item.next_offset
            if isinstance(item, LogRecord):
                body = item.body
                # The usual case first: at one point a record every question costs.
                if body and len(body) <= MAX_MESSAGE_BYTES and (item.fingerprint, item.stream) in known:
                    records.append(item)
                    size += len(body)
                    continue
            elif isinstance(item, LogBlock):
                self.blocks.append(item)
                size += len(item.payload)
                continue
            letter = refusal(item)
            if letter is not None:
                self.dead.append(letter)
        self.body_bytes += size

    def drop(self, partitions: Collection[tuple[Stream, int]]) -> None:
        """Forget everything of `partitions`: another worker has them now."""
        self.records = [record for record in self.records if (record.stream, record.partition) not in partitions]
        self.blocks = [block for block in self.blocks if (block.stream, block.partition) not in partitions]
        self.dead = [one for one in self.dead if (one.source.stream, one.source.partition) not in partitions]
        self.body_bytes = sum(len(record.body or b"") for record in self.records)
        self.body_bytes += sum(len(block.payload) for block in self.blocks)
        for partition in partitions:
            self.positions.pop(partition, None)

    def fullness(self, limits: BatchLimits) -> float:
        """How near the batch is to the nearest of its limits; at 1 it must go before it takes in more."""
        return max(
            self.body_bytes / limits.max_batch_bytes,
            self.body_bytes / (limits.max_batch_points * MIN_POINT_BYTES),
            (len(self.records) + len(self.blocks) + len(self.dead)) / limits.max_batch_records,
        )

    def count(self) -> int:
        """Records of the log in it, those that go to the dead letters included."""
        return len(self.records) + sum(map(len, self.blocks)) + len(self.dead)

    def __bool__(self) -> bool:
        return bool(self.positions)


def refusal(item: LogRecord | Unreadable) -> DeadLetter | None:
    """The dead letter of an item that cannot be inserted, or None for one that may be tried."""
    if isinstance(item, Unreadable):
        source = Source(item.stream, item.partition, item.offset, 0)
        return DeadLetter(source, item.next_offset, f"unreadable: {item.reason}")
    reason = _reason(item)
    return None if reason is None else letter_of(item, reason)


def letter_of(record: LogRecord, reason: str) -> DeadLetter:
    """The dead letter of `record`."""
    source = Source(record.stream, record.partition, record.offset, record.time_ms)
    return DeadLetter(source, record.next_offset, reason, record.key, record.fingerprint, record.body)


def _reason(record: LogRecord) -> str | None:
    if record.fingerprint is None:
        return "no schema header: the record is not one of runstream's"
    schema = codec.schemas().get(record.fingerprint)
    if schema is None:
        return f"unknown schema fingerprint {record.fingerprint.hex()}: written by a newer client, or not by runstream"
    if STREAM_OF[schema.event] != record.stream:
        return f"{schema.event} does not belong into stream {record.stream}"
    if not record.body:
        return "the record has no body" if record.body is None else "the body is empty"
    if len(record.body) > MAX_MESSAGE_BYTES:
        return f"the body has {len(record.body)} bytes, more than {MAX_MESSAGE_BYTES}"
    return None


class Pace:
    """How long to wait between the end of an insert and the start of the next that is not full.

    Many small inserts cost more CPU and parts than few large ones, but the first event after a pause should be visible
    at once. So the gap is short, and grows with what inserts cost and with the number of parts that wait to be merged.
    A batch that fills up by itself while the one before is inserted needs no gap: near the limit of what the store
    takes, every pause would be paid several times over.
    """

    def __init__(self, min_gap_seconds: float = 0.01, max_gap_seconds: float = 0.5) -> None:
        self._min = min_gap_seconds
        self._max = max_gap_seconds
        self._gap = min_gap_seconds

    @property
    def gap_seconds(self) -> float:
        """The gap that holds now."""
        return self._gap

    def inserted(self, seconds: float, fullness: float, max_parts: int) -> None:
        """Learn from the insert that just ended.

        Args:
            seconds: how long it took.
            fullness: of its batch, 1 for a full one; from a half on its cost asks for no gap.
            max_parts: active parts of the target that has the most; from 50 the gap grows, at 150 it is the longest.
        """
        by_cost = 4.0 * seconds * max(0.0, 1.0 - 2.0 * fullness)  # small inserts take at most a fifth of the time
        by_parts = self._max * min(1.0, max(0, max_parts - 50) / 100)
        self._gap = min(self._max, max(self._min, by_cost, by_parts))
