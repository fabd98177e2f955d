"""uvicorn without its command line, its signal handlers and its traces about connections that we cut on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from .exchange import AnswerCut

__all__ = ["Server"]


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: asyncio.Event) -> None:
        super().__init__(config)
        self._started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process has its own handlers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started.set()


class Server:
    """One HTTP server on one bound socket, in the running event loop."""

    def __init__(self, app: Any, listener: socket.socket, grace_seconds: int) -> None:
        """Args:
        grace_seconds: how long answers under way may take after `stop`.
        """
        self.started = asyncio.Event()
        config = uvicorn.Config(
            app,
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            date_header=False,
            server_header=False,
            backlog=512,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=grace_seconds,
        )
        self._listener = listener
        self._server = _Uvicorn(config, self.started)
        logging.getLogger("uvicorn.error").addFilter(_without_cuts)

    async def serve(self) -> None:
        """Serve until stopped."""
        await self._server.serve([self._listener])

    def stop(self) -> None:
        """Take no more connections, finish the answers under way."""
        self._server.should_exit = True


def _without_cuts(record: logging.LogRecord) -> bool:
    """An answer that breaks in its middle is the query's error, which its client has got: no trace of ours."""
    if record.exc_info and isinstance(record.exc_info[1], AnswerCut):
        return False
    return record.levelno > logging.INFO
