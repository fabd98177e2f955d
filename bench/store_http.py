"""The local store process over HTTP: start, latency, throughput, memory. `python bench/store_http.py [POINTS]`

POINTS (default 1,000,000) metric points are logged into a fresh data directory and ingested before anything is asked.
"""

from __future__ import annotations

import io
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clickhouse_connect
import fastavro
import psutil

from runstream.transport import Event
from runstream.transport.directory import DirectoryTransport
from runstream_schemas.codec import current, encode
from runstream_schemas.layout import READER, WRITER, DataDirectory, ServerAddress

POINTS_PER_BATCH = 1_000
SERIES_POINTS = 10_000
PIECE = 1 << 20


def main() -> None:
    points = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(prefix="bench-store-http-") as folder:
        directory = DataDirectory(Path(folder) / "data")
        started = time.perf_counter()
        process, address = start(directory)
        report("start of a new directory to first answer", first_answer(address) - started, "s")
        stop(process)
        log_points(directory, points)
        started = time.perf_counter()
        process, address = start(directory)
        report("start of an existing directory to first answer", first_answer(address) - started, "s")
        try:
            measure(process, address, points, started)
        finally:
            stop(process)


def measure(process: subprocess.Popen[bytes], address: ServerAddress, points: int, started: float) -> None:
    watched = psutil.Process(process.pid)
    reader, writer = client(address, READER), client(address, WRITER)
    while reader.query("SELECT count() FROM points").result_rows != [(points,)]:
        time.sleep(0.05)
    wall = time.perf_counter() - started
    used = watched.cpu_times()
    report("ingest from the log, wall, start included", points / wall / 1e6, "M points/s")
    report("ingest from the log, CPU, start included", (used.user + used.system) / points * 1e6, "CPU-s per M points")
    report("resident memory after ingest", watched.memory_info().rss / 1e6, "MB")

    run = f"{3:032x}"
    latency("SELECT 1", lambda: reader.query("SELECT 1").result_rows)
    latency(
        "point query: latest value of one series",
        lambda: (
            reader.query(
                "SELECT value FROM latest_metrics WHERE run_id = {run:String} AND key = 'loss'", parameters={"run": run}
            ).result_rows
        ),
    )
    latency(
        f"a series of {SERIES_POINTS} points, 500 buckets",
        lambda: (
            reader.query(
                f"SELECT intDiv(step, {SERIES_POINTS // 500}) AS b, avg(value), min(value), max(value) FROM points "
                "WHERE run_id = {run:String} AND key = 'loss' GROUP BY b ORDER BY b",
                parameters={"run": run},
            ).result_rows
        ),
    )
    latency(
        f"a series of {SERIES_POINTS} points to a DataFrame",
        lambda: reader.query_df(
            "SELECT step, timestamp, value FROM metrics WHERE run_id = {run:String} AND key = 'loss' ORDER BY step",
            parameters={"run": run},
        ),
        times=50,
    )
    for clients in (4, 16):
        concurrent(f"SELECT 1, {clients} clients at once", clients, address)
    frame = timed(
        lambda: reader.query_df("SELECT number, toString(number) AS s, number / 3 AS f FROM numbers(1000000)")
    )
    report("1 M rows of 3 columns to a DataFrame", frame, "s")
    report("1 M rows of 3 columns to Arrow", timed(lambda: arrow(reader)), "s")
    report("resident memory after reading", watched.memory_info().rss / 1e6, "MB")

    writer.command("CREATE TABLE landed (a UInt64, b Float64) ENGINE = MergeTree ORDER BY a")
    rows = 2_000_000
    data = avro(rows)
    seconds = timed(
        lambda: writer.raw_insert(
            "landed", ["a", "b"], (data[at : at + PIECE] for at in range(0, len(data), PIECE)), fmt="Avro"
        ),
        times=1,
    )
    report("Avro insert over HTTP", rows / seconds / 1e6, "M rows/s")
    report("resident memory after inserts", watched.memory_info().rss / 1e6, "MB")
    reader.close()
    writer.close()


def start(directory: DataDirectory) -> tuple[subprocess.Popen[bytes], ServerAddress]:
    process = subprocess.Popen(
        [sys.executable, "-m", "runstream_ingest", "local", str(directory.root), "--idle-exit", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while True:
        address = ServerAddress.read(directory.server_file)
        if address is not None and address.pid == process.pid:
            return process, address
        if process.poll() is not None:
            raise SystemExit(f"the process ended with {process.returncode}")
        time.sleep(0.002)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def first_answer(address: ServerAddress) -> float:
    import http.client

    connection = http.client.HTTPConnection(address.host, address.port)
    headers = {"Authorization": f"Bearer {address.reader_token}"}
    connection.request("GET", "/?query=SELECT+count()+FROM+runs", headers=headers)
    assert connection.getresponse().status == 200
    connection.close()
    return time.perf_counter()


def client(address: ServerAddress, user: str) -> Any:
    token = address.reader_token if user == READER else address.writer_token
    return clickhouse_connect.get_client(
        host=address.host, port=address.port, username=user, password=token, database="runstream"
    )


def log_points(directory: DataDirectory, points: int) -> None:
    transport = DirectoryTransport(directory.log)
    random.seed(1)
    fingerprint = current("metric_batch").fingerprint
    for first in range(0, points, POINTS_PER_BATCH):
        run = f"{first // SERIES_POINTS:032x}"
        step = first % SERIES_POINTS
        fields = {
            "run_id": run,
            "writer": 1,
            "first_seq": first,
            "sent_at": 1_700_000_000_000,
            "keys": ["loss"],
            "steps": list(range(step, step + POINTS_PER_BATCH)),
            "times": [1_700_000_000_000 + n for n in range(first, first + POINTS_PER_BATCH)],
            "ki": [0] * POINTS_PER_BATCH,
            "ci": list(range(POINTS_PER_BATCH)),
            "values": [random.random() for _ in range(POINTS_PER_BATCH)],
        }
        transport.send([Event("metrics", run, fingerprint, encode("metric_batch", fields))])
    transport.close(5)


def avro(rows: int) -> bytes:
    fields = [{"name": "a", "type": "long"}, {"name": "b", "type": "double"}]
    file = io.BytesIO()
    schema = fastavro.parse_schema({"type": "record", "name": "r", "fields": fields})
    fastavro.writer(file, schema, ({"a": n, "b": n / 3} for n in range(rows)))
    return file.getvalue()


def arrow(reader: Any) -> None:
    reader.query_arrow("SELECT number, toString(number) AS s, number / 3 AS f FROM numbers(1000000)")


def timed(call: Callable[[], object], times: int = 3) -> float:
    """The fastest of some runs, in seconds."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def latency(name: str, call: Callable[[], object], times: int = 300) -> None:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append((time.perf_counter() - started) * 1e3)
    found.sort()
    print(f"{name:<55} p50 {statistics.median(found):8.2f} ms   p99 {found[int(times * 0.99)]:8.2f} ms")


def concurrent(name: str, clients: int, address: ServerAddress) -> None:
    def work(_: int) -> list[float]:
        own = client(address, READER)
        found = []
        for _ in range(100):
            started = time.perf_counter()
            own.query("SELECT 1")
            found.append((time.perf_counter() - started) * 1e3)
        own.close()
        return found

    with ThreadPoolExecutor(clients) as pool:
        found = sorted(value for part in pool.map(work, range(clients)) for value in part)
    print(f"{name:<55} p50 {statistics.median(found):8.2f} ms   p99 {found[int(len(found) * 0.99)]:8.2f} ms")


def report(name: str, value: float, unit: str) -> None:
    print(f"{name:<55} {value:12.2f} {unit}")


if __name__ == "__main__":
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    main()
