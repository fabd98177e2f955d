"""How record batches come out of kafka-python: whole where the store can take them whole, else record by record.

kafka-python makes some fifteen Python objects of each record: 15 us at one point a record, four times what ClickHouse
needs to store it. Its fetcher takes batches apart in one class that can be replaced; ours leaves those whole that
`block` can hand on, and makes `LogRecord`s of the others. Checksums, codecs and the walk stay kafka-python's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import METRICS, SCHEMA_HEADER, Stream

from ..block import fingerprint_of
from . import LogBlock, LogRecord

if TYPE_CHECKING:
    from kafka import KafkaConsumer
    from kafka.record.default_records import DefaultRecordBatch

__all__ = ["block_of", "deliver_batches", "records_of"]

_NO_PRODUCER_TIME = 0
_DEFAULT_MAGIC = 2
"""Record batches of Kafka 0.11 and later."""


def deliver_batches(consumer: KafkaConsumer, streams: dict[str, Stream]) -> None:
    """From now on `consumer.poll` returns `LogRecord` and `LogBlock` items.

    Args:
        streams: topic -> stream, for every topic that is subscribed.
    """
    from kafka.consumer.fetcher import Fetcher
    from kafka.errors import CorruptRecordError

    class Records(Fetcher.PartitionRecords):  # type: ignore[misc,no-any-unimported,unused-ignore]
        def _unpack_records(self, at: Any, records: Any, *_: object) -> Iterator[LogRecord | LogBlock]:
            stream: Stream = streams[at.topic]
            last = None
            while (batch := records.next_batch()) is not None:
                last = batch
                if not batch.validate_crc():
                    raise CorruptRecordError(f"the checksum of the batch at offset {batch.base_offset} is wrong")
                if batch.magic == _DEFAULT_MAGIC:
                    self.leader_epoch = batch.leader_epoch
                    if batch.is_control_batch:
                        self.next_fetch_offset = batch.next_offset
                        continue
                    if stream == METRICS and batch.base_offset >= self.fetch_offset:
                        block = block_of(stream, at.partition, batch)
                        if block is not None:
                            self.next_fetch_offset = block.next_offset
                            yield block
                            continue
                for item in records_of(stream, at.partition, batch):
                    self.next_fetch_offset = item.next_offset
                    yield item
            if last is not None and last.magic == _DEFAULT_MAGIC:
                # The offsets behind the last record may be taken too (by compaction, by a transaction's end).
                self.next_fetch_offset = last.next_offset
            self.drain()

    consumer._fetcher.PartitionRecords = Records


def block_of(stream: Stream, partition: int, batch: DefaultRecordBatch) -> LogBlock | None:
    """The whole batch, or None where its records must be looked at one by one."""
    count = batch.records_count
    # Where records are missing in the middle, or where no clock is known, the usual rules do not hold.
    if count < 1 or batch.last_offset_delta != count - 1 or batch.first_timestamp <= _NO_PRODUCER_TIME:
        return None
    compressed = bytes(batch._buffer)
    batch._maybe_uncompress()
    payload = bytes(memoryview(batch._buffer)[batch._pos :])
    # One body may be too large only where all of them are.
    if len(payload) > MAX_MESSAGE_BYTES:
        return None
    fingerprint = fingerprint_of(payload, count)
    if fingerprint is None:
        return None
    shared = bool(batch.timestamp_type)
    return LogBlock(
        stream,
        partition,
        batch.base_offset,
        batch.next_offset,
        batch.max_timestamp if shared else batch.first_timestamp,
        shared,
        fingerprint,
        payload,
        partial(_taken_apart, stream, partition, compressed),
    )


def _taken_apart(stream: Stream, partition: int, batch: bytes) -> Sequence[LogRecord]:
    from kafka.record.default_records import DefaultRecordBatch

    return list(records_of(stream, partition, DefaultRecordBatch(batch)))


def records_of(stream: Stream, partition: int, batch: Any) -> Iterator[LogRecord]:
    """The records of one batch, one by one.

    Raises:
        kafka.errors.CorruptRecordError: it is not laid out as a batch; earlier records have been given out.
    """
    for record in batch:
        yield LogRecord(
            stream,
            partition,
            record.offset,
            record.offset + 1,
            max(0, record.timestamp),
            record.key,
            _fingerprint(record.headers),
            record.value,
        )


def _fingerprint(headers: Sequence[tuple[str, bytes | None]]) -> bytes | None:
    for name, value in headers:
        if name == SCHEMA_HEADER:
            return value
    return None
