"""Whole batches of metrics: the same rows and the same dead letters as record by record, whatever is among them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from runstream_ingest.batch import Batch
from runstream_ingest.block import LANDING, PROBE, columns, fingerprint_of, frame_blocks
from runstream_ingest.commit import Committer, DeadLetterLimits, Retry
from runstream_ingest.dead_letter import DeadLetter, DirectoryDeadLetters
from runstream_ingest.errors import StoreBusy, StoreError, SystemicFailure
from runstream_ingest.log import LogBlock
from runstream_ingest.log.kafka_records import block_of, records_of
from runstream_ingest.metrics import Metrics
from runstream_ingest.migration import migrate
from runstream_ingest.store import Store
from runstream_schemas import codec
from runstream_schemas.names import SCHEMA_HEADER
from tests.services.chdb_process import ChdbProcess
from tests.services.events import METRICS, NOW, body, points, started

Record = tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes]]]
"""Key, value, headers."""
HEADERS = [(SCHEMA_HEADER, METRICS)]
TABLES = {
    "points": "run_id, key, step, toUnixTimestamp64Milli(timestamp), value, writer, seq, log_partition, log_offset",
    "rollup": "run_id, key, tupleElement(last, 'step'), tupleElement(last, 'value'), min, max",
    "run_facts": "run_id, heartbeat_at",
}


def batch_of(records: Sequence[Record], *, offset: int = 0, codec_id: int = 3, shared_time: bool = True) -> object:
    """One Kafka record batch as kafka-python reads it.

    Args:
        codec_id: 0 none, 1 gzip, 3 lz4.
        shared_time: whether the topic keeps the broker's time, one for all, or each producer's.
    """
    from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

    builder = DefaultRecordBatchBuilder(2, codec_id, 0, -1, -1, -1, 1 << 24)
    for number, (key, value, headers) in enumerate(records):
        builder.append(number, NOW + number, key, value, list(headers))
    data = bytearray(builder.build())
    data[:8] = offset.to_bytes(8, "big")
    if shared_time:
        data[22] |= 0x08
    return DefaultRecordBatch(bytes(data))


def one(number: int, *, run: str = "a", count: int = 1) -> Record:
    """A sound record of `count` points."""
    event = points(run, [number + i / 8 for i in range(count)], first_step=number * 10, first_seq=number * 10)
    return run.encode(), body(event), HEADERS


def committer(store: Store, folder: Path) -> tuple[Committer, DirectoryDeadLetters]:
    dead = DirectoryDeadLetters(folder)
    made = Committer(
        store,
        dead,
        wait=lambda seconds: True,
        retry=Retry(0.01, 0.01),
        limits=DeadLetterLimits(),
        metrics=Metrics(),
    )
    return made, dead


def content(store: Store) -> dict[str, list[tuple[object, ...]]]:
    return {table: store.rows(f"SELECT {names} FROM {table} FINAL ORDER BY ALL") for table, names in TABLES.items()}


Outcome = tuple[dict[str, list[tuple[object, ...]]], list[DeadLetter]]


@pytest.fixture(scope="module")
def stores(chdb: ChdbProcess) -> Iterator[tuple[Store, Store]]:
    """Two migrated databases."""
    made = chdb.store(), chdb.store()
    for store in made:
        migrate(store)
    yield made
    for store in made:
        store.execute(f"DROP DATABASE {store.database}")
        store.close()


@pytest.fixture
def both_ways(stores: tuple[Store, Store], tmp_path: Path) -> Callable[[list[object]], tuple[Outcome, Outcome]]:
    """Stores the same batches record by record and whole, each in a store of its own; what came of either."""

    def run(made: list[object]) -> tuple[Outcome, Outcome]:
        outcomes: list[Outcome] = []
        for name, store in zip(("single", "whole"), stores, strict=True):
            for table in (*TABLES, "rejects", "ingest_positions"):
                store.execute(f"TRUNCATE TABLE {table}")
            given, dead = committer(store, tmp_path / f"{name}-{store.database}")
            batch = Batch()
            for data in made:
                copy = type(data)(bytes(data._buffer))  # type: ignore[attr-defined]
                block = block_of("metrics", 3, copy) if name == "whole" else None
                batch.add(list(records_of("metrics", 3, copy)) if block is None else [block])
            assert bool(batch.blocks) == (name == "whole")
            given.commit(batch)
            letters = sorted(dead.letters(), key=lambda letter: letter.source)
            outcomes.append((content(store), letters))
        return outcomes[0], outcomes[1]

    return run


def reasons(letters: Sequence[DeadLetter]) -> list[tuple[int, bytes | None, bytes | None]]:
    return [(letter.source.offset, letter.fingerprint, letter.body) for letter in letters]


@pytest.mark.chdb
@pytest.mark.parametrize("shared_time", [True, False])
@pytest.mark.parametrize("codec_id", [0, 1, 3])
def test_whole_batches_give_the_rows_that_single_records_give(
    both_ways: Callable[[list[object]], tuple[Outcome, Outcome]], codec_id: int, shared_time: bool
) -> None:
    """Points with their place in the log, rollup and heartbeat; any codec, either clock."""
    made = [
        batch_of(
            [one(n, run=f"r{n % 3}", count=1 + n % 5) for n in range(40)], codec_id=codec_id, shared_time=shared_time
        ),
        batch_of([one(99, count=300)], offset=40, codec_id=codec_id, shared_time=shared_time),
    ]
    single, whole = both_ways(made)
    assert whole == single
    assert len(whole[0]["points"]) == sum(1 + n % 5 for n in range(40)) + 300
    assert {row[8] for row in whole[0]["points"]} == set(range(41))


POISON: dict[str, Callable[[bytes], Record]] = {
    "truncated": lambda good: (b"a", good[:-3], HEADERS),
    "trailing bytes": lambda good: (b"a", good + b"\x00\x02", HEADERS),
    "empty": lambda good: (b"a", b"", HEADERS),
    "null": lambda good: (b"a", None, HEADERS),
    "one more value": lambda good: (b"a", good[:-1] + b"\x02" + bytes(8), HEADERS),
    "a length of 2^60": lambda good: (b"a", b"\xfe" * 8 + b"\x1f" + good[1:], HEADERS),
    "another record inside": lambda good: (
        b"a",
        good + b"\x02\x20runstream-schema\x10" + METRICS + b"\x00" * 4 + b"\x02a\x00" + good,
        HEADERS,
    ),
}


@pytest.mark.chdb
@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize("place", [0, 7, 19])
def test_poison_in_a_batch_costs_itself_alone(
    both_ways: Callable[[list[object]], tuple[Outcome, Outcome]], kind: str, place: int
) -> None:
    """Its neighbours are stored once, it is a dead letter, at the first, a middle and the last place."""
    records = [one(n) for n in range(20)]
    records[place] = POISON[kind](records[place][1] or b"")
    sound = batch_of([one(n, run="b") for n in range(100, 110)], offset=20)
    single, whole = both_ways([batch_of(records), sound])
    assert whole[0] == single[0]
    assert reasons(whole[1]) == reasons(single[1]) == [(place, METRICS, records[place][1])]
    assert {row[8] for row in whole[0]["points"]} == set(range(30)) - {place}


@pytest.mark.chdb
def test_a_body_that_makes_no_sense_is_set_aside_out_of_a_sound_batch(
    both_ways: Callable[[list[object]], tuple[Outcome, Outcome]],
) -> None:
    """It decodes, so the batch is stored whole; the landing table's rejects name the record."""
    name, fields = points("a", [1.0, 2.0])
    nonsense = codec.encode(name, {**fields, "ki": [0, 5]})
    records = [one(n) for n in range(6)]
    records[4] = (b"a", nonsense, HEADERS)
    single, whole = both_ways([batch_of(records, offset=50)])
    assert whole == single
    assert [(letter.source.offset, letter.reason) for letter in whole[1]] == [
        (54, "makes no sense: ki points outside keys")
    ]


@pytest.mark.chdb
@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_never_reach_a_neighbour(
    both_ways: Callable[[list[object]], tuple[Outcome, Outcome]], seed: int
) -> None:
    """Random damage inside bodies, in several batches at once: the same rows and letters either way."""
    rng = random.Random(seed)
    made = []
    for turn in range(8):
        records = [one(turn * 100 + n, run=f"r{turn}", count=rng.choice([1, 3, 20])) for n in range(30)]
        for place in rng.sample(range(30), rng.choice([0, 1, 2])):
            key, value, headers = records[place]
            damaged = bytearray(value or b"")
            for _ in range(rng.choice([1, 1, 4])):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            records[place] = (key, bytes(damaged), headers)
        made.append(batch_of(records, offset=turn * 30))
    single, whole = both_ways(made)
    assert whole[0] == single[0]
    assert reasons(whole[1]) == reasons(single[1])


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([one(0), (b"a", one(1)[1], [])], "a record without a header"),
        (
            [one(0), (b"a", body(started("a")), [(SCHEMA_HEADER, codec.current("run_started").fingerprint)])],
            "another schema",
        ),
        ([(None, one(0)[1], HEADERS)], "no key"),
        ([(b"a", bytes(1_100_000), HEADERS)], "too large"),
    ],
)
def test_unusual_batches_are_taken_apart_at_once(records: list[Record], why: str) -> None:
    """They are seen without decoding."""
    assert block_of("metrics", 0, batch_of(records)) is None, why


def test_a_batch_with_gaps_is_taken_apart() -> None:
    """Compaction removes records; offsets must be what the batch says then."""
    from kafka.record.default_records import DefaultRecordBatch

    data = bytearray(batch_of([one(0), one(1)], codec_id=0)._buffer)  # type: ignore[attr-defined]
    data[23:27] = (5).to_bytes(4, "big")  # last offset delta
    assert block_of("metrics", 0, DefaultRecordBatch(bytes(data))) is None


def block(count: int = 3) -> LogBlock:
    found = block_of("metrics", 0, batch_of([one(n) for n in range(count)]))
    assert found is not None
    return found


def test_a_block_gives_its_records() -> None:
    """Taken apart, it is what kafka-python reads."""
    found = block(5)
    assert (len(found), found.next_offset) == (5, 5)
    taken = found.take_apart()
    assert [(one.offset, one.key, one.fingerprint) for one in taken] == [(n, b"a", METRICS) for n in range(5)]
    assert [record.body for record in taken] == [one(n)[1] for n in range(5)]
    assert fingerprint_of(found.payload, 5) == METRICS
    assert fingerprint_of(found.payload, 4) is None


def test_a_batch_counts_and_drops_blocks() -> None:
    """By their partition, bytes included."""
    batch = Batch()
    batch.add([block(3)])
    assert (batch.count(), batch.body_bytes, batch.positions) == (3, len(block(3).payload), {("metrics", 0): 3})
    batch.drop([("metrics", 0)])
    assert (batch.count(), batch.body_bytes, bool(batch)) == (0, 0, False)


@pytest.mark.chdb
@pytest.mark.parametrize("table", [LANDING, PROBE])
def test_the_store_checks_what_is_between_the_bodies(store: Store, table: str) -> None:
    """A header that is another, offsets that jump, a mark that is gone: refused, and nothing is stored."""
    sound = block(3)
    names = columns(METRICS)
    store.insert(table, names, frame_blocks([sound]))
    stored = store.rows("SELECT count() FROM points")
    trailer_at = sound.payload.rindex(b"runstream-schema")
    second = sound.payload.index(one(1)[1] or b"") - 4  # offset delta, key, body length
    for at in (trailer_at, trailer_at + 20, second):
        damaged = bytearray(sound.payload)
        damaged[at] ^= 0x04
        changed = LogBlock("metrics", 0, 0, 3, NOW, True, METRICS, bytes(damaged), sound.take_apart)
        with pytest.raises(StoreError):
            store.insert(table, names, frame_blocks([changed]))
    assert store.rows("SELECT count() FROM points") == stored == [(3 if table == LANDING else 0,)]


@pytest.mark.chdb
def test_the_landing_tuple_is_the_newest_schema(store: Store) -> None:
    """ClickHouse leaves a nested record empty without a word where a field is missing or too many."""
    [(tuple_type,)] = store.rows(
        "SELECT type FROM system.columns WHERE database = {database:String} AND table = 'landing_metric_block' "
        "AND name = 'records'",
        {"database": store.database},
    )
    names = [field["name"] for field in codec.current("metric_batch").definition["fields"]]
    found = [part.split()[0].strip("`") for part in tuple_type.removeprefix("Array(Tuple(").split(", ")]
    assert found[6:-1] == names


@pytest.mark.chdb
def test_a_store_that_refuses_sound_blocks_stops_the_worker(store: Store, tmp_path: Path) -> None:
    """A missing table is nobody's poison; nothing is set aside."""
    store.execute("DROP TABLE landing_metric_block")
    given, dead = committer(store, tmp_path)
    batch = Batch()
    batch.add([block()])
    with pytest.raises(SystemicFailure, match="landing_metric_block"):
        given.commit(batch)
    assert list(dead.letters()) == []


def test_a_busy_store_is_no_refusal(tmp_path: Path) -> None:
    """Blocks wait as records do; a worker that stops meanwhile leaves them in the log."""
    from runstream_ingest.commit import Abandoned

    class Away:
        database = "x"

        def insert(self, table: str, columns: Sequence[str], chunks: Sequence[bytes]) -> None:
            raise StoreBusy("connection refused")

    given, _ = committer(Away(), tmp_path)  # type: ignore[arg-type]
    batch = Batch()
    batch.add([block()])
    with pytest.raises(Abandoned):
        given.commit(batch)
