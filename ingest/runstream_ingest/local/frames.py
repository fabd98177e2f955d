"""ClickHouse's own compressed frames (compress=1, decompress=1), as the Go and Java drivers use them over HTTP.

A frame: 16 bytes CityHash128 (of version 1.0.2, low half first) of all that follows; one byte method (0x82 LZ4, 0x90
ZSTD, 0x02 none); its length from that byte on and the length of its data, both 4 bytes little-endian; then the data.
"""

from __future__ import annotations

import struct
from typing import Final

from .errors import Refused

__all__ = ["METHODS", "FrameCompressor", "FrameDecompressor"]

METHODS: Final = ("lz4", "zstd")
FRAME_BYTES: Final = 1 << 20
"""Data of one frame that we write."""
MAX_FRAME_BYTES: Final = 64 << 20
"""Data of one frame that we read."""

_HEAD: Final = struct.Struct("<BII")
_SUM_BYTES: Final = 16
_LZ4, _ZSTD, _NONE = 0x82, 0x90, 0x02


def _checksum(data: bytes) -> bytes:
    from clickhouse_cityhash.cityhash import CityHash128  # type: ignore[import-untyped]

    both: int = CityHash128(data)
    # The package gives the first half in the upper 64 bits.
    return struct.pack("<QQ", both >> 64, both & 0xFFFF_FFFF_FFFF_FFFF)


class FrameCompressor:
    """A `coding.Compressor`."""

    def __init__(self, method: str) -> None:
        self._method = _ZSTD if method == "zstd" else _LZ4

    def compress(self, data: bytes) -> bytes:
        """Whole frames that hold `data`; none is kept back."""
        return b"".join(self._frame(data[at : at + FRAME_BYTES]) for at in range(0, len(data), FRAME_BYTES))

    def finish(self) -> bytes:
        """Nothing: frames need no end."""
        return b""

    def _frame(self, data: bytes) -> bytes:
        if self._method == _ZSTD:
            import zstandard

            packed = zstandard.ZstdCompressor(level=1).compress(data)
        else:
            import lz4.block

            packed = lz4.block.compress(data, store_size=False)
        rest = _HEAD.pack(self._method, _HEAD.size + len(packed), len(data)) + packed
        return _checksum(rest) + rest


class FrameDecompressor:
    """A `coding.Decompressor`: frames cut anywhere."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def decompress(self, data: bytes) -> bytes:
        """The data of the frames that are whole now.

        Raises:
            Refused: not such frames, a checksum that is wrong, or a frame that is too large.
        """
        self._pending += data
        done: list[bytes] = []
        total = 0
        while len(self._pending) >= _SUM_BYTES + _HEAD.size:
            method, length, size = _HEAD.unpack_from(self._pending, _SUM_BYTES)
            if length < _HEAD.size or length > MAX_FRAME_BYTES or size > MAX_FRAME_BYTES:
                raise _refused(f"a frame of {length} bytes for {size}")
            if len(self._pending) < _SUM_BYTES + length:
                break
            total += size
            if total > MAX_FRAME_BYTES:
                raise _refused(f"what came at once expands to more than {MAX_FRAME_BYTES} bytes")
            rest = bytes(self._pending[_SUM_BYTES : _SUM_BYTES + length])
            if _checksum(rest) != bytes(self._pending[:_SUM_BYTES]):
                raise _refused("a checksum does not match")
            del self._pending[: _SUM_BYTES + length]
            done.append(_unpack(method, rest[_HEAD.size :], size))
        return b"".join(done)

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            Refused: the last frame is not whole.
        """
        if self._pending:
            raise _refused("the last frame is not whole")


def _unpack(method: int, packed: bytes, size: int) -> bytes:
    data = b""
    try:
        if method == _LZ4:
            import lz4.block

            data = lz4.block.decompress(packed, uncompressed_size=size)
        elif method == _ZSTD:
            import zstandard

            if zstandard.frame_content_size(packed) in (-1, size):
                data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
        elif method == _NONE:
            data = packed
        else:
            raise _refused(f"method {method:#x} is unknown")
    except (RuntimeError, ValueError, zstandard_error()) as exc:
        raise _refused(str(exc)) from None
    if len(data) != size:
        raise _refused("a frame has another length than it says")
    return data


def zstandard_error() -> type[Exception]:
    """The error of the zstd library, which is loaded when first needed."""
    import zstandard

    error: type[Exception] = zstandard.ZstdError
    return error


def _refused(why: str) -> Refused:
    return Refused(f"the request body is not in ClickHouse's compressed frames: {why}", 271)
