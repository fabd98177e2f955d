"""The reading side of a journal: parcels of events, in order, from the last acknowledged place on.

The same code reads the journal of this process while it is written and that of a dead one. It never changes a segment;
`acknowledge` moves the place and lets finished segments go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from runstream_schemas.identity import now_ms
from runstream_schemas.names import FIRST_PARTITION_EVENTS, STREAM_OF
from runstream_schemas.segment import Frame, Incomplete, read_frames

from ..transport import Event
from .batch import Batch, batch_event, parse
from .names import Name
from .progress import Position
from .record import BLOCK_BYTES, sequence
from .segment import HEADER_BYTES

__all__ = ["ControlReader", "End", "Parcel", "PlainPart", "Source", "ThinPart", "frame_event", "joined"]

CONTROL_READ_BYTES: Final = 64 * 1024
THIN_READ_BYTES: Final = 64 * 1024
PAST_THE_END: Final = 1 << 40


class PlainPart(Protocol):
    """Records, as they were written."""

    number: int

    def end(self) -> int:
        """Where whole records end now; grows while the part is written."""
        ...

    def read(self, start: int, end: int) -> bytes: ...


class ThinPart:
    """Frames with encoded batches, as thinning leaves them."""

    number: int

    def frames(self) -> bytes:
        """The whole file.

        Raises:
            OSError: it cannot be read.
        """
        raise NotImplementedError


class ControlReader(Protocol):
    """Control frames under logical offsets."""

    @property
    def end(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class End:
    """A moment in a journal: everything before it was logged."""

    control: int
    metrics: Position


@dataclass(frozen=True, slots=True)
class Parcel:
    """Events that are sent together, and where the journal stands once they are acknowledged."""

    events: list[Event]
    control: int
    metrics: Position
    counts: Mapping[str, int]
    block: int
    points: int = 0
    bytes: int = field(default=0)


def joined(parcels: Sequence[Parcel]) -> Parcel:
    """One parcel of several that follow each other."""
    last = parcels[-1]
    return Parcel(
        [event for parcel in parcels for event in parcel.events],
        last.control,
        last.metrics,
        last.counts,
        last.block,
        sum(parcel.points for parcel in parcels),
        sum(parcel.bytes for parcel in parcels),
    )


class Source:
    """Reads one journal. Only the delivery thread calls it, but for `done`."""

    def __init__(
        self,
        parts: Mapping[int, PlainPart | ThinPart],
        control: ControlReader,
        names: Mapping[int, Name],
        writer: int,
        *,
        forget: Callable[[int], None],
        progress: Callable[[int, Position], None],
        start: End | None = None,
        now: Callable[[], int] = now_ms,
    ) -> None:
        """
        Args:
            parts: segments by number; may change at any time, but a number never changes its meaning.
            forget: called with the number of a segment that is wholly acknowledged.
            progress: called after each acknowledgement, to remember it.
            start: what is acknowledged already.
        """
        self._parts = parts
        self._control = control
        self._names = names
        self._writer = writer
        self._forget = forget
        self._progress = progress
        self._now = now
        self._acked = start if start is not None else End(0, Position())
        self._acked_block = HEADER_BYTES
        self._acked_counts: Mapping[str, int] = {}
        self._at = self._acked
        self._block = HEADER_BYTES
        self._counts: dict[str, int] = {}
        if start is not None:
            self._recount(start.metrics)

    @property
    def acknowledged(self) -> End:
        """Up to where the log has taken everything."""
        return self._acked

    @property
    def reading(self) -> int:
        """Number of the segment that is being read: later ones were never submitted."""
        return self._at.metrics.segment

    def backlog_bytes(self) -> int:
        """About how much waits to be read."""
        waiting = self._control.end - self._at.control
        at = self._at.metrics
        for number, part in list(self._parts.items()):
            if number >= at.segment:
                waiting += _end_of(part) - (at.offset if number == at.segment else HEADER_BYTES)
        return max(0, waiting)

    def end(self) -> End:
        """This moment: what is logged before now lies before it. Thread-safe."""
        control = self._control.end
        for number, part in sorted(self._parts.items(), reverse=True):
            end = _end_of(part)
            if end > HEADER_BYTES:
                return End(control, Position(number, end))
        return End(control, Position())

    def done(self, end: End) -> bool:
        """Whether everything before `end` is acknowledged. Thread-safe."""
        acked = self._acked
        if acked.control < end.control:
            return False
        for number, part in list(self._parts.items()):
            if number > end.metrics.segment or number < acked.metrics.segment:
                continue
            until = min(_end_of(part), end.metrics.offset) if number == end.metrics.segment else _end_of(part)
            done = acked.metrics.offset if number == acked.metrics.segment else HEADER_BYTES
            if until > done:
                return False
        return True

    def next_parcel(self, max_bytes: int) -> Parcel | None:
        """The next events, or None if there are none now. Metrics of at most `max_bytes` of records at a time.

        Raises:
            OSError: the journal cannot be read.
        """
        return self._next_control() or self._next_metrics(max_bytes)

    def acknowledge(self, parcel: Parcel) -> None:
        """The log has taken `parcel`, and all parcels before it."""
        old = self._acked.metrics.segment
        self._acked = End(parcel.control, parcel.metrics)
        self._acked_block, self._acked_counts = parcel.block, parcel.counts
        self._progress(parcel.control, parcel.metrics)
        if parcel.metrics.segment > old:
            for number in [number for number in list(self._parts) if number < parcel.metrics.segment]:
                self._forget(number)

    def rewind(self) -> None:
        """Read again from the last acknowledged place: nothing handed out since counts as sent."""
        self._at = self._acked
        self._block, self._counts = self._acked_block, dict(self._acked_counts)

    def _next_control(self) -> Parcel | None:
        at = self._at.control
        size = CONTROL_READ_BYTES
        while at < self._control.end:
            events: list[Event] = []
            wanted = 0
            for item in read_frames(self._control.read(at, size), at):
                if isinstance(item, Incomplete):
                    wanted = item.wanted_bytes
                    break
                at = item.next_offset
                if isinstance(item, Frame):
                    events.append(frame_event(item))
            if events:
                self._at = End(at, self._at.metrics)
                return self._parcel(events, 0)
            if size >= self._control.end - self._at.control:
                return None  # a frame is being written, or the file ends in a torn one
            size = max(size * 2, wanted)
        return None

    def _next_metrics(self, max_bytes: int) -> Parcel | None:
        while True:
            number = self._at.metrics.segment
            part = self._parts.get(number)
            parcel = None
            if part is not None:
                # Asked for before the part is read: once a later one is there, this one does not grow.
                later = any(other > number for other in list(self._parts))
                parcel = (
                    self._read_thin(part, max_bytes)
                    if isinstance(part, ThinPart)
                    else self._read_plain(part, max_bytes)
                )
                if parcel is not None:
                    return parcel
                if not later:
                    return None
            following = [other for other in list(self._parts) if other > number]
            if not following:
                return None
            self._at = End(self._at.control, Position(min(following)))
            self._block, self._counts = HEADER_BYTES, {}

    def _read_plain(self, part: PlainPart, max_bytes: int) -> Parcel | None:
        offset = self._at.metrics.offset
        try:
            end = part.end()
            if offset >= end:
                return None
            batches, offset = self._parse(part, offset, end, max_bytes)
        except ValueError:  # unmapped: dropped from memory while we looked
            return None
        now = self._now()
        events = [batch_event(batch, self._writer, now) for batch in batches]
        self._at = End(self._at.control, Position(part.number, offset))
        return self._parcel(events, sum(len(batch.values) for batch in batches))

    def _parse(self, part: PlainPart, offset: int, end: int, max_bytes: int) -> tuple[list[Batch], int]:
        if offset // BLOCK_BYTES != self._block // BLOCK_BYTES:
            self._block, self._counts = offset, {}
        limit = min(end, offset + max_bytes, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)
        data = part.read(offset, limit)
        base = sequence(part.number, self._block)
        before = dict(self._counts)
        batches, used, needed = parse(data, self._names, base, self._counts)
        if not used and needed:  # the first record reaches over the limit
            self._counts = before
            batches, used, needed = parse(part.read(offset, offset + needed), self._names, base, self._counts)
        # Records end before `end` only in a file whose owner died; nothing follows then.
        return batches, offset + used if used else end

    def _read_thin(self, part: ThinPart, max_bytes: int) -> Parcel | None:
        offset = self._at.metrics.offset
        if offset >= PAST_THE_END:
            return None
        data = part.frames()
        events: list[Event] = []
        begin = at = offset - HEADER_BYTES
        for item in read_frames(data[begin : begin + max(max_bytes, THIN_READ_BYTES)], begin):
            if isinstance(item, Incomplete):
                break
            at = item.next_offset
            if isinstance(item, Frame):
                events.append(frame_event(item))
        finished = at >= len(data) or not events
        self._at = End(self._at.control, Position(part.number, PAST_THE_END if finished else at + HEADER_BYTES))
        return self._parcel(events, 0) if events else None

    def _parcel(self, events: list[Event], points: int) -> Parcel:
        size = sum(len(event.body) for event in events)
        return Parcel(events, self._at.control, self._at.metrics, dict(self._counts), self._block, points, size)

    def _recount(self, position: Position) -> None:
        """Count the values of the block that lie before `position`, so that the rest get the seqs they had."""
        part = self._parts.get(position.segment)
        if part is None or isinstance(part, ThinPart):
            return
        offset = HEADER_BYTES
        while offset < position.offset:
            _, offset = self._parse(part, offset, position.offset, BLOCK_BYTES)
        self._acked_block, self._acked_counts = self._block, dict(self._counts)


def frame_event(frame: Frame) -> Event:
    """The event in a frame of ours; one whose schema this version does not know goes to the control stream."""
    from runstream_schemas import codec

    schema = codec.schemas().get(frame.fingerprint)
    if schema is None:
        return Event("control", frame.key, frame.fingerprint, frame.body)
    return Event(
        STREAM_OF[schema.event], frame.key, frame.fingerprint, frame.body, schema.event in FIRST_PARTITION_EVENTS
    )


def _end_of(part: PlainPart | ThinPart) -> int:
    if isinstance(part, ThinPart):
        return PAST_THE_END
    try:
        return part.end()
    except ValueError:
        return HEADER_BYTES
