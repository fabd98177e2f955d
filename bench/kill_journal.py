"""Kill a logging process with SIGKILL at random instants and count: lost, invented, twice.

A victim logs points from several threads, dict calls and params, and notes each call that has returned in a shared
page. It is killed; what it left is recovered as any other process would; then the log must hold every noted call
exactly once, with its value, and nothing else but the one call that a thread may have been in. (The same record sent
again under its old identity counts as one: the store absorbs it.)

    python bench/kill_journal.py [--kills 200] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import runstream  # noqa: F401  # imported before the fork, so that a victim logs within milliseconds
from runstream import recorder
from runstream.config import Settings
from runstream.journal import journal
from runstream.journal.recovery import recover
from runstream_schemas import codec
from runstream_schemas.segment import Frame, base_offset, read_frames

SLOTS = 16
RUN = "0" * 31 + "1"
CALL_KEYS = ("a", "b", "c")


def main() -> int:
    """Kill, check, print; 0 if nothing was lost, invented or logged twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=0.3, help="longest life of a victim")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    total = {"kills": 0, "points": 0, "lost": 0, "invented": 0, "twice": 0, "wrong": 0, "left_in_journal": 0}
    for index in range(options.kills):
        folder = Path(tempfile.mkdtemp(prefix="kill-journal-"))
        try:
            result = one_kill(folder, dice, options.max_seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        total["kills"] += 1
        for name, count in result.items():
            total[name] += count
        if any(result[name] for name in ("lost", "invented", "twice", "wrong")):
            print(f"kill {index}: {result}", file=sys.stderr)
    print(json.dumps(total))
    return 1 if any(total[name] for name in ("lost", "invented", "twice", "wrong")) else 0


def one_kill(folder: Path, dice: random.Random, max_seconds: float) -> dict[str, int]:
    """One victim from start to check."""
    threads = dice.choice((1, 2, 4))
    # Small segments are switched all the time; without a log everything stays in the journal.
    segment_bytes = dice.choice((64 << 10, 4 << 20))
    blocked = dice.random() < 0.3
    life = dice.random() * max_seconds
    data = folder / "data"
    if blocked:
        data.mkdir()
        (data / "log").write_text("a file in the place of the log")
    with open(folder / "noted", "w+b") as file:
        file.truncate(8 * SLOTS)
        noted = mmap.mmap(file.fileno(), 8 * SLOTS)
    settings = Settings.from_environment({}, tracking_uri=data)
    pid = os.fork()
    if not pid:
        try:
            journal.MAX_SEGMENT_BYTES = segment_bytes
            victim(settings, noted, threads)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20.0
    while not struct.unpack_from("<q", noted, 8 * (SLOTS - 1))[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(life)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if blocked:
        (data / "log").unlink()
    before = sum(1 for _ in bodies(data, "metrics"))
    report = recover(settings, 60.0)
    if report.unfinished or report.damaged:
        raise RuntimeError(f"not recovered: {report}")
    after = sum(1 for _ in bodies(data, "metrics"))
    left = [entry for entry in os.listdir(data / "journal") if not entry.startswith(".")]
    if left:
        raise RuntimeError(f"journals left behind: {left}")
    result = check(data, noted, threads)
    result["left_in_journal"] = int(after > before)
    noted.close()
    return result


def victim(settings: Settings, noted: mmap.mmap, threads: int) -> None:
    """Log until killed. Slots 0 to 3: points per thread; 4 to 7: dict calls per thread; 8: params; 15: ready."""
    rec = recorder.for_target(settings)
    channel = rec.run_channel(RUN)

    def work(thread: int) -> None:
        log_metric, log_metrics = channel.log_metric, channel.log_metrics
        key, count, calls = f"thread {thread}", 0, 0
        names = [f"{name}{thread}" for name in CALL_KEYS]
        while True:
            log_metric(key, value_of(thread, count), count)
            count += 1
            note(noted, 8 * thread, count)
            if count % 7 == 0:
                log_metrics({name: value_of(thread, calls) for name in names}, calls)
                calls += 1
                note(noted, 8 * (4 + thread), calls)
            if count % 1_000 == 0:
                time.sleep(0.001)

    for thread in range(threads):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    note(noted, 8 * (SLOTS - 1), 1)
    params = 0
    while True:
        rec.control("params", {"run_id": RUN, "keys": [f"p{params}"], "values": [str(params)]})
        params += 1
        note(noted, 8 * 8, params)
        time.sleep(0.002)


def note(noted: mmap.mmap, at: int, count: int) -> None:
    """Set a counter in one copy; `pack_into` would zero it first, and a kill in between would show a zero."""
    noted[at : at + 8] = struct.pack("<q", count)


def value_of(thread: int, count: int) -> float:
    """What point `count` of a thread must hold."""
    return thread * 1e6 + count * 0.25


def check(data: Path, noted: mmap.mmap, threads: int) -> dict[str, int]:
    """Compare the log with what was noted."""
    found: dict[tuple[str, int], dict[tuple[int, int, int], float]] = {}
    for body in bodies(data, "metrics"):
        for at, value in enumerate(body["values"]):
            seq = body["seqs"][at] if body["seqs"] else body["first_seq"] + at
            place = (body["keys"][body["ki"][at]], body["steps"][body["ci"][at]])
            found.setdefault(place, {})[body["times"][body["ci"][at]], body["writer"], seq] = value
    params = {key for body in bodies(data, "control") for key in body["keys"]}
    slots = struct.unpack_from(f"<{SLOTS}q", noted)
    expected = lost = wrong = 0
    for thread in range(threads):
        series = [(f"thread {thread}", slots[thread]), *((f"{name}{thread}", slots[4 + thread]) for name in CALL_KEYS)]
        for key, count in series:
            for step in range(count):
                expected += 1
                values = found.get((key, step))
                if values is None:
                    lost += 1
                elif set(values.values()) != {value_of(thread, step)}:
                    wrong += 1
            # The call it was in may be there or not.
            if (key, count) in found:
                expected += 1
                wrong += set(found[key, count].values()) != {value_of(thread, count)}
    lost += sum(f"p{number}" not in params for number in range(slots[8]))
    invented = len(found) - (expected - lost) + max(0, len(params) - slots[8] - 1)
    twice = sum(len(identities) - 1 for identities in found.values())
    return {"points": len(found), "lost": lost, "invented": max(0, invented), "twice": twice, "wrong": wrong}


def bodies(data: Path, stream: str) -> list[dict[str, Any]]:
    """Every event of a stream of the directory log, decoded."""
    found = []
    folder = data / "log" / stream
    if not folder.is_dir():
        return found
    for name in sorted(os.listdir(folder)):
        base = base_offset(name)
        if base is not None:
            for item in read_frames((folder / name).read_bytes(), base):
                if not isinstance(item, Frame):
                    raise RuntimeError(f"{folder / name}: {item}")
                found.append(codec.decode(item.fingerprint, item.body)[1])
    return found


if __name__ == "__main__":
    sys.exit(main())
