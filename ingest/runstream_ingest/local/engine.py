"""chDB, opened once per process: connections with a role, bounded queries, streams and inserts.

The only module that imports chDB. Facts it is built on (chDB 4.4, engine 26.9; all measured):

- A handle serialises its queries and keeps settings, so every query gets a fresh one (0.2 ms) and drops it afterwards.
  That also disposes of a failed query's output, which would otherwise lead the next result on the same handle.
- `SET ROLE` binds a handle to a role of the users file that the engine was opened with; `readonly = 1` then closes it.
- Nothing may fork after the engine is open.
- chDB's own streaming insert (`send_insert`) answers "done" where a constraint, a view or the disk refused the rows;
  only data that does not parse is reported. `INSERT ... FROM INFILE` tells, and costs the same: so it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib.util
import os
import re
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol
from xml.sax.saxutils import escape

from runstream_schemas.names import DATABASE

from .errors import EngineMissing, EngineQueryError, EngineRefused
from .links import repair_links

__all__ = ["Engine", "EngineSettings", "Inserter", "Role", "Session", "quote_name", "quote_text"]

INSTALL_HINT: Final = 'chDB is not installed; run: pip install "runstream[server]"'


class Role(enum.Enum):
    """Whom a connection serves."""

    READER = "runstream_reader"
    """SELECT on our database and on the few system tables that drivers ask for."""
    WRITER = "runstream_writer"
    """Everything, for ingest and migrations."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of the engine as a whole, and of one query."""

    max_memory_bytes: int = field(default_factory=lambda: _share_of_memory(0.3))
    """All queries, inserts and merges together; beyond it a query fails with MEMORY_LIMIT_EXCEEDED (code 241).
    30 % of the machine's memory, at least 1 GB, at most 8 GB."""
    max_query_memory_bytes: int = field(default_factory=lambda: _share_of_memory(0.2))
    """One query; 20 % of the machine's memory within the same bounds."""
    threads: int = max(2, min(8, os.cpu_count() or 2))
    """Threads of one query."""
    background_threads: int = 2
    """Threads for merges."""


def _share_of_memory(share: float) -> int:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        total = 0
    return max(1_000_000_000, min(8_000_000_000, int(total * share)))


def quote_text(text: str) -> str:
    """`text` as a SQL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def quote_name(name: str) -> str:
    """`name` as a quoted SQL identifier."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


class _Handle(Protocol):
    """What of chDB's private connection object is used here."""

    def query(self, sql: str, output_format: str, *, params: Mapping[str, str]) -> Any: ...
    def send_query(self, sql: str, output_format: str, *, params: Mapping[str, str]) -> Any: ...
    def streaming_fetch_result(self, result: Any) -> Any: ...
    def streaming_cancel_query(self, result: Any) -> None: ...
    def classify_query(self, sql: str, target_database: str = "") -> Mapping[str, Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a result, in its output format."""

    data: bytes
    rows: int
    """Rows in `data`."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a finished statement did, as far as the engine says."""

    read_rows: int = 0
    read_bytes: int = 0
    written_rows: int = 0
    written_bytes: int = 0
    result_rows: int = 0


@dataclass(frozen=True, slots=True)
class Classification:
    """What the engine says about a text before running it."""

    kind: str
    """READ_ONLY, MUTATING, CONTROL or UNKNOWN; of several statements the most restricted."""
    statements: int
    """0 where the text does not parse."""


def _query_error(exc: RuntimeError | UnicodeDecodeError) -> EngineQueryError:
    """The engine's refusal. Where its text quotes data that is not UTF-8, chDB fails to make a string of it."""
    text = exc.object.decode("utf-8", "replace") if isinstance(exc, UnicodeDecodeError) else str(exc)
    return EngineQueryError.parse(text)


class Session:
    """One connection, bound to one role. One thread at a time; every call blocks until the engine answers."""

    def __init__(self, handle: _Handle, spool: Path) -> None:
        """
        Args:
            spool: folder where the data of inserts waits.
        """
        self._handle: _Handle | None = handle
        self._spool = spool

    def query(self, sql: str, output_format: str = "Null", params: Mapping[str, str] | None = None) -> Chunk:
        """Run one statement and return its whole result.

        Raises:
            EngineQueryError: the engine refused or failed; this session must be closed then.
        """
        return self.query_with_statistics(sql, output_format, params)[0]

    def query_with_statistics(
        self, sql: str, output_format: str = "Null", params: Mapping[str, str] | None = None
    ) -> tuple[Chunk, Statistics]:
        """`query`, and what it read and wrote."""
        try:
            result = self._open.query(sql, output_format, params=dict(params or {}))
            chunk = Chunk(result.bytes() or b"", result.rows_read())
            statistics = Statistics(
                result.storage_rows_read(),
                result.bytes_read(),
                result.rows_written(),
                result.bytes_written(),
                result.rows_read(),
            )
        except (RuntimeError, UnicodeDecodeError) as exc:
            raise _query_error(exc) from None
        return chunk, statistics

    def stream(self, sql: str, output_format: str, params: Mapping[str, str] | None = None) -> Iterator[Chunk]:
        """Run one SELECT and yield its result in pieces, each a complete document of the format.

        Raises:
            EngineQueryError: as in `query`; also from the iteration.
        """
        handle = self._open
        try:
            result = handle.send_query(sql, output_format, params=dict(params or {}))
        except (RuntimeError, UnicodeDecodeError) as exc:
            raise _query_error(exc) from None
        done = False
        try:
            while True:
                try:
                    piece = handle.streaming_fetch_result(result)
                    if piece is None or piece.rows_read() == 0:
                        if piece is not None and piece.has_error():
                            raise EngineQueryError.parse(str(piece.error_message()))
                        done = True
                        return
                    chunk = Chunk(piece.bytes() or b"", piece.rows_read())
                except (RuntimeError, UnicodeDecodeError) as exc:
                    done = True
                    raise _query_error(exc) from None
                yield chunk
        finally:
            if not done:
                with contextlib.suppress(RuntimeError):
                    handle.streaming_cancel_query(result)

    def insert(self, sql: str, input_format: str) -> Inserter:
        """Begin `INSERT INTO table (columns)`; `sql` carries neither FORMAT nor data.

        Raises:
            EngineQueryError: there is no room for the data.
        """
        return Inserter(self, sql, input_format, self._spool)

    def classify(self, sql: str) -> Classification:
        """What running `sql` would be, without running it."""
        report = self._open.classify_query(sql, DATABASE)
        return Classification(str(report["query_class"]).rpartition(".")[2], int(report["statement_count"]))

    def close(self) -> None:
        """Drop the connection, with whatever runs on it; may be called twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    @property
    def _open(self) -> _Handle:
        if self._handle is None:
            raise EngineQueryError("the session is closed", 210)
        return self._handle


class Inserter:
    """The write half of one INSERT: `append` any number of pieces, then `finish` or `cancel`.

    The pieces wait in a file of the store's own folder, at most as long as the INSERT.
    """

    def __init__(self, session: Session, sql: str, input_format: str, spool: Path) -> None:
        self._session = session
        self._sql = sql
        self._format = input_format
        with _room():
            self._file = tempfile.NamedTemporaryFile(dir=spool, prefix="insert-", buffering=1 << 20)  # noqa: SIM115

    def append(self, data: bytes) -> None:
        """Take over the next piece, cut anywhere.

        Raises:
            EngineQueryError: there is no room for it (code 243).
        """
        with _room():
            self._file.write(data)

    def finish(self) -> Statistics:
        """Write what was appended; returns once it is as durable as the engine is configured.

        Raises:
            EngineQueryError: refused; whether something was written depends on the block settings.
        """
        try:
            with _room():
                self._file.flush()
            sql = f"{self._sql} FROM INFILE {quote_text(self._file.name)} COMPRESSION 'none' FORMAT {self._format}"
            return self._session.query_with_statistics(sql)[1]
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Drop what was appended. No effect after `finish`."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """A full disk is the store's trouble, and passes; the data is not to blame."""
    try:
        yield
    except OSError as exc:
        raise EngineQueryError(f"the store has no room for the data of an insert: {exc.strerror}", 243) from exc


class Engine:
    """The engine of this process. Any thread may ask for sessions."""

    def __init__(self, directory: Path, settings: EngineSettings | None = None) -> None:
        """Open the store's files in `directory` (made if missing). Takes 0.2 to 1 second. One engine per process.

        Raises:
            EngineMissing: chDB is not installed.
            EngineRefused: the files cannot be opened; the message says why and what to do.
        """
        self.settings = settings or EngineSettings()
        self.directory = directory
        chdb = _import_chdb()
        try:
            files = directory / "files"
            files.mkdir(parents=True, exist_ok=True)
            repair_links(files)
            self._spool = directory / "tmp"  # emptied by the process before it gets here
            self._spool.mkdir(exist_ok=True)
            config = self._write_config()
        except OSError as exc:
            raise EngineRefused(f"cannot write in {directory}: {exc.strerror}") from exc
        self._chdb = chdb
        self._address = f"{files}?config-file={config}&log-level=error"
        self._anchor: _Handle | None = None
        self._lock = threading.Lock()
        try:
            self._anchor = chdb.connect(self._address)
            session = self.session(Role.WRITER, database=None)
            try:
                session.query(f"CREATE DATABASE IF NOT EXISTS {quote_name(DATABASE)}")
                self.version = session.query("SELECT version()", "TSVRaw").data.decode().strip()
            finally:
                session.close()
        except (RuntimeError, EngineQueryError) as exc:
            self.close()
            raise EngineRefused.explain(directory, str(exc)) from exc

    def session(
        self,
        role: Role,
        *,
        database: str | None = DATABASE,
        settings: Mapping[str, str] | None = None,
        query_id: str | None = None,
    ) -> Session:
        """A fresh connection with `role`; `settings` are applied first, then a READER is closed by `readonly = 1`.

        Args:
            database: what unqualified names mean; None leaves the engine's default.
            settings: query settings by name; the caller has checked which are allowed.
            query_id: a name for `cancel`.

        Raises:
            EngineQueryError: a setting is unknown or its value wrong; the engine is closed.
        """
        with self._lock:
            if self._anchor is None:
                raise EngineQueryError("the store is shutting down", 236)
            session = Session(self._chdb.connect(self._address), self._spool)
        try:
            session.query(f"SET ROLE {role.value}")
            if database is not None:
                session.query(f"USE {quote_name(database)}")
            assignments = [f"{name} = {quote_text(value)}" for name, value in (settings or {}).items()]
            if query_id is not None:
                assignments.append(f"log_comment = {quote_text(query_id)}")
            if role is Role.READER:
                # Last, because no setting can be changed behind it.
                assignments.append("readonly = 1")
            if assignments:
                session.query("SET " + ", ".join(assignments))
        except BaseException:
            session.close()
            raise
        return session

    def cancel(self, query_ids: Sequence[str]) -> None:
        """Stop the running queries of sessions opened with these ids, from any thread; they fail with code 394."""
        if not query_ids:
            return
        with contextlib.suppress(EngineQueryError):
            session = self.session(Role.WRITER, database=None)
            try:
                names = ", ".join(quote_text(query_id) for query_id in query_ids)
                session.query(f"KILL QUERY WHERE Settings['log_comment'] IN ({names}) ASYNC")
            finally:
                session.close()

    def close(self) -> None:
        """Shut the engine down once the last session is closed. May be called twice."""
        with self._lock:
            anchor, self._anchor = self._anchor, None
        if anchor is not None:
            anchor.close()

    def _write_config(self) -> Path:
        """Write the engine's configuration beside the data: at every start, for it holds absolute paths."""
        folder = self.directory / "config"
        folder.mkdir(mode=0o700, exist_ok=True)
        users = folder / "users.xml"
        config = folder / "config.xml"
        _replace(users, _USERS.format(query_memory=self.settings.max_query_memory_bytes, threads=self.settings.threads))
        _replace(
            config,
            _CONFIG.format(
                users=escape(str(users)),
                memory=self.settings.max_memory_bytes,
                background=self.settings.background_threads,
                half_background=max(1, self.settings.background_threads // 2),
                files=escape(str(self.directory / "files")),
            ),
        )
        if re.search(r"[?&#%]", str(self.directory)):
            raise EngineRefused(
                f"the path {self.directory} holds one of ? & # %, which the engine cannot open; rename it"
            )
        return config


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _import_chdb() -> Any:
    """chDB's extension module alone.

    Its package would import pyarrow and pandas (0.5 s), and open and close an engine in memory (0.1 s), which leaves
    a folder in /tmp.
    """
    try:
        found = importlib.util.find_spec("chdb")
        folders = list(found.submodule_search_locations or ()) if found is not None else []
        library = next((file for folder in folders for file in Path(folder).glob("_chdb.*so")), None)
        if library is None:
            raise EngineMissing(INSTALL_HINT)
        if "chdb" not in sys.modules:
            package = types.ModuleType("chdb")
            package.__path__ = folders
            sys.modules["chdb"] = package
        if sys.platform == "linux":
            # As the package does: the engine brings its own versions of symbols that other extensions have too.
            ctypes.CDLL(str(library), mode=sys.getdlopenflags() | _RTLD_DEEPBIND)
        engine: Any = importlib.import_module("chdb._chdb")
    except (ImportError, OSError) as exc:
        raise EngineMissing(f"{INSTALL_HINT} ({exc})") from exc
    # Signals stay Python's: a graceful stop must not depend on which thread is inside the engine.
    engine.set_signal_handlers_enabled(False)
    return engine


_RTLD_DEEPBIND: Final = 0x8

_CONFIG: Final = """<clickhouse>
  <users_config>{users}</users_config>
  <user_directories replace="replace"><users_xml><path>{users}</path></users_xml></user_directories>
  <max_server_memory_usage>{memory}</max_server_memory_usage>
  <mark_cache_size>67108864</mark_cache_size>
  <index_mark_cache_size>16777216</index_mark_cache_size>
  <uncompressed_cache_size>0</uncompressed_cache_size>
  <background_pool_size>{background}</background_pool_size>
  <background_merges_mutations_concurrency_ratio>2</background_merges_mutations_concurrency_ratio>
  <background_schedule_pool_size>4</background_schedule_pool_size>
  <user_files_path>{files}/user_files</user_files_path>
  <merge_tree>
    <fsync_after_insert>1</fsync_after_insert>
    <fsync_part_directory>1</fsync_part_directory>
    <number_of_free_entries_in_pool_to_lower_max_size_of_merge>{half_background}</number_of_free_entries_in_pool_to_lower_max_size_of_merge>
    <number_of_free_entries_in_pool_to_execute_mutation>{half_background}</number_of_free_entries_in_pool_to_execute_mutation>
    <number_of_free_entries_in_pool_to_execute_optimize_entire_partition>{half_background}</number_of_free_entries_in_pool_to_execute_optimize_entire_partition>
  </merge_tree>
</clickhouse>
"""

_USERS: Final = """<clickhouse>
  <profiles><default>
    <max_memory_usage>{query_memory}</max_memory_usage>
    <max_threads>{threads}</max_threads>
    <async_insert>0</async_insert>
    <http_max_tries>1</http_max_tries>
  </default></profiles>
  <roles>
    <runstream_reader><grants>
      <query>GRANT SELECT ON runstream.*</query>
      <query>GRANT SHOW TABLES, SHOW COLUMNS ON runstream.*</query>
      <query>GRANT SELECT ON system.one</query>
      <query>GRANT SELECT ON system.numbers</query>
      <query>GRANT SELECT ON system.settings</query>
      <query>GRANT SELECT ON system.functions</query>
      <query>GRANT SELECT ON system.data_type_families</query>
    </grants></runstream_reader>
    <runstream_writer><grants><query>GRANT ALL ON *.*</query></grants></runstream_writer>
  </roles>
  <users><default>
    <password></password>
    <networks><ip>::/0</ip></networks>
    <profile>default</profile>
    <quota>default</quota>
    <grants>
      <query>GRANT runstream_reader</query>
      <query>GRANT runstream_writer</query>
    </grants>
  </default></users>
  <quotas><default></default></quotas>
</clickhouse>
"""
