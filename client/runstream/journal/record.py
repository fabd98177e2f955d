"""What lies in a segment: records, little-endian, in a file of zeros. Encodes and scans records; knows no files.

A point is 32 bytes: name id (> 0), value, step, time. It is whole if its first and its last field are not zero, for it
is copied by one C call and only a kill can tear it. A call of N values is 24 + 8 N bytes: -(shape id << 32 | crc32),
step, time, values; the checksum decides whether it is whole. A zero where an id should be ends the records.

Time is a double that is never zero: seconds of `time.time()` (> 0), or -1 - milliseconds where the caller gave them,
so that timestamp 0 is legal and the hot path does no arithmetic.

Every value has a `seq`, unique in its journal per run: the word position of the first record of its block (segment
number in the high bits) plus the ordinal of the value among its run's values in that block. It follows from the bytes
alone, so whoever sends a record again, after a crash or in other batches, gives it the same one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Final

from runstream_schemas.limits import MAX_TIME_MS

__all__ = [
    "BLOCK_BYTES",
    "CALL_HEAD",
    "MAX_CALL_BYTES",
    "POINT",
    "WORD",
    "call_packer",
    "call_record",
    "explicit_time",
    "plausible_time",
    "sequence",
    "time_ms",
]

POINT: Final = struct.Struct("<qdqd")
"""name id, value, step, time"""
WORD: Final = struct.Struct("<q")
CALL_HEAD: Final = struct.Struct("<qqd")
"""-(shape id << 32 | crc32), step, time; the values follow"""
VALUE_BYTES: Final = 8
BLOCK_BYTES: Final = 32 * 1024
"""Unit of `seq`: 1,024 points, about the best size of a body."""
MAX_CALL_BYTES: Final = 32 * 1024
"""A larger call is written as single points."""
_SEGMENT_BITS: Final = 20
"""A segment has fewer than 2**20 words (8 MiB)."""


def explicit_time(timestamp_ms: int) -> float:
    """The time field for a time that the caller gave, UTC milliseconds from 0."""
    return -1.0 - timestamp_ms


def time_ms(field: float) -> int:
    """UTC milliseconds of a time field."""
    return int(field * 1000.0) if field > 0.0 else int(-1.0 - field)


def plausible_time(field: float) -> bool:
    """Whether a damaged file can be believed here: no NaN, and within what may be logged."""
    return 0.0 < field < MAX_TIME_MS / 1000.0 or -1.0 - MAX_TIME_MS < field <= -1.0


def sequence(segment: int, offset: int) -> int:
    """`seq` of the first value of a block whose first record starts at byte `offset` of segment number `segment`."""
    return segment << _SEGMENT_BITS | offset >> 3


def call_packer(values: int) -> Callable[..., bytes]:
    """`pack(step, time, *values)`: what follows the first word of a call record."""
    return struct.Struct(f"<qd{values}d").pack


def call_record(shape: int, body: bytes) -> bytes:
    """The whole record of a call; `body` from its shape's packer."""
    return WORD.pack(-(shape << 32 | zlib.crc32(body, shape & 0xFFFFFFFF))) + body


def call_bytes(values: int) -> int:
    """Size of the record of a call with so many values."""
    return CALL_HEAD.size + VALUE_BYTES * values


def call_is_whole(shape: int, record: bytes) -> bool:
    """Whether `record` is a whole call record of `shape`, by its checksum."""
    return int(-WORD.unpack_from(record)[0]) == shape << 32 | zlib.crc32(memoryview(record)[8:], shape & 0xFFFFFFFF)
