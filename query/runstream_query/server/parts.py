"""The server's connections to the world, opened for one set of settings: log, store, artifacts."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from runstream.addresses import artifact_root
from runstream.config import Settings
from runstream.delivery import open_transport
from runstream.errors import RunstreamError, SettingsError
from runstream.transport import Positions, Transport, TransportError
from runstream_query.api.artifact_root import ArtifactRoot
from runstream_query.local import LocalStore
from runstream_query.store import Locator, StoreAddress

from .reading import StoreReading, open_reading
from .settings import ServerSettings

logger = logging.getLogger("runstream.server")


class LogEnds:
    """Asks where the log ends, over a transport of its own: the appender's belongs to the appender, and a lock that two
    threads hold through the same open file keeps neither of them out. Any thread."""

    def __init__(self, addresses: Settings) -> None:
        self._addresses = addresses
        self._lock = threading.Lock()
        self._transport: Transport | None = None

    def read(self, timeout_seconds: float = 5.0) -> Positions:
        """Where the log ends now; blocks at most about `timeout_seconds`.

        Raises:
            TransportError: the log cannot be reached.
        """
        with self._lock:
            if self._transport is None:
                self._transport = open_transport(self._addresses)
            return self._transport.end_positions(timeout_seconds)

    def close(self) -> None:
        """Release the transport."""
        with self._lock:
            transport, self._transport = self._transport, None
            if transport is not None:
                transport.close(1.0)


@dataclass(slots=True)
class Parts:
    """Everything that must be closed again."""

    addresses: Settings
    transport: Transport
    ends: LogEnds
    reading: StoreReading
    artifacts: ArtifactRoot
    spool_folder: Path | None
    immediate: bool
    """The transport acknowledges within `send`."""
    sql: Locator | None
    """The store that answers SQL over HTTP, with a reader's rights; None where that is not offered."""
    local: LocalStore | None
    """The local store process that is read; None where it is a ClickHouse server."""

    def warm(self) -> None:
        """Bring the store up, so that the first request does not wait for it; trouble is told and left to requests."""
        try:
            self.reading.rows("SELECT 1", {}, ())
        except Exception as exc:
            logger.warning("the store does not answer yet: %s", exc)

    def keep_store(self) -> None:
        """Let a local store process know that somebody still needs it: it leaves after a minute without requests, and
        the next reader would wait for its start. One that is gone is left to the next request. Blocks."""
        if self.local is not None:
            with contextlib.suppress(OSError):
                self.local.status()

    def problems(self) -> list[str]:
        """What keeps the server from serving now, for people. Blocks."""
        found = []
        try:
            self.ends.read(2.0)
        except (TransportError, OSError) as exc:
            found.append(f"event log: {exc}")
        try:
            self.reading.rows("SELECT 1", {}, ())
        except RunstreamError as exc:
            found.append(f"store: {exc}")
        return found

    def close(self) -> None:
        """Close the store's connection; the transport is closed by its appender."""
        self.reading.close()
        self.ends.close()


def client_settings(settings: ServerSettings) -> Settings:
    """The addresses, from the command line or RUNSTREAM_* variables.

    Raises:
        SettingsError: the tracking address is itself a server.
    """
    found = Settings.from_environment(tracking_uri=settings.tracking_uri)
    if found.scheme == "http":
        raise SettingsError(
            f"{found.tracking_uri} is a server itself: give `runstream server` a data directory or kafka://host:9092/PREFIX"
        )
    return found


class _Fixed:
    """A ClickHouse server at a fixed address."""

    def __init__(self, address: StoreAddress) -> None:
        self._address = address

    def locate(self, timeout_seconds: float) -> StoreAddress:
        return self._address


def _local_store(addresses: Settings) -> LocalStore | None:
    directory = addresses.data_directory
    if directory is None or addresses.store_uri is not None:
        return None
    return LocalStore(directory, addresses.artifact_root)


def open_parts(settings: ServerSettings) -> Parts:
    """Open the connections; the store is reached for at the first read."""
    addresses = client_settings(settings)
    root = artifact_root(addresses)
    local = _local_store(addresses)
    spool: Path | None = None
    directory = addresses.data_directory
    if directory is not None:
        directory.artifacts.mkdir(parents=True, exist_ok=True)

    return Parts(
        addresses=addresses,
        transport=open_transport(addresses),
        ends=LogEnds(addresses),
        reading=open_reading(addresses),
        artifacts=ArtifactRoot(root.rstrip("/"), served=settings.serve_artifacts),
        spool_folder=spool,
        immediate=directory is not None,
        # Never the credentials of RUNSTREAM_STORE_URI, which may be able to write.
        sql=local if settings.sql_uri is None else _Fixed(StoreAddress.parse(settings.sql_uri)),
        local=local,
    )


__all__ = ["LogEnds", "Parts", "client_settings", "open_parts"]
