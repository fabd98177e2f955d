"""Dead letters tried again: their bodies go through the same checks into the store, and are marked once there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from runstream_schemas import codec

from .batch import Batch, BatchLimits, refusal
from .commit import Committer, DeadLetterLimits, Retry
from .dead_letter import DeadLetter, DeadLetters, Source
from .log import LogRecord
from .metrics import Metrics
from .store import Store

__all__ = ["ReplayResult", "record_of", "replay", "replay_known"]

UNKNOWN_SCHEMA = "unknown schema fingerprint"


@dataclass(slots=True)
class ReplayResult:
    """What became of the letters that were tried."""

    stored: int = 0
    refused: int = 0
    """Tried, and still cannot be stored; they stay as they are."""
    skipped: int = 0
    """Not tried: replayed before, or nothing was kept of them (an unreadable range)."""


def replay(
    store: Store,
    dead_letters: DeadLetters,
    choose: Callable[[DeadLetter], bool] = lambda letter: True,
    *,
    wait: Callable[[float], bool] | None = None,
    limits: BatchLimits | None = None,
) -> ReplayResult:
    """Try every letter that `choose` picks; blocks, also while the store is away. Positions are not touched.

    Safe at any time beside a worker, and to repeat: rows are idempotent, and a letter is marked once its rows are in.

    Args:
        wait: sleeps so many seconds; True to give up (raises `commit.Abandoned`).

    Raises:
        SystemicFailure: the store refuses everything.
        StoreError: the store refuses a statement.
    """
    result = ReplayResult()
    everything = DeadLetterLimits(max_consecutive=1 << 62, max_ratio=1.0)
    committer = Committer(
        store,
        dead_letters,
        wait=wait or threading.Event().wait,
        retry=Retry(),
        limits=everything,
        metrics=Metrics(),
    )
    for records in _batches(dead_letters.letters(), choose, result, limits or BatchLimits()):
        # What the landing tables said of them the last time must not be taken for what they say now.
        _forget_rejects(store, records)
        still_dead = {letter.source for letter in committer.insert(records)}
        sources = [Source(record.stream, record.partition, record.offset, record.time_ms) for record in records]
        done = [source for source in sources if source not in still_dead]
        dead_letters.mark_replayed(done)
        result.stored += len(done)
        result.refused += len(sources) - len(done)
    return result


def replay_known(store: Store, dead_letters: DeadLetters, wait: Callable[[float], bool]) -> ReplayResult:
    """Replay the letters that were refused for an unknown schema which this runstream knows."""

    def known_now(letter: DeadLetter) -> bool:
        return letter.reason.startswith(UNKNOWN_SCHEMA) and letter.fingerprint in codec.schemas()

    return replay(store, dead_letters, known_now, wait=wait)


def record_of(letter: DeadLetter) -> LogRecord:
    """The record as it came from the log."""
    source = letter.source
    return LogRecord(
        source.stream,
        source.partition,
        source.offset,
        letter.next_offset,
        source.time_ms,
        letter.key,
        letter.fingerprint,
        letter.body,
    )


def _batches(
    letters: Iterable[DeadLetter], choose: Callable[[DeadLetter], bool], result: ReplayResult, limits: BatchLimits
) -> Iterator[list[LogRecord]]:
    batch = Batch()
    for letter in letters:
        if letter.replayed or letter.body is None:
            result.skipped += 1
        elif choose(letter):
            record = record_of(letter)
            if refusal(record) is not None:
                result.refused += 1
                continue
            batch.add([record])
            if batch.fullness(limits) >= 1.0:
                yield batch.records
                batch = Batch()
    if batch.records:
        yield batch.records


def _forget_rejects(store: Store, records: list[LogRecord]) -> None:
    places: dict[tuple[str, int], list[int]] = {}
    for record in records:
        places.setdefault((record.stream, record.partition), []).append(record.offset)
    for (stream, partition), offsets in places.items():
        for first in range(0, len(offsets), 1_000):
            listed = ", ".join(str(offset) for offset in offsets[first : first + 1_000])
            where = f"stream = '{stream}' AND partition = {partition} AND log_offset IN ({listed})"
            if store.rows(f"SELECT 1 FROM rejects WHERE {where} LIMIT 1"):
                store.execute(f"DELETE FROM rejects WHERE {where}")
