"""Dead letters: kept whole, once each, listed and replayed; what is mended really lands."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from runstream_ingest import batch as batch_module
from runstream_ingest.commit import read_positions
from runstream_ingest.dead_letter import DeadLetter, DirectoryDeadLetters, Source
from runstream_ingest.log.memory import MemoryLog
from runstream_ingest.replay import replay
from runstream_ingest.store import Store
from runstream_ingest.worker import Worker
from runstream_schemas import codec
from tests.ingest.test_worker import FAST, memory, running
from tests.services.events import METRICS, NOW, body, points, until

LETTERS = [
    DeadLetter(Source("metrics", 0, 7, NOW), 8, "no schema header", b"run", None, b"body"),
    DeadLetter(Source("metrics", 3, 7, NOW), 8, "it's \u00fc\n\u0000 odd", None, b"\x00" * 8, b""),
    DeadLetter(Source("control", 0, 7, 0), 900, "unreadable: damage", None, None, None),
    DeadLetter(
        Source("control", 0, 1 << 60, NOW), (1 << 60) + 1, "large", b"\xff\x00", b"123", bytes(range(256)) * 4_000
    ),
]


@pytest.fixture
def dead(tmp_path: Path) -> DirectoryDeadLetters:
    return DirectoryDeadLetters(tmp_path / "log")


def test_letters_come_back_whole(dead: DirectoryDeadLetters) -> None:
    """Reason, coordinates, key, fingerprint and body, also where they are missing or not text."""
    assert list(dead.letters()) == []
    dead.put(LETTERS)
    dead.put([])
    assert list(dead.letters()) == LETTERS


def test_the_same_letter_twice_is_one(dead: DirectoryDeadLetters) -> None:
    """A worker that repeats a batch writes its letters again."""
    dead.put(LETTERS[:2])
    dead.put(LETTERS[1:])
    assert list(dead.letters()) == LETTERS


def test_marks_survive(dead: DirectoryDeadLetters) -> None:
    """Replayed letters are still listed, as replayed."""
    dead.put(LETTERS)
    dead.mark_replayed([LETTERS[1].source])
    dead.mark_replayed([])
    assert [letter.replayed for letter in dead.letters()] == [False, True, False, False]


def test_a_torn_letter_hides_no_other(dead: DirectoryDeadLetters, tmp_path: Path) -> None:
    """Half a frame of a killed writer, and damage, are stepped over."""
    dead.put(LETTERS[:2])
    [path] = (tmp_path / "log" / "dead-letters").glob("*.log")
    with open(path, "ab") as file:
        file.write(b"RSF1 half a frame")
    dead.put(LETTERS[2:])
    assert list(dead.letters()) == LETTERS


@pytest.mark.parametrize("text", ["", "metrics/0/1", "metrics/0/1/2/3", "topic/0/1/2", "metrics/a/1/2"])
def test_sources_are_checked(text: str) -> None:
    """A source is four parts with a known stream."""
    with pytest.raises(ValueError):
        Source.parse(text)
    assert Source.parse("control/2/10/5") == Source("control", 2, 10, 5)
    assert str(Source("control", 2, 10, 5)) == "control/2/10/5"


def run_to_end(log: MemoryLog, store: Store, dead: DirectoryDeadLetters, offset: int) -> None:
    with running(Worker(log, store, dead, FAST)):
        until(lambda: log.committed.get(("metrics", 0)) == offset)


def test_replay_lands_what_was_refused_for_its_time(store: Store, dead: DirectoryDeadLetters) -> None:
    """After a fix the letters' data is in the store, their rejects are gone, and a second replay does nothing."""
    log = memory()
    _, fields = points("a", [1.0, 2.0])
    wrong = codec.encode("metric_batch", {**fields, "ki": [0, 4]})
    log.append("metrics", METRICS, wrong, time_ms=NOW)
    log.append("metrics", METRICS, body(points("a", [5.0], first_step=9, first_seq=9))[:-2], time_ms=NOW)
    run_to_end(log, store, dead, 2)
    first, second = dead.letters()
    assert "ki points outside keys" in first.reason
    assert "does not decode" in second.reason
    result = replay(store, dead)
    assert (result.stored, result.refused) == (0, 2)
    assert store.rows("SELECT log_offset FROM rejects") == [(0,)]
    assert [letter.replayed for letter in dead.letters()] == [False, False]

    # The fix: the same coordinates with a body that is sound (a corrected rule would do the same to the same body).
    good = dataclasses.replace(first, body=codec.encode("metric_batch", fields))

    class Mended(DirectoryDeadLetters):
        def letters(self):  # type: ignore[no-untyped-def]
            for letter in super().letters():
                yield dataclasses.replace(good, replayed=letter.replayed) if letter.source == first.source else letter

    mended = Mended(dead._folder.parent)
    result = replay(store, mended)
    assert (result.stored, result.refused) == (1, 1)
    assert store.rows("SELECT step, value FROM metrics ORDER BY step") == [(0, 1.0), (1, 2.0)]
    assert store.rows("SELECT count() FROM rejects") == [(0,)]
    assert [letter.replayed for letter in dead.letters()] == [True, False]
    result = replay(store, mended)
    assert (result.stored, result.skipped) == (0, 1)
    assert read_positions(store) == {("metrics", 0): 2}


def test_replay_takes_only_what_is_chosen(store: Store, dead: DirectoryDeadLetters) -> None:
    """By source, reason or anything else of a letter."""
    data = body(points("a", [1.0]))
    for offset in range(3):
        dead.put([DeadLetter(Source("metrics", 0, offset, NOW), offset + 1, "was refused", None, METRICS, data)])
    result = replay(store, dead, lambda letter: letter.source.offset == 1)
    assert result.stored == 1
    assert [letter.replayed for letter in dead.letters()] == [False, True, False]


def test_letters_of_an_unknown_schema_are_replayed_once_it_is_known(
    store: Store, dead: DirectoryDeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the upgraded worker itself, when it starts."""
    log = memory()
    real = codec.schemas()
    with monkeypatch.context() as patch:
        older = {mark: schema for mark, schema in real.items() if mark != METRICS}
        patch.setattr(batch_module.codec, "schemas", lambda: older)
        log.append("metrics", METRICS, body(points("a", [1.0, 2.0])), time_ms=NOW)
        log.append("metrics", b"87654321", b"never known", time_ms=NOW)
        run_to_end(log, store, dead, 2)
    assert store.rows("SELECT count() FROM metrics") == [(0,)]
    assert [letter.reason.split(":")[0] for letter in dead.letters()] == [
        f"unknown schema fingerprint {METRICS.hex()}",
        "unknown schema fingerprint 3837363534333231",
    ]
    log.assign(("control", 0), ("metrics", 0), ("metrics", 1))
    with running(Worker(log, store, dead, FAST)):
        until(lambda: store.rows("SELECT count() FROM metrics") == [(2,)])
        until(lambda: [letter.replayed for letter in dead.letters()] == [True, False])


def test_many_writers_of_letters(dead: DirectoryDeadLetters) -> None:
    """Several workers at once leave every letter whole."""

    def put(number: int) -> None:
        for offset in range(20):
            source = Source("metrics", number, offset, NOW)
            dead.put([DeadLetter(source, offset + 1, "reason", None, METRICS, b"x" * 1_000)])

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(letter.source for letter in dead.letters()) == [
        Source("metrics", number, offset, NOW) for number in range(4) for offset in range(20)
    ]
