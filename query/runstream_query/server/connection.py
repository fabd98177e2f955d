"""Connections under uvicorn, with the bounds that it leaves open: how many, how long a request's head may take and be.

Whoever says nothing, or half of a request line, loses the connection after `HEAD_SECONDS`; a head is at most
`MAX_HEAD_BYTES`; beyond `max_connections` a new one is answered 503 and closed. After an answer that did not wait for
the whole body, what still comes is thrown away for `LINGER_SECONDS`, so that the client can read the answer. Whoever
does not read the answer loses the connection too: what waits to be sent would stay in memory.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

HEAD_SECONDS: Final = 15.0
MAX_HEAD_BYTES: Final = 64 * 1024
LINGER_SECONDS: Final = 5.0
STALL_SECONDS: Final = 30.0
MIN_STALL_BYTES: Final = 64 * 1024
"""A client that takes less than this of an answer in `STALL_SECONDS` is cut off."""
_JOINED_BYTES: Final = 64 * 1024
"""Copying more than this costs more than a packet."""
_REFUSAL_BODY: Final = b'{"error_code":"%s","message":"%s"}'


def _answer(status: bytes, code: bytes, message: bytes, headers: bytes = b"") -> bytes:
    body = _REFUSAL_BODY % (code, message)
    return b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%s\r\n%s" % (
        status,
        len(body),
        headers,
        body,
    )


_FULL: Final = _answer(
    b"503 Service Unavailable",
    b"TEMPORARILY_UNAVAILABLE",
    b"The server has too many connections.",
    b"retry-after: 1\r\n",
)
_TOO_LONG: Final = _answer(
    b"431 Request Header Fields Too Large",
    b"BAD_REQUEST",
    b"The request line and headers are larger than %d bytes." % MAX_HEAD_BYTES,
)
_TOO_SLOW: Final = _answer(b"408 Request Timeout", b"BAD_REQUEST", b"The request did not arrive in time.")
_INVALID: Final = _answer(b"400 Bad Request", b"BAD_REQUEST", b"This is not a valid HTTP request.")


class HeadWithBody:
    """A transport that sends an answer's head together with what follows it at once: as two packets they cost a request
    a tenth more. What follows later (an answer that streams, or has no body) finds the head sent already."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """Send `data`, or keep it for this turn of the loop if it is a head."""
        if self._head and len(data) <= _JOINED_BYTES:
            data, self._head = self._head + data, b""
        elif self._head:
            self._flush()
        elif data[:9] == b"HTTP/1.1 " and data[-4:] == b"\r\n\r\n":
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)

    def close(self) -> None:
        """Close once everything written is sent."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._head = b""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._head) + self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    max_connections = 4_096
    """Of this process; its start sets it."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_bytes = 0
        self._in_head = True
        self._in_message = False
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it where there are too many."""
        super().connection_made(transport)
        self.transport = HeadWithBody(transport, self.loop)  # type: ignore[assignment]
        if len(self.connections) > self.max_connections:
            self._refuse(_FULL)
            return
        self._arm(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._disarm()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().connection_lost(exc)

    # requests

    def data_received(self, data: bytes) -> None:
        """Parse, unless the head has become too long."""
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and self._idle():
            self._refuse(_TOO_LONG)
        elif self._deadline is None and self.timeout_keep_alive_task is None and not self._in_message and self._idle():
            self._arm(HEAD_SECONDS)  # an empty line between requests, or the rest of a body nobody waited for

    def _idle(self) -> bool:
        """Whether no request is in work."""
        return self.cycle is None or self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        """A broken request: the one error body where it cannot become part of another answer, and the end."""
        if self._idle() or not (self._in_head or self.cycle.response_started or self.pipeline):
            self._refuse(_INVALID)
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._in_message = True
        if self._deadline is None and self._idle():
            self._arm(HEAD_SECONDS)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole; from here on the application keeps the time."""
        if self._head_bytes > MAX_HEAD_BYTES:  # counts what came with the head too, so look closer
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > MAX_HEAD_BYTES:
                raise ValueError("the head is too long")
        self._in_head = False
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole; the next bytes are another head."""
        self._in_message = False
        self._in_head = True
        self._head_bytes = 0
        if self._idle():  # answered before: the lingering is over
            self._disarm()
        super().on_message_complete()

    # answers

    def on_response_complete(self) -> None:
        """Answered: where the client is still sending, only for a moment longer."""
        super().on_response_complete()
        if self._in_message and not self.transport.is_closing() and not self.pipeline:
            self._arm(LINGER_SECONDS)
        self._watch_writing()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._watch_writing()

    def _watch_writing(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left and self._stall is None:
            self._stall = self.loop.call_later(STALL_SECONDS, self._check_writing, left)

    def _check_writing(self, before: int) -> None:
        self._stall = None
        left = self.transport.get_write_buffer_size()
        if left == 0:
            return
        if not self.flow.write_paused and not self.transport.is_closing() and not self._idle():
            before = left + MIN_STALL_BYTES  # drained meanwhile, and filled again
        if before - left < min(before, MIN_STALL_BYTES):
            self.transport.abort()
            return
        self._stall = self.loop.call_later(STALL_SECONDS, self._check_writing, left)

    # deadlines

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for the keep-alive time."""
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._expired)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expired(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self._in_head and self._in_message and self._idle():
            self._refuse(_TOO_SLOW)
        else:
            self.transport.close()
            self._watch_writing()

    def _refuse(self, answer: bytes) -> None:
        self._disarm()
        self.transport.write(answer)
        self.transport.close()
        self._watch_writing()
