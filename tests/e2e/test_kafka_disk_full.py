"""Full disks on the Kafka line: the broker's, the client's and the store's. Nothing accepted is lost; all recovers."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runstream_schemas.names import SCHEMA_HEADER, topic
from tests.client.test_journal_disk import mounted
from tests.e2e.accounting import account
from tests.e2e.kafka_line import Line
from tests.ingest.local_store import LocalStore
from tests.services.events import METRICS, body, points
from tests.services.kafka import collect_refused_sockets, local_broker, local_cluster, producer, require_local_kafka
from tests.services.kafka_cluster import KafkaCluster
from tests.services.process import ServerProcess, wait_until

__all__ = ["collect_refused_sockets"]

# Not marked as Kafka tests, none of which may be skipped on CI: these are, where no tmpfs can be mounted.
pytestmark = [
    pytest.mark.usefixtures("collect_refused_sockets"),
    pytest.mark.timeout(300),
    # kafka-python leaves sockets of refused connections to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

CLIENT = """
import random, sys, time
import runstream
name, points, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
dice = random.Random(name)
runstream.set_experiment("full")
with runstream.start_run(run_name=name) as run:
    print(run.info.run_id, flush=True)
    for step in range(points):
        runstream.log_metric("noise", dice.random(), step=step)
        if step % 100 == 99:
            print(step + 1, flush=True)
            time.sleep(pause)
    print("trained", flush=True)
"""


class Ballast:
    """A file that takes all room of a file system but for a rest."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"

    def fill(self, leave_bytes: int) -> None:
        with self._path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            room = os.statvfs(self._path.parent)
            left = room.f_bavail * room.f_frsize - leave_bytes
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 20)))

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)


def client(line: Line, name: str, count: int, pause_seconds: float, **environment: str) -> ServerProcess:
    made = ServerProcess(
        [sys.executable, "-c", CLIENT, name, str(count), str(pause_seconds)],
        line.folder / f"client-{name}.log",
        line.environment() | environment,
    )
    made.start()
    line.clients.append(made)
    return made


def ended(process: ServerProcess, seconds: float = 90.0) -> int:
    assert process._process is not None
    return process._process.wait(seconds)


def trained(process: ServerProcess) -> bool:
    return "trained" in process.log.read_text()


def check(line: Line, count: int) -> None:
    """All points of all clients, and every message accounted for."""
    line.wait_stored()
    account(line)
    for each in line.clients:
        run_id = each.log.read_text().split()[0]
        assert line.sql(f"SELECT count(), uniqExact(step), max(step) FROM metrics WHERE run_id = '{run_id}'") == [
            (count, count, count - 1)
        ]


def test_the_brokers_disk_is_full(tmp_path: Path) -> None:
    """The broker dies of it; training goes on, and everything arrives when there is room again."""
    with contextlib.ExitStack() as stack:
        disk = tmp_path / "kafka" / "node0" / "data"
        stack.enter_context(mounted(disk, "-o", "size=64m"))
        cluster = stack.enter_context(local_cluster_at(tmp_path / "kafka"))
        line = stack.enter_context(Line(cluster.bootstrap, tmp_path, "full"))
        line.start_worker()
        first = client(line, "before", 20_000, 0.0)
        assert ended(first) == 0
        ballast = Ballast(disk)
        ballast.fill(leave_bytes=100_000)
        second = client(line, "during", 20_000, 0.02)
        wait_until(lambda: not cluster.brokers[0].running, 60, "the broker's end")
        wait_until(lambda: trained(second), 60, "the end of training")
        assert second.running, "it waits for delivery"
        ballast.clear()
        cluster.start_broker(0)
        assert ended(second) == 0, second.log_tail()
        assert "Traceback" not in second.log.read_text()
        check(line, 20_000)


def test_the_clients_disk_is_full_while_the_broker_is_away(tmp_path: Path) -> None:
    """The journal goes on in memory, with a warning; when the broker is back everything arrives, once."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounted(tmp_path / "disk", "-o", "size=600k"))
        cluster = stack.enter_context(local_cluster())
        line = stack.enter_context(Line(cluster.bootstrap, tmp_path, "full"))
        line.start_worker()
        cluster.brokers[0].pause()
        one = client(line, "one", 60_000, 0.0, RUNSTREAM_JOURNAL_DIR=str(tmp_path / "disk" / "journal"))
        wait_until(lambda: trained(one), 60, "the end of training")
        assert "takes no more" in one.log.read_text() or "goes on in memory" in one.log.read_text()
        cluster.brokers[0].unpause()
        assert ended(one) == 0, one.log_tail()
        line.wait_stored()
        account(line)
        assert line.sql("SELECT count(), uniqExact(step), max(step) FROM metrics") == [(60_000, 60_000, 59_999)]


def test_the_stores_disk_is_full(tmp_path: Path) -> None:
    """The worker waits, says so, sets nothing aside, and goes on by itself when there is room again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounted(tmp_path / "disk", "-o", "size=96m"))
        line = stack.enter_context(Shelf(local_broker().bootstrap, tmp_path, f"full{time.time_ns()}"))
        worker = line.start_worker()
        append(line, 0, 50)
        line.wait_stored()
        ballast = Ballast(tmp_path / "disk")
        ballast.fill(leave_bytes=100_000)
        append(line, 50, 300)
        wait_until(lambda: "the store is busy or away" in worker.log_tail(100), 60, "the worker's warning")
        assert worker.running and line.dead_letters() == []
        ballast.clear()
        wait_until(lambda: "the store is back" in worker.log_tail(100), 60, "the worker's relief")
        line.wait_stored()
        result = account(line)
        assert (len(result.stored), len(result.dead)) == (350, 0)
        assert worker.running


class Shelf(Line):
    """A line whose store lies on the small disk."""

    def _start_store(self) -> None:
        self.store = LocalStore(self.folder / "disk" / "store", port=self._port)
        self.store.address()


def append(line: Line, first: int, count: int) -> None:
    name = topic(line.address.prefix, "metrics")
    with producer(line.address, linger_ms=20, compression_type="lz4") as sender:
        for number in range(first, first + count):
            values = [(number * 7919 + each) % 1_000 / 7 for each in range(50)]
            value = body(points(f"run{number % 3}", values, first_step=50 * number, first_seq=50 * number))
            sender.send(name, value=value, headers=[(SCHEMA_HEADER, METRICS)])


@contextlib.contextmanager
def local_cluster_at(folder: Path) -> Iterator[KafkaCluster]:
    """A broker below `folder`, a part of which may be another file system."""
    require_local_kafka()
    with KafkaCluster(folder) as cluster:
        yield cluster
