"""`runstream rebuild` from a real broker, as a person runs it: dry, swap, what retention took, and the gap refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runstream_schemas import codec
from runstream_schemas.names import SCHEMA_HEADER, Stream, topic
from tests.e2e.kafka_line import Line
from tests.services.events import METRICS, points
from tests.services.kafka import admin, collect_refused_sockets, producer, read_all, shared_broker

__all__ = ["collect_refused_sockets"]

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.usefixtures("collect_refused_sockets"),
    pytest.mark.chdb,
    pytest.mark.timeout(300),
    # kafka-python leaves sockets of refused connections to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

CLIENT = """
import sys
import runstream
first = int(sys.argv[1])
runstream.set_experiment("rebuild")
for number in range(first, first + 3):
    with runstream.start_run(run_name=f"r{number}") as run:
        print(run.info.run_id, flush=True)
        runstream.log_params({"lr": 0.1, "number": number})
        runstream.set_tags({"kind": "odd" if number % 2 else "even"})
        for step in range(300):
            runstream.log_metrics({"loss": step + number / 8, "empty": float("nan")}, step=step)
"""
BROKEN = "import runstream\nwith runstream.start_run(run_name='broken'):\n    raise KeyError('on purpose')\n"


class Shop(Line):
    """A line, and the command and clients that end before they are left."""

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.worker_environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def on_a_cluster(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command where the settings say that the tables are replicated."""
        return subprocess.run(
            [sys.executable, "-m", "runstream", *arguments],
            env=self.worker_environment() | {"RUNSTREAM_STORE_CLUSTER": "main"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def command(self, *arguments: str) -> Any:
        """The JSON answer of the command, which must succeed."""
        done = self.python("-m", "runstream", *arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def log_runs(self, first: int) -> list[str]:
        """Three runs through the real client; their ids."""
        done = self.python("-c", CLIENT, str(first))
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def views(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that every public view says, sorted, as text."""
        columns: dict[str, list[str]] = {}
        for view, name in self.sql(
            "SELECT table, name FROM system.columns WHERE database = 'runstream' AND name != 'lost' AND table IN "
            "(SELECT name FROM system.tables WHERE database = 'runstream' AND engine = 'View') ORDER BY table, position"
        ):
            columns.setdefault(view, []).append(f"toString({name})")
        assert {"experiments", "runs", "params", "tags", "metrics", "latest_metrics"} <= columns.keys()
        return {
            view: self.sql(f"SELECT {', '.join(names)} FROM {view} ORDER BY ALL") for view, names in columns.items()
        }

    def databases(self) -> set[str]:
        return {name for (name,) in self.sql("SELECT name FROM system.databases WHERE name LIKE 'runstream%'")}

    def tables(self) -> dict[str, int]:
        """Rows of every table of the database in use."""
        return dict(
            self.sql(
                "SELECT name, assumeNotNull(total_rows) FROM system.tables "
                "WHERE database = 'runstream' AND engine LIKE '%MergeTree' ORDER BY name"
            )
        )

    def stop_workers(self) -> None:
        for worker in self.workers:
            assert worker.stop(20) == 0, worker.log_tail()
        self.workers.clear()

    def ends(self, of: Stream) -> dict[int, int]:
        """Where each partition of a stream ends."""
        from runstream.transport.kafka import open_kafka

        transport = open_kafka(str(self.address), {})
        try:
            ends = transport.end_positions(30)
        finally:
            transport.close(1)
        return {partition: end for (stream, partition), end in ends.items() if stream == of and end}

    def records(self, of: Stream) -> list[Any]:
        """What the broker still has of a stream."""
        return read_all(self.address, topic(self.address.prefix, of))

    def delete_before(self, of: Stream, offsets: dict[int, int]) -> None:
        """What retention does, at once."""
        from kafka import TopicPartition

        name = topic(self.address.prefix, of)
        with admin(self.address) as client:
            client.delete_records({TopicPartition(name, partition): at for partition, at in offsets.items()})


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A line of its own on the session's broker, with one worker."""
    line = Shop(shared_broker().bootstrap, tmp_path, f"rebuild{time.time_ns()}")
    with line:
        line.start_worker()
        yield line


def test_a_rebuild_from_kafka_gives_the_same_answers(shop: Shop) -> None:
    """Dry it changes nothing; with --yes every view answers as before, and a purged run's late points stay hidden."""
    gone, kept, deleted = shop.log_runs(0)
    assert shop.python("-c", BROKEN).returncode == 1
    shop.command("runs", "delete", gone)
    shop.command("runs", "delete", deleted)
    shop.wait_stored()
    shop.command("runs", "restore", deleted)
    shop.wait_stored()
    assert shop.command("gc", "--yes")["runs"] == [gone]
    shop.command("runs", "delete", deleted)
    shop.wait_stored()
    before = shop.views()
    stages = shop.sql("SELECT run_id, status, lifecycle_stage FROM runs WHERE name != 'broken' ORDER BY name")
    assert stages == [(kept, "FINISHED", "active"), (deleted, "FINISHED", "deleted")]
    assert shop.sql("SELECT status FROM runs WHERE name = 'broken'") == [("FAILED",)]
    assert len(before["metrics"]) == 2 * 600

    dry = shop.command("rebuild")
    assert (dry["swapped"], dry["differences"]) == (False, [])
    assert shop.databases() == {"runstream"}
    assert shop.views() == before

    # The worker still runs: the swap stops it, and its supervisor (`wait_stored`) starts it again.
    done = shop.command("rebuild", "--yes")
    assert (done["swapped"], done["differences"], done["dead_letters"]) == (True, [], 0)
    assert shop.views() == before
    assert shop.databases() == {"runstream", "runstream_rebuild"}, "the old tables stay until told"

    late = codec.encode(*points(gone, [1.0, 2.0], first_step=9_000, first_seq=9_000))
    with producer(shop.address) as made:
        made.send(topic(shop.address.prefix, "metrics"), late, headers=[(SCHEMA_HEADER, METRICS)])
    [new, *_] = shop.log_runs(10)
    shop.wait_stored()
    assert shop.sql(f"SELECT count() FROM points WHERE run_id = '{gone}' AND step >= 9000") == [(2,)]
    for view in ("runs", "params", "tags", "metrics", "latest_metrics"):
        assert shop.sql(f"SELECT count() FROM {view} WHERE run_id = '{gone}'") == [(0,)], view
    assert shop.sql(f"SELECT count() FROM metrics WHERE run_id = '{new}'") == [(600,)]

    after = shop.views()
    assert shop.command("rebuild")["differences"] == []
    assert shop.databases() == {"runstream", "runstream_rebuild"}, "a comparison leaves them alone too"
    refused = shop.python("-m", "runstream", "rebuild", "--yes")
    assert refused.returncode != 0 and "drop it first" in refused.stderr
    shop.command("rebuild", "--drop-old")
    assert shop.databases() == {"runstream"}
    assert shop.views() == after


@pytest.mark.parametrize("stream", ["metrics", "control"])
def test_what_retention_took_is_copied_and_a_gap_is_refused(shop: Shop, stream: Stream) -> None:
    """What only the old database has stays; what neither has stops the rebuild, which changes nothing."""
    shop.log_runs(0)
    shop.wait_stored()
    first = shop.ends(stream)
    shop.log_runs(3)
    shop.wait_stored()
    before = shop.views()
    assert len(before["metrics"]) == 6 * 600
    shop.delete_before(stream, first)
    left = {(record.partition, record.offset) for record in shop.records(stream)}
    assert left, "the log has the rest"
    assert all(offset >= first.get(partition, 0) for partition, offset in left), "and lacks the beginning"

    done = shop.command("rebuild", "--yes")
    assert (done["swapped"], done["differences"]) == (True, [])
    if stream == "metrics":
        assert "log_offset < " in done["copied"]["points"] and "param_facts" not in done["copied"]
    else:
        assert done["copied"]["run_facts"] == done["copied"]["param_facts"] == "all"
        assert "points" not in done["copied"], "the metrics have their beginning still"
    assert shop.views() == before
    shop.command("rebuild", "--drop-old")
    assert shop.views() == before
    shop.wait_stored()
    shop.stop_workers()

    shop.log_runs(6)
    shop.delete_before(stream, shop.ends(stream))
    tables = shop.tables()
    for arguments in (["rebuild"], ["rebuild", "--yes"]):
        refused = shop.python("-m", "runstream", *arguments)
        assert refused.returncode != 0
        assert f"a gap: {stream}/" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    assert shop.tables() == tables
    assert shop.views() == before


def test_a_swap_on_a_cluster_is_refused(shop: Shop) -> None:
    """It would put tables without replicas in their place; the message says what to do, and nothing was begun."""
    shop.log_runs(0)
    shop.wait_stored()
    before, tables = shop.views(), shop.tables()
    refused = shop.on_a_cluster("rebuild", "--yes")
    assert refused.returncode == 2
    assert "RUNSTREAM_STORE_CLUSTER is set" in refused.stderr and "RUNSTREAM_STORE_URI" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert shop.databases() == {"runstream"}
    assert (shop.views(), shop.tables()) == (before, tables)
    compared = shop.on_a_cluster("rebuild", "--json")
    assert compared.returncode == 0, compared.stderr
    assert json.loads(compared.stdout)["differences"] == []
