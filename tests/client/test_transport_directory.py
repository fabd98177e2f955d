"""The directory transport beyond the common contract: dead appenders, full and read-only disks, vanished folders."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from runstream.transport import Event, TransportError
from runstream.transport.directory import DirectoryTransport
from runstream_schemas.names import METRICS
from runstream_schemas.segment import Damage, Frame, Incomplete, encode_frame, read_frames, segment_name

FINGERPRINT = bytes(8)
SPAWN = multiprocessing.get_context("spawn")


def event(body: bytes, key: str = "run") -> Event:
    return Event(METRICS, key, FINGERPRINT, body)


def frames(log: Path) -> list[Frame | Damage | Incomplete]:
    """What a reader sees, over all segments of the metrics stream, which must leave no gap."""
    found: list[Frame | Damage | Incomplete] = []
    at = 0
    for path in sorted((log / METRICS).glob("*.log")):
        assert path.name == segment_name(at)
        data = path.read_bytes()
        found += read_frames(data, at)
        at += len(data)
    return found


def bodies(log: Path) -> list[bytes]:
    found = frames(log)
    assert all(isinstance(item, Frame) for item in found), [item for item in found if not isinstance(item, Frame)]
    return [item.body for item in found if isinstance(item, Frame)]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "data" / "log"


@pytest.fixture
def transport(log: Path) -> Iterator[DirectoryTransport]:
    made = DirectoryTransport(log)
    yield made
    made.close(1.0)


def last_segment(log: Path) -> Path:
    return max((log / METRICS).glob("*.log"))


@pytest.mark.parametrize("kept", [1, 7, 20, 39, 45])
def test_a_torn_tail_is_cut_off(log: Path, transport: DirectoryTransport, kept: int) -> None:
    """An appender that died in a write leaves part of a frame; the next one removes it and nothing else."""
    transport.send([event(b"before")])
    torn = encode_frame(1, FINGERPRINT, "run", b"never whole")[:kept]
    with last_segment(log).open("ab") as file:
        file.write(torn)
    other = DirectoryTransport(log)
    other.send([event(b"after")])
    transport.send([event(b"again")])
    assert bodies(log) == [b"before", b"after", b"again"]
    other.close(1.0)


def test_whole_frames_behind_the_mark_stay(log: Path, transport: DirectoryTransport) -> None:
    """A dead appender's frames that are whole were perhaps acknowledged: only what forms no frame goes."""
    transport.send([event(b"one")])
    whole = encode_frame(1, FINGERPRINT, "run", b"two")
    with last_segment(log).open("ab") as file:
        file.write(whole + whole[:11])
    transport.send([event(b"three")])
    assert bodies(log) == [b"one", b"two", b"three"]


@pytest.mark.parametrize("mark", [b"", b"garbage", bytes(24), b"\xff" * 24])
def test_a_damaged_mark_costs_nothing(log: Path, transport: DirectoryTransport, mark: bytes) -> None:
    """Without a believable mark the segment itself is read."""
    transport.send([event(b"one"), event(b"two")])
    with last_segment(log).open("ab") as file:
        file.write(b"RSF1\x00")
    (log / METRICS / "lock").write_bytes(mark)
    other = DirectoryTransport(log)
    other.send([event(b"three")])
    assert bodies(log) == [b"one", b"two", b"three"]
    other.close(1.0)


def test_damage_in_the_middle_stays_for_the_reader(log: Path, transport: DirectoryTransport) -> None:
    """Damage that whole frames follow is not ours to repair: nothing is cut, and appending goes on behind it."""
    transport.send([event(b"one" * 50)])
    first = last_segment(log).stat().st_size
    transport.send([event(b"two")])
    data = bytearray(last_segment(log).read_bytes())
    data[first // 2] ^= 0xFF
    last_segment(log).write_bytes(data)
    (log / METRICS / "lock").write_bytes(b"")
    other = DirectoryTransport(log)
    other.send([event(b"three")])
    found = frames(log)
    assert isinstance(found[0], Damage)
    assert [item.body for item in found[1:] if isinstance(item, Frame)] == [b"two", b"three"]
    other.close(1.0)


def test_the_end_leaves_out_a_torn_tail(log: Path, transport: DirectoryTransport) -> None:
    """A reader that waits for the end must not wait for bytes that will never be a frame."""
    positions = transport.send([event(b"one")]).result(1.0)
    with last_segment(log).open("ab") as file:
        file.write(b"RSF1 torn")
    other = DirectoryTransport(log)
    assert other.end_positions(1.0)[METRICS, 0] == positions[METRICS, 0]
    other.close(1.0)


def test_segments_follow_without_gap(log: Path) -> None:
    """Rolling keeps offsets dense, also when two appenders roll in turn."""
    one, other = DirectoryTransport(log, segment_bytes=500), DirectoryTransport(log, segment_bytes=500)
    for number in range(60):
        (one if number % 3 else other).send([event(f"{number}".encode() * 20)])
    assert bodies(log) == [f"{number}".encode() * 20 for number in range(60)]
    assert len(list((log / METRICS).glob("*.log"))) > 5
    one.close(1.0)
    other.close(1.0)


def test_a_removed_old_segment_is_no_trouble(log: Path) -> None:
    """Retention takes segments away while appenders hold them open; offsets go on, even if all are gone."""
    one = DirectoryTransport(log, segment_bytes=100)
    for _ in range(5):
        end = one.send([event(b"x" * 100)]).result(1.0)[METRICS, 0]
    for path in (log / METRICS).glob("*.log"):
        path.unlink()
    assert one.send([event(b"x" * 100)]).result(1.0)[METRICS, 0] > end
    one.close(1.0)


def _append_for_ever(log: str, writer: int, noted: str) -> None:
    transport = DirectoryTransport(Path(log), segment_bytes=1 << 16)
    rng = random.Random(writer)
    with open(noted, "ab", buffering=0) as file:
        number = 0
        while True:
            size = rng.randrange(1, 6)
            batch = [event(f"{writer}/{number + at}/".encode() * rng.randrange(1, 60)) for at in range(size)]
            transport.send(batch).result(1.0)
            number += len(batch)
            file.write(f"{number}\n".encode())


def test_sixteen_appenders_killed_at_random(tmp_path: Path, log: Path) -> None:
    """Of 16 processes that append and are killed one by one, every acknowledged event is in the log, in order, once."""
    crew: list[BaseProcess] = []
    for writer in range(16):
        process = SPAWN.Process(target=_append_for_ever, args=(str(log), writer, str(tmp_path / f"noted{writer}")))
        process.start()
        crew.append(process)
    deadline = time.monotonic() + 60.0
    noted = [tmp_path / f"noted{writer}" for writer in range(16)]
    while not all(path.exists() and path.stat().st_size > 20 for path in noted) and time.monotonic() < deadline:
        time.sleep(0.02)
    rng = random.Random(7)
    rng.shuffle(crew)
    for process in crew:
        time.sleep(rng.random() * 0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    for process in crew:
        process.join()
    survivor = DirectoryTransport(log, segment_bytes=1 << 16)
    survivor.send([event(b"the last")])
    seen: dict[int, list[int]] = {}
    for body in bodies(log)[:-1]:
        writer, number = body.split(b"/")[:2]
        seen.setdefault(int(writer), []).append(int(number))
    for writer, path in enumerate(noted):
        acknowledged = int(path.read_text().split("\n")[-2])
        assert seen[writer][:acknowledged] == list(range(acknowledged))
        assert seen[writer] == list(range(len(seen[writer]))), "in order, once"
        assert len(seen[writer]) <= acknowledged + 5
    survivor.close(1.0)


def _append_until_full(log: str, result: object) -> None:
    # SIGXFSZ is ignored by Python, so that a write beyond the limit fails with EFBIG like one on a full disk.
    transport = DirectoryTransport(Path(log))
    transport.send([event(b"first")])
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        transport.send([event(b"x" * 15_000)])
        transport.send([event(b"y" * 15_000)])
        message = "no error"
    except TransportError as exc:
        message = f"{exc.retryable} {exc}"
    transport.send([event(b"z")])
    result.put(message)  # type: ignore[attr-defined]


def test_a_write_that_does_not_fit_leaves_no_trace(log: Path) -> None:
    """Short writes and refusals are undone; what fits is written afterwards."""
    queue = SPAWN.Queue()
    process = SPAWN.Process(target=_append_until_full, args=(str(log), queue))
    process.start()
    message = queue.get(timeout=60)
    process.join()
    assert message.startswith("True") and "ulimit -f" in message
    assert bodies(log) == [b"first", b"x" * 15_000, b"z"]


@contextlib.contextmanager
def mounted(where: Path, *options: str) -> Iterator[None]:
    """A small tmpfs at `where`; skips where mounting is not allowed."""
    where.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(where)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_leaves_no_torn_frame(tmp_path: Path) -> None:
    """ENOSPC in the middle of an append: a retryable error that says so, and the file ends in a whole frame."""
    with mounted(tmp_path / "disk", "-o", "size=256k"):
        log = tmp_path / "disk" / "log"
        transport = DirectoryTransport(log)
        written = 0
        with pytest.raises(TransportError, match="no space left") as caught:
            while True:
                transport.send([event(b"%d" % written * 700)])
                written += 1
        assert caught.value.retryable and written > 50
        assert bodies(log) == [b"%d" % number * 700 for number in range(written)]
        (tmp_path / "disk" / "log" / METRICS / "other.tmp").unlink(missing_ok=True)
        transport.send([event(b"small")])
        assert bodies(log)[-1] == b"small"
        transport.close(1.0)


def test_a_read_only_disk_is_an_error_and_can_still_be_read(tmp_path: Path) -> None:
    """Appending names the file system; end_positions works for a reader that may not write."""
    with mounted(tmp_path / "disk"):
        log = tmp_path / "disk" / "log"
        transport = DirectoryTransport(log)
        end = transport.send([event(b"one")]).result(1.0)[METRICS, 0]
        transport.close(1.0)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        other = DirectoryTransport(log)
        with pytest.raises(TransportError, match="read-only"):
            other.send([event(b"two")])
        assert other.end_positions(1.0)[METRICS, 0] == end
        other.close(1.0)


def test_a_file_in_the_place_of_the_folder(log: Path, transport: DirectoryTransport) -> None:
    """The error names what stands in the way; once it is gone, sending works."""
    log.parent.mkdir()
    log.write_text("in the way")
    with pytest.raises(TransportError, match="a file stands where the folder should be"):
        transport.send([event(b"one")])
    log.unlink()
    transport.send([event(b"one")])
    assert bodies(log) == [b"one"]


def test_a_removed_data_directory_is_not_made_anew(log: Path, transport: DirectoryTransport) -> None:
    """A log that begins again at 0 would confuse its readers: it is an error until a person puts the folder back."""
    transport.send([event(b"one")])
    kept = log.parent.with_name("kept")
    shutil.copytree(log.parent, kept)
    shutil.rmtree(log.parent)
    for _ in range(2):
        with pytest.raises(TransportError, match="removed while in use"):
            transport.send([event(b"two")])
    with pytest.raises(TransportError, match="removed while in use"):
        transport.end_positions(1.0)
    shutil.move(kept, log.parent)
    transport.send([event(b"three")])
    assert bodies(log) == [b"one", b"three"]


def _hold_lock(log: str, ready: object) -> None:
    import fcntl

    fd = os.open(Path(log) / METRICS / "lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    ready.set()  # type: ignore[attr-defined]
    time.sleep(600)


def test_a_stopped_appender_is_named_in_time(
    log: Path, transport: DirectoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped while it holds the lock gives an error after the wait, not a hang."""
    monkeypatch.setattr("runstream.transport.directory.LOCK_WAIT_SECONDS", 0.2)
    transport.send([event(b"one")])
    ready = SPAWN.Event()
    process = SPAWN.Process(target=_hold_lock, args=(str(log), ready), daemon=True)
    process.start()
    assert ready.wait(60)
    begun = time.monotonic()
    with pytest.raises(TransportError, match="locked by another process"):
        transport.send([event(b"two")])
    assert time.monotonic() - begun < 5.0
    process.kill()
    process.join()
    transport.send([event(b"three")])
    assert bodies(log) == [b"one", b"three"]
    process.close()
