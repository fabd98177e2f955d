"""Segments of a dead journal: what in their bytes is a whole record, and what is damage.

A live segment is believed, because its writer lives. A dead one is checked record by record: the kill may have torn
the last one, which is no damage since its call never returned, and the disk may have done anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from runstream_schemas.segment import Damage, read_frames

from .names import Name
from .record import CALL_HEAD, MAX_CALL_BYTES, POINT, WORD, call_bytes, call_is_whole, plausible_time
from .segment import HEADER, HEADER_BYTES, MAGIC, segment_number
from .source import ThinPart
from .thin import thinned_number

__all__ = ["DeadSegment", "DeadThinned", "dead_segments"]

MAX_SEGMENT_BYTES: Final = 64 * 1024 * 1024
"""A larger file is none of ours."""


class DeadSegment:
    """A `source.PlainPart` over checked bytes; damaged ranges are cut out. Offsets before the first hold."""

    def __init__(self, number: int, path: Path, names: Mapping[int, Name]) -> None:
        self.number = number
        self.path = path
        self._names = names
        self._data: bytes | None = None
        self._end = HEADER_BYTES
        self.damage: list[str] = []

    def check(self, writer: int) -> None:
        """Read and check the file; call once."""
        try:
            with open(self.path, "rb") as file:
                data = file.read(MAX_SEGMENT_BYTES)
        except OSError as exc:
            self.damage.append(f"cannot be read: {exc.strerror}")
            return
        if len(data) < HEADER_BYTES:
            if data.strip(b"\0"):
                self.damage.append(f"only {len(data)} bytes long")
            return
        magic, number, size, owner = HEADER.unpack_from(data)
        if (magic, number, owner) != (MAGIC, self.number, writer):
            self.damage.append("its header is damaged")
        elif size != len(data):
            self.damage.append(f"cut to {len(data)} of {size} bytes")
        whole = _whole_ranges(data, self._names, self.damage)
        if len(whole) == 1 and whole[0][0] == HEADER_BYTES:
            self._end = whole[0][1]
            self._data = data[: self._end]
        else:
            # Joined, so that the reader needs to know nothing of damage.
            self._data = data[:HEADER_BYTES] + b"".join(data[start:end] for start, end in whole)
            self._end = len(self._data)

    def end(self) -> int:
        """See `PlainPart`."""
        return self._end

    def read(self, start: int, end: int) -> bytes:
        """See `PlainPart`."""
        return (self._data or b"")[start : min(end, self._end)]


class DeadThinned(ThinPart):
    """A thinned segment of a dead journal."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.path = path
        self.damage: list[str] = []
        try:
            self._data = path.read_bytes()
        except OSError as exc:
            self._data = b""
            self.damage.append(f"cannot be read: {exc.strerror}")
        for item in read_frames(self._data, 0):
            if isinstance(item, Damage):
                self.damage.append(f"bytes {item.offset} to {item.next_offset} hold no whole batch")

    def frames(self) -> bytes:
        """See `ThinPart`."""
        return self._data


def dead_segments(
    folder: Path, names: Mapping[int, Name], writer: int, first: int, damage: list[str]
) -> dict[int, DeadSegment | DeadThinned]:
    """The segments in `folder` from number `first` on, checked; adds to `damage` what is wrong with them."""
    parts: dict[int, DeadSegment | DeadThinned] = {}
    thinned: dict[int, tuple[int, Path]] = {}
    plain: dict[int, Path] = {}
    for name in os.listdir(folder):
        number = segment_number(name)
        form = thinned_number(name)
        if number is not None and number >= first:
            plain[number] = folder / name
        # Killed between writing a remnant and removing what it came from: take the one with more in it.
        elif form is not None and form[0] >= first and form[1] < thinned.get(form[0], (1 << 62, folder))[0]:
            thinned[form[0]] = (form[1], folder / name)
    for number, (_, path) in thinned.items():
        # Once the thinned form is there, progress is counted in it.
        parts[number] = DeadThinned(number, path)
    for number, path in plain.items():
        if number not in parts:
            segment = DeadSegment(number, path, names)
            segment.check(writer)
            parts[number] = segment
    for _, part in sorted(parts.items()):
        damage += [f"{part.path.name}: {line}" for line in part.damage]
    return parts


def _whole_ranges(data: bytes, names: Mapping[int, Name], damage: list[str]) -> list[tuple[int, int]]:
    """Byte ranges that hold whole records and nothing else."""
    ranges: list[tuple[int, int]] = []
    at, size = HEADER_BYTES, len(data)
    while at < size:
        start = at
        while at < size:
            step = _record_at(data, at, names)
            if not step:
                break
            at += step
        if at > start:
            ranges.append((start, at))
        rest = len(data[at:].rstrip(b"\0"))
        if not rest:
            break
        following = _next_record(data, at, at + rest, names)
        if following is None:
            if rest > MAX_CALL_BYTES or (rest > POINT.size and WORD.unpack_from(data.ljust(at + 8, b"\0"), at)[0] > 0):
                damage.append(f"bytes {at} to {at + rest} hold no whole record")
            break  # else: torn by the kill
        damage.append(f"bytes {at} to {following} hold no whole record")
        at = following
    return ranges


def _record_at(data: bytes, at: int, names: Mapping[int, Name]) -> int:
    """Size of the whole record at `at`, or 0."""
    if len(data) - at < POINT.size:
        return 0
    word = WORD.unpack_from(data, at)[0]
    if word > 0:
        name = names.get(word)
        if name is None or not isinstance(name[1], str) or not plausible_time(POINT.unpack_from(data, at)[3]):
            return 0
        return POINT.size
    if word < 0:
        name = names.get(-word >> 32)
        if name is None or isinstance(name[1], str):
            return 0
        size = call_bytes(len(name[1]))
        record = data[at : at + size]
        if len(record) < size or not call_is_whole(-word >> 32, record):
            return 0
        if not plausible_time(CALL_HEAD.unpack_from(data, at)[2]):
            return 0
        return size
    return 0


def _next_record(data: bytes, at: int, end: int, names: Mapping[int, Name]) -> int | None:
    """Where records go on behind damage. Points are looked for where they would lie if only points were damaged."""
    for candidate in range(at + 8, end, 8):
        size = _record_at(data, candidate, names)
        if not size:
            continue
        is_call = WORD.unpack_from(data, candidate)[0] < 0
        # The checksum proves a call. A point proves little by itself: off the grid, step and value look like one.
        if is_call or ((candidate - at) % POINT.size == 0 and _recent(data, candidate)):
            return candidate
    return None


def _recent(data: bytes, at: int) -> bool:
    when = POINT.unpack_from(data, at)[3]
    return bool(1e9 < when < 1e10 or when <= -1e11)
