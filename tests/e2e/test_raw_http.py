"""The server attacked with raw HTTP: broken and smuggled requests, bombs, hostile names, slow and half-open clients.

Each attack ends with a server that answers, and the whole storm with a process that has not grown.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from tests.e2e.mlflow_server import Served, served

API = "/api/2.0/mlflow"
PROXY = "/api/2.0/mlflow-artifacts/artifacts"
HOST = "Host: 127.0.0.1\r\n"
JSON = "Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    environment = {"RUNSTREAM_SERVER_MAX_CONNECTIONS": "400", "RUNSTREAM_SERVER_IDLE_UPLOAD_SECONDS": "2"}
    with served(tmp_path_factory.mktemp("raw") / "data", environment=environment) as running:
        yield running


def connect(server: Served, timeout: float = 60) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=timeout)


def read_all(connection: socket.socket, quiet: float | None = None) -> bytes:
    """Everything until the server closes or, once it has begun, says nothing for `quiet` seconds."""
    got = bytearray()
    with contextlib.suppress(OSError):
        while chunk := connection.recv(1 << 16):
            got += chunk
            if quiet is not None:
                connection.settimeout(quiet)
    return bytes(got)


def send(server: Served, data: bytes | str, quiet: float | None = 0.5) -> bytes:
    """What comes back for `data`."""
    with connect(server) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data.encode("latin-1") if isinstance(data, str) else data)
        return read_all(connection, quiet)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def request(server: Served, method: str, target: str, body: bytes = b"", headers: str = JSON) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\n{HOST}Connection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return send(server, head.encode("latin-1") + body, None)


def alive(server: Served) -> None:
    assert statuses(request(server, "GET", f"{API}/experiments/get?experiment_id=0")) == [200]


def new_run(server: Served) -> str:
    made = request(server, "POST", f"{API}/runs/create", b'{"experiment_id": "0", "start_time": 1}')
    return json.loads(body_of(made))["run"]["info"]["run_id"]


def family(server: Served) -> list[int]:
    """The server's process and its workers, without the local store process."""
    found = [server.process.pid]
    for pid in found:
        with contextlib.suppress(OSError):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid for pid in found if b"runstream_ingest" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def resident_mib(server: Served) -> float:
    total = 0
    for pid in family(server):
        total += int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return total / 1024


def descriptors(server: Served) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family(server))


def until(condition, seconds: float, said: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


# framing

GET = f"GET {API}/experiments/get?experiment_id=0 HTTP/1.1\r\n{HOST}"
POST = f"POST {API}/experiments/search HTTP/1.1\r\n{HOST}{JSON}"
INNER = f"GET {API}/smuggled HTTP/1.1\r\n{HOST}\r\n"


@pytest.mark.parametrize(
    "data",
    [
        POST + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
        POST + "Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n" + INNER,
        POST + "Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + INNER,
        POST + "Content-Length: 2, 40\r\n\r\n{}" + INNER,
        POST + "Content-Length: +2\r\n\r\n{}" + INNER,
        POST + "Content-Length: 0x2\r\n\r\n{}" + INNER,
        POST + "Content-Length: -1\r\n\r\n{}" + INNER,
        POST + "Content-Length: 99999999999999999999999\r\n\r\n{}" + INNER,
        POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER,
        POST + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + INNER,
        POST + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + INNER,
        POST + "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + INNER,
        POST + "Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n" + INNER,
        POST + "Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + INNER,
        POST + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n0\r\n\r\n" + INNER,
        POST + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n" + INNER,
        POST + "X: a\r\n b: folded\r\n\r\n" + INNER,
        POST + "X\x00Y: 1\r\n\r\n" + INNER,
        POST + "X: a\x00b\r\n\r\n" + INNER,
        POST + "no colon\r\n\r\n" + INNER,
        GET.replace("\r\n", "\n") + "\n" + INNER,
        "GET /a b HTTP/1.1\r\n" + HOST + "\r\n" + INNER,
        "G\x00T / HTTP/1.1\r\n" + HOST + "\r\n" + INNER,
        "GET / HTTP/1.1\x00\r\n" + HOST + "\r\n" + INNER,
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "GET\r\n\r\n",
    ],
)
def test_broken_requests_are_refused_once(server, data):
    """One refusal and the end of the connection: what follows is never taken for another request."""
    answer = send(server, data)
    assert b"smuggled" not in answer
    assert len(statuses(answer)) <= 1 and all(400 <= status < 500 for status in statuses(answer)), answer[:300]
    alive(server)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (f"GET {API}/experiments/get?experiment_id=0 HTTP/1.1\r\n\r\n", 403),
        (GET + "Host: evil.example\r\n\r\n", 403),
        (f"GET {API}/experiments/get?experiment_id=0 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (f"GET {API}/experiments/get?experiment_id=0 HTTP/1.1\r\nHost: 127.0.0.1@evil.example\r\n\r\n", 403),
        (f"GET {API}/experiments/get?experiment_id=0 HTTP/1.1\r\nHost: evil.example#127.0.0.1\r\n\r\n", 403),
        (f"GET {API}/experiments/get?experiment_id=0 HTTP/1.0\r\nHost: evil.example\r\n\r\n", 403),
        ("GET http://169.254.169.254/latest HTTP/1.1\r\n" + HOST + "\r\n", 404),
        ("GET file:///etc/passwd HTTP/1.1\r\n" + HOST + "\r\n", 404),
        ("CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + HOST + "\r\n", 400),
        ("TRACE / HTTP/1.1\r\n" + HOST + "\r\n", 405),
        ("OPTIONS * HTTP/1.1\r\n" + HOST + "\r\n", 404),
        (GET + "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n", 200),
        (GET + "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", 200),
        (GET + "Expect: 200-nothing\r\n\r\n", 200),
    ],
)
def test_odd_requests_have_plain_answers(server, head, expected):
    """No proxying, no tunnels, no upgrades, no other host; and no failure."""
    found = statuses(send(server, head))
    assert found[:1] == [expected] or (expected == 404 and found[:1] == [400]), found
    alive(server)


def test_a_head_has_a_bound(server):
    """Long lines, many headers and endless heads are refused and not kept."""
    for data in (
        "GET /" + "a" * 200_000 + " HTTP/1.1\r\n" + HOST + "\r\n",
        GET + "X: " + "a" * 200_000 + "\r\n\r\n",
        GET + "X: a\r\n" * 40_000 + "\r\n",
        GET + "Cookie: " + "a=b; " * 30_000 + "\r\n\r\n",
    ):
        answer = send(server, data)
        assert statuses(answer) in ([431], [400], []), answer[:200]
    before = resident_mib(server)
    with connect(server) as connection:
        sent = 0
        with contextlib.suppress(OSError):
            connection.sendall((GET + "X: ").encode())
            while sent < 64 << 20:
                sent += connection.send(b"a" * 65_536)
        assert sent < 8 << 20, "an endless header is read on and on"
    assert resident_mib(server) < before + 30
    alive(server)


def test_pipelined_requests_are_answered_in_order(server):
    """Many requests at once on one connection: each answer is there, in order, and a broken one ends it."""
    run = new_run(server)
    asked = "".join(
        f"GET {API}/runs/get?run_id={run if index % 2 else 'none'} HTTP/1.1\r\n{HOST}\r\n" for index in range(40)
    )
    answer = send(server, asked + "GET /health HTTP/1.1\r\nConnection: close\r\n" + HOST + "\r\n", None)
    assert statuses(answer) == [404, 200] * 20 + [200]


# bodies


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"run_id":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"max_results": ' + b"9" * 1_000_000 + b"}",
        b'{"max_results": 1e999}',
        b'{"max_results": -1e999999999}',
        b'{"max_results": 1, "max_results": "x"}',
        b'{"max_results": NaN}',
        b'{"filter": "\xff\xfe"}',
        b'{"filter": "\\ud800"}',
        b'{"filter": "\\u0000"}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b'"' + b"\\" * 99_999 + b'"',
        b'{"filter": "' + b"(" * 20_000 + b'"}',
        b'{"filter": "' + b"NOT " * 20_000 + b'name = 1"}',
        b'{"filter": "' + b"name = 'a' AND " * 20_000 + b"name = 'b'\"}",
        b'{"filter": "name LIKE \'' + b"%_" * 4_000 + b"'\"}",
        b'{"order_by": [' + b'"name",' * 50_000 + b'"name"]}',
        b'{"page_token": "' + b"A" * 1_000_000 + b'"}',
        b"{" + b'"a":{},' * 300_000 + b'"b":1}',
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_hostile_json(server, body):
    """Nested, endless, doubled and undecodable JSON is a wrong request: quickly, and without a failure."""
    for path in ("/experiments/search", "/runs/search", "/runs/log-batch", "/logged-models/search"):
        began = time.monotonic()
        answer = request(server, "POST", API + path, body)
        assert statuses(answer) and statuses(answer)[0] in (200, 400, 404, 413), (path, answer[:300])
        assert time.monotonic() - began < 20, path
    alive(server)


def test_many_small_objects_do_not_become_a_large_heap(server):
    """A body within its limit cannot cost a hundred times its size."""
    before = resident_mib(server)
    for item in (b"{}", b"[]", b'{"key":"a"}', b'"aa"', b"1.5"):
        body = b'{"run_id": "a", "metrics": [' + (item + b",") * ((20 << 20) // (len(item) + 1)) + item + b"]}"
        assert statuses(request(server, "POST", API + "/runs/log-batch", body))[0] == 400
    assert resident_mib(server) < before + 150
    alive(server)


@pytest.mark.parametrize("coding", ["gzip", "zstd", "deflate", "br", "gzip, gzip"])
def test_compressed_bodies_are_not_unpacked(server, coding):
    """A bomb stays packed: the API takes no content codings."""
    before = resident_mib(server)
    bomb = gzip.compress(b'{"run_id": "' + b"a" * (50 << 20) + b'"}', 1)
    answer = request(server, "POST", API + "/runs/log-batch", bomb, JSON + f"Content-Encoding: {coding}\r\n")
    assert statuses(answer)[0] in (400, 415)
    assert resident_mib(server) < before + 100


def test_a_packed_sql_statement_has_a_bound(server):
    """SQL may come packed, and a bomb among it is refused by the store without harm to it."""
    bomb = gzip.compress(b"SELECT '" + b"a" * (50 << 20) + b"'", 1)
    answer = request(server, "POST", "/", bomb, "Content-Encoding: gzip\r\n")
    assert statuses(answer)[0] >= 400 and len(answer) < 100_000
    assert (
        body_of(request(server, "POST", "/", gzip.compress(b"SELECT 1"), "Content-Encoding: gzip\r\n"))[-2:] == b"1\n"
    )


def test_chunked_bodies_have_the_same_bound(server):
    """Without a declared length the limit holds as well; the client still gets to read the refusal."""
    with connect(server) as connection:
        connection.sendall(
            f"POST {API}/runs/log-batch HTTP/1.1\r\n{HOST}{JSON}Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        with contextlib.suppress(OSError):
            for _ in range(40):
                connection.sendall(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")
        assert statuses(read_all(connection))[:1] in ([413], [])
    alive(server)


# artifacts


@pytest.mark.parametrize(
    "name",
    [
        "a\r\nSet-Cookie: x=1",
        "a\nLocation: http://evil.example",
        'a"; filename="b.exe',
        "a\x00b",
        "é\u202egpj.exe",
        "a;b",
        "\u2028",
        "a" * 250,
    ],
)
def test_names_cannot_become_headers(server, name):
    """A file's name is quoted in Content-Disposition, or refused."""
    run = new_run(server)
    target = f"{PROXY}/0/{run}/artifacts/{quote(name, safe='')}"
    stored = request(server, "PUT", target, b"x", "")
    assert statuses(stored)[0] in (200, 400, 404)
    answer = request(server, "GET", target)
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"set-cookie" not in head and b"\nlocation" not in head
    if statuses(stored)[0] == 200:
        assert statuses(answer) == [200] and head.count(b"content-disposition") == 1


@pytest.mark.parametrize("name", ["x.html", "x.svg", "x.xhtml", "x.xml", "x.js", "x.pdf", "x.mht", "x", "x.unknown"])
def test_user_files_are_never_pages_of_ours(server, name):
    """Whatever is uploaded comes back as an attachment, in a sandbox, with its type not guessed; in every route."""
    run = new_run(server)
    path = f"{PROXY}/0/{run}/artifacts/{name}"
    page = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(1)</script></svg>"
    assert statuses(request(server, "PUT", path, page, "Content-Type: text/html\r\n")) == [200]
    for target in (path, f"/get-artifact?run_id={run}&path={name}"):
        head = request(server, "GET", target).partition(b"\r\n\r\n")[0].lower().decode()
        assert "content-disposition: attachment" in head and "x-content-type-options: nosniff" in head
        assert "sandbox" in head and "default-src 'none'" in head


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1:1/x", "https://169.254.169.254/", "ftp://127.0.0.1/x", "gopher://127.0.0.1:25/", "file:///etc",
     "/etc", "file:/etc", "file://localhost/etc", "FILE:///etc", "dict://127.0.0.1/", "memory://x", "github://a:b@/",
     "zip://x::file:///etc/passwd", "simplecache::file:///etc", "mlflow-artifacts:/../../etc",
     "mlflow-artifacts:/%2e%2e/%2e%2e/etc", "mlflow-artifacts://evil.example/etc", "mlflow-artifacts:////etc"],
)  # fmt: skip
def test_the_server_fetches_no_foreign_address(server, location):
    """Whatever an experiment says about where its artifacts lie, the server looks below its own root only."""
    body = json.dumps({"name": f"at {location} {time.monotonic_ns()}", "artifact_location": location}).encode()
    made = request(server, "POST", f"{API}/experiments/create", body)
    assert statuses(made)[0] in (200, 400)
    if statuses(made)[0] != 200:
        return
    experiment = json.loads(body_of(made))["experiment_id"]
    start = json.dumps({"experiment_id": experiment, "start_time": 1}).encode()
    run = json.loads(body_of(request(server, "POST", f"{API}/runs/create", start)))["run"]["info"]["run_id"]
    for target in (
        f"{API}/artifacts/list?run_id={run}",
        f"{API}/artifacts/list?run_id={run}&path=..",
        f"/get-artifact?run_id={run}&path=passwd",
    ):
        answer = request(server, "GET", target)
        assert statuses(answer)[0] in (200, 400, 404) and b"root:x:" not in answer
        assert b'"files"' not in answer
    answer = request(server, "POST", f"{API}/upload-artifact?run_uuid={run}&path=runstream-was-here", b"x", "")
    assert not Path("/etc/runstream-was-here").exists() and statuses(answer)[0] in (200, 400)


# slow clients


def test_silent_and_half_open_clients_are_dropped(server):
    """Hundreds of connections that say nothing, or half of something, cost no memory, and end by themselves."""
    alive(server)
    before, files = resident_mib(server), descriptors(server)
    half = [b"", b"G", b"GET /health HT", GET.encode(), b"\r\n", POST.encode() + b"Content-Length: 10\r\n\r\n{"]
    held = []
    try:
        for index in range(300):
            connection = connect(server)
            with contextlib.suppress(OSError):
                connection.sendall(half[index % len(half)])
            held.append(connection)
        alive(server)
        assert resident_mib(server) < before + 30
        # All but those in the middle of a body, which have the request's whole time, are closed by the server.
        waiting = [connection for index, connection in enumerate(held) if index % len(half) != 5]
        deadline = time.monotonic() + 60
        for connection in waiting:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            read_all(connection)
            assert time.monotonic() < deadline, "a silent connection is kept"
    finally:
        for connection in held:
            connection.close()
    until(lambda: descriptors(server) <= files + 5, 30, "descriptors of dropped connections stay open")
    alive(server)


def test_too_many_connections_are_refused_at_once(server):
    """Beyond the limit a connection is answered 503 with Retry-After; those within it go on."""
    held = [connect(server) for _ in range(400)]
    try:
        with connect(server) as late:
            answer = read_all(late)
        assert statuses(answer) == [503] and b"retry-after: 1" in answer
        held[0].sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n" + HOST.encode() + b"\r\n")
        assert statuses(read_all(held[0])) == [200]
    finally:
        for connection in held:
            connection.close()
    until(lambda: statuses(send(server, "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")) == [200], 30, "no place")


def test_an_upload_that_stops_is_ended(server):
    """An upload that falls silent is answered 408, and leaves no file behind."""
    run = new_run(server)
    with connect(server) as connection:
        connection.sendall(f"PUT {PROXY}/0/{run}/artifacts/x HTTP/1.1\r\n{HOST}Content-Length: 100\r\n\r\nabc".encode())
        assert statuses(read_all(connection)) == [408]
    assert statuses(request(server, "GET", f"{PROXY}/0/{run}/artifacts/x")) == [404]


def test_clients_that_do_not_read_cost_nothing_lasting(server):
    """Large answers that nobody reads do not pile up in memory once their clients are gone."""
    run = new_run(server)
    blob = os.urandom(1 << 20) * 24
    assert statuses(request(server, "PUT", f"{PROXY}/0/{run}/artifacts/big", blob, "")) == [200]
    before, files = resident_mib(server), descriptors(server)
    held = []
    for _ in range(20):
        connection = connect(server)
        connection.sendall(f"GET {PROXY}/0/{run}/artifacts/big HTTP/1.1\r\n{HOST}\r\n".encode())
        assert connection.recv(1_000)
        held.append(connection)
    assert resident_mib(server) < before + 60
    alive(server)
    for connection in held:
        connection.close()
    until(lambda: descriptors(server) <= files + 5, 30, "files of unread downloads stay open")


def test_the_storm_leaves_no_growth(server):
    """A second storm of mixed attacks costs no more memory or descriptors than the first."""

    def storm() -> None:
        for _ in range(15):
            send(server, b"\x00\xff" * 500)
            send(server, POST + "Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n")
            request(server, "POST", API + "/runs/log-batch", b"[" * 20_000)
            request(server, "GET", f"{PROXY}/%252e%252e/%252e%252e/etc/passwd")
            request(server, "GET", f"/nothing/{time.monotonic_ns()}")
            request(server, "GET", f"{API}/runs/get?run_id={time.monotonic_ns()}")
            send(server, GET.replace("Host: 127.0.0.1", f"Host: h{time.monotonic_ns()}.example") + "\r\n")

    storm()
    before, files = resident_mib(server), descriptors(server)
    storm()
    storm()
    assert resident_mib(server) < before + 15
    until(lambda: descriptors(server) <= files + 3, 30, "descriptors leak")


def test_nothing_failed_inside(server):
    """After all this the server's own log holds no traceback."""
    said = "".join(server.lines)
    assert "Traceback" not in said, said[said.index("Traceback") - 200 :][:4_000]
