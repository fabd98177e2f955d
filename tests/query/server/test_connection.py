"""What leaves a connection: heads go with their bodies, in order, and nothing stays behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream_query.server.connection import HeadWithBody

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class FakeTransport:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def write(self, data: bytes) -> None:
        self.said.append(bytes(data))

    def close(self) -> None:
        self.said.append("close")

    def abort(self) -> None:
        self.said.append("abort")

    def get_write_buffer_size(self) -> int:
        return 5

    def get_extra_info(self, name: str) -> str:
        return name


def told(*calls: tuple[str, Any]) -> list[Any]:
    """What the transport below is told by `calls`; `("turn", None)` is the next turn of the loop."""

    async def scenario() -> list[Any]:
        below: Any = FakeTransport()
        transport = HeadWithBody(below, asyncio.get_running_loop())
        for name, argument in calls:
            if name == "turn":
                await asyncio.sleep(0)
            elif argument is None:
                getattr(transport, name)()
            else:
                getattr(transport, name)(argument)
        assert transport.get_extra_info("socket") == "socket"
        said: list[Any] = below.said
        return said

    return asyncio.run(scenario())


LARGE = bytes(100_000)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("write", HEAD), ("write", b"{}")], [HEAD + b"{}"]),
        ([("write", HEAD), ("write", b"")], [HEAD]),
        ([("write", HEAD), ("write", memoryview(b"{}")), ("write", memoryview(b"{}"))], [HEAD + b"{}", b"{}"]),
        ([("write", HEAD), ("turn", None), ("write", b"{}")], [HEAD, b"{}"]),
        ([("write", HEAD), ("write", LARGE)], [HEAD, LARGE]),
        ([("write", HEAD), ("close", None)], [HEAD, "close"]),
        ([("write", HEAD), ("abort", None), ("turn", None)], ["abort"]),
        ([("write", HEAD), ("write", b"1"), ("write", HEAD), ("write", b"2")], [HEAD + b"1", HEAD + b"2"]),
        ([("write", b"{}")], [b"{}"]),
    ],
)  # fmt: skip
def test_a_head_goes_with_what_follows_at_once(calls: list[tuple[str, Any]], expected: list[Any]) -> None:
    """One write where head and body are there together, and the same bytes in any case."""
    assert told(*calls) == expected


def test_a_head_that_waits_counts_as_waiting() -> None:
    """Whoever looks how much is unsent is told all of it."""

    async def scenario() -> None:
        below: Any = FakeTransport()
        transport = HeadWithBody(below, asyncio.get_running_loop())
        transport.write(HEAD)
        assert transport.get_write_buffer_size() == len(HEAD) + 5
        assert below.said == []

    asyncio.run(scenario())
