"""What runstream costs a training process before its first step: the import, and starting a run.

    python bench/startup.py [--rounds 15]

Imports are measured in new processes, in alternation with numpy's, as CPU seconds of the import alone (the time a quiet
machine would take; wall time on a busy one says more about its neighbours). Runs start in a data directory with the
source capture of a real git checkout, and with delivery going on.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = "import time; began = time.process_time(); import {}; print(time.process_time() - began)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    modules = ("runstream", "json, logging, dataclasses, pathlib, hashlib, threading", "numpy")
    seconds: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(options.rounds):
        for module in modules:
            command = [sys.executable, "-c", CODE.format(module)]
            seconds[module].append(float(subprocess.run(command, capture_output=True, check=True).stdout))
    print(f"Python {sys.version.split()[0]}, {options.rounds} rounds")
    print(f"{'import':58} {'median ms':>10} {'min ms':>8}   (CPU)")
    for module in modules:
        print(f"{module:58} {statistics.median(seconds[module]) * 1e3:10.1f} {min(seconds[module]) * 1e3:8.1f}")
    folder = Path(tempfile.mkdtemp(prefix="bench-startup-"))
    try:
        runs(folder, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def runs(folder: Path, rounds: int) -> None:
    """The calls around a run, in milliseconds of wall time."""
    import runstream

    runstream.set_tracking_uri(folder / "data")
    names = ("set_experiment", "start_run", "log_param", "set_tag", "log_text", "end_run")
    spent: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, float] = {}
    for index in range(rounds * 4):
        for name, call in (
            ("set_experiment", lambda: runstream.set_experiment("bench")),
            ("start_run", lambda: runstream.start_run()),
            ("log_param", lambda: runstream.log_param("lr", 0.1)),
            ("set_tag", lambda: runstream.set_tag("stage", "train")),
            ("log_text", lambda: runstream.log_text("text", "notes.txt")),
            ("end_run", lambda: runstream.end_run()),
        ):
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            if index == 0:
                first[name] = took
            else:
                spent[name].append(took)
    print(f"\n{'call':58} {'first ms':>10} {'median':>8} {'p90':>8}   (wall)")
    for name in names:
        values = sorted(spent[name])
        p90 = values[int(len(values) * 0.9)]
        print(f"{name:58} {first[name] * 1e3:10.2f} {statistics.median(values) * 1e3:8.2f} {p90 * 1e3:8.2f}")
    if not runstream.flush(30.0).complete:
        raise SystemExit("not everything was delivered")


if __name__ == "__main__":
    main()
