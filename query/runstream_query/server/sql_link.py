"""Kept-alive HTTP connections from the SQL port to the store behind it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

import h11

from runstream_query.store import StoreAddress

CONNECT_SECONDS: Final = 10.0
_CHUNK_BYTES: Final = 1 << 18
_IDLE_SECONDS: Final = 8.0
"""Below the shortest keep-alive that a ClickHouse server is usually given (10 s)."""
_MAX_IDLE: Final = 16


class LinkBrokenError(ConnectionError):
    """The store's end of a connection failed before its answer was whole."""


class Link:
    """One connection, for one request at a time."""

    def __init__(self, address: StoreAddress, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self._reader = reader
        self._writer = writer
        self._protocol = h11.Connection(h11.CLIENT)
        self._idle_since = 0.0

    async def send(self, head: h11.Request, body: bytes) -> None:
        """Send the head and the beginning of the body."""
        data = self._protocol.send(head) or b""
        if body:
            data += self._protocol.send(h11.Data(data=body)) or b""
        self._writer.write(data)
        await self._drain()

    async def send_body(self, data: bytes) -> None:
        """Send more of the body."""
        self._writer.write(self._protocol.send(h11.Data(data=data)) or b"")
        await self._drain()

    async def end_body(self) -> None:
        """The body is whole."""
        self._writer.write(self._protocol.send(h11.EndOfMessage()) or b"")
        await self._drain()

    async def answer(self) -> h11.Response:
        """Wait for the answer's head.

        Raises:
            LinkBrokenError: there is none.
        """
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise LinkBrokenError("the store broke the connection off")

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's body.

        Raises:
            LinkBrokenError: it breaks off; what came is not a whole result.
        """
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise LinkBrokenError("the store broke its answer off")

    def close(self) -> None:
        """Hang up; the store kills what it still does for this connection."""
        self._writer.close()

    def rest(self) -> bool:
        """Make ready for another request; False where the connection cannot serve one."""
        try:
            self._protocol.start_next_cycle()
        except h11.ProtocolError:
            return False
        self._idle_since = time.monotonic()
        return self.usable()

    def usable(self) -> bool:
        """Whether an idle connection may be tried."""
        return not (
            self._reader.at_eof() or self._writer.is_closing() or time.monotonic() - self._idle_since > _IDLE_SECONDS
        )

    async def _event(self) -> object:
        try:
            while True:
                event = self._protocol.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._protocol.receive_data(await self._reader.read(_CHUNK_BYTES))
        except (h11.RemoteProtocolError, OSError) as exc:
            raise LinkBrokenError(f"the store broke its answer off: {exc}") from exc

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError as exc:
            raise LinkBrokenError(f"the store hung up: {exc}") from exc


class Links:
    """Connections at rest. Lives in one event loop."""

    def __init__(self) -> None:
        self._idle: list[Link] = []

    async def take(self, address: StoreAddress, *, fresh: bool = False) -> Link:
        """A connection to `address`, an idle one if there is one and `fresh` does not forbid it.

        Raises:
            OSError, TimeoutError: it cannot be made.
        """
        while self._idle and not fresh:
            link = self._idle.pop()
            if link.address == address and link.usable():
                return link
            link.close()
        return Link(address, *await _open(address))

    def give(self, link: Link) -> None:
        """Take a connection back whose answer has been read to its end."""
        if link.rest() and len(self._idle) < _MAX_IDLE:
            self._idle.append(link)
        else:
            link.close()

    def close(self) -> None:
        """Drop them all."""
        for link in self._idle:
            link.close()
        self._idle.clear()


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


def framing(headers: Sequence[tuple[bytes, bytes]], whole_body: bytes | None) -> tuple[bytes, bytes]:
    """The one header that frames the body: ours, so that no two parties can read a request differently."""
    if whole_body is not None:
        return b"content-length", str(len(whole_body)).encode()
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return name, value
    return b"transfer-encoding", b"chunked"
