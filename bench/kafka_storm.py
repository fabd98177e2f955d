"""Kill and stop everything at random while 16 processes log through a real Kafka, then count every point.

Three brokers (replication 3, min.insync 2), workers, the store's process and some of the clients get SIGKILL and
SIGSTOP from a seeded dice; a supervisor starts brokers, workers and store again, dead clients stay dead. Afterwards
`runstream sync` delivers what they left. Then, through SQL, each run must hold every call that returned exactly once
(a client notes each in a shared page; the one call that it may have been in is allowed), clients that lived hold all of
their points, and the brokers' records, read by a bare consumer with fastavro alone, must be the store's points.

    python bench/kafka_storm.py [--seed 1] [--clients 16] [--points 100000] [--workers 3] [--storm-seconds 90]

Needs Java and Maven (`tests/services`). Prints one JSON line and exits with 1 if a point was lost, doubled or invented.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.kafka_line import Line  # noqa: E402
from tests.services.kafka_cluster import KafkaCluster  # noqa: E402
from tests.services.process import ServerProcess, ServiceError, wait_until  # noqa: E402

CLIENT = """
import mmap, struct, sys, time
import runstream
name, points, pause, noted = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
file = open(noted, "r+b")
page = mmap.mmap(file.fileno(), 8)
pack, log = struct.Struct("<q").pack_into, runstream.log_metric
runstream.set_experiment("storm")
with runstream.start_run(run_name=name) as run:
    print(run.info.run_id, flush=True)
    runstream.log_param("points", points)
    for step in range(points):
        log("loss", step + 0.5, step=step)
        pack(page, 0, step + 1)
        if step % 100 == 99:
            time.sleep(pause)
"""


class Client:
    """One logging process, and how many of its calls have returned."""

    def __init__(self, line: Line, name: str, points: int, pause_seconds: float) -> None:
        self.points = points
        self.killed = False
        noted = line.folder / f"noted-{name}"
        noted.write_bytes(bytes(8))
        command = [sys.executable, "-c", CLIENT, name, str(points), str(pause_seconds), str(noted)]
        self.process = ServerProcess(command, line.folder / f"client-{name}.log", line.environment())
        self.process.start()
        line.clients.append(self.process)
        with noted.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)

    @property
    def returned(self) -> int:
        """Calls of log_metric that have returned."""
        return int(struct.unpack_from("<q", self._page)[0])

    @property
    def run_id(self) -> str | None:
        """None for a client that was killed before it had a run."""
        words = self.process.log.read_text().split()
        return words[0] if words else None


class Storm:
    """The faults, one at a time, each bounded; what they hit is up again or supervised when it returns."""

    def __init__(self, line: Line, cluster: KafkaCluster, clients: list[Client], dice: random.Random) -> None:
        self.line = line
        self.cluster = cluster
        self.clients = clients
        self.dice = dice
        self.done: Counter[str] = Counter()
        self._victims = dice.sample(clients, max(1, len(clients) // 4))
        """Only these are killed: the others must deliver everything by themselves."""
        self._kinds: list[Callable[[], None]] = [
            self.kill_worker,
            self.kill_worker,
            self.pause_worker,
            self.stop_worker,
            self.kill_broker,
            self.kill_broker,
            self.pause_broker,
            self.kill_quorum,
            self.kill_store,
            self.pause_store,
            self.kill_client,
            self.kill_client,
            self.pause_client,
        ]

    def one(self) -> None:
        fault = self.dice.choice(self._kinds)
        fault()
        self.done[fault.__name__] += 1
        self.line.mend_workers()

    def kill_worker(self) -> None:
        self.dice.choice(self.line.workers).kill()

    def stop_worker(self) -> None:
        """SIGTERM: it drains, or gives up where something is away."""
        self.dice.choice(self.line.workers).stop(30.0)

    def pause_worker(self) -> None:
        """Mostly beyond the group's session time-out, so that it comes back as a zombie."""
        self._pause(self.dice.choice(self.line.workers), self.dice.uniform(2.0, 14.0))

    def kill_broker(self) -> None:
        number = self.dice.randrange(3)
        self.cluster.brokers[number].kill()
        time.sleep(self.dice.uniform(0.0, 6.0))
        self.cluster.start_broker(number)

    def pause_broker(self) -> None:
        """From a hiccup to what makes the controller take the leadership away (9 s)."""
        self._pause(self.dice.choice(self.cluster.brokers), self.dice.uniform(1.0, 13.0))

    def kill_quorum(self) -> None:
        """Two of three, or all: nothing can be acknowledged meanwhile."""
        numbers = self.dice.sample(range(3), self.dice.choice((2, 2, 3)))
        for number in numbers:
            self.cluster.brokers[number].kill()
        time.sleep(self.dice.uniform(0.0, 3.0))
        for number in numbers:
            self.cluster.brokers[number].start()
        for number in numbers:
            self.cluster.start_broker(number)

    def kill_store(self) -> None:
        self.line.kill_store()

    def pause_store(self) -> None:
        """In the middle of whatever it does."""
        pid = self.line.store.process.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.dice.uniform(0.5, 6.0))
        os.kill(pid, signal.SIGCONT)

    def kill_client(self) -> None:
        alive = [client for client in self._victims if client.process.running]
        if alive:
            client = self.dice.choice(alive)
            client.process.kill()
            client.killed = True

    def pause_client(self) -> None:
        alive = [client for client in self.clients if client.process.running]
        if alive:
            self._pause(self.dice.choice(alive).process, self.dice.uniform(0.5, 4.0))

    def _pause(self, process: ServerProcess, seconds: float) -> None:
        if process.running:
            with suppress(ProcessLookupError):
                process.pause()
                time.sleep(seconds)
                process.unpause()


def check(line: Line, clients: list[Client]) -> dict[str, int]:
    """Count what is wrong."""
    wrong = {"lost": 0, "doubled": 0, "invented": 0, "wrong_values": 0, "brokers_differ": 0}
    rows = line.sql(
        "SELECT run_id, count(), uniqExact(step), min(step), max(step), countIf(value != step + 0.5 OR key != 'loss') "
        "FROM metrics GROUP BY run_id"
    )
    stored = {row[0]: tuple(int(number) for number in row[1:]) for row in rows}
    known: set[str] = set()
    for client in clients:
        run_id = client.run_id
        returned = client.returned
        if run_id is None:
            continue
        known.add(run_id)
        count, different, first, last, odd = stored.get(run_id, (0, 0, 0, -1, 0))
        most = returned + 1 if client.killed and returned < client.points else returned
        wrong["doubled"] += count - different
        wrong["lost"] += max(0, returned - different) + (client.points - returned if not client.killed else 0)
        wrong["invented"] += max(0, different - most) + (1 if different and (first, last) != (0, different - 1) else 0)
        wrong["wrong_values"] += odd
    wrong["invented"] += len(set(stored) - known)
    held: dict[str, set[int]] = {}
    for run_id, _, step in line.points_in_kafka():
        held.setdefault(run_id, set()).add(step)
    for run_id in held.keys() | stored.keys():
        steps = {int(step) for (step,) in line.sql(f"SELECT step FROM metrics WHERE run_id = '{run_id}'")}
        wrong["brokers_differ"] += len(steps ^ held.get(run_id, set()))
    return wrong


def main() -> int:
    """Storm, calm, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--points", type=int, default=100_000, help="of each client")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--storm-seconds", type=float, default=90.0, help="how long faults go on")
    parser.add_argument("--calm-seconds", type=float, default=300.0, help="longest wait for what is still on its way")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="runstream-storm-") as folder,
        KafkaCluster(Path(folder) / "kafka", 3) as cluster,
        Line(cluster.bootstrap, Path(folder), "storm") as line,
    ):
        for _ in range(options.workers):
            line.start_worker()
        # So paced that logging lasts as long as the storm.
        pause = 0.8 * options.storm_seconds * 100 / options.points
        clients = [Client(line, f"c{number:02}", options.points, pause) for number in range(options.clients)]
        wait_until(lambda: sum(client.returned > 0 for client in clients) > len(clients) // 2, 120, "clients at work")
        storm = Storm(line, cluster, clients, dice)
        end = time.monotonic() + options.storm_seconds
        while time.monotonic() < end:
            storm.one()
            time.sleep(dice.uniform(0.1, 1.5))
        calm = time.monotonic()
        for client in clients:
            if not client.killed:
                code = client.process._process and client.process._process.wait(options.calm_seconds)
                if code:
                    raise ServiceError(f"a client ended with {code}:\n{client.process.log_tail()}")
        line.deliver_journals()
        line.wait_stored(options.calm_seconds)
        result: dict[str, Any] = {"seed": options.seed, "faults": sum(storm.done.values()), **storm.done}
        result["clients_killed"] = sum(client.killed for client in clients)
        result["points"] = sum(client.returned for client in clients)
        result["recovery_seconds"] = round(time.monotonic() - calm)
        wrong = check(line, clients)
        result |= wrong
        result["dead_letters"] = len(line.dead_letters())
        result["seconds"] = round(time.monotonic() - began)
        print(json.dumps(result), flush=True)
        return 1 if any(wrong.values()) or result["dead_letters"] else 0


if __name__ == "__main__":
    sys.exit(main())
