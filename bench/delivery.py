"""Points a second and CPU per million points: through a server, beside the directory transport. Interleaved, medians.

One process logs points as fast as delivery takes them, as single calls and as calls of ten keys; CPU is that of the
logging process (with its journal and delivery) and of the server process, which appends to its directory log. The store
is not part of it. `.venv/bin/python bench/delivery.py [--points 500000] [--rounds 3]`
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

LOGGER = """
import json, resource, sys, time
import runstream
points, keys = int(sys.argv[1]), int(sys.argv[2])
names = [f"metric_{number}" for number in range(keys)]
with runstream.start_run() as run:
    run.log_metric("first", 1.0)
    assert runstream.flush(120).complete  # imports, the journal and the connection are there
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    if keys == 1:
        for step in range(points):
            run.log_metric("loss", step * 0.37, step=step)
    else:
        for step in range(points // keys):
            run.log_metrics({name: step * 0.37 for name in names}, step=step)
    logged = time.perf_counter() - began
    report = runstream.flush(120)
seconds = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
assert report.complete and report.delivered_points == points + 1 and not report.thinned_points, report
print(json.dumps({"seconds": seconds, "logged": logged, "cpu": cpu}))
"""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_server(data: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server on a free port."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "runstream", "server", "--port", str(port), "--tracking-uri", str(data)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    return process, url


def log(uri: str, folder: Path, points: int, keys: int) -> dict[str, float]:
    """One logging process; its figures."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RUNSTREAM_")} | {
        "RUNSTREAM_TRACKING_URI": uri,
        "RUNSTREAM_JOURNAL_DIR": str(folder / "journal"),
        "RUNSTREAM_DELIVERY": "server",
    }
    command = [sys.executable, "-c", LOGGER, str(points), str(keys)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    million = given.points / 1e6
    print(f"{given.points:,} points, medians of {given.rounds} rounds; CPU seconds per million points")
    print(f"{'keys a call':>11}  {'way':<10} {'points/s':>10} {'client CPU':>11} {'server CPU':>11}")
    with tempfile.TemporaryDirectory(prefix="runstream-bench-", dir="/var/tmp") as folder:
        root = Path(folder)
        server, url = start_server(root / "served")
        time.sleep(3)  # its store starts meanwhile
        try:
            for keys in (1, 10):
                found: dict[str, list[tuple[float, float, float]]] = {"directory": [], "server": []}
                for number in range(given.rounds):
                    direct = log((root / f"direct-{keys}-{number}").as_uri(), root, given.points, keys)
                    found["directory"].append((given.points / direct["seconds"], direct["cpu"] / million, 0.0))
                    before = cpu_seconds(server.pid)
                    posted = log(url, root, given.points, keys)
                    used = cpu_seconds(server.pid) - before
                    found["server"].append((given.points / posted["seconds"], posted["cpu"] / million, used / million))
                for way, rows in found.items():
                    rate, client, served = (statistics.median(row[at] for row in rows) for at in range(3))
                    print(f"{keys:>11}  {way:<10} {rate:>10,.0f} {client:>11.2f} {served:>11.2f}")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            _stop_store(root / "served")


def _stop_store(data: Path) -> None:
    from runstream_schemas.layout import DataDirectory, ServerAddress

    address = ServerAddress.read(DataDirectory(data).server_file)
    if address is not None:
        try:
            os.kill(address.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        while Path(f"/proc/{address.pid}").exists():
            time.sleep(0.05)


if __name__ == "__main__":
    main()
