"""Where the worker reads from: one `EventLog` protocol, one module per implementation (directory, kafka)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from runstream_schemas.names import Stream

from ..errors import IngestError

__all__ = ["EventLog", "LogBlock", "LogError", "LogItem", "LogRecord", "Positions", "Unreadable"]

Positions = Mapping[tuple[Stream, int], int]
"""(stream, partition) -> next offset to read. A committed offset is always the next one."""


class LogError(IngestError):
    """The log is not what it was, or cannot be used at all: stop loudly, a person must look. Never transient.

    A broker that is merely away is no error: `poll` returns nothing until it is back.
    """


class LogRecord(NamedTuple):
    """One undecoded record of the log. A named tuple, for it takes half the time of a frozen dataclass to make."""

    stream: Stream
    partition: int
    offset: int
    next_offset: int
    """Where the record behind it starts: offset + 1 in Kafka, a byte position in the directory log."""
    time_ms: int
    """Broker's or appender's clock, UTC milliseconds."""
    key: bytes | None
    fingerprint: bytes | None
    """None: the record carries no schema header."""
    body: bytes | None
    """None: a Kafka record without a value."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A range of the log that cannot be read (corrupt batch, damaged segment, offsets lost to retention)."""

    stream: Stream
    partition: int
    offset: int
    next_offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class LogBlock:
    """Neighbouring metric records of one schema that nobody has taken apart (see `block`)."""

    stream: Stream
    partition: int
    offset: int
    next_offset: int
    """Behind the last record: every offset from `offset` on is one record of the block."""
    time_ms: int
    """Broker's clock, UTC milliseconds: the first record's, or that of all if `shared_time`."""
    shared_time: bool
    fingerprint: bytes
    payload: bytes = field(repr=False)
    """The records as Kafka lays them out in a batch, without compression."""
    take_apart: Callable[[], Sequence[LogRecord]] = field(repr=False, compare=False)
    """The records, one by one."""

    def __len__(self) -> int:
        return self.next_offset - self.offset


LogItem = LogRecord | LogBlock | Unreadable
"""What a log is made of; each covers the offsets from `offset` up to `next_offset` of its partition."""


class EventLog(Protocol):
    """Tails the log on behalf of one worker. Called by one thread.

    The worker's round: `poll`; then `lost` (drop what is unfinished there); then, if `assigned` is not empty, `start`
    with the store's positions of those partitions (where the store cannot be asked, try again in the next round: the
    other partitions go on).
    """

    def assigned(self) -> frozenset[tuple[Stream, int]]:
        """Partitions given to this worker that wait for `start`; nothing of them is polled before it."""
        ...

    def start(self, positions: Positions) -> None:
        """Begin to read all of `assigned()`, each at the smaller of the log's commit and the store's position.

        Args:
            positions: the store's next offsets (`ingest_positions`). A partition that is missing here holds nothing in
                the store and is read from the log's beginning, whatever was committed.

        Raises:
            LogError: a position lies behind the log's end, so that this is another log than the one it was read from.
        """
        ...

    def poll(self, timeout_seconds: float) -> Sequence[LogItem]:
        """New records, in order per partition; empty when none came in time. Never skips a range silently.

        Raises:
            LogError: see there (a topic was deleted or recreated, or may not be read).
        """
        ...

    def lost(self) -> frozenset[tuple[Stream, int]]:
        """Partitions taken away since the last call: their unfinished batches must be dropped, not committed."""
        ...

    def commit(self, positions: Positions) -> None:
        """Remember next offsets, after their rows are in the store. Partitions no longer owned are left out.

        Never raises for a log that is away or a group that rebalances: the store's positions stand, and the next commit
        says the same and more.
        """
        ...

    def identities(self) -> Mapping[Stream, str]:
        """What tells a stream from another one of the same name, made after it was deleted; unknown ones are left out.

        Any thread may ask; known at the latest for streams that have `assigned` partitions.
        """
        ...

    def end_positions(self) -> Positions:
        """Ends of the partitions this worker owns, for lag."""
        ...

    def pause(self) -> None:
        """Stay a member of the group but return nothing from `poll` until `resume`."""
        ...

    def resume(self) -> None: ...

    def close(self) -> None: ...
