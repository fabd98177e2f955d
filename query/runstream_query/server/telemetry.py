"""Prometheus metrics of the server process: one place names each, with type and unit."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Telemetry:
    """Counters and gauges of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "runstream_server_requests", "Requests answered", ["method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "runstream_server_request_seconds", "Time to answer", buckets=_BUCKETS, registry=self.registry
        )
        self.in_work = Gauge("runstream_server_requests_in_work", "Requests in work now", registry=self.registry)
        self.queued_bytes = Gauge(
            "runstream_server_append_queue_bytes", "Event bytes waiting for the log", registry=self.registry
        )
        self.appended_events = Gauge(
            "runstream_server_appended_events", "Events acknowledged by the log since the start", registry=self.registry
        )
        self.waiting_reads = Gauge("runstream_server_reads_waiting", "Reads waiting or running", registry=self.registry)
        self._children: dict[tuple[str, int], Counter] = {}

    def request(self, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        key = (method if method in _METHODS else "other", status)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._requests.labels(key[0], str(status))
        child.inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
