"""One batch into the store: insert, set aside what cannot be stored, remember positions. Every step may be repeated.

The order is the whole protocol: rows, then dead letters, then `ingest_positions`, then the log's own commit. A crash
anywhere before the end repeats the batch; tables and dead letters absorb that.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from runstream_schemas.names import Stream, landing_table

from .batch import Batch, letter_of
from .block import LANDING, columns, frame_blocks
from .dead_letter import DeadLetter, DeadLetters
from .errors import StoreBusy, StoreError, SystemicFailure
from .frame import Framed, frame
from .log import LogBlock, LogRecord
from .metrics import Metrics
from .poison import isolate, sound_blocks
from .store import Store

__all__ = ["Abandoned", "Committer", "DeadLetterLimits", "Retry", "read_positions", "write_positions"]

_log = logging.getLogger(__name__)


class Abandoned(Exception):
    """The worker stops while the store is away: the batch stays in the log and comes again."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Waiting for a store that is away: exponential, with jitter of half the delay."""

    first_seconds: float = 0.1
    max_seconds: float = 15.0


@dataclass(frozen=True, slots=True)
class DeadLetterLimits:
    """Past either limit the worker stops, because then the fault is not in single bodies."""

    max_consecutive: int = 20_000
    """Records refused one after another."""
    max_ratio: float = 0.95
    """Share of refused records among the last `window`."""
    window: int = 50_000


class Committer:
    """Takes closed batches to the store. Used by one thread, which blocks while the store is away."""

    def __init__(
        self,
        store: Store,
        dead_letters: DeadLetters,
        *,
        wait: Callable[[float], bool],
        retry: Retry,
        limits: DeadLetterLimits,
        metrics: Metrics,
    ) -> None:
        """
        Args:
            wait: sleeps so many seconds; True (at once) when the worker must stop.
        """
        self._store = store
        self._dead_letters = dead_letters
        self._wait = wait
        self._retry = retry
        self._metrics = metrics
        self._gauge = _RefusalGauge(limits)

    def commit(self, batch: Batch) -> None:
        """Bring `batch` into the store; on return its positions are written.

        Raises:
            Abandoned: the worker stops and the store is away.
            SystemicFailure: the store refuses everything, or too much.
        """
        dead = batch.dead + self._insert_blocks(batch)
        self._gauge.count(batch.count(), dead)
        if dead:
            dead.sort(key=lambda letter: letter.source)
            self.patiently(lambda: self._dead_letters.put(dead), "dead letters")
            self._metrics.dead_letters(dead)
            _log.warning(
                "set aside %d records that cannot be stored, the first at %s: %s (see `runstream dead-letters list`)",
                len(dead),
                dead[0].source,
                dead[0].reason[:200],
            )
        self.patiently(lambda: write_positions(self._store, batch.positions), "positions")

    def _insert_blocks(self, batch: Batch) -> list[DeadLetter]:
        """Store the batch, blocks whole where they are sound, and record by record where not."""
        records = list(batch.records)
        refused: list[DeadLetter] = []
        stored: Sequence[LogBlock] = ()
        try:
            self._send_blocks(batch.blocks)
            stored = batch.blocks
        except StoreBusy:
            raise
        except StoreError as exc:
            stored = sound_blocks(self._store, batch.blocks, exc, lambda call: self.patiently(call, "probe"))
            try:
                self._send_blocks(stored)
            except StoreBusy:
                raise
            except StoreError:
                stored = ()  # sound for the probe and refused all the same: single records show whose fault it is
            whole = {id(block) for block in stored}
            apart = [block for block in batch.blocks if id(block) not in whole]
            _log.info(
                "%d of %d blocks of metrics do not decode as such: record by record", len(apart), len(batch.blocks)
            )
            for block in apart:
                taken = Batch()
                taken.add(block.take_apart())
                records += taken.records
                refused += taken.dead
        return refused + self.insert(records, stored)

    def _send_blocks(self, blocks: Sequence[LogBlock]) -> None:
        by_schema: dict[bytes, list[LogBlock]] = {}
        for block in blocks:
            by_schema.setdefault(block.fingerprint, []).append(block)
        for fingerprint, group in by_schema.items():
            insert = partial(self._store.insert, LANDING, columns(fingerprint), frame_blocks(group))
            self.patiently(insert, f"insert into {LANDING}")

    def insert(self, records: Sequence[LogRecord], blocks: Sequence[LogBlock] = ()) -> list[DeadLetter]:
        """Store `records`, which are fit for framing; the letters of those that cannot be stored.

        Args:
            blocks: what is stored already, and may hold records that make no sense.

        Raises:
            Abandoned, SystemicFailure: as in `commit`.
        """
        dead: list[DeadLetter] = []
        inserted: list[LogRecord] = []
        for framed in frame(records):
            stored, poison = self._insert(framed)
            inserted += stored
            dead += poison
        return dead + self._rejected(inserted, blocks)

    def _insert(self, framed: Framed) -> tuple[Sequence[LogRecord], list[DeadLetter]]:
        try:
            self._send(framed)
        except StoreBusy:
            raise
        except StoreError as exc:
            parts = isolate(self._store, framed, exc, lambda call: self.patiently(call, "probe"))
            for survivor in frame(parts.survivors):
                try:
                    self._send(survivor)
                except StoreError as again:
                    raise SystemicFailure(f"the store refuses {framed.event} bodies that decode: {again}") from again
            return parts.survivors, [letter_of(record, reason) for record, reason in parts.poison]
        return framed.records, []

    def _send(self, framed: Framed) -> None:
        table = landing_table(framed.event)
        self.patiently(lambda: self._store.insert(table, framed.columns, framed.chunks), f"insert into {table}")

    def _rejected(self, records: Sequence[LogRecord], blocks: Sequence[LogBlock]) -> list[DeadLetter]:
        """Dead letters of the records that the landing tables rejected."""
        if not records and not blocks:
            return []
        ranges: dict[tuple[Stream, int], tuple[int, int]] = {}
        items: list[LogRecord | LogBlock] = [*records, *blocks]
        for item in items:
            low, high = ranges.get((item.stream, item.partition), (item.offset, item.offset))
            ranges[item.stream, item.partition] = (min(low, item.offset), max(high, item.next_offset - 1))
        condition = " OR ".join(
            f"(stream = '{stream}' AND partition = {partition} AND log_offset BETWEEN {low} AND {high})"
            for (stream, partition), (low, high) in ranges.items()
        )
        # Older rejects of the same range (a replay) give the same letters again, which is no error.
        sql = f"SELECT DISTINCT stream, partition, log_offset, reason FROM rejects WHERE {condition}"
        rows: list[tuple[Any, ...]] = []
        self.patiently(lambda: rows.extend(self._store.rows(sql)), "rejects")
        if not rows:
            return []
        by_place = {(record.stream, record.partition, record.offset): record for record in records}
        for block in blocks:
            if any(
                (stream, partition) == (block.stream, block.partition) and block.offset <= offset < block.next_offset
                for stream, partition, offset, _ in rows
            ):
                by_place |= {(one.stream, one.partition, one.offset): one for one in block.take_apart()}
        return [
            letter_of(by_place[stream, partition, offset], f"makes no sense: {reason}")
            for stream, partition, offset, reason in rows
            if (stream, partition, offset) in by_place
        ]

    def patiently(self, call: Callable[[], None], what: str) -> None:
        """Run `call`, again and again while the store is busy; says so once, and when it is over."""
        delay = self._retry.first_seconds
        attempts = 0
        while True:
            try:
                call()
            except (StoreBusy, OSError) as exc:
                if attempts == 0:
                    _log.warning("the store is busy or away; waiting, nothing is lost: %s: %s", what, str(exc)[:300])
                attempts += 1
                self._metrics.retry()
                if self._wait(delay * random.uniform(0.5, 1.0)):
                    raise Abandoned(what) from exc
                delay = min(self._retry.max_seconds, delay * 2)
            else:
                if attempts:
                    _log.info("the store is back: %s succeeded at attempt %d", what, attempts + 1)
                return


class _RefusalGauge:
    """Share and longest row of refused records; raises past the limits."""

    def __init__(self, limits: DeadLetterLimits) -> None:
        self._limits = limits
        self._batches: deque[tuple[int, int]] = deque()
        self._records = 0
        self._refused = 0
        self._consecutive = 0

    def count(self, records: int, dead: Sequence[DeadLetter]) -> None:
        refused = len(dead)
        self._consecutive = self._consecutive + refused if refused == records else 0
        self._batches.append((records, refused))
        self._records += records
        self._refused += refused
        while self._batches and self._records - self._batches[0][0] >= self._limits.window:
            old_records, old_refused = self._batches.popleft()
            self._records -= old_records
            self._refused -= old_refused
        over_row = self._consecutive > self._limits.max_consecutive
        over_ratio = self._records >= self._limits.window and self._refused > self._limits.max_ratio * self._records
        if dead and (over_row or over_ratio):
            raise SystemicFailure(
                f"{self._refused} of the last {self._records} records cannot be stored (the last: {dead[-1].reason}): "
                "this is no matter of single bodies; mend it, then restart the worker, which goes on where it was"
            )


def read_positions(store: Store) -> dict[tuple[Stream, int], int]:
    """Next offset per stream and partition that the store holds everything before.

    Raises:
        StoreBusy, StoreError: the store cannot be asked.
    """
    rows = store.rows("SELECT stream, partition, max(next_offset) FROM ingest_positions GROUP BY stream, partition")
    return {(stream, int(partition)): int(offset) for stream, partition, offset in rows}


def write_positions(store: Store, positions: dict[tuple[Stream, int], int]) -> None:
    """Record that everything before `positions` is in the store; smaller ones than recorded change nothing."""
    if not positions:
        return
    items = ", ".join(
        f"('{stream}', {int(partition)}, {int(offset)})" for (stream, partition), offset in positions.items()
    )
    store.execute(
        "INSERT INTO ingest_positions (stream, partition, next_offset, updated_at) "
        f"SELECT item.1, item.2, item.3, now64(3, 'UTC') FROM (SELECT arrayJoin([{items}]) AS item)"
    )
