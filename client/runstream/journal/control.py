"""The control file: encoded control events, in the order of the calls, as frames of `runstream_schemas.segment`.

A file is named by the logical offset of its first byte, so a finished one can go while offsets keep growing. What the
disk refuses waits in memory behind the file's end, under the same offsets.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections import deque
from typing import Final

from runstream_schemas.segment import SUFFIX, base_offset, segment_name

__all__ = ["CONTROL_PREFIX", "ControlFile", "control_base", "control_file"]

CONTROL_PREFIX: Final = "control-"
ROTATE_BYTES: Final = 4 * 1024 * 1024


def control_file(base: int) -> str:
    """File name of the control file whose first byte has logical offset `base`."""
    return CONTROL_PREFIX + segment_name(base)


def control_base(name: str) -> int | None:
    """The inverse of `control_file`; None for other files."""
    if not name.startswith(CONTROL_PREFIX) or not name.endswith(SUFFIX):
        return None
    return base_offset(name.removeprefix(CONTROL_PREFIX))


_sync: Final = getattr(os, "fdatasync", os.fsync)
"""macOS has only fsync."""


class ControlFile:
    """Appended to under the journal's lock; read by the delivery thread without one."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._base = 0
        self._in_file = 0
        """Logical offset behind the last byte in the file."""
        self._waiting: deque[tuple[int, bytes]] = deque()
        """(logical offset, frame) of what the file has not taken."""
        self._arrived: deque[bytes] = deque()
        self._busy = False
        self.end = 0
        """Logical offset behind the last frame."""
        self._fd = -1 if folder is None else self._open(0)

    def _open(self, base: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(f"{self.folder}/{control_file(base)}", flags, 0o600)

    def append(self, frame: bytes) -> OSError | None:
        """Take `frame`; the error if the disk refuses and it is only in memory.

        A signal handler that logs may come in between any two lines. It leaves its frame to the call it interrupted,
        which takes it as soon as the handler returns.
        """
        self._arrived.append(frame)
        error = None
        while self._arrived and not self._busy:
            self._busy = True
            try:
                while self._arrived:
                    taken = self._arrived.popleft()
                    self._waiting.append((self.end, taken))
                    self.end += len(taken)
                error = self.save()
            finally:
                self._busy = False
        return error

    def save(self) -> OSError | None:
        """Move what waits in memory to the file; the error if the disk refuses."""
        if self._fd < 0:
            return None
        while self._waiting:
            offset, frame = self._waiting[0]
            try:
                if os.write(self._fd, frame) != len(frame):
                    os.ftruncate(self._fd, offset - self._base)
                    return OSError("no room for the journal's control events")
            except OSError as exc:
                return exc
            # In this order: a reader in between finds the frame in the file and in memory, at the same offset.
            self._in_file = offset + len(frame)
            self._waiting.popleft()
        return None

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from logical `offset`, whole frames or not.

        Raises:
            OSError: the disk failed.
        """
        waiting = list(self._waiting)
        in_file = self._in_file
        if offset < in_file:
            return os.pread(self._fd, min(size, in_file - offset), offset - self._base)
        first = max(0, bisect_right(waiting, offset, key=lambda item: item[0]) - 1)
        data = bytearray()
        for begin, frame in waiting[first:]:
            data += frame[max(0, offset - begin) :]
            if len(data) >= size:
                break
        return bytes(data[:size])

    def trim(self, acknowledged: int) -> None:
        """Begin a new file if the old one is large and wholly acknowledged; in memory, forget what is acknowledged.

        Raises:
            OSError: no new file can be had; the old one stays in use.
        """
        if self._fd < 0:
            while self._waiting and self._waiting[0][0] + len(self._waiting[0][1]) <= acknowledged:
                self._waiting.popleft()
            return
        if acknowledged < self.end or self._in_file - self._base < ROTATE_BYTES or self._waiting:
            return
        fd = self._open(self._in_file)
        old, self._fd = self._fd, fd
        os.close(old)
        os.unlink(f"{self.folder}/{control_file(self._base)}")
        self._base = self._in_file

    def sync(self) -> None:
        """Make the file safe from power loss.

        Raises:
            OSError: the disk failed.
        """
        if self._fd >= 0:
            _sync(self._fd)

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
