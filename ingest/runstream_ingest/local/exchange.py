"""One HTTP exchange over ASGI: the body coming in, the client leaving, the answer going out, how an answer breaks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final

from .coding import Compressor, compressor, decompressor
from .errors import EngineQueryError
from .frames import FrameCompressor, FrameDecompressor

__all__ = ["AnswerCut", "ClientGone", "Exchange"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_DRAINED_BYTES: Final = 256 * 1024 * 1024
"""How much of a refused request's body is read, so that its sender gets to the answer."""

_HTTP_STATUS: Final = {
    36: 400, 43: 400, 46: 404, 47: 400, 60: 404, 62: 400, 73: 400, 81: 404, 89: 400, 115: 400, 117: 400, 159: 408,
    164: 403, 194: 401, 202: 503, 236: 503, 271: 400, 354: 400, 432: 400, 452: 403, 456: 400, 457: 400,
    497: 403, 516: 403,
}  # fmt: skip
"""HTTP status by error code; 500 for every other."""


class ClientGone(Exception):
    """The client closed the connection."""


class AnswerCut(Exception):
    """The answer broke after its head was sent: the connection ends without the last chunk, so that no client can take
    it for a whole one."""


class Exchange:
    """One request and its answer. Lives in the event loop."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.scope = scope
        self.gone = False
        """The client has left."""
        self._receive = receive
        self._send = send
        self._body_read = False
        self._started = False
        self._watch: asyncio.Task[None] | None = None
        self._coder: Compressor | None = None
        self._frames: Compressor | None = None
        self._tag = ""

    @property
    def head_only(self) -> bool:
        return bool(self.scope["method"] == "HEAD")

    async def body(self, content_encoding: str = "", *, framed: bool = False) -> AsyncIterator[bytes]:
        """The request's body, decoded, piece by piece. May be broken off and asked for again.

        Args:
            framed: below its coding it is in ClickHouse's compressed frames.

        Raises:
            ClientGone: the client left before its end.
            Refused: the coding is unknown or the data not of it.
        """
        decoder = decompressor(content_encoding)
        frames = FrameDecompressor() if framed else None
        while not self._body_read:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                raise ClientGone
            self._body_read = not message.get("more_body", False)
            data: bytes = message.get("body", b"")
            if data:
                plain = decoder.decompress(data)
                yield plain if frames is None else frames.decompress(plain)
        if frames is not None:
            frames.finish()

    async def drain(self) -> None:
        """Read what is left of the body and forget it: a sender in the middle of its body would not see the answer."""
        left = MAX_DRAINED_BYTES
        try:
            async for piece in self.body():
                left -= len(piece)
                if left < 0:
                    return
        except ClientGone:
            return

    def watch(self) -> asyncio.Task[None] | None:
        """A task that ends when the client leaves; None as long as the body has not been read."""
        if self._watch is None and self._body_read:
            self._watch = asyncio.create_task(self._until_gone())
        return self._watch

    async def close(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})

    async def whole(
        self,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        coding: str | None = None,
        frames: str | None = None,
    ) -> None:
        """Send an answer in one piece.

        Args:
            coding: an HTTP coding.
            frames: first of all pack it into ClickHouse's frames, of this method.
        """
        if frames is not None:
            body = FrameCompressor(frames).compress(body)
        if coding is not None:
            coder = compressor(coding)
            body = coder.compress(body) + coder.finish()
            headers = [*headers, ("Content-Encoding", coding)]
        await self._start(status, [*headers, ("Content-Length", str(len(body)))])
        await self._send({"type": "http.response.body", "body": b"" if self.head_only else body, "more_body": False})

    async def begin(self, headers: list[tuple[str, str]], coding: str | None = None, frames: str | None = None) -> None:
        """Begin an answer in pieces; coded as in `whole`."""
        self._tag = secrets.token_hex(8)
        headers = [*headers, ("X-ClickHouse-Exception-Tag", self._tag)]
        if coding is not None:
            self._coder = compressor(coding)
            headers.append(("Content-Encoding", coding))
        if frames is not None:
            self._frames = FrameCompressor(frames)
        await self._start(200, headers)

    async def write(self, data: bytes) -> None:
        """Send a piece; waits while the client is slow."""
        if self._frames is not None:
            data = self._frames.compress(data)
        if self._coder is not None:
            data = self._coder.compress(data)
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        """End an answer in pieces."""
        rest = self._coder.finish() if self._coder is not None else b""
        await self._send({"type": "http.response.body", "body": rest, "more_body": False})

    async def fail(self, error: EngineQueryError) -> None:
        """Answer with an error; in the middle of an answer, break it so that every client notices.

        Raises:
            AnswerCut: the answer had begun; the server must drop the connection.
        """
        text = str(error).encode()
        if not self._started:
            await self.drain()
            headers = [
                ("Content-Type", "text/plain; charset=UTF-8"),
                ("X-ClickHouse-Exception-Code", str(error.code)),
            ]
            if error.code in (516, 194):
                headers.append(("WWW-Authenticate", 'Basic realm="runstream"'))
            if error.code == 202:
                headers.append(("Retry-After", "1"))
            await self.whole(_HTTP_STATUS.get(error.code, 500), headers, text + b"\n")
            return
        tag = self._tag.encode()
        # The form of ClickHouse 25.11 and later; clickhouse_connect looks for these very bytes.
        note = b"\r\n__exception__\r\n%b\r\n%b\n%d %b\r\n__exception__\r\n" % (tag, text, len(text) + 1, tag)
        # Raw behind ClickHouse's frames, as its server does; within an HTTP coding.
        if self._coder is not None:
            note = self._coder.compress(note) + self._coder.finish()
        await self._send({"type": "http.response.body", "body": note, "more_body": True})
        raise AnswerCut

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True

    async def _start(self, status: int, headers: list[tuple[str, str]]) -> None:
        self._started = True
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
