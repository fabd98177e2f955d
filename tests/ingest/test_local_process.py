"""The life of the local store process: start, second start, kill, move, idle, stop, and what a person is told."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runstream.transport import Event
from runstream.transport.directory import DirectoryTransport
from runstream_schemas.codec import current, encode
from runstream_schemas.layout import DataDirectory, ServerAddress
from tests.ingest.local_store import LocalStore, local_store, wait_for

TIME_MS = 1_700_000_000_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def transport(root: Path) -> Iterator[DirectoryTransport]:
    opened = DirectoryTransport(DataDirectory(root).log)
    yield opened
    opened.close(5)


def batch(run: str, writer: int, first_seq: int, count: int) -> Event:
    body = encode(
        "metric_batch",
        {
            "run_id": run,
            "writer": writer,
            "first_seq": first_seq,
            "sent_at": TIME_MS,
            "keys": ["loss"],
            "steps": list(range(first_seq, first_seq + count)),
            "times": [TIME_MS + n for n in range(count)],
            "ki": [0] * count,
            "ci": list(range(count)),
            "values": [float(first_seq + n) for n in range(count)],
        },
    )
    return Event("metrics", run, current("metric_batch").fingerprint, body)


def started(run: str) -> Event:
    body = encode(
        "run_started",
        {"run_id": run, "experiment_id": "0", "started_at": TIME_MS, "time_ms": TIME_MS, "seq": 1, "writer": 7}
        | {"name": run, "artifact_uri": f"0/{run}/artifacts", "user": "", "source_name": "", "source_type": ""}
        | {"source_version": "", "parent_run_id": ""},
    )
    return Event("control", run, current("run_started").fingerprint, body)


def caught_up(store: LocalStore) -> bool:
    status = store.status()
    assert status["trouble"] is None
    return bool(status["state"] == "ready" and status["positions"] == status["end"])


def run_to_its_end(root: Path, *options: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "runstream_ingest", "local", str(root), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    return done.returncode, done.stdout + done.stderr


def test_what_was_logged_is_in_sql(root: Path, transport: DirectoryTransport) -> None:
    """Before the start and while it runs; the status tells when."""
    transport.send([started("a" * 32), batch("a" * 32, 1, 0, 100)])
    with local_store(root) as store:
        client = store.client()
        wait_for(lambda: caught_up(store), 20)
        assert client.query("SELECT count(), sum(value) FROM metrics").result_rows == [(100, 4950.0)]
        transport.send([batch("a" * 32, 1, 100, 100)])
        wait_for(lambda: caught_up(store), 20)
        assert client.query("SELECT count() FROM metrics").result_rows == [(200,)]
        rows = client.query("SELECT run_id, status, artifact_uri FROM runs").result_rows
        assert rows == [("a" * 32, "RUNNING", f"file://{root}/artifacts/0/{'a' * 32}/artifacts")]
        assert store.stop() == 0
    assert not store.directory.server_file.exists()
    assert "Traceback" not in store.log


def test_the_address_is_private_and_true(root: Path) -> None:
    """server.json: mode 0600, two tokens, loopback; it answers as soon as it is there."""
    with local_store(root) as store:
        address = store.address()
        assert store.directory.server_file.stat().st_mode & 0o777 == 0o600
        assert address.host == "127.0.0.1"
        assert address.pid == store.process.pid
        assert len({address.reader_token, address.writer_token}) == 2
        assert min(len(address.reader_token), len(address.writer_token)) >= 24
        assert store.request(query="SELECT 1")[0] == 200
        for connection in psutil.Process(address.pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip == "127.0.0.1"


def test_a_second_start_names_the_owner_and_leaves_it_alone(root: Path) -> None:
    """Exit code 3 and one sentence."""
    with local_store(root) as store:
        store.address()
        code, said = run_to_its_end(root)
        assert code == 3
        assert f"process {store.process.pid} already serves {root}" in said
        assert said.count("\n") == 1
        assert store.request(query="SELECT 1")[2] == b"1\n"


def test_many_starts_at_once_leave_one(root: Path) -> None:
    """Readers that find no process start one each; one wins, the others leave with code 3."""
    stores = [LocalStore(root) for _ in range(5)]
    try:
        wait_for(lambda: sum(store.process.poll() is not None for store in stores) == 4, 40)
        assert sorted(store.process.poll() for store in stores if store.process.poll() is not None) == [3] * 4
        (winner,) = [store for store in stores if store.process.poll() is None]
        assert winner.address().pid == winner.process.pid
    finally:
        for store in stores:
            store.stop()


def test_after_kill_9_the_next_start_takes_over(root: Path) -> None:
    """The stale address and the stale lock file are no obstacle."""
    with local_store(root) as store:
        store.address()
        store.kill()
    assert ServerAddress.read(store.directory.server_file) is not None
    with local_store(root) as second:
        assert second.address().pid != store.process.pid
        assert second.request(query="SELECT 1")[2] == b"1\n"


def test_a_damaged_or_foreign_address_is_no_obstacle(root: Path) -> None:
    """Rubbish in server.json, a lock file of another program, left-over drafts."""
    directory = DataDirectory(root)
    directory.database.mkdir(parents=True)
    directory.server_file.write_text("{not json")
    directory.lock.write_text("999999999\n")
    (directory.database / ".server.json.123").write_text("x")
    (directory.database / "tmp").mkdir()
    (directory.database / "tmp" / "left-over").write_text("x")
    with local_store(root) as store:
        assert store.request(query="SELECT 1")[2] == b"1\n"


def test_a_taken_port(root: Path) -> None:
    """Asked for by number: exit code 6 and a sentence. Otherwise a free one."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said = run_to_its_end(root, "--port", str(port))
        assert code == 6
        assert f"port {port}" in said
        assert said.count("\n") == 1
        with local_store(root) as store:
            assert store.address().port != port


def test_a_port_by_number(root: Path) -> None:
    """It is the one that is published; and free again for the next start at once."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for _ in range(2):
        with local_store(root, port=port) as store:
            assert store.address().port == port
            assert store.request(query="SELECT 1")[2] == b"1\n"


def test_idle_exit(root: Path, transport: DirectoryTransport) -> None:
    """It stays while it is asked or fed, and leaves when neither was for the time given."""
    with local_store(root, idle_exit=2) as store:
        store.address()
        begun = time.monotonic()
        fed = 0
        while time.monotonic() - begun < 4:
            transport.send([batch("b" * 32, 1, fed * 10, 10)])
            fed += 1
            time.sleep(0.2)  # the feeding, not a wait
        assert store.process.poll() is None
        asked = time.monotonic()
        while time.monotonic() - asked < 3:
            assert store.request(query="SELECT 1")[0] == 200
            time.sleep(0.2)
        assert store.process.wait(20) == 0
        assert not store.directory.server_file.exists()
        assert "nothing to do for 2 seconds" in store.log
    with local_store(root) as store:
        assert store.client().query("SELECT count() FROM metrics").result_rows == [(fed * 10,)]


def test_a_running_query_keeps_it_alive(root: Path) -> None:
    """Idle means that nothing runs either."""
    with local_store(root, idle_exit=1) as store:
        client = store.client()
        # About 3 seconds of one block after another; the time-out ends it.
        sql = "SELECT count() FROM numbers(100000000000) WHERE NOT ignore(rand())"
        status, headers, _ = store.request(query=sql, max_execution_time="3")
        assert (status, headers["x-clickhouse-exception-code"]) == (408, "159")
        assert client.query("SELECT 1").result_rows == [(1,)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_in_order(root: Path, number: signal.Signals) -> None:
    """Exit code 0, no address left, a running query is killed, no trace for a person."""
    with local_store(root) as store:
        address = store.address()
        with socket.create_connection((address.host, address.port)) as connection:
            sql = "SELECT+count()+FROM+numbers(100000000000)+WHERE+NOT+ignore(rand())"
            request = f"GET /?query={sql}&user=reader&password={address.reader_token} HTTP/1.1\r\nHost: x\r\n\r\n"
            connection.sendall(request.encode())
            writer = store.writer()
            running = (
                "SELECT count() FROM system.processes WHERE query LIKE '%rand()%' AND query NOT LIKE '%processes%'"
            )
            wait_for(lambda: writer.query(running).result_rows == [(1,)], 10)
            store.process.send_signal(number)
            assert store.process.wait(15) == 0
        assert not store.directory.server_file.exists()
        assert "Traceback" not in store.said + store.log


@pytest.mark.parametrize("copy", [False, True])
def test_a_moved_or_copied_directory_works(root: Path, transport: DirectoryTransport, copy: bool) -> None:
    """Stopped, elsewhere, started: the data is there, artifacts are looked for in the new place."""
    transport.send([started("c" * 32), batch("c" * 32, 1, 0, 50)])
    with local_store(root) as store:
        wait_for(lambda: caught_up(store), 20)
    there = root.parent / "else where" / "däta"
    there.parent.mkdir()
    if copy:
        shutil.copytree(root, there)
    else:
        shutil.move(root, there)
    with local_store(there) as store:
        client = store.client()
        assert client.query("SELECT count() FROM metrics").result_rows == [(50,)]
        (uri,) = client.query("SELECT artifact_uri FROM runs").result_rows[0]
        assert uri == f"file://{there}/artifacts/0/{'c' * 32}/artifacts"


def test_a_directory_that_moves_under_it(root: Path) -> None:
    """It notices and leaves, so that the next reader starts one in the new place."""
    with local_store(root) as store:
        store.address()
        there = root.with_name("elsewhere")
        root.rename(there)
        assert store.process.wait(20) == 0
        assert "moved or removed" in (there / "db" / "server.log").read_text()
    with local_store(there) as store:
        assert store.request(query="SELECT 1")[2] == b"1\n"


def test_artifact_root_from_the_environment(root: Path) -> None:
    """RUNSTREAM_ARTIFACT_ROOT wins, and is told to SQL."""
    with local_store(root, environment={"RUNSTREAM_ARTIFACT_ROOT": "s3://bucket/prefix/"}) as store:
        rows = store.client().query("SELECT value FROM settings FINAL WHERE name = 'artifact_root'").result_rows
        assert rows == [("s3://bucket/prefix",)]
    with local_store(root) as store:
        rows = store.client().query("SELECT value FROM settings FINAL WHERE name = 'artifact_root'").result_rows
        assert rows == [(f"file://{root}/artifacts",)]


def told(root: Path, code: int, *words: str) -> None:
    found, said = run_to_its_end(root)
    assert found == code, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert said.count("\n") == 1, said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_full_disk(tmp_path: Path) -> None:
    """One sentence, at the start."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        with pytest.raises(OSError, match="No space"):
            (mount / "filler").write_bytes(b"x" * 1_000_000)
        told(mount / "data", 5, "full" if (mount / "data").exists() else "")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_read_only_directory(tmp_path: Path) -> None:
    """One sentence that says so."""
    mount = tmp_path / "frozen"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(mount)], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        told(mount, 5, "not writable")
        told(mount / "data", 5, "not writable")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    """One sentence."""
    path = tmp_path / "file"
    path.write_text("x")
    told(path, 5, "not a directory")


def test_a_path_the_engine_cannot_open(tmp_path: Path) -> None:
    """Characters that mean something to the engine are named before it misreads them."""
    told(tmp_path / "what?", 5, "?")


def test_missing_chdb_says_what_to_install(root: Path, tmp_path: Path) -> None:
    """The pip line, exit code 4."""
    fake = tmp_path / "fake"
    (fake / "chdb").mkdir(parents=True)
    (fake / "chdb" / "__init__.py").write_text("raise ImportError('no chdb here')")
    found, said = run_to_its_end(root, environment={"PYTHONPATH": str(fake)})
    assert found == 4, said
    assert 'pip install "runstream[server]"' in said
    assert said.count("\n") == 1


def test_files_of_a_newer_engine_or_database(root: Path) -> None:
    """A database with a migration that we do not know: one sentence, nothing changed."""
    with local_store(root) as store:
        store.writer().command(
            "INSERT INTO schema_migrations (version, name, checksum, applied_at) SELECT 9999, 'future', 'x', now64(3)"
        )
    told(root, 5, "newer runstream", "pip install -U")


def test_damaged_files_of_the_engine(root: Path) -> None:
    """A sentence with a way out; the log is still there."""
    with local_store(root) as store:
        store.address()
    for file in (store.directory.database / "files" / "metadata" / "runstream").glob("*.sql"):
        file.write_text("")
    told(root, 5, "cannot be opened", str(store.directory.database))


def test_memory_and_start_are_bounded(root: Path) -> None:
    """An idle process stays below 400 MB."""
    with local_store(root) as store:
        store.client().query("SELECT 1")
        assert psutil.Process(store.process.pid).memory_info().rss < 400e6


def test_terminal_signals_do_not_reach_a_background_process(root: Path) -> None:
    """Started in its own session, it has no terminal and is nobody's child group."""
    with local_store(root) as store:
        address = store.address()
        assert os.getsid(address.pid) == address.pid
        assert psutil.Process(address.pid).terminal() is None


def test_status_needs_a_token_and_tells_positions(root: Path, transport: DirectoryTransport) -> None:
    """JSON with state, positions and end."""
    transport.send([batch("d" * 32, 1, 0, 10)])
    with local_store(root) as store:
        wait_for(lambda: caught_up(store), 20)
        status = store.status()
        end = transport.end_positions(5)
        assert status["end"] == {f"{stream}/{part}": at for (stream, part), at in end.items()}
        assert status["positions"]["metrics/0"] == end["metrics", 0]
        address = store.address()
        with pytest.raises(urllib.error.HTTPError) as failure:
            urllib.request.urlopen(f"http://{address.host}:{address.port}/runstream/status")
        failure.value.close()
        assert failure.value.code == 403


def test_kill_9_at_random_instants_while_it_ingests(root: Path, transport: DirectoryTransport) -> None:
    """Writers go on, the process is killed again and again, others take over: every point once, nothing else."""
    random.seed(20_260_101)
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            run = f"{written % 7:032x}"
            transport.send([started(run), batch(run, 1, written * 50, 50)])
            written += 1
            stop.wait(0.002)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(12):
            store = LocalStore(root)
            time.sleep(random.uniform(0.05, 1.6))
            store.kill()
    finally:
        stop.set()
        thread.join()
    with local_store(root) as store:
        wait_for(lambda: caught_up(store), 40)
        client = store.client()
        assert client.query("SELECT count(), sum(value), uniqExact(step) FROM metrics").result_rows == [
            (written * 50, float(sum(range(written * 50))), written * 50)
        ]
        assert client.query("SELECT count() FROM runs").result_rows == [(min(7, written),)]
        assert client.query("SELECT count() FROM rejects").result_rows == [(0,)]
        assert "Traceback" not in store.said


def test_kill_9_during_inserts_over_http(root: Path) -> None:
    """An acknowledged insert is there after the kill, an unacknowledged one whole or not at all."""
    random.seed(7)
    rows = 20_000
    acknowledged: set[int] = set()
    attempted: set[int] = set()
    with local_store(root) as store:
        store.writer().command("CREATE TABLE kept (part UInt64, n UInt64) ENGINE = MergeTree ORDER BY (part, n)")
    for turn in range(6):
        store = LocalStore(root)
        client = store.writer()
        killer = threading.Timer(random.uniform(0.05, 0.6), store.process.kill)
        killer.start()
        part = turn * 1_000
        try:
            while True:
                part += 1
                attempted.add(part)
                data = b"".join(b"%d,%d\n" % (part, n) for n in range(rows))
                client.raw_insert(
                    "kept", ["part", "n"], (data[i : i + 65_536] for i in range(0, len(data), 65_536)), fmt="CSV"
                )
                acknowledged.add(part)
        except Exception:
            store.process.wait(30)
        finally:
            killer.cancel()
            store.kill()
    with local_store(root) as store:
        found = dict(store.client().query("SELECT part, count() FROM kept GROUP BY part").result_rows)
    assert acknowledged <= found.keys() <= attempted
    assert set(found.values()) <= {rows}
    assert acknowledged


def test_two_directories_are_two_stores(tmp_path: Path) -> None:
    """Side by side on one machine, each with its own tokens."""
    with local_store(tmp_path / "one") as one, local_store(tmp_path / "two") as two:
        token = one.address().reader_token
        assert two.request(user=None, query="SELECT 1", user_="reader", password=token)[0] == 403
        headers = {"Authorization": f"Bearer {token}"}
        assert two.request(user=None, headers=headers, query="SELECT 1")[0] == 403
        assert one.request(user=None, headers=headers, query="SELECT 1")[0] == 200


def test_server_log_does_not_grow_without_end(root: Path) -> None:
    """A log of more than 5 MB is put aside at the next start."""
    directory = DataDirectory(root)
    directory.database.mkdir(parents=True)
    directory.server_log.write_bytes(b"x\n" * 3_000_000)
    with local_store(root) as store:
        store.address()
        assert directory.server_log.stat().st_size < 100_000
        assert (directory.database / "server.log.1").stat().st_size == 6_000_000


def test_json_is_what_the_layout_reads(root: Path) -> None:
    """The published file has the fields of ServerAddress and no others."""
    with local_store(root) as store:
        store.address()
        fields = json.loads(store.directory.server_file.read_text())
        assert set(fields) == {"pid", "host", "port", "reader_token", "writer_token", "version"}
