"""Where the worker reads from: one `EventLog` protocol, one module per implementation (directory, kafka)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from runstream_schemas.names import Stream

__all__ = ["EventLog", "LogRecord", "Positions", "Unreadable"]

Positions = Mapping[tuple[Stream, int], int]
"""(stream, partition) -> next offset to read. A committed offset is always the next one."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One undecoded record of the log."""

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


class EventLog(Protocol):
    """Tails the log on behalf of one worker. Called by one thread."""

    def poll(self, timeout_seconds: float) -> Sequence[LogRecord | Unreadable]:
        """New records, in order per partition; empty when none came in time. Never skips a range silently."""
        ...

    def lost(self) -> frozenset[tuple[Stream, int]]:
        """Partitions taken away since the last call: their unfinished batches must be dropped, not committed."""
        ...

    def commit(self, positions: Positions) -> None:
        """Remember next offsets, after their rows are in the store. Partitions no longer owned are left out."""
        ...

    def end_positions(self) -> Positions:
        """Ends of the partitions this worker owns, for lag."""
        ...

    def pause(self) -> None:
        """Stay a member of the group but return nothing from `poll` until `resume`."""
        ...

    def resume(self) -> None: ...

    def close(self) -> None: ...
