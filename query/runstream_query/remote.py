"""The store behind a server's SQL port, for readers whose tracking address is the server."""

from __future__ import annotations

from urllib.parse import urlsplit

from runstream.config import Settings
from runstream.remote.connection import RequestError
from runstream.remote.server import server_of

from .errors import StoreUnavailable
from .store import StoreAddress

__all__ = ["RemoteStore"]


class RemoteStore:
    """A `Locator`; nothing here can start the server."""

    def __init__(self, settings: Settings) -> None:
        """Raises:
        SettingsError: the credentials in the environment do not fit.
        """
        self._server = server_of(settings)

    def locate(self, timeout_seconds: float) -> StoreAddress:
        """The SQL port, with the client's own login.

        Raises:
            StoreUnavailable: the server does not answer, refuses the login, or offers no SQL.
        """
        try:
            info = self._server.info(max_age_seconds=0.0, timeout_seconds=min(10.0, timeout_seconds))
        except RequestError as exc:
            raise StoreUnavailable(str(exc)) from exc
        if not info.database:
            raise StoreUnavailable(
                f"{self._server.uri} offers no SQL: whoever runs it sets RUNSTREAM_SERVER_SQL_URI, or this client "
                "reads the store itself with RUNSTREAM_STORE_URI"
            )
        parts = urlsplit(self._server.uri)
        secure = parts.scheme == "https"
        login = self._server.login
        user, password = login.as_password
        return StoreAddress(
            host=parts.hostname or "",
            port=parts.port or (443 if secure else 80),
            user=user,
            password=password,
            database=info.database,
            secure=secure,
            verify=login.verify,
            ca_cert=login.ca_file,
            path=parts.path,
            through_server=True,
        )
