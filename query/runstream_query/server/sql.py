"""SQL over HTTP on the server's own port: ClickHouse's interface, passed on to the store with a reader's rights.

`POST /`, `GET /?query=...`, `/ping` and `/replicas_status` go to the local store process (whose gate admits read-only
SELECTs over our database and nothing else) or to the ClickHouse user that RUNSTREAM_SERVER_SQL_URI names; never to the
writer. The caller's own credentials end here: the gateway has checked them, and the store gets the reader's. Bodies
stream in both directions; when the caller leaves, the connection to the store is closed and the store kills the query.

Statements of this port share the store with the API and with ingest, so only some of them run at once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import h11
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from runstream.errors import UnavailableError
from runstream_query.api.errors import ApiError
from runstream_query.store import Locator, StoreAddress

from .sql_link import Link, LinkBrokenError, Links, framing

PATHS: Final = ("/", "/ping", "/replicas_status")
_FIRST_BYTES: Final = 1 << 18
"""A body up to this size is kept until the store answers, so that it can be sent once more."""
_QUEUE_SECONDS: Final = 10.0
_MAX_WAITING: Final = 64
_NOT_PASSED: Final = frozenset({"user", "password", "quota_key", "role", "jwt", "access_token"})
_PASSED_HEADERS: Final = frozenset(
    {
        b"accept-encoding",
        b"content-encoding",
        b"content-type",
        b"user-agent",
        b"x-clickhouse-database",
        b"x-clickhouse-format",
    }
)
_DROPPED_ANSWER_HEADERS: Final = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"})
_CODE_HEADER: Final = b"x-clickhouse-exception-code"
_CODES: Final = {"UNAUTHENTICATED": 516, "PERMISSION_DENIED": 497, "TEMPORARILY_UNAVAILABLE": 202}


class _GoneError(Exception):
    """The caller has left."""


class _BusyError(Exception):
    """No turn was free in time."""


class SqlProxy:
    """Passes requests on to the store that the locator names. One per server process."""

    def __init__(self, locator: Callable[[], Locator | None], wait: Callable[[], None], max_queries: int = 4) -> None:
        """Args:
        locator: the store to ask, None where SQL is not offered.
        wait: blocks until what was logged before the call is visible.
        max_queries: statements that run at once; later ones wait.
        """
        self._locator = locator
        self._wait = wait
        self._known: StoreAddress | None = None
        self._links = Links()
        self._turns = asyncio.Semaphore(max_queries)
        self._waiting = 0

    def routes(self) -> list[BaseRoute]:
        """The paths of ClickHouse's interface."""
        return [Route(path, self, methods=["GET", "HEAD", "POST"]) for path in PATHS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        response = self._here(scope, path)
        if response is None:
            try:
                async with self._turn():
                    response = await self._pass_on(scope, path, receive, send)
            except _GoneError:
                return
            except (UnavailableError, OSError, TimeoutError) as exc:
                response = _refusal(503, 210, f"the store does not answer: {exc}")
            except _BusyError:
                response = _refusal(503, 202, "too many SQL queries at once; try again later")
        if response is not None:
            await response(scope, receive, send)

    def _here(self, scope: Scope, path: str) -> Response | None:
        """What needs no store."""
        if path == "/ping":
            return PlainTextResponse("Ok.\n")
        if self._locator() is None:
            return _refusal(
                501,
                48,
                "SQL is not offered here: set RUNSTREAM_SERVER_SQL_URI to clickhouse://reader:password@host:8443/db",
            )
        if path == "/" and scope["method"] in ("GET", "HEAD"):
            if b"query=" not in scope["query_string"]:
                return PlainTextResponse("Ok.\n")
            if any(name == b"sec-fetch-site" and value == b"cross-site" for name, value in scope["headers"]):
                return _refusal(403, 497, "pages of other sites may not send queries here")
        return None

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._waiting >= _MAX_WAITING:
            raise _BusyError
        self._waiting += 1
        try:
            await asyncio.wait_for(self._turns.acquire(), _QUEUE_SECONDS)
        except TimeoutError:
            raise _BusyError from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _pass_on(self, scope: Scope, path: str, receive: Receive, send: Send) -> Response | None:
        """Ask the store and send its answer; or return one of ours. Broken off as soon as the caller leaves.

        Raises:
            _GoneError: it left.
        """
        caller = _Caller(receive)
        work = asyncio.create_task(self._ask(scope, path, caller, send))
        try:
            waiting: set[asyncio.Future[Any]] = {work, caller.gone}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _GoneError
            return work.result()
        finally:
            work.cancel()
            caller.close()
            await asyncio.wait({work})

    async def _ask(self, scope: Scope, path: str, caller: _Caller, send: Send) -> Response | None:
        body = await caller.beginning()
        whole = caller.whole
        if path == "/":
            await run_in_threadpool(self._wait)
        for last in (False, True):
            link = await self._link(fresh=last)
            answer: h11.Response | None = None
            done = False
            try:
                await link.send(_head(scope, path, link.address, body if whole else None), body)
                async for data in caller.rest():
                    await link.send_body(data)
                await link.end_body()
                answer = await link.answer()
                if whole and not last and (_CODE_HEADER, b"516") in list(answer.headers):
                    self._known = None  # another store process, with other tokens, stands at this address
                    continue
                await _send_on(answer, link, send)
                done = True
                return None
            except LinkBrokenError as exc:
                if answer is not None:
                    raise  # without a proper end: a cut result must not look whole
                self._known = None
                if last or not whole:
                    return _refusal(503, 210, str(exc))
            finally:
                if done:
                    self._links.give(link)
                else:
                    link.close()
        raise AssertionError("the last attempt answers or fails")

    async def _link(self, *, fresh: bool) -> Link:
        known = self._known
        if known is not None:
            with contextlib.suppress(OSError, TimeoutError):
                return await self._links.take(known, fresh=fresh)
        locator = self._locator()
        if locator is None:
            raise UnavailableError("the server is stopping")
        self._known = address = await run_in_threadpool(locator.locate, 60.0)
        return await self._links.take(address, fresh=fresh)


class _Caller:
    """The body that comes from the caller, and whether it is still there."""

    def __init__(self, receive: Receive) -> None:
        self.whole = False
        """The body has been read."""
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once it has left."""
        self._receive = receive
        self._watch: asyncio.Task[None] | None = None

    async def beginning(self) -> bytes:
        """The first bytes of the body; all of it where it is small."""
        data = bytearray()
        while not self.whole and len(data) < _FIRST_BYTES:
            data += await self._next()
        return bytes(data)

    async def rest(self) -> AsyncIterator[bytes]:
        """What is left of the body."""
        while not self.whole:
            data = await self._next()
            if data:
                yield data

    def close(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.cancel()
        self.gone.cancel()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        if not message.get("more_body", False):
            self.whole = True
            self._watch = asyncio.create_task(self._until_gone())
        data: bytes = message.get("body", b"")
        return data

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.gone.done():
            self.gone.set_result(None)


async def _send_on(answer: h11.Response, link: Link, send: Send) -> None:
    # As the store sent them, X-ClickHouse-* and the content type above all; framing is ours.
    headers = [(name, value) for name, value in answer.headers if name not in _DROPPED_ANSWER_HEADERS]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    async for data in link.body():
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _head(scope: Scope, path: str, address: StoreAddress, whole_body: bytes | None) -> h11.Request:
    """The request line and headers for the store: the caller's query and formats, the reader's credentials."""
    principal = scope.get("runstream_principal")
    query: list[tuple[str, str]] = []
    for name, value in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name == "session_id" and principal is not None:
            # The store knows one reader only: a session belongs to whom it was opened by.
            value = hashlib.sha256(f"{principal.name}\0{value}".encode()).hexdigest()[:32]
        if name.lower() not in _NOT_PASSED:
            query.append((name, value))
    headers = [(name, value) for name, value in scope["headers"] if name in _PASSED_HEADERS]
    if all(name != "database" for name, _ in query) and all(name != b"x-clickhouse-database" for name, _ in headers):
        query.append(("database", address.database))
    login = base64.b64encode(f"{address.user}:{address.password}".encode())
    headers += [
        (b"host", f"{address.host}:{address.port}".encode()),
        (b"authorization", b"Basic " + login),
        framing(scope["headers"], whole_body),
    ]
    return h11.Request(method=scope["method"], target=f"{path}?{urlencode(query)}", headers=headers)


def authorization(scope: Scope) -> str | None:
    """The credentials of a request in ClickHouse's own places (X-ClickHouse-User and -Key, or the URL), as the value of
    an Authorization header; None for other paths and where there are none."""
    if scope["path"].removeprefix(scope.get("root_path", "")) not in PATHS:
        return None
    named = {name: value.decode("latin-1") for name, value in scope["headers"] if name.startswith(b"x-clickhouse-")}
    user, password = named.get(b"x-clickhouse-user"), named.get(b"x-clickhouse-key")
    if user is None and password is None:
        url = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        user, password = url.get("user"), url.get("password")
    if user is None and password is None:
        return None
    return "Basic " + base64.b64encode(f"{user or ''}:{password or ''}".encode()).decode()


def problem(scope: Scope, error: ApiError) -> Response | None:
    """The server's own refusal of a request for SQL, in the form that ClickHouse's clients show; None for others."""
    if scope["path"].removeprefix(scope.get("root_path", "")) != "/":
        return None
    response = _refusal(error.status, _CODES.get(error.code, 36), error.message)
    if error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(error.retry_after_seconds)
    return response


def _refusal(status: int, code: int, message: str) -> Response:
    """An error as ClickHouse writes it, so that its clients show the message."""
    headers = {"X-ClickHouse-Exception-Code": str(code)} | ({"Retry-After": "2"} if status == 503 else {})
    return PlainTextResponse(f"Code: {code}. DB::Exception: {message}\n", status_code=status, headers=headers)
