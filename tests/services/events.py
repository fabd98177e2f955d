"""Makes event bodies and log records for tests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from runstream_ingest.log import LogRecord
from runstream_schemas import codec
from runstream_schemas.names import STREAM_OF, EventName

NOW = 1_790_000_000_000
METRICS = codec.current("metric_batch").fingerprint


def version(time_ms: int = NOW, seq: int = 1, writer: int = 7) -> dict[str, int]:
    """The three fields of a version."""
    return {"time_ms": time_ms, "seq": seq, "writer": writer}


def started(run_id: str, experiment_id: str = "5", **fields: Any) -> tuple[EventName, dict[str, Any]]:
    """A run's start."""
    return "run_started", {
        "run_id": run_id,
        "experiment_id": experiment_id,
        "name": f"name-{run_id}",
        "user": "ada",
        "source_name": "train.py",
        "source_type": "LOCAL",
        "source_version": "abc",
        "artifact_uri": f"{experiment_id}/{run_id}/artifacts",
        "parent_run_id": "",
        "started_at": NOW,
        **version(),
        **fields,
    }


def created(experiment_id: str = "5", name: str = "vision", **fields: Any) -> tuple[EventName, dict[str, Any]]:
    """An experiment's first use."""
    body = {"experiment_id": experiment_id, "name": name, "artifact_uri": "", "created_at": NOW, **version(), **fields}
    return "experiment_created", body


def points(
    run_id: str,
    values: Sequence[float],
    *,
    key: str = "loss",
    first_step: int = 0,
    writer: int = 7,
    first_seq: int = 1,
    time_ms: int = NOW,
) -> tuple[EventName, dict[str, Any]]:
    """One value a step, one millisecond apart."""
    count = len(values)
    return "metric_batch", {
        "run_id": run_id,
        "writer": writer,
        "first_seq": first_seq,
        "sent_at": time_ms,
        "keys": [key],
        "steps": list(range(first_step, first_step + count)),
        "times": [time_ms + i for i in range(count)],
        "ki": [0] * count,
        "ci": list(range(count)),
        "values": list(values),
    }


def body(event: tuple[EventName, dict[str, Any]]) -> bytes:
    """The event's Avro body."""
    return codec.encode(*event)


def record(
    event: tuple[EventName, dict[str, Any]], offset: int = 0, *, partition: int = 0, time_ms: int = NOW
) -> LogRecord:
    """The event as the log would give it."""
    name, _ = event
    fingerprint = codec.current(name).fingerprint
    return LogRecord(STREAM_OF[name], partition, offset, offset + 1, time_ms, None, fingerprint, body(event))


def until(condition: Any, seconds: float = 20.0, what: str = "the condition") -> None:
    """Wait for `condition()` to be true, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {seconds} seconds")
        time.sleep(0.005)
