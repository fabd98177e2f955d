"""The one ASGI layer around the application: everything that holds for each request, in one pass.

In order: request id, Host header, cross-origin writes, load limit, authentication and role, body size, time limit;
then security headers, counters and the access line on the way out. `/health` and `/ready` need no authentication.
What a principal may do with single experiments is `permission.py`'s business.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runstream_query.api.errors import ApiError
from runstream_query.api.routing import PREFIXES
from runstream_query.api.wire import error_response

from . import sql
from .access_log import AccessLog
from .audit import Audit
from .authenticator import Authenticator, TooManyTriesError
from .cookie import SESSION, Cookies
from .permission import guarded
from .principal import ANONYMOUS, Principal, Role
from .settings import ServerSettings
from .telemetry import Telemetry

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/version", "/ping"})
"""Answered to everybody, whatever the Host header says."""
LOGIN_PATHS: Final = frozenset({"/login", "/logout"})
"""Answered without authentication, by `login.py`."""
_UPLOAD = re.compile(r"/(?:ajax-)?api/2\.0/mlflow-artifacts/artifacts/")
_WRITING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_METHODS: Final = _WRITING | {"GET", "HEAD", "OPTIONS"}
_REQUEST_ID = re.compile(rb"[\w-]{1,64}\Z")
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")
_SECURITY_HEADERS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]
READING_POSTS: Final = frozenset(
    f"{prefix}/2.0/mlflow/{name}"
    for prefix in PREFIXES
    for name in ("experiments/search", "runs/search", "logged-models/search", "experiments/search-datasets")
) | {"/"}
"""POST requests that only read: searches, and SQL."""
_MIN_UPLOAD_BYTES_PER_SECOND: Final = 1_024
_UPLOAD_GRACE_SECONDS: Final = 60.0


class _BodyTooLargeError(ApiError):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__("INVALID_PARAMETER_VALUE", f"The request body is larger than {limit_bytes} bytes.", status=413)


def needed_role(method: str, path: str) -> Role:
    """The role that a request needs: writing methods write, but searches sent by POST and SQL read."""
    if method not in _WRITING or (method == "POST" and path in READING_POSTS):
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
        audit: Audit,
    ) -> None:
        self._app = app
        self._settings = settings
        self._authenticator = authenticator
        self._audit = audit
        self._cookies = Cookies(settings)
        self._root = settings.root_path
        self._buffered_bytes = 0
        self._telemetry = telemetry
        self._access_log = access_log
        self._in_work = 0
        telemetry.in_work.set_function(lambda: self._in_work)
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

    def local_path(self, path: str) -> str:
        """`path` without the prefix behind which a proxy may put this server."""
        root = self._root
        return path[len(root) :] if root and path.startswith(root + "/") else path

    def client_of(self, scope: Scope) -> str:
        """The client's address: what the proxy says, where there is one."""
        if self._settings.behind_proxy:
            for name, value in reversed(scope["headers"]):
                if name == b"x-forwarded-for":
                    # The last entry is the proxy's own; what stands before it may be invented.
                    return str(value.decode("latin-1").rpartition(",")[2].strip()[:64]) or "-"
        client = scope.get("client")
        return client[0] if client else "-"

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
        "_began",
        "_cookie",
        "_gateway",
        "_receive",
        "_received",
        "_scope",
        "_send",
        "_started",
        "_timeout",
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
        self._timeout: asyncio.Timeout | None = None
        self._cookie: bytes | None = None
        """A session cookie to set with the answer."""
        self._began = 0.0
        self.id = gateway.new_id(scope["headers"])
        self.name = "-"
        self.status = 0
        self.sent_bytes = 0

    async def run(self) -> None:
        """Answer the request, or refuse it."""
        gateway = self._gateway
        scope = self._scope
        scope["runstream_request_id"] = self.id.decode()
        if gateway._in_work >= gateway._settings.max_requests:
            await self._refuse(
                ApiError("TEMPORARILY_UNAVAILABLE", "The server is at its limit of requests.", retry_after_seconds=1)
            )
            return
        path = gateway.local_path(scope["path"])
        upload = scope["method"] == "PUT" and _UPLOAD.match(path) is not None
        gateway._in_work += 1
        try:
            problem = await self._admit(path, upload)
            if problem is not None:
                await self._refuse(problem)
            elif upload:
                self._began = time.monotonic()
                await gateway._app(scope, self._receive_upload, self._forward)
            else:
                async with asyncio.timeout(gateway._settings.request_timeout_seconds) as self._timeout:
                    await gateway._app(scope, self._receive_body, self._forward)
        except ApiError as exc:
            await self._refuse(exc)
        except TimeoutError:
            await self._refuse(ApiError("TEMPORARILY_UNAVAILABLE", "The request took too long.", retry_after_seconds=5))
        finally:
            gateway._in_work -= 1
            if not upload:
                gateway._buffered_bytes -= self._received

    async def _admit(self, path: str, upload: bool) -> ApiError | None:
        """Why the request is refused; None if it may go on."""
        gateway, scope = self._gateway, self._scope
        host = origin = authorization = cookie = site = None
        length = None
        hosts = 0
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
                hosts += 1
            elif name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"authorization":
                authorization = value.decode("latin-1")
            elif name == b"content-length":
                length = value
            elif name == b"cookie":
                cookie = value if cookie is None else cookie + b"; " + value
            elif name == b"sec-fetch-site":
                site = value
        method = scope["method"]
        if path in OPEN_PATHS and method in ("GET", "HEAD"):
            return None
        if method not in _METHODS:
            return ApiError("ENDPOINT_NOT_FOUND", f"This server does not take {method} requests.", status=405)
        if host is None or hosts > 1 or not gateway.host_allowed(host):
            return ApiError(
                "PERMISSION_DENIED",
                f"The Host header {host!r} does not name this server: start it with --allowed-hosts to accept it.",
            )
        if origin is not None and method in _WRITING and not gateway.origin_allowed(origin, host, scope["scheme"]):
            return ApiError("PERMISSION_DENIED", f"Pages of {origin!r} may not write here (--allowed-origins).")
        if not upload and length is not None and length.isdigit() and int(length) > gateway._settings.max_body_bytes:
            raise _BodyTooLargeError(gateway._settings.max_body_bytes)
        authenticator = gateway._authenticator
        scope["runstream_address"] = gateway.client_of(scope)
        if path in LOGIN_PATHS and authenticator.enabled:
            scope["runstream_cookie"] = cookie
            return None
        principal: Principal | None = ANONYMOUS
        if authenticator.enabled:
            authorization = authorization or sql.authorization(scope)
            if authorization is not None:
                principal = await self._authorized(authorization)
            else:
                principal = self._signed_in(cookie)
                if principal is not None and method in _WRITING and not self._same_origin(origin, host, site):
                    # Other sites can make a browser send the cookie along; a header of ours they cannot.
                    return ApiError("PERMISSION_DENIED", "A browser's session may write from our own pages only.")
        if principal is None:
            return ApiError(
                "UNAUTHENTICATED",
                "Authenticate with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
            )
        self.name = principal.name
        scope["runstream_principal"] = principal
        role = needed_role(method, path)
        problem = None
        if not principal.may(role):
            problem = f"This needs the role {role}; {principal.name} has {principal.role}."
        elif principal.restricted and not guarded(path):
            problem = f"{principal.name} is limited to some experiments, and {path} does not tell them apart."
        if problem is None:
            return None
        gateway._audit.note("denied", scope, status=403, reason=problem)
        return ApiError("PERMISSION_DENIED", problem)

    async def _authorized(self, authorization: str) -> Principal | None:
        gateway = self._gateway
        known = gateway._authenticator.known(authorization)
        if known is not None:
            return known
        try:
            found = await gateway._authenticator.check_basic(authorization, self._scope["runstream_address"])
        except TooManyTriesError as exc:
            gateway._audit.note("login-failed", self._scope, status=429, reason="too many failed log-ins")
            raise ApiError("REQUEST_LIMIT_EXCEEDED", str(exc), retry_after_seconds=exc.retry_after_seconds) from None
        if found is None:
            gateway._audit.note("login-failed", self._scope, status=401, reason="wrong token, name or password")
        return found

    def _signed_in(self, cookie: bytes | None) -> Principal | None:
        gateway = self._gateway
        value = gateway._cookies.read(cookie, SESSION)
        found = None if value is None else gateway._authenticator.session_of(value)
        if found is None:
            return None
        principal, session = found
        renewed = gateway._authenticator.renewed(session)
        if renewed is not None:
            self._cookie = gateway._cookies.write(self._scope, SESSION, renewed)
        self._scope["runstream_session"] = session
        return principal

    def _same_origin(self, origin: str | None, host: str, site: bytes | None) -> bool:
        if site is not None and site != b"same-origin":
            return False
        if origin is not None:
            return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
        return site == b"same-origin"

    async def _receive_body(self) -> Message:
        gateway = self._gateway
        message = await self._receive()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._received += size
            gateway._buffered_bytes += size
            if self._received > gateway._settings.max_body_bytes:
                raise _BodyTooLargeError(gateway._settings.max_body_bytes)
            if gateway._buffered_bytes > gateway._settings.max_buffered_bytes:
                raise ApiError("TEMPORARILY_UNAVAILABLE", "Too many large requests are in work.", retry_after_seconds=1)
        return message

    async def _receive_upload(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), self._gateway._settings.idle_upload_seconds)
        except TimeoutError:
            raise ApiError("BAD_REQUEST", "The upload has stopped in its middle.", status=408) from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            seconds = time.monotonic() - self._began
            if seconds > _UPLOAD_GRACE_SECONDS and self._received < seconds * _MIN_UPLOAD_BYTES_PER_SECOND:
                raise ApiError("BAD_REQUEST", "The upload is too slow.", status=408)
        return message

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            if self._timeout is not None and not self._timeout.expired():
                self._timeout.reschedule(None)  # what is being sent may take its time; `connection` cuts off who stalls
            self.status = message["status"]
            present = {name for name, _ in message.setdefault("headers", [])}
            headers: list[Any] = [*message["headers"], (b"x-request-id", self.id)]
            headers += [pair for pair in _SECURITY_HEADERS if pair[0] not in present]
            if self._cookie is not None:
                headers.append((b"set-cookie", self._cookie))
            if "runstream_session" in self._scope and b"cache-control" not in present:
                headers.append((b"cache-control", b"private, no-store"))
            if self.status == 401 and b"www-authenticate" not in present and not self._browser():
                headers.append((b"www-authenticate", b'Basic realm="runstream"'))
            message["headers"] = headers
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
        await self._send(message)

    def _browser(self) -> bool:
        """Whether a browser asks: it would show its own dialog for passwords."""
        return any(name == b"sec-fetch-mode" for name, _ in self._scope["headers"])

    def _page_wanted(self) -> bool:
        """Whether a person is waiting for a page."""
        return self._scope["method"] == "GET" and any(
            name == b"accept" and b"text/html" in value for name, value in self._scope["headers"]
        )

    async def _refuse(self, error: ApiError) -> None:
        if self._started:  # too late to say anything else: break the connection off
            raise error
        if error.status == 401 and self._page_wanted():
            path, query = self._scope["path"], self._scope["query_string"].decode("latin-1")
            wanted = quote(f"{self._gateway.local_path(path)}?{query}" if query else self._gateway.local_path(path))
            response = RedirectResponse(f"{self._gateway._root}/login?next={wanted}", status_code=303)
            await response(self._scope, self._receive, self._forward)
            return
        refusal = sql.problem(self._scope, error) or error_response(error)
        await refusal(self._scope, self._receive, self._forward)
