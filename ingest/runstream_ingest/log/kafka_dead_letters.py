"""Dead letters in `PREFIX.dead-letters`: the refused body as it was, with reason and source in headers.

The Kafka key is the source, so that a letter written twice by a replayed worker is one. A record with the header
`runstream-replayed` says that its source's data reached the store later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity
from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import DEAD_LETTERS, REASON_HEADER, SCHEMA_HEADER, SOURCE_HEADER, topic

from ..dead_letter import DeadLetter, Source
from . import LogError

__all__ = ["MAX_LETTER_BYTES", "KafkaDeadLetters"]

_log = logging.getLogger(__name__)

MAX_LETTER_BYTES: Final = MAX_MESSAGE_BYTES + 65_536
"""`max.message.bytes` of the topic: a body of the largest legal size and what is said about it."""
KEY_HEADER: Final = "runstream-key"
NEXT_OFFSET_HEADER: Final = "runstream-next-offset"
REPLAYED_HEADER: Final = "runstream-replayed"
_MAX_REASON_BYTES: Final = 4_000
_MAX_BODY_BYTES: Final = MAX_LETTER_BYTES - 40_000
_DELIVERY_SECONDS: Final = 15.0
_READ_SECONDS: Final = 30.0


class KafkaDeadLetters:
    """A `DeadLetters` in Kafka. One thread calls it; connects when first used."""

    def __init__(self, address: KafkaAddress, security: KafkaSecurity | None = None) -> None:
        self._address = address
        self._options = (security or KafkaSecurity()).options()
        self._topic = topic(address.prefix, DEAD_LETTERS)
        self._producer: Any = None

    def put(self, letters: Sequence[DeadLetter]) -> None:
        self._send([_record_of(letter) for letter in letters])

    def letters(self) -> Iterator[DeadLetter]:
        # Two passes: the marks stand behind the letters, and the bodies together may be too large to hold.
        replayed = {record.key for record in self._records() if _header(record, REPLAYED_HEADER) is not None}
        seen: set[bytes] = set()
        for record in self._records():
            if _header(record, REPLAYED_HEADER) is not None or record.key in seen:
                continue
            letter = _letter_of(record)
            if letter is None:
                _log.warning("%s offset %d holds no dead letter of ours", self._topic, record.offset)
                continue
            seen.add(record.key)
            yield replace(letter, replayed=record.key in replayed)

    def mark_replayed(self, sources: Sequence[Source]) -> None:
        self._send([(str(source).encode(), None, [(REPLAYED_HEADER, b"1")]) for source in sources])

    def close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer._sender.force_close()
            producer._sender.join(1.0)
            producer._unregister_cleanup()
            producer._closed = True

    def _send(self, records: Sequence[tuple[bytes, bytes | None, list[tuple[str, bytes]]]]) -> None:
        """Write and wait for all in-sync replicas.

        Raises:
            ConnectionError: Kafka is away or refuses; some may have been written.
        """
        if not records:
            return
        deadline = time.monotonic() + _DELIVERY_SECONDS + 5.0
        try:
            producer = self._open()
            futures = [
                producer.send(self._topic, key=key, value=value, headers=headers) for key, value, headers in records
            ]
            for future in futures:
                future.get(max(0.1, deadline - time.monotonic()))
        except Exception as exc:  # whatever it was, this producer is not trusted any more
            self.close()
            raise ConnectionError(
                f"dead letters cannot be written to {self._topic} at {self._address}: {type(exc).__name__}: {exc}"
            ) from exc

    def _open(self) -> Any:
        if self._producer is None:
            from kafka import KafkaProducer

            self._producer = KafkaProducer(
                bootstrap_servers=list(self._address.brokers),
                client_id="runstream-dead-letters",
                acks="all",
                # Rare and idempotent by their key: without a producer id a refused record fails alone.
                enable_idempotence=False,
                max_in_flight_requests_per_connection=1,
                compression_type="lz4",
                max_request_size=MAX_LETTER_BYTES,
                delivery_timeout_ms=int(_DELIVERY_SECONDS * 1000),
                request_timeout_ms=10_000,
                max_block_ms=5_000,
                linger_ms=0,
                api_version=(2, 5),
                allow_auto_create_topics=False,
                metrics_enabled=False,
                **self._options,
            )
        return self._producer

    def _records(self) -> Iterator[Any]:
        """Every record from the topic's beginning to its end as it is now.

        Raises:
            LogError: the topic cannot be read.
        """
        from kafka import KafkaConsumer, TopicPartition
        from kafka.errors import KafkaError

        try:
            consumer = KafkaConsumer(
                bootstrap_servers=list(self._address.brokers),
                client_id="runstream-dead-letters",
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                max_partition_fetch_bytes=4 * 1024 * 1024,
                bootstrap_timeout_ms=10_000,
                allow_auto_create_topics=False,
                metrics_enabled=False,
                **self._options,
            )
        except (KafkaError, OSError) as exc:
            raise LogError(f"Kafka at {self._address} does not answer: {type(exc).__name__}: {exc}") from exc
        try:
            partitions = [TopicPartition(self._topic, number) for number in self._partitions(consumer)]
            consumer.assign(partitions)
            ends = consumer.end_offsets(partitions, timeout_ms=10_000)
            consumer.seek_to_beginning(*partitions)
            yield from self._until(consumer, {place: end for place, end in ends.items() if end})
        except KafkaError as exc:
            raise LogError(f"{self._topic} cannot be read: {type(exc).__name__}: {exc}") from exc
        finally:
            consumer.close(autocommit=False, timeout_ms=1_000)

    def _partitions(self, consumer: Any) -> Sequence[int]:
        found = consumer.partitions_for_topic(self._topic)
        if not found:
            raise LogError(f"topic {self._topic} does not exist at {self._address}: run `runstream migrate`")
        return sorted(found)

    def _until(self, consumer: Any, ends: dict[Any, int]) -> Iterator[Any]:
        deadline = time.monotonic() + _READ_SECONDS
        while any(consumer.position(place, timeout_ms=10_000) < end for place, end in ends.items()):
            polled = consumer.poll(timeout_ms=500)
            if polled:
                deadline = time.monotonic() + _READ_SECONDS
            elif time.monotonic() > deadline:
                raise LogError(f"{self._topic} cannot be read to its end within {_READ_SECONDS:.0f} s")
            for place, records in polled.items():
                yield from (record for record in records if record.offset < ends.get(place, 0))


def _record_of(letter: DeadLetter) -> tuple[bytes, bytes | None, list[tuple[str, bytes]]]:
    """Key, value and headers."""
    reason, body, key = letter.reason, letter.body, letter.key
    if body is not None and len(body) > _MAX_BODY_BYTES:
        reason, body = f"{reason} (its body of {len(body)} bytes is too large to be kept)", None
    headers = [
        (SOURCE_HEADER, str(letter.source).encode("ascii")),
        (NEXT_OFFSET_HEADER, str(letter.next_offset).encode("ascii")),
        (REASON_HEADER, reason.encode("utf-8", "replace")[:_MAX_REASON_BYTES]),
    ]
    if key is not None:
        headers.append((KEY_HEADER, key[:16_384]))
    if letter.fingerprint is not None:
        headers.append((SCHEMA_HEADER, letter.fingerprint[:1_024]))
    return str(letter.source).encode("ascii"), body, headers


def _letter_of(record: Any) -> DeadLetter | None:
    source = _header(record, SOURCE_HEADER)
    try:
        if source is None:
            return None
        return DeadLetter(
            Source.parse(source.decode("ascii")),
            int(_header(record, NEXT_OFFSET_HEADER) or b"0"),
            (_header(record, REASON_HEADER) or b"").decode("utf-8", "replace"),
            _header(record, KEY_HEADER),
            _header(record, SCHEMA_HEADER),
            record.value,
        )
    except ValueError:
        return None


def _header(record: Any, name: str) -> bytes | None:
    for key, value in record.headers:
        if key == name:
            return value if isinstance(value, bytes) else b""
    return None
