"""The directory log's file format: frames in, frames out, no policy.

A stream is a folder `log/<stream>/` of segment files; each is named by the stream offset of its first byte, 20 digits
and `.log`. An offset is a byte position in the stream, so a reader seeks without an index, and the next segment's name
is the current one's offset plus its size. Appenders hold `flock` on `log/<stream>/lock`; readers take no lock.

Frame, little-endian: magic 4 s, crc32 u32 of all that follows it, body size u32, key size u16, reserved u16 (0),
time_ms i64, fingerprint 8 s, key (UTF-8), body.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAGIC: Final = b"RSF1"
_HEAD: Final = struct.Struct("<4sI")
_META: Final = struct.Struct("<IHHq8s")
HEADER_BYTES: Final = _HEAD.size + _META.size
MAX_FRAME_BODY_BYTES: Final = 64 * 1024 * 1024
"""A larger body size in a header is damage, not a frame."""
SEGMENT_BYTES: Final = 64 * 1024 * 1024
"""An appender starts the next segment once the current one is at least this large."""
SUFFIX: Final = ".log"
_MARK: Final = struct.Struct("<qqq")
_MARK_CHECK: Final = 0x52534D41524B
MARK_BYTES: Final = _MARK.size
"""Size of the mark at the start of a stream's lock file."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One record as it lies in a segment."""

    offset: int
    """Stream offset of its first byte."""
    next_offset: int
    """Stream offset just behind it: where the next frame starts."""
    time_ms: int
    """UTC milliseconds at the appender."""
    fingerprint: bytes
    key: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """A range of bytes that holds no whole frame."""

    offset: int
    next_offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The buffer ends inside a frame, or inside damage whose end is not known yet: ask again with more bytes."""

    offset: int
    wanted_bytes: int
    """Size the buffer should have, counted from `offset`; a lower bound."""


def segment_name(base_offset: int) -> str:
    """File name of the segment whose first byte has stream offset `base_offset`."""
    return f"{base_offset:020d}{SUFFIX}"


def base_offset(name: str) -> int | None:
    """The inverse of `segment_name`; None for any other file."""
    stem = name.removesuffix(SUFFIX)
    return int(stem) if name.endswith(SUFFIX) and len(stem) == 20 and stem.isdecimal() else None


def encode_mark(base: int, size: int) -> bytes:
    """The mark of a stream whose last segment starts at `base` and holds `size` bytes of whole frames."""
    return _MARK.pack(base, size, base ^ size ^ _MARK_CHECK)


def decode_mark(data: bytes) -> tuple[int, int] | None:
    """(base offset of the last segment, size of its whole frames); None for no mark, or one that is half written."""
    if len(data) != MARK_BYTES:
        return None
    base, size, check = _MARK.unpack(data)
    return (base, size) if base ^ size ^ _MARK_CHECK == check else None


def encode_frame(time_ms: int, fingerprint: bytes, key: str, body: bytes) -> bytes:
    """One frame, ready to append."""
    key_bytes = key.encode("utf-8")
    rest = _META.pack(len(body), len(key_bytes), 0, time_ms, fingerprint) + key_bytes + body
    return _HEAD.pack(MAGIC, zlib.crc32(rest)) + rest


def whole_frames(buffer: bytes) -> Iterator[Frame | Damage]:
    """Split `buffer` into frames; ends with a `Damage` at the first byte where none begins or one is cut short.

    Nothing is searched for behind damage, so a hostile buffer costs no more than an honest one.
    """
    view = memoryview(buffer)
    at = 0
    while at < len(view):
        frame = _frame_at(view, at, 0)
        if not isinstance(frame, Frame):
            yield Damage(at, len(view), "no whole frame: magic, size or checksum does not fit")
            return
        yield frame
        at = frame.next_offset


def read_frames(buffer: bytes, offset: int) -> Iterator[Frame | Damage | Incomplete]:
    """Split `buffer`, whose first byte has stream offset `offset`, into frames.

    Damage is skipped up to the next whole frame. The last item is `Incomplete` where the buffer ends inside a frame;
    whether that is a torn tail or one being written only the caller can know.
    """
    view = memoryview(buffer)
    at = 0
    while at < len(view):
        frame = _frame_at(view, at, offset)
        if frame is None:
            found = _resync(buffer, view, at, offset)
            if found < 0:
                yield Incomplete(offset + at, len(view) - at + 1)
                return
            yield Damage(offset + at, offset + found, "no whole frame: magic, size or checksum does not fit")
            at = found
        elif isinstance(frame, Incomplete):
            # A damaged size field looks like an unfinished frame: believe it only if no whole frame follows.
            found = _resync(buffer, view, at, offset)
            if found < 0:
                yield frame
                return
            yield Damage(offset + at, offset + found, "a frame's size reaches over the frames behind it")
            at = found
        else:
            yield frame
            at = frame.next_offset - offset


def _frame_at(view: memoryview, at: int, offset: int) -> Frame | Incomplete | None:
    """The frame at `at`; Incomplete if the buffer ends in it; None if there is none."""
    if len(view) - at < HEADER_BYTES:
        magic = bytes(view[at : at + 4])
        return Incomplete(offset + at, HEADER_BYTES) if MAGIC.startswith(magic) else None
    magic, crc = _HEAD.unpack_from(view, at)
    body_size, key_size, reserved, time_ms, fingerprint = _META.unpack_from(view, at + _HEAD.size)
    if magic != MAGIC or reserved or body_size > MAX_FRAME_BODY_BYTES:
        return None
    key_at = at + HEADER_BYTES
    end = key_at + key_size + body_size
    if end > len(view):
        return Incomplete(offset + at, end - at)
    if zlib.crc32(view[at + _HEAD.size : end]) != crc:
        return None
    key = bytes(view[key_at : key_at + key_size]).decode("utf-8", "replace")
    body = bytes(view[key_at + key_size : end])
    return Frame(offset + at, offset + end, time_ms, fingerprint, key, body)


def _resync(buffer: bytes, view: memoryview, at: int, offset: int) -> int:
    """Position of the next whole frame behind `at`, or -1."""
    found = buffer.find(MAGIC, at + 1)
    while found >= 0:
        if isinstance(_frame_at(view, found, offset), Frame):
            return found
        found = buffer.find(MAGIC, found + 1)
    return -1
