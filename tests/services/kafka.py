"""The Kafka broker of a test session, and topics and clients on it.

`python -m tests.services.kafka [--nodes 3] [DIRECTORY]` runs a broker in the foreground until Ctrl-C.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import subprocess
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runstream_ingest.log.kafka_topics import TopicSettings, ensure_topics
from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity

from . import used
from .cache import free_ports
from .kafka_cluster import KafkaCluster
from .maven import KAFKA
from .process import ServiceError, wait_until

ONE_PARTITION = TopicSettings(metrics_partitions=1, control_partitions=1)


@dataclass(frozen=True)
class Broker:
    """Somewhere to log to."""

    bootstrap: str
    cluster: KafkaCluster | None
    """The processes, where they are ours: only then may they be killed and their files touched."""

    def prefix(self, settings: TopicSettings = ONE_PARTITION) -> KafkaAddress:
        """New topics under a prefix of their own."""
        address = KafkaAddress.parse(f"kafka://{self.bootstrap}/test{uuid.uuid4().hex[:10]}")
        ensure_topics(address, KafkaSecurity(), settings)
        return address


@pytest.fixture
def collect_refused_sockets(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """kafka-python leaves the sockets of refused connections to the collector: collect them where they were made."""
    yield
    caplog.clear()  # its records hold connections
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def require_local_kafka() -> None:
    """Skip the test where no broker of ours can run."""
    missing = KAFKA.missing()
    if missing is not None:
        pytest.skip(f"no local Kafka: {missing}")


@cache
def shared_broker() -> Broker:
    """One broker for the whole session: RUNSTREAM_TEST_KAFKA, Docker, or a local process; skips where there is none.

    Do not kill it; `local_cluster` gives one that may be.
    """
    given = os.environ.get("RUNSTREAM_TEST_KAFKA")
    if given:
        used.record("kafka", f"broker at {given}")
        return Broker(given, None)
    if _docker_answers():
        bootstrap = _docker_kafka()
        used.record("kafka", "apache/kafka in Docker")
        return Broker(bootstrap, None)
    require_local_kafka()
    folder = Path(tempfile.mkdtemp(prefix="runstream-kafka-"))
    cluster = KafkaCluster(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(cluster.stop)
    cluster.start()
    used.record("kafka", f"Apache Kafka {cluster.version} local")
    return Broker(cluster.bootstrap, cluster)


@cache
def local_broker() -> Broker:
    """As `shared_broker`, but a local process in any case: its files may be touched."""
    shared = shared_broker()
    if shared.cluster is not None:
        return shared
    require_local_kafka()
    folder = Path(tempfile.mkdtemp(prefix="runstream-kafka-"))
    cluster = KafkaCluster(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(cluster.stop)
    cluster.start()
    used.record("kafka", f"Apache Kafka {cluster.version} local")
    return Broker(cluster.bootstrap, cluster)


@contextmanager
def local_cluster(nodes: int = 1, **options: Any) -> Iterator[KafkaCluster]:
    """Brokers for one test, to be killed and paused."""
    require_local_kafka()
    with (
        tempfile.TemporaryDirectory(prefix="runstream-kafka-") as folder,
        KafkaCluster(Path(folder), nodes, **options) as cluster,
    ):
        used.record("kafka", f"Apache Kafka {cluster.version} local" + (f" ({nodes} nodes)" if nodes > 1 else ""))
        yield cluster


def read_all(address: KafkaAddress, topic: str, without: Collection[tuple[int, int]] = ()) -> list[Any]:
    """Every record of `topic`, by a bare consumer: offset order per partition.

    Args:
        without: (partition, offset) of records that cannot be read.
    """
    from kafka import KafkaConsumer, TopicPartition

    consumer = KafkaConsumer(
        bootstrap_servers=list(address.brokers),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        metrics_enabled=False,
    )
    try:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        begins = consumer.beginning_offsets(partitions)
        found: list[Any] = []
        deadline = time.monotonic() + 60
        # From gap to gap: a consumer raises only where it comes to what it cannot read.
        for place in partitions:
            gaps = sorted(offset for partition, offset in without if partition == place.partition)
            consumer.assign([place])
            at = begins[place]
            for gap in [*gaps, ends[place]]:
                if at < gap:
                    consumer.seek(place, at)
                while at < gap:
                    for records in consumer.poll(timeout_ms=500, max_records=10_000).values():
                        found += [record for record in records if at <= record.offset < gap]
                    at = consumer.position(place)
                    if time.monotonic() > deadline:
                        raise ServiceError(f"{topic} could not be read to its end")
                at = gap + 1
        return found
    finally:
        consumer.close()


@contextmanager
def producer(address: KafkaAddress, **options: Any) -> Iterator[Any]:
    """A bare producer, for another program's messages."""
    from kafka import KafkaProducer

    made = KafkaProducer(bootstrap_servers=list(address.brokers), metrics_enabled=False, **options)
    try:
        yield made
        made.flush(30)
    finally:
        made.close(5)


@contextmanager
def admin(address: KafkaAddress) -> Iterator[Any]:
    """A bare admin client."""
    from kafka import KafkaAdminClient

    made = KafkaAdminClient(bootstrap_servers=list(address.brokers))
    try:
        yield made
    finally:
        made.close()


def flip_last_byte(cluster: KafkaCluster, topic: str, partition: int = 0) -> None:
    """Damage the last batch in the broker's own file, as a failing disk would; fetches send it as it lies there."""
    segments = sorted((cluster.data_directory(0) / f"{topic}-{partition}").glob("*.log"))
    with segments[-1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 0x55]))


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _docker_kafka() -> str:
    """A broker in a container, with its port fixed before the start: the broker must advertise it."""
    from testcontainers.core.container import DockerContainer

    [port] = free_ports(1)
    container = DockerContainer("apache/kafka:4.1.0").with_bind_ports(9092, port)
    settings = {
        "NODE_ID": "1",
        "PROCESS_ROLES": "broker,controller",
        "CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "AUTO_CREATE_TOPICS_ENABLE": "false",
    }
    for name, value in settings.items():
        container.with_env(f"KAFKA_{name}", value)
    container.start()
    atexit.register(container.stop)
    bootstrap = f"127.0.0.1:{port}"
    wait_until(_answers(bootstrap), 120, "Kafka in Docker")
    return bootstrap


def _answers(bootstrap: str) -> Callable[[], bool]:
    def answers() -> bool:
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        try:
            KafkaAdminClient(bootstrap_servers=bootstrap, bootstrap_timeout_ms=2_000).close()
        except KafkaError:
            return False
        return True

    return answers


def main() -> None:
    """Run a broker until interrupted."""
    import argparse
    import signal

    parser = argparse.ArgumentParser(description="Run Apache Kafka on loopback until Ctrl-C.")
    parser.add_argument("directory", nargs="?", help="keeps its data; default: a temporary folder")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 3))
    given = parser.parse_args()
    missing = KAFKA.missing()
    if missing is not None:
        parser.exit(1, f"no local Kafka: {missing}\n")
    signal.signal(signal.SIGTERM, lambda *_: parser.exit(0))
    with (
        tempfile.TemporaryDirectory(prefix="runstream-kafka-") as folder,
        KafkaCluster(Path(given.directory or folder), given.nodes) as cluster,
    ):
        print(f"Apache Kafka {cluster.version}: kafka://{cluster.bootstrap}/PREFIX", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
