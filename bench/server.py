"""`runstream server` beside MLflow's own server with SQLite and with PostgreSQL, and beside an empty route of FastAPI.

    python bench/server.py [--seconds 3] [--repeats 3] [--runs 10000] [--points 100000] [--no-mlflow] [--no-postgres]

Needs the packages mlflow and psutil (extra `dev`) and Debian's wrk and postgresql. All servers run at once with the
same data and are measured in turn, `--repeats` times; printed are medians and, behind them, how many times runstream's
speed is MLflow's. The targets: log-metric 20x MLflow's rate and 0.5x the empty route's, log-batch and search 10x,
history 20x.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from server_load import STAMP, Caller, rate  # noqa: E402
from server_peer import EMPTY, Mlflow, Peer, Postgres, Runstream, free_port, pss_mb  # noqa: E402

API = "/api/2.0/mlflow"


@dataclass(frozen=True)
class RunData:
    """One run of the table that is searched."""

    run_id: str
    name: str
    start: int
    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


def runs_of(count: int, experiment: int) -> Iterator[RunData]:
    """The same runs for every server: 10 metrics, 10 params and 4 tags each."""
    chance = random.Random(1)
    for number in range(count):
        run_id = f"{zlib.crc32(str(experiment).encode()):08x}{chance.getrandbits(96):024x}"
        metrics = {f"metric{index}": chance.random() for index in range(9)} | {"loss": chance.random()}
        params = {f"param{index}": f"{chance.random():.6f}" for index in range(9)} | {"lr": str(number % 10)}
        tags = {f"tag{index}": f"value {chance.randrange(100)}" for index in range(3)}
        name = f"run {number}"
        yield RunData(run_id, name, 1_700_000_000_000 + number, metrics, params, tags | {"mlflow.runName": name})


def history_of(points: int) -> Iterator[tuple[int, int, float]]:
    """Step, time and value of each point of the long history."""
    chance = random.Random(2)
    for step in range(points):
        yield step, 1_700_000_000_000 + step, 1 / (1 + step / 1000) + chance.random() / 10


def fill_runstream(peer: Runstream, runs: int, points: int) -> None:
    """Append the runs and the history to the directory log, as clients on this machine would."""
    from query import Writer  # bench/query.py

    writer = Writer(peer.root)
    for each in runs_of(runs, int(peer.experiment)):
        run = each.run_id
        writer.start(run, peer.experiment, each.name, each.start)
        writer.add("run_updated", run, run_id=run, status="FINISHED", ended_at=each.start + 1000)
        writer.add("params", run, run_id=run, keys=list(each.params), values=list(each.params.values()))
        writer.add("run_tags", run, run_id=run, keys=list(each.tags), values=list(each.tags.values()), deleted_keys=[])
        count = len(each.metrics)
        values = list(each.metrics.values())
        writer.metrics(run, list(each.metrics), [0], [each.start], list(range(count)), [0] * count, values)
    history = list(history_of(points))
    for first in range(0, points, 20_000):
        part = history[first : first + 20_000]
        index = list(range(len(part)))
        steps, times, values = ([item[place] for item in part] for place in range(3))
        writer.metrics(peer.long_run, ["long"], steps, times, [0] * len(part), index, values)
    writer.close()


def prepare(peer: Peer, runs: int, points: int) -> None:
    """Give a server its data, and see that it answers with it."""
    caller = Caller(peer.port)
    made = caller.json(f"{API}/experiments/create", {"name": f"bench {time.time_ns()}"})
    peer.experiment = str(made["experiment_id"])
    body = {"experiment_id": peer.experiment, "start_time": 1}
    peer.long_run = caller.json(f"{API}/runs/create", body)["run"]["info"]["run_id"]
    if isinstance(peer, Runstream):
        fill_runstream(peer, runs, points)
    elif isinstance(peer, Mlflow):
        peer.fill(runs, points)
    caller.close()  # servers end connections that were silent for as long as filling takes
    caller = Caller(peer.port)
    assert len(caller.json(history_path(peer))["metrics"]) == points
    whole = caller.json(f"{API}/runs/search", search_body(peer, 50_000, "metrics.loss >= 0"))["runs"]
    assert len(whole) == runs
    assert all(len(run["data"]["metrics"]) == 10 == len(run["data"]["params"]) for run in whole)
    caller.close()


def history_path(peer: Peer) -> str:
    """The whole long history in one answer."""
    return f"{API}/metrics/get-history?" + urlencode({"run_id": peer.long_run, "metric_key": "long"})


def search_body(peer: Peer, page: int, where: str) -> dict[str, object]:
    """A search of the table."""
    order = ["metrics.loss DESC"]
    return {"experiment_ids": [peer.experiment], "max_results": page, "filter": where, "order_by": order}


def log_metric_body(peer: Peer) -> bytes:
    """One point; the time, and with it the step, is another one in each request."""
    fields = {"run_id": peer.long_run, "key": "loss", "value": 0.5, "timestamp": int(STAMP), "step": int(STAMP)}
    return json.dumps(fields).encode()


def log_batch_body(peer: Peer, size: int = 1000) -> bytes:
    """`size` points of `size` keys."""
    metrics = [
        {"key": f"key{number}", "value": 0.5 + number, "timestamp": int(STAMP), "step": int(STAMP)}
        for number in range(size)
    ]
    return json.dumps({"run_id": peer.long_run, "metrics": metrics}).encode()


def fluent_history(peer: Peer) -> float:
    """Seconds of MlflowClient.get_metric_history in a process of its own, imports left out."""
    script = (
        "import sys, time, mlflow; client = mlflow.MlflowClient(sys.argv[1]); client.get_run(sys.argv[2])\n"
        "began = time.perf_counter(); found = client.get_metric_history(sys.argv[2], 'long')\n"
        "print(time.perf_counter() - began, len(found))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, peer.base, peer.long_run]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])


def measures(options: argparse.Namespace) -> list[tuple[str, str, Callable[[Peer], float]]]:
    """Name, unit and how one server is measured; "/s" is better when larger, "s" when smaller."""
    found: list[tuple[str, str, Callable[[Peer], float]]] = []

    def one(name: str, unit: str, call: Callable[[Peer], float]) -> None:
        found.append((name, unit, call))

    for connections in options.connections:

        def log_metric(peer: Peer, connections: int = connections) -> float:
            if peer.name == "empty route":
                return rate(peer.port, "/empty", b"{}", connections, options.seconds)
            return rate(peer.port, f"{API}/runs/log-metric", log_metric_body(peer), connections, options.seconds)

        one(f"log-metric, {connections} connections", "/s", log_metric)

    def timed(path: Callable[[Peer], str], body: Callable[[Peer], object] = lambda _: None) -> Callable[[Peer], float]:
        def call(peer: Peer) -> float:
            caller = Caller(peer.port)
            seconds = caller.seconds(path(peer), body(peer))
            caller.close()
            return seconds

        return call

    search = f"{API}/runs/search"
    one(
        "log-batch of 1,000, 4 connections",
        "/s",
        lambda peer: rate(peer.port, f"{API}/runs/log-batch", log_batch_body(peer), 4, options.seconds),
    )
    one(
        "runs/get, 4 connections",
        "/s",
        lambda peer: rate(peer.port, f"{API}/runs/get?run_id={a_run(peer)}", b"", 4, options.seconds, "GET"),
    )
    one("one runs/get", "s", timed(lambda peer: f"{API}/runs/get?run_id={a_run(peer)}"))
    one("runs/get, another run each time", "s", other_runs)
    one("history of all points", "s", timed(history_path))
    one(
        "history, one page of 25,000",
        "s",
        timed(lambda peer: history_path(peer) + "&max_results=25000"),
    )
    one("MlflowClient.get_metric_history", "s", fluent_history)
    for page in (100, 1000, 50_000):
        where = "metrics.loss < 0.5" if page < 50_000 else "metrics.loss < 1.5"
        shown = f"page of {page:,}" if page < 50_000 else "all runs in one page"
        one(f"search, {shown}", "s", lambda peer, page=page, where=where: other_searches(peer, page, where))
    one(
        "search, page of 100, again",
        "s",
        timed(lambda _: search, lambda peer: search_body(peer, 100, "metrics.loss < 0.5")),
    )
    return found


def a_run(peer: Peer) -> str:
    """One run of the table."""
    return next(runs_of(1, int(peer.experiment))).run_id


def other_runs(peer: Peer, count: int = 20) -> float:
    """Median seconds of runs/get for runs that nobody has asked for before: our server remembers those of the last."""
    if peer.fresh_runs is None:
        peer.fresh_runs = (each.run_id for each in runs_of(10_000, int(peer.experiment)))
        next(peer.fresh_runs)
    caller = Caller(peer.port)
    took = []
    for run_id in itertools.islice(peer.fresh_runs, count):
        took.append(caller.seconds(f"{API}/runs/get?run_id={run_id}", repeats=1))
    caller.close()
    return statistics.median(took)


def other_searches(peer: Peer, page: int, where: str, count: int = 3) -> float:
    """Median seconds of searches that differ in a digit far behind: our server remembers those of the last seconds."""
    caller = Caller(peer.port)
    took = []
    for _ in range(count):
        body = search_body(peer, page, f"{where}{next(_fresh):07d}")
        took.append(caller.seconds(f"{API}/runs/search", body, repeats=1))
    caller.close()
    return statistics.median(took)


_fresh = itertools.count(1)


def settle(peer: Peer) -> None:
    """Return once everything logged is stored, so that the next server has the machine to itself."""
    if isinstance(peer, Runstream):
        Caller(peer.port).bytes(history_path(peer) + "&max_results=1")


def report(results: dict[str, dict[str, list[float]]], units: dict[str, str], names: list[str]) -> None:
    """One line a measure: medians, and runstream's advantage."""
    print(f"\n{'':36}" + "".join(f"{name:>24}" for name in names))
    for measure, by_peer in results.items():
        line = f"{measure:36}"
        ours = statistics.median(by_peer["runstream"])
        for name in names:
            if name not in by_peer:
                line += f"{'':>24}"
                continue
            value = statistics.median(by_peer[name])
            text = f"{value:,.0f} /s" if units[measure] == "/s" else f"{value * 1000:,.1f} ms"
            factor = ours / value if units[measure] == "/s" else value / ours
            line += f"{text + ('' if name == 'runstream' else f' ({factor:.2f}x)'):>24}"
        print(line, flush=True)


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="of load for one rate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", default=[""], help="measures whose names contain one of these")
    parser.add_argument("--no-mlflow", action="store_true", help="leave MLflow's own server out")
    parser.add_argument("--no-postgres", action="store_true", help="leave MLflow's server with PostgreSQL out")
    options = parser.parse_args()
    peers: list[Peer] = []
    postgres: Postgres | None = None
    with tempfile.TemporaryDirectory(prefix="runstream-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            port = free_port()
            peers.append(
                Peer("empty route", [sys.executable, "-c", EMPTY.replace("PORT", str(port))], port, "/openapi.json")
            )
            peers.append(Runstream(folder))
            if not options.no_mlflow:
                peers.append(Mlflow("MLflow, SQLite", folder, f"sqlite:///{folder}/mlflow.db"))
                if not options.no_postgres:
                    postgres = Postgres(folder)
                    peers.append(Mlflow("MLflow, PostgreSQL", folder, postgres.uri, postgres.packages))
            for peer in peers[1:]:  # our store process has gone again if MLflow took long to start
                Caller(peer.port).json(f"{API}/experiments/search", {"max_results": 1})
            time.sleep(3.0)  # everybody comes to rest
            for peer in peers:
                extra = [postgres.process.pid] if postgres is not None and "PostgreSQL" in peer.name else []
                print(f"{peer.name}: {pss_mb([*peer.processes(), *extra]):.0f} MB at rest (PSS)", flush=True)
            for peer in peers[1:]:
                prepare(peer, options.runs, options.points)
            chosen = [item for item in measures(options) if any(part in item[0] for part in options.only)]
            results: dict[str, dict[str, list[float]]] = {name: {} for name, _, _ in chosen}
            for _ in range(options.repeats):
                for measure, _, call in chosen:
                    for peer in peers:
                        if peer.name == "empty route" and not measure.startswith("log-metric"):
                            continue
                        results[measure].setdefault(peer.name, []).append(call(peer))
                        settle(peer)
            report(results, {measure: unit for measure, unit, _ in chosen}, [peer.name for peer in peers])
            print(
                f"\nload average {os.getloadavg()[0]:.1f}; runstream at the end: {pss_mb(peers[1].processes()):.0f} MB"
            )
        finally:
            for peer in peers:
                peer.stop()
            if postgres is not None:
                postgres.stop()


if __name__ == "__main__":
    main()
