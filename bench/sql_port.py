"""SQL through `runstream server` beside the same at the local store process. `python bench/sql_port.py [GIGABYTES]`

Latency of `SELECT 1` and of a point query at 1, 4 and 16 kept connections, and one large result (default 1 GB) with the
resident memory of both processes while it passes.
"""

from __future__ import annotations

import http.client
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from store_http import log_points, report

from runstream_schemas.layout import DataDirectory, ServerAddress

POINTS = 100_000
QUERIES = {
    "SELECT 1": "SELECT 1",
    "point query": f"SELECT value FROM latest_metrics WHERE run_id = '{3:032x}' AND key = 'loss'",
}
ROW_BYTES = 16


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    with tempfile.TemporaryDirectory(prefix="bench-sql-port-") as folder:
        directory = DataDirectory(Path(folder) / "data")
        log_points(directory, POINTS)
        server, port = start(directory)
        address = None
        try:
            ask(port, "", "SELECT count() FROM points")
            address = ServerAddress.read(directory.server_file)
            assert address is not None
            login = f"&user=reader&password={address.reader_token}"
            for name, sql in QUERIES.items():
                for clients in (1, 4, 16):
                    latency(f"{name}, {clients} connections, store", address.port, login, sql, clients)
                    latency(f"{name}, {clients} connections, server", port, "", sql, clients)
            for name, at, extra in (("store", address.port, login), ("server", port, "")):
                large(name, at, extra, gigabytes, server.pid, address.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            if address is not None:
                os.kill(address.pid, signal.SIGTERM)


def start(directory: DataDirectory) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "runstream", "server", "--port", "0", "--tracking-uri", str(directory.root)]
    environment = os.environ | {"RUNSTREAM_SERVER_ACCESS_LOG": "false"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if " on http://" in line:
            port = urlsplit(line.split(" on ", 1)[1].split(" ", 1)[0]).port
            assert port is not None
            return process, port
    raise SystemExit("the server did not start")


def ask(port: int, login: str, sql: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", f"/?query={quote(sql)}{login}")
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    if answer.status != 200:
        raise SystemExit(data.decode())
    return data


def latency(name: str, port: int, login: str, sql: str, clients: int) -> None:
    times = max(40, 320 // clients)

    def work(_: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        found = []
        for turn in range(times + 5):
            started = time.perf_counter()
            connection.request("GET", f"/?query={quote(sql)}{login}")
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise SystemExit(f"{name}: {answer.status}")
            if turn >= 5:
                found.append((time.perf_counter() - started) * 1e3)
        connection.close()
        return found

    with ThreadPoolExecutor(clients) as pool:
        found = sorted(value for part in pool.map(work, range(clients)) for value in part)
    print(f"{name:<45} p50 {statistics.median(found):8.2f} ms   p99 {found[int(len(found) * 0.99)]:8.2f} ms")


def large(name: str, port: int, login: str, gigabytes: float, *pids: int) -> None:
    processes = [psutil.Process(pid) for pid in pids]
    before = [each.memory_info().rss for each in processes]
    used = sum(sum(each.cpu_times()[:2]) for each in processes)
    peak = list(before)
    rows = int(gigabytes * 1e9 / ROW_BYTES)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    started = time.perf_counter()
    connection.request("GET", f"/?query={quote(f'SELECT number, number FROM numbers({rows}) FORMAT RowBinary')}{login}")
    answer = connection.getresponse()
    size, looked = 0, 0
    while data := answer.read(1 << 20):
        size += len(data)
        if size - looked > 20_000_000:
            looked = size
            peak = [max(known, each.memory_info().rss) for known, each in zip(peak, processes, strict=True)]
    seconds = time.perf_counter() - started
    connection.close()
    if size != rows * ROW_BYTES:
        raise SystemExit(f"{name}: {size} bytes of {rows * ROW_BYTES}")
    used = sum(sum(each.cpu_times()[:2]) for each in processes) - used
    report(f"{size / 1e9:.1f} GB from the {name}", size / seconds / 1e6, "MB/s")
    report(f"{size / 1e9:.1f} GB from the {name}, both processes", used, "CPU-s")
    for what, begin, top in zip(("server", "store process"), before, peak, strict=True):
        report(f"{size / 1e9:.1f} GB from the {name}, RSS of the {what} before", begin / 1e6, "MB")
        report(f"{size / 1e9:.1f} GB from the {name}, RSS of the {what} at most", top / 1e6, "MB")


if __name__ == "__main__":
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    main()
