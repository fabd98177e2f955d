"""The Kafka event log: one member of the workers' consumer group over `PREFIX.control` and `PREFIX.metrics`.

kafka-python's consumer needs watching (research: kafka.md section 2): a batch that does not decode makes it spin for
ever, offsets outside the log are reset silently or raise, and a commit is fenced by membership alone. So this module
steps over what cannot be read and says so, decides every start position itself, and commits only what it owns.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity, open_client
from runstream_schemas.names import STREAMS, Stream, consumer_group, topic

from ..errors import SettingsError
from . import LogError, LogItem, Positions, Unreadable
from .kafka_dead_letters import KafkaDeadLetters
from .kafka_join import keep_assignments
from .kafka_records import deliver_batches
from .kafka_trouble import bounds, is_transient
from .kafka_watch import TopicWatch

if TYPE_CHECKING:
    from kafka import KafkaConsumer
    from kafka.structs import TopicPartition

__all__ = ["KafkaLog", "open_kafka"]

_log = logging.getLogger(__name__)

COMMIT_INTERVAL_SECONDS: Final = 0.2
"""Commits between these are folded into one: the store's positions are what counts."""
_MIN_POLL_SECONDS: Final = 0.025
"""A call without records costs kafka-python 0.35 ms of CPU: a fifth of a core at 5 ms each, a thirtieth at 25 ms.
Records end the wait at once."""
_CONNECT_SECONDS: Final = 5.0
_MAX_POLL_RECORDS: Final = 20_000
_FETCH_BYTES: Final = 8 * 1024 * 1024

Place = tuple[Stream, int]


def open_kafka(
    address: KafkaAddress, database: str, environment: Mapping[str, str] | None = None
) -> tuple[KafkaLog, KafkaDeadLetters]:
    """The log and the dead letters of the workers that fill `database`; both connect when first used.

    Args:
        environment: where the RUNSTREAM_KAFKA_* settings are; the process's own if None.

    Raises:
        SettingsError: one of them is wrong; names it.
    """
    try:
        security = KafkaSecurity.from_environment(os.environ if environment is None else environment)
        log = KafkaLog(address, consumer_group(address.prefix, database), security)
        return log, KafkaDeadLetters(address, security)
    except ValueError as exc:
        raise SettingsError(str(exc)) from exc


class KafkaLog:
    """An `EventLog`. One thread calls it; Kafka's own thread tells it of rebalances."""

    def __init__(self, address: KafkaAddress, group: str, security: KafkaSecurity | None = None) -> None:
        """Connects at the first `poll`.

        Args:
            group: consumer group (`names.consumer_group`).
        """
        self._address = address
        self._group = group
        self._options = (security or KafkaSecurity()).options()
        self._topics: dict[Stream, str] = {stream: topic(address.prefix, stream) for stream in STREAMS}
        self._streams: dict[str, Stream] = {name: stream for stream, name in self._topics.items()}
        self._consumer: KafkaConsumer | None = None
        self._watch = TopicWatch(address, self._options, sorted(self._streams))
        self._lock = threading.Lock()
        """Guards the next three, which the rebalance listener changes."""
        self._waiting: set[Place] = set()
        self._started: set[Place] = set()
        self._lost: set[Place] = set()
        self._found: list[LogItem] = []
        """Ranges found unreadable that `poll` has yet to return."""
        self._retried: dict[Place, int] = {}
        self._to_commit: dict[Place, int] = {}
        self._committed_at = 0.0
        self._ends: dict[Place, int] = {}
        self._paused = False
        self._away = False
        self._joined = False
        """The topics are known, so that the group may be joined."""
        self._closed = False

    def assigned(self) -> frozenset[Place]:
        if not self._watch.looked:
            return frozenset()  # `start` must know the topics' identities
        with self._lock:
            return frozenset(self._waiting)

    def lost(self) -> frozenset[Place]:
        with self._lock:
            lost, self._lost = frozenset(self._lost), set()
        return lost

    def start(self, positions: Positions) -> None:
        waiting = self.assigned()
        if self._consumer is None or not waiting:
            return
        try:
            starts = self._starts(self._consumer, waiting, positions)
        except Exception as exc:
            if not is_transient(exc):
                raise
            self._say_away(exc)
            return  # they stay assigned; the worker's next round tries again
        for place, (offset, begin) in starts.items():
            with self._lock:
                if place not in self._waiting:
                    continue  # taken away meanwhile
                if not self._seek(place, max(offset, begin)):
                    continue
                self._waiting.discard(place)
                self._started.add(place)
            if offset < begin:
                self._found.append(_retention_gap(place, offset, begin))
            if not self._paused:
                self._consumer.resume(self._partition(place))

    def poll(self, timeout_seconds: float) -> Sequence[LogItem]:
        self._watch.check()
        consumer = self._connect()
        if consumer is None:
            return ()
        self._flush_commits()
        found, self._found = self._found, []
        try:
            polled = consumer.poll(
                timeout_ms=0 if found else int(max(timeout_seconds, _MIN_POLL_SECONDS) * 1000),
                max_records=_MAX_POLL_RECORDS,
            )
        except Exception as exc:
            self._trouble(consumer, exc)
            found += self._found
            self._found = []
            return found
        if polled:
            self._away = False
        for partition, items in polled.items():
            with self._lock:
                if (self._streams[partition.topic], partition.partition) in self._started:
                    found += items
        return found

    def commit(self, positions: Positions) -> None:
        with self._lock:
            for place, offset in positions.items():
                if place in self._started and offset > self._to_commit.get(place, -1):
                    self._to_commit[place] = offset

    def identities(self) -> Mapping[Stream, str]:
        known = {stream: self._watch.identity(name) for stream, name in self._topics.items()}
        return {stream: identity for stream, identity in known.items() if identity}

    def end_positions(self) -> Positions:
        with self._lock:
            owned = set(self._started)
        if self._consumer is None or not owned:
            return {}
        try:
            ends = bounds(self._consumer.end_offsets, [self._partition(place) for place in owned], 1_000)
        except Exception as exc:  # away, or rebalancing: the last known ends are the best there is
            if not is_transient(exc):
                raise
            return {place: end for place, end in self._ends.items() if place in owned}
        self._ends = {(self._streams[at.topic], at.partition): int(end) for at, end in ends.items() if end is not None}
        return dict(self._ends)

    def pause(self) -> None:
        self._paused = True
        if self._consumer is not None:
            self._consumer.pause(*self._consumer.assignment())

    def resume(self) -> None:
        self._paused = False
        if self._consumer is not None:
            with self._lock:
                owned = [self._partition(place) for place in self._started]
            self._consumer.resume(*owned)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._watch.close()
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        with self._lock:
            offsets = self._offsets()
        try:
            if offsets:
                consumer.commit(offsets, timeout_ms=3_000)
        except Exception as exc:  # the store's positions stand
            _log.info("the last commit did not reach Kafka (%s); nothing is lost", type(exc).__name__)
        try:
            consumer.close(autocommit=False, timeout_ms=3_000)
        except Exception as exc:
            _log.info("leaving the consumer group failed (%s); the brokers notice by themselves", type(exc).__name__)

    # -- connection and group

    def _connect(self) -> KafkaConsumer | None:
        if self._consumer is not None and not self._closed:
            return self._consumer if self._joined or self._know_topics(self._consumer) else None
        if self._closed:
            return None
        from kafka import KafkaConsumer
        from kafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

        try:
            self._consumer = open_client(
                KafkaConsumer,
                bootstrap_servers=list(self._address.brokers),
                client_id="runstream-ingest",
                group_id=self._group,
                enable_auto_commit=False,
                auto_offset_reset="none",
                session_timeout_ms=10_000,
                heartbeat_interval_ms=3_000,
                # The worker polls all the time, also while it inserts: this is for a worker that hangs.
                max_poll_interval_ms=120_000,
                max_poll_records=_MAX_POLL_RECORDS,
                fetch_max_bytes=_FETCH_BYTES,
                max_partition_fetch_bytes=2 * 1024 * 1024,
                fetch_max_wait_ms=250,
                check_crcs=True,
                # How soon added partitions are noticed.
                metadata_max_age_ms=10_000,
                request_timeout_ms=15_000,
                reconnect_backoff_max_ms=1_000,
                bootstrap_timeout_ms=int(_CONNECT_SECONDS * 1000),
                partition_assignment_strategy=[RoundRobinPartitionAssignor],
                allow_auto_create_topics=False,
                metrics_enabled=False,
                **self._options,
            )
        except Exception as exc:
            if not is_transient(exc):
                raise LogError(f"Kafka at {self._address} cannot be used: {type(exc).__name__}: {exc}") from exc
            self._say_away(exc)
            return None
        self._away = False
        deliver_batches(self._consumer, self._streams)
        keep_assignments(self._consumer)
        self._consumer.subscribe(sorted(self._streams), listener=_listener(self))
        return self._consumer if self._know_topics(self._consumer) else None

    def _know_topics(self, consumer: KafkaConsumer) -> bool:
        """Wait for the topics' metadata before the group is joined.

        A leader that joins without it hands out nothing, and where the metadata comes just then, kafka-python 3.0.12
        believes that it was handed out (its two snapshots are equal) and never does it again.
        """
        deadline = time.monotonic() + _CONNECT_SECONDS
        while not all(consumer._cluster.partitions_for_topic(name) for name in self._streams):
            if time.monotonic() > deadline:
                return False
            consumer._cluster.request_update()
            time.sleep(0.02)
        self._joined = True
        return True

    def _taken(self, partitions: Iterable[TopicPartition]) -> None:
        """Rebalance listener: these are not ours any more. Kafka's thread."""
        with self._lock:
            for partition in partitions:
                place = (self._streams[partition.topic], partition.partition)
                self._waiting.discard(place)
                self._to_commit.pop(place, None)
                if place in self._started:
                    self._started.discard(place)
                    self._lost.add(place)

    def _given(self, partitions: Iterable[TopicPartition]) -> None:
        """Rebalance listener: these are ours, and wait for `start`. Kafka's thread."""
        consumer = self._consumer
        if consumer is None:
            return
        with self._lock:
            for partition in partitions:
                # A position must stand, or poll raises for partitions without a commit; paused, nothing is fetched.
                consumer.pause(partition)
                consumer.seek(partition, 0)
                self._waiting.add((self._streams[partition.topic], partition.partition))

    # -- positions

    def _starts(
        self, consumer: KafkaConsumer, places: Iterable[Place], positions: Positions
    ) -> dict[Place, tuple[int, int]]:
        """Where to start and where the log begins, for each place."""
        partitions = {place: self._partition(place) for place in places}
        begins = bounds(consumer.beginning_offsets, list(partitions.values()), 5_000)
        ends = bounds(consumer.end_offsets, list(partitions.values()), 5_000)
        found = {}
        for place, partition in partitions.items():
            begin, end = int(begins[partition]), int(ends[partition])
            committed = consumer.committed(partition, metadata=True, timeout_ms=5_000)
            stored = positions.get(place)
            offset = committed.offset if committed is not None else None
            if committed is not None and committed.offset >= 0:
                self._watch.same_topic(partition.topic, committed.metadata or "")
            highest = max(stored or 0, offset or 0 if stored is not None else 0)
            if highest > end:
                raise LogError(
                    f"{partition.topic} partition {partition.partition} ends at {end}, but was read up to {highest}: "
                    "it is not the log that filled this store (recreated, truncated, or another cluster). Start a new "
                    "store with `runstream rebuild`, or another database and so another consumer group"
                )
            if stored is None:
                start = begin
            elif offset is None or offset < 0:
                start = stored
                if stored:
                    # Kafka forgets commits of groups that were away for long. That the topic is the same, the store
                    # knows (`identity.check`).
                    _log.info(
                        "%s partition %d: Kafka knows no commit of group %s, the store was filled up to %d: going on "
                        "there",
                        partition.topic,
                        partition.partition,
                        self._group,
                        stored,
                    )
            else:
                start = min(stored, offset)
            found[place] = (start, begin)
        return found

    def _seek(self, place: Place, offset: int) -> bool:
        """Set the read position; False where the partition is not ours any more."""
        try:
            if self._consumer is not None:
                self._consumer.seek(self._partition(place), offset)
        except ValueError:
            return False
        return True

    def _flush_commits(self) -> None:
        now = time.monotonic()
        if now - self._committed_at < COMMIT_INTERVAL_SECONDS or self._consumer is None:
            return
        with self._lock:
            offsets = self._offsets()
            self._to_commit.clear()
        if offsets:
            self._committed_at = now
            try:
                # Its failures (a rebalance, a broker away) need no answer: the next commit says the same and more.
                self._consumer.commit_async(offsets)
            except Exception as exc:
                _log.debug("commit not sent: %s", type(exc).__name__)

    def _offsets(self) -> dict[Any, Any]:
        """What is to be committed, with the topic's identity as metadata, so that a recreated topic is noticed."""
        from kafka.structs import OffsetAndMetadata

        return {
            self._partition(place): OffsetAndMetadata(offset, self._watch.identity(self._topics[place[0]]), -1)
            for place, offset in self._to_commit.items()
            if place in self._started
        }

    def _partition(self, place: Place) -> Any:
        from kafka.structs import TopicPartition

        return TopicPartition(self._topics[place[0]], place[1])

    # -- trouble

    def _trouble(self, consumer: KafkaConsumer, exc: Exception) -> None:
        """Answer an exception of `poll`: step over, wait, or stop."""
        from kafka import errors

        if isinstance(exc, errors.OffsetOutOfRangeError):
            for partition in exc.args[0]:
                self._out_of_range(consumer, partition)
            return
        if isinstance(exc, errors.TopicAuthorizationFailedError | errors.GroupAuthorizationFailedError):
            raise LogError(
                f"this user may not read {', '.join(sorted(self._streams))} as group {self._group}: "
                f"{type(exc).__name__}; it needs READ and DESCRIBE on the topics and READ on the group"
            ) from exc
        if type(exc).__name__ == "LogTruncationError":
            raise LogError(
                f"a topic was made anew, or the brokers lost records that were read already: {exc}; "
                "see `runstream rebuild`"
            ) from exc
        if is_transient(exc):
            self._say_away(exc)
            time.sleep(0.05)  # a failing poll returns at once; do not spin
            return
        # What is left does not decode: a checksum, a codec we lack, a damaged batch.
        records = consumer._fetcher._next_partition_records
        if records is None:
            raise LogError(f"reading Kafka failed: {type(exc).__name__}: {exc}") from exc
        # Its iterator is dead, but not empty to the fetcher, which would ask it again for ever.
        records.drain()
        self._step_over(consumer, records.topic_partition, exc)

    def _out_of_range(self, consumer: KafkaConsumer, partition: TopicPartition) -> None:
        position = consumer.position(partition, timeout_ms=1_000)
        begin = int(bounds(consumer.beginning_offsets, [partition], 5_000)[partition])
        end = int(bounds(consumer.end_offsets, [partition], 5_000)[partition])
        if position is None or begin <= position <= end:
            return
        if position > end:
            raise LogError(
                f"{partition.topic} partition {partition.partition} ends at {end} but was read up to {position}: the "
                "topic was recreated or the brokers lost records; see `runstream rebuild`"
            )
        place = (self._streams[partition.topic], partition.partition)
        if self._seek(place, begin):
            self._found.append(_retention_gap(place, position, begin))

    def _step_over(self, consumer: KafkaConsumer, partition: TopicPartition, exc: Exception) -> None:
        """One offset further; at first the same is asked for again, for the fault may lie in the transfer."""
        place = (self._streams[partition.topic], partition.partition)
        position = consumer.position(partition, timeout_ms=1_000)
        if position is None:
            return
        if self._retried.get(place) not in (position, position - 1):
            self._retried[place] = position
            consumer.seek(partition, position)
            return
        self._retried[place] = position
        consumer.seek(partition, position + 1)
        _log.warning(
            "%s partition %d offset %d cannot be read: %s", partition.topic, partition.partition, position, exc
        )
        self._found.append(
            Unreadable(
                place[0], place[1], position, position + 1, f"does not decode: {type(exc).__name__}: {exc}"[:500]
            )
        )

    def _say_away(self, exc: Exception) -> None:
        if not self._away:
            self._away = True
            _log.warning(
                "Kafka at %s is away or refuses the login (%s: %s); waiting, nothing is lost",
                ",".join(self._address.brokers),
                type(exc).__name__,
                str(exc)[:300],
            )


def _listener(log: KafkaLog) -> Any:
    from kafka import ConsumerRebalanceListener

    class Listener(ConsumerRebalanceListener):  # type: ignore[misc,no-any-unimported,unused-ignore]
        def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
            log._taken(revoked)

        def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
            log._taken(lost)

        def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
            log._given(assigned)

    return Listener()


def _retention_gap(place: Place, offset: int, begin: int) -> Unreadable:
    return Unreadable(
        place[0], place[1], offset, begin, f"offsets {offset} to {begin - 1} are gone: the log's retention"
    )
