"""What a server says of itself, kept for a while: where log and artifacts are, and what it takes.

One `Server` for each tracking address in a process. Thread-safe; a forked child begins anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from runstream_schemas.delivery import MAX_REQUEST_BYTES, MAX_REQUEST_EVENTS, SERVER_PATH

from ..addresses import PROXY_SCHEME
from ..config import Settings
from .connection import LOOPBACK, Connection
from .login import Login

__all__ = ["Server", "ServerInfo", "host_mark", "server_of"]

INFO_SECONDS: Final = 300.0
MAX_IDLE_CONNECTIONS: Final = 8


def host_mark() -> str:
    """Equal for two processes under one kernel, and no secret."""
    from ..journal.place import this_host

    boot_id = this_host().boot_id
    return hashlib.sha256(f"runstream {boot_id}".encode()).hexdigest()[:32] if boot_id else ""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's own words; what it leaves out is empty. Holds addresses, never credentials."""

    version: str = ""
    authentication: bool = False
    """Whether it asks who somebody is."""
    host: str = ""
    """`host_mark` of its machine."""
    log_uri: str = ""
    """kafka://... or the data directory as file:///...; empty: not told."""
    log_proof: str = ""
    """See `runstream_schemas.place`; of the data directory."""
    artifact_uri: str = ""
    artifact_proof: str = ""
    artifacts_served: bool = False
    """Whether its artifact proxy works."""
    database: str = ""
    """Of its SQL port; empty: SQL is not offered."""
    max_request_bytes: int = MAX_REQUEST_BYTES
    max_request_events: int = MAX_REQUEST_EVENTS
    encodings: tuple[str, ...] = ("identity",)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ServerInfo:
        """From the answer at `SERVER_PATH`; unknown fields are left alone, so that servers may say more."""

        def part(name: str) -> Mapping[str, Any]:
            value = found.get(name)
            return value if isinstance(value, Mapping) else {}

        def text(fields: Mapping[str, Any], name: str) -> str:
            value = fields.get(name)
            return value if isinstance(value, str) else ""

        def number(fields: Mapping[str, Any], name: str, default: int) -> int:
            value = fields.get(name)
            return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default

        log, artifacts, delivery = part("log"), part("artifacts"), part("delivery")
        encodings = delivery.get("encodings")
        return cls(
            version=text(found, "version"),
            authentication=found.get("authentication") is True,
            host=text(found, "host"),
            log_uri=text(log, "uri"),
            log_proof=text(log, "proof"),
            artifact_uri=text(artifacts, "uri").rstrip("/"),
            artifact_proof=text(artifacts, "proof"),
            artifacts_served=artifacts.get("served") is True,
            database=text(part("sql"), "database"),
            max_request_bytes=min(MAX_REQUEST_BYTES, number(delivery, "max_request_bytes", MAX_REQUEST_BYTES)),
            max_request_events=min(MAX_REQUEST_EVENTS, number(delivery, "max_request_events", MAX_REQUEST_EVENTS)),
            encodings=tuple(str(item) for item in encodings) if isinstance(encodings, list) else ("identity",),
        )

    def relative(self, uri: str) -> str | None:
        """Where an artifact address lies below the server's root; None if it does not."""
        if uri.startswith(PROXY_SCHEME):
            return uri.removeprefix(PROXY_SCHEME).strip("/")
        if not self.artifact_uri:
            return None
        if uri == self.artifact_uri:
            return ""
        return uri.removeprefix(self.artifact_uri + "/") if uri.startswith(self.artifact_uri + "/") else None

    def is_here(self, uri: str, proof: str) -> Path | None:
        """The local folder behind a file:/// address of the server, if it is the same folder to this process."""
        from runstream_schemas.place import read_proof

        from ..storage.store import local_path_of

        folder = local_path_of(uri) if uri.startswith("file:") else None
        if folder is None or not proof or read_proof(folder) != proof:
            return None
        return folder


class Server:
    """One server, as this process knows it."""

    def __init__(self, settings: Settings) -> None:
        self.uri = settings.tracking_uri
        self.login = Login.from_environment(self.uri)
        self._lock = threading.Lock()
        self._info: ServerInfo | None = None
        self._read_at = 0.0
        self._idle: list[Connection] = []

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine by its address."""
        return (urlsplit(self.uri).hostname or "") in LOOPBACK

    def info(self, *, max_age_seconds: float = INFO_SECONDS, timeout_seconds: float = 10.0) -> ServerInfo:
        """What the server says of itself; asked again after `max_age_seconds`. Blocks for an answer.

        Raises:
            RequestError: it cannot be asked.
        """
        known = self._info
        if known is not None and time.monotonic() - self._read_at < max_age_seconds:
            return known
        connection = self.connection(timeout_seconds)
        try:
            found = ServerInfo.from_json(connection.request("GET", SERVER_PATH).json())
        finally:
            connection.close()
        self._info, self._read_at = found, time.monotonic()
        return found

    def connection(self, timeout_seconds: float = 30.0) -> Connection:
        """A new connection, for one thread."""
        return Connection(self.uri, self.login, timeout_seconds)

    @contextmanager
    def borrowed(self, timeout_seconds: float = 600.0) -> Iterator[Connection]:
        """A connection for one request or a few, kept open for the next who asks."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self.connection(timeout_seconds)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if len(self._idle) < MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


_servers: dict[tuple[str, Login], Server] = {}
_guard = threading.Lock()


def server_of(settings: Settings) -> Server:
    """The server behind `settings.tracking_uri`; one with other credentials is another.

    Raises:
        SettingsError: the credentials in the environment do not fit.
    """
    key = (settings.tracking_uri, Login.from_environment(settings.tracking_uri))
    with _guard:
        found = _servers.get(key)
        if found is None:
            found = _servers[key] = Server(settings)
        return found


def _after_fork_in_child() -> None:
    global _guard
    _guard = threading.Lock()
    for server in _servers.values():
        for connection in server._idle:
            connection.close()  # the child's copies alone
    _servers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
