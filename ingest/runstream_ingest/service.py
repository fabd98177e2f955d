"""`runstream ingest` against Kafka: a worker, its metrics port, signals and logs, from the settings of `config`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import Literal

from .config import IngestSettings, load
from .metrics import serve
from .migration import check
from .store import connect
from .worker import Worker

__all__ = ["configure_logging", "run"]

_log = logging.getLogger(__name__)


def run(settings: IngestSettings | None = None) -> int:
    """Work until SIGTERM or SIGINT, then drain and commit; blocks. Main thread only.

    Returns:
        0 after a signal.

    Raises:
        SettingsError, MigrationError: it cannot start; the message says what to do.
        SystemicFailure, LogError, StoreError: it must not go on; a supervisor may start it again.
    """
    settings = settings or load()
    configure_logging(settings.log_format)
    address = settings.store_address()
    kafka = settings.kafka_address()
    store = connect(address, timeout_seconds=settings.store_timeout_seconds)
    try:
        check(store)
        from .log.kafka import open_kafka

        log, dead_letters = open_kafka(kafka, address.database)
        try:
            return _work(settings, Worker(log, store, dead_letters, settings.worker()), f"{kafka} -> {address}")
        finally:
            dead_letters.close()
            log.close()
    finally:
        store.close()


def _work(settings: IngestSettings, worker: Worker, what: str) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = serve(worker.metrics, worker.trouble, settings.metrics_host, settings.metrics_port)
    try:
        _log.info("ingesting %s; metrics and health on http://%s:%d", what, *server.server_address[:2])
        worker.run(stop)
        _log.info("drained and stopped")
    finally:
        server.shutdown()
        server.server_close()
    return 0


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Log lines of every library to standard error, for a person or as JSON."""
    import structlog

    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # It tells of every reconnection attempt; our own lines say what matters.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
