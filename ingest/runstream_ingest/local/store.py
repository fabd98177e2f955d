"""The worker's `Store` inside the local store process: chDB without HTTP between."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runstream_schemas.names import DATABASE

from ..errors import StoreBusy, store_error
from ..store import INSERT_SETTINGS
from .engine import Engine, Role, Session, quote_name
from .errors import EngineQueryError
from .request import insert_head

__all__ = ["ChdbStore"]

Value = int | float | str


class ChdbStore:
    """A `Store` over the engine of this process. Several may live side by side, one for each thread."""

    def __init__(self, engine: Engine, database: str = DATABASE) -> None:
        self._engine = engine
        self._database = database
        self._closed = False

    @property
    def database(self) -> str:
        return self._database

    def insert(self, table: str, columns: Sequence[str], chunks: Sequence[bytes]) -> None:
        names = ", ".join(quote_name(column) for column in columns)
        settings = {"input_format_parallel_parsing": "0"} | {k: str(v) for k, v in INSERT_SETTINGS.items()}
        try:
            with _Closing(self._session(settings)) as session:
                inserter = session.insert(f"INSERT INTO {quote_name(table)} ({names})", "Avro")
                try:
                    for chunk in chunks:
                        inserter.append(bytes(chunk))
                    inserter.finish()
                finally:
                    inserter.cancel()
        except EngineQueryError as exc:
            raise store_error(f"insert into {table}: {exc}", exc.code) from exc

    def execute(self, sql: str, parameters: Mapping[str, Value] | None = None) -> None:
        head = insert_head(sql)
        try:
            with _Closing(self._session(dict(head.settings) if head else None)) as session:
                if head is None:
                    session.query(sql, "Null", _texts(parameters))
                    return
                # The engine cuts inline data at its first blank line and runs the rest as SQL: never give it any.
                inserter = session.insert(head.statement, head.format)
                try:
                    inserter.append(sql[head.length :].encode())
                    inserter.finish()
                finally:
                    inserter.cancel()
        except EngineQueryError as exc:
            raise store_error(f"statement: {exc}", exc.code) from exc

    def rows(self, sql: str, parameters: Mapping[str, Value] | None = None) -> list[tuple[Any, ...]]:
        settings = {"output_format_json_quote_64bit_integers": "0", "output_format_json_quote_denormals": "1"}
        try:
            with _Closing(self._session(settings)) as session:
                data = session.query(sql, "JSONCompactEachRowWithNamesAndTypes", _texts(parameters)).data
        except EngineQueryError as exc:
            raise store_error(f"query: {exc}", exc.code) from exc
        lines = data.decode("utf-8", "surrogateescape").splitlines()
        if len(lines) < 2:
            return []
        types = json.loads(lines[1])
        return [
            tuple(_value(value, kind) for value, kind in zip(json.loads(line), types, strict=True))
            for line in lines[2:]
        ]

    def close(self) -> None:
        self._closed = True

    def _session(self, settings: Mapping[str, str] | None) -> Session:
        if self._closed:
            raise StoreBusy("the store is closed", code=210)
        return self._engine.session(Role.WRITER, database=self._database, settings=settings)


class _Closing:
    """Closes a session at the end of a block."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> Session:
        return self._session

    def __exit__(self, *_: object) -> None:
        self._session.close()


def _texts(parameters: Mapping[str, Value] | None) -> dict[str, str]:
    """Parameters as the engine reads them: escaped as in TSV."""
    texts: dict[str, str] = {}
    for name, value in (parameters or {}).items():
        text = str(value)
        for raw, escaped in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"), ("\0", "\\0")):
            text = text.replace(raw, escaped)
        texts[name] = text
    return texts


def _value(value: Any, kind: str) -> Any:
    if isinstance(value, str) and "Float" in kind:
        return float(value)
    if isinstance(value, str) and "Int" in kind:
        return int(value)
    if isinstance(value, int) and "Float" in kind:
        return float(value)
    return value
