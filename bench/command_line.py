"""How long the command takes to answer: help, a table from a warm store, the first read on a cold directory.

Commands are started in alternation with a bare interpreter; printed are medians and the difference to it.

    python bench/command_line.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runstream_schemas.layout import DataDirectory, ServerAddress

_FILL = """
import runstream, sys
runstream.set_tracking_uri(sys.argv[1])
for number in range(20):
    with runstream.start_run(run_name=f"run-{number}"):
        runstream.log_param("lr", number)
        for step in range(500):
            runstream.log_metric("loss", 1 / (step + 1), step=step)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="runstream-bench-") as folder:
        place = Path(folder) / "data"
        subprocess.run([sys.executable, "-c", _FILL, str(place)], check=True)
        command = [sys.executable, "-m", "runstream", "--tracking-uri", str(place)]
        cold = []
        for _ in range(3):
            _stop(place)
            cold.append(_seconds([*command, "runs", "list"]))
        cases = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "runstream --help": [*command, "--help"],
            "runstream runs list (warm)": [*command, "runs", "list"],
            "runstream runs list --json (warm)": [*command, "runs", "list", "--json"],
            "runstream sql 'SELECT 1' (warm)": [*command, "sql", "SELECT 1"],
        }
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                taken[name].append(_seconds(case))
        _stop(place)
    bare = statistics.median(taken["python -c pass"])
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{name:<40} {median * 1000:6.0f} ms   {(median - bare) * 1000:+6.0f} ms over bare Python")
    print(f"{'runstream runs list (cold directory)':<40} {statistics.median(cold) * 1000:6.0f} ms")


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def _stop(place: Path) -> None:
    """End the local store process, so that the next read starts cold."""
    address = ServerAddress.read(DataDirectory(place).server_file)
    if address is None:
        return
    os.kill(address.pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while DataDirectory(place).server_file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    main()
