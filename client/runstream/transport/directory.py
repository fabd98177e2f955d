"""The directory log as a transport: frames appended to segment files by many processes, one write per batch.

Appenders of a stream exclude each other by `flock` on `log/<stream>/lock`, which also holds the mark: up to where the
last segment is known to consist of whole frames. An appender that died in the middle leaves bytes behind the mark; the
next one looks at them and cuts off exactly what forms no whole frame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from runstream_schemas.identity import now_ms
from runstream_schemas.names import STREAMS, Stream
from runstream_schemas.segment import (
    MARK_BYTES,
    SEGMENT_BYTES,
    Incomplete,
    base_offset,
    decode_mark,
    encode_frame,
    encode_mark,
    read_frames,
    segment_name,
)

from . import Event, Positions, TransportError

__all__ = ["DirectoryTransport"]

T = TypeVar("T")
LOCK_WAIT_SECONDS: Final = 5.0
_READ_BYTES: Final = 1 << 20
_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_sync: Final = getattr(os, "fdatasync", os.fsync)
"""macOS has only fsync."""


class _Done:
    """The receipt of events that are in the files already."""

    def __init__(self, positions: Positions) -> None:
        self._positions = positions

    def result(self, timeout_seconds: float) -> Positions:
        """See `Receipt`; never waits."""
        return self._positions


class DirectoryTransport:
    """Appends to `log/`; see the module. Nothing is opened before the first call."""

    def __init__(self, log: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """
        Args:
            log: the data directory's `log` folder; made when first needed, with its parents.
            segment_bytes: size at which the next segment begins.
        """
        self._log = log
        self._segment_bytes = segment_bytes
        self._streams = {stream: _Stream(log, stream, segment_bytes) for stream in STREAMS}
        _open.add(self)

    def send(self, events: Sequence[Event]) -> _Done:
        """See `Transport`; the events are in the files when this returns."""
        now = now_ms()
        positions: dict[tuple[Stream, int], int] = {}
        for stream in STREAMS:
            frames = [encode_frame(now, e.fingerprint, e.key, e.body) for e in events if e.stream == stream]
            if frames:
                positions[stream, 0] = self._guarded(self._streams[stream].append, b"".join(frames))
        return _Done(positions)

    def sync(self) -> None:
        """Make what was appended safe from power loss; blocks for as long as the disk takes.

        Raises:
            TransportError: the disk failed.
        """
        for stream in self._streams.values():
            self._guarded(stream.sync)

    def end_positions(self, timeout_seconds: float) -> Positions:
        """See `Transport`. Bytes that a killed appender left without a whole frame are not counted."""
        return {(name, 0): self._guarded(stream.end, timeout_seconds) for name, stream in self._streams.items()}

    def close(self, timeout_seconds: float) -> None:
        """See `Transport`."""
        for stream in self._streams.values():
            stream.close()

    def _guarded(self, call: Callable[..., T], *args: object) -> T:
        try:
            return call(*args)
        except OSError as exc:
            raise TransportError(_explain(exc, self._log), retryable=True) from exc


class _Stream:
    """One stream's folder, from the appender's side."""

    def __init__(self, log: Path, name: Stream, segment_bytes: int) -> None:
        self._folder = log / name
        self._data = log.parent
        self._segment_bytes = segment_bytes
        self._was_there = False
        self._lock_fd = -1
        self._fd = -1
        self._base = 0
        self._size = 0
        """Of the last segment: all of it whole frames, as long as the lock is held."""
        self._unsynced = False
        self._new_entry = False
        self._looked_at = 0.0

    def append(self, data: bytes) -> int:
        """Write whole frames; the stream offset behind them. On an error the file is as it was before."""
        with self._locked(LOCK_WAIT_SECONDS):
            self._find_end(repair=True)
            if self._size >= self._segment_bytes:
                self._start_segment(self._base + self._size)
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._fd, data[written:] if written else data, self._size + written)
            except OSError:
                with contextlib.suppress(OSError):  # else the next appender cuts it off
                    os.ftruncate(self._fd, self._size)
                raise
            self._size += len(data)
            self._mark()
            self._unsynced = True
            return self._base + self._size

    def end(self, timeout_seconds: float) -> int:
        """The stream offset behind the last whole frame."""
        if not self._folder.is_dir():
            if self._was_there:
                raise FileNotFoundError(errno.ENOENT, "the log was removed while in use", str(self._folder))
            return 0
        try:
            with self._locked(min(timeout_seconds, LOCK_WAIT_SECONDS)):
                self._find_end(repair=True)
                return self._base + self._size
        except OSError as exc:
            if exc.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
        return self._end_as_reader()

    def sync(self) -> None:
        if self._unsynced and self._fd >= 0:
            self._unsynced = False
            _sync(self._fd)
            if self._new_entry:
                self._new_entry = False
                _sync_folder(self._folder)

    def close(self) -> None:
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._fd = self._lock_fd = -1

    @contextmanager
    def _locked(self, wait_seconds: float) -> Iterator[None]:
        self._open_lock()
        deadline = time.monotonic() + wait_seconds
        pause = 0.0002
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TransportError(
                        f"the log {self._folder} is locked by another process for {wait_seconds:.0f} s: is one stopped "
                        "in the middle of a write?",
                        retryable=True,
                    ) from None
                time.sleep(pause)
                pause = min(pause * 1.5, 0.005)
        try:
            yield
        finally:
            # Said, not left to close(): a forked child may hold the same open file.
            if self._lock_fd >= 0:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def _open_lock(self) -> None:
        if self._lock_fd >= 0:
            if os.fstat(self._lock_fd).st_nlink and not self._has_moved():
                return
            self.close()
        if self._was_there and not self._data.is_dir():
            # Made anew it would be a log that begins at 0 again, behind the back of whoever reads it.
            raise FileNotFoundError(errno.ENOENT, "the data directory was removed while in use", str(self._data))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self._folder / "lock", _FILE, 0o666)
        self._was_there = True

    def _has_moved(self) -> bool:
        """Whether our open lock is no longer the one at its path: looked at once a second."""
        now = time.monotonic()
        if now - self._looked_at < 1.0:
            return False
        self._looked_at = now
        try:
            there = os.stat(self._folder / "lock")
        except FileNotFoundError:
            return True
        ours = os.fstat(self._lock_fd)
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def _find_end(self, *, repair: bool) -> None:
        """Set `_fd`, `_base` and `_size` to the last segment and its whole frames. Under the lock."""
        marked = self._read_mark()
        if self._fd >= 0:
            status = os.fstat(self._fd)
            if marked == (self._base, status.st_size) and status.st_nlink:
                self._size = status.st_size
                return
        bases = sorted(base for name in os.listdir(self._folder) if (base := base_offset(name)) is not None)
        if not bases:
            self._start_segment(0 if marked is None else marked[0] + marked[1])
            return
        if self._fd < 0 or bases[-1] != self._base or not os.fstat(self._fd).st_nlink:
            self._open_segment(bases[-1], os.O_RDWR | os.O_CLOEXEC)
        size = os.fstat(self._fd).st_size
        start = marked[1] if marked is not None and marked[0] == self._base and marked[1] <= size else 0
        self._size = size if start == size else self._whole(start, size)
        if self._size < size and repair:
            os.ftruncate(self._fd, self._size)
        self._mark()

    def _whole(self, start: int, size: int) -> int:
        """Where the last whole frame at or behind `start` ends."""
        at, wanted = start, _READ_BYTES
        while at < size:
            data = _read(self._fd, at, min(wanted, size - at))
            tail = at
            for item in read_frames(data, at):
                if isinstance(item, Incomplete):
                    break
                tail = item.next_offset
            if tail > at:
                at, wanted = tail, _READ_BYTES
            elif len(data) >= size - at:
                return at
            else:
                wanted *= 2
        return at

    def _end_as_reader(self) -> int:
        """The same for someone who may not write here."""
        bases = sorted(base for name in os.listdir(self._folder) if (base := base_offset(name)) is not None)
        if not bases:
            return 0
        fd = os.open(self._folder / segment_name(bases[-1]), os.O_RDONLY | os.O_CLOEXEC)
        old, self._fd = self._fd, fd
        try:
            return bases[-1] + self._whole(0, os.fstat(fd).st_size)
        finally:
            self._fd = old
            os.close(fd)

    def _start_segment(self, base: int) -> None:
        self._open_segment(base, _FILE)
        self._size = 0
        self._new_entry = True
        self._mark()

    def _open_segment(self, base: int, flags: int) -> None:
        fd = os.open(self._folder / segment_name(base), flags, 0o666)
        old, self._fd = self._fd, fd
        self._base = base
        if old >= 0:
            if self._unsynced:
                _sync(old)
            os.close(old)

    def _read_mark(self) -> tuple[int, int] | None:
        return decode_mark(os.pread(self._lock_fd, MARK_BYTES, 0))

    def _mark(self) -> None:
        # A full disk loses at most the mark: the next appender then looks at the whole segment.
        with contextlib.suppress(OSError):
            os.pwrite(self._lock_fd, encode_mark(self._base, self._size), 0)


def _read(fd: int, at: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(fd, size, at)
        if not part:
            break
        parts.append(part)
        at += len(part)
        size -= len(part)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(exc: OSError, log: Path) -> str:
    what = {
        errno.ENOSPC: "no space left on its disk: free some",
        errno.EDQUOT: "the disk quota is used up: free some",
        errno.EFBIG: "a file there may not grow (ulimit -f): raise the limit",
        errno.EROFS: "its file system is read-only",
        errno.EACCES: "permission denied: make the folder writable for this user",
        errno.EPERM: "not permitted: make the folder writable for this user",
        errno.ENOTDIR: "a file stands where the folder should be: move it away",
        errno.EEXIST: "a file stands where the folder should be: move it away",
        errno.ENOENT: "it was removed while in use: put the data directory back, or restart to begin a new one",
    }.get(exc.errno or 0, exc.strerror or str(exc))
    return f"cannot write the log {log}: {what}"


def _after_fork_in_child() -> None:
    for transport in list(_open):
        for stream in transport._streams.values():
            stream.close()


_open: weakref.WeakSet[DirectoryTransport] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    # A child that kept the lock file open could keep the lock of a parent that was killed while it held it.
    os.register_at_fork(after_in_child=_after_fork_in_child)
