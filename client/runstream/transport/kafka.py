"""The Kafka transport: events to `PREFIX.control` and `PREFIX.metrics`, acknowledged by all in-sync replicas.

How to log in stands in `runstream_schemas.kafka_address`. Brokers that are away are no error until `send` cannot hand
over; a producer that has died inside is replaced, and its receipts fail so that the journal resends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity, open_client
from runstream_schemas.names import STREAMS, Stream, topic

from . import Event, Positions, Receipt, TransportError
from .kafka_producer import MAX_RECORD_BYTES, SEND_BLOCK_SECONDS, SupervisedProducer, log_is_away

if TYPE_CHECKING:
    from kafka import KafkaAdminClient

__all__ = ["KafkaTransport", "open_kafka"]

MAX_BYTES_IN_FLIGHT: Final = 16 * 1024 * 1024
"""kafka-python has no bound of its own; one record of 1.4 kB costs it 2.3 kB."""
_CAREFUL_SECONDS: Final = 60.0
_OVERHEAD_BYTES: Final = 100
"""Key, headers and framing of one record, roughly; for our own bound."""

_log = logging.getLogger("runstream")


def open_kafka(uri: str, environment: Mapping[str, str] | None = None) -> KafkaTransport:
    """The transport for `kafka://host:port[,host:port]/PREFIX`; connects when first used.

    Args:
        environment: where the RUNSTREAM_KAFKA_* settings are; the process's own if None.

    Raises:
        ValueError: an address or a setting that is wrong; names it.
    """
    security = KafkaSecurity.from_environment(os.environ if environment is None else environment)
    return KafkaTransport(KafkaAddress.parse(uri), security)


class KafkaTransport:
    """A `Transport`. `send` and its receipts belong to one thread; `end_positions` to any."""

    def __init__(self, address: KafkaAddress, security: KafkaSecurity | None = None) -> None:
        self._address = address
        self._options = (security or KafkaSecurity()).options()
        self._topics: dict[Stream, str] = {stream: topic(address.prefix, stream) for stream in STREAMS}
        self._producer: SupervisedProducer | None = None
        self._careful_until = 0.0
        self._ends = _Ends(address, self._options)

    def __repr__(self) -> str:
        return f"KafkaTransport({str(self._address)!r})"

    def send(self, events: Sequence[Event]) -> Receipt:
        for event in events:
            size = len(event.body) + len(event.key) + _OVERHEAD_BYTES
            if size > MAX_RECORD_BYTES:
                raise TransportError(
                    f"an event of {size} bytes for {event.key!r} is above the topics' limit of {MAX_RECORD_BYTES}",
                    retryable=False,
                )
        producer = self._usable_producer()
        deadline = time.monotonic() + SEND_BLOCK_SECONDS
        self._await_room(producer, sum(len(event.body) + _OVERHEAD_BYTES for event in events), deadline)
        futures: list[tuple[Stream, Any]] = []
        try:
            for stream in {event.stream for event in events}:
                self._know(producer, stream, deadline)
            for event in events:
                size = len(event.body) + _OVERHEAD_BYTES
                futures.append((event.stream, producer.send(self._topics[event.stream], event, size)))
        except TransportError:
            raise
        except Exception as exc:  # kafka-python raises its own errors, ValueError for a partition, RuntimeError closed
            raise log_is_away(exc, f"Kafka at {','.join(self._address.brokers)} takes no events") from exc
        return _KafkaReceipt(self, producer, futures)

    def sync(self) -> None:
        """Nothing: an acknowledged event is in all in-sync replicas."""

    def end_positions(self, timeout_seconds: float) -> Positions:
        return self._ends.read(self._topics, timeout_seconds)

    def close(self, timeout_seconds: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()
        self._ends.close()

    def replace(self, producer: SupervisedProducer, reason: str, *, careful: bool = False) -> None:
        """End `producer` if it is still the one in use; the next `send` makes another."""
        if careful:
            self._careful_until = time.monotonic() + _CAREFUL_SECONDS
        if self._producer is producer:
            self._producer = None
            _log.info("runstream: a new Kafka producer takes over: %s", reason)
            producer.close()

    def _usable_producer(self) -> SupervisedProducer:
        careful = time.monotonic() < self._careful_until
        if self._producer is not None:
            if not self._producer.usable:
                self.replace(self._producer, self._producer.trouble() or "forked")
            elif self._producer.careful and not careful and not self._producer.bytes_in_flight:
                self.replace(self._producer, "no record was refused for a while")
        if self._producer is None:
            try:
                self._producer = SupervisedProducer(self._address.brokers, self._options, careful=careful)
            except Exception as exc:
                raise log_is_away(exc, f"no Kafka producer for {self._address}") from exc
        return self._producer

    def _await_room(self, producer: SupervisedProducer, size: int, deadline: float) -> None:
        """Keep what is in flight below the bound; a lone large hand-over always has room."""
        while producer.bytes_in_flight and producer.bytes_in_flight + size > MAX_BYTES_IN_FLIGHT:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"Kafka at {','.join(self._address.brokers)} is slow or away: "
                    f"{producer.bytes_in_flight} bytes wait for acknowledgement",
                    retryable=True,
                )
            time.sleep(0.01)

    def _know(self, producer: SupervisedProducer, stream: Stream, deadline: float) -> None:
        """Wait for the topic's metadata once for both topics together, not once each."""
        from kafka import errors

        name = self._topics[stream]
        try:
            if time.monotonic() <= deadline:
                producer.partitions(name)
                return
        except errors.KafkaTimeoutError as exc:
            cause: Exception = exc
        else:
            cause = errors.KafkaTimeoutError(f"topic {name} is not known")
        brokers = ",".join(self._address.brokers)
        raise TransportError(
            f"topic {name} is not to be had from Kafka at {brokers} within {SEND_BLOCK_SECONDS:.0f} s: the brokers are "
            "away, refuse the login (RUNSTREAM_KAFKA_*), or `runstream migrate` was not run",
            retryable=True,
        ) from cause


class _KafkaReceipt:
    """The futures of one `send`, in order."""

    def __init__(
        self, transport: KafkaTransport, producer: SupervisedProducer, futures: list[tuple[Stream, Any]]
    ) -> None:
        self._transport = transport
        self._producer = producer
        self._futures = futures
        self._settled = 0
        self._positions: dict[tuple[Stream, int], int] = {}

    def result(self, timeout_seconds: float) -> Positions:
        deadline = time.monotonic() + timeout_seconds
        while self._settled < len(self._futures):
            stream, future = self._futures[self._settled]
            # Looked at in short rounds: a wedged producer leaves its futures unsettled for ever.
            if not future.is_done and not self._wait(future, min(1.0, deadline - time.monotonic())):
                self._check_producer()
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"not acknowledged within {timeout_seconds:g} s")
                continue
            if future.failed():
                self._failed(future.exception)
            place = (stream, int(future.value.partition))
            self._positions[place] = max(self._positions.get(place, 0), int(future.value.offset) + 1)
            self._settled += 1
        return dict(self._positions)

    @staticmethod
    def _wait(future: Any, seconds: float) -> bool:
        from kafka.errors import KafkaTimeoutError

        if seconds <= 0:
            return bool(future.is_done)
        try:
            future.get(seconds)
        except KafkaTimeoutError:
            return bool(future.is_done)
        except Exception:  # the caller looks at the future itself
            return True
        return True

    def _check_producer(self) -> None:
        trouble = self._producer.trouble() if self._producer.usable else (self._producer.trouble() or "it is gone")
        if trouble is not None:
            self._transport.replace(self._producer, trouble)
            raise TransportError(f"Kafka gave no acknowledgement: {trouble}", retryable=True)

    def _failed(self, exc: BaseException) -> None:
        from kafka import errors

        refusal = (
            errors.MessageSizeTooLargeError,
            errors.RecordListTooLargeError,
            errors.InvalidRecordError,
            errors.InvalidTimestampError,
        )
        if isinstance(exc, refusal):
            # An idempotent producer fails every record behind a refused one with the same error. Only a careful one
            # says which it was.
            known = self._producer.careful
            self._transport.replace(self._producer, f"a record was refused: {type(exc).__name__}", careful=True)
            raise log_is_away(exc, "Kafka refuses an event", retryable=not known) from exc
        self._transport.replace(self._producer, f"a record failed: {type(exc).__name__}")
        raise log_is_away(exc, "Kafka did not acknowledge") from exc


class _Ends:
    """Asks the brokers where the topics end, over a connection of its own, kept between calls."""

    def __init__(self, address: KafkaAddress, options: Mapping[str, Any]) -> None:
        self._address = address
        self._options = options
        self._admin: KafkaAdminClient | None = None
        self._pid = 0
        self._lock = threading.Lock()

    def read(self, topics: Mapping[Stream, str], timeout_seconds: float) -> Positions:
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            while True:
                try:
                    return self._ask(topics, max(0.1, deadline - time.monotonic()))
                except Exception as exc:  # the admin client raises KafkaError, OSError and RuntimeError
                    self._drop()
                    if time.monotonic() + 0.2 > deadline:
                        raise log_is_away(exc, f"the log's end is not to be had from {self._address}") from exc
                    time.sleep(0.1)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _ask(self, topics: Mapping[Stream, str], timeout_seconds: float) -> Positions:
        from kafka import KafkaAdminClient, OffsetSpec, TopicPartition, errors

        if self._admin is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._admin = open_client(
                KafkaAdminClient,
                bootstrap_servers=list(self._address.brokers),
                client_id="runstream-ends",
                bootstrap_timeout_ms=max(500, int(timeout_seconds * 1000)),
                request_timeout_ms=5_000,
                **self._options,
            )
        stream_of = {name: stream for stream, name in topics.items()}
        wanted = {}
        for described in self._admin.describe_topics(list(stream_of)):
            error = errors.for_code(described["error_code"])
            if error is not errors.NoError:
                raise error(f"topic {described['name']}")
            for partition in described["partitions"]:
                wanted[TopicPartition(described["name"], partition["partition_index"])] = OffsetSpec.LATEST
        found = self._admin.list_partition_offsets(wanted, timeout_ms=max(100, int(timeout_seconds * 1000)))
        return {(stream_of[place.topic], place.partition): int(end.offset) for place, end in found.items()}

    def _drop(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None and self._pid == os.getpid():
            admin.close()
