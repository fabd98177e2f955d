"""The Kafka event log under what brokers and groups do: damage, retention, rebalances, zombies, topics made anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from runstream_ingest.dead_letter import DeadLetter, Source
from runstream_ingest.log import LogError, LogRecord, Unreadable
from runstream_ingest.log.kafka import KafkaLog
from runstream_ingest.log.kafka_dead_letters import KafkaDeadLetters
from runstream_ingest.log.kafka_topics import TopicsError, TopicSettings, ensure_topics
from runstream_ingest.log.kafka_trouble import bounds, is_transient
from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity
from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import SCHEMA_HEADER, consumer_group, topic
from tests.services.events import until
from tests.services.kafka import (
    admin,
    collect_refused_sockets,
    flip_last_byte,
    local_broker,
    local_cluster,
    producer,
    shared_broker,
)

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.usefixtures("collect_refused_sockets"),
    # kafka-python leaves sockets of refused connections to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
MARK = bytes(8)
__all__ = ["collect_refused_sockets"]


class Member:
    """One reader that starts whatever it is given at the positions of a store that is only a dict."""

    def __init__(self, address: KafkaAddress, stored: dict[tuple[str, int], int]) -> None:
        self.log = KafkaLog(address, consumer_group(address.prefix, "tests"))
        self.stored = stored
        self.items: list[LogRecord | Unreadable] = []
        self.owned: set[tuple[str, int]] = set()

    def round(self, timeout_seconds: float = 0.1) -> None:
        """What the worker does: poll, drop what is lost, start what is new, store and commit the rest."""
        items = list(self.log.poll(timeout_seconds))
        lost = self.log.lost()
        self.owned -= lost
        items = [item for item in items if (item.stream, item.partition) not in lost]
        waiting = self.log.assigned()
        if waiting:
            self.log.start(dict(self.stored))  # type: ignore[arg-type]
            self.owned |= waiting - self.log.assigned()
        self.items += items
        done = {(item.stream, item.partition): item.next_offset for item in items}
        for place, offset in done.items():
            self.stored[place] = max(offset, self.stored.get(place, 0))
        self.log.commit(done)

    def read(self, count: int, seconds: float = 40.0) -> list[LogRecord | Unreadable]:
        until(lambda: (self.round(), len(self.items) >= count)[1], seconds, f"{count} items")
        return self.items


Join = Callable[..., Member]


@pytest.fixture
def join() -> Iterator[Join]:
    """Makes members; all leave in the end."""
    made: list[Member] = []

    def one(address: KafkaAddress, stored: dict[tuple[str, int], int] | None = None) -> Member:
        made.append(Member(address, {} if stored is None else stored))
        return made[-1]

    yield one
    for member in made:
        member.log.close()


def append(address: KafkaAddress, first: int, count: int, **options: object) -> None:
    """`count` numbered records in one batch (or few)."""
    with producer(address, linger_ms=50, **options) as sender:
        for number in range(first, first + count):
            sender.send(
                topic(address.prefix, "metrics"), value=b"%d" % number, headers=[(SCHEMA_HEADER, MARK)], partition=0
            )


def bodies(items: list[LogRecord | Unreadable]) -> list[int]:
    return [int(item.body or b"-1") for item in items if isinstance(item, LogRecord)]


def test_a_corrupt_batch_costs_its_own_records_alone(join: Join) -> None:
    """Each of its offsets is reported, what lies around it is read, and nothing spins."""
    broker = local_broker()
    assert broker.cluster is not None
    address = broker.prefix()
    append(address, 0, 5)
    append(address, 5, 10)
    flip_last_byte(broker.cluster, topic(address.prefix, "metrics"))
    append(address, 15, 5)
    items = join(address).read(20)
    assert bodies(items) == [*range(5), *range(15, 20)]
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    assert [(item.offset, item.next_offset) for item in unreadable] == [(n, n + 1) for n in range(5, 15)]
    assert all("CorruptRecordError" in item.reason for item in unreadable)


def test_offsets_lost_to_retention_are_a_range_and_not_silence(join: Join) -> None:
    """While running, and between two lives of a worker."""
    from kafka import TopicPartition

    address = shared_broker().prefix()
    place = TopicPartition(topic(address.prefix, "metrics"), 0)
    append(address, 0, 30)
    with admin(address) as client:
        client.delete_records({place: 20})
    member = join(address, {("metrics", 0): 10, ("control", 0): 0})
    gap, *rest = member.read(11)
    assert (gap.offset, gap.next_offset) == (10, 20)
    assert isinstance(gap, Unreadable) and "retention" in gap.reason
    assert bodies(rest) == list(range(20, 30))
    member.log.pause()
    append(address, 30, 30)
    with admin(address) as client:
        client.delete_records({place: 50})
    member.log.resume()
    member.read(22)
    seen = {offset for item in member.items for offset in range(item.offset, item.next_offset)}
    assert seen == set(range(10, 60)), "every offset is accounted for"


def test_a_store_that_knows_nothing_begins_at_the_logs_beginning_without_a_complaint(join: Join) -> None:
    """Retention that passed before this store existed is no loss of its."""
    from kafka import TopicPartition

    address = shared_broker().prefix()
    append(address, 0, 10)
    with admin(address) as client:
        client.delete_records({TopicPartition(topic(address.prefix, "metrics"), 0): 4})
    assert bodies(join(address).read(6)) == list(range(4, 10))


def test_records_of_another_program(join: Join) -> None:
    """No header, no key, no value, an odd header: as they are; what to make of them is for others."""
    address = shared_broker().prefix()
    name = topic(address.prefix, "metrics")
    with producer(address) as sender:
        sender.send(name, value=b"plain", partition=0)
        sender.send(name, key=b"k", value=None, partition=0)
        sender.send(name, value=b"", headers=[(SCHEMA_HEADER, b"short"), ("other", b"x")], partition=0)
    records = [item for item in join(address).read(3) if isinstance(item, LogRecord)]
    assert [(item.key, item.body, item.fingerprint) for item in records] == [
        (None, b"plain", None),
        (b"k", None, None),
        (None, b"", b"short"),
    ]


def test_two_members_share_and_one_takes_over(join: Join) -> None:
    """Every record is read, none by both for good; a lost partition is said to be lost and not committed."""
    address = shared_broker().prefix(TopicSettings(metrics_partitions=4, control_partitions=1))
    stored: dict[tuple[str, int], int] = {}
    one, other = join(address, stored), join(address, stored)
    until(lambda: (one.round(), len(one.owned) == 5)[1], 30, "all partitions at the first member")
    until(
        lambda: (one.round(0.02), other.round(0.02), one.owned and other.owned and len(one.owned | other.owned) == 5)[
            2
        ],
        30,
        "a share for both",
    )
    assert not one.owned & other.owned
    with producer(address) as sender:
        for number in range(200):
            sender.send(topic(address.prefix, "metrics"), value=b"%d" % number, partition=number % 4)
    until(lambda: (one.round(0.02), other.round(0.02), len(one.items) + len(other.items) >= 200)[2], 30)
    assert sorted(bodies(one.items) + bodies(other.items)) == list(range(200))
    other.log.close()
    until(lambda: (one.round(), len(one.owned) == 5)[1], 30, "all partitions at the member that is left")


def test_a_group_is_joined_although_nobody_waits_when_the_brokers_answer(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kafka-python forgets such an assignment and joins anew: several workers under load never came to rest."""
    from kafka.coordinator.base import BaseCoordinator

    asked = []
    original = BaseCoordinator._do_join_and_sync_async

    async def slowly(coordinator: Any) -> bytes:
        asked.append(coordinator)
        assignment: bytes = await original(coordinator)
        await coordinator._net.sleep(0.1)  # longer than the poll below
        return assignment

    monkeypatch.setattr(BaseCoordinator, "_do_join_and_sync_async", slowly)
    address = shared_broker().prefix()
    append(address, 0, 10)
    member = join(address)

    def answered() -> bool:
        coordinator = member.log._consumer and member.log._consumer._coordinator
        task = coordinator and coordinator._join_task
        return task is None or task.is_done

    until(lambda: (member.round(0.025), until(answered, 10), len(member.owned) == 2)[2], 20)
    assert len(asked) == 2  # the first is told its member id alone
    assert sorted(bodies(member.read(10))) == list(range(10))


def test_what_was_taken_away_is_not_committed(join: Join) -> None:
    """Kafka would let any member overwrite any partition's offset; a later worker starts where the heir was."""
    address = shared_broker().prefix()
    append(address, 0, 10)
    stored: dict[tuple[str, int], int] = {}
    robbed = join(address, stored)
    robbed.read(10)
    heir = join(address, stored)
    until(lambda: (robbed.round(0.02), heir.round(0.02), bool(heir.owned and robbed.owned))[2], 30)
    [taken] = heir.owned
    robbed.log.commit({taken: 10_000})  # type: ignore[dict-item]
    robbed.log.close()
    heir.log.close()
    again = join(address, stored)
    until(lambda: (again.round(), len(again.owned) == 2)[1], 30)  # a LogError if that commit had got through


def test_added_partitions_are_read_from_their_beginning(join: Join) -> None:
    """Without a restart."""
    address = shared_broker().prefix()
    member = join(address)
    until(lambda: (member.round(), len(member.owned) == 2)[1], 30)
    name = topic(address.prefix, "metrics")
    with admin(address) as client:
        client.create_partitions({name: 3})
    with producer(address, metadata_max_age_ms=500) as sender:
        until(lambda: len(sender.partitions_for(name)) == 3, 20)
        for number in range(3):
            sender.send(name, value=b"%d" % number, partition=number)
    assert sorted(bodies(member.read(3))) == [0, 1, 2]


@pytest.mark.parametrize("again", [False, True])
def test_a_topic_that_is_deleted_or_made_anew_stops_the_worker_loudly(join: Join, again: bool) -> None:
    """Its offsets mean nothing any more; the message says what to do."""
    address = shared_broker().prefix()
    append(address, 0, 5)
    member = join(address)
    member.read(5)
    until(lambda: (member.round(), bool(member.log._watch.identity(topic(address.prefix, "metrics"))))[1], 10)
    name = topic(address.prefix, "metrics")
    with admin(address) as client:
        client.delete_topics([name])
        if again:
            until(lambda: name not in client.list_topics(), 20)
    if again:
        ensure_topics(address, KafkaSecurity(), TopicSettings(metrics_partitions=1, control_partitions=1))
    with pytest.raises(LogError, match="made anew" if again else "was deleted"):
        until(lambda: (member.round(), False)[1], 40)


def test_a_topic_made_anew_while_no_worker_ran_is_noticed(join: Join) -> None:
    """The store was filled beyond its end. (One that has grown longer meanwhile is known by its id: `identity`.)"""
    address = shared_broker().prefix()
    append(address, 0, 5)
    member = join(address)
    member.read(5)
    member.log.close()
    name = topic(address.prefix, "metrics")
    with admin(address) as client:
        client.delete_topics([name])
        until(lambda: name not in client.list_topics(), 20)
    ensure_topics(address, KafkaSecurity(), TopicSettings(metrics_partitions=1, control_partitions=1))
    append(address, 0, 3)
    later = join(address, member.stored)
    with pytest.raises(LogError, match="not the log"):
        until(lambda: (later.round(), False)[1], 30)


def test_a_broker_that_restarts_is_waited_for(join: Join) -> None:
    """Absent at the start, then killed and back: poll returns nothing meanwhile, and goes on."""
    with local_cluster() as cluster:
        address = KafkaAddress.parse(f"kafka://{cluster.bootstrap}/p")
        ensure_topics(address, KafkaSecurity(), TopicSettings(metrics_partitions=1, control_partitions=1))
        append(address, 0, 5)
        cluster.brokers[0].kill()
        member = join(address)
        member.round()
        cluster.brokers[0].start()
        member.read(5, 60)
        cluster.brokers[0].kill()
        member.round()
        cluster.start_broker(0)
        append(address, 5, 5)
        assert bodies(member.read(10, 60)) == list(range(10))
        member.log.close()


def test_dead_letters_come_back_whole_and_once() -> None:
    """Bodies of any size, reasons, marks; written twice they are one."""
    address = shared_broker().prefix()
    letters = KafkaDeadLetters(address)
    first = DeadLetter(Source("metrics", 3, 77, 1234), 78, "makes no sense: ä", b"\xff", MARK, b"body")
    second = DeadLetter(Source("control", 0, 5, 99), 9, "cannot be read")
    large = DeadLetter(Source("metrics", 0, 1, 1), 2, "x" * 9_000, None, b"odd", b"y" * MAX_MESSAGE_BYTES)
    letters.put([first, second])
    letters.put([first, large])
    found = list(letters.letters())
    assert found[:2] == [first, second]
    assert found[2].body == large.body and found[2].fingerprint == b"odd"
    letters.mark_replayed([second.source])
    assert [letter.replayed for letter in letters.letters()] == [False, True, False]
    letters.close()


def test_dead_letters_that_cannot_be_written_are_an_error_to_try_again() -> None:
    """No topic: an OSError, which the worker answers by waiting."""
    address = KafkaAddress(tuple(shared_broker().bootstrap.split(",")), f"none{time.time_ns()}")
    letters = KafkaDeadLetters(address)
    with pytest.raises(ConnectionError, match="dead-letters"):
        letters.put([DeadLetter(Source("metrics", 0, 0, 0), 1, "x")])
    letters.close()


def test_topics_are_made_once_and_differences_are_told_field_by_field() -> None:
    """A second call changes nothing; a dry run makes nothing."""
    address = KafkaAddress(tuple(shared_broker().bootstrap.split(",")), f"t{time.time_ns()}")
    assert [report.created for report in ensure_topics(address, KafkaSecurity(), dry_run=True)] == [True] * 3
    with admin(address) as client:
        assert topic(address.prefix, "control") not in client.list_topics()
    assert [report.created for report in ensure_topics(address, KafkaSecurity())] == [True] * 3
    again = ensure_topics(address, KafkaSecurity())
    assert [(report.created, list(report.differences)) for report in again] == [(False, [])] * 3
    other = ensure_topics(address, KafkaSecurity(), TopicSettings(metrics_partitions=5, metrics_retention_hours=1))
    assert {str(each).split(": ")[1] for report in other for each in report.differences} == {
        "partitions is 12, expected 5",
        "retention.ms is 604800000, expected 3600000",
    }
    with pytest.raises(TopicsError, match="RUNSTREAM_KAFKA_TOPIC_REPLICATION"):
        missing = KafkaAddress(address.brokers, f"t{time.time_ns()}")
        ensure_topics(missing, KafkaSecurity(), TopicSettings(replication=3))


def test_a_topic_about_which_the_brokers_say_nothing_is_trouble_that_passes() -> None:
    """In the moments of its deletion kafka-python fails with a KeyError; the watch says a little later what it is."""
    from kafka import errors
    from kafka.structs import TopicPartition

    place = TopicPartition("gone", 0)

    def silent(partitions: object, timeout_ms: int) -> dict[TopicPartition, int]:
        answers: dict[TopicPartition, int] = {}
        return {place: answers[place]}

    with pytest.raises(errors.UnknownTopicOrPartitionError) as found:
        bounds(silent, [place], 10)
    assert is_transient(found.value)
    assert bounds(lambda partitions, timeout_ms: {place: 7}, [place], 10) == {place: 7}
