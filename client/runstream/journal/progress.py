"""The progress file: up to where the log has acknowledged a journal. One small page-sized write, checked by a crc.

Lost or torn it only means that records are sent again, which the store absorbs.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from .segment import HEADER_BYTES

__all__ = ["PROGRESS_FILE", "Position", "ProgressFile", "read_progress"]

PROGRESS_FILE: Final = "progress"
_BODY: Final = struct.Struct("<8sqqq")
_CRC: Final = struct.Struct("<I")
_MAGIC: Final = b"RSPROG01"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in the metrics of a journal: segment number, byte in it."""

    segment: int = 0
    offset: int = HEADER_BYTES


class ProgressFile:
    """Written by the delivery thread after each acknowledgement."""

    def __init__(self, folder: str) -> None:
        self._fd = os.open(f"{folder}/{PROGRESS_FILE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, control: int, metrics: Position) -> None:
        """Remember what is acknowledged. A full disk is no error: the file has its block from its first write on."""
        body = _BODY.pack(_MAGIC, control, metrics.segment, metrics.offset)
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, body + _CRC.pack(zlib.crc32(body)), 0)

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def read_progress(folder: str) -> tuple[int, Position]:
    """(control offset, metrics position) that are acknowledged; the beginning where the file is missing or damaged."""
    try:
        with open(f"{folder}/{PROGRESS_FILE}", "rb") as file:
            data = file.read(_BODY.size + _CRC.size)
        magic, control, segment, offset = _BODY.unpack_from(data)
        if magic == _MAGIC and _CRC.unpack_from(data, _BODY.size)[0] == zlib.crc32(data[: _BODY.size]):
            return control, Position(segment, offset)
    except (OSError, struct.error):
        pass
    return 0, Position()
