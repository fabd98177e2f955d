"""The event log of a data directory: tails `log/<stream>/`, written by any number of appenders (see `segment`).

What it relies on: appenders write whole frames under `flock` on the stream's `lock`, start a new segment only behind a
finished one, and mark in the lock's file up to where they wrote; what lies behind the mark and is no whole frame was
never acknowledged, and is cut off by the next appender. A reader takes the lock only where the log ends inside a frame,
and then does the same.

Positions live in the store (`ingest_positions`) alone. After a reboot the last segments are read again, because a power
cut may have taken bytes that the store already holds and new frames may stand in their place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from runstream_schemas.names import STREAMS, Stream
from runstream_schemas.segment import (
    HEADER_BYTES,
    MAGIC,
    MARK_BYTES,
    Damage,
    Frame,
    Incomplete,
    base_offset,
    decode_mark,
    read_frames,
    segment_name,
)

from . import LogError, LogRecord, Positions, Unreadable
from .watch import Watch

__all__ = ["DirectoryLog", "end_positions", "remove_old_segments", "start_positions"]

CHUNK_BYTES: Final = 2 * 1024 * 1024
"""Most bytes read of one stream in one poll, unless one frame is larger."""
STATE_FILE: Final = "reader.json"
_HEADER: Final = struct.Struct("<4sIIHHq8s")
"""A frame's header in one piece, as `segment` describes it; the checksum covers all behind its 8th byte."""


class DirectoryLog:
    """All streams of one data directory, each with one partition 0. Used by one thread."""

    def __init__(self, root: Path, *, boot_id: str | None = None) -> None:
        """
        Args:
            root: the `log` folder; made if it is missing.
            boot_id: names this start of the machine; None asks the kernel.

        Raises:
            OSError: the folders cannot be made or read.
        """
        self._root = root
        self._boot_id = _boot_id() if boot_id is None else boot_id
        for stream in STREAMS:
            (root / stream).mkdir(parents=True, exist_ok=True)
        self._waiting = frozenset((stream, 0) for stream in STREAMS)
        self._tails: dict[Stream, _Tail] = {}
        self._read_again_until: dict[Stream, int] = {}
        self._watch = Watch([root / stream for stream in STREAMS])
        self._paused = False

    def assigned(self) -> frozenset[tuple[Stream, int]]:
        return self._waiting

    def start(self, positions: Positions) -> None:
        rebooted = _known_boot(self._root) != self._boot_id
        for stream, _ in sorted(self._waiting):
            folder = self._root / stream
            stored = positions.get((stream, 0))
            begin = _oldest(folder)
            if stored is None:
                position = begin
            elif stored > _end(folder):
                # The log lost its end (a power cut) or was put back from a copy. Every frame that is left is read
                # again, which is harmless; new ones must lie behind what the store believes to have read.
                _continue_at(folder, stored)
                position = begin
            else:
                position = _two_segments_back(folder, stored) if rebooted else stored
            if stored is not None and position < stored:
                self._read_again_until[stream] = stored
            self._tails[stream] = _Tail(folder, stream, position)
        self._waiting = frozenset()
        self._remember_boot({})

    def poll(self, timeout_seconds: float) -> Sequence[LogRecord | Unreadable]:
        deadline = time.monotonic() + timeout_seconds
        while True:
            # Events that come while the files are read stay queued and end the wait at once.
            self._watch.clear()
            found: list[LogRecord | Unreadable] = []
            unfinished = False
            if not self._paused:
                for tail in self._tails.values():
                    found += tail.read()
                    unfinished = unfinished or tail.unfinished
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            # A frame in the making: look again soon, its appender may be gone.
            self._watch.wait(min(left, 0.01) if unfinished else left)

    def lost(self) -> frozenset[tuple[Stream, int]]:
        return frozenset()

    def commit(self, positions: Positions) -> None:
        self._remember_boot(positions)

    def identities(self) -> Mapping[Stream, str]:
        return {}  # its segments carry their own mark

    def end_positions(self) -> Positions:
        return end_positions(self._root)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()
        self._tails.clear()
        self._watch.close()

    def _remember_boot(self, positions: Positions) -> None:
        """Once what had to be read again is in the store, this boot needs no second reading."""
        for stream, until in list(self._read_again_until.items()):
            if positions.get((stream, 0), -1) >= until:
                del self._read_again_until[stream]
        if not self._read_again_until and self._boot_id and _known_boot(self._root) != self._boot_id:
            draft = self._root / f".{STATE_FILE}"
            try:
                draft.write_text(json.dumps({"boot_id": self._boot_id}), encoding="utf-8")
                draft.replace(self._root / STATE_FILE)
            except OSError:
                self._boot_id = ""  # a full disk: the next start reads again


class _Tail:
    """Reading position in one stream."""

    def __init__(self, folder: Path, stream: Stream, position: int) -> None:
        self._folder = folder
        self._stream: Stream = stream
        self._position = position
        self._file = -1
        self._base = -1
        self._wanted = CHUNK_BYTES
        self.unfinished = False
        """The last `read` ended inside a frame."""

    def read(self) -> list[LogRecord | Unreadable]:
        """What came since, about `CHUNK_BYTES` at most; does not wait."""
        found: list[LogRecord | Unreadable] = []
        self.unfinished = False
        while not found:
            if self._file < 0 and not self._open(found):
                break
            # Asked before reading: appenders leave a segment only when it is finished.
            following = self._following()
            data = os.pread(self._file, self._wanted, self._position - self._base)
            if following is None and data:
                data = self._acknowledged(data)
            if self._split(data, following, found):
                continue
            if found or following is None or not self._at_end():
                break
            self._leave(following, found)
        return found

    def _acknowledged(self, data: bytes) -> bytes:
        """What of `data`, read at the position, no appender takes back: on a full disk one cuts off what it wrote."""
        marked = _marked_end_now(self._folder, self._base)
        if marked is not None and marked >= self._position + len(data):
            return data
        with _try_lock(self._folder) as lock:
            if lock is not None:
                # Nobody writes. Whole frames behind the mark stay: their writer was killed before it could mark them.
                return os.pread(self._file, self._wanted, self._position - self._base)
        self.unfinished = True
        return b"" if marked is None else data[: max(0, marked - self._position)]

    def _split(self, data: bytes, following: int | None, found: list[LogRecord | Unreadable]) -> bool:
        """Append what `data` holds to `found`; True where the file holds more of an unfinished frame."""
        data_end = self._position + len(data)
        self._wanted = CHUNK_BYTES
        sound = self._sound_frames(data, found)
        # Only what is left goes through the full reader: it makes twice the objects, which shows at small frames.
        for item in read_frames(data[sound:], self._position):
            if isinstance(item, Frame):
                key = item.key.encode("utf-8")
                place = (self._stream, 0, item.offset, item.next_offset)
                found.append(LogRecord(*place, item.time_ms, key, item.fingerprint, item.body))
                self._position = item.next_offset
            elif isinstance(item, Damage):
                found.append(Unreadable(self._stream, 0, item.offset, item.next_offset, item.reason))
                self._position = item.next_offset
            else:
                return self._incomplete(item, data_end, following, found)
        return False

    def _sound_frames(self, data: bytes, found: list[LogRecord | Unreadable]) -> int:
        """Append the whole frames at the beginning of `data` to `found`; how many bytes they are."""
        view = memoryview(data)
        at, first, stream = 0, self._position, self._stream
        while len(data) - at >= HEADER_BYTES:
            magic, crc, body_bytes, key_bytes, reserved, time_ms, fingerprint = _HEADER.unpack_from(data, at)
            body_at = at + HEADER_BYTES + key_bytes
            end = body_at + body_bytes
            if magic != MAGIC or reserved or end > len(data) or zlib.crc32(view[at + 8 : end]) != crc:
                break
            key, body = data[at + HEADER_BYTES : body_at], data[body_at:end]
            found.append(LogRecord(stream, 0, first + at, first + end, time_ms, key, fingerprint, body))
            at = end
        self._position = first + at
        return at

    def _incomplete(
        self, item: Incomplete, data_end: int, following: int | None, found: list[LogRecord | Unreadable]
    ) -> bool:
        """The data ends inside a frame: True to read more, else wait for its appender or set the frame aside."""
        file_end = self._base + os.fstat(self._file).st_size
        if file_end > data_end:
            self._wanted = max(CHUNK_BYTES, item.wanted_bytes, 2 * (data_end - item.offset))
            return True
        if following is not None:
            reason = "a frame was never finished, and writers went on in the next segment"
            found.append(Unreadable(self._stream, 0, item.offset, file_end, reason))
            self._position = file_end
            return False
        with _try_lock(self._folder) as lock:
            if lock is None or self._base + os.fstat(self._file).st_size != file_end:
                self.unfinished = True  # being written
                return False
            marked = _marked_end(lock, self._base)
            if marked is not None and item.offset < marked <= file_end:
                # Acknowledged and damaged since: appenders go on behind the mark.
                found.append(Unreadable(self._stream, 0, item.offset, marked, "an acknowledged frame is damaged"))
                self._position = marked
                return marked < file_end
            # Its writer was killed and nobody was told that it is there. The next appender would cut it off, and write
            # in its place: whoever comes first does it, so that no position ever lies behind what is written next.
            self._cut(item.offset)
        return False

    def _cut(self, offset: int) -> None:
        """Cut the segment at `offset`; under the lock. Where that is not allowed there are no appenders either."""
        with contextlib.suppress(OSError):
            os.truncate(self._folder / segment_name(self._base), offset - self._base)

    def _at_end(self) -> bool:
        return self._position - self._base >= os.fstat(self._file).st_size

    def _open(self, found: list[LogRecord | Unreadable]) -> bool:
        """Open the segment that holds the position, or the next one there is; what is missing goes to `found`."""
        bases = _bases(self._folder)
        holding = [base for base in bases if base <= self._position]
        for base in holding[-1:] + [base for base in bases if base > self._position]:
            try:
                file = os.open(self._folder / segment_name(base), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # retention was faster
            if base != bases[-1] and self._position > base + os.fstat(file).st_size:
                os.close(file)  # ends before the position: the gap reaches to the next one
                continue
            self._file, self._base = file, base
            if base > self._position:
                found.append(Unreadable(self._stream, 0, self._position, base, "removed by retention"))
                self._position = base
            return True
        return False

    def _following(self) -> int | None:
        """Base of the next segment, or None while the current one is the last."""
        return next((base for base in _bases(self._folder) if base > self._base), None)

    def _leave(self, following: int, found: list[LogRecord | Unreadable]) -> None:
        self.close()
        if following > self._position:
            reason = "a segment is missing between this one and the next"
            found.append(Unreadable(self._stream, 0, self._position, following, reason))
            self._position = following

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def end_positions(root: Path) -> dict[tuple[Stream, int], int]:
    """Where each stream ends now, for any process; 0 for one that was never written."""
    return {(stream, 0): _end(root / stream) for stream in STREAMS}


def start_positions(root: Path) -> dict[tuple[Stream, int], int]:
    """Where each stream begins after retention."""
    return {(stream, 0): _oldest(root / stream) for stream in STREAMS}


def remove_old_segments(
    root: Path,
    positions: Mapping[tuple[Stream, int], int],
    *,
    sync: Callable[[], None],
    max_age_seconds: float = 7 * 86_400.0,
    max_bytes: int = 2 * 1024**3,
    now: float | None = None,
) -> int:
    """Remove finished segments whose rows are safely stored and that are older, or more, than is kept.

    Args:
        root: the `log` folder.
        positions: the store's positions (`commit.read_positions`); nothing at or behind them is touched.
        sync: makes the store's files safe from power loss; called once, before anything is removed.
        max_age_seconds: segments last written longer ago go. 7 days.
        max_bytes: of all streams together, oldest first. 2 GiB.

    Returns:
        How many segments were removed.
    """
    now = time.time() if now is None else now
    kept = 0
    removable: list[tuple[float, int, Path]] = []
    for stream in STREAMS:
        folder = root / stream
        bases = _bases(folder)
        for index, base in enumerate(bases):
            path = folder / segment_name(base)
            try:
                state = path.stat()
            except FileNotFoundError:
                continue
            kept += state.st_size
            if index + 1 < len(bases) and bases[index + 1] <= positions.get((stream, 0), 0):
                removable.append((state.st_mtime, state.st_size, path))
    removable.sort()
    going: list[Path] = []
    for modified, size, path in removable:
        if now - modified > max_age_seconds or kept > max_bytes:
            going.append(path)
            kept -= size
    if going:
        sync()
        for path in going:
            path.unlink(missing_ok=True)
    return len(going)


def _bases(folder: Path) -> list[int]:
    try:
        with os.scandir(folder) as entries:
            return sorted(base for base in (base_offset(entry.name) for entry in entries) if base is not None)
    except FileNotFoundError:
        return []


def _oldest(folder: Path) -> int:
    return next(iter(_bases(folder)), 0)


def _end(folder: Path) -> int:
    for base in reversed(_bases(folder)):
        try:
            return base + (folder / segment_name(base)).stat().st_size
        except FileNotFoundError:
            continue
    return 0


def _two_segments_back(folder: Path, position: int) -> int:
    bases = [base for base in _bases(folder) if base <= position]
    return bases[-2] if len(bases) > 1 else (bases[-1] if bases else position)


def _continue_at(folder: Path, position: int) -> None:
    """Make appenders go on at `position`, behind the end of what is there."""
    with _locked(folder):
        if _end(folder) < position:
            try:
                os.close(os.open(folder / segment_name(position), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            except OSError as exc:
                raise LogError(
                    f"the store has read {folder} up to {position}, but the log ends at {_end(folder)}, "
                    f"and a new segment cannot be made there: {exc}"
                ) from exc


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextmanager
def _try_lock(folder: Path) -> Iterator[int | None]:
    """Hold the appenders' lock: its descriptor, or None where somebody else holds it or it cannot be opened."""
    try:
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file
    finally:
        os.close(file)


def _marked_end_now(folder: Path, base: int) -> int | None:
    """`_marked_end` without the lock: a mark that is being written fails its check."""
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _marked_end(lock, base)
    finally:
        os.close(lock)


def _marked_end(lock: int, base: int) -> int | None:
    """Up to where appenders say that the segment at `base` is written, from the lock's content; None if they do not."""
    marked = decode_mark(os.pread(lock, MARK_BYTES, 0))
    return sum(marked) if marked is not None and marked[0] == base else None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _known_boot(root: Path) -> str:
    try:
        return str(json.loads((root / STATE_FILE).read_text(encoding="utf-8"))["boot_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
