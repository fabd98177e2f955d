"""SQL over HTTP with the vendor's drivers for Go (Grafana's) and Java, on the server's port and on the store's own."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.services import sql_clients, used
from tests.services.maven import JDBC

from .sql_line import POINTS, RUNS, Line, Place, sql_line, wait_for

pytestmark = [pytest.mark.chdb, pytest.mark.timeout(sql_clients.BUILD_SECONDS + 300)]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with sql_line(tmp_path_factory.mktemp("sql")) as found:
        yield found


@pytest.fixture(params=["server", "store"])
def place(request: pytest.FixtureRequest, line: Line) -> Place:
    return line.places[request.param]


def need(why: str | None, service: str) -> None:
    if why is not None:
        if used.must_not_skip(service):
            pytest.fail(f"CI must have {service}: {why}")
        pytest.skip(why)


class Go:
    """The Go program, one question at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sql_clients.go_client()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, place: Place, sql: str, **options: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        question = {
            "address": f"{place.host}:{place.port}",
            "user": place.user,
            "password": place.password,
            "database": "runstream",
            "api": "native",
            "sql": sql,
        } | options
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def go() -> Iterator[Go]:
    need(sql_clients.go_missing(), "go")
    program = Go()
    yield program
    program.close()


EVERY_TYPE = """
SELECT toInt8(-1) AS i8, toInt64(-9223372036854775808) AS i64, toUInt64(18446744073709551615) AS u64,
    bitShiftLeft(toUInt128(1), 100) AS u128, toFloat32(1.5) AS f32, nan AS q, -inf AS less, 'ä\\n\\0' AS s,
    CAST('x' AS LowCardinality(String)) AS lc, CAST(NULL AS Nullable(Float64)) AS n,
    CAST(2.5 AS Nullable(Float64)) AS nf, CAST('y' AS LowCardinality(Nullable(String))) AS ln,
    [1, 2]::Array(Int64) AS a,
    map('k', 1.5) AS m, [('a', 1)]::Array(Tuple(String, Int64)) AS t,
    toDateTime64('2024-01-02 03:04:05.678', 3, 'UTC') AS d,
    toDateTime('2024-01-02 03:04:05', 'UTC') AS dt, toDate('2024-01-02') AS day, true AS b,
    toUUID('00000000-0000-0000-0000-00000000000a') AS id, CAST('b' AS Enum8('a' = 1, 'b' = 2)) AS e,
    toFixedString('ab', 4) AS fs, toDecimal64(1.25, 2) AS dec
"""


@pytest.mark.go
@pytest.mark.parametrize("api", ["native", "sql"])
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "gzip"])
def test_go_reads_every_type(go: Go, place: Place, api: str, compression: str) -> None:
    """With each compression, through the driver's own interface and through database/sql."""
    answer = go.ask(place, EVERY_TYPE, api=api, compression=compression)
    assert answer["error"] == ""
    row = dict(zip(answer["columns"], answer["rows"][0], strict=True))
    assert row["i8"] == -1
    assert (row["i64"], row["u64"]) == ("-9223372036854775808", "18446744073709551615")
    assert row["u128"] == str(1 << 100)
    assert (row["f32"], row["q"], row["less"]) == (1.5, "NaN", "-Inf")
    assert (row["s"], row["lc"], row["n"], row["nf"], row["ln"]) == ("ä\n\0", "x", None, 2.5, "y")
    assert (row["a"], row["m"]) == (["1", "2"], {"k": 1.5})
    assert row["d"] == "2024-01-02T03:04:05.678Z"
    assert (row["dt"], row["day"]) == ("2024-01-02T03:04:05Z", "2024-01-02T00:00:00Z")
    assert (row["b"], row["e"], row["dec"]) == (True, "b", "1.25")
    assert row["id"] == "00000000-0000-0000-0000-00000000000a"


@pytest.mark.go
def test_go_reads_every_public_view(go: Go, place: Place) -> None:
    """What was logged arrives, in all columns, and empty results keep theirs."""
    listed = go.ask(place, "SELECT name FROM system.tables WHERE database = 'runstream' AND engine = 'View'")
    views = [row[0] for row in listed["rows"]]
    assert {"runs", "metrics", "params", "tags", "latest_metrics", "experiments"} <= set(views)
    for view in views:
        answer = go.ask(place, f"SELECT * FROM {view}", compression="lz4")
        assert answer["error"] == "", (view, answer["error"])
        empty = go.ask(place, f"SELECT * FROM {view} WHERE 0", compression="zstd")
        assert (empty["columns"], empty["types"], empty["count"]) == (answer["columns"], answer["types"], 0), view
    counted = go.ask(place, "SELECT count(), sum(value) FROM metrics WHERE key = 'loss'")
    total = sum(step + number for step in range(POINTS) for number in range(RUNS))
    assert counted["rows"] == [[str(RUNS * POINTS), total]]


@pytest.mark.go
def test_go_binds_parameters_and_settings(go: Go, place: Place) -> None:
    """On the server's side; settings that readers may set hold, others are refused."""
    for api in ("native", "sql"):
        sql = "SELECT {s:String}, {n:Int64} + 1, {l:Array(String)}"
        answer = go.ask(place, sql, api=api, parameters={"s": "'); DROP TABLE points --", "n": "41", "l": "['a','b']"})
        assert answer["rows"] == [["'); DROP TABLE points --", "42", ["a", "b"]]]
    joined = "SELECT r.x FROM (SELECT 1 AS k) AS l LEFT JOIN (SELECT 2 AS k, 'x' AS x) AS r USING (k)"
    assert go.ask(place, joined, settings={"join_use_nulls": 1})["rows"] == [[None]]
    refused = go.ask(place, "SELECT 1", settings={"allow_introspection_functions": 1})
    assert refused["code"] == 452


@pytest.mark.go
@pytest.mark.parametrize(
    ("sql", "code"),
    [
        ("SELECT nope", 47),
        ("SELECT * FROM nope", 60),
        ("SELEKT 1", 62),
        ("SELECT throwIf(1, 'at once')", 395),
        ("DROP TABLE points", 164),
        ("SELECT file('/etc/passwd')", 497),
        ("SELECT 1; SELECT 2", 62),
    ],
)
def test_go_gets_errors_with_codes(go: Go, place: Place, sql: str, code: int) -> None:
    """Whatever the compression, and the connection serves on."""
    for compression in ("none", "lz4", "gzip"):
        answer = go.ask(place, sql, compression=compression)
        assert answer["code"] == code, answer["error"]
    assert go.ask(place, "SELECT 1")["rows"] == [[1]]


@pytest.mark.go
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "gzip"])
def test_go_streams_and_sees_errors_in_mid_stream(go: Go, place: Place, compression: str) -> None:
    """5 million rows are 5 million rows; a result that breaks is an error with its code, never a shorter result."""
    whole = go.ask(place, "SELECT number FROM numbers(5000000)", compression=compression, count_only=True)
    assert (whole["error"], whole["count"], whole["sum"]) == ("", 5_000_000, 5_000_000 * 4_999_999 // 2)
    sql = "SELECT number FROM numbers(5000000) WHERE NOT ignore(throwIf(number = 4000000, 'in the middle'))"
    for api in ("native", "sql"):
        broken = go.ask(place, sql, compression=compression, count_only=True, api=api)
        assert "in the middle" in broken["error"]
        assert broken["code"] == 395
        assert broken["count"] <= 4_000_000


@pytest.mark.go
def test_go_deadlines_and_cancellation_stop_the_engine(go: Go, line: Line, place: Place) -> None:
    """A deadline of a minute is no error (the driver asks for 5 s more); a context that ends kills the query."""
    assert go.ask(place, "SELECT 1", deadline_ms=60_000)["rows"] == [[1]]
    writer = line.writer()
    for sql in (
        "SELECT count() FROM numbers(100000000000) WHERE NOT ignore(rand())",
        "SELECT number FROM numbers(100000000000) WHERE NOT ignore(rand())",
    ):
        answer = go.ask(place, sql, cancel_ms=700, count_only=True)
        assert "context canceled" in answer["error"]
        wait_for(lambda: line.running(writer) == 0, 5)
    writer.close()


GRAFANA = {
    "SELECT 1": 1,
    "SELECT version()": 1,
    "SHOW DATABASES": 2,
    'SHOW TABLES FROM "runstream"': None,
    "SHOW TABLES": None,
    'DESC TABLE "runstream"."metrics"': None,
    "SELECT name, type, table FROM system.columns": None,
    "SELECT name, type, table FROM system.columns WHERE database IN ('runstream') AND table = 'runs'": None,
    """
      SELECT
        name, is_aggregate, case_insensitive, alias_to, origin, description,
        syntax, arguments, returned_value, examples, categories
      FROM system.functions
      LIMIT 10000
    """: None,
    'SELECT DISTINCT arrayJoin(tags.keys) as keys FROM "runstream"."experiments" LIMIT 1000': 0,
    "select distinct status from runstream.runs limit 1000": 1,
    # Its macros, expanded as its backend does.
    "SELECT timestamp AS time, value FROM metrics WHERE timestamp >= toDateTime(1700000000) AND "
    "timestamp <= toDateTime(4000000000) AND key = 'loss' ORDER BY time LIMIT 10": 10,
    "SELECT timestamp AS time, value FROM metrics WHERE timestamp >= fromUnixTimestamp64Milli(1700000000000) AND "
    "timestamp <= fromUnixTimestamp64Milli(4000000000000) AND key = 'loss' LIMIT 10": 10,
    "SELECT toStartOfInterval(toDateTime(timestamp), INTERVAL 3600 second) AS time, run_id AS metric, avg(value) "
    "FROM metrics WHERE key = 'loss' GROUP BY time, metric ORDER BY time": None,
    "SELECT toStartOfInterval(toDateTime64(timestamp, 3), INTERVAL 60000 millisecond) AS time, count() FROM metrics "
    "GROUP BY time": None,
    "SELECT run_id, name FROM runs ORDER BY name": RUNS,
    'SELECT * FROM "runstream"."runs" LIMIT 1000': RUNS,
}


@pytest.mark.go
def test_grafanas_statements_are_answered(go: Go, place: Place) -> None:
    """Health check, lists of tables, columns and functions, expanded macros: with the plugin's settings."""
    for sql, rows in GRAFANA.items():
        answer = go.ask(
            place, sql, api="sql", compression="lz4", settings={"max_execution_time": 60}, deadline_ms=60_000
        )
        assert answer["error"] == "", (sql, answer["error"])
        assert answer["count"] == rows if rows is not None else answer["count"] > 0, (sql, answer["count"])
    # Ad hoc filters bring SQL in a setting, which no check of the statement sees.
    filtered = "SELECT * FROM runs SETTINGS additional_table_filters={'runs': ' status = \\'FINISHED\\' '}"
    assert go.ask(place, filtered, api="sql")["code"] in (164, 497)


@pytest.fixture(scope="module")
def jdbc(line: Line) -> Mapping[str, Mapping[str, str]]:
    """What the Java program found, by port."""
    need(JDBC.missing(compiler=True), "jdbc")
    command = sql_clients.jdbc_command()
    found = {}
    for name, place in line.places.items():
        url = f"jdbc:clickhouse://{place.host}:{place.port}/runstream"
        done = subprocess.run(
            [*command, url, place.user, place.password or "any"], capture_output=True, timeout=200, check=False
        )
        text = done.stdout.decode()
        assert done.returncode == 0, text + done.stderr.decode()[-3000:]
        found[name] = dict(each.split(": ", 1) for each in text.splitlines() if ": " in each)
    return found


@pytest.fixture(params=["server", "store"])
def java(request: pytest.FixtureRequest, jdbc: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    return jdbc[request.param]


@pytest.mark.jdbc
def test_jdbc_lists_schemas_tables_and_columns(java: Mapping[str, str]) -> None:
    """DatabaseMetaData of what readers may read."""
    assert java["schemas"] == "runstream system"
    assert {"runs", "metrics", "points"} <= set(java["tables"].split())
    assert {"runs", "metrics"} <= set(java["views"].split())
    assert "points" not in java["views"].split()
    assert {"run_id", "status", "started_at"} <= set(java["columns"].split())
    assert "Map(String, String)" in java["column types"]
    assert java["types"] == "true"
    assert java["primary keys"] == "key run_id step"


@pytest.mark.jdbc
def test_jdbc_reads_values_and_binds_parameters(java: Mapping[str, str]) -> None:
    """Types as Java has them; strings that look like SQL stay strings."""
    assert java["type names"] == (
        "Int8 UInt64 UInt128 Float64 Float64 String LowCardinality(String) Nullable(Float64) Array(UInt8) "
        "Map(String, String) DateTime64(3, 'UTC') Bool Decimal(18, 2)"
    )
    assert (java["i8"], java["u64"], java["u128"]) == ("-1", "18446744073709551615", str(1 << 100))
    assert (java["f"], java["n"], java["s"], java["lc"]) == ("1.5", "NaN", "ä<newline>", "x")
    assert (java["nothing"], java["a"], java["m"]) == ("true", "2 2", "{k=v}")
    assert (java["d"], java["b"], java["dec"]) == ("2024-01-02T03:04:05.678Z", "true", "1.25")
    assert java["prepared"] == "it's; DROP TABLE points -- | 42 | 3"
    assert java["empty"] == "false run_id"


@pytest.mark.jdbc
def test_jdbc_gets_errors_and_never_garbage(java: Mapping[str, str]) -> None:
    """With the engine's code; an exception behind the first rows is an SQLException and not a row."""
    codes = {name.removeprefix("error "): value for name, value in java.items() if name.startswith("error ")}
    assert codes == {
        "SELECT nope": "47",
        "SELECT * FROM nope": "60",
        "SELEKT 1": "62",
        "SELECT throwIf(1, 'at once')": "395",
        "DROP TABLE points": "164",
        "INSERT INTO points SELECT * FROM points": "497",
        "SELECT file('/etc/passwd')": "497",
        "SELECT data_paths FROM system.tables": "497",
    } | {key: codes[key] for key in ("INSERT INTO points SELECT * FROM points",) if codes[key] == "164"}
    assert java["after errors"] == "true"
    assert java["stream -1"] == "1000000 499999500000 whole"
    for bad in (0, 100_000, 900_000):
        assert re.match(r"0 0 395 .*in the middle", java[f"stream {bad}"]), java[f"stream {bad}"]


@pytest.mark.jdbc
def test_jdbc_needs_the_password(jdbc: Mapping[str, Mapping[str, str]]) -> None:
    """A wrong one is an error where there is authentication."""
    assert jdbc["store"]["wrong password"].startswith("516 ")
