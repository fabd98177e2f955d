"""What every `Store` promises: in-process chDB, the local store process over HTTP, a real server where there is one."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fastavro
import pytest

from runstream_ingest.commit import read_positions, write_positions
from runstream_ingest.errors import StoreBusy, StoreError
from runstream_ingest.frame import Framed, frame
from runstream_ingest.migration import migrate
from runstream_ingest.store import Store, StoreAddress, connect
from runstream_schemas.layout import WRITER, DataDirectory, ServerAddress
from runstream_schemas.names import EventName
from tests.services.chdb_process import ChdbProcess
from tests.services.events import NOW, created, points, record, started, until, version
from tests.services.stores import REAL, real_store

KINDS = ["chdb", "local-http", pytest.param("server", marks=pytest.mark.clickhouse)]


class _LocalProcess:
    """A local store process, as a reader would start it."""

    def __init__(self, root: Path) -> None:
        self.directory = DataDirectory(root)
        command = [sys.executable, "-m", "runstream_ingest", "local", str(root), "--idle-exit", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: ServerAddress.read(self.directory.server_file) is not None, 60, "the local store process")
        address = ServerAddress.read(self.directory.server_file)
        assert address is not None
        self.address = StoreAddress(address.host, address.port, WRITER, address.writer_token)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def chdb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChdbProcess]:
    process = ChdbProcess(Path(tmp_path_factory.mktemp("chdb")))
    yield process
    process.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_LocalProcess]:
    process = _LocalProcess(Path(tmp_path_factory.mktemp("local")))
    yield process
    process.close()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A migrated store of each kind. The local store process has one database, so tests use names of their own."""
    if request.param == "server":
        if not REAL:
            pytest.skip("RUNSTREAM_TEST_CLICKHOUSE is not set: clickhouse://user:password@host:port")
        made: Store = real_store()
    elif request.param == "local-http":
        made = connect(request.getfixturevalue("local").address)
    else:
        made = request.getfixturevalue("chdb").store()
    migrate(made)
    yield made
    made.close()


def framed(event: tuple[EventName, dict[str, object]], offset: int = 0) -> Framed:
    [one] = frame([record(event, offset)])
    return one


def put(store: Store, one: Framed) -> None:
    store.insert(f"landing_{one.event}", one.columns, one.chunks)


def run_id(request: pytest.FixtureRequest) -> str:
    return f"run-{abs(hash(request.node.nodeid)):x}"


def test_rows_are_python_values(store: Store) -> None:
    """Integers of any width, floats with NaN and infinities, and strings with anything in them."""
    [row] = store.rows(
        "SELECT toInt64(-5), toUInt128(bitShiftLeft(toUInt128(1), 100)), toFloat64(1.5), nan, inf, -inf, "
        "'tab\\tline\\nquote\\'', toUInt8(1), toInt64(9223372036854775807)"
    )
    assert row[:3] == (-5, 1 << 100, 1.5)
    assert row[3] != row[3]
    assert row[4:] == (float("inf"), float("-inf"), "tab\tline\nquote'", 1, 9223372036854775807)
    assert store.rows("SELECT number FROM numbers(3)") == [(0,), (1,), (2,)]
    assert store.rows("SELECT 1 WHERE 0") == []


@pytest.mark.parametrize(
    "text",
    ["plain", "it's", "back\\slash", "tab\tline\nend", "\u00fcml\u00e4ut \U0001f600", "", "{x:String}", "a\n\nb"],
)
def test_parameters_are_bound_by_the_engine(store: Store, text: str) -> None:
    """No text breaks out of its place."""
    assert store.rows("SELECT {text:String}", {"text": text}) == [(text,)]
    assert store.rows("SELECT {a:Int64} + {b:UInt64}, {f:Float64}", {"a": -3, "b": 5, "f": 0.25}) == [(2, 0.25)]


def test_insert_fans_out_before_it_returns(store: Store, request: pytest.FixtureRequest) -> None:
    """Rows are in every target once `insert` returns: no buffer, no wait."""
    name = run_id(request)
    put(store, framed(started(name)))
    put(store, framed(points(name, [1.0, 2.0, float("nan"), float("inf")])))
    where = f"WHERE run_id = '{name}'"
    assert store.rows(f"SELECT count() FROM metrics {where}") == [(4,)]
    assert store.rows(f"SELECT step, value, max FROM latest_metrics {where}") == [(3, float("inf"), float("inf"))]
    assert store.rows(f"SELECT status FROM runs {where}") == [("RUNNING",)]


def test_insert_again_changes_nothing(store: Store, request: pytest.FixtureRequest) -> None:
    """At least once is enough."""
    name = run_id(request)
    for _ in range(3):
        put(store, framed(points(name, [1.0, 2.0])))
    assert store.rows(f"SELECT count(), sum(value) FROM metrics WHERE run_id = '{name}'") == [(2, 3.0)]


def test_chunks_may_be_cut_anywhere(store: Store, request: pytest.FixtureRequest) -> None:
    """A file is a stream of bytes."""
    name = run_id(request)
    one = framed(points(name, [0.5] * 500))
    data = b"".join(one.chunks)
    pieces = [data[at : at + 37] for at in range(0, len(data), 37)]
    store.insert("landing_metric_batch", one.columns, pieces)
    assert store.rows(f"SELECT count() FROM metrics WHERE run_id = '{name}'") == [(500,)]


@pytest.mark.parametrize("damage", ["cut", "flipped", "not avro", "empty"])
def test_what_does_not_decode_is_refused_and_the_store_goes_on(
    store: Store, request: pytest.FixtureRequest, damage: str
) -> None:
    """A StoreError that is not transient, nothing stored, and the same handle works at once afterwards."""
    name = run_id(request)
    one = framed(points(name, [1.0] * 50))
    data = b"".join(one.chunks)
    broken = {
        "cut": data[:-60],
        "flipped": data[:-100] + bytes(byte ^ 0xFF for byte in data[-100:]),
        "not avro": b"this is no avro file at all",
        "empty": b"Obj\x01",
    }[damage]
    with pytest.raises(StoreError) as caught:
        store.insert("landing_metric_batch", one.columns, [broken])
    assert not isinstance(caught.value, StoreBusy), caught.value
    assert not caught.value.systemic
    assert store.rows("SELECT 42") == [(42,)]
    assert store.rows(f"SELECT count() FROM metrics WHERE run_id = '{name}'") == [(0,)]
    put(store, one)
    assert store.rows(f"SELECT count() FROM metrics WHERE run_id = '{name}'") == [(50,)]


def test_a_probe_leaves_nothing(store: Store, request: pytest.FixtureRequest) -> None:
    """Probe tables decode and check only."""
    name = run_id(request)
    one = framed(points(name, [1.0]))
    store.insert("probe_metric_batch", one.columns, one.chunks)
    assert store.rows(f"SELECT count() FROM metrics WHERE run_id = '{name}'") == [(0,)]


def test_an_older_writer_may_leave_out_columns(store: Store, request: pytest.FixtureRequest) -> None:
    """A file without a column that the table has takes the column's default."""
    name = run_id(request)
    data = io.BytesIO(b"".join(framed(points(name, [1.0, 2.0], first_seq=40)).chunks))
    reader = fastavro.reader(data)
    rows = [dict(row) for row in reader]
    schema = dict(reader.writer_schema)
    schema["fields"] = [field for field in schema["fields"] if field["name"] != "seqs"]
    older = io.BytesIO()
    fastavro.writer(older, schema, [{name: row[name] for name in row if name != "seqs"} for row in rows])
    store.insert("landing_metric_batch", [field["name"] for field in schema["fields"]], [older.getvalue()])
    assert store.rows(f"SELECT seq FROM points WHERE run_id = '{name}' ORDER BY seq") == [(40,), (41,)]


@pytest.mark.parametrize("sql", ["SELECT * FROM no_such_table", "SELECT no_such_column FROM points", "not sql"])
def test_wrong_statements_are_not_transient(store: Store, sql: str) -> None:
    """They carry the engine's code, and repeat the same."""
    for call in (store.rows, store.execute):
        with pytest.raises(StoreError) as caught:
            call(sql)
        assert not isinstance(caught.value, StoreBusy)
        assert caught.value.code is not None
    assert store.rows("SELECT 1") == [(1,)]


def test_an_insert_into_a_missing_table_is_systemic(store: Store) -> None:
    """No body may be blamed for it."""
    one = framed(points("x", [1.0]))
    with pytest.raises(StoreError) as caught:
        store.insert("no_such_table", one.columns, one.chunks)
    assert caught.value.systemic


def test_positions_only_grow(store: Store) -> None:
    """A late writer with smaller positions changes nothing."""
    places = {("metrics", 901): 10, ("control", 901): 7}
    write_positions(store, places)  # type: ignore[arg-type]
    write_positions(store, {("metrics", 901): 5, ("control", 901): 8})
    found = read_positions(store)
    assert (found["metrics", 901], found["control", 901]) == (10, 8)
    write_positions(store, {})


def test_delete_from_rejects(store: Store) -> None:
    """A replay takes back what the landing tables said."""
    name, fields = points("x", [1.0])
    put(store, framed((name, {**fields, "ki": [9]}), offset=77_777))
    where = "WHERE stream = 'metrics' AND partition = 0 AND log_offset = 77777"
    assert store.rows(f"SELECT reason FROM rejects {where}") == [("ki points outside keys",)]
    store.execute(f"DELETE FROM rejects {where}")
    assert store.rows(f"SELECT reason FROM rejects {where}") == []


def test_all_events_are_taken(store: Store, request: pytest.FixtureRequest) -> None:
    """Each control event through its landing table."""
    name = run_id(request)
    events: list[tuple[EventName, dict[str, object]]] = [
        created(),
        started(name),
        ("run_updated", {"run_id": name, "status": "FINISHED", "ended_at": NOW + 9, **version(NOW + 1)}),
        ("params", {"run_id": name, "keys": ["lr"], "values": ["0.1"], **version()}),
        ("run_tags", {"run_id": name, "keys": ["team"], "values": ["x"], **version()}),
        ("experiment_tags", {"experiment_id": "5", "keys": ["a"], "values": ["b"], **version()}),
        ("artifact_logged", {"run_id": name, "path": "model/x", "size_bytes": 5, **version()}),
        ("input_logged", {"run_id": name, "name": "d", "digest": "1", "source_type": "", "source": "", **version()}),
    ]
    for offset, event in enumerate(events):
        put(store, framed(event, offset))
    where = f"WHERE run_id = '{name}'"
    assert store.rows(f"SELECT status, name FROM runs {where}") == [("FINISHED", f"name-{name}")]
    assert store.rows(f"SELECT key, value, conflict FROM params {where}") == [("lr", "0.1", 0)]
    assert store.rows(f"SELECT key, value FROM tags {where}") == [("team", "x")]
    assert store.rows(f"SELECT path, size_bytes FROM artifacts {where}") == [("model/x", 5)]
    assert store.rows(f"SELECT name, digest FROM inputs {where}") == [("d", "1")]


@pytest.mark.parametrize("by", ["constraint", "view", "column"])
def test_what_is_refused_behind_the_parser_is_told(store: Store, by: str) -> None:
    """Data that parses but is not stored is an error, never an answer of "done"; the next insert is whole."""
    table = f"refuses_by_{by}"
    refusal = "throwIf(run_id != 'good')"
    more = {"constraint": ", CONSTRAINT c CHECK run_id = 'good'", "column": f", c UInt8 MATERIALIZED {refusal}"}
    store.execute(f"CREATE TABLE {table}_kept (run_id String) ENGINE = MergeTree ORDER BY run_id")
    store.execute(
        f"CREATE TABLE {table} (run_id String{more.get(by, '')}) ENGINE = "
        + ("Null" if by == "view" else "MergeTree ORDER BY run_id")
    )
    if by == "view":
        store.execute(
            f"CREATE MATERIALIZED VIEW {table}_view TO {table}_kept AS SELECT run_id FROM {table} WHERE NOT {refusal}"
        )
    for run, stored in (("b\u00e4d", 0), ("good", 1)):
        file = io.BytesIO()
        schema = {"type": "record", "name": "r", "fields": [{"name": "run_id", "type": "string"}]}
        fastavro.writer(file, fastavro.parse_schema(schema), [{"run_id": run}])
        try:
            store.insert(table, ["run_id"], [file.getvalue()])
        except StoreError as exc:
            assert (stored, exc.code) in ((0, 469), (0, 395)), exc
        else:
            assert stored
        kept = f"{table}_kept" if by == "view" else table
        assert store.rows(f"SELECT count() FROM {kept}") == [(stored,)]
    for name in (f"{table}_view", table, f"{table}_kept"):
        store.execute(f"DROP TABLE IF EXISTS {name}")


def test_a_store_that_is_gone_is_busy(tmp_path: Path) -> None:
    """Connection refused, and a server killed while it is asked: wait, for it may come back."""
    process = _LocalProcess(tmp_path)
    opened = connect(process.address)
    process.process.kill()
    process.process.wait()
    one = framed(points("x", [1.0]))
    calls: list[Callable[[], object]] = [
        lambda: opened.rows("SELECT 1"),
        lambda: opened.insert("landing_metric_batch", one.columns, one.chunks),
        lambda: connect(process.address),
    ]
    for call in calls:
        with pytest.raises(StoreBusy):
            call()
    opened.close()


def test_a_wrong_password_is_refused_without_telling_it(local: _LocalProcess) -> None:
    """Never transient, and the message does not repeat the secret."""
    address = StoreAddress(local.address.host, local.address.port, WRITER, "no-such-secret")
    with pytest.raises(StoreError) as caught:
        connect(address)
    assert not isinstance(caught.value, StoreBusy)
    assert "no-such-secret" not in str(caught.value)
    assert "no-such-secret" not in repr(address)
