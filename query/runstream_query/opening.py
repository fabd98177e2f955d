"""Settings -> `Reader`: decides which store is read, by RUNSTREAM_STORE_URI or the tracking address.

With a server as the address the store is read through the server's SQL port, which waits for the log by itself; the
reader's own wait then finds everything there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from runstream.config import Settings
from runstream_schemas.layout import DataDirectory

from .errors import InvalidQuery
from .local import LocalStore
from .reader import Reader
from .store import Locator, Store, StoreAddress
from .visibility import ClientLog, Patience, Visibility

__all__ = ["open_reader", "open_store"]

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class _Server:
    """A ClickHouse server: there or not, nothing here can start it."""

    def __init__(self, address: StoreAddress) -> None:
        self._address = address

    def locate(self, timeout_seconds: float) -> StoreAddress:
        return self._address


def open_reader(settings: Settings, *, patience: Patience | None = None) -> Reader:
    """The reader of `settings`. Connects, and starts a local store process, at the first read only.

    Args:
        patience: how long a read waits for what was logged before it; 10 s without progress by default.

    Raises:
        InvalidQuery: the store's address does not fit, or there is none.
    """
    locator = _locator(settings)
    store = Store(locator)
    log = ClientLog(settings)

    def trouble() -> str | None:
        said = locator.status().get("trouble") if isinstance(locator, LocalStore) else None
        return str(said) if said else None

    return Reader(store, log, Visibility(store, log, patience=patience, trouble=trouble))


def open_store(settings: Settings) -> Store:
    """The store of `settings` alone, without waiting for the log."""
    return Store(_locator(settings))


def _locator(settings: Settings) -> Locator:
    uri = settings.store_uri
    if uri is None:
        directory = settings.data_directory
        if settings.scheme == "http":
            from .remote import RemoteStore

            return RemoteStore(settings)
        if directory is None:
            raise InvalidQuery(
                f"where to read {settings.tracking_uri} is not known: set RUNSTREAM_STORE_URI to "
                "clickhouse://user:password@host:8443/database?secure=true, or to the data directory of a local store"
            )
        return LocalStore(directory, settings.artifact_root)
    if uri.startswith("clickhouse:"):
        return _Server(StoreAddress.parse(uri))
    if uri.startswith("file:"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise InvalidQuery("RUNSTREAM_STORE_URI: write file:///absolute/dir")
        return LocalStore(DataDirectory(Path(unquote(parts.path)).absolute()), settings.artifact_root)
    if _SCHEME.match(uri):
        raise InvalidQuery(
            f"RUNSTREAM_STORE_URI has the unknown scheme {uri.partition(':')[0]!r}: give "
            "clickhouse://user:password@host:8123/database or a data directory"
        )
    return LocalStore(DataDirectory(Path(uri).expanduser().absolute()), settings.artifact_root)
