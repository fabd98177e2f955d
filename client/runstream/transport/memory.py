"""A log in this process's memory: the fake that tests use, and `memory://name` as a tracking address.

Keeps the whole contract of `Transport`, and can be told to fail like a real log.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from typing import ClassVar

from runstream_schemas.names import CONTROL, METRICS, STREAMS, Stream

from . import Event, Positions, TransportError

__all__ = ["MemoryTransport"]


class _Pending:
    """Events that are handed over but not in the log yet."""

    def __init__(self, transport: MemoryTransport, events: Sequence[Event]) -> None:
        self._transport = transport
        self._events = events
        self._positions: Positions | None = None

    def result(self, timeout_seconds: float) -> Positions:
        """See `Receipt`."""
        if self._positions is None:
            self._positions = self._transport._append(self._events, timeout_seconds)
        return self._positions


class MemoryTransport:
    """Events in lists, one per (stream, partition). Thread-safe."""

    _named: ClassVar[dict[str, MemoryTransport]] = {}

    def __init__(self, partitions: int = 1) -> None:
        self.partitions = partitions
        self.log: dict[tuple[Stream, int], list[Event]] = {
            (stream, partition): [] for stream in STREAMS for partition in range(partitions)
        }
        self.away: str | None = None
        """A reason: every send and every acknowledgement fails, retryably."""
        self.refused: set[bytes] = set()
        """Bodies that are refused for good."""
        self.holding = False
        """Nothing is acknowledged while this is set."""
        self.closed = False
        self.syncs = 0
        self._changed = threading.Condition()

    @classmethod
    def named(cls, uri: str) -> MemoryTransport:
        """The one of this process behind a `memory://` address."""
        return cls._named.setdefault(uri, cls())

    def send(self, events: Sequence[Event]) -> _Pending:
        """See `Transport`."""
        if self.away is not None:
            raise TransportError(self.away, retryable=True)
        return _Pending(self, list(events))

    def sync(self) -> None:
        """See `Transport`; counts its calls."""
        self.syncs += 1

    def end_positions(self, timeout_seconds: float) -> Positions:
        """See `Transport`."""
        if self.away is not None:
            raise TransportError(self.away, retryable=True)
        with self._changed:
            return {place: len(events) for place, events in self.log.items()}

    def close(self, timeout_seconds: float) -> None:
        """See `Transport`; what was logged can still be read."""
        self.closed = True

    def release(self) -> None:
        """End `holding`."""
        with self._changed:
            self.holding = False
            self._changed.notify_all()

    @property
    def metrics(self) -> list[Event]:
        """All metric batches, partition by partition."""
        return self._all(METRICS)

    @property
    def control(self) -> list[Event]:
        """All control events, partition by partition."""
        return self._all(CONTROL)

    def _all(self, stream: Stream) -> list[Event]:
        with self._changed:
            return [event for place, events in self.log.items() if place[0] == stream for event in events]

    def _append(self, events: Sequence[Event], timeout_seconds: float) -> Positions:
        with self._changed:
            if not self._changed.wait_for(lambda: not self.holding or self.away is not None, timeout_seconds):
                raise TimeoutError("not acknowledged yet")
            if self.away is not None:
                raise TransportError(self.away, retryable=True)
            if any(event.body in self.refused for event in events):
                raise TransportError("the log refuses a body", retryable=False)
            positions: dict[tuple[Stream, int], int] = {}
            for event in events:
                partition = 0 if event.first_partition else zlib.crc32(event.key.encode()) % self.partitions
                place = (event.stream, partition)
                self.log[place].append(event)
                positions[place] = len(self.log[place])
            return positions
