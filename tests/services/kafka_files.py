"""Record batches in a broker's own log files: counted, and damaged as a failing disk would."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from .kafka_cluster import KafkaCluster

__all__ = ["BatchOnDisk", "batches", "damage"]

_CODECS = {0: None, 1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}
_HEAD_BYTES = 61
"""Of a version 2 batch: base offset 8, length 4, leader epoch 4, magic 1, checksum 4, attributes 2, ..., count 4."""


@dataclass(frozen=True, slots=True)
class BatchOnDisk:
    """One record batch of version 2 as it lies in a segment file."""

    file: Path
    at: int
    """Where it begins in the file."""
    size: int
    base_offset: int
    records: int
    codec: str | None


def batches(cluster: KafkaCluster, topic: str, partition: int = 0, node: int = 0) -> list[BatchOnDisk]:
    """Every batch of one replica, in order."""
    found: list[BatchOnDisk] = []
    for path in sorted((cluster.data_directory(node) / f"{topic}-{partition}").glob("*.log")):
        data = path.read_bytes()
        at = 0
        while at + _HEAD_BYTES <= len(data):
            base, length = struct.unpack_from(">qi", data, at)
            if length <= 0:
                break
            [attributes] = struct.unpack_from(">h", data, at + 21)
            [count] = struct.unpack_from(">i", data, at + 57)
            found.append(BatchOnDisk(path, at, length + 12, base, count, _CODECS[attributes & 7]))
            at += length + 12
    return found


def damage(batch: BatchOnDisk, *, from_end: int = 1) -> None:
    """Flip bits of one byte of the batch's records."""
    with batch.file.open("r+b") as file:
        file.seek(batch.at + batch.size - from_end)
        [byte] = file.read(1)
        file.seek(batch.at + batch.size - from_end)
        file.write(bytes([byte ^ 0x55]))
