"""An event log in memory: the fake that keeps the contract, for tests of everything above the seam."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence

from runstream_schemas.names import Stream

from . import LogError, LogRecord, Positions, Unreadable

__all__ = ["MemoryLog"]

_Place = tuple[Stream, int]


class MemoryLog:
    """Partitions as lists. The methods of `EventLog` are called by one thread; the others by any."""

    def __init__(self, partitions: Collection[_Place], *, max_poll_records: int = 500) -> None:
        """All `partitions` are assigned at once; `revoke` and `assign` play a rebalance."""
        self._changed = threading.Condition()
        self._items: dict[_Place, list[LogRecord | Unreadable]] = {place: [] for place in partitions}
        self._starts: dict[_Place, int] = dict.fromkeys(partitions, 0)
        self._owned: dict[_Place, int] = {}
        self._assigned = set(partitions)
        self._lost: set[_Place] = set()
        self._paused = False
        self._max_poll_records = max_poll_records
        self.committed: dict[_Place, int] = {}
        self.identity: dict[Stream, str] = {}
        """What `identities` says."""

    # What a broker and its producers do.

    def append(
        self,
        stream: Stream,
        fingerprint: bytes | None,
        body: bytes | None,
        *,
        key: bytes | None = None,
        time_ms: int | None = None,
        partition: int = 0,
    ) -> int:
        """Add one record; returns its offset. `time_ms` defaults to now, as a broker's own clock would."""
        with self._changed:
            items = self._items[stream, partition]
            offset = self._end((stream, partition))
            stamp = time.time_ns() // 1_000_000 if time_ms is None else time_ms
            items.append(LogRecord(stream, partition, offset, offset + 1, stamp, key, fingerprint, body))
            self._changed.notify_all()
            return offset

    def damage(self, stream: Stream, records: int, reason: str, *, partition: int = 0) -> None:
        """Add a range of `records` offsets that cannot be read."""
        with self._changed:
            offset = self._end((stream, partition))
            self._items[stream, partition].append(Unreadable(stream, partition, offset, offset + records, reason))
            self._changed.notify_all()

    def expire(self, stream: Stream, before: int, *, partition: int = 0) -> None:
        """Retention removes what lies before offset `before`."""
        with self._changed:
            self._starts[stream, partition] = before

    def revoke(self, *places: _Place) -> None:
        """Take partitions away from the worker."""
        with self._changed:
            for place in places:
                self._owned.pop(place, None)
                self._assigned.discard(place)
                self._lost.add(place)

    def assign(self, *places: _Place) -> None:
        """Give partitions to the worker; new ones begin to exist."""
        with self._changed:
            for place in places:
                self._items.setdefault(place, [])
                self._starts.setdefault(place, 0)
                self._assigned.add(place)
            self._changed.notify_all()

    # What the worker calls.

    def assigned(self) -> frozenset[_Place]:
        with self._changed:
            return frozenset(self._assigned)

    def start(self, positions: Positions) -> None:
        with self._changed:
            for place in sorted(self._assigned):
                position = positions.get(place, self._starts[place])
                if place in positions:
                    position = min(position, self.committed.get(place, position))
                if position > self._end(place):
                    raise LogError(f"{place[0]}/{place[1]} was read up to {position} but ends at {self._end(place)}")
                self._owned[place] = position
            self._assigned.clear()

    def poll(self, timeout_seconds: float) -> Sequence[LogRecord | Unreadable]:
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                found = [] if self._paused else self._take()
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._changed.wait(left)

    def lost(self) -> frozenset[_Place]:
        with self._changed:
            lost, self._lost = frozenset(self._lost), set()
            return lost

    def commit(self, positions: Positions) -> None:
        with self._changed:
            self.committed.update({place: offset for place, offset in positions.items() if place in self._owned})

    def identities(self) -> Mapping[Stream, str]:
        return dict(self.identity)

    def end_positions(self) -> Positions:
        with self._changed:
            return {place: self._end(place) for place in self._owned}

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def close(self) -> None:
        with self._changed:
            self._owned.clear()

    def _end(self, place: _Place) -> int:
        items = self._items[place]
        return items[-1].next_offset if items else self._starts[place]

    def _take(self) -> list[LogRecord | Unreadable]:
        found: list[LogRecord | Unreadable] = []
        for (stream, partition), position in sorted(self._owned.items()):
            start = self._starts[stream, partition]
            if position < start:
                found.append(Unreadable(stream, partition, position, start, "removed by retention"))
                position = start
            for item in self._items[stream, partition]:
                if item.next_offset <= position:
                    continue
                if len(found) >= self._max_poll_records:
                    break
                found.append(item)
                position = item.next_offset
            self._owned[stream, partition] = position
        return found
