"""From records to `metric_batch` bodies in the calls shape: values of one call share one step and time."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from runstream_schemas.names import METRICS

from ..transport import Event
from .names import Name
from .record import CALL_HEAD, POINT, WORD, call_bytes

__all__ = ["Batch", "batch_event", "parse"]

MAX_KEY_BYTES: Final = 300_000
"""Of one batch: with at most two blocks of values this keeps every body below `limits.MAX_BODY_BYTES`."""


@dataclass(slots=True)
class Batch:
    """Values of one run whose seqs follow each other, from `first_seq` on."""

    run_id: str
    first_seq: int
    keys: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    ki: list[int] = field(default_factory=list)
    ci: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seqs: list[int] = field(default_factory=list)
    """Only where they do not follow each other."""
    key_bytes: int = 0


def batch_event(batch: Batch, writer: int, sent_at: int) -> Event:
    """The event that carries `batch`. Imports fastavro at its first call."""
    from runstream_schemas import codec

    body = codec.encode(
        "metric_batch",
        {
            "run_id": batch.run_id,
            "writer": writer,
            "first_seq": batch.first_seq,
            "sent_at": sent_at,
            "keys": batch.keys,
            "steps": batch.steps,
            "times": batch.times,
            "ki": batch.ki,
            "ci": batch.ci,
            "values": batch.values,
            "seqs": batch.seqs,
        },
    )
    return Event(METRICS, batch.run_id, _fingerprint(), body)


@cache
def _fingerprint() -> bytes:
    from runstream_schemas import codec

    return codec.current("metric_batch").fingerprint


@cache
def _values(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}d")


class _Builder:
    """Sorts the records of a part of one block into batches. Kept in one class, for its state is in the hot loop."""

    def __init__(self, names: Mapping[int, Name], base: int, counts: dict[str, int]) -> None:
        self.names = names
        self.base = base
        self.counts = counts
        self.batches: list[Batch] = []
        self.open: dict[str, Batch] = {}
        self.slots: dict[int, tuple[Batch, int]] = {}
        self.key_slots: dict[tuple[str, str], tuple[Batch, int]] = {}

    def slot(self, run_id: str, key: str) -> tuple[Batch, int]:
        """The batch that takes values of `key` now, and the key's index in it."""
        found = self.key_slots.get((run_id, key))
        if found is not None:
            return found
        batch = self.open.get(run_id)
        if batch is not None and batch.key_bytes > MAX_KEY_BYTES:
            self.close(run_id)
            batch = None
        if batch is None:
            batch = Batch(run_id, self.base + self.counts.get(run_id, 0))
            self.batches.append(batch)
            self.open[run_id] = batch
        batch.keys.append(key)
        batch.key_bytes += 4 * len(key)
        found = self.key_slots[run_id, key] = (batch, len(batch.keys) - 1)
        return found

    def close(self, run_id: str) -> None:
        """Values of `run_id` go to a new batch from now on."""
        batch = self.open.pop(run_id)
        self.counts[run_id] = self.counts.get(run_id, 0) + len(batch.values)
        self.key_slots = {name: slot for name, slot in self.key_slots.items() if name[0] != run_id}
        self.slots.clear()

    def finish(self) -> list[Batch]:
        for run_id, batch in self.open.items():
            self.counts[run_id] = self.counts.get(run_id, 0) + len(batch.values)
        return self.batches


def parse(data: bytes, names: Mapping[int, Name], base: int, counts: dict[str, int]) -> tuple[list[Batch], int, int]:
    """The batches of the whole records at the beginning of `data`, all of one block.

    Args:
        data: begins at a record.
        base: `record.sequence` of the block.
        counts: values of each run in this block before `data`; is brought up to date.

    Returns:
        batches, bytes used, and the size that the next record needs where `data` ends inside one, else 0.
    """
    builder = _Builder(names, base, counts)
    slots = builder.slots
    size = len(data)
    at = 0
    needed = 0
    view = memoryview(data)
    while at < size:
        if size - at < 8:
            needed = POINT.size
            break
        word = WORD.unpack_from(data, at)[0]
        if word > 0:
            if size - at < POINT.size:
                needed = POINT.size
                break
            # The loop that a training process pays for: about 0.3 us a point.
            for gid, value, step, when in POINT.iter_unpack(view[at : at + (size - at) // 32 * 32]):
                if gid <= 0:
                    break
                slot = slots.get(gid)
                if slot is None:
                    run_id, key = names[gid]
                    slot = slots[gid] = builder.slot(run_id, key)  # type: ignore[arg-type]
                batch, index = slot
                ms = int(when * 1000.0) if when > 0.0 else int(-1.0 - when)
                times = batch.times
                if not times or times[-1] != ms or batch.steps[-1] != step:
                    times.append(ms)
                    batch.steps.append(step)
                batch.ki.append(index)
                batch.ci.append(len(times) - 1)
                batch.values.append(value)
                at += 32
        elif word < 0:
            shape = -word >> 32
            run_id, keys = names[shape]
            length = call_bytes(len(keys))
            if size - at < length:
                needed = length
                break
            _, step, when = CALL_HEAD.unpack_from(data, at)
            ms = int(when * 1000.0) if when > 0.0 else int(-1.0 - when)
            values = _values(len(keys)).unpack_from(data, at + CALL_HEAD.size)
            last: Batch | None = None
            for key, value in zip(keys, values, strict=True):
                batch, index = builder.slot(run_id, key)
                if batch is not last:
                    last = batch
                    if not batch.times or batch.times[-1] != ms or batch.steps[-1] != step:
                        batch.times.append(ms)
                        batch.steps.append(step)
                batch.ki.append(index)
                batch.ci.append(len(batch.times) - 1)
                batch.values.append(value)
            at += length
        else:
            break
    return builder.finish(), at, needed
