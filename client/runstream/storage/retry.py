"""Which storage errors are worth another try, and the waiting between tries."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

__all__ = ["RetryPolicy", "is_refused", "is_transient"]

_LOG = logging.getLogger("runstream.artifacts")
T = TypeVar("T")

_PERMANENT_ERRNOS: Final = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOSPC,
        errno.EROFS,
        errno.EDQUOT,
        errno.EFBIG,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.ELOOP,
        errno.EMFILE,
        errno.ENFILE,
    }
)
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
_TRANSIENT_NAMES: Final = frozenset(
    {
        # botocore, aiohttp, requests and httpx: recognised by name, since none of them is a dependency.
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ConnectionClosedError",
        "HTTPClientError",
        "IncompleteReadError",
        "ResponseStreamingError",
        "ClientConnectionError",
        "ClientConnectorError",
        "ClientOSError",
        "ClientPayloadError",
        "ServerDisconnectedError",
        "ServerTimeoutError",
        "ConnectionError",
        "Timeout",
        "ConnectTimeout",
        "ReadTimeout",
        "ChunkedEncodingError",
        "ProtocolError",
        "TransportError",
        "NetworkError",
        "RemoteProtocolError",
        "FSTimeoutError",
    }
)


def is_refused(error: BaseException) -> bool:
    """Whether the other side refused the credentials or the access (HTTP 401 or 403), however deep it lies."""
    return any(_http_status(each) in (401, 403) for each in _chain(error))


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed when it is simply tried again.

    Time-outs, refused and broken connections and HTTP 408, 429 and 5xx are; a missing file, a refused permission, a
    full disk and wrong credentials are not.
    """
    verdicts = (_verdict(each) for each in _chain(error))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what caused it, and so on."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _verdict(error: BaseException) -> bool | None:
    if not isinstance(error, Exception):
        return False
    status = _http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return False
    if any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _PERMANENT_ERRNOS
    return None


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 100 <= status < 600:
                return status
    return None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after which pauses, a transient storage error is tried again."""

    attempts: int = 5
    """Tries in all."""
    first_pause_seconds: float = 0.25
    """Pause before the second try; each later one doubles, with up to half of it taken off at random."""
    max_pause_seconds: float = 8.0
    sleep: Callable[[float], None] = time.sleep

    def call(self, what: str, operation: Callable[[], T]) -> T:
        """`operation()`, tried again while its errors are transient; blocks for the pauses.

        Args:
            what: names the operation in the log line of each retry.

        Raises:
            Exception: the last error, unchanged.
        """
        pause = self.first_pause_seconds
        for attempt in range(1, self.attempts + 1):
            try:
                return operation()
            except Exception as exc:
                if attempt == self.attempts or not is_transient(exc):
                    raise
                wait = pause * random.uniform(0.5, 1.0)
                _LOG.warning("%s failed (%s: %s); trying again in %.1f s", what, type(exc).__name__, exc, wait)
                self.sleep(wait)
                pause = min(pause * 2, self.max_pause_seconds)
        raise AssertionError("unreachable: the loop returns or raises")
