"""SQL over HTTP on the server's port: Python's driver, curl, logins, cancelling, overload, and what is hostile."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import clickhouse_connect
import psutil
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError

from runstream_ingest.local.engine import EngineSettings
from runstream_schemas.layout import DataDirectory, ServerAddress
from tests.services.process import wait_until

from .mlflow_server import served
from .sql_line import POINTS, RUNS, Line, Place, sql_line, wait_for

pytestmark = [pytest.mark.chdb, pytest.mark.timeout(240)]

SLOW = "SELECT count() FROM numbers(100000000000) WHERE NOT ignore(rand())"
"""A statement that runs into its time limit (60 s) if nobody stops it."""


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with sql_line(tmp_path_factory.mktemp("port")) as found:
        yield found


@pytest.fixture(scope="module")
def server(line: Line) -> Place:
    return line.places["server"]


@pytest.fixture(params=["server", "store"])
def place(request: pytest.FixtureRequest, line: Line) -> Place:
    return line.places[request.param]


def ask(
    place: Place, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None, **parameters: str
) -> tuple[int, dict[str, str], bytes]:
    """One raw request, with the place's credentials unless `headers` has others."""
    login = b64encode(f"{place.user}:{place.password}".encode()).decode()
    connection = http.client.HTTPConnection(place.host, place.port, timeout=90)
    try:
        sent = {"Authorization": f"Basic {login}"} | (headers or {})
        connection.request(method, f"/?{urlencode(parameters)}", body, {k: v for k, v in sent.items() if v})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_python_driver_reads_all_shapes(place: Place) -> None:
    """Rows, DataFrames, Arrow, streams, parameters, settings, with each compression."""
    for compress in (False, "lz4", "zstd", "gzip"):
        client = place.client(compress=compress)
        rows = client.query("SELECT key, count() FROM metrics GROUP BY key ORDER BY key").result_rows
        assert rows == [("loss", RUNS * POINTS), ("odd", RUNS)]
        frame = client.query_df("SELECT step, value FROM metrics WHERE key = {k:String}", parameters={"k": "loss"})
        assert frame["step"].max() == POINTS - 1
        assert client.query_arrow("SELECT number FROM numbers(300000)").num_rows == 300_000
        with client.query_row_block_stream("SELECT number FROM numbers(2000000)") as blocks:
            assert sum(len(block) for block in blocks) == 2_000_000
        value = "it's; \\ ä\t\n"
        assert client.query("SELECT {v:String}", parameters={"v": value}).result_rows == [(value,)]
        joined = "SELECT r.x FROM (SELECT 1 AS k) AS l LEFT JOIN (SELECT 2 AS k, 'x' AS x) AS r USING (k)"
        assert client.query(joined, settings={"join_use_nulls": 1}).result_rows == [(None,)]
        assert client.query("SELECT run_id FROM runs WHERE 0").column_names == ("run_id",)
        with pytest.raises(DatabaseError) as failure:
            client.query("SELECT nope FROM runs")
        assert failure.value.code == 47
        client.close()


def test_python_driver_with_long_parameters_and_sessions(place: Place) -> None:
    """Parameters that do not fit a URL travel in a form; a session is accepted and keeps nothing."""
    client = place.client(session_id="mine")
    ids = [f"{n:032x}" for n in range(20_000)]
    assert client.query("SELECT length({ids:Array(String)})", parameters={"ids": ids}).result_rows == [(20_000,)]
    with pytest.raises(ClickHouseError):
        client.command("SET max_threads = 1")
    with pytest.raises(ClickHouseError, match="external data is not supported"):
        from clickhouse_connect.driver.external import ExternalData

        data = ExternalData(file_name="x.csv", fmt="CSV", structure="a UInt8", data=b"1\n")
        client.query("SELECT * FROM x", external_data=data)
    client.close()


def test_an_error_in_mid_stream_is_an_error(place: Place) -> None:
    """Through the server as at the store: no client takes a cut result for a whole one."""
    sql = "SELECT number, throwIf(number = 2500000, 'in the middle') FROM numbers(3000000)"
    client = place.client()
    with pytest.raises(ClickHouseError, match="in the middle"):
        client.query(sql, settings={"max_threads": 1}).result_rows  # noqa: B018 (rows are read when asked for)
    client.close()
    with pytest.raises(http.client.IncompleteRead):
        ask(place, query=sql, max_threads="1")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(server: Place) -> None:
    """As the documentation writes it: GET and POST, formats, compression, HEAD, ping, a failing exit code."""
    url = f"http://{server.host}:{server.port}"

    def curl(*arguments: str) -> str:
        done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    assert curl(f"{url}/", "-d", "SELECT 1 AS x FORMAT JSONEachRow") == '{"x":1}\n'
    assert curl(f"{url}/?query=SELECT%201&default_format=CSVWithNames") == '"1"\n1\n'
    assert curl("--compressed", f"{url}/?enable_http_compression=1", "-d", "SELECT 'packed'") == "packed\n"
    assert curl(f"{url}/ping") == "Ok.\n"
    assert "200" in curl("-I", f"{url}/?query=SELECT%201").splitlines()[0]
    assert "Code: 62." in curl(f"{url}/", "-d", "SELEKT 1")
    piped = curl(f"{url}/?query=SELECT%20sum(number)%20FROM%20numbers(10)", "--data-binary", "@/dev/null")
    assert piped == "45\n"


def test_formats_headers_and_status(place: Place) -> None:
    """FORMAT, then X-ClickHouse-Format, then default_format; the summary counts; errors have their status."""
    assert ask(place, query="SELECT 1 AS x", default_format="JSONEachRow")[2] == b'{"x":1}\n'
    assert ask(place, headers={"X-ClickHouse-Format": "CSV"}, query="SELECT 'a'")[2] == b'"a"\n'
    status, headers, _ = ask(place, query="SELECT number FROM numbers(7)")
    assert (status, json.loads(headers["x-clickhouse-summary"])["result_rows"]) == (200, "7")
    assert headers["content-type"].startswith("text/tab-separated-values")
    for sql, status, code in (
        ("SELECT nope", 400, "47"),
        ("SELECT * FROM nope", 404, "60"),
        ("DROP TABLE x", 403, "164"),
    ):
        found, headers, body = ask(place, "POST", sql.encode())
        assert (found, headers["x-clickhouse-exception-code"]) == (status, code), body
        assert body.startswith(f"Code: {code}. DB::Exception: ".encode())


def test_logins_in_every_form(tmp_path: Path) -> None:
    """Basic, Bearer, ClickHouse's headers and the URL; without one, ClickHouse's own kind of error."""
    file = tmp_path / "auth.json"
    add = [
        sys.executable,
        "-m",
        "runstream",
        "server",
        "auth",
        "add-token",
        "dash",
        "--role",
        "read",
        "--file",
        str(file),
    ]
    done = subprocess.run(add, capture_output=True, text=True, check=True, timeout=60)
    token = next(word for word in (done.stdout + done.stderr).split() if word.startswith("rst_"))
    with served(tmp_path / "data", ["--auth-file", str(file)]) as guarded:
        place = Place("127.0.0.1", int(guarded.url.rsplit(":", 1)[1]), "dash", token)
        no = {"Authorization": ""}
        assert ask(place, query="SELECT 1")[2] == b"1\n"
        store = ServerAddress.read(DataDirectory(tmp_path / "data").server_file)
        assert store is not None
        for headers, parameters in (
            ({}, {}),
            ({"Authorization": f"Bearer {token}"}, {}),
            (no | {"X-ClickHouse-User": "dash", "X-ClickHouse-Key": token}, {}),
            (no, {"user": "dash", "password": token}),
            (no, {"password": token}),
        ):
            status, _, body = ask(place, headers=headers, query="SELECT 1", **parameters)
            assert (status, body) == (200, b"1\n"), (headers, parameters, body)
        for headers, parameters in (
            (no, {}),
            ({"Authorization": "Bearer rst_wrong"}, {"password": token}),
            (no | {"X-ClickHouse-User": "default", "X-ClickHouse-Key": ""}, {}),
            (no | {"X-ClickHouse-User": "reader", "X-ClickHouse-Key": store.reader_token}, {}),
            (no, {"user": "writer", "password": store.writer_token}),
        ):
            status, answer, body = ask(place, headers=headers, query="SELECT 1", **parameters)
            assert (status, answer["x-clickhouse-exception-code"]) == (401, "516"), (headers, parameters, body)
            assert body.startswith(b"Code: 516. ")
        client = place.client()
        assert client.query("SELECT 1").result_rows == [(1,)]
        client.close()
        by_token = clickhouse_connect.get_client(host=place.host, port=place.port, access_token=token)
        assert by_token.query("SELECT 1").result_rows == [(1,)]
        by_token.close()
        with pytest.raises(DatabaseError) as failure:
            clickhouse_connect.get_client(host=place.host, port=place.port, username="dash", password="wrong")
        assert failure.value.code == 516


def start(place: Place, sql: str) -> socket.socket:
    """Send a query and leave its answer unread."""
    connection = socket.create_connection((place.host, place.port))
    login = b64encode(f"{place.user}:{place.password}".encode()).decode()
    head = f"GET /?query={quote(sql)} HTTP/1.1\r\nHost: 127.0.0.1:{place.port}\r\nAuthorization: Basic {login}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


@pytest.mark.parametrize("sql", [SLOW, "SELECT number, rand() FROM numbers(100000000000)"])
def test_the_engine_stops_when_the_caller_leaves(line: Line, place: Place, sql: str) -> None:
    """Before the first byte of the answer and in its middle."""
    writer = line.writer()
    with start(place, sql):
        wait_for(lambda: line.running(writer) >= 1, 20)
    wait_for(lambda: line.running(writer) == 0, 10)
    writer.close()


def test_slow_queries_starve_neither_the_api_nor_ingest(line: Line, server: Place) -> None:
    """With 40 of them the API answers, runs are logged and read; who waits too long is told to come again."""
    writer = line.writer()
    sockets = [start(server, SLOW) for _ in range(40)]
    try:
        wait_for(lambda: line.running(writer) >= 4, 30)
        assert line.running(writer) <= 4
        # Without turns of its own each would wait for 30 s and fail.
        url = http.client.HTTPConnection(server.host, server.port, timeout=25)
        for number in range(10):
            body = json.dumps({"experiment_id": "0", "start_time": 1, "run_name": f"beside {number}"})
            url.request("POST", "/api/2.0/mlflow/runs/create", body, {"Content-Type": "application/json"})
            run = json.loads(url.getresponse().read())["run"]["info"]["run_id"]
            url.request("GET", f"/api/2.0/mlflow/runs/get?run_id={run}")
            assert json.loads(url.getresponse().read())["run"]["info"]["run_name"] == f"beside {number}"
        url.close()
        status, headers, body = ask(server, query="SELECT 1")
        assert status in (200, 503), body
        if status == 503:
            assert (headers["x-clickhouse-exception-code"], "retry-after" in headers) == ("202", True)
    finally:
        for each in sockets:
            each.close()
    wait_for(lambda: line.running(writer) == 0, 20)
    assert ask(server, query="SELECT 1")[2] == b"1\n"
    writer.close()


def test_a_large_result_passes_in_bounded_memory(line: Line, server: Place) -> None:
    """320 MB through both processes; a caller that does not read holds back the engine."""
    processes = [psutil.Process(line.server.process.pid), psutil.Process(line.store.pid)]
    ask(server, query="SELECT number, number FROM numbers(2000000) FORMAT RowBinary")
    before = [each.memory_info().rss for each in processes]
    peak, size = list(before), 0
    connection = http.client.HTTPConnection(server.host, server.port, timeout=90)
    connection.request("POST", "/", b"SELECT number, number FROM numbers(20000000) FORMAT RowBinary")
    answer = connection.getresponse()
    while data := answer.read(1 << 20):
        size += len(data)
        if size % (16 << 20) < len(data):
            peak = [max(known, each.memory_info().rss) for known, each in zip(peak, processes, strict=True)]
    connection.close()
    assert size == 320_000_000
    assert peak[0] - before[0] < 60e6
    assert peak[1] - before[1] < 150e6


FILE = b'--x\r\nContent-Disposition: form-data; name="_t"; filename="/etc/passwd"\r\n\r\n1\r\n--x--\r\n'
HOSTILE_REQUESTS: list[tuple[str, dict[str, str], dict[str, str], bytes | None]] = [
    ("GET", {"query": "SELECT name FROM settings", "database": "system"}, {}, None),
    ("GET", {"query": "SELECT 1", "database": "information_schema"}, {}, None),
    ("GET", {"query": "SELECT name FROM users"}, {"X-ClickHouse-Database": "system"}, None),
    ("GET", {"query": "SELECT 1", "format_template_resultset": "/etc/passwd", "default_format": "Template"}, {}, None),
    ("GET", {"query": "SELECT 1"}, {"X-ClickHouse-Format": "Template"}, None),
    ("GET", {"query": "SELECT 1", "format_schema": "/etc/passwd", "default_format": "Protobuf"}, {}, None),
    ("GET", {"query": "SELECT 1", "profile": "default"}, {}, None),
    ("GET", {"query": "SELECT 1", "additional_result_filter": "file('/etc/passwd') != ''"}, {}, None),
    ("GET", {"query": "SELECT 1 FROM runs", "additional_table_filters": "{'runs': 'file(1)'}"}, {}, None),
    ("GET", {"query": "SELECT 1", "param_x": "'; DROP TABLE points", "limit": "1; DROP TABLE points"}, {}, None),
    ("GET", {"query": "SELECT * FROM {t:Identifier}", "param_t": "system.users"}, {}, None),
    ("GET", {"query": "SELECT {f:Identifier}('/etc/passwd')", "param_f": "file"}, {}, None),
    ("POST", {"query": "SELECT 1;"}, {}, b"SET ROLE runstream_writer"),
    ("POST", {"query": "SELECT 1 /*"}, {}, b"*/ ; DROP TABLE points"),
    ("POST", {"query": "SELECT * FROM file('/etc/passwd',"}, {}, b"'LineAsString')"),
    ("POST", {}, {}, b"SELECT 1\0; DROP TABLE points"),
    ("POST", {}, {}, b"SELECT '\xff\xfe'"),
    ("POST", {}, {"Content-Encoding": "br"}, b"SELECT 1"),
    ("POST", {}, {"Content-Encoding": "gzip, gzip"}, b"SELECT 1"),
    ("POST", {"decompress": "1"}, {}, b"SELECT 1"),
    ("POST", {"compress": "1", "network_compression_method": "NONE"}, {}, b"SELECT 1"),
    ("POST", {}, {"Content-Type": "multipart/form-data; boundary=x"}, FILE),
    ("POST", {"_t_structure": "x String", "_t_format": "CSV"}, {}, b"SELECT * FROM _t"),
    ("POST", {}, {}, b"INSERT INTO points VALUES (1)"),
    ("POST", {"query": "INSERT INTO points FORMAT CSV"}, {}, b"1,2\n"),
    ("POST", {"query_id": "a'b"}, {}, b"SELECT 1"),
    ("POST", {"query_id": "x", "replace_running_query": "1"}, {}, b"SELECT 1"),
    ("POST", {"log_comment": "x"}, {}, b"SELECT 1"),
    ("POST", {"session_id": "x", "session_timezone": "'; DROP TABLE points; --"}, {}, b"SELECT now()"),
    ("POST", {}, {}, b"SELECT * FROM system.query_log"),
    ("POST", {}, {}, b"SELECT * FROM system.processes"),
    ("POST", {}, {}, b"KILL QUERY WHERE 1"),
    ("POST", {}, {}, b"SYSTEM SHUTDOWN"),
    ("POST", {}, {}, b"USE system"),
    ("POST", {}, {}, b"SELECT 1 INTO OUTFILE '/tmp/runstream-must-not-exist'"),
    ("POST", {}, {}, b"SELECT getClientHTTPHeader('Authorization')"),
]  # fmt: skip


def test_hostile_requests_are_refused(line: Line, place: Place) -> None:
    """By URL, header and body, each with an error that has a code; no file's text, no token in any answer."""
    secrets = (b"root:", line.store.reader_token.encode(), line.store.writer_token.encode())
    for method, parameters, headers, body in HOSTILE_REQUESTS:
        status, answer, found = ask(place, method, body, headers, **parameters)
        assert 400 <= status < 600, (method, parameters, headers, body, found[:300])
        assert answer.get("x-clickhouse-exception-code", "0").isdigit(), (parameters, body, found)
        assert found.startswith(b"Code: "), (parameters, body, found)
        assert not any(secret in found for secret in secrets)
    assert not Path("/tmp/runstream-must-not-exist").exists()
    assert ask(place, query="SELECT count() FROM runs")[0] == 200


BOMBS = [
    "SELECT groupArray(number) FROM numbers(10000000000)",
    "SELECT groupUniqArray(toString(number)) FROM numbers(10000000000)",
    "SELECT uniqExact(number) FROM numbers(100000000000)",
    "SELECT arrayMap(x -> x, range(4000000000))",
    "SELECT repeat('x', 4000000000)",
    "SELECT repeat(repeat('x', 1000000), 1000000)",
    "SELECT arrayJoin(arrayJoin([range(10000)])) FROM numbers(1000000000) ORDER BY 1 DESC",
    "SELECT count() FROM numbers(1000000) AS a CROSS JOIN numbers(1000000) AS b CROSS JOIN numbers(1000000) AS c",
    "SELECT replaceRegexpAll(repeat('a', 1000000), '(a*)*b', 'c')",
    "SELECT match(repeat('a', 1000000), '(a+)+$') FROM numbers(100000)",
    "SELECT countSubstrings(repeat('a', 10000000), 'aaaa') FROM numbers(1000000)",
    "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT sum(n) FROM t",
    "SELECT sum(sipHash64(number, number)) FROM numbers_mt(1000000000000)",
    "SELECT number FROM numbers(100000000000) ORDER BY rand()",
    "SELECT * FROM generate_series(1, 100000000000) ORDER BY 1 DESC",
    "SELECT formatDateTime(now(), repeat('%Y', 10000000)) FROM numbers(1000000)",
    "SELECT JSONExtract(repeat('[', 1000000), 'Array(Array(Int8))') FROM numbers(100000000) WHERE NOT ignore(rand())",
    "SELECT bar(number, 0, 1, 1000000000) FROM numbers(1000000)",
    "SELECT leftPad('x', 4000000000, 'y')",
    "SELECT arrayWithConstant(4000000000, 1)",
    "SELECT space(4000000000)",
]


@pytest.mark.parametrize("sql", BOMBS)
def test_bombs_end_by_their_limits(line: Line, server: Place, sql: str) -> None:
    """Of processor and of memory: refused or stopped, with a code; the store is there and keeps to its bound."""
    process = psutil.Process(line.store.pid)
    began = time.monotonic()
    status, answer, _ = ask(server, "POST", sql.encode(), max_execution_time="3", default_format="Null")
    # The few that are cheap after all (RE2 needs no backtracking) may be answered.
    assert status == 200 or int(answer["x-clickhouse-exception-code"]) > 0
    assert time.monotonic() - began < 45
    assert process.is_running()

    def answers_and_is_small() -> bool:
        assert ask(server, query="SELECT 1")[2] == b"1\n"
        return bool(process.memory_info().rss < bound)  # the allocator gives pages back by and by

    # How much a bomb takes before its time is over depends on the machine; never more than one query may.
    bound = EngineSettings().max_query_memory_bytes + 1_000_000_000
    wait_until(answers_and_is_small, 60, f"the store's memory below {bound:,} bytes")


def test_pages_of_other_sites_cannot_ask(server: Place) -> None:
    """Neither by a form nor by an image whose URL is a query."""
    assert ask(server, "POST", b"SELECT 1", {"Origin": "https://evil.example"})[0] == 403
    assert ask(server, headers={"Sec-Fetch-Site": "cross-site"}, query="SELECT 1")[0] == 403
    assert ask(server, headers={"Host": "evil.example"}, query="SELECT 1")[0] == 403


def test_headers_smuggle_nothing(line: Line, server: Place) -> None:
    """Two framings, credentials for the store, and line breaks in the URL do not reach it as something else."""
    for request in (
        b"POST /?query=SELECT%201 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /?query=DROP%20TABLE%20points HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"POST /?query=SELECT%201 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nxxxxx",
        b"GET /?query=SELECT%201&x=%0d%0aX-ClickHouse-User:%20writer HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ):
        with socket.create_connection((server.host, server.port), timeout=30) as connection:
            connection.sendall(request)
            assert connection.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 200"))
    for headers in (
        {"X-ClickHouse-User": "writer", "X-ClickHouse-Key": line.store.writer_token},
        {"Authorization": f"Bearer {line.store.writer_token}"},
    ):
        status, answer, _ = ask(server, "POST", b"DROP TABLE points", headers)
        assert (status, answer["x-clickhouse-exception-code"]) == (403, "164")
    assert ask(server, query="SELECT count() > 0 FROM points")[2] == b"1\n"


def test_many_threads_get_their_own_answers(server: Place) -> None:
    """Kept connections mix up nothing, failing queries among them."""
    wrong: list[object] = []

    def work(seed: int) -> None:
        for turn in range(15):
            number = seed * 100 + turn
            found = ask(server, query=f"SELECT {number}, sum(number) FROM numbers({number})")[2]
            if found != f"{number}\t{number * (number - 1) // 2}\n".encode():
                wrong.append(found)
            if b"mine" not in ask(server, query=f"SELECT throwIf(1, 'mine {number}')")[2]:
                wrong.append("no error")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_store_that_starts_anew_is_found(line: Line, server: Place) -> None:
    """Its address and its tokens are others; the server's kept connections are not in the way."""
    store = psutil.Process(line.store.pid)
    store.kill()
    wait_for(lambda: not store.is_running() or store.status() == psutil.STATUS_ZOMBIE, 20)
    assert ask(server, query="SELECT count() FROM runs")[2].strip().isdigit()
