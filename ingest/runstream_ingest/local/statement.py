"""One statement against the engine, for one role: the blocking half of the HTTP interface. Called in threads."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Final

from . import gate
from .engine import Chunk, Engine, Inserter, Role, Session, Statistics
from .errors import EngineQueryError, Refused
from .formats import empty_native, hello_native, is_streamable, native_text, readable_format
from .request import InsertHead, Request, split_format

__all__ = ["Answer", "InsertRun", "Reader", "run_write"]

FIRST_BYTES: Final = 256 * 1024
"""A result up to this size is answered whole, with its length and summary."""
FIRST_BYTES_AT_END: Final = 4 * 1024 * 1024
"""The same for clients that asked to wait for the end of the query."""
PIECE_BYTES: Final = 1024 * 1024
"""Size of the pieces of a longer result."""

_DRIVER_SETTINGS_QUERY: Final = "SELECT name, value, readonly FROM system.settings LIMIT 10000"
"""What clickhouse_connect asks at its start, to the letter."""

_HELLO_QUERY: Final = "SELECT displayName(), version(), revision(), timezone()"
"""What clickhouse-go asks at its start, to the letter, and wants in the revision that it names (54460)."""
_HELLO_REVISION: Final = 54454
"""The first one whose Native has block info and the flag of custom serialization."""

_DRIVER_FRAGMENTS: Final = (
    # JDBC's getTables: where a table's files lie is nobody's business; all of ours have some.
    ("WHEN empty(t.data_paths) THEN 'REMOTE TABLE'", "WHEN 0 THEN 'REMOTE TABLE'"),
)
"""Parts of drivers' own statements, and what is checked and run in their place."""

_ATOMIC: Final = {
    "async_insert": "0",
    "input_format_parallel_parsing": "0",
    "max_insert_block_size": "100000000",
    "min_insert_block_size_bytes": "0",
    "min_insert_block_size_rows": "100000000",
}
"""One block for a whole insert, so that a failed one leaves nothing (without: 7.3 of 10 million rows stayed)."""


class Answer:
    """A result on its way out. `first` holds its beginning; `more` the rest, piece by piece; close it in the end."""

    def __init__(
        self, session: Session | None, output_format: str, pieces: Iterator[Chunk], statistics: Statistics | None = None
    ) -> None:
        self.format = output_format
        self.done = False
        self.first = b""
        self._session = session
        self._pieces = pieces
        self._statistics = statistics or Statistics()
        self._result_rows = 0
        self._lock = threading.Lock()

    @classmethod
    def whole(cls, data: bytes, output_format: str, statistics: Statistics | None = None) -> Answer:
        """A result that is there already."""
        answer = cls(None, output_format, iter(()), statistics)
        answer.first, answer.done = data, True
        return answer

    def read(self, size: int) -> tuple[bytes, bool]:
        """At least `size` bytes, or the rest; and whether there is more (`done` says the same).

        Raises:
            EngineQueryError: the query failed; what was returned before is not a whole result.
        """
        parts: list[bytes] = []
        have = 0
        with self._lock:
            while have < size:
                chunk = next(self._pieces, None)
                if chunk is None:
                    self.done = True
                    break
                parts.append(chunk.data)
                have += len(chunk.data)
                self._result_rows += chunk.rows
        return b"".join(parts), not self.done

    @property
    def rows(self) -> int:
        """Rows returned so far."""
        return self._result_rows or self._statistics.result_rows

    def summary(self) -> Mapping[str, str]:
        """The fields of X-ClickHouse-Summary; right once `done`."""
        return summary(self._statistics, self.rows)

    def close(self) -> None:
        """Stop the query if it still runs, and drop its connection."""
        with self._lock:
            close = getattr(self._pieces, "close", None)
            if close is not None:
                close()
            if self._session is not None:
                self._session.close()


def summary(statistics: Statistics, result_rows: int) -> Mapping[str, str]:
    """The fields of X-ClickHouse-Summary."""
    return {
        "read_rows": str(statistics.read_rows),
        "read_bytes": str(statistics.read_bytes),
        "written_rows": str(statistics.written_rows),
        "written_bytes": str(statistics.written_bytes),
        "total_rows_to_read": "0",
        "result_rows": str(result_rows),
        "result_bytes": "0",
        "elapsed_ns": "0",
    }


class Reader:
    """Runs readers' statements, behind the gate. Any thread."""

    def __init__(self, engine: Engine, limits: gate.Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._policy = gate.SettingsPolicy(limits)
        self._verdicts = gate.Memory()
        self._driver_settings: bytes | None = None

    def run(self, request: Request, sql: str) -> Answer:
        """Check and start `sql`.

        Raises:
            EngineQueryError: refused, or failed before its first piece.
        """
        database = gate.check_database(request.database)
        settings = self._policy.apply(request.settings)
        for fragment, replacement in _DRIVER_FRAGMENTS:
            sql = sql.replace(fragment, replacement)
        text, tail_format = split_format(sql)
        if text.strip() == _DRIVER_SETTINGS_QUERY and tail_format == "Native":
            return Answer.whole(self._settings_for_drivers(), "Native")
        default = gate.check_format(request.default_format) if request.default_format else "TabSeparated"
        guess = readable_format(tail_format) if tail_format else default
        if guess == "Native" and request.protocol_version >= _HELLO_REVISION and text.strip() == _HELLO_QUERY:
            return Answer.whole(self._hello(), "Native", Statistics(result_rows=1))
        while True:
            whole = guess is None or not is_streamable(guess, settings)
            bounded = dict(settings)
            if whole:
                asked = bounded.get("max_result_bytes", "0")
                limit = self._limits.max_buffered_result_bytes
                bounded["max_result_bytes"] = asked if asked.isdecimal() and 0 < int(asked) < limit else str(limit)
            session = self._engine.session(Role.READER, database=database, settings=bounded, query_id=request.query_id)
            try:
                approved = self._verdicts.check(session, sql, request.parameters)
                output_format = approved.format or default
                if is_streamable(output_format, settings) is whole:
                    # A comment behind the FORMAT clause, or one that looks like such a clause.
                    guess = output_format
                    session.close()
                    continue
                if approved.format is not None and tail_format is not None:
                    sql = text
                return _start(session, approved.is_select, sql, output_format, request)
            except BaseException:
                session.close()
                raise

    def _hello(self) -> bytes:
        """The engine's version, with revision 0: from then on the driver reads Native as the engine writes it."""
        return hello_native(
            [
                ("displayName()", "String", native_text("runstream")),
                ("version()", "String", native_text(self._engine.version)),
                ("revision()", "UInt32", bytes(4)),
                ("timezone()", "String", native_text("UTC")),
            ]
        )

    def _settings_for_drivers(self) -> bytes:
        """What the driver asks: every setting, of which those that readers may set are not read-only."""
        if self._driver_settings is None:
            names = ", ".join(f"'{name}'" for name in sorted(self._policy.writable()))
            session = self._engine.session(Role.READER)
            try:
                self._driver_settings = session.query(
                    f"SELECT name, value, toUInt8(name NOT IN ({names})) AS readonly FROM system.settings", "Native"
                ).data
            finally:
                session.close()
        return self._driver_settings


def run_write(engine: Engine, request: Request, sql: str) -> Answer:
    """Run one statement with the writer's rights; any but an INSERT that brings data.

    Raises:
        EngineQueryError: refused or failed.
    """
    text, output_format = split_format(sql)
    text = text.strip().rstrip(";")
    # A file's text cannot be told from SQL by the engine, which would run what follows a blank line in it.
    if re.match(r"INSERT\b", text, re.IGNORECASE) and not re.search(r"\b(?:SELECT|WITH)\b", text, re.IGNORECASE):
        raise Refused("this INSERT cannot be read: use INSERT INTO table (columns) FORMAT name", 62)
    session = engine.session(
        Role.WRITER,
        database=request.database or "runstream",
        settings=request.settings,
        query_id=request.query_id,
    )
    try:
        found = session.classify(text)
        if found.statements > 1:
            raise Refused("send one statement at a time", 62)
        name = output_format or request.default_format or "TabSeparated"
        name = readable_format(name) or name
        is_select = found.statements == 1 and found.kind == "READ_ONLY" and bool(
            re.match(r"(?:SELECT|WITH|\()", text, re.IGNORECASE)
        )  # fmt: skip
        return _start(session, is_select, text, name, request)
    except BaseException:
        session.close()
        raise


def _start(session: Session, is_select: bool, sql: str, output_format: str, request: Request) -> Answer:
    if not is_select or not is_streamable(output_format, request.settings):
        chunk, statistics = session.query_with_statistics(sql, output_format, request.parameters)
        session.close()
        return Answer.whole(chunk.data, output_format, statistics)
    answer = Answer(session, output_format, session.stream(sql, output_format, request.parameters))
    try:
        answer.first, _ = answer.read(FIRST_BYTES_AT_END if request.wait_end_of_query else FIRST_BYTES)
        if answer.done and not answer.first and output_format == "Native":
            answer.first = empty_native(_columns(session, sql, request.parameters))
    except BaseException:
        answer.close()
        raise
    if answer.done:
        answer.close()
    return answer


def _columns(session: Session, sql: str, parameters: Mapping[str, str]) -> list[tuple[str, str]]:
    rows = session.query(f"DESCRIBE ({sql.strip().rstrip(';')}\n)", "JSONCompactEachRow", parameters).data
    return [(str(row[0]), str(row[1])) for row in map(json.loads, rows.splitlines())]


class InsertRun:
    """One INSERT that brings data. One thread at a time; `close` it in any case."""

    def __init__(self, engine: Engine, request: Request, head: InsertHead) -> None:
        """Begin; blocks shortly.

        Raises:
            EngineQueryError: refused before any data.
        """
        self._session = engine.session(
            Role.WRITER,
            database=request.database or "runstream",
            settings={**_ATOMIC, **request.settings, **head.settings},
            query_id=request.query_id,
        )
        try:
            self._inserter: Inserter = self._session.insert(head.statement, head.format)
        except BaseException:
            self._session.close()
            raise

    def append(self, data: bytes) -> None:
        """The next piece of the data.

        Raises:
            EngineQueryError: it does not parse or fit.
        """
        if data:
            self._inserter.append(data)

    def finish(self) -> Statistics:
        """Write everything.

        Raises:
            EngineQueryError: nothing was written, unless the request's own settings cut it into blocks.
        """
        return self._inserter.finish()

    def close(self) -> None:
        """Drop what was not finished."""
        with contextlib.suppress(EngineQueryError):
            self._inserter.cancel()
        self._session.close()
