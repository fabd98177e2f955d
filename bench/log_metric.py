"""What `runstream.log_metric` costs the training thread, against a plain function that appends to a growing deque.

Both are called in alternation in one process, so that a noisy machine hits both; ratios are medians over rounds. The
public functions are measured, with delivery to a data directory going on beside them, as in training.

    python bench/log_metric.py [--rounds 15] [--calls 40000]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import threading
import time
from collections.abc import Callable

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
    """Measure and print; each line in a process of its own, so that none finds the memory the one before has left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=40_000, help="per round")
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line is None:
        ours, theirs, threads = {
            "log_metric, 1 thread": (of_ours, of_peer, 1),
            "log_metric, 2 threads": (of_ours, of_peer, 2),
            "log_metric, 4 threads": (of_ours, of_peer, 4),
            "log_metric(..., step=step)": (of_ours_by_name, of_peer_by_name, 1),
            "log_metric of an int": (of_ours_int, of_peer, 1),
            "log_metrics of 10, a value, against a loop": (of_ours_ten, of_peer_ten, 1),
            "log_metrics of 10, a value, against calls": (of_ours_ten, of_peer_ten_calls, 1),
            "single calls": (of_ours, of_peer, 1),
        }[line]
    ours(100)
    if line == "single calls":
        tail("log_metric", lambda step: log_metric("loss", 0.5, step), 400_000)
        tail("deque", lambda step: peer("loss", 0.5, step), 400_000)
        return
    mine, peers, ratios = [], [], []
    for index in range(rounds):
        pair = {}
        for run in (ours, theirs) if index % 2 else (theirs, ours):
            pair[run] = timed(run, calls, threads)
        mine.append(pair[ours])
        peers.append(pair[theirs])
        ratios.append(pair[ours] / pair[theirs])
    print(
        f"{line:42} {statistics.median(mine):8.0f} {statistics.median(peers):9.0f} {statistics.median(ratios):6.2f}",
        flush=True,
    )


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
    """Percentiles of single calls, 20 us apart: the rhythm of a fast training loop, not of a flood."""
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
        f"p99.99 {at(0.9999):.1f}, max {spans[-1] / 1000:.0f}"
    )


if __name__ == "__main__":
    main()
