"""The whole log of one prefix, for a rebuild: read in a consumer group of its own, with its present bounds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity
from runstream_schemas.names import STREAMS, consumer_group, topic

from ..errors import IngestError, SettingsError
from . import EventLog, Positions
from .kafka import KafkaLog

__all__ = ["whole_log"]

_TIMEOUT_MS = 30_000


def whole_log(
    address: KafkaAddress, database: str, environment: Mapping[str, str] | None = None
) -> tuple[Callable[[], EventLog], Positions, Callable[[], Positions]]:
    """A way to open the log, the first offset that each partition still has, and a way to ask where each ends now.

    Args:
        database: the fresh one; names the consumer group, so that the workers' commits are not disturbed.
        environment: where the RUNSTREAM_KAFKA_* settings are; the process's own if None.

    Raises:
        SettingsError: one of the settings is wrong.
        IngestError: the brokers do not answer, or a topic is missing.
    """
    try:
        security = KafkaSecurity.from_environment(os.environ if environment is None else environment)
        options = security.options()
    except ValueError as exc:
        raise SettingsError(str(exc)) from exc
    group = consumer_group(address.prefix, database)
    return (
        lambda: KafkaLog(address, group, security),
        _bounds(address, options, "beginning_offsets"),
        lambda: _bounds(address, options, "end_offsets"),
    )


def _bounds(address: KafkaAddress, options: dict[str, Any], which: str) -> Positions:
    from kafka import KafkaConsumer, TopicPartition
    from kafka.errors import KafkaError

    try:
        consumer = KafkaConsumer(
            bootstrap_servers=list(address.brokers),
            client_id="runstream-rebuild",
            bootstrap_timeout_ms=_TIMEOUT_MS,
            **options,
        )
        try:
            places = {}
            for stream in STREAMS:
                partitions = consumer.partitions_for_topic(topic(address.prefix, stream))
                if not partitions:
                    raise IngestError(
                        f"topic {topic(address.prefix, stream)} is missing: run `runstream migrate` first"
                    )
                for number in partitions:
                    places[TopicPartition(topic(address.prefix, stream), number)] = (stream, number)
            offsets = getattr(consumer, which)(list(places), timeout_ms=_TIMEOUT_MS)
            return {places[place]: int(offset) for place, offset in offsets.items()}
        finally:
            consumer.close()
    except (KafkaError, OSError) as exc:
        raise IngestError(f"Kafka at {','.join(address.brokers)} does not answer: {type(exc).__name__}: {exc}") from exc
