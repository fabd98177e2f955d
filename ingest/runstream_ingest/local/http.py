"""ClickHouse's HTTP interface over the engine, as a plain ASGI application.

    /  (GET, HEAD, POST)      SQL in the URL, in the body, or both; inserts stream in, results stream out
    /ping, /replicas_status   `Ok.`
    /runstream/status         the state of ingest, JSON

Every engine call runs in a thread; the event loop only moves bytes. A query whose client leaves is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from runstream_schemas.layout import READER, WRITER

from . import gate
from .coding import negotiate
from .engine import Engine, Role
from .errors import EngineQueryError, Refused
from .exchange import AnswerCut, ClientGone, Exchange, Receive, Send
from .formats import content_type
from .request import Credentials, InsertHead, Request, insert_head
from .statement import PIECE_BYTES, Answer, InsertRun, Reader, run_write, summary

__all__ = ["AppSettings", "StoreApp", "Tokens"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PLAIN: Final = ("Content-Type", "text/plain; charset=UTF-8")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Passwords of the two users. Secrets stay out of `repr`."""

    reader: str = field(repr=False)
    writer: str = field(repr=False)

    def role(self, credentials: Credentials | None) -> Role:
        """Whom `credentials` name.

        Raises:
            Refused: nobody.
        """
        if credentials is not None:
            secret = credentials.secret.encode()
            for user, token, role in ((READER, self.reader, Role.READER), (WRITER, self.writer, Role.WRITER)):
                if hmac.compare_digest(secret, token.encode()) and credentials.user in (None, user):
                    return role
        name = credentials.user if credentials and credentials.user else "default"
        raise Refused(
            f"{name}: Authentication failed: password is incorrect, or there is no user with such name. "
            "(AUTHENTICATION_FAILED)",
            516,
        )


@dataclass(frozen=True, slots=True)
class AppSettings:
    """Bounds of the interface."""

    max_concurrent_queries: int = 8
    """Queries and inserts that run at once; later ones wait."""
    queue_timeout_seconds: float = 30.0
    """How long a request waits for its turn before it gets TOO_MANY_SIMULTANEOUS_QUERIES (code 202, HTTP 503)."""
    max_waiting: int = 256
    """Requests that wait for their turn; more are refused at once."""
    max_sql_bytes: int = 16 * 1024 * 1024
    """A statement without data."""
    send_timeout_seconds: float = 30.0
    """How long a client may leave a piece of its answer unread, until the answer breaks off."""
    compress_results: bool = False
    """Compress answers for every client that accepts it; without it only for enable_http_compression=1."""
    limits: gate.Limits = field(default_factory=gate.Limits)


class StoreApp:
    """The ASGI application. Lives in one event loop."""

    def __init__(
        self,
        engine: Engine,
        tokens: Tokens,
        settings: AppSettings | None = None,
        *,
        status: Callable[[], Mapping[str, object]] = dict,
        on_request: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        status: what `/runstream/status` answers; quick, any thread.
        on_request: called when a request with valid credentials begins, and when it ends.
        """
        self._engine = engine
        self._tokens = tokens
        self._settings = settings or AppSettings()
        self._reader = Reader(engine, self._settings.limits)
        self._status = status
        self._on_request = on_request
        self._threads = ThreadPoolExecutor(self._settings.max_concurrent_queries, thread_name_prefix="query")
        self._killers = ThreadPoolExecutor(1, thread_name_prefix="kill")
        self._turns = asyncio.Semaphore(self._settings.max_concurrent_queries)
        self._waiting = 0
        self._running: set[str] = set()

    @property
    def active(self) -> int:
        """Statements that run or wait."""
        return len(self._running) + self._waiting

    def cancel_all(self) -> None:
        """Kill whatever runs; blocks shortly, any thread."""
        self._engine.cancel(sorted(self._running))

    def close(self) -> None:
        """Wait for the threads; call after the last request."""
        self._threads.shutdown(wait=True)
        self._killers.shutdown(wait=True)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served here")
        exchange = Exchange(scope, receive, send)
        try:
            await self._route(scope["path"], exchange)
        except ClientGone:
            return
        except EngineQueryError as exc:
            await exchange.fail(exc)
        except AnswerCut:
            raise
        except Exception:
            logger.exception("a request failed")
            await exchange.fail(EngineQueryError("internal error of the local store process, see db/server.log", 1002))
        finally:
            await exchange.close()

    async def _route(self, path: str, exchange: Exchange) -> None:
        if path in ("/ping", "/replicas_status"):
            await exchange.whole(200, [_PLAIN], b"Ok.\n")
            return
        request = Request.parse(exchange.scope["query_string"], exchange.scope["headers"])
        role = self._tokens.role(request.credentials)
        self._on_request()
        try:
            method = exchange.scope["method"]
            if path == "/runstream/status":
                await exchange.whole(200, [("Content-Type", "application/json")], json.dumps(self._status()).encode())
            elif path != "/":
                raise Refused(f"there is nothing at {path}; send SQL to /", 46)
            elif method not in ("GET", "HEAD", "POST"):
                raise Refused(f"method {method} is not supported; use GET or POST", 36)
            else:
                await self._statement(role, method == "POST", request, exchange)
        finally:
            self._on_request()

    async def _statement(self, role: Role, may_write: bool, request: Request, exchange: Exchange) -> None:
        body = exchange.body(request.content_encoding, framed=request.framed_body)
        if request.form_boundary is not None:
            request = request.with_form(await self._small(body))
            body = exchange.body()
        sql, head, rest = await self._text(request, body)
        if head is None:
            if not sql.strip():
                await exchange.whole(200, [_PLAIN], b"Ok.\n")
                return
            async with self._turn(request.query_id):
                await self._answer(role if may_write else Role.READER, request, sql, exchange)
        elif role is not Role.WRITER or not may_write:
            raise Refused("readers may not insert; send the writer's token, by POST", 497)
        else:
            async with self._turn(request.query_id):
                await self._insert(request, head, rest, body, exchange)

    async def _small(self, body: AsyncIterator[bytes]) -> bytes:
        data = bytearray()
        async for piece in body:
            data += piece
            if len(data) > self._settings.max_sql_bytes:
                raise Refused(f"a statement may have {self._settings.max_sql_bytes} bytes", 62)
        return bytes(data)

    async def _text(self, request: Request, body: AsyncIterator[bytes]) -> tuple[str, InsertHead | None, bytes]:
        """The statement; or an INSERT's head and the beginning of its data, whose rest is still in `body`."""
        sql = request.url_sql
        head = insert_head(sql)
        if head is not None:
            return "", head, sql[head.length :].encode()
        prefix = f"{sql}\n".encode() if sql.strip() else b""
        data = bytearray(prefix)
        async for piece in body:
            data += piece
            # The head of an INSERT is short; its data may be without end.
            start = bytes(data[:65_536])
            if start.lstrip()[:6].upper() == b"INSERT":
                head = insert_head(start.decode("utf-8", "surrogateescape"))
                if head is not None and (len(data) > _bytes_of(start, head.length) or len(data) >= 65_536):
                    return "", head, bytes(data[_bytes_of(start, head.length) :])
            if len(data) > self._settings.max_sql_bytes:
                raise Refused(f"a statement may have {self._settings.max_sql_bytes} bytes", 62)
        text = bytes(data)
        if text.lstrip()[:6].upper() == b"INSERT":
            head = insert_head(text.decode("utf-8", "surrogateescape"))
            if head is not None:
                return "", head, text[_bytes_of(text, head.length) :]
        try:
            return text.decode("utf-8"), None, b""
        except UnicodeDecodeError:
            raise Refused("the statement is not UTF-8", 62) from None

    @contextlib.asynccontextmanager
    async def _turn(self, query_id: str) -> AsyncIterator[None]:
        """Wait until a thread is free for the query called `query_id`."""
        if query_id in self._running:
            raise Refused(f"query with id = {query_id} is already running", 216)
        if self._waiting >= self._settings.max_waiting:
            raise Refused("too many requests wait for the store; try again later", 202)
        self._waiting += 1
        try:
            await asyncio.wait_for(self._turns.acquire(), self._settings.queue_timeout_seconds)
        except TimeoutError:
            raise Refused("the store is busy with other queries; try again later", 202) from None
        finally:
            self._waiting -= 1
        self._running.add(query_id)
        try:
            yield
        finally:
            self._running.discard(query_id)
            self._turns.release()

    async def _answer(self, role: Role, request: Request, sql: str, exchange: Exchange) -> None:
        if role is Role.READER:
            answer = await self._call(request, exchange, lambda: self._reader.run(request, sql))
        else:
            answer = await self._call(request, exchange, lambda: run_write(self._engine, request, sql))
        try:
            await self._send(answer, request, exchange)
        finally:
            if not answer.done:
                await asyncio.get_running_loop().run_in_executor(self._threads, answer.close)

    async def _send(self, answer: Answer, request: Request, exchange: Exchange) -> None:
        coding = None
        if request.wants_compression or (self._settings.compress_results and request.frames is None):
            coding = negotiate(request.accept_encoding)
        headers = [
            ("Content-Type", content_type(answer.format)),
            ("X-ClickHouse-Format", answer.format),
            ("X-ClickHouse-Query-Id", request.query_id),
            ("X-ClickHouse-Timezone", "UTC"),
        ]
        if answer.done:
            headers.append(("X-ClickHouse-Summary", json.dumps(answer.summary())))
            await exchange.whole(200, headers, answer.first, coding, request.frames)
            return
        await exchange.begin(headers, coding, request.frames)
        await self._write(answer.first, exchange)
        answer.first = b""
        more = True
        while more:
            data, more = await self._call(request, exchange, lambda: answer.read(PIECE_BYTES))
            await self._write(data, exchange)
        await exchange.finish()

    async def _write(self, data: bytes, exchange: Exchange) -> None:
        """Send a piece; a client that takes nothing for too long loses its answer, for it holds a turn.

        Raises:
            AnswerCut: so it was.
        """
        try:
            async with asyncio.timeout(self._settings.send_timeout_seconds):
                await exchange.write(data)
        except TimeoutError:
            raise AnswerCut from None

    async def _insert(
        self, request: Request, head: InsertHead, rest: bytes, body: AsyncIterator[bytes], exchange: Exchange
    ) -> None:
        run = await self._call(request, exchange, lambda: InsertRun(self._engine, request, head))
        try:
            pending = bytearray(rest)
            async for piece in body:
                pending += piece
                if len(pending) >= PIECE_BYTES:
                    data = bytes(pending)
                    pending.clear()
                    await self._call(request, exchange, partial(run.append, data))
            last = bytes(pending)

            def finish() -> Mapping[str, str]:
                run.append(last)
                return summary(run.finish(), 0)

            done = await self._call(request, exchange, finish)
        finally:
            await asyncio.get_running_loop().run_in_executor(self._threads, run.close)
        headers = [
            _PLAIN,
            ("X-ClickHouse-Query-Id", request.query_id),
            ("X-ClickHouse-Timezone", "UTC"),
            ("X-ClickHouse-Summary", json.dumps(done)),
        ]
        await exchange.whole(200, headers, b"")

    async def _call(self, request: Request, exchange: Exchange, call: Callable[[], T]) -> T:
        """Run an engine call in a thread; kill the query if the client leaves meanwhile.

        Raises:
            ClientGone: it left; the call has ended.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.run_in_executor(self._threads, call)
        watch = exchange.watch()
        try:
            if watch is not None:
                waiting: set[asyncio.Future[Any]] = {future, watch}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                while not future.done():
                    # Again and again, because the query may not have begun when it was killed.
                    await loop.run_in_executor(self._killers, self._engine.cancel, [request.query_id])
                    await asyncio.wait({future}, timeout=0.2)
            result = await asyncio.shield(future)
        except asyncio.CancelledError:
            # The server stops and has killed the queries; the thread must end before the engine closes.
            await asyncio.wait({future})
            if future.exception() is None:
                _close(future.result())
            raise
        if exchange.gone:
            await loop.run_in_executor(self._threads, _close, result)
            raise ClientGone
        return result


def _close(result: object) -> None:
    if isinstance(result, (Answer, InsertRun)):
        result.close()


def _bytes_of(data: bytes, characters: int) -> int:
    """How many bytes of `data` hold its first `characters` characters."""
    return len(data.decode("utf-8", "surrogateescape")[:characters].encode("utf-8", "surrogateescape"))
