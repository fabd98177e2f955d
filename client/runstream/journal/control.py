"""The control file: encoded control events, in the order of the calls, as frames of `runstream_schemas.segment`.

A file is named by the logical offset of its first byte, so a finished one can go while offsets keep growing. What the
disk refuses waits in memory behind the file's end, under the same offsets.
"""

from __future__ import annotations

import contextlib
import os
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
    """Appended to under the journal's lock; read by the delivery thread."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._base = 0
        self._end = 0
        """Logical offset behind the last byte in the file."""
        self._waiting = bytearray()
        """What the file has not taken, from `_end` on."""
        self._fd = -1 if folder is None else self._open(0)

    def _open(self, base: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(f"{self._folder}/{control_file(base)}", flags, 0o600)

    @property
    def end(self) -> int:
        """Logical offset behind the last frame."""
        return self._end + len(self._waiting)

    def append(self, frame: bytes) -> OSError | None:
        """Take `frame`; the error if the disk refuses and it is only in memory."""
        self._waiting += frame
        return self.save()

    def save(self) -> OSError | None:
        """Move what waits in memory to the file; the error if the disk refuses."""
        if self._fd < 0 or not self._waiting:
            return None
        data = bytes(self._waiting)
        try:
            if os.write(self._fd, data) != len(data):
                os.ftruncate(self._fd, self._end - self._base)
                return OSError("no room for the journal's control events")
        except OSError as exc:
            return exc
        # A signal handler may have been here in between: believe the file, and leave its bytes alone.
        if self._waiting.startswith(data):
            del self._waiting[: len(data)]
        self._end = self._base + os.fstat(self._fd).st_size
        return None

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from logical `offset`, whole frames or not.

        Raises:
            OSError: the disk failed.
        """
        if offset < self._end:
            return os.pread(self._fd, min(size, self._end - offset), offset - self._base)
        at = offset - self._end
        return bytes(self._waiting[at : at + size])

    def trim(self, acknowledged: int) -> None:
        """Begin a new file if the old one is large and wholly acknowledged; in memory, forget what is acknowledged.

        Raises:
            OSError: no new file can be had; the old one stays in use.
        """
        if self._fd < 0:
            gone = acknowledged - self._end
            del self._waiting[:gone]
            self._end += gone
            return
        if acknowledged < self.end or self._end - self._base < ROTATE_BYTES or self._waiting:
            return
        fd = self._open(self._end)
        old, self._fd = self._fd, fd
        os.close(old)
        os.unlink(f"{self._folder}/{control_file(self._base)}")
        self._base = self._end

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
