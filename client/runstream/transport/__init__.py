"""How event bodies leave a training process: one `Transport` protocol, one module per implementation.

Only the delivery thread calls a transport. Nothing above this package knows which one is below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from runstream_schemas.names import Stream

__all__ = ["Event", "Positions", "Receipt", "Transport", "TransportError"]

Positions = Mapping[tuple[Stream, int], int]
"""Log positions: (stream, partition) -> the offset just behind, that is the next one to be written or read."""


@dataclass(frozen=True, slots=True)
class Event:
    """One encoded event on its way to the log."""

    stream: Stream
    key: str
    """Run id or experiment id: decides the partition, unless `first_partition`."""
    fingerprint: bytes
    """8-byte schema fingerprint (`runstream_schemas.codec`)."""
    body: bytes
    first_partition: bool = False
    """Goes to partition 0 (see `names.FIRST_PARTITION_EVENTS`)."""


class TransportError(Exception):
    """Events were not (all) acknowledged. Sending them again is always safe: the store absorbs duplicates."""

    def __init__(self, message: str, *, retryable: bool, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        """False: sending the same events again cannot succeed (one is larger than the broker takes)."""
        self.retry_after_seconds = retry_after_seconds
        """The other end asked to be left alone for so long."""


class Receipt(Protocol):
    """The fate of the events of one `send`."""

    def result(self, timeout_seconds: float) -> Positions:
        """Block until every event is acknowledged; positions just behind the last of them, per partition.

        Raises:
            TimeoutError: not known yet; ask again.
            TransportError: at least one was refused or given up; send all of them again.
        """
        ...


class Transport(Protocol):
    """Appends events to the log, in order per key."""

    def send(self, events: Sequence[Event]) -> Receipt:
        """Hand over `events`; may return before they are acknowledged. Blocks at most 5 seconds.

        Raises:
            TransportError: nothing was handed over.
        """
        ...

    def sync(self) -> None:
        """Make acknowledged events safe from power loss where that is ours to do (the directory log); may block."""
        ...

    def end_positions(self, timeout_seconds: float) -> Positions:
        """Where the log ends now, over all writers: what a reader waits for to see everything logged so far.

        Raises:
            TransportError: the log cannot be reached within the time.
        """
        ...

    def close(self, timeout_seconds: float) -> None:
        """Release everything; events without an acknowledgement are dropped (the journal still holds them)."""
        ...
