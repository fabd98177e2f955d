"""SQL over HTTP on the server's own port: ClickHouse's interface, passed on to the store with a reader's rights.

`POST /`, `GET /?query=...`, `/ping` and `/replicas_status` go to the local store process (whose gate admits read-only
SELECTs over our database and nothing else) or to the ClickHouse user that RUNSTREAM_SERVER_SQL_URI names; never to the
writer. The caller's own credentials end here: the gateway has checked them, and the store gets the reader's. Bodies
stream in both directions; when the caller leaves, the connection to the store is closed and the store kills the query.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Final
from urllib.parse import parse_qsl, urlencode

import h11
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from runstream.errors import UnavailableError
from runstream_query.store import Locator, StoreAddress

PATHS: Final = ("/", "/ping", "/replicas_status")
CONNECT_SECONDS: Final = 10.0
_CHUNK_BYTES: Final = 1 << 16
_CREDENTIAL_PARAMETERS: Final = frozenset({"user", "password", "quota_key", "role"})
_PASSED_REQUEST_HEADERS: Final = frozenset(
    {b"content-type", b"content-encoding", b"accept-encoding", b"user-agent", b"content-length", b"transfer-encoding"}
)
_DROPPED_ANSWER_HEADERS: Final = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"})


class SqlProxy:
    """Passes requests on to the store that `locate` names."""

    def __init__(self, locator: Callable[[], Locator | None], wait: Callable[[], None]) -> None:
        """Args:
        locator: the store to ask, None where SQL is not offered.
        wait: blocks until what was logged before the call is visible.
        """
        self._locator = locator
        self._wait = wait
        self._known: StoreAddress | None = None

    def routes(self) -> list[BaseRoute]:
        """The paths of ClickHouse's interface."""
        return [Route(path, self, methods=["GET", "HEAD", "POST"]) for path in PATHS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive, send)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "")) or "/"
        if path == "/ping":
            return PlainTextResponse("Ok.\n")
        locator = self._locator()
        if locator is None:
            return _refusal(
                501,
                48,
                "SQL is not offered here: set RUNSTREAM_SERVER_SQL_URI to clickhouse://reader:password@host:8443/db",
            )
        if path == "/" and request.method == "GET" and "query" not in request.query_params:
            return PlainTextResponse("Ok.\n")
        try:
            if path == "/":
                await run_in_threadpool(self._wait)
            reader, writer = await self._connect(locator)
        except (UnavailableError, OSError, TimeoutError) as exc:
            return _refusal(503, 210, f"the store does not answer: {exc}")
        try:
            return await self._exchange(request, path, reader, writer)
        except BaseException:
            writer.close()
            raise

    async def _connect(self, locator: Locator) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        known = self._known
        if known is not None:
            with contextlib.suppress(OSError, TimeoutError):
                return await _open(known)
        self._known = address = await run_in_threadpool(locator.locate, 60.0)
        return await _open(address)

    async def _exchange(
        self, request: Request, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Response:
        address = self._known
        assert address is not None  # just connected to
        connection = h11.Connection(h11.CLIENT)
        writer.write(connection.send(_head(request, path, address)) or b"")
        async for chunk in request.stream():
            if chunk:
                writer.write(connection.send(h11.Data(data=chunk)) or b"")
                await writer.drain()
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK_BYTES))
            elif isinstance(event, h11.Response):
                break
            elif not isinstance(event, h11.InformationalResponse):
                writer.close()
                return _refusal(503, 210, "the store broke the connection off")
        body = _body(connection, reader, writer)
        response = StreamingResponse(body, status_code=event.status_code)
        # As the store sent them, X-ClickHouse-* and the content type above all; framing is ours.
        response.raw_headers = [(name, value) for name, value in event.headers if name not in _DROPPED_ANSWER_HEADERS]
        return response


async def _body(
    connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> AsyncIterator[bytes]:
    """The answer's body. Breaks off, without a proper end, where the store does: a cut result must not look whole."""
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK_BYTES))
            elif isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise ConnectionError("the store broke its answer off")
    except h11.RemoteProtocolError as exc:
        raise ConnectionError(f"the store broke its answer off: {exc}") from exc
    finally:
        writer.close()


async def _open(address: StoreAddress) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context: ssl.SSLContext | None = None
    if address.secure:
        context = ssl.create_default_context(cafile=address.ca_cert)
        if not address.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
    return await asyncio.wait_for(
        asyncio.open_connection(address.host, address.port, ssl=context, limit=1 << 20), CONNECT_SECONDS
    )


def _head(request: Request, path: str, address: StoreAddress) -> h11.Request:
    """The request line and headers for the store: the caller's query and formats, the reader's credentials."""
    given = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    query = [(name, value) for name, value in given if name.lower() not in _CREDENTIAL_PARAMETERS]
    if all(name != "database" for name, _ in query):
        query.append(("database", address.database))
    login = base64.b64encode(f"{address.user}:{address.password}".encode())
    headers = [
        (b"host", f"{address.host}:{address.port}".encode()),
        (b"authorization", b"Basic " + login),
        (b"connection", b"close"),
    ]
    for name, value in request.scope["headers"]:
        clickhouse = name.startswith(b"x-clickhouse-") and name not in (
            b"x-clickhouse-user",
            b"x-clickhouse-key",
            b"x-clickhouse-quota",
            b"x-clickhouse-ssl-certificate-auth",
        )
        if name in _PASSED_REQUEST_HEADERS or clickhouse:
            headers.append((name, value))
    return h11.Request(method=request.method, target=f"{path}?{urlencode(query)}", headers=headers)


def _refusal(status: int, code: int, message: str) -> Response:
    """An error as ClickHouse writes it, so that its clients show the message."""
    headers = {"X-ClickHouse-Exception-Code": str(code)} | ({"Retry-After": "2"} if status == 503 else {})
    return PlainTextResponse(f"Code: {code}. DB::Exception: {message}\n", status_code=status, headers=headers)
