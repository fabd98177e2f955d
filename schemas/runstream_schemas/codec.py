"""Avro bodies: encode and decode events, and name their schemas by fingerprint.

A released schema file is never edited; `<event>.v<N>.avsc` with the largest N is the one that is written.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, cast

import fastavro
from fastavro.schema import fingerprint as avro_fingerprint
from fastavro.schema import to_parsing_canonical_form

from .names import STREAM_OF, EventName

_FILE = re.compile(r"(?P<event>\w+)\.v(?P<version>\d+)\.avsc")


class CodecError(ValueError):
    """An event does not fit its schema, or a body does not decode."""


@dataclass(frozen=True, slots=True)
class Schema:
    """One version of one event's schema."""

    event: EventName
    version: int
    fingerprint: bytes
    """CRC-64-AVRO of the canonical form: 8 bytes, big-endian."""
    definition: Mapping[str, Any]
    """The schema as JSON values, as its file has it."""
    parsed: Any
    """The schema as fastavro wants it."""


@cache
def schemas() -> Mapping[bytes, Schema]:
    """Every known schema version by fingerprint."""
    found: dict[bytes, Schema] = {}
    for file in files(__package__).joinpath("avro").iterdir():
        match = _FILE.fullmatch(file.name)
        if match is None:
            continue
        definition = json.loads(file.read_text(encoding="utf-8"))
        parsed = fastavro.parse_schema(definition)
        # fastavro prints the 8 bytes in the little-endian order of the Avro specification's reference code.
        little = bytes.fromhex(avro_fingerprint(to_parsing_canonical_form(parsed), "CRC-64-AVRO"))
        mark = little[::-1]
        if mark in found:
            raise CodecError(f"{file.name} has the fingerprint of {found[mark].event}.v{found[mark].version}")
        found[mark] = Schema(cast(EventName, match["event"]), int(match["version"]), mark, definition, parsed)
    return found


@cache
def current(event: EventName) -> Schema:
    """The newest schema of `event`."""
    if event not in STREAM_OF:
        raise CodecError(f"unknown event {event!r}; known: {', '.join(STREAM_OF)}")
    return max((schema for schema in schemas().values() if schema.event == event), key=lambda schema: schema.version)


def encode(event: EventName, fields: Mapping[str, Any]) -> bytes:
    """The body of one event under its current schema; fields with defaults may be left out.

    Raises:
        CodecError: a field is missing, has the wrong type or is not valid UTF-8.
    """
    buffer = io.BytesIO()
    try:
        fastavro.schemaless_writer(buffer, current(event).parsed, fields)
    except Exception as exc:  # fastavro raises many kinds for one cause
        raise CodecError(f"{event} does not fit its schema: {type(exc).__name__}: {exc}") from exc
    return buffer.getvalue()


def decode(fingerprint: bytes, body: bytes) -> tuple[EventName, dict[str, Any]]:
    """The event name and fields of `body`, read under today's schema.

    Raises:
        CodecError: unknown fingerprint, or a body that does not decode or has bytes left over.
    """
    schema = schemas().get(fingerprint)
    if schema is None:
        raise CodecError(f"unknown schema fingerprint {fingerprint.hex()}")
    buffer = io.BytesIO(body)
    try:
        fields = fastavro.schemaless_reader(buffer, schema.parsed, current(schema.event).parsed)
    except Exception as exc:
        raise CodecError(f"body of {schema.event} does not decode: {type(exc).__name__}: {exc}") from exc
    if buffer.tell() != len(body):
        raise CodecError(f"body of {schema.event} has {len(body) - buffer.tell()} bytes left over")
    return schema.event, cast(dict[str, Any], fields)
