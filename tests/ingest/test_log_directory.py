"""The directory log: segments, torn tails, damage, retention, positions that do not fit, waking up."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from runstream.transport import Event
from runstream.transport.directory import DirectoryTransport
from runstream_ingest.log import LogRecord, Unreadable
from runstream_ingest.log import directory as module
from runstream_ingest.log.directory import DirectoryLog, end_positions, remove_old_segments, start_positions
from runstream_ingest.log.watch import Watch
from runstream_schemas.names import Stream
from runstream_schemas.segment import encode_frame, segment_name
from tests.contract.test_event_log import MARK, DirectoryHarness, bodies, take

PLACE: tuple[Stream, int] = ("metrics", 0)


def opened(root: Path, position: int | None = None, boot_id: str = "boot") -> DirectoryLog:
    log = DirectoryLog(root, boot_id=boot_id)
    log.start({} if position is None else {PLACE: position})
    return log


def drain(log: DirectoryLog) -> list[LogRecord | Unreadable]:
    found: list[LogRecord | Unreadable] = []
    while items := log.poll(0):
        found += items
    return found


def fill(root: Path, count: int, segment_bytes: int = 1_000) -> list[bytes]:
    harness = DirectoryHarness(root, segment_bytes)
    wanted = [b"%d-" % number * 20 for number in range(count)]
    for body in wanted:
        harness.append("metrics", body)
    return wanted


def test_a_torn_tail_is_waited_for_while_its_writer_lives(tmp_path: Path) -> None:
    """Half a frame under the lock is a frame in the making: nothing is reported, then it comes whole."""
    frame = encode_frame(1, MARK, "k", b"slow" * 100)
    folder = tmp_path / "metrics"
    folder.mkdir()
    log = opened(tmp_path)
    with open(folder / "lock", "a") as lock, open(folder / segment_name(0), "ab", buffering=0) as file:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.write(frame[:57])
        assert log.poll(0.05) == []
        file.write(frame[57:])
    assert bodies(take(log, 1)) == [b"slow" * 100]
    log.close()


def test_the_clients_appender_and_the_reader_agree_about_torn_tails(tmp_path: Path) -> None:
    """Whoever meets the torn tail first: every frame that was acknowledged is read once, at joining offsets."""
    rng = random.Random(9)
    root = tmp_path / "log"
    transport = DirectoryTransport(root)
    log = opened(root)
    wanted: list[bytes] = []
    got: list[LogRecord | Unreadable] = []
    for number in range(60):
        body = b"%d-" % number * rng.randrange(1, 50)
        transport.send([Event("metrics", "k", MARK, body)]).result(10)
        wanted.append(body)
        [last] = sorted((root / "metrics").glob("*.log"))[-1:]
        if rng.random() < 0.5:
            torn = encode_frame(1, MARK, "k", b"killed" * 20)
            with open(last, "ab") as file:
                file.write(torn[: rng.randrange(1, len(torn))])
        if rng.random() < 0.5:
            got += log.poll(0.02)
    got += drain(log)
    assert bodies(got) == wanted
    assert all(item.next_offset == following.offset for item, following in pairwise(got))
    assert got[-1].next_offset == transport.end_positions(5)[PLACE] == end_positions(root)[PLACE]
    log.close()
    transport.close(5)


@pytest.mark.parametrize("cut", [1, 3, 4, 8, 30, 31, 32, 100, 200])
def test_a_torn_tail_without_a_writer_is_cut_off(tmp_path: Path, cut: int) -> None:
    """Its writer was killed and nobody was told of it: what is appended next stands in its place and is read."""
    harness = DirectoryHarness(tmp_path, 100_000)
    harness.append("metrics", b"first")
    harness.write("metrics", encode_frame(1, MARK, "k", b"torn" * 100)[:cut])
    log = opened(tmp_path)
    [first] = take(log, 1)
    assert log.poll(0.02) == []
    assert first.next_offset == end_positions(tmp_path)[PLACE]
    harness.append("metrics", b"next")
    [following] = take(log, 1)
    assert bodies([following]) == [b"next"]
    assert following.offset == first.next_offset
    log.close()


def mark(folder: Path, size: int) -> None:
    """What an appender leaves in the lock's file."""
    (folder / "lock").write_bytes(struct.pack("<qqq", 0, size, size ^ 0x52534D41524B))


def test_frames_behind_the_mark_are_read_once_their_writer_is_done(tmp_path: Path) -> None:
    """A writer whose disk is full takes whole frames back: until it marks them or lets go they are not there."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    first, second = (encode_frame(1, MARK, "k", body) for body in (b"one", b"two"))
    mark(folder, len(first))
    log = opened(tmp_path)
    with open(folder / "lock", "r+b") as lock, open(folder / segment_name(0), "ab", buffering=0) as file:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.write(first + second)
        assert bodies(take(log, 1)) == [b"one"]
        assert log.poll(0.05) == []
        os.truncate(folder / segment_name(0), len(first))
        file.write(encode_frame(1, MARK, "k", b"another"))
        assert log.poll(0.05) == []
        mark(folder, (folder / segment_name(0)).stat().st_size)
        assert bodies(take(log, 1)) == [b"another"]
        file.write(second)
    assert bodies(take(log, 1)) == [b"two"]
    log.close()


def test_acknowledged_frames_that_are_damaged_are_never_cut(tmp_path: Path) -> None:
    """Below the mark a broken end is a range of its own, and appenders go on behind it."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    first, second = (encode_frame(1, MARK, "k", body) for body in (b"one", b"two"))
    broken = second[:-1] + bytes([second[-1] ^ 1])
    (folder / segment_name(0)).write_bytes(first + broken)
    mark(folder, len(first + broken))
    log = opened(tmp_path)
    items = drain(log)
    assert bodies(items) == [b"one"]
    assert [type(item) for item in items] == [LogRecord, Unreadable]
    assert items[-1].next_offset == len(first + broken) == end_positions(tmp_path)[PLACE]
    log.close()


def test_a_torn_tail_of_a_finished_segment_is_unreadable(tmp_path: Path) -> None:
    """Also when its last frame stops inside and writers went on in the next segment."""
    harness = DirectoryHarness(tmp_path, 100)
    harness.append("metrics", b"x" * 50)
    harness.write("metrics", encode_frame(1, MARK, "k", b"torn" * 100)[:70])
    harness.append("metrics", b"next segment")
    log = opened(tmp_path)
    items = drain(log)
    assert [type(item).__name__ for item in items] == ["LogRecord", "Unreadable", "LogRecord"]
    assert bodies(items) == [b"x" * 50, b"next segment"]
    log.close()


def test_random_damage_never_hides_sound_frames(tmp_path: Path) -> None:
    """Bytes flipped at random: every frame that was not touched is read, ranges join up, nothing is made up."""
    for seed in range(30):
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        wanted = fill(root, 60, segment_bytes=700)
        touched = set()
        for path in sorted((root / "metrics").glob("*.log")):
            data = bytearray(path.read_bytes())
            if rng.random() < 0.5:
                touched.add(path.name)
                for _ in range(rng.randrange(1, 4)):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
        log = opened(root)
        items = drain(log)
        log.close()
        assert items[0].offset == 0
        for item, following in pairwise(items):
            assert item.next_offset == following.offset
        assert items[-1].next_offset == end_positions(root)[PLACE]
        got = bodies(items)
        assert set(got) <= set(wanted)
        assert sorted(got, key=wanted.index) == got
        assert len(wanted) - len(got) <= 3 * len(touched)
        if not touched:
            assert got == wanted


def test_positions_resume_at_every_record(tmp_path: Path) -> None:
    """From each position the rest comes, over segment ends too."""
    wanted = fill(tmp_path, 40)
    log = opened(tmp_path)
    positions = [item.next_offset for item in drain(log)]
    log.close()
    assert len(list((tmp_path / "metrics").glob("*.log"))) > 3
    for index in range(0, 40, 7):
        log = opened(tmp_path, positions[index])
        assert bodies(drain(log)) == wanted[index + 1 :]
        log.close()


def test_what_retention_removed_is_a_gap_if_it_was_not_stored(tmp_path: Path) -> None:
    """From a position before the log's start, the missing range is said; from one behind it, nothing is."""
    fill(tmp_path, 40)
    segments = sorted((tmp_path / "metrics").glob("*.log"))
    segments[0].unlink()
    segments[1].unlink()
    start = int(segments[2].stem)
    assert start_positions(tmp_path)[PLACE] == start
    log = opened(tmp_path, 10)
    gap = drain(log)[0]
    assert isinstance(gap, Unreadable)
    assert (gap.offset, gap.next_offset, gap.reason) == (10, start, "removed by retention")
    log.close()
    for position in (None, start):
        log = opened(tmp_path, position)
        assert not any(isinstance(item, Unreadable) for item in drain(log))
        log.close()


def test_a_segment_removed_while_it_is_tailed_is_a_gap(tmp_path: Path) -> None:
    """A segment that vanishes in the middle of the log is reported, and reading goes on behind it."""
    fill(tmp_path, 40)
    segments = sorted((tmp_path / "metrics").glob("*.log"))
    segments[1].unlink()
    log = opened(tmp_path)
    items = drain(log)
    [gap] = [item for item in items if isinstance(item, Unreadable)]
    assert (gap.offset, gap.next_offset) == (int(segments[1].stem), int(segments[2].stem))
    assert items[-1].next_offset == end_positions(tmp_path)[PLACE]
    log.close()


def test_a_log_that_lost_its_end_is_read_again_and_goes_on_behind(tmp_path: Path) -> None:
    """After a power cut the store may know more than the log: new frames must not be taken for old ones."""
    wanted = fill(tmp_path, 10, segment_bytes=100_000)
    end = end_positions(tmp_path)[PLACE]
    path = tmp_path / "metrics" / segment_name(0)
    os.truncate(path, end - 150)
    log = opened(tmp_path, end)
    again = drain(log)
    assert bodies(again) == wanted[: len(bodies(again))]
    assert len(bodies(again)) >= 6
    DirectoryHarness(tmp_path, 100_000).append("metrics", b"new")
    items = take(log, 1)
    items += drain(log)
    assert items[-1].offset >= end
    assert bodies(items)[-1:] == [b"new"]
    log.close()


def test_the_last_segments_are_read_again_after_a_reboot(tmp_path: Path) -> None:
    """New frames may stand where lost ones stood; once read, the same boot does not read them again."""
    wanted = fill(tmp_path, 40)
    end = end_positions(tmp_path)[PLACE]
    log = opened(tmp_path, None, "boot 1")
    assert bodies(drain(log)) == wanted
    log.commit({PLACE: end})
    log.close()
    log = opened(tmp_path, end, "boot 1")
    assert drain(log) == []
    log.close()
    for _ in range(2):  # a process that dies before it has stored them reads them once more
        log = opened(tmp_path, end, "boot 2")
        again = drain(log)
        assert 2 <= len(bodies(again)) < len(wanted)
        assert bodies(again) == wanted[-len(bodies(again)) :]
        log.close()
    log = opened(tmp_path, end, "boot 2")
    drain(log)
    log.commit({PLACE: end})
    log.close()
    log = opened(tmp_path, end, "boot 2")
    assert drain(log) == []
    log.close()


def test_a_frame_larger_than_a_chunk_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk grows to what a frame needs."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    harness = DirectoryHarness(tmp_path, 1_000_000)
    harness.append("metrics", b"small")
    harness.append("metrics", b"large" * 10_000)
    harness.append("metrics", b"after")
    log = opened(tmp_path)
    assert bodies(take(log, 3)) == [b"small", b"large" * 10_000, b"after"]
    log.close()


def test_a_poll_wakes_up_at_an_append(tmp_path: Path) -> None:
    """Long before its time is over; the kernel tells."""
    log = opened(tmp_path)
    harness = DirectoryHarness(tmp_path)
    appender = threading.Timer(0.05, harness.append, ("metrics", b"x"))
    began = time.monotonic()
    appender.start()
    items = log.poll(20)
    assert bodies(list(items)) == [b"x"]
    assert time.monotonic() - began < 10
    appender.join()
    log.close()


def test_waiting_costs_next_to_nothing(tmp_path: Path) -> None:
    """An idle reader sleeps in the kernel: the CPU time of a second of waiting is a small part of it."""
    log = opened(tmp_path)
    before = resource.getrusage(resource.RUSAGE_THREAD)
    for _ in range(4):
        log.poll(0.25)
    after = resource.getrusage(resource.RUSAGE_THREAD)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.1
    log.close()


def test_the_watch_works_without_inotify(tmp_path: Path) -> None:
    """A folder that cannot be watched falls back to short looks."""
    watch = Watch([tmp_path / "missing"])
    assert not watch.notified
    began = time.monotonic()
    watch.clear()
    watch.wait(10)
    assert time.monotonic() - began < 5
    watch.close()


def test_retention_removes_only_what_is_stored_and_old(tmp_path: Path) -> None:
    """Stored, finished and too old: gone, after the store was synced. The rest stays, also the last segment."""
    fill(tmp_path, 40)
    segments = sorted((tmp_path / "metrics").glob("*.log"))
    synced: list[int] = []

    def sync() -> None:
        synced.append(len(list((tmp_path / "metrics").glob("*.log"))))

    later = time.time() + 8 * 86_400
    assert remove_old_segments(tmp_path, {}, sync=sync, now=later) == 0
    assert remove_old_segments(tmp_path, {PLACE: int(segments[2].stem)}, sync=sync) == 0
    assert synced == []
    assert remove_old_segments(tmp_path, {PLACE: int(segments[2].stem)}, sync=sync, now=later) == 2
    assert synced == [len(segments)]
    assert remove_old_segments(tmp_path, {PLACE: int(segments[3].stem) - 1}, sync=sync, now=later) == 0
    end = end_positions(tmp_path)[PLACE]
    remove_old_segments(tmp_path, {PLACE: end}, sync=sync, now=later)
    assert sorted((tmp_path / "metrics").glob("*.log")) == segments[-1:]
    assert end_positions(tmp_path)[PLACE] == end


def test_retention_by_size_takes_the_oldest_first(tmp_path: Path) -> None:
    """As many as are needed to come below the limit."""
    fill(tmp_path, 40)
    segments = sorted((tmp_path / "metrics").glob("*.log"))
    sizes = [path.stat().st_size for path in segments]
    for index, path in enumerate(segments):
        os.utime(path, (1_000_000 + index, 1_000_000 + index))
    removed = remove_old_segments(
        tmp_path,
        {PLACE: end_positions(tmp_path)[PLACE]},
        sync=lambda: None,
        max_age_seconds=1e9,
        max_bytes=sum(sizes[2:]),
        now=1_000_000,
    )
    assert removed == 2
    assert sorted((tmp_path / "metrics").glob("*.log")) == segments[2:]
