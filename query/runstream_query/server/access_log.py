"""One line per request on standard error, written in bundles by a timer so that a line costs microseconds."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TextIO

from starlette.types import Scope

_UNSAFE = {code: f"\\x{code:02x}" for code in (*range(32), 127)}


class AccessLog:
    """Collects lines and writes them every `interval_seconds`, and at `close`. Used on one event loop."""

    def __init__(self, stream: TextIO | None = None, interval_seconds: float = 0.2) -> None:
        self._stream = stream or sys.stderr
        self._interval_seconds = interval_seconds
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def request(self, scope: Scope, status: int, sent_bytes: int, seconds: float, name: str, request_id: bytes) -> None:
        """Note one request; paths are escaped, query strings (which may hold secrets) left out."""
        client = scope.get("client")
        path = scope["path"].translate(_UNSAFE)
        self._lines.append(
            f"{_stamp()} {client[0] if client else '-'} {name} {scope['method']} {path[:300]} {status} "
            f"{sent_bytes} B {seconds * 1000:.1f} ms {request_id.decode()}\n"
        )
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_seconds, self._flush)

    def _flush(self) -> None:
        self._timer = None
        text, self._lines = "".join(self._lines), []
        try:
            self._stream.write(text.encode("utf-8", "backslashreplace").decode("utf-8"))
            self._stream.flush()
        except (OSError, ValueError):  # the terminal has gone; the server goes on
            return

    def close(self) -> None:
        """Write what is left."""
        if self._timer is not None:
            self._timer.cancel()
        self._flush()


_second = (0, "")


def _stamp() -> str:
    global _second
    now = int(time.time())
    if _second[0] != now:
        _second = (now, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)))
    return _second[1]
