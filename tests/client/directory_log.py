"""Reads what programs under test have logged, straight from the segments of a data directory's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runstream_schemas import codec
from runstream_schemas.segment import Frame, base_offset, read_frames


def logged(data: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every event in the log of the data directory `data`: control events in order, then metric batches."""
    found: list[tuple[str, dict[str, Any]]] = []
    for stream in ("control", "metrics"):
        for file in sorted((data / "log" / stream).glob("*.log")):
            start = base_offset(file.name)
            assert start is not None
            for frame in read_frames(file.read_bytes(), start):
                assert isinstance(frame, Frame)
                found.append(codec.decode(frame.fingerprint, frame.body))
    return found
