"""A Kafka cluster of one or three nodes on loopback, run from the jars; brokers are killed and paused by their pid.

with KafkaCluster(Path("/tmp/kafka"), nodes=3) as cluster:
    cluster.bootstrap                      # "127.0.0.1:40001,127.0.0.1:40003,127.0.0.1:40005"
    cluster.brokers[0].kill()
    cluster.start_broker(0)
"""

from __future__ import annotations

import base64
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Literal

from .cache import free_ports
from .kafka_security import ServerSecurity, plaintext
from .maven import KAFKA
from .process import ServerProcess, ServiceError, wait_until

# Small and quick to start: the client compiler only, one collector thread. A benchmark asks for `server_vm`.
_SMALL_VM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
_LOG4J = """
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss.SSS} %p %c{1} %m%n
"""


class KafkaCluster:
    """Combined broker and controller nodes below one folder. Nothing runs before `start` (or `with`).

    Args:
        directory: logs and settings; a second `start` on it brings the same cluster back.
        nodes: 1, or 3 with replication 3 and min.insync 2 for internal topics.
        security: what clients must present (`kafka_security`).
        settings: further broker settings, by their Kafka names.
        vm: "small" starts fast; "server" is for figures.
    """

    def __init__(
        self,
        directory: Path,
        nodes: int = 1,
        security: ServerSecurity | None = None,
        settings: dict[str, str] | None = None,
        vm: Literal["small", "server"] = "small",
    ) -> None:
        self.directory = directory
        self.security = security or plaintext()
        self._settings = settings or {}
        self._jars = str(KAFKA.jars() / "*")
        self._vm = _SMALL_VM if vm == "small" else ()
        ports = free_ports(2 * nodes)
        self._client_ports, self._controller_ports = ports[:nodes], ports[nodes:]
        directory.mkdir(parents=True, exist_ok=True)
        self._log4j = directory / "log4j2.properties"
        self._log4j.write_text(_LOG4J)
        self.brokers = [self._node(number) for number in range(nodes)]

    @property
    def version(self) -> str:
        return KAFKA.version

    @property
    def bootstrap(self) -> str:
        """`host:port,host:port` of every broker."""
        return ",".join(f"127.0.0.1:{port}" for port in self._client_ports)

    @property
    def replication(self) -> int:
        """Replication factor for topics: as many as there are nodes."""
        return len(self.brokers)

    def start(self, timeout_seconds: float = 90.0) -> None:
        """Format what is new, start every node, and wait until all brokers are in the cluster and unfenced."""
        self._format()
        for broker in self.brokers:
            broker.start()
        for number in range(len(self.brokers)):
            self._wait_listening(number, timeout_seconds)
        wait_until(lambda: self._unfenced() == len(self.brokers), timeout_seconds, "all brokers in the cluster")

    def start_broker(self, number: int, timeout_seconds: float = 90.0) -> None:
        """Start a node again and wait until it takes connections (its replicas may still be catching up)."""
        self.brokers[number].start()
        self._wait_listening(number, timeout_seconds)

    def stop(self) -> None:
        """Stop every node: SIGTERM where that ends it soon, else kill -9."""
        for broker in self.brokers:
            broker.stop(timeout_seconds=0.1 if len(self.brokers) == 1 else 0.0)

    def __enter__(self) -> KafkaCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def data_directory(self, number: int) -> Path:
        """The node's `log.dirs`: a folder per topic partition."""
        return self.directory / f"node{number}" / "data"

    def _java(self, heap: str, main: str, *arguments: str) -> list[str]:
        options = [*self._vm, *self.security.java_options, f"-Dlog4j2.configurationFile={self._log4j}"]
        return ["java", "-Xms64m", f"-Xmx{heap}", *options, "-cp", self._jars, main, *arguments]

    def _node(self, number: int) -> ServerProcess:
        folder = self.directory / f"node{number}"
        self.data_directory(number).mkdir(parents=True, exist_ok=True)
        settings = folder / "server.properties"
        settings.write_text("".join(f"{name}={value}\n" for name, value in self._properties(number).items()))
        return ServerProcess(self._java("512m", "kafka.Kafka", str(settings)), folder / "broker.log")

    def _properties(self, number: int) -> dict[str, str]:
        client, controller = self._client_ports[number], self._controller_ports[number]
        voters = [f"{at + 1}@127.0.0.1:{port}" for at, port in enumerate(self._controller_ports)]
        replicas = len(self._client_ports)
        internal = self.security.inter_broker_port is not None
        listeners = [f"CLIENT://127.0.0.1:{client}", f"CONTROLLER://127.0.0.1:{controller}"]
        advertised = [f"CLIENT://127.0.0.1:{client}"]
        protocols = [f"CLIENT:{self.security.protocol}", "CONTROLLER:PLAINTEXT"]
        if internal:
            listeners.append(f"INTERNAL://127.0.0.1:{self.security.inter_broker_port}")
            advertised.append(f"INTERNAL://127.0.0.1:{self.security.inter_broker_port}")
            protocols.append("INTERNAL:PLAINTEXT")
        return {
            "process.roles": "broker,controller",
            "node.id": str(number + 1),
            "controller.quorum.voters": ",".join(voters),
            "listeners": ",".join(listeners),
            "advertised.listeners": ",".join(advertised),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "INTERNAL" if internal else "CLIENT",
            "listener.security.protocol.map": ",".join(protocols),
            "log.dirs": str(self.data_directory(number)),
            "num.network.threads": "2",
            "num.io.threads": "4",
            "num.partitions": "1",
            "offsets.topic.num.partitions": "4",
            "offsets.topic.replication.factor": str(replicas),
            "transaction.state.log.replication.factor": str(replicas),
            "transaction.state.log.num.partitions": "2",
            "transaction.state.log.min.isr": str(min(2, replicas)),
            "min.insync.replicas": str(min(2, replicas)),
            "group.initial.rebalance.delay.ms": "0",
            "auto.create.topics.enable": "false",
            # Preallocated 10 MB index files a partition cost more than the rest of a test's broker.
            "log.index.size.max.bytes": "1048576",
            "log.retention.check.interval.ms": "1000",
            "log.cleaner.enable": "false",
            "log.initial.task.delay.ms": "500",
            **self.security.settings,
            **self._settings,
        }

    def _format(self) -> None:
        identity = self.directory / "cluster-id"
        if not identity.exists():
            identity.write_text(base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode())
        running = []
        for number in range(len(self.brokers)):
            if (self.data_directory(number) / "meta.properties").exists():
                continue
            settings = self.directory / f"node{number}" / "server.properties"
            # One argument: an id may start with "-", which the tool would take for an option of its own.
            cluster = f"--cluster-id={identity.read_text()}"
            arguments = ["format", cluster, "-c", str(settings), *self.security.format_arguments]
            command = self._java("128m", "kafka.tools.StorageTool", *arguments)
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for process in running:
            output, _ = process.communicate(timeout=90)
            if process.returncode != 0:
                raise ServiceError(f"formatting Kafka's folder failed:\n{output[-2000:]}")

    def _wait_listening(self, number: int, timeout_seconds: float) -> None:
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        def answers() -> bool:
            # First a bare connection: kafka-python leaves the sockets of refused ones open.
            try:
                socket.create_connection(("127.0.0.1", self._client_ports[number]), 1.0).close()
            except OSError:
                return False
            try:
                admin = KafkaAdminClient(
                    bootstrap_servers=f"127.0.0.1:{self._client_ports[number]}",
                    bootstrap_timeout_ms=2_000,
                    **self.security.client_options(),
                )
            except KafkaError:
                return False
            admin.close()
            return True

        self.brokers[number].wait_ready(answers, timeout_seconds)

    def _unfenced(self) -> int:
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        try:
            admin = KafkaAdminClient(
                bootstrap_servers=self.bootstrap.split(","),
                bootstrap_timeout_ms=2_000,
                **self.security.client_options(),
            )
            try:
                described = admin.describe_cluster()
            finally:
                admin.close()
        except KafkaError:
            return 0
        # An early answer lists brokers that are still fenced and take no partitions.
        return sum(not broker.get("is_fenced", False) for broker in described["brokers"])
