"""The server's delivery and artifact routes on a real port of this process, over a directory log and nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from runstream.transport import Transport
from runstream.transport.directory import DirectoryTransport
from runstream_query.api import artifacts
from runstream_query.api.artifact_root import ArtifactRoot
from runstream_query.api.backend import Backend
from runstream_query.api.routing import EndpointTable
from runstream_query.server.appender import EventAppender
from runstream_query.server.delivery import Check, Delivery, ServerDescription, checked
from runstream_query.server.problems import answer

from .process import wait_until


@contextmanager
def delivery_server(
    log: Path,
    check: Check = checked,
    *,
    transport: Transport | None = None,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    description: ServerDescription | None = None,
    tls: tuple[Path, Path] | None = None,
    held: dict[str, Any] | None = None,
) -> Iterator[str]:
    """Serve until the end of the block; its URL.

    Args:
        transport: where events go, instead of the directory log.
        wrap: a layer around the routes, for faults.
        tls: certificate and key; the URL is https then.
        held: gets the `backend`.
    """
    held = {} if held is None else held
    ends = DirectoryTransport(log)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        with ThreadPoolExecutor(1) as executor:
            appender = EventAppender(transport or DirectoryTransport(log), immediate=True)
            held["backend"] = Backend(None, appender, ArtifactRoot(str(log.parent / "artifacts")), executor)  # type: ignore[arg-type]
            yield
            appender.close(5.0)
            ends.close(1.0)

    app = FastAPI(lifespan=running)
    delivery = Delivery(
        lambda: held["backend"],
        lambda: description or ServerDescription(),
        lambda: ends.end_positions(5.0),
        None,
        check,
    )
    app.include_router(delivery.router)
    app.router.routes.insert(0, EndpointTable(lambda: held["backend"], artifacts.ENDPOINTS, answer))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        server = uvicorn.Server(
            uvicorn.Config(
                wrap(app),
                log_level="warning",
                access_log=False,
                ws="none",
                ssl_certfile=tls[0] if tls else None,
                ssl_keyfile=tls[1] if tls else None,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started, 20.0, "the delivery server starts")
            yield f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10.0)
            assert not thread.is_alive()
