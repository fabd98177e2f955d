"""The connection: statements over ClickHouse's HTTP interface, whichever end answers. The only door to the driver.

Knows no tables. Results come as tuples, bytes, DataFrames or Arrow tables; every error of the driver leaves as ours.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast
from urllib.parse import parse_qs, unquote, urlsplit

from runstream_schemas.names import DATABASE

from .errors import InvalidQuery, QueryError, QueryTimeout, SqlError, StoreBusy, StoreUnavailable

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from clickhouse_connect.driver.client import Client

__all__ = ["MAX_URL_BYTES", "Limits", "Locator", "Parameter", "Store", "StoreAddress"]

T = TypeVar("T")
Parameter = str | int | float | Sequence[str] | Sequence[int]
"""A value for a `{name:Type}` placeholder; a sequence for an array."""

MAX_URL_BYTES: Final = 12_000
"""Parameters travel in the URL up to this size, which proxies take; larger ones as text that cannot be SQL."""
MAX_STATEMENT_BYTES: Final = 250_000
"""ClickHouse refuses to parse more than 256 KiB (max_query_size)."""
_CONNECT_TIMEOUT_SECONDS: Final = 10
_PLACEHOLDER: Final = re.compile(r"\{(\w+):\s*([^{}]+?)\s*\}")

_SEPARATORS: Final = [chr(code) for code in range(32)]
"""Characters that may part the elements of a list."""

_TIMEOUT_CODES: Final = frozenset({159, 209})
_BUSY_CODES: Final = frozenset({202, 236, 241, 252, 439})
_REFUSED_LOGIN_CODES: Final = frozenset({192, 193, 194, 516})


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the store answers. Secrets stay out of `repr`."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str = DATABASE
    secure: bool = False
    verify: bool = True
    """Check the server's certificate."""
    ca_cert: str | None = None
    """PEM file with the authorities to trust; None: the system's."""
    path: str = ""
    """Path prefix before ClickHouse's own paths, such as a server has behind a proxy."""
    through_server: bool = False
    """A `runstream server` passes the statements on, over a network."""

    @classmethod
    def parse(cls, uri: str) -> StoreAddress:
        """`clickhouse://user:password@host:port/database?secure=true[&verify=false][&ca_cert=FILE]`.

        The port defaults to 8123, with secure=true to 8443; user to `default`, database to `runstream`.

        Raises:
            InvalidQuery: another form; says which part, and never shows the password.
        """
        example = "clickhouse://user:password@host:8443/database?secure=true"
        try:
            parts = urlsplit(uri)
            port = parts.port
            query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError as exc:
            reason = "its port or its options are malformed"
            raise InvalidQuery(f"RUNSTREAM_STORE_URI: {reason}; expected {example}") from exc
        if parts.scheme != "clickhouse" or not parts.hostname:
            raise InvalidQuery(f"RUNSTREAM_STORE_URI names no ClickHouse server; expected {example}")
        unknown = query.keys() - {"secure", "verify", "ca_cert"}
        if unknown:
            raise InvalidQuery(f"RUNSTREAM_STORE_URI has the unknown option {min(unknown)!r}; expected {example}")
        secure = _flag(query, "secure", False)
        return cls(
            host=parts.hostname,
            port=port or (8443 if secure else 8123),
            user=unquote(parts.username or "default"),
            password=unquote(parts.password or ""),
            database=unquote(parts.path.strip("/")) or DATABASE,
            secure=secure,
            verify=_flag(query, "verify", True),
            ca_cert=query["ca_cert"][-1] if "ca_cert" in query else None,
        )


class Locator(Protocol):
    """Says where the store is, and brings it back when it is gone."""

    def locate(self, timeout_seconds: float) -> StoreAddress:
        """The address of a store that answers, as far as it can be told; may start one. Any thread.

        Blocks at most `timeout_seconds`.

        Raises:
            StoreUnavailable: there is none and none can be started; says why.
        """
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one statement; None leaves the store's own."""

    max_rows: int | None = None
    """A larger result is an error, not cut."""
    max_seconds: float | None = None
    max_memory_bytes: int | None = None

    def settings(self) -> dict[str, str]:
        """As ClickHouse settings."""
        found: dict[str, str] = {}
        for name, value in (
            ("max_result_rows", self.max_rows),
            ("max_execution_time", self.max_seconds),
            ("max_memory_usage", self.max_memory_bytes),
        ):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise InvalidQuery(f"limit {name} is {value!r}: give a number above 0")
            found[name] = f"{value:g}" if isinstance(value, float) else str(value)
        if "max_result_rows" in found:
            found["result_overflow_mode"] = "throw"
        return found


class Store:
    """Runs statements, from any thread, several at once. Connects at the first one; a fork's child connects anew."""

    def __init__(self, locator: Locator, *, connect_deadline_seconds: float = 60.0) -> None:
        """Args:
        connect_deadline_seconds: how long a start of the store may take.
        """
        self._locator = locator
        self._connect_deadline_seconds = connect_deadline_seconds
        self._lock = threading.Lock()
        self._connected: Client | None = None
        self.connections = 0
        """How often it connected: after a reconnection, what was known of the store may no longer be true."""

    def rows(
        self, sql: str, parameters: Mapping[str, Parameter] | None = None, settings: Mapping[str, str] | None = None
    ) -> list[tuple[Any, ...]]:
        """All rows of one SELECT. DateTime64 comes as datetime: ask for milliseconds in SQL where time matters.

        Raises:
            QueryError: see `errors`.
        """
        text, bound = bind(sql, parameters or {})
        found = self._run(
            lambda client: client.query(text, parameters=bound, settings=dict(settings or {})).result_rows
        )
        return cast("list[tuple[Any, ...]]", found)

    def named_rows(
        self, sql: str, parameters: Mapping[str, Parameter] | None = None, settings: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """All rows of one SELECT as dicts by column name."""
        text, bound = bind(sql, parameters or {})
        return self._run(
            lambda client: list(client.query(text, parameters=bound, settings=dict(settings or {})).named_results())
        )

    def raw(
        self,
        sql: str,
        output_format: str,
        parameters: Mapping[str, Parameter] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> bytes:
        """The result of one SELECT as the store wrote it."""
        text, bound = bind(sql, parameters or {})
        return self._run(
            lambda client: client.raw_query(text, parameters=bound, settings=dict(settings or {}), fmt=output_format)
        )

    def frame(
        self, sql: str, parameters: Mapping[str, Parameter] | None = None, settings: Mapping[str, str] | None = None
    ) -> pandas.DataFrame:
        """The result of one SELECT as a DataFrame."""
        text, bound = bind(sql, parameters or {})
        return self._run(lambda client: client.query_df(text, parameters=bound, settings=dict(settings or {})))

    def arrow(
        self, sql: str, parameters: Mapping[str, Parameter] | None = None, settings: Mapping[str, str] | None = None
    ) -> pyarrow.Table:
        """The result of one SELECT as an Arrow table."""
        text, bound = bind(sql, parameters or {})
        return self._run(lambda client: client.query_arrow(text, parameters=bound, settings=dict(settings or {})))

    def close(self) -> None:
        """Close the connections; a later statement opens new ones."""
        with self._lock:
            connected, self._connected = self._connected, None
        if connected is not None:
            _close(connected)

    def after_fork_in_child(self) -> None:
        """Forget what is the parent's: its sockets stay open there, and its lock may have been held at the fork."""
        self._lock = threading.Lock()
        connected, self._connected = self._connected, None
        if connected is not None:
            # Closing here ends only the child's copies of the sockets.
            _close(connected)

    def _run(self, call: Callable[[Client], T]) -> T:
        client = self._client()
        try:
            return _mapped(call, client)
        except _GoneError:
            # The local store process leaves when it is idle and may be killed: every statement here only reads.
            with self._lock:
                if self._connected is client:
                    self._connected = None
            _close(client)
        client = self._client()
        try:
            return _mapped(call, client)
        except _GoneError as exc:
            raise StoreUnavailable(f"the store does not answer: {exc}") from exc

    def _client(self) -> Client:
        connected = self._connected
        if connected is not None:
            return connected
        with self._lock:
            if self._connected is None:
                address = self._locator.locate(self._connect_deadline_seconds)
                try:
                    client = _connect(address)
                except _GoneError:
                    # It left between the two steps, or its tokens are a predecessor's.
                    address = self._locator.locate(self._connect_deadline_seconds)
                    try:
                        client = _connect(address)
                    except _GoneError as exc:
                        reason = f"the store at {address.host}:{address.port} cannot be reached: {exc}"
                        raise StoreUnavailable(reason) from exc
                self._connected = client
                self.connections += 1
            return self._connected


def bind(sql: str, parameters: Mapping[str, Parameter]) -> tuple[str, dict[str, Any]]:
    """`sql` and the parameters to send with it.

    Large ones go into the text as hexadecimal digits that the store decodes: no value can be read as SQL.

    Raises:
        InvalidQuery: a placeholder without a value, or all of it is larger than the store takes.
    """
    placeholders = dict(_PLACEHOLDER.findall(sql)) if parameters else {}
    bound: dict[str, Any] = {}
    literals: dict[str, str] = {}
    room = MAX_URL_BYTES
    for name, value in sorted(parameters.items(), key=lambda item: _url_bytes(item[1])):
        if name not in placeholders:
            continue
        size = _url_bytes(value)
        if size > room and placeholders[name] in ("String", "Array(String)", "Array(Int64)", "Array(UInt64)"):
            literals[name] = _literal(value)
        else:
            room -= size
            bound[name] = list(value) if isinstance(value, list | tuple) else value
    if literals:
        sql = _PLACEHOLDER.sub(lambda found: literals.get(found[1], found[0]), sql)
    if len(sql.encode("utf-8", "surrogatepass")) > MAX_STATEMENT_BYTES:
        raise InvalidQuery(
            f"the query and its values have more than {MAX_STATEMENT_BYTES} bytes; ask for less at once, "
            "such as fewer run ids"
        )
    return sql, bound


class _GoneError(Exception):
    """The connection is dead: nobody listens, or the answer broke off."""


def _mapped(call: Callable[[Client], T], client: Client) -> T:
    """Run `call`; every error of the driver leaves as ours, a dead connection as `_GoneError`."""
    from clickhouse_connect.driver.exceptions import ClickHouseError
    from urllib3.exceptions import HTTPError, TimeoutError as HttpTimeout  # isort: skip

    try:
        return call(client)
    except ClickHouseError as exc:
        raise _translated(exc) from exc
    except HttpTimeout as exc:
        raise QueryTimeout(f"the store did not answer in time: {exc}") from exc
    except (HTTPError, ConnectionError) as exc:
        raise _GoneError(str(exc)) from exc


def _translated(exc: Exception) -> Exception:
    from urllib3.exceptions import ConnectTimeoutError, HTTPError, TimeoutError as HttpTimeout  # isort: skip

    code = getattr(exc, "code", None) or 0
    text = _message(str(exc))
    if not code:
        cause: BaseException | None = exc
        while cause is not None:
            if isinstance(cause, HttpTimeout) and not isinstance(cause, ConnectTimeoutError):
                return QueryTimeout("the store did not answer in time")
            if isinstance(cause, HTTPError | ConnectionError):
                return _GoneError(str(cause))
            cause = cause.__cause__ or cause.__context__
        match = re.search(r"Code: (\d+)", str(exc))
        code = int(match[1]) if match else 0
    if code in _TIMEOUT_CODES:
        return QueryTimeout(f"the query took too long: {text}")
    if code in _BUSY_CODES:
        return StoreBusy(f"the store refuses for now: {text}")
    if code in _REFUSED_LOGIN_CODES:
        # A new local store process may have taken over the port of an old one.
        return _GoneError(f"the store refuses this user or password: {text}")
    if not code and type(exc).__name__ in ("OperationalError", "StreamFailureError", "InterfaceError"):
        return _GoneError(text)
    return SqlError(text, code)


def _message(text: str) -> str:
    """The store's message without the driver's frame and the engine's version."""
    found = re.search(r"DB::(?:\w*Exception): (.*)", text, re.DOTALL)
    text = found[1] if found else text
    text = re.sub(r"\s*\(for url [^)]*\)\s*\Z", "", text)
    return re.sub(r"\s*\(version [^)]*\)\s*\.?\s*\Z", "", text).strip()[:2_000]


def _connect(address: StoreAddress) -> Client:
    import clickhouse_connect

    def connect(_: Any) -> Client:
        return clickhouse_connect.get_client(
            host=address.host,
            port=address.port,
            username=address.user,
            password=address.password,
            database=address.database,
            secure=address.secure,
            verify=address.verify,
            ca_cert=address.ca_cert,
            # A session would make the store run this client's queries one by one.
            autogenerate_session_id=False,
            autogenerate_query_id=False,
            # On this machine compressing costs more than sending.
            compress=address.secure or address.through_server,
            proxy_path=address.path,
            connect_timeout=_CONNECT_TIMEOUT_SECONDS,
            send_receive_timeout=300,
            client_name="runstream",
            dedicated_pool=True,
        )

    try:
        return _mapped(connect, None)  # type: ignore[arg-type]  # no client yet
    except SqlError as exc:
        if exc.code == 81:
            raise StoreUnavailable(
                f"the server {address.host}:{address.port} has no database {address.database!r}: "
                "run `runstream migrate` first"
            ) from exc
        raise


def _close(client: Client) -> None:
    with contextlib.suppress(Exception):
        client.close()


def _url_bytes(value: Parameter) -> int:
    """About how many bytes `value` takes in a URL, where every byte may need three."""
    if isinstance(value, str):
        return 3 * len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, int | float):
        return 24
    return 9 + sum(
        21 if isinstance(item, int) else len(item) + 9 if item.isascii() else 3 * len(item.encode()) + 9
        for item in value
    )


def _literal(value: Parameter) -> str:
    if isinstance(value, str):
        return f"unhex('{value.encode().hex()}')"
    if isinstance(value, int | float):
        raise QueryError("a number is never too large for the URL")
    if not value:
        return "[]::Array(String)"
    if isinstance(value[0], int):
        return f"[{', '.join(str(int(item)) for item in value)}]"
    # One constant: with a function over each element the store would compute the list again for every piece it reads
    # (500 run ids took 16 CPU-seconds).
    texts = [str(item) for item in value]
    separator = next((each for each in _SEPARATORS if not any(each in text for text in texts)), None)
    if separator is None or len(texts) == 1:
        return f"[{', '.join(_literal(text) for text in texts)}]"
    return f"splitByChar('\\x{ord(separator):02x}', unhex('{separator.join(texts).encode().hex()}'))"


def _flag(query: Mapping[str, list[str]], name: str, default: bool) -> bool:
    if name not in query:
        return default
    value = query[name][-1].lower()
    if value in ("true", "1", "yes"):
        return True
    if value in ("false", "0", "no"):
        return False
    raise InvalidQuery(f"RUNSTREAM_STORE_URI: {name} is {value!r}; expected true or false")
