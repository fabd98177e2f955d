"""Names on the wire: event types, streams, Kafka topics, headers and the consumer group."""

from __future__ import annotations

from typing import Final, Literal

Stream = Literal["control", "metrics"]
EventName = Literal[
    "metric_batch",
    "run_started",
    "run_updated",
    "params",
    "run_tags",
    "experiment_tags",
    "experiment_created",
    "experiment_updated",
    "artifact_logged",
    "input_logged",
    "logged_model",
    "models_linked",
    "purged",
]

CONTROL: Final[Stream] = "control"
"""Low-volume events, kept for ever; experiment events go to its partition 0, so they have one order."""
METRICS: Final[Stream] = "metrics"
"""Metric batches: their own stream, so that a metric flood does not delay state."""
STREAMS: Final[tuple[Stream, ...]] = (CONTROL, METRICS)
DEAD_LETTERS: Final = "dead-letters"

STREAM_OF: Final[dict[EventName, Stream]] = {
    "metric_batch": METRICS,
    "run_started": CONTROL,
    "run_updated": CONTROL,
    "params": CONTROL,
    "run_tags": CONTROL,
    "experiment_tags": CONTROL,
    "experiment_created": CONTROL,
    "experiment_updated": CONTROL,
    "artifact_logged": CONTROL,
    "input_logged": CONTROL,
    "logged_model": CONTROL,
    "models_linked": CONTROL,
    "purged": CONTROL,
}
"""The stream that carries each event type."""

FIRST_PARTITION_EVENTS: Final[frozenset[EventName]] = frozenset(
    {"experiment_created", "experiment_updated", "experiment_tags", "purged"}
)
"""Events that always go to partition 0 of the control stream."""

SCHEMA_HEADER: Final = "runstream-schema"
"""Kafka header whose value is the 8-byte big-endian CRC-64-AVRO fingerprint of the body's schema."""
REASON_HEADER: Final = "runstream-reason"
"""Dead letters: why the body was refused, UTF-8."""
SOURCE_HEADER: Final = "runstream-source"
"""Dead letters: `stream/partition/offset/time_ms` of the refused record, ASCII."""

DATABASE: Final = "runstream"
"""ClickHouse database, unless the store address names another."""


def topic(prefix: str, stream: Stream | Literal["dead-letters"]) -> str:
    """The Kafka topic that carries `stream` below `prefix`, for example `team.metrics`."""
    return f"{prefix}.{stream}"


def landing_table(event: EventName) -> str:
    """The Null table into which raw bodies of `event` are inserted."""
    return f"landing_{event}"


def consumer_group(prefix: str, database: str) -> str:
    """The Kafka consumer group of the workers that fill `database`."""
    return f"{prefix}.{database}"
