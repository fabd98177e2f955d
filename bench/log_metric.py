"""What `runstream.log_metric` costs the training thread, against a plain function that appends to a growing deque.

Both are called in alternation in one process, so that a noisy machine hits both; ratios are medians over rounds. The
public functions are measured, with delivery to a data directory going on beside them, as in training. Rounds are short,
so that other programs spoil some and not all; `total` is the ratio of the sums, with all that was spoilt. Each line
runs in a process of its own, so that none finds the memory that the one before has left.

    python bench/log_metric.py [--rounds 301] [--calls 4000]
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import runstream
from runstream import recorder
from runstream.config import Settings

Calls = Callable[[int], None]
LINES = (
    "log_metric, 1 thread",
    "log_metric, 2 threads",
    "log_metric, 4 threads",
    "log_metric(..., step=step)",
    "log_metric of an int",
    "log_metrics of 10, a value, against a loop",
    "log_metrics of 10, a value, against calls",
    "single calls",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=301)
    parser.add_argument("--calls", type=int, default=4_000, help="per round")
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line is None:
        version = sys.version.split()[0]
        print(f"Python {version}; medians of {options.rounds} rounds of {options.calls:,} calls; delivery goes on")
        print(f"{'':42} {'ours ns':>8} {'deque ns':>9} {'ratio':>6} {'total':>6}", flush=True)
        for line in LINES:
            subprocess.run([sys.executable, __file__, "--line", line, *sys.argv[1:]], check=True)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-log-metric-"))
    try:
        runstream.set_tracking_uri(str(folder / "data"))
        with runstream.start_run():
            measure(options.line, options.rounds, options.calls)
        report = recorder.for_target(Settings.from_environment(tracking_uri=folder / "data")).close(120.0)
        if not report.complete:
            print(f"not delivered: {report}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(line: str, rounds: int, calls: int) -> None:
    """One line of the table."""
    log_metric, log_metrics = runstream.log_metric, runstream.log_metrics
    grown: deque[tuple[str, float, int | None, int]] = deque()
    append, time_ns = grown.append, time.time_ns
    ten = {f"key {index}": index * 0.5 for index in range(10)}

    def peer(key: str, value: float, step: int | None = None) -> None:
        append((key, value, step, time_ns()))

    def peer_ten(metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            append((key, value, step, time_ns()))

    def of_peer(count: int) -> None:
        for step in range(count):
            peer("loss", 0.5, step)

    def of_ours(count: int) -> None:
        for step in range(count):
            log_metric("loss", 0.5, step)

    def of_peer_by_name(count: int) -> None:
        for step in range(count):
            peer("loss", 0.5, step=step)

    def of_ours_by_name(count: int) -> None:
        for step in range(count):
            log_metric("loss", 0.5, step=step)

    def of_ours_int(count: int) -> None:
        for step in range(count):
            log_metric("loss", 1, step)

    def of_peer_ten(count: int) -> None:
        for step in range(count // 10):
            peer_ten(ten, step)

    def of_peer_ten_calls(count: int) -> None:
        for step in range(count // 10):
            for key, value in ten.items():
                peer(key, value, step)

    def of_ours_ten(count: int) -> None:
        for step in range(count // 10):
            log_metrics(ten, step)

    of_ours(100)
    if line == "single calls":
        tail("log_metric", lambda step: log_metric("loss", 0.5, step), 400_000)
        tail("deque", lambda step: peer("loss", 0.5, step), 400_000)
        return
    ours, theirs, threads = {
        "log_metric, 1 thread": (of_ours, of_peer, 1),
        "log_metric, 2 threads": (of_ours, of_peer, 2),
        "log_metric, 4 threads": (of_ours, of_peer, 4),
        "log_metric(..., step=step)": (of_ours_by_name, of_peer_by_name, 1),
        "log_metric of an int": (of_ours_int, of_peer, 1),
        "log_metrics of 10, a value, against a loop": (of_ours_ten, of_peer_ten, 1),
        "log_metrics of 10, a value, against calls": (of_ours_ten, of_peer_ten_calls, 1),
    }[line]
    mine, peers, ratios = [], [], []
    for index in range(rounds):
        pair = {}
        for run in (ours, theirs) if index % 2 else (theirs, ours):
            pair[run] = timed(run, calls, threads)
        mine.append(pair[ours])
        peers.append(pair[theirs])
        ratios.append(pair[ours] / pair[theirs])
    median = statistics.median
    whole = sum(mine) / sum(peers)
    print(f"{line:42} {median(mine):8.0f} {median(peers):9.0f} {median(ratios):6.2f} {whole:6.2f}", flush=True)


def timed(run: Calls, calls: int, threads: int) -> float:
    """Nanoseconds of wall clock per call over all threads."""
    if threads == 1:
        begun = time.perf_counter_ns()
        run(calls)
        return (time.perf_counter_ns() - begun) / calls
    gate = threading.Barrier(threads + 1)

    def work() -> None:
        gate.wait()
        run(calls // threads)

    crew = [threading.Thread(target=work) for _ in range(threads)]
    for member in crew:
        member.start()
    gate.wait()
    begun = time.perf_counter_ns()
    for member in crew:
        member.join()
    return (time.perf_counter_ns() - begun) / (calls // threads * threads)


def tail(name: str, call: Callable[[int], None], calls: int) -> None:
    """Percentiles of single calls, 5 us apart: a fast training loop, not a flood."""
    clock = time.perf_counter_ns
    spans = []
    gc.collect()
    for step in range(calls):
        begun = clock()
        call(step)
        ended = clock()
        spans.append(ended - begun)
        while clock() - ended < 5_000:
            pass
    spans.sort()

    def at(share: float) -> float:
        return spans[min(len(spans) - 1, int(len(spans) * share))] / 1000

    print(
        f"{name:12} one call in us: median {at(0.5):.2f}, p99 {at(0.99):.2f}, p99.9 {at(0.999):.1f}, "
        f"p99.99 {at(0.9999):.1f}, max {spans[-1] / 1000:.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
