"""Records, batches and segments: what is written is read back, with the same seqs however it is cut."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runstream.journal import batch as batches
from runstream.journal.batch import Batch, batch_event, parse
from runstream.journal.names import Name, Names, read_names
from runstream.journal.progress import Position, ProgressFile, read_progress
from runstream.journal.record import POINT, call_packer, call_record, explicit_time, plausible_time, time_ms
from runstream.journal.segment import HEADER_BYTES, Segment
from runstream.journal.source import Source
from runstream_schemas import codec
from runstream_schemas.limits import MAX_BODY_BYTES, MAX_TIME_MS

NAMES: dict[int, Name] = {
    1: ("run a", "loss"),
    2: ("run a", "acc"),
    3: ("run b", "loss"),
    4: ("run a", ("x", "y", "z")),
    5: ("run b", ("loss", "lr")),
}


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[Segment]:
    made = Segment.prepare(str(tmp_path), 256 * 1024)
    made.adopt(str(tmp_path), 7, 99)
    yield made
    made.remove()


class Nothing:
    """No control events."""

    end = 0

    def read(self, offset: int, size: int) -> bytes:
        return b""


def source(parts: dict[int, Segment]) -> Source:
    return Source(parts, Nothing(), NAMES, 99, forget=lambda number: None, progress=lambda control, metrics: None)


def identities(source: Source, sizes: Iterator[int]) -> dict[tuple[str, int, str, int, int], float]:
    """(run, seq, key, step, time) -> value of everything the source has; each must come once."""
    found: dict[tuple[str, int, str, int, int], float] = {}
    while (parcel := source.next_parcel(next(sizes))) is not None:
        for event in parcel.events:
            body = codec.decode(event.fingerprint, event.body)[1]
            for at, value in enumerate(body["values"]):
                ci = body["ci"][at]
                key = body["keys"][body["ki"][at]]
                identity = (body["run_id"], body["first_seq"] + at, key, body["steps"][ci], body["times"][ci])
                assert identity not in found
                found[identity] = value
        source.acknowledge(parcel)
    return found


def fill(segment: Segment, count: int, seed: int = 1) -> dict[tuple[str, str, int], float]:
    """Mixed records; what they say."""
    rng = random.Random(seed)
    said = {}
    packers = {number: call_packer(len(name[1])) for number, name in NAMES.items() if isinstance(name[1], tuple)}
    for step in range(count):
        number = rng.choice(list(NAMES))
        run_id, key = NAMES[number]
        when = rng.choice((time.time(), explicit_time(rng.randrange(MAX_TIME_MS))))
        if isinstance(key, tuple):
            values = [rng.random() for _ in key]
            segment.write(call_record(number, packers[number](step, when, *values)))
            said.update({(run_id, name, step): value for name, value in zip(key, values, strict=True)})
        else:
            value = rng.random()
            segment.write(POINT.pack(number, value, step, when))
            said[run_id, key, step] = value
    return said


@pytest.mark.parametrize("timestamp", [0, 1, 999, 1_700_000_000_123, MAX_TIME_MS - 1])
def test_times_are_exact_and_never_zero(timestamp: int) -> None:
    """A given timestamp survives the double, 0 included, and is a legal record."""
    field = explicit_time(timestamp)
    assert field != 0.0 and time_ms(field) == timestamp and plausible_time(field)


def test_now_is_read_as_milliseconds() -> None:
    """time.time() is kept as seconds and read as whole milliseconds."""
    assert time_ms(1_700_000_000.1239) == 1_700_000_000_123


@pytest.mark.parametrize("seed", range(5))
def test_everything_written_is_read_once(segment: Segment, seed: int) -> None:
    """Points and calls of two runs, mixed, in chunks of any size."""
    said = fill(segment, 3000, seed)
    rng = random.Random(seed)
    found = identities(source({7: segment}), iter(lambda: rng.choice((8, 32, 100, 8192, 32768)), None))
    assert {(run, key, step): value for (run, _, key, step, _), value in found.items()} == said
    assert len({(run, seq) for run, seq, *_ in found}) == len(found), "a seq is used once per run"


def test_seqs_do_not_depend_on_how_it_is_cut(segment: Segment) -> None:
    """Whoever sends the records again, in other batches, gives each the identity it had."""
    fill(segment, 4000)
    cuts = [(8,), (32,), (8192,), (32768,), (24, 1000, 5000, 40, 8192)]
    results = []
    for cut in cuts:
        sizes = (cut[at % len(cut)] for at in range(10**9))
        results.append(identities(source({7: segment}), sizes))
    assert all(result == results[0] for result in results)


def test_seqs_survive_a_restart_at_any_record(segment: Segment) -> None:
    """A reader that begins at an acknowledged place counts what came before it in the block."""
    from runstream.journal.source import End

    fill(segment, 2500)
    whole = identities(source({7: segment}), iter(lambda: 8192, None))
    reader = source({7: segment})
    ends = [HEADER_BYTES]
    while (parcel := reader.next_parcel(500)) is not None:
        ends.append(parcel.metrics.offset)
        reader.acknowledge(parcel)
    for offset in random.Random(3).sample(ends, 15):
        begun = Source(
            {7: segment},
            Nothing(),
            NAMES,
            99,
            forget=lambda number: None,
            progress=lambda control, metrics: None,
            start=End(0, Position(7, offset)),
        )
        rest = identities(begun, iter(lambda: 8192, None))
        assert rest.items() <= whole.items()


def test_rewind_reads_the_same_again(segment: Segment) -> None:
    """After a failed send the same records come again, with the same seqs."""
    fill(segment, 3000)
    reader = source({7: segment})
    first = reader.next_parcel(8192)
    assert first is not None
    reader.acknowledge(first)
    lost = [reader.next_parcel(8192) for _ in range(3)]
    reader.rewind()
    again = [reader.next_parcel(8192) for _ in range(3)]
    assert [decoded(parcel) for parcel in lost] == [decoded(parcel) for parcel in again]


def decoded(parcel: object) -> list[dict[str, object]]:
    found = []
    for event in parcel.events:  # type: ignore[attr-defined]
        body = codec.decode(event.fingerprint, event.body)[1]
        body.pop("sent_at")
        found.append(body)
    return found


def test_bodies_stay_below_the_limit_whatever_the_keys() -> None:
    """Many of the longest keys in their widest encoding are split over bodies; nothing is lost or renumbered."""
    names: dict[int, Name] = {number: ("run", chr(0x10000 + number) * 250) for number in range(1, 1001)}
    data = b"".join(POINT.pack(number, 1.0, 0, 1.0) for number in names)
    found, used, needed = parse(data, names, 500, {})
    assert used == len(data) and not needed and len(found) > 1
    assert all(len(batch_event(batch, 1, 1).body) < MAX_BODY_BYTES for batch in found)
    expected = 500
    for batch in found:
        assert batch.first_seq == expected
        expected += len(batch.values)
    assert sum(len(batch.values) for batch in found) == 1000


def test_largest_body_of_two_blocks_of_values_fits() -> None:
    """The most values that one batch can hold, with keys just below the cut."""
    batch = Batch("r" * 256, 1)
    batch.keys = ["k" * 250] * (batches.MAX_KEY_BYTES // 1000 + 1)
    for at in range(8192):
        batch.steps.append(-(1 << 63))
        batch.times.append(MAX_TIME_MS - 1)
        batch.ki.append(300)
        batch.ci.append(at)
        batch.values.append(1.0)
        batch.seqs.append(1 << 60)
    assert len(batch_event(batch, 1 << 62, 1).body) < MAX_BODY_BYTES


def test_a_sealed_segment_refuses_writes(segment: Segment) -> None:
    """Late writers get ValueError; what was written stays readable."""
    segment.write(POINT.pack(1, 0.5, 0, 1.0))
    segment.seal()
    segment.seal()
    with pytest.raises(ValueError):
        segment.write(POINT.pack(1, 0.5, 1, 1.0))
    assert segment.end() == HEADER_BYTES + POINT.size


def test_a_full_segment_refuses_writes(segment: Segment) -> None:
    """The record that does not fit is refused as a whole."""
    count = 0
    with pytest.raises(ValueError):
        while True:
            segment.write(POINT.pack(1, 0.5, count, 1.0))
            count += 1
    assert count == (256 * 1024 - HEADER_BYTES) // 32


def test_a_segment_has_its_blocks_from_the_start(tmp_path: Path) -> None:
    """Preallocated and written: a full disk cannot kill the process later."""
    made = Segment.prepare(str(tmp_path), 256 * 1024)
    status = os.stat(made.path or "")
    assert status.st_size == 256 * 1024 and status.st_blocks * 512 >= 256 * 1024
    made.remove()


def test_names_come_back(tmp_path: Path) -> None:
    """Ids are given once, with any legal key, and a torn last line is ignored."""
    names = Names(str(tmp_path))
    keys: list[Name] = [("run", "loss"), ("run", ("a", "b")), ("läuft", 'quote " and \\'), ("run", "line / 🚀")]
    assert [names.add(key) for key in keys] == [(1, None), (2, None), (3, None), (4, None)]
    names.close()
    data = (tmp_path / "names").read_bytes()
    assert read_names(data) == (dict(enumerate(keys, 1)), 0)
    assert read_names(data + b'[5,"run","to') == (dict(enumerate(keys, 1)), 0)
    assert read_names(b'[0,"run","x"]\nnonsense\n[1,"run",7]\n[2,"r","\\ud800"]\n' + data)[1] == 4


def test_progress_survives_damage(tmp_path: Path) -> None:
    """What does not check out reads as the beginning."""
    file = ProgressFile(str(tmp_path))
    file.write(123, Position(4, 5678))
    file.close()
    assert read_progress(str(tmp_path)) == (123, Position(4, 5678))
    data = bytearray((tmp_path / "progress").read_bytes())
    data[12] ^= 1
    (tmp_path / "progress").write_bytes(data)
    assert read_progress(str(tmp_path)) == (0, Position())
    (tmp_path / "progress").unlink()
    assert read_progress(str(tmp_path)) == (0, Position())
