"""What lies in a segment: records, little-endian, in a file of zeros. Encodes and decodes; knows no files.

A point is 32 bytes: name id (> 0), value, step, time. It is whole if its first and its last field are not zero, for it is
copied by one C call and only a kill can tear it. A call of N values is 24 + 8 N bytes: -(shape id << 32 | crc32), step,
time, values; the checksum decides whether it is whole. A zero where an id should be ends the records.

Time is a double that is never zero: seconds of `time.time()` (> 0), or -1 - milliseconds where the caller gave them, so
that timestamp 0 is legal and the hot path does no arithmetic.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["CALL_HEAD", "POINT", "WORD", "call_packer", "call_record", "explicit_time", "time_ms"]

POINT: Final = struct.Struct("<qdqd")
"""name id, value, step, time"""
WORD: Final = struct.Struct("<q")
CALL_HEAD: Final = struct.Struct("<qqd")
"""-(shape id << 32 | crc32), step, time; the values follow"""
CALL_HEAD_BYTES: Final = 24
VALUE_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """The keys of one form of `log_metrics` call, and how to pack it."""

    number: int
    pack: Callable[..., bytes]


def explicit_time(timestamp_ms: int) -> float:
    """The time field for a time that the caller gave, UTC milliseconds from 0."""
    return -1.0 - timestamp_ms


def time_ms(field: float) -> int:
    """UTC milliseconds of a time field."""
    return int(field * 1000.0) if field > 0.0 else int(-1.0 - field)


def call_packer(values: int) -> Callable[..., bytes]:
    """`pack(step, time, *values)`: what follows the first word of a call record."""
    return struct.Struct(f"<qd{values}d").pack


def call_record(shape: int, body: bytes) -> bytes:
    """The whole record of a call."""
    return WORD.pack(-(shape << 32 | zlib.crc32(body, shape))) + body
