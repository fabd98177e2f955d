"""The worker's own metrics: names, types and units in one place; Prometheus text and health on a port.

Counting costs an attribute addition; prometheus-client is imported only where a port is opened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, get_args

from .dead_letter import DeadLetter

__all__ = ["DESCRIPTIONS", "MetricName", "Metrics", "serve"]

MetricName = Literal[
    # Counters
    "runstream_ingest_records_total",  # records taken from the log
    "runstream_ingest_body_bytes_total",  # bytes of bodies taken from the log
    "runstream_ingest_batches_total",  # batches whose positions are written
    "runstream_ingest_insert_seconds_total",  # seconds spent in batches, from framing to written positions
    "runstream_ingest_retries_total",  # store calls repeated because it was busy or away
    "runstream_ingest_dead_letters_total",  # records set aside
    # Gauges
    "runstream_ingest_batch_records",  # records of the last batch
    "runstream_ingest_batch_bytes",  # bytes of bodies of the last batch
    "runstream_ingest_insert_seconds",  # seconds the last batch took
    "runstream_ingest_freshness_seconds",  # age of the oldest record of the last batch when it became visible
    "runstream_ingest_lag_records",  # per stream and partition: log end minus position (bytes in the directory log)
    "runstream_ingest_last_commit_timestamp_seconds",  # Unix time of the last written positions
]

DESCRIPTIONS: Final[Mapping[MetricName, str]] = {
    "runstream_ingest_records_total": "Records taken from the log.",
    "runstream_ingest_body_bytes_total": "Bytes of bodies taken from the log.",
    "runstream_ingest_batches_total": "Batches whose positions are written.",
    "runstream_ingest_insert_seconds_total": "Seconds spent in batches, from framing to written positions.",
    "runstream_ingest_retries_total": "Store calls repeated because the store was busy or away.",
    "runstream_ingest_dead_letters_total": "Records set aside because they can never be stored.",
    "runstream_ingest_batch_records": "Records of the last batch.",
    "runstream_ingest_batch_bytes": "Bytes of bodies of the last batch.",
    "runstream_ingest_insert_seconds": "Seconds the last batch took.",
    "runstream_ingest_freshness_seconds": "Age of the oldest record of the last batch when it became visible.",
    "runstream_ingest_lag_records": "Log end minus position, per stream and partition (bytes in the directory log).",
    "runstream_ingest_last_commit_timestamp_seconds": "Unix time of the last written positions.",
}


@dataclass(slots=True)
class Metrics:
    """Values of one worker. Written by its threads, read by any: each value is one assignment."""

    values: dict[MetricName, float] = field(
        default_factory=lambda: {name: 0.0 for name in get_args(MetricName) if name != "runstream_ingest_lag_records"}
    )
    lag: dict[tuple[str, int], int] = field(default_factory=dict)

    def add(self, name: MetricName, amount: float) -> None:
        self.values[name] += amount

    def retry(self) -> None:
        self.add("runstream_ingest_retries_total", 1)

    def dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        self.add("runstream_ingest_dead_letters_total", len(letters))

    def batch(self, records: int, body_bytes: int, seconds: float, oldest_time_ms: int | None) -> None:
        """Count one batch that is in the store now."""
        now = time.time()
        self.add("runstream_ingest_records_total", records)
        self.add("runstream_ingest_body_bytes_total", body_bytes)
        self.add("runstream_ingest_batches_total", 1)
        self.add("runstream_ingest_insert_seconds_total", seconds)
        self.values["runstream_ingest_batch_records"] = records
        self.values["runstream_ingest_batch_bytes"] = body_bytes
        self.values["runstream_ingest_insert_seconds"] = seconds
        self.values["runstream_ingest_last_commit_timestamp_seconds"] = now
        if oldest_time_ms is not None:
            self.values["runstream_ingest_freshness_seconds"] = max(0.0, now - oldest_time_ms / 1000)


class _Collector:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Any:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, value in list(self._metrics.values.items()):
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, DESCRIPTIONS[name], value=value)
        lag = GaugeMetricFamily(
            "runstream_ingest_lag_records",
            DESCRIPTIONS["runstream_ingest_lag_records"],
            labels=["stream", "partition"],
        )
        for (stream, partition), behind in list(self._metrics.lag.items()):
            lag.add_metric([stream, str(partition)], behind)
        yield lag


def serve(metrics: Metrics, healthy: Callable[[], str | None], host: str, port: int) -> ThreadingHTTPServer:
    """Answer `/metrics` (Prometheus text) and `/health` on a daemon thread.

    Args:
        healthy: None while all is well, else what is wrong: `/health` then answers 503 with it.
        port: 0 takes a free one; see `server_address` of the result.

    Returns:
        The server; end it with `shutdown()` and `server_close()`.
    """
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(metrics))

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif self.path in ("/health", "/ready"):
                trouble = healthy()
                text = "ok\n" if trouble is None else f"{trouble}\n"
                self._answer(200 if trouble is None else 503, "text/plain; charset=utf-8", text.encode())
            else:
                self._answer(404, "text/plain; charset=utf-8", b"not found: /metrics, /health, /ready\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass  # a line per scrape tells nobody anything

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="runstream-metrics", daemon=True).start()
    return server
