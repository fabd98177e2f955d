"""What the end of the process and a fork mean for its recorders: all deliver at exit, none shares with a child."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from typing import Any, Final, Protocol

from .config import Settings
from .delivery import importing

__all__ = ["close_all", "deliver_at_end_of_child", "guard", "join"]

guard: Final = threading.RLock()
"""Held while recorders are looked up or made, and over a fork."""


class Member(Protocol):
    """A recorder, as far as the process's life matters to it."""

    settings: Settings

    def close(self, timeout_seconds: float = ...) -> Any: ...

    def before_fork(self) -> None:
        """Take the locks that a child must find free; only `after_fork_in_parent` releases them."""
        ...

    def after_fork_in_parent(self) -> None: ...

    def after_fork_in_child(self) -> None:
        """Let go of everything that is the parent's; begin with new locks."""
        ...


_members: weakref.WeakSet[Any] = weakref.WeakSet()
_child_registered = 0


def join(member: Member) -> None:
    """Have `member` closed at exit and told of forks, for as long as somebody holds it."""
    _members.add(member)


def close_all(timeout_seconds: float | None = None) -> None:
    """Close every recorder, together within `timeout_seconds`, or each setting's exit time-out. Runs at exit."""
    begun = time.monotonic()
    for member in list(_members):
        limit = member.settings.exit_timeout_seconds if timeout_seconds is None else timeout_seconds
        member.close(max(0.1, limit - (time.monotonic() - begun)))


def deliver_at_end_of_child() -> None:
    """Have a multiprocessing child deliver before it ends: it skips `atexit`."""
    global _child_registered
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if _child_registered != os.getpid() and util is not None and process is not None:
        _child_registered = os.getpid()
        if process.parent_process() is not None:
            util.Finalize(None, close_all, exitpriority=100)


def _before_fork() -> None:
    importing.acquire()
    guard.acquire()
    for member in list(_members):
        member.before_fork()


def _after_fork_in_parent() -> None:
    for member in list(_members):
        member.after_fork_in_parent()
    guard.release()
    importing.release()


def _after_fork_in_child() -> None:
    # The thread that forked is the one that lives on, and it holds all these: releasing is enough.
    guard.release()
    importing.release()
    for member in list(_members):
        member.after_fork_in_child()


# At import, so that it runs after the exit handlers of all who imported us: they may still log.
atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
