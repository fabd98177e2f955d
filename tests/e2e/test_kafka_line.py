"""The whole line on real brokers: clients, Kafka, workers, the store, SQL; and what happens when they die."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runstream_schemas.names import topic
from tests.e2e.kafka_line import Line, run_ids
from tests.services.kafka import admin, collect_refused_sockets, local_cluster, shared_broker
from tests.services.kafka_cluster import KafkaCluster
from tests.services.process import wait_until

__all__ = ["collect_refused_sockets"]

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.usefixtures("collect_refused_sockets"),
    pytest.mark.chdb,
    pytest.mark.timeout(240),
    # kafka-python leaves sockets of refused connections to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

POINTS = 8_000


def _check(line: Line, complete: set[str]) -> None:
    """SQL, what the clients said, and what the brokers hold agree, point by point."""
    held = line.points_in_kafka()
    stored = {
        (run, key, int(step)): value
        for run, key, step, value in line.sql("SELECT run_id, key, step, value FROM metrics")
    }
    assert line.sql("SELECT count() FROM metrics") == [(len(stored),)], "no point twice"
    assert stored == held
    for run_id, said in run_ids(line.clients):
        steps = sorted(step for run, _, step in stored if run == run_id)
        assert steps == list(range(len(steps))), run_id
        assert all(stored[run_id, "loss", step] == step + 0.5 for step in steps)
        assert len(steps) >= said, f"{run_id} said {said}"
        if run_id in complete:
            assert len(steps) == POINTS
    assert line.sql("SELECT count() FROM rejects") == [(0,)]


def test_client_to_sql_on_one_broker(tmp_path: Path) -> None:
    """Two clients, one worker: every point, the params and the states, and the worker drains at SIGTERM."""
    with Line(shared_broker().bootstrap, tmp_path, f"line{time.time_ns()}") as line:
        worker = line.start_worker()
        clients = [line.start_client(f"c{number}", POINTS, 0.0) for number in range(2)]
        for client in clients:
            assert client._process is not None
            assert client._process.wait(60) == 0, client.log_tail()
        line.wait_stored()
        _check(line, {run for run, _ in run_ids(clients)})
        assert sorted(line.sql("SELECT name, status FROM runs")) == [("c0", "FINISHED"), ("c1", "FINISHED")]
        assert line.sql("SELECT DISTINCT key, value FROM params") == [("points", str(POINTS))]
        assert worker.stop(20) == 0, worker.log_tail()


def test_nothing_is_lost_or_doubled_while_everything_is_killed(tmp_path: Path) -> None:
    """Workers, brokers, the store and a client are killed and paused at random: each point is in SQL once."""
    chance = random.Random(20_261_121)
    with local_cluster(3) as cluster, Line(cluster.bootstrap, tmp_path) as line:
        for _ in range(2):
            line.start_worker()
        clients = [line.start_client(f"c{number}", POINTS, 0.4) for number in range(6)]
        faults = _Faults(line, cluster, chance)
        for _ in range(6):
            faults.one()
            time.sleep(chance.uniform(0.2, 1.0))
        clients[0].kill()
        faults.mend()
        for client in clients[1:]:
            assert client._process is not None
            assert client._process.wait(90) == 0, client.log_tail()
        line.deliver_journals()
        line.wait_stored()
        _check(line, {run for run, _ in list(run_ids(clients))[1:]})


def test_leaders_move_while_clients_log_and_a_worker_reads(tmp_path: Path) -> None:
    """Every partition gets another leader, three times over; nobody ends, and each point is in SQL once."""
    with local_cluster(3) as cluster, Line(cluster.bootstrap, tmp_path) as line:
        worker = line.start_worker()
        clients = [line.start_client(f"c{number}", POINTS, 0.5) for number in range(3)]
        moved = 0
        for _ in range(3):
            seen = _points_said(line)
            wait_until(lambda seen=seen: _points_said(line) > seen, 60, "clients that log on")
            moved += _move_leaders(line)
        assert moved == 3 * 6, "four partitions of metrics and two of control, each time"
        assert all(client.running for client in clients), "they were to log all the while"
        for client in clients:
            assert client._process is not None
            assert client._process.wait(90) == 0, client.log_tail()
        line.wait_stored()
        _check(line, {run for run, _ in run_ids(clients)})
        assert worker.running
        assert worker.stop(20) == 0, worker.log_tail()


def _points_said(line: Line) -> int:
    return sum(points for _, points in run_ids(line.clients))


def _move_leaders(line: Line) -> int:
    """Make another replica the leader of every partition; how many have one that they had not before."""
    from kafka import TopicPartition

    topics = [topic(line.address.prefix, stream) for stream in ("metrics", "control")]
    with admin(line.address) as client:

        def replicas() -> dict[TopicPartition, tuple[int, list[int]]]:
            return {
                TopicPartition(found["name"], part["partition_index"]): (part["leader_id"], list(part["replica_nodes"]))
                for found in client.describe_topics(topics)
                for part in found["partitions"]
            }

        before = replicas()
        turned = {
            place: [*(node for node in nodes if node != leader), leader] for place, (leader, nodes) in before.items()
        }
        assert set(client.alter_partition_reassignments(turned).values()) == {None}
        wait_until(lambda: not client.list_partition_reassignments(), 30, "replicas in another order")
        client.elect_leaders(0, {name: [place.partition for place in turned if place.topic == name] for name in topics})
        wait_until(
            lambda: all(leader == turned[place][0] for place, (leader, _) in replicas().items()), 30, "other leaders"
        )
        return sum(leader != before[place][0] for place, (leader, _) in replicas().items())


class _Faults:
    """One fault at a time that a quorum survives; bounded in time."""

    def __init__(self, line: Line, cluster: KafkaCluster, chance: random.Random) -> None:
        self.line = line
        self.cluster = cluster
        self.chance = chance
        self.done: list[str] = []
        kinds: list[Callable[[], None]] = [
            self.kill_worker,
            self.pause_worker,
            self.kill_broker,
            self.pause_broker,
            self.kill_store,
        ]
        # Each kind once in random order, then any.
        self._next = chance.sample(kinds, len(kinds))
        self._kinds = kinds

    def one(self) -> None:
        fault = self._next.pop() if self._next else self.chance.choice(self._kinds)
        fault()
        self.done.append(fault.__name__)
        self.line.mend_workers()

    def kill_worker(self) -> None:
        self.chance.choice(self.line.workers).kill()

    def pause_worker(self) -> None:
        """Longer than the group's session time-out: it comes back as a zombie."""
        worker = self.chance.choice(self.line.workers)
        worker.pause()
        time.sleep(11)
        worker.unpause()

    def kill_broker(self) -> None:
        number = self.chance.randrange(3)
        self.cluster.brokers[number].kill()
        time.sleep(1)
        self.cluster.start_broker(number)

    def pause_broker(self) -> None:
        broker = self.chance.choice(self.cluster.brokers)
        broker.pause()
        time.sleep(4)
        broker.unpause()

    def kill_store(self) -> None:
        self.line.kill_store()

    def mend(self) -> None:
        self.line.mend_workers()
