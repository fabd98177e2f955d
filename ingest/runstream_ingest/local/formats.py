"""What the interface must know of output formats: which may be asked for, which may be sent in pieces, their types."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["content_type", "empty_native", "hello_native", "is_streamable", "native_text", "readable_format"]

_STREAMABLE: Final = {
    "CSV": "text/csv; charset=UTF-8; header=absent",
    "JSONCompactEachRow": "application/x-ndjson; charset=UTF-8",
    "JSONEachRow": "application/x-ndjson; charset=UTF-8",
    "MsgPack": "application/msgpack",
    "Native": "application/octet-stream",
    "RowBinary": "application/octet-stream",
    "TSKV": "text/plain; charset=UTF-8",
    "TSV": "text/tab-separated-values; charset=UTF-8",
    "TSVRaw": "text/tab-separated-values; charset=UTF-8",
    "TabSeparated": "text/tab-separated-values; charset=UTF-8",
    "TabSeparatedRaw": "text/tab-separated-values; charset=UTF-8",
}
"""Formats whose documents can be concatenated: the engine ends every piece as a complete document."""

_WHOLE: Final = {
    "Arrow": "application/octet-stream",
    "ArrowStream": "application/octet-stream",
    "Avro": "application/octet-stream",
    "CSVWithNames": "text/csv; charset=UTF-8; header=present",
    "CSVWithNamesAndTypes": "text/csv; charset=UTF-8; header=present",
    "JSON": "application/json; charset=UTF-8",
    "JSONColumns": "application/json; charset=UTF-8",
    "JSONColumnsWithMetadata": "application/json; charset=UTF-8",
    "JSONCompact": "application/json; charset=UTF-8",
    "JSONCompactColumns": "application/json; charset=UTF-8",
    "JSONCompactEachRowWithNames": "application/x-ndjson; charset=UTF-8",
    "JSONCompactEachRowWithNamesAndTypes": "application/x-ndjson; charset=UTF-8",
    "JSONCompactStrings": "application/json; charset=UTF-8",
    "JSONObjectEachRow": "application/json; charset=UTF-8",
    "JSONStrings": "application/json; charset=UTF-8",
    "JSONStringsEachRow": "application/x-ndjson; charset=UTF-8",
    "Markdown": "text/markdown; charset=UTF-8",
    "Null": "text/plain; charset=UTF-8",
    "ORC": "application/octet-stream",
    "Parquet": "application/octet-stream",
    "Pretty": "text/plain; charset=UTF-8",
    "PrettyCompact": "text/plain; charset=UTF-8",
    "PrettyCompactMonoBlock": "text/plain; charset=UTF-8",
    "PrettyMonoBlock": "text/plain; charset=UTF-8",
    "PrettyNoEscapes": "text/plain; charset=UTF-8",
    "PrettySpace": "text/plain; charset=UTF-8",
    "RowBinaryWithNames": "application/octet-stream",
    "RowBinaryWithNamesAndTypes": "application/octet-stream",
    "SQLInsert": "text/plain; charset=UTF-8",
    "TSVWithNames": "text/tab-separated-values; charset=UTF-8",
    "TSVWithNamesAndTypes": "text/tab-separated-values; charset=UTF-8",
    "TabSeparatedWithNames": "text/tab-separated-values; charset=UTF-8",
    "TabSeparatedWithNamesAndTypes": "text/tab-separated-values; charset=UTF-8",
    "Values": "text/plain; charset=UTF-8",
    "Vertical": "text/plain; charset=UTF-8",
    "XML": "application/xml; charset=UTF-8",
}
"""Formats that must be made in one piece."""

_CANONICAL: Final = {name.lower(): name for name in (*_STREAMABLE, *_WHOLE)}


def readable_format(name: str) -> str | None:
    """The engine's spelling of an output format that readers may ask for; None for any other.

    Formats that read schema files or templates (Template, CustomSeparated, Protobuf, CapnProto) are not among them.
    """
    return _CANONICAL.get(name.lower())


def is_streamable(name: str, settings: Mapping[str, str]) -> bool:
    """Whether pieces of a result in this format, under these settings, may be sent one after the other."""
    if settings.get("output_format_json_array_of_rows", "0") not in ("0", "false"):
        return name in _STREAMABLE and not name.startswith("JSON")
    return name in _STREAMABLE


def content_type(name: str) -> str:
    """The HTTP media type of a format."""
    return _STREAMABLE.get(name) or _WHOLE.get(name) or "application/octet-stream"


def empty_native(columns: Sequence[tuple[str, str]]) -> bytes:
    """A Native block with no rows that still tells names and types; the engine sends none for an empty result."""
    parts = [_varint(len(columns)), _varint(0)]
    for name, kind in columns:
        parts += [_text(name), _text(kind)]
    return b"".join(parts)


def hello_native(columns: Sequence[tuple[str, str, bytes]]) -> bytes:
    """A Native block of one row as protocol revisions from 54454 on frame it; the engine writes revision 0 alone.

    Args:
        columns: name, type, and the value as Native has it.
    """
    # Block info: field 1 is_overflows = 0, field 2 bucket_num = -1, no more fields.
    parts = [b"\x01\x00\x02\xff\xff\xff\xff\x00", _varint(len(columns)), _varint(1)]
    for name, kind, value in columns:
        # The byte before the value: no custom serialization.
        parts += [_text(name), _text(kind), b"\0", value]
    return b"".join(parts)


def native_text(text: str) -> bytes:
    """A String value in Native."""
    return _text(text)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out += struct.pack("B", value & 0x7F | 0x80)
        value >>= 7
    out += struct.pack("B", value)
    return bytes(out)
