"""Who serves a data directory: `flock` on db/lock, and db/server.json for the readers who look for the owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from typing import Final

from runstream_schemas.layout import DataDirectory, ServerAddress

from .errors import AlreadyRunning, EngineRefused

__all__ = ["Ownership"]

_WAIT_SECONDS: Final = 15.0
"""How long a start waits for an owner that is on its way in or out."""
_RETRY_SECONDS: Final = 0.05


class Ownership:
    """The lock of one data directory, held. The kernel releases it with the process, however that ends."""

    def __init__(self, directory: DataDirectory, file: int) -> None:
        self._directory = directory
        self._file = file

    @classmethod
    def take(cls, directory: DataDirectory, wait_seconds: float = _WAIT_SECONDS) -> Ownership:
        """Become the owner. Waits for an owner that has not published its address yet, or no more, to do or to end.

        Raises:
            AlreadyRunning: another process serves the directory.
            EngineRefused: the directory cannot be made or written.
        """
        try:
            directory.database.mkdir(parents=True, exist_ok=True)
            file = os.open(directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise EngineRefused(_explain(directory, exc)) from exc
        try:
            deadline = time.monotonic() + wait_seconds
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    address = ServerAddress.read(directory.server_file)
                    if address is not None and _listens(address):
                        raise AlreadyRunning(directory.root, address.pid) from None
                    if time.monotonic() > deadline:
                        raise AlreadyRunning(directory.root, _pid_in(file)) from None
                    time.sleep(_RETRY_SECONDS)
                except OSError as exc:
                    raise EngineRefused(f"{directory.lock} cannot be locked: {exc.strerror}") from exc
            ownership = cls(directory, file)
            if not ownership.holds():
                # The folder was moved away or removed while we waited.
                raise EngineRefused(f"{directory.root} was moved or removed meanwhile; start again")
            ownership._begin()
        except BaseException:
            os.close(file)
            raise
        return ownership

    def publish(self, address: ServerAddress) -> None:
        """Tell readers where we are.

        Raises:
            OSError: it cannot be written.
        """
        address.write(self._directory.server_file)

    def holds(self) -> bool:
        """Whether the directory is still where it was: its lock file is the one that we hold."""
        try:
            there = self._directory.lock.stat()
        except OSError:
            return False
        mine = os.fstat(self._file)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def withdraw(self) -> None:
        """Take the address back, so that no reader comes any more."""
        if self.holds():
            with contextlib.suppress(OSError):
                self._directory.server_file.unlink(missing_ok=True)

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, *_: object) -> None:
        self.withdraw()
        os.close(self._file)

    def _begin(self) -> None:
        """Leave our pid in the lock file, for the one who finds it held, and remove a dead owner's address."""
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
            self._directory.server_file.unlink(missing_ok=True)
        except OSError as exc:
            raise EngineRefused(_explain(self._directory, exc)) from exc


def _explain(directory: DataDirectory, exc: OSError) -> str:
    if exc.errno == errno.EROFS or exc.errno in (errno.EACCES, errno.EPERM):
        return f"the data directory {directory.root} is not writable by this user: make it so, or copy it elsewhere"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {directory.root} is full: free some space and start again"
    if exc.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{directory.root} is not a directory"
    return f"the data directory {directory.root} cannot be used: {exc.strerror}"


def _pid_in(file: int) -> int | None:
    text = os.pread(file, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() else None


def _listens(address: ServerAddress) -> bool:
    try:
        with socket.create_connection((address.host, address.port), timeout=2.0):
            return True
    except OSError:
        return False
