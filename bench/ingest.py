"""Ingest, measured: CPU-seconds per million points, bytes a point, freshness. `python bench/ingest.py [--points N]`

Per message size, side by side and alternating, each run in a process of its own with a new database:

    log     a worker from the directory log into chDB: read, frame, insert, positions; until everything is queryable
    files   the same engine, tables and views; the same framed Avro bytes inserted from files that lie ready

CPU is user + system time of the whole process with the engine's threads, from the first byte to the last position;
merges that run meanwhile count on both sides. Opening the engine and migrating do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from runstream_schemas import codec
from runstream_schemas.segment import SEGMENT_BYTES, encode_frame, segment_name

FINGERPRINT = codec.current("metric_batch").fingerprint
START_MS = 1_790_000_000_000
KEYS = [
    "train/loss",
    "train/accuracy",
    "val/loss",
    "val/accuracy",
    "lr",
    "grad_norm",
    "epoch",
    "gpu/util",
    "gpu/memory",
]
KEYS += [f"layer{number}/norm" for number in range(11)]


def value(rng: random.Random, key: int, step: int) -> float:
    """One point of a realistic curve: noisy float32 losses, k/256 accuracies, a schedule, rounded gauges."""
    if key in (0, 2):
        return _float32(math.exp(-step / 5_000) + rng.gauss(0, 0.02))
    if key in (1, 3):
        return round((1 - math.exp(-step / 4_000)) * 256 * rng.uniform(0.98, 1)) / 256
    if key == 4:
        return _float32(0.05 * (1 + math.cos(step / 20_000 * math.pi)))
    if key == 6:
        return float(step // 500)
    if key in (7, 8):
        return round(rng.gauss(80, 3), 1)
    return _float32(1 + 0.1 * key + rng.gauss(0, 0.05))


def _float32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def make_bodies(points: int, points_a_message: int, runs: int = 32) -> list[bytes]:
    """Bodies of `points` points: runs take turns, as their delivery threads would."""
    rng = random.Random(1)
    per_call = min(len(KEYS), points_a_message)
    calls = max(1, points_a_message // per_call)
    bodies: list[bytes] = []
    for number in range(points // (per_call * calls)):
        run, turn = number % runs, number // runs
        # At one point a message the keys take turns instead.
        keys = [turn % len(KEYS)] if per_call == 1 else list(range(per_call))
        first = (turn // len(KEYS) if per_call == 1 else turn) * calls
        steps = list(range(first, first + calls))
        bodies.append(
            codec.encode(
                "metric_batch",
                {
                    "run_id": f"{run:08x}0123456789abcdef01234567",
                    "writer": (run + 1) << 40,
                    "first_seq": turn * per_call * calls + 1,
                    "sent_at": START_MS + first * 137,
                    "keys": [KEYS[key] for key in keys],
                    "steps": steps,
                    "times": [START_MS + step * 137 + rng.randrange(20) for step in steps],
                    "ki": [index for _ in steps for index in range(per_call)],
                    "ci": [call for call in range(calls) for _ in range(per_call)],
                    "values": [value(rng, key, step) for step in steps for key in keys],
                },
            )
        )
    return bodies


def write_log(root: Path, bodies: list[bytes]) -> None:
    """The bodies as a directory log."""
    folder = root / "metrics"
    folder.mkdir(parents=True)
    offset = 0
    pieces: list[bytes] = []
    size = 0
    for number, body in enumerate(bodies):
        frame = encode_frame(START_MS + number, FINGERPRINT, f"run{number % 32}", body)
        pieces.append(frame)
        size += len(frame)
        if size >= SEGMENT_BYTES or number == len(bodies) - 1:
            (folder / segment_name(offset)).write_bytes(b"".join(pieces))
            offset += size
            pieces, size = [], 0


def write_files(root: Path, bodies: list[bytes]) -> None:
    """The bodies framed as the worker frames them, 8 MiB of bodies a file."""
    from runstream_ingest.batch import Batch, BatchLimits
    from runstream_ingest.frame import frame
    from runstream_ingest.log import LogRecord

    root.mkdir()
    batch, limits, count = Batch(), BatchLimits(), 0
    for number, body in enumerate(bodies):
        batch.add([LogRecord("metrics", 0, number, number + 1, START_MS + number, None, FINGERPRINT, body)])
        if batch.fullness(limits) >= 1.0 or number == len(bodies) - 1:
            [framed] = frame(batch.records)
            (root / f"{count:06d}.avro").write_bytes(b"".join(framed.chunks))
            batch, count = Batch(), count + 1


# What a child process measures.


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def open_engine(root: Path) -> Any:
    from runstream_ingest.local.engine import Engine
    from runstream_ingest.local.store import ChdbStore
    from runstream_ingest.migration import migrate

    engine = Engine(root / "db")
    migrate(ChdbStore(engine))
    return engine


def measure_log(root: Path, points: int) -> dict[str, Any]:
    from runstream_ingest.dead_letter import DirectoryDeadLetters
    from runstream_ingest.local.store import ChdbStore
    from runstream_ingest.log.directory import DirectoryLog, end_positions
    from runstream_ingest.worker import Worker

    engine = open_engine(root)
    log = DirectoryLog(root / "log")
    worker = Worker(log, ChdbStore(engine), DirectoryDeadLetters(root / "log"))
    end = end_positions(root / "log")["metrics", 0]
    stop = threading.Event()
    cpu, began = cpu_seconds(), time.perf_counter()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    while worker.positions().get(("metrics", 0), 0) < end:
        if not thread.is_alive():
            raise SystemExit("the worker failed")
        time.sleep(0.005)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - began
    stop.set()
    thread.join()
    return _result(ChdbStore(engine), points, cpu, wall)


def measure_files(root: Path, points: int) -> dict[str, Any]:
    from runstream_ingest.frame import frame
    from runstream_ingest.local.store import ChdbStore
    from runstream_ingest.log import LogRecord

    engine = open_engine(root)
    store = ChdbStore(engine)
    sample = codec.encode(
        "metric_batch", {**dict.fromkeys(("writer", "first_seq", "sent_at"), 0), "run_id": "", **_ARRAYS}
    )
    [framed] = frame([LogRecord("metrics", 0, 0, 1, 1, None, FINGERPRINT, sample)])
    cpu, began = cpu_seconds(), time.perf_counter()
    for path in sorted((root / "files").iterdir()):
        store.insert("landing_metric_batch", framed.columns, [path.read_bytes()])
    return _result(store, points, cpu_seconds() - cpu, time.perf_counter() - began)


_ARRAYS: dict[str, list[Any]] = {"keys": [], "steps": [], "times": [], "ki": [], "ci": [], "values": []}


def _result(store: Any, points: int, cpu: float, wall: float) -> dict[str, Any]:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    [(rows,)] = store.rows("SELECT count() FROM metrics")
    if rows != points:
        raise SystemExit(f"{rows} points arrived of {points}")
    store.execute("OPTIMIZE TABLE points FINAL")
    [(size, stored)] = store.rows(
        "SELECT sum(bytes_on_disk), sum(rows) FROM system.parts "
        "WHERE active AND table = 'points' AND database = {database:String}",
        {"database": store.database},
    )
    return {
        "cpu_seconds_per_million": cpu / points * 1e6,
        "points_per_second": points / wall,
        "bytes_per_point": size / stored,
        "resident_mb": memory / 1e6,
    }


def measure_freshness(root: Path, seconds: float, points_per_second: float) -> dict[str, Any]:
    """Append at a steady rate, and time from append to visible for a mark every 0.1 s or so."""
    from runstream_ingest.dead_letter import DirectoryDeadLetters
    from runstream_ingest.local.store import ChdbStore
    from runstream_ingest.log.directory import DirectoryLog
    from runstream_ingest.worker import Worker

    engine = open_engine(root)
    log = DirectoryLog(root / "log")
    worker = Worker(log, ChdbStore(engine), DirectoryDeadLetters(root / "log"))
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    bodies = make_bodies(min(2_000_000, int(points_per_second * seconds)), 1_000)
    marks: list[tuple[int, float]] = []
    path = root / "log" / "metrics" / segment_name(0)
    appended = threading.Event()

    def append() -> None:
        began = time.perf_counter()
        with open(path, "ab", buffering=0) as file:
            for number, body in enumerate(bodies):
                due = began + number * 1_000 / points_per_second
                time.sleep(max(0.0, due - time.perf_counter()))
                now = int(time.time() * 1000)
                file.write(encode_frame(now, FINGERPRINT, "run", body))
                if number % 25 == 0:
                    mark = {"run_id": "mark", "writer": 1, "first_seq": number, "sent_at": now, "keys": ["mark"]}
                    one = {"steps": [number], "times": [now], "ki": [0], "ci": [0], "values": [1.0]}
                    file.write(encode_frame(now, FINGERPRINT, "mark", codec.encode("metric_batch", {**mark, **one})))
                    marks.append((number, time.perf_counter()))
        appended.set()

    appender = threading.Thread(target=append)
    appender.start()
    reader = ChdbStore(engine)
    delays: list[float] = []
    seen = -1
    while not appended.is_set() or len(delays) < len(marks):
        [(newest,)] = reader.rows("SELECT max(step) FROM points WHERE run_id = 'mark' AND key = 'mark'")
        now = time.perf_counter()
        while len(delays) < len(marks) and marks[len(delays)][0] <= newest and newest > seen - 1:
            delays.append(now - marks[len(delays)][1])
        time.sleep(0.01)
    stop.set()
    thread.join()
    appender.join()
    delays.sort()
    return {
        "points_per_second": points_per_second,
        "median_seconds": statistics.median(delays),
        "p99_seconds": delays[int(len(delays) * 0.99)],
        "marks": len(delays),
    }


def child(kind: str, root: Path, *arguments: float) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, str(root), *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--points", type=int, default=4_000_000, help="points a run; a tenth of it at 1 point a message"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 100, 1], help="points a message")
    parser.add_argument("--freshness-seconds", type=float, default=10.0)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, root, *numbers = given.child
        measures = {"log": measure_log, "files": measure_files}
        if kind == "freshness":
            print(json.dumps(measure_freshness(Path(root), float(numbers[0]), float(numbers[1]))))
        else:
            print(json.dumps(measures[kind](Path(root), int(float(numbers[0])))))
        sys.stdout.flush()
        os._exit(0)
    limit = 0.0
    print("points/message  what   CPU-s/million  points/s   bytes/point  resident MB   (medians)")
    for size in given.sizes:
        points = given.points if size > 1 else given.points // 10
        points -= points % (math.lcm(size, 20) * 32)
        bodies = make_bodies(points, size)
        found: dict[str, list[dict[str, Any]]] = {"log": [], "files": []}
        for _ in range(given.repeat):
            for kind in found:
                root = Path(tempfile.mkdtemp(prefix="bench-ingest-"))
                try:
                    (write_log if kind == "log" else write_files)(root / kind, bodies)
                    found[kind].append(child(kind, root, len(bodies) * size))
                finally:
                    shutil.rmtree(root)
        middle = {
            kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for kind, runs in found.items()
        }
        for kind, one in middle.items():
            print(
                f"{size:14d}  {kind:5s}  {one['cpu_seconds_per_million']:13.3f}  {one['points_per_second']:8,.0f}  "
                f"{one['bytes_per_point']:11.2f}  {one['resident_mb']:11.0f}",
                flush=True,
            )
        ratio = middle["log"]["cpu_seconds_per_million"] / middle["files"]["cpu_seconds_per_million"]
        print(f"                ratio  {ratio:13.2f}", flush=True)
        limit = max(limit, middle["log"]["points_per_second"])
    if given.freshness_seconds > 0 and limit:
        root = Path(tempfile.mkdtemp(prefix="bench-ingest-"))
        try:
            fresh = child("freshness", root, given.freshness_seconds, limit / 2)
        finally:
            shutil.rmtree(root)
        print(
            f"freshness at {fresh['points_per_second']:,.0f} points/s (half the limit), {fresh['marks']} marks: "
            f"median {fresh['median_seconds']:.3f} s, p99 {fresh['p99_seconds']:.3f} s"
        )


if __name__ == "__main__":
    main()
