"""HTTP content codings, streaming, both ways: gzip, deflate, zstd, lz4 (frames)."""

from __future__ import annotations

import zlib
from typing import IO, Final, Protocol, cast

from .errors import Refused

__all__ = ["Compressor", "Decompressor", "compressor", "decompressor", "negotiate"]

PREFERRED: Final = ("zstd", "lz4", "gzip", "deflate")
"""Codings we offer, best first."""

MAX_EXPANDED_BYTES: Final = 64 << 20
"""What one piece from the network may expand to."""
_ZSTD_WINDOW_BYTES: Final = 32 << 20


class Compressor(Protocol):
    def compress(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes:
        """What is left, closing the stream."""
        ...


class Decompressor(Protocol):
    def decompress(self, data: bytes) -> bytes:
        """The next piece.

        Raises:
            Refused: the data is not of this coding.
        """
        ...


def negotiate(accept_encoding: str) -> str | None:
    """The first of our codings that `accept_encoding` names without `q=0`; None for an uncompressed answer."""
    offered: set[str] = set()
    for part in accept_encoding.lower().split(","):
        name, _, quality = part.partition(";")
        if quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            offered.add(name.strip())
    return next((name for name in PREFERRED if name in offered), None)


class _Zlib:
    def __init__(self, window_bits: int) -> None:
        self._stream = zlib.compressobj(3, zlib.DEFLATED, window_bits)

    def compress(self, data: bytes) -> bytes:
        return self._stream.compress(data)

    def finish(self) -> bytes:
        return self._stream.flush()


class _Zstd:
    def __init__(self) -> None:
        import zstandard

        self._stream = zstandard.ZstdCompressor(level=1).compressobj()

    def compress(self, data: bytes) -> bytes:
        return self._stream.compress(data)

    def finish(self) -> bytes:
        return self._stream.flush()


class _Lz4:
    def __init__(self) -> None:
        import lz4.frame

        self._stream = lz4.frame.LZ4FrameCompressor()
        self._head: bytes = self._stream.begin()

    def compress(self, data: bytes) -> bytes:
        head, self._head = self._head, b""
        packed: bytes = self._stream.compress(data)
        return head + packed

    def finish(self) -> bytes:
        head, self._head = self._head, b""
        rest: bytes = self._stream.flush()
        return head + rest


def compressor(coding: str) -> Compressor:
    """A compressor for one of `PREFERRED`."""
    if coding == "zstd":
        return _Zstd()
    if coding == "lz4":
        return _Lz4()
    return _Zlib(31 if coding == "gzip" else 15)


class _Plain:
    def decompress(self, data: bytes) -> bytes:
        return data


class _Unzstd:
    """zstd, whose few bytes may stand for gigabytes: the output is counted while it comes."""

    def __init__(self) -> None:
        import zstandard

        self._done = bytearray()
        self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).stream_writer(
            cast("IO[bytes]", self), write_size=1 << 17, closefd=False
        )

    def write(self, data: bytes) -> int:
        """What the stream calls with its output."""
        self._done += data
        if len(self._done) > MAX_EXPANDED_BYTES:
            raise Refused(f"a piece of the request body expands to more than {MAX_EXPANDED_BYTES} bytes", 354)
        return len(data)

    def decompress(self, data: bytes) -> bytes:
        self._stream.write(data)
        done = bytes(self._done)
        self._done.clear()
        return done


class _Checked:
    """Maps every library's complaint about bad data to ours."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._errors: tuple[type[Exception], ...]
        if coding == "zstd":
            import zstandard

            self._stream: Decompressor = _Unzstd()
            self._errors = (zstandard.ZstdError,)
        elif coding == "lz4":
            import lz4.frame

            self._stream = lz4.frame.LZ4FrameDecompressor()
            self._errors = (RuntimeError, EOFError)
        else:
            self._stream = zlib.decompressobj(47 if coding == "gzip" else 15)
            self._errors = (zlib.error,)

    def decompress(self, data: bytes) -> bytes:
        try:
            return self._stream.decompress(data)
        except self._errors as exc:
            raise Refused(f"the request body is not valid {self._coding}: {exc}", 354) from None


def decompressor(coding: str) -> Decompressor:
    """A decompressor for a Content-Encoding.

    Raises:
        Refused: an unknown coding.
    """
    if coding in ("", "identity"):
        return _Plain()
    if coding in PREFERRED:
        return _Checked(coding)
    raise Refused(f"Content-Encoding {coding!r} is not supported; use one of {', '.join(PREFERRED)}", 89)
