"""Delivery: parcels of a journal's source to the transport, acknowledgements back. One `Pump` per journal.

A pump is driven by one thread, step by step, and never blocks for long. Trouble is counted, kept for the report,
logged once per outage, and answered with a later try for ever: nothing is given up but what the log will never take.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from runstream_schemas.identity import now_ms
from runstream_schemas.names import Stream
from runstream_schemas.segment import encode_frame

from .config import Settings
from .journal.source import Parcel, Source, joined
from .transport import Event, Positions, Receipt, Transport, TransportError

__all__ = ["BUSY_CHUNK_BYTES", "DRAIN_CHUNK_BYTES", "Pump", "Tally", "importing", "open_transport"]

BUSY_CHUNK_BYTES: Final = 256 * 32
"""Encoding holds the GIL: 256 points and a pause of 1 ms keep what training sees below 1 ms (research: journal.md)."""
DRAIN_CHUNK_BYTES: Final = 1024 * 32
"""Where nobody trains: the size of body that is cheapest to ingest."""
MAX_IN_FLIGHT_BYTES: Final = 8 * 1024 * 1024
MAX_IN_FLIGHT_BUNDLES: Final = 64
BUNDLE_PARCELS: Final = 16
BUNDLE_BYTES: Final = 512 * 1024
"""What is encoded piece by piece is sent together: each system call of a send gives the GIL away, and getting it back
from a busy training loop takes up to 5 ms."""
FIRST_RETRY_SECONDS: Final = 0.1
MAX_RETRY_SECONDS: Final = 5.0

log = logging.getLogger("runstream")
importing = threading.RLock()
"""Held while the delivery thread imports: a fork in the middle would leave the child a half-imported module for ever.
"""


def open_transport(settings: Settings) -> Transport:
    """The transport behind the tracking address.

    Raises:
        TransportError: it cannot be had now.
    """
    scheme = settings.scheme
    with importing:
        if scheme == "file":
            from .transport.directory import DirectoryTransport

            data = settings.data_directory
            assert data is not None  # what the scheme says
            return DirectoryTransport(data.log)
        if scheme == "memory":
            from .transport.memory import MemoryTransport

            return MemoryTransport.named(settings.tracking_uri)
        if scheme == "kafka":
            # By name: what it needs is imported with it, and only where it is used.
            kafka = importlib.import_module(".transport.kafka", __package__)
        if scheme == "http":
            remote = importlib.import_module(".transport.server", __package__)
    transport: Transport = (
        kafka.open_kafka(settings.tracking_uri) if scheme == "kafka" else remote.open_server(settings)
    )
    return transport


@dataclass(slots=True)
class Tally:
    """Counts since the recorder began; guarded by `lock`."""

    delivered_points: int = 0
    delivered_events: int = 0
    dropped_points: int = 0
    refused_events: int = 0
    thinned: Counter[str] = field(default_factory=Counter)
    """Points left out per run id."""
    positions: dict[tuple[Stream, int], int] = field(default_factory=dict)
    last_error: str | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Reentrant, for a signal handler may report too."""


class Pump:
    """Moves one journal's parcels; see the module."""

    def __init__(
        self,
        source: Source,
        tally: Tally,
        *,
        refuse: Callable[[str, bytes], None],
        delivered: Callable[[Parcel], None] = lambda parcel: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            refuse: keeps a body that the log will never take: (file name, frame).
            delivered: told of each acknowledged parcel.
        """
        self.source = source
        self.tally = tally
        self._refuse = refuse
        self._delivered = delivered
        self._monotonic = monotonic
        self._in_flight: deque[tuple[Receipt, Parcel]] = deque()
        self._in_flight_bytes = 0
        self._bundle: list[Parcel] = []
        self._bundle_bytes = 0
        self._failures = 0
        self._retry_at = 0.0
        self._left_alone_until = 0.0
        self._singles = False
        """After a refusal: events go one by one until the refused one is found."""

    @property
    def retry_in_seconds(self) -> float:
        """How long this pump rests after a failure."""
        return max(0.0, max(self._retry_at, self._left_alone_until) - self._monotonic())

    def retry_now(self) -> None:
        """Do not rest any longer: somebody waits. What the other end asked for is kept."""
        self._retry_at = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether events were sent that are not acknowledged yet."""
        return bool(self._in_flight)

    def step(self, connect: Callable[[], Transport], chunk_bytes: int, wait_seconds: float = 0.0) -> bool:
        """Collect acknowledgements, then encode one parcel or send what is encoded; whether anything moved.

        Args:
            connect: gives the transport; may raise TransportError.
            chunk_bytes: records to encode at a time.
            wait_seconds: how long to wait for an acknowledgement where nothing can be sent.
        """
        moved = self._collect(0.0)
        if self.retry_in_seconds > 0.0:
            return moved
        if self._in_flight_bytes < MAX_IN_FLIGHT_BYTES and len(self._in_flight) < MAX_IN_FLIGHT_BUNDLES:
            parcel = self._next(chunk_bytes)
            if parcel is not None:
                self._bundle.append(parcel)
                self._bundle_bytes += parcel.bytes
                if len(self._bundle) < BUNDLE_PARCELS and self._bundle_bytes < BUNDLE_BYTES:
                    return True
            if self._bundle:
                return self._send(connect, self._take_bundle()) or moved
        if self._in_flight and not moved and wait_seconds > 0.0:
            moved = self._collect(wait_seconds)
        return moved

    def forget_in_flight(self) -> None:
        """The transport is gone: what is not acknowledged will be sent again."""
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._bundle, self._bundle_bytes = [], 0
        self.source.rewind()

    def _take_bundle(self) -> Parcel:
        bundle, self._bundle, self._bundle_bytes = self._bundle, [], 0
        return bundle[0] if len(bundle) == 1 else joined(bundle)

    def _next(self, chunk_bytes: int) -> Parcel | None:
        try:
            return self.source.next_parcel(chunk_bytes)
        except OSError as exc:
            self._failed(f"the journal cannot be read: {exc}")
            return None

    def _send(self, connect: Callable[[], Transport], parcel: Parcel) -> bool:
        try:
            transport = connect()
            if self._singles:
                self._send_one_by_one(transport, parcel)
                return True
            receipt = transport.send(parcel.events)
        except TransportError as exc:
            self._fail(exc)
            return False
        self._in_flight.append((receipt, parcel))
        self._in_flight_bytes += parcel.bytes
        return True

    def _collect(self, wait_seconds: float) -> bool:
        moved = False
        while self._in_flight:
            receipt, parcel = self._in_flight[0]
            try:
                positions = receipt.result(0.0 if moved else wait_seconds)
            except TransportError as exc:
                self._fail(exc)
                return moved
            except TimeoutError:
                return moved
            self._in_flight.popleft()
            self._in_flight_bytes -= parcel.bytes
            self._acknowledged(parcel, len(parcel.events), positions)
            moved = True
        return moved

    def _acknowledged(self, parcel: Parcel, events: int, positions: Positions) -> None:
        self.source.acknowledge(parcel)
        tally = self.tally
        with tally.lock:
            tally.delivered_points += parcel.points
            tally.delivered_events += events
            _merge(tally.positions, positions)
        if self._failures:
            log.warning("runstream: delivery works again")
            self._failures = 0
        self._delivered(parcel)

    def _send_one_by_one(self, transport: Transport, parcel: Parcel) -> None:
        """Find the event that is refused, keep it aside, and go on with the rest."""
        sent = 0
        positions: dict[tuple[Stream, int], int] = {}
        for event in parcel.events:
            try:
                receipt = transport.send([event])
                _merge(positions, _result(receipt, self._monotonic))
                sent += 1
            except TransportError as exc:
                if exc.retryable:
                    raise
                self._refused(event, exc)
        self._singles = False
        self._acknowledged(parcel, sent, positions)

    def _refused(self, event: Event, exc: TransportError) -> None:
        name = f"{now_ms()}-{os.urandom(4).hex()}.frame"
        self._refuse(name, encode_frame(now_ms(), event.fingerprint, event.key, event.body))
        with self.tally.lock:
            self.tally.refused_events += 1
            self.tally.last_error = str(exc)
        log.error("runstream: the log refuses an event of %s for good (%s); kept aside as %s", event.key, exc, name)

    def _fail(self, exc: TransportError) -> None:
        self.forget_in_flight()
        if not exc.retryable:
            self._singles = True
            return
        self._failed(str(exc), exc.retry_after_seconds)

    def _failed(self, message: str, rest_seconds: float | None = None) -> None:
        with self.tally.lock:
            self.tally.last_error = message
        if not self._failures:
            log.warning(
                "runstream: delivery fails (%s). Logging goes on; the journal keeps everything and it is sent later.",
                message,
            )
        delay = min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(self._failures, 10))
        self._failures += 1
        # Jitter, so that a thousand clients do not come back in the same instant.
        jitter = os.urandom(1)[0] / 512
        self._retry_at = self._monotonic() + delay * (0.5 + jitter)
        if rest_seconds is not None:
            # Never earlier than asked for, and not all at once.
            self._left_alone_until = self._monotonic() + rest_seconds * (1.0 + jitter) + delay * jitter


def _result(receipt: Receipt, monotonic: Callable[[], float]) -> Positions:
    deadline = monotonic() + 30.0
    while True:
        try:
            return receipt.result(1.0)
        except TransportError:
            raise
        except TimeoutError as exc:
            if monotonic() >= deadline:
                raise TransportError("no acknowledgement within 30 s", retryable=True) from exc


def _merge(into: dict[tuple[Stream, int], int], positions: Positions) -> None:
    for place, offset in positions.items():
        if offset > into.get(place, 0):
            into[place] = offset
