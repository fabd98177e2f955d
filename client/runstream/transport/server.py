"""A server as the log: straight to where it keeps its events if this process can get there, through the server if not.

The first `send` asks the server where that is and tries it, in a thread of its own, so that a name server or broker
that does not answer costs seconds once and blocks nobody. Both ways lead into the same log, and the store absorbs what
arrives by both, so changing over in the middle loses and doubles nothing.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runstream_schemas.names import EventName, Stream

from ..config import Settings
from ..errors import RunstreamError
from ..remote.connection import RequestError
from ..remote.server import Server, ServerInfo, host_mark, server_of
from . import Event, Positions, Receipt, Transport, TransportError
from .http import HttpTransport

__all__ = ["ServerTransport", "direct_transport", "open_server"]

SEND_WAIT_SECONDS: Final = 4.0
"""How long a `send` waits for the first look; below the 5 seconds that it may block."""
BROKER_SECONDS: Final = 2.0
KAFKA_SECONDS: Final = 5.0
LOOK_AGAIN_SECONDS: Final = 300.0
"""After so long on the way through the server, the direct one is tried again."""
FAILURES: Final = 3
"""Failures of the direct way in a row, after which it is left for `LOOK_AGAIN_SECONDS`."""
ADMINISTRATIVE: Final[frozenset[EventName]] = frozenset({"purged", "experiment_updated"})
"""Events that go through a server with authentication even where the log can be reached."""

log = logging.getLogger("runstream")


def open_server(settings: Settings) -> ServerTransport:
    """The transport for an http(s) tracking address; asks nothing yet.

    Raises:
        TransportError: the credentials in the environment do not fit.
    """
    try:
        return ServerTransport(settings, server_of(settings))
    except RunstreamError as exc:
        raise TransportError(str(exc), retryable=True) from exc


def direct_transport(info: ServerInfo) -> tuple[Transport | None, str]:
    """The transport to the server's own log, tried out; or None. And why, for people. Blocks for some seconds."""
    if info.log_uri.startswith("kafka:"):
        return _kafka(info.log_uri)
    if not info.log_uri.startswith("file:"):
        return None, "the server does not tell where its log is"
    folder = info.is_here(info.log_uri, info.log_proof)
    if folder is None or not info.host or info.host != host_mark():
        return None, "the server's data directory lies on another machine"
    if not os.access(folder / "log", os.W_OK):
        return None, f"{folder} may not be written by this user"
    from runstream_schemas.layout import DataDirectory

    from .directory import DirectoryTransport

    return DirectoryTransport(DataDirectory(folder).log), f"straight to {folder}"


def _kafka(uri: str) -> tuple[Transport | None, str]:
    from runstream_schemas.kafka_address import KafkaAddress

    from .kafka import open_kafka

    try:
        brokers = KafkaAddress.parse(uri).brokers
        if not any(_listens(broker) for broker in brokers):
            return None, f"Kafka at {','.join(brokers)} cannot be reached from here"
        transport = open_kafka(uri)
    except ValueError as exc:
        return None, f"Kafka cannot be used from here: {exc}"
    try:
        transport.end_positions(KAFKA_SECONDS)
    except Exception as exc:
        transport.close(0.5)
        return None, f"Kafka at {','.join(brokers)} does not let this client in: {exc}"
    return transport, f"straight to {uri}"


def _listens(broker: str) -> bool:
    host, _, port = broker.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), BROKER_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Route:
    info: ServerInfo
    direct: Transport | None
    why: str


class _Look(threading.Thread):
    """One try to find the way."""

    def __init__(self, settings: Settings, server: Server) -> None:
        super().__init__(name="runstream-look", daemon=True)
        self._settings = settings
        self._server = server
        self.route: _Route | None = None
        self.failure: TransportError | None = None

    def run(self) -> None:
        from ..delivery import importing

        try:
            info = self._server.info(max_age_seconds=5.0)
            if self._settings.delivery == "server":
                self.route = _Route(info, None, "RUNSTREAM_DELIVERY=server")
                return
            with importing:  # all that the look needs: a fork must not find it half imported
                _load(info)
            self.route = _Route(info, *direct_transport(info))
        except RequestError as exc:
            self.failure = TransportError(str(exc), retryable=True, retry_after_seconds=exc.retry_after_seconds)
        except Exception as exc:
            self.failure = TransportError(f"{self._server.uri}: {type(exc).__name__}: {exc}", retryable=True)


class ServerTransport:
    """A `Transport`; see the module. `send` belongs to one thread."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self._settings = settings
        self._server = server
        self._post = HttpTransport(server)
        self._route: _Route | None = None
        self._look: _Look | None = None
        self._looked_at = 0.0
        self._failures = 0
        self._old: list[Transport] = []

    def __repr__(self) -> str:
        return f"ServerTransport({self._server.uri!r})"

    def send(self, events: Sequence[Event]) -> Receipt:
        route = self._current()
        if route.direct is None:
            return self._post.send(events)
        posted: list[Event] = []
        if route.info.authentication:
            posted = [event for event in events if _name(event) in ADMINISTRATIVE]
        straight = [event for event in events if event not in posted] if posted else events
        receipts: list[Receipt] = []
        if posted:
            receipts.append(self._post.send(posted))
        if straight:
            try:
                receipts.append(_Direct(self, route.direct.send(straight)))
            except TransportError as exc:
                self.failed(exc)
                raise
        return receipts[0] if len(receipts) == 1 else _All(receipts)

    def sync(self) -> None:
        """Where events go straight to a directory, as its transport does it."""
        if self._route is not None and self._route.direct is not None:
            self._route.direct.sync()

    def end_positions(self, timeout_seconds: float) -> Positions:
        """As the server sees its log."""
        return self._post.end_positions(timeout_seconds)

    def close(self, timeout_seconds: float) -> None:
        route, self._route = self._route, None
        self._post.close(timeout_seconds)
        for transport in [*self._old, *([route.direct] if route is not None and route.direct is not None else [])]:
            transport.close(timeout_seconds)
        self._old.clear()

    @property
    def way(self) -> str:
        """Where events go now, for people."""
        if self._route is None:
            return "not known yet"
        return self._route.why if self._route.direct is not None else f"through {self._server.uri} ({self._route.why})"

    def succeeded(self) -> None:
        """An event went straight."""
        self._failures = 0

    def failed(self, exc: TransportError) -> None:
        """The direct way failed; after some failures in a row the server takes over."""
        if not exc.retryable:
            return
        self._failures += 1
        route = self._route
        if self._failures >= FAILURES and route is not None and route.direct is not None:
            log.info("runstream: events go through %s from now on: %s", self._server.uri, exc)
            self._failures = 0
            self._change(_Route(route.info, None, f"the direct way failed: {exc}"))
            self._looked_at = time.monotonic()

    def _current(self) -> _Route:
        route = self._route
        if self._look is None and self._should_look(route):
            self._start_look()
        look = self._look
        if look is not None:
            if route is None:
                look.join(SEND_WAIT_SECONDS)
            if not look.is_alive():
                self._look = None
                if look.route is not None:
                    return self._change(look.route)
                if route is None and look.failure is not None:
                    raise look.failure
        if route is None:
            raise TransportError(f"{self._server.uri} has not answered yet", retryable=True)
        return route

    def _should_look(self, route: _Route | None) -> bool:
        if route is None:
            return True
        may_change = route.direct is None and self._settings.delivery != "server"
        return may_change and time.monotonic() - self._looked_at > LOOK_AGAIN_SECONDS

    def _start_look(self) -> None:
        self._looked_at = time.monotonic()
        look = _Look(self._settings, self._server)
        try:
            look.start()
        except RuntimeError as exc:  # the interpreter is going down
            raise TransportError(f"no thread can be started any more: {exc}", retryable=True) from exc
        self._look = look

    def _change(self, route: _Route) -> _Route:
        before, self._route = self._route, route
        if before is not None and before.direct is not None:
            self._old.append(before.direct)  # its receipts may still be waited for
        info = route.info
        self._post.limit(info.max_request_bytes, info.max_request_events, info.encodings)
        log.info("runstream: events go %s", self.way)
        return route


class _Direct:
    """A receipt of the direct way, which tells how it went."""

    def __init__(self, owner: ServerTransport, receipt: Receipt) -> None:
        self._owner = owner
        self._receipt = receipt

    def result(self, timeout_seconds: float) -> Positions:
        """See `Receipt`."""
        try:
            positions = self._receipt.result(timeout_seconds)
        except TransportError as exc:
            self._owner.failed(exc)
            raise
        self._owner.succeeded()
        return positions


class _All:
    """Several receipts as one."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self._receipts = receipts

    def result(self, timeout_seconds: float) -> Positions:
        """See `Receipt`."""
        deadline = time.monotonic() + timeout_seconds
        found: dict[tuple[Stream, int], int] = {}
        for receipt in self._receipts:
            found.update(receipt.result(max(0.0, deadline - time.monotonic())))
        return found


def _load(info: ServerInfo) -> None:
    names = ["..journal.place", "..storage.store", ".directory", "runstream_schemas.place"]
    if info.log_uri.startswith("kafka:"):
        names.append(".kafka")
    for name in names:
        importlib.import_module(name, __package__)


def _name(event: Event) -> EventName | None:
    from runstream_schemas import codec

    schema = codec.schemas().get(event.fingerprint)
    return None if schema is None else schema.event
