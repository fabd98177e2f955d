"""What those who run the server ask: /health, /ready, /version, /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

from runstream_query.api.server_info import MLFLOW_VERSION

from .telemetry import CONTENT_TYPE

if TYPE_CHECKING:
    from .app import Server

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
        self.router = APIRouter()
        self.router.add_api_route("/health", self.health, response_class=PlainTextResponse, methods=["GET"])
        self.router.add_api_route("/version", self.version, response_class=PlainTextResponse, methods=["GET"])
        self.router.add_api_route("/ready", self.ready, response_model=Readiness, methods=["GET"])
        self.router.add_api_route("/metrics", self.metrics, response_class=PlainTextResponse, methods=["GET"])

    async def health(self) -> str:
        """OK while the process answers, as MLflow's server says it."""
        return "OK"

    async def version(self) -> str:
        """The MLflow release whose protocol is spoken, as MLflow's clients expect it."""
        return MLFLOW_VERSION

    async def ready(self) -> Response:
        """200 where writes can be appended and reads answered, 503 otherwise."""
        parts = self._server.parts
        problems = ["starting"] if parts is None else await run_in_threadpool(parts.problems)
        body = Readiness(ready=not problems, problems=problems)
        return JSONResponse(body.model_dump(), status_code=503 if problems else 200)

    async def metrics(self) -> Response:
        """Prometheus metrics of this process."""
        self._server.gather()
        return Response(self._server.telemetry.text(), headers={"Content-Type": CONTENT_TYPE})
