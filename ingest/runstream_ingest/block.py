"""Whole runs of metric records as single Avro values: what goes into `landing_metric_block`, untouched by Python.

A record in a Kafka batch is, byte for byte, an Avro record: both write numbers as zigzag varints, and both put a length
in front of bytes. So the records of a batch become an Avro array by a count in front and a zero behind, and ClickHouse
takes it apart. At one point a record this costs a quarter of handling each in Python (bench/kafka_ingest.py).

What is unusual (another schema, a record without body or key) does not come here but record by record, through
`frame`; what turns out not to decode is taken apart and goes there too (`commit`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from runstream_schemas import codec
from runstream_schemas.names import SCHEMA_HEADER

from .frame import CHUNK_BYTES, LOG_MARK, file_head, varint
from .log import LogBlock

__all__ = ["LANDING", "PROBE", "columns", "fingerprint_of", "frame_blocks"]

LANDING: Final = "landing_metric_block"
PROBE: Final = "probe_metric_block"
"""Has the checks of `LANDING` and keeps nothing."""

_BEFORE: Final = ("length", "attributes", "timestamp_delta", "offset_delta")
_NO_KEY: Final = b"\x01"
"""Kafka's length of a null, -1."""
_END: Final = b"\x00" + varint(LOG_MARK)
"""The array's end, and the mark that must follow it."""


@cache
def _trailer(fingerprint: bytes) -> bytes:
    """What stands behind each body: one header, the schema's. Kafka's varints are Avro's."""
    name = SCHEMA_HEADER.encode()
    return varint(1) + varint(len(name)) + name + varint(len(fingerprint)) + fingerprint


def fingerprint_of(payload: bytes, count: int) -> bytes | None:
    """The schema of these records where they may go as one block, else None.

    Args:
        payload: `count` records as they lie in a batch, without compression.
    """
    # The newest version; a worker that knows none at all takes every record for one of an unknown schema.
    known = [schema for schema in codec.schemas().values() if schema.event == "metric_batch"]
    newest = max(known, key=lambda schema: schema.version, default=None)
    if newest is None or payload.count(_trailer(newest.fingerprint)) != count or not _has_key(payload):
        return None
    return newest.fingerprint


def _has_key(payload: bytes) -> bool:
    """Whether the first record has a key: Avro knows no null there, and who leaves one out leaves out all."""
    at = 0
    for _ in _BEFORE:
        while at < len(payload) and payload[at] & 0x80:
            at += 1
        at += 1
    return payload[at : at + 1] != _NO_KEY


@cache
def _header(fingerprint: bytes) -> tuple[tuple[str, ...], bytes, bytes]:
    """Columns, head and sync marker of a file of blocks of this schema."""
    trailer = _trailer(fingerprint)
    record: dict[str, Any] = {
        "type": "record",
        "name": "KafkaRecord",
        "fields": [
            *({"name": name, "type": "long"} for name in _BEFORE),
            {"name": "record_key", "type": "string"},
            {"name": "body_length", "type": "long"},
            *codec.schemas()[fingerprint].definition["fields"],
            {"name": "trailer", "type": {"type": "fixed", "name": "Trailer", "size": len(trailer)}},
        ],
    }
    block: dict[str, Any] = {
        "type": "record",
        "name": "MetricBlock",
        "fields": [
            *({"name": name, "type": "long"} for name in ("log_partition", "log_offset", "log_time", "log_time_step")),
            {"name": "trailer", "type": {"type": "fixed", "name": "Header", "size": len(trailer)}},
            {"name": "records", "type": {"type": "array", "items": record}},
            {"name": "log_mark", "type": "long"},
        ],
    }
    head, sync = file_head(json.dumps(block, separators=(",", ":")).encode())
    return tuple(field["name"] for field in block["fields"]), head, sync


def columns(fingerprint: bytes) -> Sequence[str]:
    """The columns of `LANDING` that a file of `frame_blocks` fills."""
    return _header(fingerprint)[0]


def frame_blocks(blocks: Sequence[LogBlock]) -> list[bytes]:
    """An Avro Object Container File of `blocks`, one a block, cut into pieces of about a megabyte.

    Args:
        blocks: at least one, all of one schema.
    """
    _, head, sync = _header(blocks[0].fingerprint)
    trailer = _trailer(blocks[0].fingerprint)
    chunks: list[bytes] = []
    parts: list[bytes] = [head]
    size = 0
    for block in blocks:
        time_step = 0 if block.shared_time else 1
        place = varint(block.partition) + varint(block.offset) + varint(block.time_ms) + varint(time_step)
        front = place + trailer + varint(block.next_offset - block.offset)
        length = len(front) + len(block.payload) + len(_END)
        parts += (b"\x02", varint(length), front, block.payload, _END, sync)
        size += length
        if size >= CHUNK_BYTES:
            chunks.append(b"".join(parts))
            parts.clear()
            size = 0
    if parts:
        chunks.append(b"".join(parts))
    return chunks
