"""Dead letters: bodies that can never be stored, kept with the reason and where they came from.

`DeadLetters` is the seam; the directory version lies beside the log it serves, the Kafka version under `log/`. Which
bodies are dead is decided in `batch.py` (without decoding) and `commit.py` (by the store); `replay.py` tries again.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from runstream_schemas.names import DEAD_LETTERS, Stream
from runstream_schemas.segment import (
    SEGMENT_BYTES,
    Frame,
    Incomplete,
    base_offset,
    encode_frame,
    read_frames,
    segment_name,
)

__all__ = ["DeadLetter", "DeadLetters", "DirectoryDeadLetters", "Source"]

_META_SIZE: Final = struct.Struct("<I")
_NO_FINGERPRINT: Final = bytes(8)
_READ_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """Where a refused record lay in the log. Identifies its dead letter: a replayed worker may write it twice."""

    stream: Stream
    partition: int
    offset: int
    time_ms: int
    """The record's own log time, UTC milliseconds."""

    def __str__(self) -> str:
        return f"{self.stream}/{self.partition}/{self.offset}/{self.time_ms}"

    @classmethod
    def parse(cls, text: str) -> Source:
        """The inverse of `str`.

        Raises:
            ValueError: not such a text.
        """
        stream, partition, offset, time_ms = text.split("/")
        if stream not in ("control", "metrics"):
            raise ValueError(f"unknown stream {stream!r}")
        return cls("control" if stream == "control" else "metrics", int(partition), int(offset), int(time_ms))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One refused record, whole."""

    source: Source
    next_offset: int
    """Behind the record, or behind the unreadable range."""
    reason: str
    key: bytes | None = None
    fingerprint: bytes | None = None
    body: bytes | None = None
    """None: the record had no value, or the range could not be read."""
    replayed: bool = False
    """Set on reading: its data reached the store later."""


class DeadLetters(Protocol):
    """Keeps dead letters. Called by one thread."""

    def put(self, letters: Sequence[DeadLetter]) -> None:
        """Keep `letters`; returns once they are as durable as the log itself. The same letter again is no error.

        Raises:
            OSError or an IngestError: none or some were kept; put all of them again.
        """
        ...

    def letters(self) -> Iterator[DeadLetter]:
        """Every letter once (per source), oldest first, with `replayed` as marked."""
        ...

    def mark_replayed(self, sources: Sequence[Source]) -> None:
        """Remember that these letters' data reached the store."""
        ...

    def close(self) -> None: ...


class DirectoryDeadLetters:
    """Dead letters of a data directory: frames in `log/dead-letters`, in the format of the log itself.

    A frame's key is the source, its body a JSON object (its size in front, u32 little-endian) and the refused body.
    """

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: the `log` folder; the stream's own folder is made with the first letter.
        """
        self._folder = root / DEAD_LETTERS

    def put(self, letters: Sequence[DeadLetter]) -> None:
        self._append([_frame_of(letter) for letter in letters])

    def letters(self) -> Iterator[DeadLetter]:
        # Two passes: the marks stand behind the letters, and bodies are too large to hold them all.
        replayed = {source for source, meta, _ in self._frames() if meta.get("replayed")}
        seen: set[str] = set()
        for source, meta, frame in self._frames():
            if meta.get("replayed") or source in seen:
                continue
            seen.add(source)
            yield replace(_letter_of(source, meta, frame), replayed=source in replayed)

    def mark_replayed(self, sources: Sequence[Source]) -> None:
        now = time.time_ns() // 1_000_000
        meta = _packed({"replayed": True})
        self._append([encode_frame(now, _NO_FINGERPRINT, str(source), meta) for source in sources])

    def close(self) -> None:
        """Nothing is held open."""

    def _append(self, frames: Sequence[bytes]) -> None:
        if not frames:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self._last_segment()
            with open(path, "ab", buffering=0) as file:
                data = b"".join(frames)
                while data:
                    data = data[file.write(data) :]
                os.fdatasync(file.fileno())
        finally:
            os.close(lock)

    def _segments(self) -> list[Path]:
        try:
            return sorted(path for path in self._folder.iterdir() if base_offset(path.name) is not None)
        except FileNotFoundError:
            return []

    def _last_segment(self) -> Path:
        segments = self._segments()
        if not segments:
            return self._folder / segment_name(0)
        last = segments[-1]
        size = last.stat().st_size
        if size < SEGMENT_BYTES:
            return last
        return self._folder / segment_name((base_offset(last.name) or 0) + size)

    def _frames(self) -> Iterator[tuple[str, dict[str, Any], Frame]]:
        for path in self._segments():
            with open(path, "rb") as file:
                rest = b""
                at = base_offset(path.name) or 0
                while True:
                    data = file.read(_READ_BYTES)
                    buffer = rest + data
                    rest = b""
                    for item in read_frames(buffer, at):
                        if isinstance(item, Incomplete):
                            rest = buffer[item.offset - at :]
                            break
                        if isinstance(item, Frame):
                            parsed = _parsed(item)
                            if parsed is not None:
                                yield item.key, parsed, item
                    at += len(buffer) - len(rest)
                    if not data:
                        break


def _packed(meta: dict[str, Any]) -> bytes:
    text = json.dumps(meta, ensure_ascii=True).encode("ascii")
    return _META_SIZE.pack(len(text)) + text


def _parsed(frame: Frame) -> dict[str, Any] | None:
    try:
        [size] = _META_SIZE.unpack_from(frame.body)
        meta = json.loads(frame.body[_META_SIZE.size : _META_SIZE.size + size])
        Source.parse(frame.key)
    except (ValueError, struct.error):
        return None
    return meta if isinstance(meta, dict) else None


def _frame_of(letter: DeadLetter) -> bytes:
    meta = {
        "reason": letter.reason,
        "next_offset": letter.next_offset,
        "key": None if letter.key is None else letter.key.hex(),
        "fingerprint": None if letter.fingerprint is None else letter.fingerprint.hex(),
        "has_body": letter.body is not None,
    }
    mark = letter.fingerprint if letter.fingerprint is not None and len(letter.fingerprint) == 8 else _NO_FINGERPRINT
    now = time.time_ns() // 1_000_000
    return encode_frame(now, mark, str(letter.source), _packed(meta) + (letter.body or b""))


def _letter_of(source: str, meta: dict[str, Any], frame: Frame) -> DeadLetter:
    [size] = _META_SIZE.unpack_from(frame.body)
    key, fingerprint = meta.get("key"), meta.get("fingerprint")
    return DeadLetter(
        Source.parse(source),
        int(meta.get("next_offset", 0)),
        str(meta.get("reason", "")),
        None if key is None else bytes.fromhex(key),
        None if fingerprint is None else bytes.fromhex(fingerprint),
        frame.body[_META_SIZE.size + size :] if meta.get("has_body") else None,
    )
