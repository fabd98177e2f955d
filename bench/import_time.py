"""What `import runstream` adds to the start of a bare interpreter, and which modules it may not bring along.

Interpreters with and without the import are started in alternation; the figure is the difference of the medians.

    python bench/import_time.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

HEAVY = ("numpy", "pandas", "pydantic", "fastavro", "fsspec", "kafka", "clickhouse_connect", "fastapi", "chdb")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    programs = {"bare": "pass", "runstream": "import runstream", "runstream.recorder": "import runstream.recorder"}
    spans: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, program in programs.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            spans[name].append((time.perf_counter() - begun) * 1000)
    bare = statistics.median(spans["bare"])
    print(f"bare interpreter {bare:.0f} ms")
    for name in ("runstream", "runstream.recorder"):
        more, least = statistics.median(spans[name]) - bare, min(spans[name]) - min(spans["bare"])
        print(f"import {name}: {more:.0f} ms more (smallest against smallest {least:.0f})")
    program = f"import runstream, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    print(f"heavy modules loaded by it: {loaded}")


if __name__ == "__main__":
    main()
