"""Events of the REST protocol: versions, and the encoded form of each write.

Writer is 0 over REST. A metric point's `seq` is the bit pattern of its value, so that equal points collapse and
different ones never do, which is MLflow's own rule; every other event's `seq` is the nanosecond within its
millisecond, so that writes of one machine's servers keep their order.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from runstream.transport import Event
from runstream_schemas import codec
from runstream_schemas.names import FIRST_PARTITION_EVENTS, STREAM_OF, EventName

from .validation import clamp

REST_WRITER: Final = 0
_DOUBLE = struct.Struct("<d")
_LONG = struct.Struct("<q")
_NAN_BITS: Final = _LONG.unpack(_DOUBLE.pack(float("nan")))[0]


class Clock:
    """Strictly increasing (time_ms, seq) pairs near the wall clock; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_ns = 0

    def next(self) -> tuple[int, int]:
        """A version later than every one before it."""
        with self._lock:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            return divmod(self._last_ns, 1_000_000)


def event(name: EventName, key: str, fields: Mapping[str, Any]) -> Event:
    """The encoded event `name`; `key` is the run or experiment id.

    Raises:
        CodecError: a field does not fit (lone surrogates in a string, for one).
    """
    return Event(
        stream=STREAM_OF[name],
        key=key,
        fingerprint=codec.current(name).fingerprint,
        body=codec.encode(name, fields),
        first_partition=name in FIRST_PARTITION_EVENTS,
    )


def value_seq(value: float) -> int:
    """The bit pattern of a clamped value as a signed 64-bit integer; every NaN has the same."""
    return _NAN_BITS if value != value else int(_LONG.unpack(_DOUBLE.pack(value))[0])


def metric_batch(run_id: str, points: Sequence[tuple[str, float, int, int]], sent_at: int) -> Event:
    """One metric batch of (key, value, time in ms, step) points; infinities become the largest doubles."""
    keys: dict[str, int] = {}
    calls: dict[tuple[int, int], int] = {}
    ki: list[int] = []
    ci: list[int] = []
    values: list[float] = []
    for key, value, timestamp, step in points:
        ki.append(keys.setdefault(key, len(keys)))
        ci.append(calls.setdefault((step, timestamp), len(calls)))
        values.append(clamp(value))
    fields = {
        "run_id": run_id,
        "writer": REST_WRITER,
        "first_seq": 0,
        "sent_at": sent_at,
        "keys": list(keys),
        "steps": [step for step, _ in calls],
        "times": [timestamp for _, timestamp in calls],
        "ki": ki,
        "ci": ci,
        "values": values,
        "seqs": [value_seq(value) for value in values],
    }
    return event("metric_batch", run_id, fields)


class EventMaker:
    """Control events with versions from one clock."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()

    def make(self, name: EventName, key: str, /, **fields: Any) -> Event:
        """The event with its version filled in."""
        time_ms, seq = self._clock.next()
        return event(name, key, {**fields, "time_ms": time_ms, "seq": seq, "writer": REST_WRITER})
