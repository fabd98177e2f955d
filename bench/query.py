"""Reading, on data that went through the directory log and ingest: the targets of DESIGN 8.

    python bench/query.py [--runs 100000] [--points 10000000] [--keep DIR]

Prints medians and the 90th percentile in ms, through `runstream_query.Reader` and HTTP, the wait for the log included.
The load average says how busy the machine was meanwhile: two cores shared with others make every figure larger.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runstream.config import Settings
from runstream.transport import Event
from runstream.transport.directory import DirectoryTransport
from runstream_query import Patience, Reader, open_reader
from runstream_schemas import codec
from runstream_schemas.identity import experiment_id, new_run_id, now_ms
from runstream_schemas.layout import DataDirectory, ServerAddress
from runstream_schemas.names import FIRST_PARTITION_EVENTS, STREAM_OF, EventName

METRICS_OF_A_RUN = 20
BATCH_POINTS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000, help="runs of one experiment, with 20 metrics each")
    parser.add_argument("--points", type=int, default=10_000_000, help="points of one long series")
    parser.add_argument("--keep", type=Path, help="data directory to make or to use again; default: a temporary one")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp(prefix="runstream-bench-query-"))
    try:
        if not (root / "bench.done").exists():
            build(root, options.runs, options.points)
            (root / "bench.done").touch()
        measure(root, options.runs, options.points)
    finally:
        stop(root)
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)


def build(root: Path, runs: int, points: int) -> None:
    """Log everything through the directory log."""
    began = time.perf_counter()
    chance = random.Random(1)
    writer = Writer(root)
    experiment = experiment_id("table")
    writer.add("experiment_created", experiment, experiment_id=experiment, name="table", artifact_uri="", created_at=1)
    now = now_ms()
    keys = [*(f"metric{number}" for number in range(METRICS_OF_A_RUN - 1)), "loss"]
    for number in range(runs):
        run = new_run_id(experiment)
        writer.start(run, experiment, f"run {number}", now - number * 1_000)
        writer.add("run_updated", run, run_id=run, status="FINISHED", ended_at=now)
        writer.add("params", run, run_id=run, keys=["lr", "model"], values=[chance.choice("123"), chance.choice("ab")])
        writer.add("run_tags", run, run_id=run, keys=["team"], values=[chance.choice("abc")])
        values = [chance.random() for _ in keys]
        writer.metrics(run, keys, [5], [now], list(range(len(keys))), [0] * len(keys), values)
        show("runs", number, runs)
    charts = experiment_id("charts")
    writer.add("experiment_created", charts, experiment_id=charts, name="charts", artifact_uri="", created_at=1)
    writer.start("long", charts, "long", now)
    series(writer, "long", points, now, chance)
    for number in range(100):
        writer.start(f"curve{number:03}", charts, "curve", now)
        series(writer, f"curve{number:03}", 10_000, now, chance)
    writer.close()
    print(f"logged {runs:,} runs and {points + 1_000_000:,} points in {time.perf_counter() - began:.0f} s")


def series(writer: Writer, run: str, points: int, now: int, chance: random.Random) -> None:
    """A decaying, noisy curve."""
    for first in range(0, points, BATCH_POINTS):
        steps = list(range(first, min(first + BATCH_POINTS, points)))
        values = [1.0 / (1 + step / 1_000) + chance.random() / 10 for step in steps]
        index = list(range(len(steps)))
        writer.metrics(run, ["loss"], steps, [now + step for step in steps], [0] * len(steps), index, values)
        show(run, first, points)


class Writer:
    """Appends events in large pieces."""

    def __init__(self, root: Path) -> None:
        self._transport = DirectoryTransport(DataDirectory(root).log)
        self._events: list[Event] = []
        self._bytes = 0
        self._seq = 0

    def add(self, name: EventName, key: str, /, **fields: object) -> None:
        schema = codec.current(name)
        if name != "metric_batch":
            self._seq += 1
            fields = {"time_ms": now_ms(), "seq": self._seq, "writer": 7} | fields
        body = codec.encode(name, fields)
        self._events.append(Event(STREAM_OF[name], key, schema.fingerprint, body, name in FIRST_PARTITION_EVENTS))
        self._bytes += len(body)
        if self._bytes > 4_000_000:
            self.flush()

    def start(self, run: str, experiment: str, name: str, started_at: int) -> None:
        uri = f"{experiment}/{run}/artifacts"
        source = {"source_name": "train.py", "source_type": "LOCAL", "source_version": ""}
        self.add(
            "run_started",
            run,
            run_id=run,
            experiment_id=experiment,
            name=name,
            user="ann",
            artifact_uri=uri,
            parent_run_id="",
            started_at=started_at,
            **source,
        )

    def metrics(
        self,
        run: str,
        keys: list[str],
        steps: list[int],
        times: list[int],
        ki: list[int],
        ci: list[int],
        values: list[float],
    ) -> None:
        self._seq += len(values)
        series = {"keys": keys, "steps": steps, "times": times, "ki": ki, "ci": ci, "values": values}
        self.add("metric_batch", run, run_id=run, writer=7, first_seq=self._seq, sent_at=now_ms(), **series)

    def flush(self) -> None:
        self._transport.send(self._events).result(30.0)
        self._events, self._bytes = [], 0

    def close(self) -> None:
        self.flush()
        self._transport.close(5.0)


def measure(root: Path, runs: int, points: int) -> None:
    reader = open_reader(Settings.from_environment({}, tracking_uri=root), patience=Patience(60.0, 3_600.0))
    began = time.perf_counter()
    reader.wait()
    print(f"start and catch-up {time.perf_counter() - began:.1f} s; load average {os.getloadavg()[0]:.1f}")
    table, charts = experiment_id("table"), experiment_id("charts")
    a_run = reader.search_run_ids([table], max_results=1)[0][0]
    curves = [f"curve{number:03}" for number in range(100)]

    fresh = itertools.count(1)

    def another(filter_string: str) -> str:
        """The same with a digit far behind that is new: a reader remembers searches while nothing is logged."""
        return filter_string.replace("0.1", f"0.1{next(fresh):06d}")

    def page(filter_string: str, order: list[str]) -> Callable[[], object]:
        return lambda: reader.search_runs([table], another(filter_string), max_results=50, order_by=order)

    loss, any_time = "metrics.loss < 0.1", "attributes.start_time > 0.1"
    cases: list[tuple[str, str, Callable[[], object]]] = [
        (f"page of 50 of {runs:,} runs, metric filter and sort", "< 100", page(loss, ["metrics.loss"])),
        (
            "  the ids alone",
            "",
            lambda: reader.search_run_ids([table], another(loss), max_results=50, order_by=["metrics.loss"]),
        ),
        ("  two filters, sorted by another metric", "", page(loss + " AND params.lr = '1'", ["metrics.metric3 DESC"])),
        ("  newest first", "", page(any_time, [])),
        ("  the same again", "", lambda: reader.search_runs([table], loss, max_results=50, order_by=["metrics.loss"])),
        ("  in a small experiment", "", lambda: reader.search_runs([charts], another(any_time), max_results=50)),
        (f"{points:,} points, 500 buckets", "< 200", lambda: reader.metric_buckets(["long"], ["loss"], 500)),
        (f"{points:,} points, LTTB to 1,000", "< 200", lambda: reader.metric_points(["long"], ["loss"], 1_000)),
        ("100 runs x 10,000 points, LTTB to 500", "58", lambda: reader.metric_points(curves, ["loss"], 500)),
        ("100 runs x 10,000 points, 500 buckets", "", lambda: reader.metric_buckets(curves, ["loss"], 500)),
        ("one series of 10,000 points, raw", "", lambda: reader.metric_history("curve000", "loss")),
        ("one run", "< 10", lambda: reader.get_run(a_run)),
        ("one experiment", "< 10", lambda: reader.get_experiment(charts)),
        ("SELECT 1 as rows", "< 10", lambda: reader.sql("SELECT 1", output_format="rows")),
        ("count of a run's points in SQL", "< 10", lambda: count(reader)),
    ]
    for name, target, call in cases:
        middle, high = timed(call)
        print(f"{name:50} median {middle:8.1f} ms   p90 {high:8.1f} ms   {f'(target {target} ms)' if target else ''}")
    reader.close()
    stop(root)
    cold(root)


def count(reader: Reader) -> object:
    return reader.sql(
        "SELECT count() AS n FROM metrics WHERE run_id = 'curve000' AND key = 'loss'", output_format="rows"
    )


def cold(root: Path) -> None:
    """From the start of a process that reads one thing to its end, without a store process; then with one."""
    script = (
        "import sys; from runstream.config import Settings; from runstream_query import open_reader\n"
        "open_reader(Settings.from_environment({}, tracking_uri=sys.argv[1])).get_experiment('0')"
    )
    with tempfile.TemporaryDirectory(prefix="runstream-bench-cold-") as fresh:
        for name, place in (("fresh directory", Path(fresh)), ("this directory", root)):
            for state in ("cold", "warm"):
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", script, str(place)], check=True, stderr=subprocess.DEVNULL)
                seconds = time.perf_counter() - began
                target = " (target < 1.5 s)" if state == "cold" else ""
                print(f"a process's first read, {name}, {state}: {seconds:.2f} s{target}")
            stop(place)


def timed(call: Callable[[], object], seconds: float = 3.0) -> tuple[float, float]:
    """Median and 90th percentile of the calls that fit into `seconds`, at least five, in ms."""
    call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 5 or (time.perf_counter() < end and len(took) < 200):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1_000)
    took.sort()
    return took[len(took) // 2], took[len(took) * 9 // 10]


def stop(root: Path) -> None:
    """End the local store process of `root`, and wait for its end."""
    address = ServerAddress.read(DataDirectory(root).server_file)
    if address is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(address.pid, signal.SIGTERM)
        for _ in ticks(20.0):
            if ServerAddress.read(DataDirectory(root).server_file) is None:
                return


def ticks(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


def show(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty() and done % 10_000 == 0:
        print(f"\r{what}: {100 * done // max(1, total)} %   ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
