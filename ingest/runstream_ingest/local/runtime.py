"""What runs inside the local store process: engine, worker and HTTP server, from opening to the last commit."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas.layout import DataDirectory, ServerAddress

from .engine import Engine
from .errors import EngineRefused
from .ownership import Ownership

if TYPE_CHECKING:
    from .http import StoreApp
    from .ingest import LocalIngest

__all__ = ["Runtime"]

logger = logging.getLogger(__name__)

_TICK_SECONDS: Final = 0.5
_GRACE_SECONDS: Final = 5
"""How long answers under way may take once the process stops."""
_MAX_STOP_SECONDS: Final = 20.0
"""A query that cannot be killed (a name server that does not answer) does not keep the process for longer."""


class Runtime:
    """One life of the local store process."""

    def __init__(
        self,
        directory: DataDirectory,
        listener: socket.socket,
        idle_exit_seconds: float | None,
        ownership: Ownership,
    ) -> None:
        self._directory = directory
        self._listener = listener
        self._idle_exit_seconds = idle_exit_seconds
        self._ownership = ownership
        self._stopping = threading.Event()
        self._asked_at = time.monotonic()
        self._app: StoreApp | None = None
        self._ingest: LocalIngest | None = None

    def stop(self) -> None:
        """Begin to stop; any thread, any time."""
        self._stopping.set()

    def run(self, say: Callable[[str], None]) -> None:
        """Open, serve until stopped or idle, close.

        Raises:
            LocalStoreError: the store cannot be opened.
            MigrationError: the database is not ours, or newer.
        """
        started = time.monotonic()
        # The main thread never calls the engine: glibc would have to read /proc/self/maps for its stack, which Landlock
        # keeps closed.
        with ThreadPoolExecutor(1, thread_name_prefix="open") as opener:
            opening: Future[Engine] = opener.submit(Engine, self._directory.database)
            # Meanwhile, for the engine takes its time outside of the interpreter's lock.
            from .http import StoreApp, Tokens
            from .ingest import LocalIngest
            from .server import Server

            engine = opening.result()
            try:
                tokens = Tokens(secrets.token_urlsafe(24), secrets.token_urlsafe(24))
                self._ingest = LocalIngest(engine, self._directory)
                opener.submit(self._ingest.prepare).result()
                self._ingest.start()
                try:
                    asyncio.run(self._serve(engine, tokens, StoreApp, Server, say, started))
                finally:
                    self._ingest.stop()
            finally:
                opener.submit(engine.close).result()
                logger.info("stopped")

    async def _serve(
        self,
        engine: Engine,
        tokens: Any,
        make_app: type[StoreApp],
        make_server: Any,
        say: Callable[[str], None],
        started: float,
    ) -> None:
        assert self._ingest is not None
        app = make_app(engine, tokens, status=self._ingest.status, on_request=self._asked)
        self._app = app
        server = make_server(app, self._listener, _GRACE_SECONDS)
        serving = asyncio.create_task(server.serve())
        try:
            await server.started.wait()
            address = self._publish(tokens)
            logger.info(
                "serving %s on port %d after %.2f s", self._directory.root, address.port, time.monotonic() - started
            )
            url = f"http://{address.host}:{address.port}"
            say(f"runstream: serving {self._directory.root} on {url} (process {address.pid})")
            reason = await self._until_done(serving)
            logger.info("stopping: %s", reason)
        finally:
            # No reader shall find us any more; then those who are here.
            self._ownership.withdraw()
            _end_in_any_case()
            server.stop()
            await asyncio.to_thread(app.cancel_all)
            await serving
            await asyncio.to_thread(app.close)

    def _publish(self, tokens: Any) -> ServerAddress:
        host, port = self._listener.getsockname()
        address = ServerAddress(os.getpid(), host, port, tokens.reader, tokens.writer, _version())
        try:
            self._ownership.publish(address)
        except OSError as exc:
            raise EngineRefused(f"{self._directory.server_file} cannot be written: {exc.strerror}") from exc
        return address

    async def _until_done(self, serving: asyncio.Task[None]) -> str:
        assert self._ingest is not None
        while True:
            await asyncio.wait({serving}, timeout=_TICK_SECONDS)
            if self._stopping.is_set():
                return "asked to"
            if serving.done():
                return "the HTTP server ended"
            if not self._ownership.holds():
                return "the data directory was moved or removed"
            if self._idle_exit_seconds is not None and self._idle_seconds() >= self._idle_exit_seconds:
                return f"nothing to do for {self._idle_exit_seconds:g} seconds"

    def _idle_seconds(self) -> float:
        assert self._ingest is not None
        if self._app is not None and self._app.active:
            return 0.0
        return time.monotonic() - max(self._asked_at, self._ingest.active_at())

    def _asked(self) -> None:
        self._asked_at = time.monotonic()


def _end_in_any_case() -> None:
    """End the process hard if it has not ended by itself in time; the store's files take that without harm."""

    def end() -> None:
        logger.warning("something did not stop within %g s; ending all the same", _MAX_STOP_SECONDS)
        os._exit(0)

    timer = threading.Timer(_MAX_STOP_SECONDS, end)
    timer.daemon = True
    timer.start()


def _version() -> str:
    try:
        return version("runstream")
    except PackageNotFoundError:
        return "0+unknown"
