"""What clients ask about the server itself."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from .backend import Backend
from .direct_transfer import capabilities
from .routing import Endpoint
from .wire import JsonResponse

MLFLOW_VERSION: Final = "3.17.2"
"""The release of MLflow whose protocol this server speaks; clients compare it with their own."""


async def _server_info(backend: Backend, request: Request) -> Response:
    return JsonResponse(
        {
            "store_type": "RunstreamStore",
            "workspaces_enabled": False,
            "trace_archival_enabled": False,
            **capabilities(backend),
            "features_enabled": {"gateway": False},
        }
    )


ENDPOINTS = (Endpoint("GET", "/mlflow/server-info", _server_info, versions=("3.0",)),)
