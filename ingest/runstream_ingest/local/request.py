"""One HTTP request read as ClickHouse reads it: who asks, the SQL, parameters, settings, formats, codings.

No I/O and no policy: what a role may set is decided by the caller.
"""

from __future__ import annotations

import base64
import binascii
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import parse_qsl

from .errors import Refused
from .frames import METHODS

__all__ = ["Credentials", "InsertHead", "Request", "insert_head", "split_format"]

RESERVED: Final = frozenset(
    {
        "buffer_size",
        "cancel_http_readonly_queries_on_client_close",
        "client_protocol_version",
        "compress",
        "database",
        "decompress",
        "default_format",
        "enable_http_compression",
        "http_headers_progress_interval_ms",
        "http_write_exception_in_output_format",
        "network_compression_method",
        "network_zstd_compression_level",
        "password",
        "query",
        "query_id",
        "quota_key",
        "role",
        "send_progress_in_http_headers",
        "session_check",
        "session_id",
        "session_timeout",
        "stacktrace",
        "user",
        "wait_end_of_query",
    }
)
"""URL parameters of the interface itself; every other one is a query setting."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who asks. `user` is None where only a bearer token was sent."""

    user: str | None
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """The parts of one request that do not need its body."""

    credentials: Credentials | None
    url_sql: str
    database: str | None
    query_id: str
    settings: Mapping[str, str]
    parameters: Mapping[str, str]
    """Values of `{name:Type}` placeholders, escaped as in TSV."""
    default_format: str | None
    """From X-ClickHouse-Format or default_format; a FORMAT clause wins over it."""
    accept_encoding: str
    content_encoding: str
    wants_compression: bool
    """enable_http_compression=1."""
    frames: str | None
    """compress=1: the answer comes in ClickHouse's own frames, of this method."""
    framed_body: bool
    """decompress=1: the body comes in such frames."""
    protocol_version: int
    """client_protocol_version; 0 where the client names none."""
    wait_end_of_query: bool
    form_boundary: str | None
    """Set where the body is a multipart form, which drivers send when parameters are too long for the URL."""

    @classmethod
    def parse(cls, query_string: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Request:
        """Read URL and headers.

        Raises:
            Refused: they are not valid.
        """
        named = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
        try:
            url = parse_qsl(query_string.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=2_000)
        except ValueError as exc:
            raise Refused(f"the URL's query string is not valid: {exc}", 36) from None
        values: dict[str, str] = {}
        for name, value in url:
            values[name] = value
        query_id = values.get("query_id") or str(uuid.uuid4())
        if not re.fullmatch(r"[\w\-.:]{1,100}", query_id):
            raise Refused("query_id takes 1 to 100 letters, digits, '-', '.', ':' and '_'", 36)
        return cls(
            credentials=_credentials(values, named),
            url_sql=values.get("query", ""),
            database=values.get("database") or named.get("x-clickhouse-database") or None,
            query_id=query_id,
            settings={
                name: value for name, value in values.items() if name not in RESERVED and not name.startswith("param_")
            },
            parameters={name[6:]: value for name, value in values.items() if name.startswith("param_")},
            default_format=named.get("x-clickhouse-format") or values.get("default_format") or None,
            accept_encoding=named.get("accept-encoding", ""),
            content_encoding=named.get("content-encoding", "").strip().lower(),
            wants_compression=values.get("enable_http_compression") in ("1", "true"),
            frames=_frames(values),
            framed_body=values.get("decompress") in ("1", "true"),
            protocol_version=int(version) if (version := values.get("client_protocol_version", "0")).isdecimal() else 0,
            wait_end_of_query=values.get("wait_end_of_query") in ("1", "true"),
            form_boundary=_boundary(named.get("content-type", "")),
        )

    def with_form(self, body: bytes) -> Request:
        """The same request with the fields of its form: `query` and parameters.

        Raises:
            Refused: not such a form, or it brings files (external data).
        """
        sql, parameters = self.url_sql, dict(self.parameters)
        for name, value in _form_fields(body, self.form_boundary or ""):
            if name == "query":
                sql = "\n".join(part for part in (sql, value) if part)
            elif name.startswith("param_"):
                parameters[name[6:]] = value
            else:
                raise Refused(f"form field {name!r} is not supported (external data neither)", 48)
        return replace(self, url_sql=sql, parameters=parameters)


def _frames(values: Mapping[str, str]) -> str | None:
    if values.get("compress") not in ("1", "true"):
        return None
    method = values.get("network_compression_method", "LZ4").lower()
    if method not in METHODS:
        raise Refused(f"network_compression_method {method!r} is not supported; use LZ4 or ZSTD", 432)
    return method


def _boundary(content_type: str) -> str | None:
    if not content_type.lower().startswith("multipart/"):
        return None
    match = re.search(r'boundary="?([^";,]{1,70})"?', content_type, re.IGNORECASE)
    return match[1] if match else ""


_FIELD_NAME: Final = re.compile(rb'\bname="([^"\r\n]{1,300})"', re.IGNORECASE)
_FILE_NAME: Final = re.compile(rb"\bfilename", re.IGNORECASE)


def _form_fields(body: bytes, boundary: str) -> Iterator[tuple[str, str]]:
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1"))
    if not boundary or len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise Refused("the multipart form is not whole", 36)
    for part in parts[1:-1]:
        head, separator, value = part.partition(b"\r\n\r\n")
        name = _FIELD_NAME.search(head)
        if not separator or name is None:
            raise Refused("the multipart form is not valid", 36)
        if _FILE_NAME.search(head):
            raise Refused("external data is not supported: put it into a table, or into an array parameter", 48)
        try:
            yield name[1].decode("utf-8"), value.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("the multipart form is not UTF-8", 36) from None


def _credentials(values: Mapping[str, str], headers: Mapping[str, str]) -> Credentials | None:
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return Credentials(None, text.strip())
    if scheme.lower() == "basic":
        try:
            user, _, secret = base64.b64decode(text, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return Credentials("", "")
        return Credentials(user, secret)
    if "x-clickhouse-user" in headers or "x-clickhouse-key" in headers:
        return Credentials(headers.get("x-clickhouse-user", ""), headers.get("x-clickhouse-key", ""))
    if "user" in values or "password" in values:
        return Credentials(values.get("user", ""), values.get("password", ""))
    return None


_FORMAT_TAIL: Final = re.compile(r"\bFORMAT\s+(?P<name>[A-Za-z]\w*)\s*(?:;\s*)*\Z", re.IGNORECASE)
_NAME: Final = r"(?:`(?:[^`\\]|\\.)+`|\"(?:[^\"\\]|\\.)+\"|[A-Za-z_]\w*)"
_INSERT_HEAD: Final = re.compile(
    rf"\s*INSERT\s+INTO\s+(?:TABLE\s+)?(?P<table>{_NAME}(?:\s*\.\s*{_NAME})?)\s*"
    rf"(?P<columns>\((?:[^()'\"`]|`(?:[^`\\]|\\.)+`|\"(?:[^\"\\]|\\.)+\")*\))?\s*"
    r"(?:SETTINGS\s+(?P<settings>\w+\s*=\s*(?:'(?:[^'\\]|\\.)*'|[\w.+-]+)(?:\s*,\s*\w+\s*=\s*(?:'(?:[^'\\]|\\.)*'|[\w.+-]+))*)\s*)?"
    r"(?:FORMAT\s+(?P<format>[A-Za-z]\w*)[ \t]*;?(?:\r?\n)?|(?P<values>VALUES)\b)",
    re.IGNORECASE | re.DOTALL,
)
_SETTING: Final = re.compile(r"(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|([\w.+-]+))", re.DOTALL)


def split_format(sql: str) -> tuple[str, str | None]:
    """`sql` without its FORMAT clause, and the format's name; None where the text does not end in one."""
    match = _FORMAT_TAIL.search(sql)
    return (sql, None) if match is None else (sql[: match.start()], match["name"])


@dataclass(frozen=True, slots=True)
class InsertHead:
    """`INSERT INTO table (columns) [SETTINGS ...] FORMAT name`, before its data."""

    statement: str
    """Without settings, FORMAT and data."""
    format: str
    settings: Mapping[str, str]
    length: int
    """Characters of the text up to the data."""


def insert_head(sql: str) -> InsertHead | None:
    """The head of an INSERT with data; None for any other text, INSERT ... SELECT among them."""
    match = _INSERT_HEAD.match(sql)
    if match is None:
        return None
    settings = {
        name: re.sub(r"\\(.)", r"\1", quoted) if quoted or not bare else bare
        for name, quoted, bare in _SETTING.findall(match["settings"] or "")
    }
    return InsertHead(
        statement=f"INSERT INTO {match['table']} {match['columns'] or ''}".strip(),
        format=match["format"] or "Values",
        settings=settings,
        length=match.end(),
    )
