"""One life of a kafka-python producer, and how to tell that it has ended (research: kafka.md section 2).

kafka-python 3.0 wedges for ever after a delivery time-out, turns fatal for all topics on one refused record, and knows
no bound on memory. So nothing here is trusted to recover by itself: `KafkaTransport` watches, ends a producer by force
and makes the next one; the journal still holds what was not acknowledged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import SCHEMA_HEADER

from . import Event, TransportError

__all__ = ["MAX_RECORD_BYTES", "SEND_BLOCK_SECONDS", "SupervisedProducer", "log_is_away"]

SEND_BLOCK_SECONDS: Final = 4.0
"""Longest wait for the topics' metadata; below the 5 seconds that `Transport.send` may block."""
# The broker's limit counts the batch's own header (61 bytes) and the record's.
MAX_RECORD_BYTES: Final = MAX_MESSAGE_BYTES - 1024
_DAY_MS: Final = 86_400_000

_abandoned: list[object] = []
"""Producers of a forked parent: never touched and never collected, for `__del__` would use the parent's sockets."""


class SupervisedProducer:
    """Sends records and counts what is in flight. One thread sends; the producer's own thread acknowledges."""

    def __init__(self, brokers: tuple[str, ...], options: Mapping[str, Any], *, careful: bool) -> None:
        """Makes the producer; connects in the background.

        Args:
            careful: one request in flight and no producer id: one refused record then fails alone.

        Raises:
            KafkaError: the options do not fit together.
        """
        from kafka import KafkaProducer

        self._pid = os.getpid()
        self.careful = careful
        self._lock = threading.Lock()
        self._pending: dict[int, int] = {}
        self._number = 0
        self.bytes_in_flight = 0
        self.progress_at = time.monotonic()
        self.refused: BaseException | None = None
        self._producer = KafkaProducer(
            bootstrap_servers=list(brokers),
            client_id="runstream",
            acks="all",
            enable_idempotence=not careful,
            max_in_flight_requests_per_connection=1 if careful else 5,
            compression_type="lz4",
            # Longer than any outage: an expiring batch is what wedges the producer.
            delivery_timeout_ms=_DAY_MS,
            max_request_size=MAX_RECORD_BYTES,
            batch_size=262_144,
            linger_ms=5,
            max_block_ms=int(SEND_BLOCK_SECONDS * 1000),
            request_timeout_ms=15_000,
            reconnect_backoff_max_ms=2_000,
            metadata_max_age_ms=30_000,
            # Without it the constructor waits up to 30 s for a broker; the versions are still agreed per connection.
            api_version=(2, 5),
            allow_auto_create_topics=False,
            metrics_enabled=False,
            **options,
        )
        # Its own exit handler runs before ours: it would wait a second, then print a traceback where records wait.
        self._producer._unregister_cleanup()

    @property
    def usable(self) -> bool:
        """Whether it lives in this process and takes records."""
        return self._pid == os.getpid() and self.trouble() is None

    def partitions(self, topic: str) -> int:
        """Number of partitions of `topic`; blocks up to `SEND_BLOCK_SECONDS` where they are not known yet.

        Raises:
            KafkaError: not known in time.
        """
        return len(self._producer.partitions_for(topic))

    def send(self, topic: str, event: Event, size: int) -> Any:
        """Hand over one event; its future."""
        future = self._producer.send(
            topic,
            key=event.key.encode("utf-8"),
            value=event.body,
            headers=[(SCHEMA_HEADER, event.fingerprint)],
            partition=0 if event.first_partition else None,  # else murmur2 of the key, as every Kafka client has it
        )
        with self._lock:
            if not self._pending:
                self.progress_at = time.monotonic()
            self._number += 1
            number = self._number
            self._pending[number] = size
            self.bytes_in_flight += size
        future.add_both(self._settled, number)
        return future

    def _settled(self, number: int, *_: object) -> None:
        with self._lock:
            size = self._pending.pop(number, None)
            if size is not None:
                self.bytes_in_flight -= size
                self.progress_at = time.monotonic()

    def trouble(self, stalled_seconds: float = 60.0) -> str | None:
        """Why this producer must be replaced, or None."""
        manager = self._producer._transaction_manager
        if manager is not None and manager.has_fatal_error():
            return f"the producer refuses all further records: {manager.last_error}"
        if not self._producer._sender.is_alive():
            return "the producer's thread has ended"
        with self._lock:
            waiting = bool(self._pending) and time.monotonic() - self.progress_at > stalled_seconds
        return f"no acknowledgement for {stalled_seconds:.0f} s" if waiting else None

    def close(self) -> None:
        """End it now, dropping what is not acknowledged. Blocks half a second at most."""
        if self._pid != os.getpid():
            _abandoned.append(self._producer)
            return
        # `close(timeout)` raises and stops nothing while records are pending; the sender's own switch does.
        sender = self._producer._sender
        sender.force_close()
        sender.join(0.5)
        self._producer._unregister_cleanup()
        self._producer._closed = True


def log_is_away(exc: BaseException, what: str, *, retryable: bool = True) -> TransportError:
    """A foreign error as one of ours, with a remedy where there is one. Never names a secret."""
    from kafka import errors

    name = type(exc).__name__
    hint = ""
    if isinstance(exc, errors.TopicAuthorizationFailedError | errors.ClusterAuthorizationFailedError):
        hint = "; this user may not write there: ask for WRITE and DESCRIBE on the topics"
    elif isinstance(exc, errors.SaslAuthenticationFailedError):
        hint = "; check RUNSTREAM_KAFKA_USERNAME, _PASSWORD and _SASL_MECHANISM"
    elif isinstance(exc, errors.UnknownTopicOrPartitionError):
        hint = "; `runstream migrate` creates the topics"
    return TransportError(f"{what}: {name}{': ' + text if (text := str(exc)[:300]) else ''}{hint}", retryable=retryable)
