"""The whole line for the Kafka tests: store process, workers and clients as processes, and an independent reader."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form

from runstream_ingest.dead_letter import DeadLetter
from runstream_ingest.log.kafka_dead_letters import KafkaDeadLetters
from runstream_ingest.log.kafka_topics import TopicSettings, ensure_topics
from runstream_ingest.migration import migrate
from runstream_ingest.store import StoreAddress, connect
from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity
from runstream_schemas.names import SCHEMA_HEADER, consumer_group, topic
from tests.ingest.local_store import LocalStore
from tests.services import used
from tests.services.cache import free_ports
from tests.services.kafka import admin, read_all
from tests.services.process import ServerProcess, wait_until

CLIENT = """
import sys, time
import runstream
name, points, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
runstream.set_experiment("line")
with runstream.start_run(run_name=name) as run:
    print(run.info.run_id, flush=True)
    runstream.log_param("points", points)
    for step in range(points):
        runstream.log_metric("loss", step + 0.5, step=step)
        if step % 100 == 99:
            print(step + 1, flush=True)
            time.sleep(pause)
"""


class Line:
    """Kafka's topics, one store, workers and clients. Enter it, and everything ends with it."""

    def __init__(self, bootstrap: str, folder: Path, prefix: str = "line", metrics_partitions: int = 4) -> None:
        self.folder = folder
        self._partitions = metrics_partitions
        self.bootstrap = bootstrap
        self.address = KafkaAddress.parse(f"kafka://{bootstrap}/{prefix}")
        self._stack = ExitStack()
        [self._port] = free_ports(1)
        self.workers: list[ServerProcess] = []
        self.clients: list[ServerProcess] = []
        self.store: LocalStore

    def __enter__(self) -> Line:
        ensure_topics(
            self.address, KafkaSecurity(), TopicSettings(metrics_partitions=self._partitions, control_partitions=2)
        )
        self._start_store()
        self._stack.callback(lambda: self.store.kill())
        used.record("chdb", "local store process")
        migrated = connect(StoreAddress.parse(self._store_uri()))
        migrate(migrated)
        migrated.close()
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.workers, *self.clients]:
            process.stop(0.0)
        self._stack.close()

    # -- processes

    def start_worker(self, **environment: str) -> ServerProcess:
        """Another member of the group; `environment` holds for this life of it alone."""
        worker = ServerProcess(
            [sys.executable, "-m", "runstream_ingest", "kafka"],
            self.folder / f"worker{len(self.workers)}.log",
            self.worker_environment() | environment,
        )
        worker.start()
        self.workers.append(worker)
        return worker

    def mend_workers(self) -> None:
        """What a supervisor does: start again what has ended, with today's address of the store."""
        for number, worker in enumerate(self.workers):
            if not worker.running:
                again = ServerProcess(worker.command, worker.log, self.worker_environment())
                again.start()
                self.workers[number] = again

    def start_client(self, name: str, points: int, pause_seconds: float) -> ServerProcess:
        client = ServerProcess(
            [sys.executable, "-c", CLIENT, name, str(points), str(pause_seconds)],
            self.folder / f"client-{name}.log",
            self.environment(),
        )
        client.start()
        self.clients.append(client)
        return client

    def kill_store(self) -> None:
        """kill -9, and start again on the same port: its tokens are new, so workers stop and are mended."""
        self.store.kill()
        self._start_store()

    def bury_workers(self) -> None:
        """What the brokers do 10 s after workers were killed: their partitions are free. No worker may live."""
        from kafka.admin import MemberToRemove

        group = consumer_group(self.address.prefix, "runstream")
        with admin(self.address) as client:
            members = [member["member_id"] for member in client.describe_groups([group])[group]["members"]]
            client.remove_group_members(group, [MemberToRemove(member_id=member) for member in members])

    def deliver_journals(self) -> None:
        """`runstream sync`: what killed clients left behind."""
        done = subprocess.run(
            [sys.executable, "-m", "runstream", "sync"],
            env=self.environment(), capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    # -- what arrived

    def wait_stored(self, timeout_seconds: float = 150.0) -> None:
        """Until the store's positions have reached the log's ends."""
        from runstream.transport.kafka import open_kafka

        transport = open_kafka(str(self.address), {})
        try:
            ends = {place: end for place, end in transport.end_positions(30).items() if end}
        finally:
            transport.close(1)

        def reached() -> bool:
            self.mend_workers()
            rows = self.sql(
                "SELECT stream, partition, max(next_offset) FROM ingest_positions GROUP BY stream, partition"
            )
            stored = {(stream, int(partition)): int(offset) for stream, partition, offset in rows}
            return all(stored.get(place, 0) >= end for place, end in ends.items())

        wait_until(reached, timeout_seconds, f"the store at {ends}")

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Ask the store over HTTP with the writer's token (views and private tables)."""
        client = self.store.writer()
        try:
            return [tuple(row) for row in client.query(statement).result_rows]
        finally:
            client.close()
            self.store._clients.remove(client)

    def points_in_kafka(self) -> dict[tuple[str, str, int], float]:
        """Every point that the brokers hold, by (run, key, step), read with fastavro and the schema files alone."""
        found: dict[tuple[str, str, int], float] = {}
        schema, _ = metric_schema()
        for record in read_all(self.address, topic(self.address.prefix, "metrics")):
            assert dict(record.headers)[SCHEMA_HEADER]
            batch: Any = fastavro.schemaless_reader(io.BytesIO(record.value), schema, None)
            for key, call, value in zip(batch["ki"], batch["ci"], batch["values"], strict=True):
                point = (batch["run_id"], batch["keys"][key], batch["steps"][call])
                assert found.setdefault(point, value) == value, f"{point} has two values"
        return found

    def dead_letters(self) -> list[DeadLetter]:
        """Every letter that the workers set aside."""
        letters = KafkaDeadLetters(self.address)
        try:
            return list(letters.letters())
        finally:
            letters.close()

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RUNSTREAM_")}
        return clean | {
            "RUNSTREAM_TRACKING_URI": str(self.address),
            "RUNSTREAM_JOURNAL_DIR": str(self.folder / "journal"),
            "RUNSTREAM_ARTIFACT_ROOT": (self.folder / "artifacts").as_uri(),
            "RUNSTREAM_EXIT_TIMEOUT_SECONDS": "60",
            "PYTHONUNBUFFERED": "1",
        }

    def worker_environment(self) -> dict[str, str]:
        """What a worker, and a command that works on the store, needs."""
        return self.environment() | {"RUNSTREAM_STORE_URI": self._store_uri(), "RUNSTREAM_METRICS_PORT": "0"}

    def _store_uri(self) -> str:
        at = self.store.address()
        return f"clickhouse://writer:{at.writer_token}@{at.host}:{at.port}/runstream"

    def _start_store(self) -> None:
        self.store = LocalStore(self.folder / "store", port=self._port)
        self.store.address()


def run_ids(clients: list[ServerProcess]) -> Iterator[tuple[str, int]]:
    """Each client's run id and the number of points that it said to have logged."""
    for client in clients:
        lines = client.log.read_text().split()
        yield (lines[0] if lines else ""), (int(lines[-1]) if len(lines) > 1 else 0)


@cache
def metric_schema() -> tuple[Any, bytes]:
    """The schema of metric batches as fastavro reads it from the schema file, and its fingerprint as in Kafka."""
    text = (files("runstream_schemas") / "avro" / "metric_batch.v1.avsc").read_text()
    parsed = fastavro.parse_schema(json.loads(text))
    canonical = to_parsing_canonical_form(parsed)
    return parsed, bytes.fromhex(fingerprint(canonical, "CRC-64-AVRO"))[::-1]
