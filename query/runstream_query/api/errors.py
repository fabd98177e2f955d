"""The error body of every MLflow-compatible route: `{"error_code": ..., "message": ...}` with MLflow's status codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

ErrorCode = Literal[
    "INTERNAL_ERROR",
    "INVALID_STATE",
    "NOT_IMPLEMENTED",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_CONFLICT",
    "ENDPOINT_NOT_FOUND",
    "RESOURCE_DOES_NOT_EXIST",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_PARAMETER_VALUE",
]

STATUS_OF: Final[Mapping[str, int]] = {
    "INTERNAL_ERROR": 500,
    "INVALID_STATE": 500,
    "NOT_IMPLEMENTED": 501,
    "TEMPORARILY_UNAVAILABLE": 503,
    "REQUEST_LIMIT_EXCEEDED": 429,
    "RESOURCE_CONFLICT": 409,
    "ENDPOINT_NOT_FOUND": 404,
    "RESOURCE_DOES_NOT_EXIST": 404,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 401,
    "BAD_REQUEST": 400,
    "RESOURCE_ALREADY_EXISTS": 400,
    "INVALID_PARAMETER_VALUE": 400,
}
"""HTTP status of each error code, as MLflow's server answers; its clients retry 429, 500, 502, 503 and 504."""


class ApiError(Exception):
    """A request that is answered with an error code instead of a result."""

    def __init__(
        self, code: ErrorCode, message: str, *, status: int | None = None, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.status = STATUS_OF[code] if status is None else status
        self.retry_after_seconds = retry_after_seconds


def invalid(message: str) -> ApiError:
    """400 INVALID_PARAMETER_VALUE."""
    return ApiError("INVALID_PARAMETER_VALUE", message)


def missing_resource(message: str) -> ApiError:
    """404 RESOURCE_DOES_NOT_EXIST."""
    return ApiError("RESOURCE_DOES_NOT_EXIST", message)
