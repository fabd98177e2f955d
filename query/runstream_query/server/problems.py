"""Every exception of a handler as an error body: what the caller did, what is busy, and what is a defect of ours."""

from __future__ import annotations

import logging

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from runstream.errors import InvalidInputError, NotFoundError, UnavailableError
from runstream_query.api.errors import ApiError
from runstream_query.api.wire import error_response
from runstream_query.errors import StoreBusy
from runstream_schemas.codec import CodecError

from .appender import AppendRefusedError

logger = logging.getLogger("runstream.server")


def as_api_error(error: Exception) -> ApiError:
    """The error that is told to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AppendRefusedError):
        if error.overloaded:
            return ApiError("REQUEST_LIMIT_EXCEEDED", f"{error}; try again.", retry_after_seconds=1)
        return ApiError("TEMPORARILY_UNAVAILABLE", f"{error}; sending the same again is safe.", retry_after_seconds=2)
    if isinstance(error, CodecError):
        return ApiError("INVALID_PARAMETER_VALUE", "A value cannot be stored: text must be valid Unicode.")
    if isinstance(error, StoreBusy):
        return ApiError("REQUEST_LIMIT_EXCEEDED", str(error), retry_after_seconds=1)
    if isinstance(error, UnavailableError):
        return ApiError("TEMPORARILY_UNAVAILABLE", str(error), retry_after_seconds=2)
    if isinstance(error, InvalidInputError):
        return ApiError("INVALID_PARAMETER_VALUE", str(error))
    if isinstance(error, NotFoundError):
        return ApiError("RESOURCE_DOES_NOT_EXIST", str(error))
    if isinstance(error, ClientDisconnect):
        return ApiError("BAD_REQUEST", "The client left before its request was complete.")
    if isinstance(error, UnicodeError):
        return ApiError("INVALID_PARAMETER_VALUE", "Text must be valid Unicode.")
    logger.error("a request failed", exc_info=error)
    return ApiError("INTERNAL_ERROR", "The server failed at this request; its log says why.")


def answer(error: Exception) -> Response:
    """The response for `error`."""
    return error_response(as_api_error(error))
