"""One segment: a memory-mapped, preallocated file of records, or the same in private memory where no file can be had.

`Segment.write` is the hot path's last call: `mmap.write` reserves, checks bounds and copies in one C call under the
GIL.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable
from typing import Final

__all__ = ["HEADER", "HEADER_BYTES", "MAGIC", "Segment", "segment_file", "segment_number"]

MAGIC: Final = b"RSJRNL01"
HEADER: Final = struct.Struct("<8sqqq")
"""magic, number, size, writer"""
HEADER_BYTES: Final = 64
MAX_SEGMENT_BYTES: Final = 4 * 1024 * 1024
_ZEROS: Final = bytes(256 * 1024)
_SUFFIX: Final = ".seg"
_sync: Final = getattr(os, "fdatasync", os.fsync)
"""macOS has only fsync."""


def segment_file(number: int) -> str:
    """File name of segment `number`."""
    return f"{number:010d}{_SUFFIX}"


def segment_number(name: str) -> int | None:
    """The inverse of `segment_file`; None for other files."""
    stem = name.removesuffix(_SUFFIX)
    return int(stem) if name.endswith(_SUFFIX) and stem.isdecimal() else None


class Segment:
    """Made ahead of need without a number (`prepare`), given one when the journal takes it (`adopt`)."""

    def __init__(self, mapping: mmap.mmap, size: int, path: str | None) -> None:
        self.size = size
        self.number = 0
        self.path = path
        """None: private memory, which dies with the process."""
        self.sealed_at: int | None = None
        """Where its records end, once nothing more can be written."""
        self._map = mapping
        # One object, so that `is` tells a stale one; a bound method is a new object at each access.
        self.write: Callable[[bytes], object] = _locked(mapping.write) if _free_threaded() else mapping.write

    @classmethod
    def prepare(cls, folder: str, size: int) -> Segment:
        """A file of zeros whose pages and disk blocks are there, so that writing to it can neither fault nor fail.

        Raises:
            OSError: no room, read-only, no such folder ...; nothing is left behind.
        """
        path = f"{folder}/spare-{os.urandom(8).hex()}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                # A sparse file on a full disk would kill the process with SIGBUS at the first touch.
                _allocate(fd, size)
                # Written, not touched: pwrite releases the GIL, touching would stall training for milliseconds.
                at = 0
                while at < size:
                    at += os.pwrite(fd, _ZEROS[: size - at], at)
                mapping = mmap.mmap(fd, size)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise
        finally:
            os.close(fd)
        return cls(mapping, size, path)

    @classmethod
    def in_memory(cls, size: int) -> Segment:
        """The same without a file."""
        return cls(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), size, None)

    def adopt(self, folder: str | None, number: int, writer: int) -> None:
        """Give it its place in the journal.

        Raises:
            OSError: it cannot be renamed.
        """
        self.number = number
        self._map.write(HEADER.pack(MAGIC, number, self.size, writer).ljust(HEADER_BYTES, b"\0"))
        if self.path is not None:
            path = f"{folder}/{segment_file(number)}"
            os.rename(self.path, path)
            self.path = path

    def end(self) -> int:
        """Where its whole records end at this moment."""
        return self._map.tell() if self.sealed_at is None else self.sealed_at

    def read(self, start: int, end: int) -> bytes:
        """A copy of the bytes from `start` to `end`."""
        return self._map[start:end]

    def seal(self) -> None:
        """Nothing more can be written: a late `write` raises ValueError, and its caller asks for the new segment."""
        while self.sealed_at is None:
            at = self._map.tell()
            with contextlib.suppress(ValueError):  # another thread wrote in between: look again
                self.write(bytes(self.size - at))
                self.sealed_at = at

    def sync(self) -> None:
        """Make it safe from power loss. Never `mmap.flush`: that holds the GIL, up to 110 ms.

        Raises:
            OSError: the disk failed.
        """
        if self.path is not None:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _sync(fd)
            finally:
                os.close(fd)

    def detach(self) -> None:
        """Unmap, leaving the file: a stale `write` raises ValueError. For a forked child, and before `remove`."""
        self._map.close()

    def remove(self) -> None:
        """Unmap and delete the file, if it is still there."""
        self.detach()
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def _allocate(fd: int, size: int) -> None:
    """Reserve the blocks, where the file system can; elsewhere the zeros that are written next take them."""
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:  # macOS
        return
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _free_threaded() -> bool:
    enabled = getattr(sys, "_is_gil_enabled", None)
    return enabled is not None and not enabled()


def _locked(write: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """`write` made safe where there is no GIL to make reserve-and-copy one step."""
    lock = threading.Lock()

    def locked(record: bytes) -> object:
        with lock:
            return write(record)

    return locked
