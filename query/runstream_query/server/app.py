"""Puts the server together: transport, reader, API, operations, gateway. `create_app` is the one entry."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runstream.transport import Positions, TransportError
from runstream_query.api import (
    artifacts,
    direct_transfer,
    experiments,
    inputs,
    logged_models,
    metrics,
    runs,
    server_info,
)
from runstream_query.api.backend import Backend
from runstream_query.api.errors import ApiError
from runstream_query.api.routing import Endpoint, EndpointTable
from runstream_query.api.wire import error_response, json_fields
from runstream_query.local import IDLE_EXIT_SECONDS
from runstream_query.store import Locator

from .access_log import AccessLog
from .appender import EventAppender
from .audit import Act, Audit
from .auth import AuthFile, AuthFileError
from .authenticator import Authenticator
from .delivery import Delivery, ServerDescription
from .delivery_guard import DeliveryGuard
from .description import describe_server
from .gateway import Gateway
from .login import Login
from .openapi import describe
from .operations import OPERATIONS, Operations
from .parts import Parts, open_parts
from .permission import Call, Owner, perform_limited
from .principal import Principal
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
    *direct_transfer.ENDPOINTS,
    *logged_models.ENDPOINTS,
    *server_info.ENDPOINTS,
)
"""Every operation of the MLflow-compatible API. The registry adds its own line here."""


_AUDITED: Mapping[tuple[str, str], Act] = {
    ("POST", "/mlflow/experiments/delete"): "delete",
    ("POST", "/mlflow/experiments/restore"): "restore",
    ("POST", "/mlflow/experiments/update"): "rename",
    ("POST", "/mlflow/runs/delete"): "delete",
    ("POST", "/mlflow/runs/restore"): "restore",
    ("DELETE", "/mlflow/logged-models/{model_id}"): "delete",
    ("DELETE", "/mlflow-artifacts/artifacts/{path:path}"): "delete",
}
"""Operations of which an audit line tells."""


async def _about(request: Request) -> str:
    """What an audited request was about, from its body: ids, never values."""
    try:
        fields = json_fields(await request.body())
    except ApiError:
        return ""
    named = (fields.get(name) for name in ("run_id", "runId", "run_uuid", "experiment_id", "experimentId"))
    return next((value for value in named if isinstance(value, str)), "")


class Server:
    """One server process's parts, from its start to its end."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.telemetry = Telemetry()
        self.audit = Audit(settings.audit_file)
        self.authenticator = Authenticator(
            settings.auth_file, lambda change: self.audit.note("users-changed", None, about=change)
        )
        self.access_log = AccessLog() if settings.access_log else None
        self.parts: Parts | None = None
        self._backend: Backend | None = None
        self._appender: EventAppender | None = None

    def backend(self) -> Backend:
        """The backend, while the server runs."""
        if self._backend is None:
            raise ApiError("TEMPORARILY_UNAVAILABLE", "The server is starting or stopping.", retry_after_seconds=1)
        return self._backend

    async def perform(self, endpoint: Endpoint, backend: Backend, request: Request) -> Response:
        """Run one operation of the MLflow API: within the caller's permissions, and noted where it is worth it."""
        scope = request.scope
        principal: Principal = scope["runstream_principal"]
        try:
            if principal.restricted:
                response = await perform_limited(Call(endpoint, backend, request, principal, self.owner_of(principal)))
            else:
                response = await endpoint.handler(backend, request)
        except ApiError as exc:
            if exc.status == 403:
                self.audit.note("denied", scope, status=403, reason=exc.message)
            raise
        act = _AUDITED.get((endpoint.method, endpoint.path))
        if act is not None:
            self.audit.note(act, scope, status=response.status_code, about=await _about(request))
        return response

    def owner_of(self, principal: Principal) -> Owner | None:
        """How an experiment becomes the property of `principal`; None where the auth file cannot be written."""
        path = self.settings.auth_file
        if path is None or not principal.may("write") or not os.access(path.parent, os.W_OK):
            return None

        async def own(name: str, experiment_id: str) -> bool:
            def grant(content: AuthFile) -> None:
                content.grant(name, "manage", experiment_id)

            try:
                await run_in_threadpool(AuthFile.change, path, grant)
            except AuthFileError as exc:
                logger.error("%s does not own experiment %s: %s", name, experiment_id, exc)
                return False
            self.authenticator.follow_file(now=True)
            self.audit.note("grant", None, who=name, permission="manage", experiment=experiment_id)
            return True

        return own

    def sql_locator(self) -> Locator | None:
        """Who answers SQL over HTTP."""
        return None if self.parts is None else self.parts.sql

    def wait(self) -> None:
        """Return once everything logged before the call is visible; blocks."""
        if self.parts is not None:
            self.parts.reading.wait()

    def description(self) -> ServerDescription:
        """What our own clients are told; blocks."""
        if self.parts is None:
            raise ApiError("TEMPORARILY_UNAVAILABLE", "The server is starting or stopping.", retry_after_seconds=1)
        return describe_server(self.settings, self.parts.addresses)

    def log_ends(self) -> Positions:
        """Where the log ends; blocks."""
        if self.parts is None:
            raise ApiError("TEMPORARILY_UNAVAILABLE", "The server is starting or stopping.", retry_after_seconds=1)
        try:
            return self.parts.ends.read()
        except (TransportError, OSError) as exc:
            raise ApiError("TEMPORARILY_UNAVAILABLE", f"event log: {exc}", retry_after_seconds=2) from exc

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
            keeping = asyncio.create_task(_keep_store(parts))
            try:
                yield
            finally:
                keeping.cancel()
        finally:
            self._backend = None
            if self._appender is not None:
                self._appender.close(settings.shutdown_seconds)
            executor.shutdown(wait=True, cancel_futures=True)
            parts.close()
            self.authenticator.close()
            self.audit.close()
            if self.access_log is not None:
                self.access_log.close()


logger = logging.getLogger("runstream.server")

KEEP_STORE_SECONDS: Final = IDLE_EXIT_SECONDS / 3


async def _keep_store(parts: Parts) -> None:
    while True:
        await asyncio.sleep(KEEP_STORE_SECONDS)
        await asyncio.to_thread(parts.keep_store)


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
        exception_handlers={HTTPException: _http_problem, Exception: _defect},
    )
    table = EndpointTable(server.backend, ENDPOINTS, answer, server.perform)
    app.router.routes.insert(0, table)
    app.include_router(Operations(server).router)
    app.router.routes.extend(Login(server).routes())
    guard = DeliveryGuard(server.backend, server.owner_of, server.audit)
    app.include_router(Delivery(server.backend, server.description, server.log_ends, guard).router)
    sql_turns = max(1, settings.max_sql_queries // settings.workers)
    app.router.routes.extend(SqlProxy(server.sql_locator, server.wait, sql_turns).routes())
    describe(app, ENDPOINTS)
    front = table.in_front_of(app, settings.root_path)
    return Gateway(front, settings, server.authenticator, server.telemetry, server.access_log, server.audit)


__all__ = ["ENDPOINTS", "OPERATIONS", "Server", "create_app"]
