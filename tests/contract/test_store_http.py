"""What clickhouse_connect, curl and plain HTTP may rely on at the local store process."""

from __future__ import annotations

import gzip
import io
import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import fastavro
import lz4.frame
import psutil
import pytest
import zstandard
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, OperationalError

from tests.ingest.local_store import LocalStore, local_store, wait_for


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStore]:
    with local_store(tmp_path_factory.mktemp("http") / "data") as process:
        yield process


@pytest.fixture(scope="module")
def reader(store: LocalStore) -> Client:
    return store.client()


@pytest.fixture(scope="module")
def writer(store: LocalStore) -> Client:
    return store.writer()


@pytest.fixture
def table(writer: Client) -> Iterator[str]:
    """An empty table (a UInt64, b String)."""
    name = f"t_{uuid.uuid4().hex}"
    writer.command(f"CREATE TABLE {name} (a UInt64, b String) ENGINE = MergeTree ORDER BY a")
    yield name
    writer.command(f"DROP TABLE {name}")


def count(client: Client, table: str) -> int:
    return int(client.query(f"SELECT count() FROM {table}").result_rows[0][0])


def test_select_gives_rows_names_and_types(reader: Client) -> None:
    """Values of every common type arrive as Python's own."""
    result = reader.query(
        "SELECT 1 AS i, -1.5 AS f, 'ä\\n' AS s, NULL AS n, [1, 2] AS l, map('k', 'v') AS m, (1, 'x') AS t, "
        "toDateTime64('2024-01-02 03:04:05.678', 3, 'UTC') AS d, "
        "bitShiftLeft(toUInt128(1), 100) AS u, nan AS q, true AS b"
    )
    assert result.column_names == ("i", "f", "s", "n", "l", "m", "t", "d", "u", "q", "b")
    (row,) = result.result_rows
    assert row[:7] == (1, -1.5, "ä\n", None, [1, 2], {"k": "v"}, (1, "x"))
    assert row[7].replace(tzinfo=UTC) == datetime(2024, 1, 2, 3, 4, 5, 678000, UTC)
    assert row[8] == 1 << 100
    assert row[9] != row[9]
    assert row[10] is True


@pytest.mark.parametrize(
    "value", ["", "a", "'", "\\", "\t\n\r\0", "ä😀", "{x:String}", "'); DROP TABLE points; --", "x" * 10_000]
)
def test_string_parameters_arrive_unchanged(reader: Client, value: str) -> None:
    """Bound on the server side, whatever they hold."""
    assert reader.query("SELECT {value:String}", parameters={"value": value}).result_rows == [(value,)]


def test_parameters_of_other_types(reader: Client) -> None:
    """Arrays, numbers, times and identifiers can be bound."""
    parameters = {"l": ["a'b", "c\\d"], "n": 1 << 60, "f": 0.1, "t": datetime(2024, 1, 2, 3, 4, 5), "name": "runs"}
    result = reader.query(
        "SELECT {l:Array(String)}, {n:Int64}, {f:Float64}, {t:DateTime('UTC')}", parameters=parameters
    )
    (row,) = result.result_rows
    assert row[:3] == (["a'b", "c\\d"], 1 << 60, 0.1)
    assert row[3].replace(tzinfo=None) == datetime(2024, 1, 2, 3, 4, 5)
    assert reader.query("SELECT count() FROM {name:Identifier}", parameters=parameters).result_rows == [(0,)]


def test_long_parameters_travel_in_a_form(reader: Client) -> None:
    """What does not fit into a URL: a list of 20,000 run ids."""
    ids = [f"{n:032x}" for n in range(20_000)]
    sql = "SELECT length({ids:Array(String)}), has({ids:Array(String)}, {one:String})"
    assert reader.query(sql, parameters={"ids": ids, "one": ids[-1]}).result_rows == [(20_000, 1)]
    with pytest.raises(DatabaseError):
        reader.query("SELECT file({ids:String})", parameters={"ids": "/etc/passwd" + " " * 50_000})


def test_empty_results_keep_their_columns(reader: Client) -> None:
    """The engine sends nothing for them; the interface adds the header."""
    for sql in ("SELECT run_id, status FROM runs WHERE 0", "SELECT run_id, status FROM runs LIMIT 0"):
        result = reader.query(sql)
        assert result.column_names == ("run_id", "status")
        assert result.result_rows == []


def test_data_frames_and_arrow(reader: Client) -> None:
    """pandas and Arrow results hold what was asked for, streamed or whole."""
    sql = "SELECT number AS n, toString(number) AS s FROM numbers(250000)"
    assert reader.query_df(sql)["n"].sum() == 250_000 * 249_999 // 2
    table = reader.query_arrow(sql)
    assert table.num_rows == 250_000
    with reader.query_arrow_stream(sql) as stream:
        assert sum(batch.num_rows for batch in stream) == 250_000
    with reader.query_df_stream(sql) as stream:
        assert sum(len(frame) for frame in stream) == 250_000
    with reader.query_rows_stream(sql) as stream:
        assert sum(row[0] for row in stream) == 250_000 * 249_999 // 2


@pytest.mark.parametrize("format_name", ["CSV", "CSVWithNames", "TSV", "JSON", "JSONEachRow", "JSONCompact", "Parquet"])
def test_raw_formats(reader: Client, format_name: str) -> None:
    """A large result in a text or file format is one valid document, not several glued together."""
    data = reader.raw_query("SELECT number AS n FROM numbers(200000)", fmt=format_name)
    if format_name == "JSON":
        assert len(json.loads(data)["data"]) == 200_000
    elif format_name == "JSONCompact":
        assert json.loads(data)["rows"] == 200_000
    elif format_name == "Parquet":
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(io.BytesIO(data)).num_rows == 200_000
    else:
        assert len(data.splitlines()) == 200_000 + (format_name == "CSVWithNames")


def test_json_arrays_of_rows_are_one_array(reader: Client) -> None:
    """The setting turns rows into a document, which must not come in pieces."""
    settings = {"output_format_json_array_of_rows": "1", "output_format_json_quote_64bit_integers": "0"}
    data = reader.raw_query("SELECT number AS n FROM numbers(300000)", fmt="JSONEachRow", settings=settings)
    assert [row["n"] for row in json.loads(data)] == list(range(300_000))
    assert json.loads(reader.raw_query("SELECT 1 AS n WHERE 0", fmt="JSONEachRow", settings=settings)) == []


def test_settings_that_change_nothing_are_taken(reader: Client) -> None:
    """What careful clients send."""
    settings = {"result_overflow_mode": "throw", "readonly": "1", "max_result_rows": "10"}
    assert reader.query("SELECT 1", settings=settings).result_rows == [(1,)]


def test_curl_gets_tab_separated_text(store: LocalStore) -> None:
    """GET ?query=, credentials in the URL, the format in the URL, a header or the SQL."""
    token = store.address().reader_token
    status, headers, body = store.request(user=None, query="SELECT 1, 'a'", user_="", password=token)
    assert status == 403  # the user is missing
    status, headers, body = store.request("GET", "/", None, None, user="reader", query="SELECT 1, 'a'")
    assert (status, body) == (200, b"1\ta\n")
    assert headers["x-clickhouse-format"] == "TabSeparated"
    assert json.loads(headers["x-clickhouse-summary"])["result_rows"] == "1"
    assert store.request(query="SELECT 1 AS x", default_format="JSONEachRow")[2] == b'{"x":1}\n'
    assert store.request(headers={"X-ClickHouse-Format": "CSV"}, query="SELECT 1, 'a'")[2] == b'1,"a"\n'
    assert store.request(query="SELECT 1 AS x FORMAT JSONEachRow -- done")[2] == b'{"x":1}\n'
    assert store.request("POST", body=b"+ 1", query="SELECT 1")[2] == b"2\n"
    bearer = {"Authorization": f"Bearer {token}"}
    assert store.request(user=None, headers=bearer, query="SELECT 1")[2] == b"1\n"
    assert store.request("HEAD", query="SELECT 1")[2] == b""
    assert store.request()[2] == b"Ok.\n"
    assert store.request(user=None, path="/ping")[2] == b"Ok.\n"


@pytest.mark.parametrize("coding", ["gzip", "zstd", "lz4", "deflate"])
def test_answers_are_compressed_when_asked(store: LocalStore, coding: str) -> None:
    """With enable_http_compression=1, small and large; never without."""
    import zlib

    unpack: Any = {
        "gzip": gzip.decompress,
        "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
        "lz4": lz4.frame.decompress,
        "deflate": zlib.decompress,
    }[coding]
    for rows in (10, 300_000):
        query = f"SELECT number FROM numbers({rows})"
        accept = {"Accept-Encoding": f"{coding}, identity;q=0.1"}
        _, headers, body = store.request(headers=accept, query=query, enable_http_compression="1")
        assert headers["content-encoding"] == coding
        assert len(unpack(body).splitlines()) == rows
        assert "content-encoding" not in store.request(headers=accept, query=query)[1]


@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_clickhouse_frames_both_ways(store: LocalStore, table: str, method: str) -> None:
    """compress=1 and decompress=1: small, large, empty, and broken by an error behind the last whole frame."""
    from runstream_ingest.local.frames import FrameCompressor, FrameDecompressor

    asked = {"compress": "1", "network_compression_method": method.upper()}
    for rows in (0, 10, 300_000):
        _, headers, body = store.request(query=f"SELECT number FROM numbers({rows})", **asked)
        assert "content-encoding" not in headers
        assert len(FrameDecompressor().decompress(body).splitlines()) == rows
    data = b"".join(b"%d,x\n" % n for n in range(300_000))
    query = f"INSERT INTO {table} (a, b) FORMAT CSV"
    framed = FrameCompressor(method).compress(data)
    assert store.request("POST", "/", framed, user="writer", query=query, decompress="1")[0] == 200
    assert store.request(query=f"SELECT count(), sum(a) FROM {table}")[2] == b"300000\t44999850000\n"
    assert store.request("POST", "/", framed[:-1], user="writer", query=query, decompress="1")[0] == 400
    damaged = framed[:100] + bytes([framed[100] ^ 1]) + framed[101:]
    assert store.request("POST", "/", damaged, user="writer", query=query, decompress="1")[0] == 400
    assert store.request(query=f"SELECT count() FROM {table}")[2] == b"300000\n"


@pytest.mark.parametrize("coding", ["zstd", "gzip", "frames"])
def test_a_bomb_is_not_unpacked(store: LocalStore, coding: str) -> None:
    """A few kilobytes that stand for gigabytes are refused before they fill the memory."""
    from runstream_ingest.local.frames import FrameCompressor

    process = psutil.Process(store.process.pid)
    before = process.memory_info().rss
    parameters, headers = {}, {"Content-Encoding": coding}
    if coding == "zstd":
        packer = zstandard.ZstdCompressor(level=3).compressobj()
        bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()
    elif coding == "gzip":
        bomb = gzip.compress(bytes(1 << 28))
    else:
        bomb = FrameCompressor("zstd").compress(bytes(1 << 20)) * 1_000
        parameters, headers = {"decompress": "1"}, {}
    assert len(bomb) < 400_000
    status, _, body = store.request("POST", "/", bomb, headers, **parameters)
    assert status == 400, body
    assert process.memory_info().rss - before < 450e6


@pytest.mark.parametrize("compress", [False, "lz4", "zstd", "gzip"])
def test_driver_inserts_and_reads_with_every_compression(store: LocalStore, table: str, compress: Any) -> None:
    """Native inserts, plain and compressed."""
    client = store.writer(compress=compress)
    rows = [[n, f"text {n}"] for n in range(5_000)]
    summary = client.insert(table, rows, column_names=["a", "b"])
    assert summary.written_rows == 5_000
    assert client.query(f"SELECT a, b FROM {table} ORDER BY a").result_rows == [(n, f"text {n}") for n in range(5_000)]


def avro(rows: int) -> bytes:
    schema = {
        "type": "record",
        "name": "r",
        "fields": [{"name": "a", "type": "long"}, {"name": "b", "type": "string"}],
    }
    file = io.BytesIO()
    fastavro.writer(file, fastavro.parse_schema(schema), ({"a": n, "b": str(n)} for n in range(rows)))
    return file.getvalue()


@pytest.mark.parametrize("size", [1, 1_000, 65_536])
def test_avro_arrives_from_a_generator_cut_anywhere(writer: Client, table: str, size: int) -> None:
    """What the worker sends: raw_insert of an Avro file as a generator body."""
    data = avro(3_000)
    pieces = (data[at : at + size] for at in range(0, len(data), size))
    summary = writer.raw_insert(table, ["a", "b"], pieces, fmt="Avro")
    assert int(summary.summary["written_rows"]) == 3_000
    assert writer.query(f"SELECT count(), sum(a) FROM {table}").result_rows == [(3_000, 2_999 * 1_500)]


@pytest.mark.parametrize(
    ("format_name", "data"),
    [
        ("CSV", b'1,"a\n\n;DROP TABLE points"\n2,b\n'),
        ("TSV", b"1\ta\n2\tb\n"),
        ("JSONEachRow", b'{"a":1,"b":"a"}\n\n{"a":2,"b":"b"}\n'),
        ("Values", b"(1,'a'),(2,'b')"),
    ],
)
def test_text_inserts(writer: Client, table: str, format_name: str, data: bytes) -> None:
    """Data is data: a blank line in it ends nothing."""
    writer.raw_insert(table, ["a", "b"], data, fmt=format_name)
    assert count(writer, table) == 2
    assert count(writer, "points") == 0


@pytest.mark.parametrize("coding", ["gzip", "zstd", "lz4"])
def test_compressed_bodies(store: LocalStore, table: str, coding: str) -> None:
    """Content-Encoding of an insert's body is undone on the way."""
    data = b"".join(b"%d,x\n" % n for n in range(100_000))
    packed = {"gzip": gzip.compress, "zstd": zstandard.compress, "lz4": lz4.frame.compress}[coding](data)
    query = f"INSERT INTO {table} (a, b) FORMAT CSV"
    status, headers, body = store.request("POST", "/", packed, {"Content-Encoding": coding}, user="writer", query=query)
    assert (status, body) == (200, b"")
    assert json.loads(headers["x-clickhouse-summary"])["written_rows"] == "100000"
    status, headers, _ = store.request(
        "POST", "/", b"not packed", {"Content-Encoding": coding}, user="writer", query=query
    )
    assert (status, headers["x-clickhouse-exception-code"]) == (400, "354")


def test_commands_and_ddl_of_the_writer(writer: Client) -> None:
    """CREATE, INSERT SELECT, INSERT VALUES, ALTER, DROP."""
    name = f"t_{uuid.uuid4().hex}"
    writer.command(f"CREATE TABLE {name} (a UInt64) ENGINE = MergeTree ORDER BY a")
    writer.command(f"INSERT INTO {name} SELECT number FROM numbers(10)")
    writer.command(f"INSERT INTO {name} (a) VALUES (10), (11)")
    writer.command(f"INSERT INTO {name} SELECT {{n:UInt64}}", parameters={"n": 12})
    assert count(writer, name) == 13
    writer.command(f"ALTER TABLE {name} ADD COLUMN b String DEFAULT 'x'")
    assert writer.query(f"SELECT DISTINCT b FROM {name}").result_rows == [("x",)]
    writer.command(f"DROP TABLE {name}")
    with pytest.raises(DatabaseError) as failure:
        writer.query(f"SELECT * FROM {name}")
    assert failure.value.code == 60


@pytest.mark.parametrize("data", [b"1,a\n2,b\nx,c\n", b"".join(b"%d,x\n" % n for n in range(2_000_000)) + b"x,c\n"])
def test_a_failed_insert_leaves_nothing(writer: Client, table: str, data: bytes) -> None:
    """Also where good rows for several blocks came before the bad one."""
    with pytest.raises(ClickHouseError):
        writer.raw_insert(
            table, ["a", "b"], (data[at : at + 262_144] for at in range(0, len(data), 262_144)), fmt="CSV"
        )
    assert count(writer, table) == 0


def test_an_insert_whose_client_leaves_writes_nothing(store: LocalStore, writer: Client, table: str) -> None:
    """The connection breaks before the last chunk."""
    address = store.address()
    head = (
        f"POST /?query=INSERT+INTO+{table}+(a,b)+FORMAT+CSV HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        f"X-ClickHouse-User: writer\r\nX-ClickHouse-Key: {address.writer_token}\r\n\r\n"
    )

    def waiting() -> int:
        """Inserts whose data has begun to come."""
        return len(list((store.directory.database / "tmp").glob("insert-*")))

    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(head.encode() + b"4\r\n1,a\n\r\n")
        wait_for(lambda: waiting() == 1, 10)
    wait_for(lambda: waiting() == 0, 10)
    assert count(writer, table) == 0


def running(writer: Client) -> int:
    """Queries that run beside this one."""
    return int(
        writer.query("SELECT count() FROM system.processes WHERE query NOT LIKE '%system.processes%'").result_rows[0][0]
    )


@pytest.mark.parametrize(
    ("sql", "code"),
    [
        ("SELECT * FROM nope", 60),
        ("SELECT nope FROM runs", 47),
        ("SELEKT 1", 62),
        ("SELECT (1", 62),
        ("SELECT throwIf(1)", 395),
        ("SELECT toUInt8('x')", 6),
        ("SELECT {missing:String}", 456),
        ("SELECT * FROM system.tables", 497),
        ("DROP TABLE points", 164),
    ],
)
def test_errors_carry_the_engines_code(reader: Client, sql: str, code: int) -> None:
    """And the message that names what is wrong; the next query is not affected."""
    with pytest.raises(DatabaseError) as failure:
        reader.query(sql)
    assert failure.value.code == code
    assert "DB::Exception" in str(failure.value)
    assert reader.query("SELECT 1").result_rows == [(1,)]


@pytest.mark.parametrize("rows_before", [0, 100_000, 3_000_000])
@pytest.mark.parametrize("compress", [False, True])
def test_an_error_in_mid_stream_is_never_a_shorter_result(store: LocalStore, rows_before: int, compress: bool) -> None:
    """Rows that were sent before the error do not pass for the whole result."""
    client = store.client(compress=compress)
    sql = f"SELECT number, throwIf(number >= {rows_before}, 'broken in the middle') FROM numbers(5000000)"
    with pytest.raises((DatabaseError, OperationalError)) as failure:
        client.query(sql, settings={"max_threads": 1}).result_rows  # noqa: B018 (rows are read when asked for)
    assert "broken in the middle" in str(failure.value)
    with pytest.raises(ClickHouseError), client.query_df_stream(sql, settings={"max_threads": 1}) as stream:
        for _ in stream:
            pass
    assert client.query("SELECT 1").result_rows == [(1,)]


def test_a_broken_answer_has_no_proper_end(store: LocalStore) -> None:
    """A client that knows nothing of ClickHouse's exception mark sees a broken transfer."""
    import http.client

    with pytest.raises(http.client.IncompleteRead) as failure:
        store.request(query="SELECT number, throwIf(number >= 3000000) FROM numbers(5000000)", max_threads="1")
    assert b"__exception__" in failure.value.partial[-1_000:]


def test_limits_hold_and_cannot_be_raised(reader: Client, store: LocalStore) -> None:
    """Time, rows and memory, within the bounds of the process."""
    with pytest.raises(DatabaseError) as failure:
        reader.query(
            "SELECT count() FROM numbers(100000000000) WHERE NOT ignore(rand())", settings={"max_execution_time": 1}
        )
    assert failure.value.code == 159
    with pytest.raises(ClickHouseError) as failure:
        reader.query("SELECT number FROM numbers(1000)", settings={"max_result_rows": 10, "max_block_size": 5})
    assert failure.value.code in (396, None)
    with pytest.raises(DatabaseError) as failure:
        reader.query("SELECT groupArray(number) FROM numbers(100000000)", settings={"max_memory_usage": 10_000_000})
    assert failure.value.code == 241
    # What is asked beyond a bound gets the bound: drivers ask for their own patience and a few seconds more.
    for value in ("0", "1e15", "1000000000000000"):
        with pytest.raises(DatabaseError) as failure:
            reader.query("SELECT groupArray(number) FROM numbers(1000000000)", settings={"max_memory_usage": value})
        assert failure.value.code == 241
    for name in ("max_memory_usage", "max_execution_time", "max_result_rows", "max_threads"):
        assert store.request(query="SELECT 1", **{name: "1e15"})[2] == b"1\n"
        for value in ("-1", "nan", "x", ""):
            status, headers, _ = store.request(query="SELECT 1", **{name: value})
            assert (status, headers["x-clickhouse-exception-code"]) == (403, "452")


@pytest.mark.parametrize(
    "parameters",
    [
        {"format_template_resultset": "/etc/passwd", "default_format": "Template"},
        {"format_schema": "/etc/passwd"},
        {"output_format_schema": "x"},
        {"default_format": "Template"},
        {"default_format": "CustomSeparated"},
        {"default_format": "../../etc/passwd"},
        {"database": "system"},
        {"database": "information_schema"},
        {"database": "default`; DROP"},
        {"allow_introspection_functions": "1"},
        {"log_comment": "x"},
        {"max_server_memory_usage": "1"},
        {"http_write_exception": "1"},
        {"profile": "default"},
        {"enable_unaligned_array_join": "1"},
        {"result_overflow_mode": "break"},
        {"join_use_nulls": "1'"},
        {"session_timezone": "'; SET readonly = 0; --"},
        {"custom setting": "1"},
        {"query_id": "a'b"},
        {"query_id": "x" * 200},
    ],
)
def test_the_url_opens_nothing(store: LocalStore, parameters: dict[str, str]) -> None:
    """Settings, formats and databases that are not on a list are refused, and no file's text is in the answer."""
    status, _, body = store.request(query="SELECT 1", **parameters)
    assert status >= 400
    assert b"root:" not in body


def test_readers_cannot_write(store: LocalStore, reader: Client, table: str) -> None:
    """By no method, in no place of the request; the writer not by GET."""
    for method, body, parameters in (
        ("POST", b"INSERT INTO %b VALUES (1, 'x')" % table.encode(), {}),
        ("POST", b"(1, 'x')", {"query": f"INSERT INTO {table} VALUES"}),
        ("POST", b"1,x\n", {"query": f"INSERT INTO {table} FORMAT CSV"}),
        ("POST", b"", {"query": f"INSERT INTO {table} SELECT 1, 'x'"}),
        ("POST", b"-- x\nINSERT INTO %b VALUES (1, 'x')" % table.encode(), {}),
        ("GET", None, {"query": f"INSERT INTO {table} VALUES (1, 'x')"}),
        ("GET", None, {"query": f"DROP TABLE {table}"}),
        ("POST", f"DROP TABLE {table}".encode(), {"readonly": "0"}),
    ):
        for user in ("reader", "writer") if method == "GET" else ("reader",):
            status, _, _ = store.request(method, "/", body, user=user, **parameters)
            assert status in (400, 403), (method, body, parameters, user)
    assert count(reader, table) == 0


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic cmVhZGVyOndyb25n"},
        {"Authorization": "Basic not base64"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"X-ClickHouse-User": "default", "X-ClickHouse-Key": ""},
        {"X-ClickHouse-User": "writer", "X-ClickHouse-Key": "READER"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/runstream/status", "/nothing"])
def test_without_a_token_nothing_is_answered(store: LocalStore, headers: dict[str, str], path: str) -> None:
    """403 with ClickHouse's code, also where the token is another user's."""
    sent = {name: value.replace("READER", store.address().reader_token) for name, value in headers.items()}
    status, answer, body = store.request(path=path, user=None, headers=sent, query="SELECT 1")
    assert status == 403
    assert answer["x-clickhouse-exception-code"] == "516"
    assert b"Authentication failed" in body


def test_driver_reports_a_wrong_token(store: LocalStore) -> None:
    """At the connection, with code 516."""
    import clickhouse_connect

    address = store.address()
    with pytest.raises(DatabaseError) as failure:
        clickhouse_connect.get_client(host=address.host, port=address.port, username="reader", password="wrong")
    assert failure.value.code == 516


FILE = b'--x\r\nContent-Disposition: form-data; name="t"; filename="t"\r\n\r\n1\r\n--x--\r\n'


def test_what_is_not_supported_says_so(store: LocalStore) -> None:
    """Frames that are none, multipart, other paths and methods: an error with a sentence, never a hang."""
    for status, parameters, options in (
        (400, {"compress": "1", "network_compression_method": "Delta"}, {}),
        (400, {"decompress": "1"}, {"method": "POST", "body": b"SELECT 1"}),
        (400, {"decompress": "1"}, {"method": "POST", "body": b"x" * 100}),
        (400, {"decompress": "1"}, {"method": "POST", "body": bytes(16) + b"\x82" + b"\xff" * 8 + b"x" * 100}),
        (500, {}, {"method": "POST", "headers": {"Content-Type": "multipart/form-data; boundary=x"}, "body": FILE}),
        (400, {}, {"method": "POST", "headers": {"Content-Type": "multipart/form-data; boundary=x"}, "body": b"--x"}),
        (400, {}, {"method": "POST", "headers": {"Content-Type": "multipart/form-data"}, "body": b"--x--"}),
        (404, {}, {"path": "/query/x"}),
        (400, {}, {"method": "DELETE"}),
        (400, {}, {"method": "POST", "body": b"SELECT \xff\xfe"}),
        (400, {}, {"method": "POST", "body": b"SELECT 1", "headers": {"Content-Encoding": "br"}}),
    ):
        found, _, body = store.request(query="", **options, **parameters)
        assert (found, body[:6]) == (status, b"Code: "), (options, body)


def test_a_query_is_killed_when_its_client_leaves(store: LocalStore, writer: Client) -> None:
    """Before its first row and between rows."""
    address = store.address()
    for sql in (
        "SELECT+count()+FROM+numbers(100000000000)+WHERE+NOT+ignore(rand())",
        "SELECT+number,+rand()+FROM+numbers(100000000000)",
    ):
        with socket.create_connection((address.host, address.port)) as connection:
            request = f"GET /?query={sql}&user=reader&password={address.reader_token} HTTP/1.1\r\nHost: x\r\n\r\n"
            connection.sendall(request.encode())
            wait_for(lambda: running(writer) >= 1, 10)
        wait_for(lambda: running(writer) == 0, 10)


def test_a_slow_client_does_not_fill_the_memory(store: LocalStore, reader: Client) -> None:
    """A result of 400 MB whose client does not read waits in the engine."""
    process = psutil.Process(store.process.pid)
    reader.query("SELECT number FROM numbers(1000000)")
    before = process.memory_info().rss
    address = store.address()
    with socket.create_connection((address.host, address.port)) as connection:
        sql = "SELECT+number,+number+FROM+numbers(25000000)+FORMAT+RowBinary"
        request = f"GET /?query={sql}&user=reader&password={address.reader_token} HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        # What could run ahead of the client has done so by the time that ten other queries are answered.
        for _ in range(10):
            reader.query("SELECT sum(number) FROM numbers(1000000)")
        assert process.memory_info().rss - before < 150e6


def test_a_large_result_streams_in_bounded_memory(store: LocalStore, reader: Client) -> None:
    """10 million rows, 160 MB and more: the process grows by a fraction of that."""
    process = psutil.Process(store.process.pid)
    sql = "SELECT number, number * 2 FROM numbers({rows})"
    reader.query(sql.format(rows=1_000_000))
    before = process.memory_info().rss
    peak, rows = before, 0
    with reader.query_column_block_stream(sql.format(rows=10_000_000)) as stream:
        for block in stream:
            rows += len(block[0])
            peak = max(peak, process.memory_info().rss)
    assert rows == 10_000_000
    assert peak - before < 120e6


def test_many_clients_at_once_get_right_answers(store: LocalStore, table: str) -> None:
    """Readers, failing queries and inserts side by side; every answer is the one to its own question."""
    wrong: list[object] = []

    def work(seed: int) -> None:
        reader, writer = store.client(), store.writer()
        for turn in range(12):
            n = seed * 1_000 + turn
            got = reader.query(f"SELECT {n} AS x, sum(number) FROM numbers({n})").result_rows
            if got != [(n, n * (n - 1) // 2)]:
                wrong.append(got)
            try:
                reader.query(f"SELECT throwIf(number = {n}, 'mine {n}') FROM numbers({n + 1})")
                wrong.append("no error")
            except ClickHouseError as exc:
                if f"mine {n}" not in str(exc):
                    wrong.append(exc)
            writer.insert(table, [[n, "x"]], column_names=["a", "b"])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(1, 7)))
    assert wrong == []
    assert store.client().query(f"SELECT count(), uniqExact(a) FROM {table}").result_rows == [(72, 72)]


def test_a_query_id_runs_once(store: LocalStore, writer: Client) -> None:
    """A second statement with the id of a running one is refused."""
    address = store.address()
    with socket.create_connection((address.host, address.port)) as connection:
        sql = "SELECT+count()+FROM+numbers(100000000000)+WHERE+NOT+ignore(rand())"
        request = (
            f"GET /?query={sql}&query_id=twin&user=reader&password={address.reader_token} HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        connection.sendall(request.encode())
        wait_for(lambda: running(writer) >= 1, 10)
        assert store.request(query="SELECT 1", query_id="twin")[1]["x-clickhouse-exception-code"] == "216"
    wait_for(lambda: running(writer) == 0, 10)
    assert store.request(query="SELECT 1", query_id="twin")[2] == b"1\n"


def test_settings_of_a_session_do_not_stay(store: LocalStore) -> None:
    """Each statement has a fresh connection: what one sets, the next does not see."""
    client = store.client(session_id="s1")
    sql = "SELECT r.run_id FROM (SELECT 'a' AS k) AS l LEFT JOIN (SELECT 'b' AS k, 'x' AS run_id) AS r USING (k)"
    assert client.query(sql, settings={"join_use_nulls": 1}).result_rows == [(None,)]
    assert client.query(sql).result_rows == [("",)]


def needs_landlock(store: LocalStore) -> None:
    if "not restricted by Landlock" in store.log:
        pytest.skip("this kernel has no Landlock")


def test_the_walls_behind_the_gate(store: LocalStore, writer: Client) -> None:
    """Landlock: even with the writer's rights no foreign file is read, no connection made, no token found."""
    needs_landlock(store)
    for sql in (
        "SELECT file('/etc/passwd')",
        "SELECT * FROM file('/etc/passwd', 'LineAsString')",
        "SELECT file('/proc/self/environ')",
        "SELECT * FROM url('http://127.0.0.1:9/', 'LineAsString', 'x String')",
        "SELECT file('../server.json')",
        "SELECT 1 INTO OUTFILE '/tmp/runstream-must-not-exist'",
    ):
        with pytest.raises(DatabaseError):
            writer.query(sql)


def test_the_writer_token_is_not_readable_from_sql(store: LocalStore, writer: Client) -> None:
    """db/server.json is written by the process but closed to it."""
    needs_landlock(store)
    path = store.directory.server_file
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(DatabaseError):
        writer.query(f"SELECT file('{path}')")


def test_latency_of_small_queries_is_not_a_timer(reader: Client) -> None:
    """No answer waits for a delayed acknowledgement (40 ms): the fastest of many is far below."""
    best = 1.0
    for _ in range(30):
        started = time.perf_counter()
        reader.query("SELECT 1")
        best = min(best, time.perf_counter() - started)
    assert best < 0.03


def test_head_first_and_half_open_connections_cost_no_turn(store: LocalStore) -> None:
    """Connections that say nothing do not keep others waiting."""
    address = store.address()
    idle = [socket.create_connection((address.host, address.port)) for _ in range(64)]
    try:
        for connection in idle[:32]:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
        done = threading.Event()

        def ask() -> None:
            assert store.request(query="SELECT 1")[2] == b"1\n"
            done.set()

        thread = threading.Thread(target=ask)
        thread.start()
        assert done.wait(10)
        thread.join()
    finally:
        for connection in idle:
            connection.close()
