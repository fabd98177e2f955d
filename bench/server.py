"""`runstream server` beside MLflow's own server (SQLite) and beside an empty route of the same framework.

    python bench/server.py [--seconds 4] [--connections 1 8 32] [--points 100000] [--runs 2000]

Needs the package mlflow. One light load generator (raw sockets, prepared requests) drives all of them on this machine,
one after the other in one run. Prints requests a second, and the time of a history and of a search.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EMPTY = """
import uvicorn
from fastapi import FastAPI
app = FastAPI()
@app.post("/empty")
async def empty() -> dict[str, str]:
    return {}
uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
"""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(base: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """One request with urllib; its JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"{}")


def wait_for(base: str, path: str, process: subprocess.Popen[bytes], seconds: float = 90.0) -> None:
    """Return once `path` answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(base + path, timeout=5):
                return
        except urllib.error.HTTPError as exc:
            if exc.code < 500:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{base}{path} does not answer")
        time.sleep(0.1)


def http(path: str, body: bytes) -> bytes:
    """A prepared keep-alive POST."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _connection(port: int, make: Callable[[int], bytes], first: int, stop_at: float) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    try:
        while time.perf_counter() < stop_at:
            writer.write(make(first + count))
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode("latin-1") + (await reader.read(500)).decode("latin-1"))
            lower = head.lower()
            at = lower.find(b"content-length:")
            await reader.readexactly(int(lower[at + 15 : lower.index(b"\r\n", at)]))
            count += 1
    finally:
        writer.close()
    return count


def rate(port: int, make: Callable[[int], bytes], connections: int, seconds: float) -> float:
    """Requests a second over `connections` connections."""

    async def drive() -> int:
        stop_at = time.perf_counter() + seconds
        first = time.time_ns() // 1000 % 10**9
        return sum(
            await asyncio.gather(*(_connection(port, make, first + 10**7 * i, stop_at) for i in range(connections)))
        )

    began = time.perf_counter()
    done = asyncio.run(drive())
    return done / (time.perf_counter() - began)


def resident_mb(pid: int) -> float:
    """Resident memory of a process and its children, MB."""
    import psutil

    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 1e6


class Target:
    """A server under test with one run to log to."""

    def __init__(self, name: str, command: list[str], port: int, ready: str, env: dict[str, str] | None = None) -> None:
        self.name = name
        self.port = port
        self.base = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        wait_for(self.base, ready, self.process)
        self.idle_mb = resident_mb(self.process.pid)

    def run_id(self) -> str:
        """A fresh run in the default experiment."""
        made = call(self.base, "/api/2.0/mlflow/runs/create", {"experiment_id": "0", "start_time": 1})
        return str(made["run"]["info"]["run_id"])

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # MLflow's server keeps job runners
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def log_metric(run_id: str) -> Callable[[int], bytes]:
    """Requests that each log one new point."""
    path = "/api/2.0/mlflow/runs/log-metric"
    form = b'{"run_id":"%s","key":"loss","value":0.5,"timestamp":%d,"step":%d}'
    return lambda i: http(path, form % (run_id.encode(), 1_700_000_000_000 + i, i))


def log_batch(run_id: str, size: int) -> Callable[[int], bytes]:
    """Requests that each log `size` new points of ten keys."""
    path = "/api/2.0/mlflow/runs/log-batch"

    def make(i: int) -> bytes:
        time_ms = 1_700_000_000_000 + i
        metrics = [{"key": f"k{j % 10}", "value": 0.5, "timestamp": time_ms, "step": i * size + j} for j in range(size)]
        return http(path, json.dumps({"run_id": run_id, "metrics": metrics}).encode())

    return make


def timed(work: Callable[[], Any], repeat: int = 3) -> float:
    """The best of `repeat` times, seconds."""
    best = float("inf")
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def fill(target: Target, points: int, runs: int) -> tuple[str, str]:
    """The ids of a run with one long history, and of an experiment with `runs` runs."""
    run_id = target.run_id()
    for start in range(0, points, 1000):
        metrics = [
            {"key": "long", "value": float(i), "timestamp": i, "step": i}
            for i in range(start, min(start + 1000, points))
        ]
        call(target.base, "/api/2.0/mlflow/runs/log-batch", {"run_id": run_id, "metrics": metrics})
    made = call(target.base, "/api/2.0/mlflow/experiments/create", {"name": f"bench {time.time_ns()}"})
    experiment = str(made["experiment_id"])
    for i in range(runs):
        body = {"experiment_id": experiment, "start_time": i + 1}
        run = call(target.base, "/api/2.0/mlflow/runs/create", body)["run"]["info"]["run_id"]
        batch = {
            "run_id": run,
            "metrics": [{"key": "loss", "value": i / runs, "timestamp": 1, "step": 0}],
            "params": [{"key": "lr", "value": str(i % 10)}],
        }
        call(target.base, "/api/2.0/mlflow/runs/log-batch", batch)
    return run_id, experiment


def measure(target: Target, options: argparse.Namespace) -> None:
    """Print one target's figures."""
    print(f"\n{target.name}: {target.idle_mb:.0f} MB at start")
    empty = target.name == "empty route"
    run_id = "" if empty else target.run_id()
    make = (lambda i: http("/empty", b"{}")) if empty else log_metric(run_id)
    for connections in options.connections:
        done = rate(target.port, make, connections, options.seconds)
        print(f"  log-metric {connections:3d} connections {done:10.0f} /s")
    if empty:
        return
    done = rate(target.port, log_batch(run_id, 100), 4, options.seconds)
    print(f"  log-batch of 100, 4 connections {done:6.0f} /s")
    long_run, experiment = fill(target, options.points, options.runs)
    path = f"/api/2.0/mlflow/metrics/get-history?run_id={long_run}&metric_key=long"
    assert len(call(target.base, path)["metrics"]) == options.points
    seconds = timed(lambda: call(target.base, path))
    print(f"  history of {options.points} points {seconds:8.3f} s")
    search = {
        "experiment_ids": [experiment],
        "max_results": 100,
        "filter": "metrics.loss < 0.5",
        "order_by": ["metrics.loss DESC"],
    }
    assert len(call(target.base, "/api/2.0/mlflow/runs/search", search)["runs"]) == 100
    seconds = timed(lambda: call(target.base, "/api/2.0/mlflow/runs/search", search))
    print(f"  search of {options.runs} runs {seconds:8.3f} s")
    print(f"  {resident_mb(target.process.pid):.0f} MB at the end")


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--no-mlflow", action="store_true", help="leave MLflow's own server out")
    options = parser.parse_args()
    python = sys.executable
    with tempfile.TemporaryDirectory(prefix="runstream-bench-", ignore_cleanup_errors=True) as folder:
        ports = [free_port() for _ in range(3)]
        targets = [
            Target("empty route", [python, "-c", EMPTY.replace("PORT", str(ports[0]))], ports[0], "/empty"),
            Target(
                "runstream",
                [python, "-m", "runstream", "server", "--port", str(ports[1]), "--tracking-uri", f"{folder}/data"],
                ports[1],
                "/ready",
            ),
        ]
        if not options.no_mlflow:
            targets.append(
                Target(
                    "mlflow sqlite",
                    [python, "-m", "mlflow", "server", "--port", str(ports[2]), "--workers", "2",
                     "--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", f"{folder}/a"],
                    ports[2],
                    "/health",
                )
            )  # fmt: skip
        try:
            for target in targets:
                measure(target, options)
        finally:
            for target in targets:
                target.stop()


if __name__ == "__main__":
    main()
