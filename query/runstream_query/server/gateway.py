"""The one ASGI layer around the application: everything that holds for each request, in one pass.

In order: request id, Host header, cross-origin writes, load limit, authentication and role, body size, time limit;
then security headers, counters and the access line on the way out. `/health` and `/ready` need no authentication.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runstream_query.api.errors import ApiError
from runstream_query.api.wire import error_response

from .access_log import AccessLog
from .auth import ANONYMOUS, Authenticator, Principal, Role
from .settings import ServerSettings
from .telemetry import Telemetry

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/version", "/ping"})
_UPLOADS: Final = "/mlflow-artifacts/artifacts/"
_WRITING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_REQUEST_ID = re.compile(rb"[\w-]{1,64}\Z")
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")
_SECURITY_HEADERS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_READING_POSTS: Final = ("/search", "/search-datasets")


class _BodyTooLargeError(Exception):
    pass


class _DisconnectedError(Exception):
    pass


def needed_role(method: str, path: str) -> Role:
    """The role that a request needs: writing methods write, but searches sent by POST and SQL read."""
    if method not in _WRITING or path.endswith(_READING_POSTS) or path == "/":
        return "read"
    return "write"


class Gateway:
    """Wraps the application. One per server process."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        authenticator: Authenticator,
        telemetry: Telemetry,
        access_log: AccessLog | None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._authenticator = authenticator
        self._telemetry = telemetry
        self._access_log = access_log
        self._in_work = 0
        self._ids = itertools.count()
        self._id_prefix = secrets.token_hex(4)
        self._any_host = "*" in settings.allowed_hosts
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other kinds of scopes pass."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(self, scope, receive, send)
        started = time.perf_counter()
        try:
            await exchange.run()
        finally:
            seconds = time.perf_counter() - started
            self._telemetry.request(scope["method"], exchange.status, seconds)
            if self._access_log is not None:
                self._access_log.request(
                    scope, exchange.status, exchange.sent_bytes, seconds, exchange.name, exchange.id
                )

    def new_id(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """The request's id: the client's own if it is harmless, a fresh one otherwise."""
        for name, value in headers:
            if name == b"x-request-id" and _REQUEST_ID.match(value):
                return value
        return f"{self._id_prefix}-{next(self._ids):x}".encode()

    def host_allowed(self, host: str) -> bool:
        """Whether a Host header names this server: guards against DNS rebinding."""
        if self._any_host:
            return True
        host = host.lower()
        if host in self._hosts:
            return True
        name = host.rsplit(":", 1)[0] if re.search(r":\d+\Z", host) else host
        if name in _LOCAL_NAMES or name in self._hosts:
            return True
        return not self._settings.loopback and name == self._settings.host

    def origin_allowed(self, origin: str, host: str, scheme: str) -> bool:
        """Whether a page of `origin` may send writing requests here: our own pages, and those that are configured."""
        if origin in self._settings.allowed_origins:
            return True
        return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


class _Exchange:
    """One request and its answer."""

    __slots__ = (
        "_gateway",
        "_receive",
        "_received",
        "_scope",
        "_send",
        "_started",
        "id",
        "name",
        "sent_bytes",
        "status",
    )

    def __init__(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway = gateway
        self._scope = scope
        self._receive = receive
        self._send = send
        self._received = 0
        self._started = False
        self.id = gateway.new_id(scope["headers"])
        self.name = "-"
        self.status = 0
        self.sent_bytes = 0

    async def run(self) -> None:
        gateway = self._gateway
        scope = self._scope
        scope["runstream_request_id"] = self.id.decode()
        upload = _UPLOADS in scope["path"] and scope["method"] == "PUT"
        if gateway._in_work >= gateway._settings.max_requests:
            await self._refuse(
                ApiError("TEMPORARILY_UNAVAILABLE", "The server is at its limit of requests.", retry_after_seconds=1)
            )
            return
        gateway._in_work += 1
        gateway._telemetry.in_work.set(gateway._in_work)
        try:
            problem = await self._admit(upload)
            if problem is not None:
                await self._refuse(problem)
            elif upload:
                await gateway._app(scope, self._receive_upload, self._forward)
            else:
                async with asyncio.timeout(gateway._settings.request_timeout_seconds):
                    await gateway._app(scope, self._receive_body, self._forward)
        except _BodyTooLargeError:
            limit = gateway._settings.max_body_bytes
            await self._refuse(
                ApiError("INVALID_PARAMETER_VALUE", f"The request body is larger than {limit} bytes.", status=413)
            )
        except TimeoutError:
            await self._refuse(ApiError("TEMPORARILY_UNAVAILABLE", "The request took too long.", retry_after_seconds=5))
        finally:
            gateway._in_work -= 1
            gateway._telemetry.in_work.set(gateway._in_work)

    async def _admit(self, upload: bool) -> ApiError | None:
        """Why the request is refused; None if it may go on."""
        gateway, scope = self._gateway, self._scope
        host = origin = authorization = None
        length = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"authorization":
                authorization = value.decode("latin-1")
            elif name == b"content-length":
                length = value
        path, method = scope["path"], scope["method"]
        if path in OPEN_PATHS:
            return None
        if host is None or not gateway.host_allowed(host):
            return ApiError(
                "PERMISSION_DENIED",
                f"The Host header {host!r} does not name this server: start it with --allowed-hosts to accept it.",
            )
        if origin is not None and method in _WRITING and not gateway.origin_allowed(origin, host, scope["scheme"]):
            return ApiError("PERMISSION_DENIED", f"Pages of {origin!r} may not write here (--allowed-origins).")
        principal = await self._principal(authorization)
        if principal is None:
            return ApiError(
                "UNAUTHENTICATED",
                "Authenticate with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
            )
        self.name = principal.name
        scope["runstream_principal"] = principal
        role = needed_role(method, path)
        if not principal.may(role):
            return ApiError("PERMISSION_DENIED", f"This needs the role {role}; {principal.name} has {principal.role}.")
        if not upload and length is not None and length.isdigit() and int(length) > gateway._settings.max_body_bytes:
            raise _BodyTooLargeError
        return None

    async def _principal(self, authorization: str | None) -> Principal | None:
        authenticator = self._gateway._authenticator
        if not authenticator.enabled:
            return ANONYMOUS
        if authorization is None:
            return None
        known = authenticator.known(authorization)
        if known is not None:
            return known
        return await run_in_threadpool(authenticator.check_password, authorization)

    async def _receive_body(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._gateway._settings.max_body_bytes:
                raise _BodyTooLargeError
        return message

    async def _receive_upload(self) -> Message:
        return await asyncio.wait_for(self._receive(), self._gateway._settings.idle_upload_seconds)

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self.status = message["status"]
            present = {name for name, _ in message.setdefault("headers", [])}
            headers: list[Any] = [*message["headers"], (b"x-request-id", self.id)]
            headers += [pair for pair in _SECURITY_HEADERS if pair[0] not in present]
            if self.status == 401 and b"www-authenticate" not in present:
                headers.append((b"www-authenticate", b'Basic realm="runstream"'))
            message["headers"] = headers
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
        await self._send(message)

    async def _refuse(self, error: ApiError) -> None:
        if self._started:  # too late to say anything else: break the connection off
            raise error
        await error_response(error)(self._scope, self._receive, self._forward)


Wrap = Callable[[ASGIApp], ASGIApp]
