"""Every message is accounted for: stored, or in the dead letters with a reason; never both, never neither.

The oracle shares no code with the worker: a bare consumer reads the brokers, fastavro and the schema file decode, and
the rules of the landing table are written down again here. So it judges any way of framing and inserting.
"""

from __future__ import annotations

import io
import math
import struct
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import fastavro

from runstream_ingest.dead_letter import DeadLetter
from runstream_schemas.names import SCHEMA_HEADER, topic
from tests.e2e.kafka_line import Line, metric_schema
from tests.services.kafka import read_all

MAX_TIME_MS: Final = 9_214_646_400_000
MAX_MESSAGE_BYTES: Final = 1_048_576
LETTER_BODY_BYTES: Final = 1_000_000
"""Bodies up to here are kept whole in a dead letter."""

Place = tuple[int, int]
"""(partition, offset)."""
Point = tuple[str, str, int, int, int, int, bytes]
"""run, key, step, time, writer, seq, and the value's eight bytes (NaN is equal to itself so)."""


@dataclass
class Account:
    """What became of every offset of the metrics topic."""

    stored: set[Place] = field(default_factory=set)
    dead: dict[Place, str] = field(default_factory=dict)
    """Why, by place."""
    empty: set[Place] = field(default_factory=set)
    """Sound bodies without a single point."""
    reasons: Counter[str] = field(default_factory=Counter)
    """How often each beginning of a reason came up to its first colon."""


def account(line: Line, *, unreadable: Mapping[Place, str] | None = None, replayed: bool = False) -> Account:
    """Compare brokers, store and dead letters record by record.

    Args:
        unreadable: offsets that a bare consumer cannot read (damaged on disk, gone by retention), each with a word that
            its letter's reason must hold.
        replayed: letters marked as replayed count as stored.

    Raises:
        AssertionError: a record is lost, in both, changed, or blamed without a reason.
    """
    lost = dict(unreadable or {})
    records = {
        (record.partition, record.offset): record
        for record in read_all(line.address, topic(line.address.prefix, "metrics"), lost)
    }
    assert not records.keys() & lost.keys()
    letters = _letters(line)
    if replayed:
        letters = {place: letter for place, letter in letters.items() if not letter.replayed}
    sound: dict[Point, set[Place]] = {}
    result = Account()
    for place, record in records.items():
        points, doubtful = _points(record)
        if points is None or (doubtful and place in letters):
            letter = letters.pop(place, None)
            assert letter is not None, f"{place} can never be stored, but has no dead letter: {record!r:.300}"
            _check_letter(place, letter, record)
            result.dead[place] = letter.reason
        else:
            assert place not in letters, f"{place} is sound, but a dead letter: {letters[place].reason}"
            for point in points:
                sound.setdefault(point, set()).add(place)
            (result.stored if points else result.empty).add(place)
    for place, word in lost.items():
        letter = letters.pop(place, None)
        assert letter is not None, f"{place} cannot be read, but has no dead letter"
        assert word in letter.reason and letter.reason.startswith("unreadable: "), letter.reason
        result.dead[place] = letter.reason
    assert not letters, f"dead letters of no record: {letters}"
    rows = line.sql(
        "SELECT run_id, key, step, toUnixTimestamp64Milli(timestamp), writer, seq, reinterpretAsUInt64(value), "
        "log_partition, log_offset FROM points FINAL"
    )
    found: dict[Point, Place] = {}
    for run, key, step, time_ms, writer, seq, bits, partition, offset in rows:
        point = (run, key, int(step), int(time_ms), int(writer), int(seq), struct.pack("<Q", int(bits)))
        assert point not in found, f"{point} is stored twice"
        found[point] = (int(partition), int(offset))
    missing, invented = sound.keys() - found.keys(), found.keys() - sound.keys()
    assert not missing, f"{len(missing)} points are not stored, for example {sorted(missing)[:3]}"
    assert not invented, f"{len(invented)} points were never logged, for example {sorted(invented)[:3]}"
    strangers = {point: place for point, place in found.items() if place not in sound[point]}
    assert not strangers, f"stored under another record's place: {list(strangers.items())[:3]}"
    _check_rollup(line, found.keys())
    result.reasons = Counter(reason.split(":")[0] for reason in result.dead.values())
    return result


def _check_rollup(line: Line, points: Collection[Point]) -> None:
    """What is derived on insert says the same as the points, although batches were repeated."""
    by_series: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
    for run, key, step, time_ms, _, _, value in points:
        by_series.setdefault((run, key), []).append((step, time_ms, struct.unpack("<d", value)[0]))
    # The whole tuple: under FINAL the engine takes a part of an aggregated one from the first data part alone.
    rows = line.sql("SELECT run_id, key, toString(last), min, max FROM rollup FINAL")
    assert {(run, key) for run, key, *_ in rows} == by_series.keys()
    for run, key, last, low, high in rows:
        series = by_series[run, key]
        if not any(math.isnan(each[2]) for each in series):
            step, stamp, value, _ = last.strip("()").split(",")
            time_ms = round(datetime.fromisoformat(stamp.strip("'") + "+00:00").timestamp() * 1_000)
            values = [each[2] for each in series]
            assert (int(step), time_ms, float(value)) == max(series), f"the rollup of {run} {key}"
            assert (low, high) == (min(values), max(values)), f"the rollup of {run} {key}"


def _letters(line: Line) -> dict[Place, DeadLetter]:
    """By each offset that they cover."""
    found: dict[Place, DeadLetter] = {}
    for letter in line.dead_letters():
        if letter.source.stream == "metrics":
            for offset in range(letter.source.offset, letter.next_offset):
                place = (letter.source.partition, offset)
                assert place not in found, f"{place} has two letters"
                found[place] = letter
    return found


def _check_letter(place: Place, letter: DeadLetter, record: Any) -> None:
    assert letter.reason
    assert (letter.source.offset, letter.next_offset) == (place[1], place[1] + 1)
    assert letter.source.time_ms == record.timestamp
    assert letter.fingerprint == _mark(record)
    assert (letter.key or b"") == (record.key or b"")[:16_384]
    if record.value is None or len(record.value) <= LETTER_BODY_BYTES:
        assert letter.body == record.value
    else:
        assert letter.body in (None, record.value)


def _mark(record: Any) -> bytes | None:
    found: bytes | None = dict(reversed(record.headers)).get(SCHEMA_HEADER)
    return found


def _points(record: Any) -> tuple[list[Point] | None, bool]:
    """What the record says, or None if it can never be stored.

    The second value is true where Avro leaves it open whether the body is sound: numbers in more bytes than they need
    or beyond 64 bits, which come of flipped bits alone. Those may be stored or dead, but one of the two.
    """
    schema, mark = metric_schema()
    body = record.value
    if _mark(record) != mark or not body or len(body) > MAX_MESSAGE_BYTES:
        return None, False
    source = io.BytesIO(body)
    try:
        batch: Any = fastavro.schemaless_reader(source, schema, None)
    except Exception:  # fastavro raises many kinds for one cause
        return None, False
    if source.tell() != len(body):
        return None, False
    keys, steps, times, values = batch["keys"], batch["steps"], batch["times"], batch["values"]
    ki, ci, seqs = batch["ki"], batch["ci"], batch["seqs"]
    sound = (
        1 <= len(batch["run_id"].encode()) <= 256
        and len(ki) == len(ci) == len(values)
        and len(steps) == len(times)
        and (not seqs or len(seqs) == len(values))
        and all(0 <= index < len(keys) for index in ki)
        and all(0 <= index < len(steps) for index in ci)
        and all(0 <= each < MAX_TIME_MS for each in times)
        and all(1 <= len(key.encode()) <= 1_000 for key in keys)
    )
    if not sound:
        return None, False
    again = io.BytesIO()
    try:
        fastavro.schemaless_writer(again, schema, batch)
    except Exception:
        doubtful = True
    else:
        doubtful = again.getvalue() != body
    seqs = seqs or [_wrapped(batch["first_seq"] + number) for number in range(len(values))]
    said = [
        (
            batch["run_id"],
            keys[key],
            _wrapped(steps[call]),
            times[call],
            _wrapped(batch["writer"]),
            _wrapped(seq),
            struct.pack("<d", value),
        )
        for key, call, seq, value in zip(ki, ci, seqs, values, strict=True)
    ]
    return said, doubtful


def _wrapped(number: int) -> int:
    """As an Int64 holds it: a flipped bit may make a varint longer than 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
