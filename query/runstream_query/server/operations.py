"""What those who run the server ask: /health, /ready, /version, /metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

from runstream_query.api.server_info import MLFLOW_VERSION

from .parts import Parts
from .telemetry import CONTENT_TYPE

if TYPE_CHECKING:
    from .app import Server

logger = logging.getLogger("runstream.server")
_LOOK_SECONDS: Final = 1.0
OPERATIONS: Final = ("/health", "/ready", "/version", "/metrics")


class Readiness(BaseModel):
    """Whether the server can serve now."""

    ready: bool
    problems: list[str] = []
    """What is missing, for people."""


class Operations:
    """The routes, bound to one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._found: list[str] = []
        self._looked_at = -_LOOK_SECONDS
        self._looking: asyncio.Task[None] | None = None
        self.router = APIRouter()
        self.router.add_api_route("/health", self.health, response_class=PlainTextResponse, methods=["GET"])
        self.router.add_api_route("/version", self.version, response_class=PlainTextResponse, methods=["GET"])
        self.router.add_api_route(
            "/ready", self.ready, response_model=Readiness, methods=["GET"], responses={503: {"model": Readiness}}
        )
        self.router.add_api_route("/metrics", self.metrics, response_class=PlainTextResponse, methods=["GET"])

    async def health(self) -> str:
        """OK while the process answers, as MLflow's server says it."""
        return "OK"

    async def version(self) -> str:
        """The MLflow release whose protocol is spoken, as MLflow's clients expect it."""
        return MLFLOW_VERSION

    async def ready(self) -> Response:
        """200 where writes can be appended and reads answered, 503 otherwise."""
        problems = await self._problems()
        if self._server.authenticator.enabled:
            # Anybody may ask: addresses and reasons are for the log.
            problems = [problem.partition(":")[0] for problem in problems]
        body = Readiness(ready=not problems, problems=problems)
        return JSONResponse(body.model_dump(), status_code=503 if problems else 200)

    async def _problems(self) -> list[str]:
        """What is wrong, looked at once a second at most and once at a time, however many ask."""
        parts = self._server.parts
        if parts is None:
            return ["starting"]
        if self._looking is None and time.monotonic() - self._looked_at > _LOOK_SECONDS:
            self._looking = asyncio.get_running_loop().create_task(self._look(parts))
        if self._looking is not None:
            await asyncio.shield(self._looking)
        return self._found

    async def _look(self, parts: Parts) -> None:
        try:
            found = await run_in_threadpool(parts.problems)
        except Exception as exc:
            found = [f"defect: {exc!r}"]
        finally:
            self._looking = None
        if found and found != self._found:
            logger.warning("not ready: %s", "; ".join(found))
        self._found = found
        self._looked_at = time.monotonic()

    async def metrics(self) -> Response:
        """Prometheus metrics of this process."""
        self._server.gather()
        return Response(self._server.telemetry.text(), headers={"Content-Type": CONTENT_TYPE})
