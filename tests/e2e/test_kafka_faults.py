"""Faults at exact moments, with real workers, brokers and store: afterwards every message is accounted for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runstream_ingest.log.kafka_topics import TopicSettings, ensure_topics
from runstream_schemas import codec
from runstream_schemas.kafka_address import KafkaSecurity
from runstream_schemas.names import SCHEMA_HEADER, topic
from tests.e2e.accounting import account
from tests.e2e.kafka_line import Line
from tests.services.events import METRICS, body, created, points, started
from tests.services.http_proxy import Gate, HttpProxy, proxy
from tests.services.kafka import admin, collect_refused_sockets, local_broker, local_cluster, producer
from tests.services.kafka_files import batches, damage
from tests.services.process import ServerProcess, wait_until

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
POISON_EVERY = 15


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """A store and topics of its own on a local broker; workers are the test's."""
    with Line(local_broker().bootstrap, tmp_path, f"fault{time.time_ns()}") as made:
        yield made


@pytest.fixture
def front(line: Line) -> Iterator[HttpProxy]:
    """A proxy before the store, for workers started with `through`."""
    with proxy(line.store.address().port) as made:
        yield made


def through(line: Line, front: HttpProxy) -> ServerProcess:
    """A worker that reaches the store by the proxy alone."""
    at = line.store.address()
    return line.start_worker(
        RUNSTREAM_STORE_URI=f"clickhouse://writer:{at.writer_token}@127.0.0.1:{front.port}/runstream"
    )


def append(line: Line, first: int, count: int, partitions: int = 4, compression: str = "lz4") -> None:
    """`count` bodies of a few points, every fifteenth of them cut short."""
    name = topic(line.address.prefix, "metrics")
    with producer(line.address, linger_ms=20, compression_type=compression) as sender:
        for number in range(first, first + count):
            value = body(points(f"run{number % 3}", [float(number)] * 3, first_step=3 * number, first_seq=3 * number))
            if number % POISON_EVERY == 4:
                value = value[:-2]
            sender.send(name, value=value, headers=[(SCHEMA_HEADER, METRICS)], partition=number % partitions)


def is_position(what: str) -> bool:
    return "INSERT INTO ingest_positions" in what


def is_points(what: str) -> bool:
    return "landing_metric_batch" in what


def reach(gate: Gate) -> None:
    assert gate.reached.wait(60), "no worker came to the gate"


def check(line: Line, total: int, dead: int | None = None) -> None:
    """Everything arrives, and is accounted for."""
    line.wait_stored()
    result = account(line)
    assert len(result.stored) + len(result.dead) == total
    expected = sum(number % POISON_EVERY == 4 for number in range(total)) if dead is None else dead
    assert len(result.dead) == expected


@pytest.mark.parametrize("moment", ["before positions", "behind positions", "before the letters"])
def test_a_worker_killed_between_insert_and_commit(line: Line, front: HttpProxy, moment: str) -> None:
    """Rows are in, the position is not (or is, and Kafka knows no commit): the next worker repeats, nothing doubles."""
    append(line, 0, 90)
    gate = {
        "before positions": lambda: front.hold(is_position),
        "behind positions": lambda: front.hold(is_position, after=True),
        "before the letters": lambda: front.hold(lambda what: "FROM rejects" in what, after=True),
    }[moment]()
    worker = through(line, front)
    reach(gate)
    assert line.sql("SELECT count() > 0 FROM points") == [(1,)]
    worker.kill()
    gate.release(answer=False)
    line.bury_workers()
    append(line, 90, 30)
    check(line, 120)


def test_the_store_killed_in_an_insert(line: Line, front: HttpProxy) -> None:
    """Its process dies while it works on a batch, and again when the batch is repeated: the worker waits it out."""
    append(line, 0, 100)
    for after in (False, True):
        gate = front.hold(is_points, after=after)
        worker = through(line, front)
        reach(gate)
        line.kill_store()
        gate.release(answer=False)
        worker.kill()  # its token is of the dead store; a server's would still hold
        line.workers.remove(worker)
        line.bury_workers()
        append(line, 200 if after else 100, 100)
    line.start_worker()
    check(line, 300)


def test_a_store_that_cuts_connections_is_tried_again_by_the_same_worker(line: Line, front: HttpProxy) -> None:
    """The rows are in, the answer never comes: the batch is repeated by the worker that lives on."""
    append(line, 0, 90)
    gate = front.hold(is_points, after=True)
    worker = through(line, front)
    reach(gate)
    gate.release(answer=False)
    wait_until(lambda: "the store is busy or away" in worker.log_tail(), 30, "the worker waiting")
    check(line, 90)
    assert worker.running


def test_a_rebalance_in_the_middle_of_an_insert(line: Line, front: HttpProxy) -> None:
    """While the first worker's insert hangs a second one takes half of its partitions, and both finish."""
    append(line, 0, 90)
    gate = front.hold(is_points, after=True)
    first = through(line, front)
    reach(gate)
    line.start_worker()
    # Positions can only come from the second worker, which reads what it was given from the beginning.
    wait_until(
        lambda: line.sql("SELECT count() > 0 FROM ingest_positions WHERE stream = 'metrics'") == [(1,)], 60, "it"
    )
    gate.release()
    append(line, 90, 30)
    check(line, 120)
    assert first.running and all(worker.running for worker in line.workers)


def test_a_zombie_finishes_its_insert_after_another_took_over(line: Line, front: HttpProxy) -> None:
    """Stopped beyond the session's time-out with a batch on its way; when it wakes up the batch lands a second time."""
    append(line, 0, 90)
    gate = front.hold(is_points)
    zombie = through(line, front)
    reach(gate)
    zombie.pause()
    line.start_worker()
    append(line, 90, 30)
    check(line, 120)
    before = line.sql("SELECT stream, partition, max(next_offset) FROM ingest_positions GROUP BY ALL ORDER BY ALL")
    zombie.unpause()
    gate.release()
    append(line, 120, 30)
    check(line, 150)
    wait_until(lambda: "\n" in zombie.log_tail() and zombie.running, 10, "the zombie alive")
    assert before <= line.sql(
        "SELECT stream, partition, max(next_offset) FROM ingest_positions GROUP BY ALL ORDER BY ALL"
    )


def test_partitions_added_while_workers_run(line: Line) -> None:
    """Messages on them are read from the first on."""
    line.start_worker()
    append(line, 0, 60)
    name = topic(line.address.prefix, "metrics")
    with admin(line.address) as client:
        client.create_partitions({name: 7})

    def seven() -> bool:
        with admin(line.address) as client:
            return len(client.describe_topics([name])[0]["partitions"]) == 7

    wait_until(seven, 30, "seven partitions")
    append(line, 60, 60, partitions=7)
    check(line, 120)


def test_a_corrupt_batch_in_the_brokers_file_survives_its_restart(tmp_path: Path) -> None:
    """Bits flip on disk while the broker is down: that batch is a letter for each offset, all others are stored."""
    with local_cluster() as cluster, Line(cluster.bootstrap, tmp_path, "corrupt", metrics_partitions=1) as line:
        name = topic(line.address.prefix, "metrics")
        for turn in range(4):
            append(line, 30 * turn, 30, partitions=1, compression="lz4" if turn % 2 else "gzip")
        assert cluster.brokers[0].stop(30) is not None  # in good order: else it cuts its log off before the damage
        lying = batches(cluster, name)
        assert sum(batch.records for batch in lying) == 120
        bad = lying[len(lying) // 2]
        damage(bad, from_end=bad.size // 3)
        cluster.start_broker(0)
        line.start_worker()
        append(line, 120, 10, partitions=1)
        line.wait_stored()
        lost = {(0, bad.base_offset + number): "does not decode" for number in range(bad.records)}
        result = account(line, unreadable=lost)
        assert len(result.stored) + len(result.dead) == 130


def test_offsets_that_retention_took_while_no_worker_ran(line: Line) -> None:
    """The committed offset lies before the log's start: the gap is one letter with its range, the rest goes on."""
    from kafka import TopicPartition

    name = topic(line.address.prefix, "metrics")
    worker = line.start_worker()
    append(line, 0, 20, partitions=1)
    line.wait_stored()
    stored = line.sql("SELECT count() FROM points FINAL")
    assert worker.stop(20) == 0
    line.workers.clear()
    append(line, 20, 40, partitions=1)
    with admin(line.address) as client:
        client.delete_records({TopicPartition(name, 0): 50})
    line.start_worker()
    append(line, 60, 10, partitions=1)
    line.wait_stored()
    [gap] = [letter for letter in line.dead_letters() if letter.reason.startswith("unreadable")]
    assert (gap.source.partition, gap.source.offset, gap.next_offset) == (0, 20, 50)
    assert "retention" in gap.reason and gap.body is None
    offsets = {offset for (offset,) in line.sql("SELECT DISTINCT log_offset FROM points FINAL")}
    dead = {letter.source.offset for letter in line.dead_letters()}
    assert not offsets & dead
    assert offsets | dead | set(range(20, 50)) == set(range(70))
    assert line.sql("SELECT count() FROM points FINAL WHERE log_offset < 20") == stored


def test_a_topic_deleted_under_a_worker_stops_it_with_a_reason(line: Line) -> None:
    """Exit code 1 and one line that says what happened; nothing of the store changes, and a restart says the same."""
    worker = line.start_worker()
    append(line, 0, 30)
    check(line, 30)
    name = topic(line.address.prefix, "metrics")
    with admin(line.address) as client:
        client.delete_topics([name])
    assert worker._process is not None
    assert worker._process.wait(60) == 1
    assert f"topic {name}" in worker.log_tail() and "was deleted" in worker.log_tail()
    assert "Traceback" not in worker.log_tail()
    assert line.sql("SELECT count() FROM points FINAL")[0][0] > 0


def test_dead_letters_are_listed_shown_and_replayed_by_the_command(line: Line) -> None:
    """Bodies of a schema that an old worker does not know: after the upgrade the command lands them, once."""
    old = (
        "import sys; from runstream_schemas import codec; known = codec.schemas(); "
        f"codec.schemas = lambda: {{k: v for k, v in known.items() if k != bytes.fromhex('{METRICS.hex()}')}}; "
        "from runstream_ingest.__main__ import main; sys.exit(main(['kafka']))"
    )
    worker = ServerProcess([sys.executable, "-c", old], line.folder / "old.log", line.worker_environment())
    worker.start()
    line.workers.append(worker)
    name = topic(line.address.prefix, "control")
    with producer(line.address) as sender:
        for event in (created(), started("run0"), started("run1"), started("run2")):
            headers = [(SCHEMA_HEADER, codec.current(event[0]).fingerprint)]
            sender.send(name, value=body(event), headers=headers, partition=0)
    append(line, 0, 45)
    wait_until(lambda: len(line.dead_letters()) == 45, 60, "45 dead letters")
    assert worker.stop(20) == 0
    line.workers.clear()

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runstream", "dead-letters", *arguments],
            env=line.worker_environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    listed = command("list")
    assert listed.returncode == 0 and listed.stdout.count("unknown schema fingerprint") == 45
    source = next(str(letter.source) for letter in line.dead_letters())
    assert source in command("show", source).stdout
    first = command("replay", source)
    assert first.returncode == 0 and "1 stored" in first.stdout, first.stdout + first.stderr
    rest = command("replay", "--reason", "unknown schema")
    assert rest.returncode == 1, "the three that are cut short are still refused"
    assert "41 stored, 3 still refused" in rest.stdout, rest.stdout + rest.stderr
    assert command("list").stdout.count("unknown schema fingerprint") == 3
    result = account(line, replayed=True)
    assert (len(result.stored), len(result.dead)) == (42, 3)
    assert line.sql("SELECT count() FROM metrics") == [(126,)]
    again = command("replay", "--all")
    assert "0 stored, 3 still refused" in again.stdout
    line.start_worker()  # which tries known schemas by itself
    append(line, 45, 5)
    line.wait_stored()
    assert len(account(line, replayed=True).dead) == 4


def test_a_topic_made_anew_is_not_taken_for_the_old_one(line: Line) -> None:
    """Longer than what the store holds of the old one, and made while no worker ran: the worker refuses it."""
    worker = line.start_worker()
    append(line, 0, 20)
    check(line, 20)
    assert worker.stop(20) == 0
    line.workers.clear()
    name = topic(line.address.prefix, "metrics")
    with admin(line.address) as client:
        client.delete_topics([name])
        wait_until(lambda: name not in client.list_topics(), 30, "the deletion")
    ensure_topics(line.address, KafkaSecurity(), TopicSettings(metrics_partitions=4, control_partitions=2))
    append(line, 100, 60)
    worker = line.start_worker()
    assert worker._process is not None
    assert worker._process.wait(60) == 1
    assert "made anew" in worker.log_tail() and "runstream rebuild" in worker.log_tail()
    assert line.sql("SELECT count() FROM points FINAL WHERE step >= 300") == [(0,)]
