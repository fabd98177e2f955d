"""The connection: addresses, how values travel, and every foreign error mapped to ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from runstream.config import Settings
from runstream.errors import DeadlineError, InvalidInputError, RunstreamError, UnavailableError
from runstream_query import (
    InvalidQuery,
    Limits,
    QueryError,
    QueryTimeout,
    SqlError,
    StoreBusy,
    StoreUnavailable,
    open_reader,
)
from runstream_query.store import Store, StoreAddress, bind


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("clickhouse://h", ("h", 8123, "default", "", "runstream", False, True)),
        ("clickhouse://h:9000/x", ("h", 9000, "default", "", "x", False, True)),
        ("clickhouse://u:p%40ss%2F@h/x?secure=true", ("h", 8443, "u", "p@ss/", "x", True, True)),
        ("clickhouse://u@[::1]:1/x?secure=1&verify=no", ("::1", 1, "u", "", "x", True, False)),
    ],
)
def test_address(uri: str, expected: tuple[object, ...]) -> None:
    """Every part of an address is read, with its default."""
    found = StoreAddress.parse(uri)
    shown = (found.host, found.port, found.user, found.password, found.database, found.secure, found.verify)
    assert shown == expected
    assert "p@ss" not in repr(found)


@pytest.mark.parametrize(
    "uri",
    [
        "clickhouse://u:secret@h:port/x",
        "clickhouse://u:secret@/x",
        "http://u:secret@h/x",
        "clickhouse://u:secret@h/x?secure=perhaps",
        "clickhouse://u:secret@h/x?unknown=1",
        "clickhouse://u:secret@h/x?secure",
    ],
)
def test_bad_address(uri: str) -> None:
    """A malformed address is refused without showing its password."""
    with pytest.raises(InvalidQuery, match="RUNSTREAM_STORE_URI") as caught:
        StoreAddress.parse(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["kafka://h:1/p", "ftp://h/x", "file://other/x"])
def test_bad_store(uri: str) -> None:
    """A store that is no store, or a log without one, is a clear error when the reader is opened."""
    environment = {"RUNSTREAM_TRACKING_URI": "kafka://h:1/p"}
    if not uri.startswith("kafka"):
        environment["RUNSTREAM_STORE_URI"] = uri
    with pytest.raises(InvalidQuery, match="RUNSTREAM_STORE_URI"):
        open_reader(Settings.from_environment(environment))


def test_small_values_are_parameters() -> None:
    """Values travel beside the statement, which stays as it is."""
    sql = "SELECT {a:String}, {b:Int64}, {c:Array(String)}"
    assert bind(sql, {"a": "x'", "b": 5, "c": ("y",)}) == (sql, {"a": "x'", "b": 5, "c": ["y"]})


def test_large_values_cannot_become_sql() -> None:
    """What does not fit the URL goes into the text as hexadecimal digits, whatever it says."""
    evil = "') OR 1 = 1 -- {c:String} " * 1_000
    sql, bound = bind("SELECT {a:String} = {b:String}, {c: Array(String)}", {"a": evil, "b": "s", "c": [evil, "z"]})
    assert bound == {"b": "s"}
    assert "OR 1" not in sql and "--" not in sql
    assert f"unhex('{evil.encode().hex()}') = {{b:String}}" in sql
    with pytest.raises(InvalidQuery, match="ask for less"):
        bind("SELECT {a:String}", {"a": "x" * 300_000})


def test_large_lists_are_constants() -> None:
    """A list in the text holds no function over its elements, which the store would run again for all it reads."""
    ids = [f"{number:032x}" for number in range(1_000)]
    sql, bound = bind("SELECT 1 WHERE 'x' IN {ids:Array(String)}", {"ids": ids})
    assert bound == {}
    assert "->" not in sql
    assert sql.count("(") == 2


@pytest.mark.parametrize(
    "limits",
    [Limits(max_rows=0), Limits(max_seconds=-1.0), Limits(max_memory_bytes=True), Limits(max_rows="5")],  # type: ignore[arg-type]
)
def test_bad_limits(limits: Limits) -> None:
    """A limit that bounds nothing is refused."""
    with pytest.raises(InvalidQuery):
        limits.settings()


class _Scripted:
    """A server that greets the driver and answers each later statement by the script."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler, bytes], None]) -> None:
        outer = self
        self.statements: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if b"version()" in body:
                    reply(self, 200, b"26.9.2.1\tUTC\n")
                elif b"system.settings" in body or b"SELECT 1 AS check" in body:
                    reply(self, 200, b"")
                else:
                    outer.statements.append(body)
                    answer(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def locate(self, timeout_seconds: float) -> StoreAddress:
        return StoreAddress("127.0.0.1", self._server.server_address[1], "u", "p")

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, code: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    if code is not None:
        handler.send_header("X-ClickHouse-Exception-Code", str(code))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler, bytes], None]], tuple[Store, _Scripted]]]:
    """Makes a store in front of a server that answers by a script."""
    made: list[tuple[Store, _Scripted]] = []

    def make(answer: Callable[[BaseHTTPRequestHandler, bytes], None]) -> tuple[Store, _Scripted]:
        server = _Scripted(answer)
        made.append((Store(server), server))
        return made[-1]

    yield make
    for store, server in made:
        store.close()
        server.close()


@pytest.mark.parametrize(
    ("code", "status", "kind", "base"),
    [
        (62, 400, SqlError, InvalidInputError),
        (47, 404, SqlError, InvalidInputError),
        (497, 403, SqlError, InvalidInputError),
        (159, 408, QueryTimeout, DeadlineError),
        (241, 500, StoreBusy, UnavailableError),
        (202, 503, StoreBusy, UnavailableError),
        (252, 500, StoreBusy, UnavailableError),
        (516, 401, StoreUnavailable, UnavailableError),
    ],
)
def test_errors_of_the_store(scripted, code: int, status: int, kind: type[QueryError], base: type[Exception]) -> None:
    """Every code of the store becomes the error that says what the caller can do."""
    body = f"Code: {code}. DB::Exception: the reason. (NAME) (version 26.9.2.1)".encode()
    store, _ = scripted(lambda handler, _: reply(handler, status, body, code))
    with pytest.raises(kind, match="the reason") as caught:
        store.rows("SELECT x")
    assert isinstance(caught.value, base) and isinstance(caught.value, RunstreamError)
    assert "version" not in str(caught.value)
    if isinstance(caught.value, SqlError):
        assert caught.value.code == code


def test_a_broken_answer_is_asked_for_once_more(scripted) -> None:
    """A connection that ends in the middle of an answer is made anew, once; then the store counts as gone."""

    def cut(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"half")
        handler.close_connection = True
        handler.connection.close()

    store, server = scripted(cut)
    with pytest.raises(QueryError):
        store.raw("SELECT x", "TSV")
    assert 2 <= len(server.statements) <= 8
    assert store.connections == 2


def test_nobody_listens(scripted) -> None:
    """A store that is not there is StoreUnavailable, at once."""
    _, server = scripted(lambda handler, _: reply(handler, 200, b""))
    address = server.locate(1.0)
    server.close()

    class Gone:
        def locate(self, timeout_seconds: float) -> StoreAddress:
            return address

    server.close = lambda: None  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        Store(Gone()).rows("SELECT 1")
