"""Waiting for files to grow: inotify where the kernel has it, else a look every 50 ms."""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["Watch"]

_IN_MODIFY: Final = 0x2
_IN_MOVED_TO: Final = 0x80
_IN_CREATE: Final = 0x100
_LOOK_SECONDS: Final = 0.05


class Watch:
    """Tells that something was written in one of some folders. Used by one thread."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Where inotify is missing or exhausted (a limit per user), `wait` falls back to short sleeps."""
        self._fd = _inotify(folders)

    @property
    def notified(self) -> bool:
        """Whether the kernel tells of changes."""
        return self._fd >= 0

    def clear(self) -> None:
        """Forget changes up to now."""
        if self._fd >= 0:
            while True:
                try:
                    if len(os.read(self._fd, 65_536)) < 32_768:
                        return
                except BlockingIOError:
                    return

    def wait(self, timeout_seconds: float) -> None:
        """Return at the next change since `clear`, or after the time; without inotify after 50 ms at most."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            poll.poll(timeout_seconds * 1000)
        else:
            time.sleep(min(timeout_seconds, _LOOK_SECONDS))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _inotify(folders: Sequence[Path]) -> int:
    """A descriptor that watches `folders`, or -1."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    except (OSError, AttributeError):
        return -1
    if fd < 0:
        return -1
    for folder in folders:
        if libc.inotify_add_watch(fd, os.fsencode(folder), _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE) < 0:
            os.close(fd)
            return -1
    return fd
