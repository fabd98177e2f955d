"""Puts the server together: transport, reader, API, operations, gateway. `create_app` is the one entry."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runstream_query.api import artifacts, experiments, inputs, logged_models, metrics, runs, server_info
from runstream_query.api.backend import Backend
from runstream_query.api.errors import ApiError
from runstream_query.api.routing import Endpoint, EndpointTable
from runstream_query.api.wire import error_response
from runstream_query.store import Locator

from .access_log import AccessLog
from .appender import EventAppender
from .auth import Authenticator
from .gateway import Gateway
from .openapi import describe
from .operations import OPERATIONS, Operations
from .parts import Parts, open_parts
from .problems import answer
from .settings import ServerSettings
from .sql import SqlProxy
from .telemetry import Telemetry

ENDPOINTS: tuple[Endpoint, ...] = (
    *metrics.ENDPOINTS,
    *runs.ENDPOINTS,
    *experiments.ENDPOINTS,
    *inputs.ENDPOINTS,
    *artifacts.ENDPOINTS,
    *logged_models.ENDPOINTS,
    *server_info.ENDPOINTS,
)
"""Every operation of the MLflow-compatible API. The registry adds its own line here."""


class Server:
    """One server process's parts, from its start to its end."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.telemetry = Telemetry()
        self.authenticator = Authenticator(settings.auth_file)
        self.access_log = AccessLog() if settings.access_log else None
        self.parts: Parts | None = None
        self._backend: Backend | None = None
        self._appender: EventAppender | None = None

    def backend(self) -> Backend:
        """The backend, while the server runs."""
        if self._backend is None:
            raise ApiError("TEMPORARILY_UNAVAILABLE", "The server is starting or stopping.", retry_after_seconds=1)
        return self._backend

    def sql_locator(self) -> Locator | None:
        """Who answers SQL over HTTP."""
        return None if self.parts is None else self.parts.sql

    def wait(self) -> None:
        """Return once everything logged before the call is visible; blocks."""
        if self.parts is not None:
            self.parts.reading.wait()

    def gather(self) -> None:
        """Bring the gauges up to date."""
        if self._appender is not None:
            self.telemetry.queued_bytes.set(self._appender.queued_bytes)
            self.telemetry.appended_events.set(self._appender.appended_events)
        if self._backend is not None:
            self.telemetry.waiting_reads.set(self._backend.waiting_reads)

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Open everything, serve, and close it in the opposite order; what was accepted is in the log then."""
        settings = self.settings
        executor = ThreadPoolExecutor(settings.read_threads, thread_name_prefix="runstream-read")
        parts = self.parts = open_parts(settings)
        try:
            self._appender = EventAppender(parts.transport, immediate=parts.immediate)
            self._backend = Backend(
                parts.reading,
                self._appender,
                parts.artifacts,
                executor,
                max_waiting_reads=settings.max_waiting_reads,
                max_artifact_bytes=settings.max_artifact_bytes,
                spool_folder=parts.spool_folder,
            )
            executor.submit(parts.warm)
            yield
        finally:
            self._backend = None
            if self._appender is not None:
                self._appender.close(settings.shutdown_seconds)
            executor.shutdown(wait=True, cancel_futures=True)
            parts.close()
            if self.access_log is not None:
                self.access_log.close()


async def _http_problem(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 404:
        return error_response(ApiError("ENDPOINT_NOT_FOUND", "There is nothing at this path."))
    detail = str(error.detail) if isinstance(error, HTTPException) else "The server failed."
    return error_response(ApiError("BAD_REQUEST", detail, status=status))


async def _defect(_: Request, error: Exception) -> Response:
    return answer(error)


def create_app(settings: ServerSettings) -> ASGIApp:
    """The whole server as an ASGI application."""
    server = Server(settings)
    app = FastAPI(
        title="runstream",
        lifespan=server.running,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        root_path=settings.root_path,
        exception_handlers={HTTPException: _http_problem, Exception: _defect},
    )
    table = EndpointTable(server.backend, ENDPOINTS, answer)
    app.router.routes.insert(0, table)
    app.include_router(Operations(server).router)
    app.router.routes.extend(SqlProxy(server.sql_locator, server.wait).routes())
    describe(app, ENDPOINTS)
    return Gateway(app, settings, server.authenticator, server.telemetry, server.access_log)


def from_environment() -> ASGIApp:
    """The application that a worker process serves: its settings come from RUNSTREAM_SERVER_* variables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return create_app(ServerSettings())


__all__ = ["ENDPOINTS", "OPERATIONS", "Server", "create_app", "from_environment"]
