"""Delivery through a server: paths, content type, limits and the body of a request that posts events.

A body is frames (see `segment`), one for each event, one behind the other, compressed as Content-Encoding says. The
stream of an event follows from its schema fingerprint, never from the sender. A frame's time is ignored.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

try:
    from lz4 import frame as _lz4
except ImportError:  # a client of its own build; gzip is always there
    _lz4 = None
lz4: Any = _lz4

__all__ = [
    "ARTIFACT_PATH",
    "CLIENT_HEADER",
    "CONTENT_TYPE",
    "ENCODINGS",
    "EVENTS_PATH",
    "MAX_REQUEST_BYTES",
    "MAX_REQUEST_EVENTS",
    "POSITIONS_PATH",
    "SERVER_PATH",
    "DeliveryError",
    "compress",
    "decompress",
]

SERVER_PATH: Final = "/api/runstream/1.0/server"
"""GET: where log and artifacts are, and what a request may hold."""
EVENTS_PATH: Final = "/api/runstream/1.0/events"
"""POST: append events."""
POSITIONS_PATH: Final = "/api/runstream/1.0/positions"
"""GET: where the log ends."""
ARTIFACT_PATH: Final = "/api/runstream/1.0/artifact"
"""GET: the size of one artifact."""
CLIENT_HEADER: Final = "x-runstream-client"
"""Sent by our own clients with every request."""
CONTENT_TYPE: Final = "application/vnd.runstream.events"
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
"""Frames of one request, before compression."""
MAX_REQUEST_EVENTS: Final = 10_000
ENCODINGS: Final = ("lz4", "gzip", "identity")
"""Content codings that are understood, the cheapest first. `lz4` is LZ4's frame format."""
_CHUNK_BYTES: Final = 1 << 20


class DeliveryError(ValueError):
    """A body that is damaged, larger than it may be, or in a coding that is not known."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def compress(data: bytes, accepted: Sequence[str] = ENCODINGS) -> tuple[str, bytes]:
    """`data` in the cheapest coding that is accepted and installed here: (coding, bytes)."""
    if "lz4" in accepted and lz4 is not None:
        return "lz4", bytes(lz4.compress(data))
    if "gzip" in accepted:
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        return "gzip", packer.compress(data) + packer.flush()
    return "identity", data


def decompress(data: bytes, encoding: str, limit_bytes: int = MAX_REQUEST_BYTES) -> bytes:
    """The inverse of `compress`, bounded: never more than `limit_bytes` are unpacked.

    Raises:
        DeliveryError: see there.
    """
    if encoding in ("", "identity"):
        if len(data) > limit_bytes:
            raise _too_large(limit_bytes)
        return data
    if encoding == "gzip":
        return _gunzip(data, limit_bytes)
    if encoding == "lz4":
        return _unlz4(data, limit_bytes)
    raise DeliveryError(f"Content-Encoding {encoding!r} is not known; send one of {', '.join(ENCODINGS)}")


def _gunzip(data: bytes, limit_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(31)
    try:
        found = unpacker.decompress(data, limit_bytes + 1)
    except zlib.error as exc:
        raise DeliveryError(f"the gzip body is damaged: {exc}") from exc
    if len(found) > limit_bytes:
        raise _too_large(limit_bytes)
    if not unpacker.eof or unpacker.unused_data:
        raise DeliveryError("the gzip body is cut short, or something stands behind it")
    return found


def _unlz4(data: bytes, limit_bytes: int) -> bytes:
    if lz4 is None:
        raise DeliveryError("LZ4 is not installed here; send gzip")
    unpacker = lz4.LZ4FrameDecompressor()
    parts: list[bytes] = []
    total = 0
    piece = data
    try:
        while not unpacker.eof and total <= limit_bytes:
            part = bytes(unpacker.decompress(piece, max_length=_CHUNK_BYTES))
            piece = b""
            total += len(part)
            parts.append(part)
            if not part and unpacker.needs_input:
                break
    except RuntimeError as exc:
        raise DeliveryError(f"the LZ4 body is damaged: {exc}") from exc
    if total > limit_bytes:
        raise _too_large(limit_bytes)
    if not unpacker.eof or unpacker.unused_data:
        raise DeliveryError("the LZ4 body is cut short, or something stands behind it")
    return b"".join(parts)


def _too_large(limit_bytes: int) -> DeliveryError:
    return DeliveryError(f"the body unpacks to more than {limit_bytes} bytes; send fewer events", too_large=True)
