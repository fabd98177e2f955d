"""The store as the worker sees it: one `Store` protocol, and a ClickHouse server behind it over HTTP.

The only module of this package that imports the ClickHouse driver. The other implementation, chDB inside the local
store process, lives in `local/`. Both keep one contract (tests/contract/test_store.py).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from runstream_schemas.names import DATABASE

from .errors import SettingsError, StoreBusy, StoreError, store_error

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = ["INSERT_SETTINGS", "ClickHouseStore", "Store", "StoreAddress", "StoreBusy", "StoreError", "connect"]

Value = int | float | str

INSERT_SETTINGS: Final[Mapping[str, int]] = {
    # The default of recent engines is 1: rows would be acknowledged by a buffer, poison would meet other bodies there.
    "async_insert": 0,
    # A body written under an older schema version leaves out newer columns; they take the column's default.
    "input_format_avro_allow_missing_fields": 1,
    # One block per insert and target, so that a target gets a whole batch or nothing. 16 M rows bound a batch.
    "max_insert_block_size": 16_777_216,
    "min_insert_block_size_rows": 16_777_216,
    "min_insert_block_size_bytes": 1 << 30,
    # Merging inside the block on insert costs 0.2 CPU-seconds per million points and merges do it anyway.
    "optimize_on_insert": 0,
    # Replays are harmless without it, and on a plain MergeTree its log is not safe in a crash (research/ingest.md 3).
    "insert_deduplicate": 0,
    # A fifth of an insert's wall time less for 5 % more CPU: its views wait for the disk beside each other.
    "parallel_view_processing": 1,
}
"""Settings of every landing insert, over HTTP or in SQL."""


class Store(Protocol):
    """A ClickHouse engine with one database selected. One thread at a time; calls block until the engine answers."""

    @property
    def database(self) -> str:
        """The selected database; unqualified table names mean it."""
        ...

    def insert(self, table: str, columns: Sequence[str], chunks: Sequence[bytes]) -> None:
        """Insert one Avro Object Container File under `INSERT_SETTINGS`; durable as far as the engine is configured.

        Args:
            table: unqualified name of a table of the database.
            columns: columns to fill, named as the file's fields.
            chunks: the file, cut anywhere; read once, in order, never joined where it can be streamed.

        Raises:
            StoreBusy: transient; the same insert may succeed later. Some targets of the insert may have been written.
            StoreError: refused, with the engine's code. Some targets may have been written.
        """
        ...

    def execute(self, sql: str, parameters: Mapping[str, Value] | None = None) -> None:
        """Run one statement without a result; `{name:Type}` placeholders are bound by the engine.

        Raises:
            StoreBusy, StoreError: as in `insert`.
        """
        ...

    def rows(self, sql: str, parameters: Mapping[str, Value] | None = None) -> list[tuple[Any, ...]]:
        """All rows of a small query. Integers, floats and strings come as such (UInt128 too); cast other types in SQL.

        Raises:
            StoreBusy, StoreError: as in `insert`.
        """
        ...

    def close(self) -> None:
        """Release the connection; may be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where a ClickHouse server answers over HTTP, and as whom. The password stays out of `repr`."""

    host: str
    port: int
    user: str = "default"
    password: str = field(default="", repr=False)
    database: str = DATABASE
    secure: bool = False
    ca_cert: str | None = None
    """Path of a CA certificate in PEM, None for the system's."""
    verify: bool = True
    """False: the server's certificate is not checked."""

    @classmethod
    def parse(cls, uri: str) -> StoreAddress:
        """Read `clickhouse://user:password@host:port/database?secure=true`; options: secure, verify, ca_cert.

        Raises:
            SettingsError: not such an address; the message never repeats the password.
        """
        try:
            parts = urlsplit(uri)
            port = parts.port
        except ValueError:
            raise SettingsError(
                "the store address has no valid port: use clickhouse://user@host:8123/database"
            ) from None
        if parts.scheme != "clickhouse" or not parts.hostname:
            raise SettingsError(
                f"not a store address (scheme {parts.scheme or 'missing'!r}): use clickhouse://user:password@host:8123/database"
            )
        options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        unknown = options.keys() - {"secure", "verify", "ca_cert"}
        if unknown:
            raise SettingsError(
                f"unknown option {sorted(unknown)[0]!r} in the store address; known: secure, verify, ca_cert"
            )
        secure = _flag("secure", options.get("secure", "false"))
        return cls(
            host=parts.hostname,
            port=port or (8443 if secure else 8123),
            user=unquote(parts.username or "default"),
            password=unquote(parts.password or ""),
            database=unquote(parts.path.strip("/")) or DATABASE,
            secure=secure,
            ca_cert=options.get("ca_cert"),
            verify=_flag("verify", options.get("verify", "true")),
        )

    def __str__(self) -> str:
        return f"clickhouse://{self.user}@{self.host}:{self.port}/{self.database}"


def _flag(name: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise SettingsError(f"{name}={text!r} in the store address: use true or false")


def connect(address: StoreAddress, *, create_database: bool = False, timeout_seconds: float = 300.0) -> ClickHouseStore:
    """Open a store over HTTP.

    Args:
        create_database: make the database first if it is missing (the user needs the right to).
        timeout_seconds: longest wait for one answer of the server.

    Raises:
        StoreBusy: the server cannot be reached now.
        StoreError: it refuses (user, password, database).
    """
    if create_database:
        bootstrap = ClickHouseStore(_client(address, None, timeout_seconds), "default")
        try:
            bootstrap.execute(f"CREATE DATABASE IF NOT EXISTS {quote_name(address.database)}")
        finally:
            bootstrap.close()
    return ClickHouseStore(_client(address, address.database, timeout_seconds), address.database)


def quote_name(name: str) -> str:
    """`name` as a quoted SQL identifier."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def _client(address: StoreAddress, database: str | None, timeout_seconds: float) -> Client:
    import clickhouse_connect

    try:
        return clickhouse_connect.get_client(
            host=address.host,
            port=address.port,
            username=address.user,
            password=address.password,
            database=database or "default",
            secure=address.secure,
            ca_cert=address.ca_cert,
            verify=address.verify,
            compress=False,
            query_retries=0,
            connect_timeout=10,
            send_receive_timeout=int(timeout_seconds),
            autogenerate_session_id=False,
            # One own pool: the driver's shared one would outlive `close`.
            dedicated_pool=True,
        )
    except Exception as exc:
        raise _mapped(exc, f"cannot open {address}") from exc


class ClickHouseStore:
    """A ClickHouse server, or the local store process, over HTTP. See `connect`."""

    def __init__(self, client: Client, database: str) -> None:
        self._client = client
        self._database = database

    @property
    def database(self) -> str:
        return self._database

    def insert(self, table: str, columns: Sequence[str], chunks: Sequence[bytes]) -> None:
        def body() -> Generator[bytes, None, None]:
            # A generator, because the driver silently sends a bytes body again after a broken connection.
            yield from chunks

        try:
            self._client.raw_insert(
                table, column_names=list(columns), insert_block=body(), settings=dict(INSERT_SETTINGS), fmt="Avro"
            )
        except Exception as exc:
            raise _mapped(exc, f"insert into {table}") from exc

    def execute(self, sql: str, parameters: Mapping[str, Value] | None = None) -> None:
        try:
            self._client.command(sql, parameters=dict(parameters) if parameters else None)
        except Exception as exc:
            raise _mapped(exc, "statement") from exc

    def rows(self, sql: str, parameters: Mapping[str, Value] | None = None) -> list[tuple[Any, ...]]:
        try:
            result = self._client.query(sql, parameters=dict(parameters) if parameters else None)
            return [tuple(row) for row in result.result_rows]
        except Exception as exc:
            raise _mapped(exc, "query") from exc

    def close(self) -> None:
        self._client.close()


def _mapped(exc: Exception, what: str) -> StoreError:
    """The driver's error as ours: with the engine's code where it answered, else as a server that is away."""
    from clickhouse_connect.driver.exceptions import Error, OperationalError, ProgrammingError

    if isinstance(exc, StoreError):
        return exc
    code = getattr(exc, "code", None)
    text = str(exc).strip().replace("\n", " ")[:1_000]
    if code is not None:
        return store_error(f"{what}: {text}", int(code))
    if isinstance(exc, ProgrammingError) or not isinstance(exc, (Error, OSError, OperationalError)):
        # Our own mistake, or one of the driver: the same call would fail again.
        if type(exc).__module__.startswith(("urllib3", "http", "socket", "ssl")):
            return StoreBusy(f"{what}: {type(exc).__name__}: {text}")
        return StoreError(f"{what}: {type(exc).__name__}: {text}")
    return StoreBusy(f"{what}: {text}")
