"""HTTP to one server over kept-alive connections, with `http.client`: requests, answers, and errors for people.

Everything that it needs is imported with it: threads use it, and none may import while another thread forks. Redirects
are not followed: credentials go to the address that was given and to no other.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPResponse
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

from runstream_schemas.delivery import CLIENT_HEADER

from ..errors import UnavailableError
from .login import Login

__all__ = ["LOOPBACK", "Answer", "Connection", "RequestError", "Upload"]

MAX_RETRY_AFTER_SECONDS: Final = 300.0
MAX_ANSWER_BYTES: Final = 64 << 20
"""A larger answer is not read into memory."""
LOGIN_RETRY_SECONDS: Final = 30.0
"""Pause after a refused login: nobody mends it within a second."""
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


class RequestError(UnavailableError):
    """The server was not reached, or it refused; says what to do."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_seconds: float | None = None,
        refused: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None where there was no answer."""
        self.retry_after_seconds = retry_after_seconds
        self.refused = dict(refused or {})
        """Index of an event in the request -> why it can never be taken."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; empty where it is none."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


class Connection:
    """One connection to one server, opened when needed. One thread at a time."""

    def __init__(self, uri: str, login: Login, timeout_seconds: float = 30.0, connect_seconds: float = 5.0) -> None:
        """
        Args:
            uri: http(s)://host[:port][/prefix].
            timeout_seconds: longest silence of the server within one answer.
        """
        parts = urlsplit(uri)
        self.uri = uri
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/")
        self._login = login
        self._timeout_seconds = timeout_seconds
        self._connect_seconds = connect_seconds
        self._absolute = False
        """A plain proxy stands between: the request line holds the whole URL."""
        self._proxy_headers: dict[str, str] = {}
        self._open: HTTPConnection | None = None
        self._fresh = True

    def __repr__(self) -> str:
        return f"Connection({self.uri!r})"

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer with a status below 300. May send twice, if the server has closed an idle connection.

        Raises:
            RequestError: no answer, or another status.
        """
        with self.answering(method, path, body=body, headers=headers, query=query) as response:
            try:
                content = response.read(MAX_ANSWER_BYTES)
            except Exception as exc:
                self.close()
                raise self._away(exc) from exc
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

    @contextlib.contextmanager
    def answering(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Iterator[HTTPResponse]:
        """`request` with the body of the answer still to be read."""
        response = self._exchange(method, path, body, headers or {}, query or {})
        try:
            self._raise_for(response, path)
            yield response
        finally:
            if response.will_close or not response.isclosed():  # nor is one used again whose answer was not read
                self.close()

    def upload(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Upload:
        """Begin a request whose body is written piece by piece; on a connection of its own."""
        self.close()
        connection = self._connect()
        try:
            connection.putrequest(method, self._target(path, {}))
            for name, value in {**self._headers(), **(headers or {}), "Transfer-Encoding": "chunked"}.items():
                connection.putheader(name, value)
            connection.endheaders()
        except Exception as exc:
            self.close()
            raise self._away(exc) from exc
        return Upload(self, connection, path)

    def close(self) -> None:
        """Close it; the next request opens another."""
        connection, self._open = self._open, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], query: Mapping[str, str]
    ) -> HTTPResponse:
        while True:
            connection = self._connect()
            fresh, self._fresh = self._fresh, False
            try:
                try:
                    connection.request(method, self._target(path, query), body, {**self._headers(), **headers})
                except (BrokenPipeError, ConnectionResetError):
                    if body is None or not fresh:
                        raise  # else it may have refused in the middle of the body: its answer says why
                return connection.getresponse()
            except Exception as exc:
                self.close()
                # A server closes idle connections, and one that was restarted knows none of them.
                if fresh or isinstance(exc, TimeoutError):
                    raise self._away(exc) from exc

    def _headers(self) -> dict[str, str]:
        own = {"User-Agent": "runstream", "Accept": "application/json", CLIENT_HEADER: "1"}
        return {**own, **self._login.headers(), **self._proxy_headers}

    def _target(self, path: str, query: Mapping[str, str]) -> str:
        target = f"{self._prefix}{quote(path)}" + (f"?{urlencode(query)}" if query else "")
        if self._absolute:
            host = f"[{self._host}]" if ":" in self._host else self._host
            return f"http://{host}:{self._port}{target}"
        return target

    def _connect(self) -> HTTPConnection:
        if self._open is not None:
            return self._open
        proxy = _proxy("https" if self._secure else "http", self._host)
        host, port, login = proxy if proxy is not None else (self._host, self._port, {})
        connection: HTTPConnection
        try:
            if self._secure:
                connection = http.client.HTTPSConnection(
                    host, port, timeout=self._connect_seconds, context=self._login.tls()
                )
                if proxy is not None:
                    connection.set_tunnel(self._host, self._port, login)
            else:
                self._absolute, self._proxy_headers = proxy is not None, login
                connection = http.client.HTTPConnection(host, port, timeout=self._connect_seconds)
            connection.connect()
        except UnavailableError:
            raise
        except (OSError, http.client.HTTPException) as exc:
            raise self._away(exc) from exc
        connection.sock.settimeout(self._timeout_seconds)
        self._open, self._fresh = connection, True
        return connection

    def _raise_for(self, response: HTTPResponse, path: str) -> None:
        status = response.status
        if status < 300:
            return
        headers = {name.lower(): value for name, value in response.getheaders()}
        try:
            body = response.read(1 << 20)
        except Exception:
            body = b""
        said = Answer(status, headers, body).json()
        message = str(said.get("message") or "")[:1_000]
        raise RequestError(
            self._explain(status, message, path, headers.get("location", "")),
            status=status,
            retry_after_seconds=_retry_after(headers.get("retry-after"), status),
            refused=_refused(said),
        )

    def _explain(self, status: int, message: str, path: str, location: str) -> str:
        if status == 401:
            if self._login.given:
                return f"{self.uri} refuses this login: renew RUNSTREAM_TRACKING_TOKEN, or user and password"
            return (
                f"{self.uri} wants a login: set RUNSTREAM_TRACKING_TOKEN, or RUNSTREAM_TRACKING_USERNAME and "
                "RUNSTREAM_TRACKING_PASSWORD"
            )
        if status == 403:
            return f"{self.uri} does not permit it: {message or 'ask who runs it for the role write'}"
        if 300 <= status < 400:
            return f"{self.uri} answers {status} and points to {location or 'another place'}: use that address"
        if status == 404 and path.startswith("/api/runstream/"):
            return (
                f"{self.uri} answers, but knows no {path}: check the address and the path prefix; it must be a "
                "runstream server of this version or a later one"
            )
        return f"{self.uri} answers {status}" + (f": {message}" if message else "")

    def _away(self, exc: BaseException) -> RequestError:
        if isinstance(exc, RequestError):
            return exc
        if isinstance(exc, ssl.SSLCertVerificationError):
            return RequestError(
                f"{self.uri} shows a certificate that is not trusted ({exc.verify_message}): name its authority in "
                "RUNSTREAM_TRACKING_CA_FILE"
            )
        reason = str(exc) or type(exc).__name__
        if isinstance(exc, TimeoutError):
            reason = "no answer in time"
        return RequestError(f"{self.uri} cannot be reached: {reason}")


class Upload:
    """A request body on its way."""

    def __init__(self, owner: Connection, connection: HTTPConnection, path: str) -> None:
        self._owner = owner
        self._connection = connection
        self._path = path

    def write(self, data: bytes) -> int:
        """Send a piece; blocks while the server is slow.

        Raises:
            RequestError: the server refused in the middle, or is gone.
        """
        if data:
            try:
                self._connection.send(b"%x\r\n%b\r\n" % (len(data), data))
            except Exception as exc:
                self._fail(exc)
        return len(data)

    def finish(self) -> None:
        """Send the end and wait until the server has all of it.

        Raises:
            RequestError: it does not take it.
        """
        try:
            self._connection.send(b"0\r\n\r\n")
            response = self._connection.getresponse()
        except Exception as exc:
            self._fail(exc)
        else:
            try:
                self._owner._raise_for(response, self._path)
                response.read()
            finally:
                self._owner.close()

    def abort(self) -> None:
        """Break off: the server keeps nothing of it."""
        self._owner.close()

    def _fail(self, exc: BaseException) -> None:
        try:
            # A server that refuses says why before it closes.
            self._owner._raise_for(self._connection.getresponse(), self._path)
        except RequestError:
            raise
        except Exception:
            pass
        finally:
            self._owner.close()
        raise self._owner._away(exc) from exc


def _refused(said: Mapping[str, Any]) -> dict[int, str]:
    found = {}
    for entry in said.get("refused") or ():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[int(entry["index"])] = str(entry["reason"])[:500]
    return found


def _retry_after(text: str | None, status: int) -> float | None:
    if text is None:
        return LOGIN_RETRY_SECONDS if status in (401, 403) else None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)


def _proxy(scheme: str, host: str) -> tuple[str, int, dict[str, str]] | None:
    """(host, port, headers) of the proxy that the environment names for this host; loopback needs none."""
    if host in LOOPBACK or not any(f"{scheme}_proxy" == name.lower() for name in os.environ):
        return None
    uri = getproxies().get(scheme)
    if not uri or proxy_bypass(host):
        return None
    parts = urlsplit(uri if "://" in uri else f"http://{uri}")
    headers = {}
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair).decode("ascii")
    return parts.hostname or "", parts.port or 80, headers
