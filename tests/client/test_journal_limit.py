"""The journal at its limit: resolution halves, last points stay, and what was left out is counted and shown."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runstream.config import Settings
from runstream.journal.journal import Journal
from runstream.journal.names import Name
from runstream.journal.record import POINT
from runstream.journal.segment import Segment
from runstream.journal.thin import Thinned, drop, thin, thinned_file, thinned_number
from runstream.recorder import Recorder
from runstream.transport.memory import MemoryTransport
from runstream_schemas import codec
from runstream_schemas.segment import Frame, read_frames

SECONDS = 30.0
RUN = "1" * 32
NAMES: dict[int, Name] = {1: ("run a", "often"), 2: ("run a", "rare"), 3: ("run b", "often"), 4: ("run b", "once")}


def no_pause() -> None:
    pass


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.01)


def segment_with(tmp_path: Path, number: int, names: list[int]) -> Segment:
    """A sealed segment whose point n has step n and the name `names[n]`."""
    made = Segment.prepare(str(tmp_path), 256 * 1024)
    made.adopt(str(tmp_path), number, 99)
    for step, name in enumerate(names):
        made.write(POINT.pack(name, step * 0.5, step, 1.7e9 + step))
    made.seal()
    return made


def points(part: Thinned) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(run, key) -> [(step, seq)] in order; values and times are checked."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for item in read_frames(part.frames(), 0):
        assert isinstance(item, Frame)
        body = codec.decode(item.fingerprint, item.body)[1]
        for at, value in enumerate(body["values"]):
            step = body["steps"][body["ci"][at]]
            assert value == step * 0.5 and body["times"][body["ci"][at]] == int((1.7e9 + step) * 1000)
            found.setdefault((body["run_id"], body["keys"][body["ki"][at]]), []).append((step, body["seqs"][at]))
    return found


def test_every_second_point_of_each_key_stays_and_the_last(tmp_path: Path) -> None:
    """Keys are thinned by themselves: a rare one in between is not lost to a frequent one."""
    order = ([1, 1, 1, 2, 3] * 1000) + [4]
    part = segment_with(tmp_path, 3, order)
    thinned, left_out = thin(part, NAMES, 99, str(tmp_path), no_pause)
    found = points(thinned)
    for number, name in NAMES.items():
        steps = [step for step, key in enumerate(order) if key == number]
        kept = [step for step, _ in found[name]]  # type: ignore[index]
        assert kept == steps[(len(steps) - 1) % 2 :: 2]
        assert kept[-1] == steps[-1]
    assert left_out == {"run a": 2000, "run b": 500}
    assert thinned_number(os.path.basename(thinned.path)) == (3, 2500)
    assert thinned.size < part.size / 3
    part.remove()


def test_thinned_points_keep_their_identity(tmp_path: Path) -> None:
    """The seqs are those that the same points would have had without thinning."""
    from runstream.journal.source import Source

    class Nothing:
        end = 0

        def read(self, offset: int, size: int) -> bytes:
            return b""

    order = [1, 3, 2] * 2000
    part = segment_with(tmp_path, 3, order)
    source = Source({3: part}, Nothing(), NAMES, 99, forget=lambda n: None, progress=lambda c, m: None)
    whole: dict[tuple[str, str, int], int] = {}
    while (parcel := source.next_parcel(10_000)) is not None:
        for event in parcel.events:
            body = codec.decode(event.fingerprint, event.body)[1]
            for at in range(len(body["values"])):
                step = body["steps"][body["ci"][at]]
                whole[body["run_id"], body["keys"][body["ki"][at]], step] = body["first_seq"] + at
    thinned, _ = thin(part, NAMES, 99, str(tmp_path), no_pause)
    for (run, key), found in points(thinned).items():
        assert all(whole[run, key, step] == seq for step, seq in found)
    part.remove()


def test_the_last_point_of_a_key_outlives_everything(tmp_path: Path) -> None:
    """When thinned segments must go too, the last point of a key that does not occur later stays."""
    old = segment_with(tmp_path, 1, [4, *([1, 2, 3] * 500)])
    new = segment_with(tmp_path, 2, [1, 3] * 500)
    thin_old, first = thin(old, NAMES, 99, str(tmp_path), no_pause)
    thin_new, _ = thin(new, NAMES, 99, str(tmp_path), no_pause)
    before = sum(map(len, points(thin_old).values()))
    rest, second = drop(thin_old, [thin_new], sum(first.values()), no_pause)
    assert {name: [step for step, _ in kept] for name, kept in points(rest).items()} == {
        ("run b", "once"): [0],
        ("run a", "rare"): [1499],
    }
    assert sum(second.values()) == before - 2
    assert not os.path.exists(thin_old.path) and thinned_number(os.path.basename(rest.path)) == (1, 1501 - 2)
    for part in (old, new):
        part.remove()


def test_names_of_thinned_files() -> None:
    """They carry number and count, and are told from others."""
    assert thinned_number(thinned_file(12, 345)) == (12, 345)
    assert thinned_number("0000000012.seg") is None and thinned_number("x-y.thin") is None


@pytest.fixture
def away(tmp_path: Path) -> tuple[Recorder, MemoryTransport, Path]:
    settings = Settings("memory://limit", journal_dir=tmp_path / "journals", journal_limit_bytes=1 << 20)
    log = MemoryTransport()
    log.away = "away"
    return Recorder(settings, lambda settings: log), log, tmp_path / "journals"


def held_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*"):
        if path.suffix in (".seg", ".thin"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def decoded(log: MemoryTransport) -> list[tuple[str, int, float]]:
    found: dict[tuple[int, int], tuple[str, int, float]] = {}
    for event in log.metrics:
        body = codec.decode(event.fingerprint, event.body)[1]
        for at, value in enumerate(body["values"]):
            seq = body["seqs"][at] if body["seqs"] else body["first_seq"] + at
            point = (body["keys"][body["ki"][at]], body["steps"][body["ci"][at]], value)
            assert found.setdefault((body["writer"], seq), point) == point
    return list(found.values())


def test_the_limit_holds_while_the_log_is_away(away: tuple[Recorder, MemoryTransport, Path]) -> None:
    """Eight times more than fits: the whole curve survives, thinner at its old end; ends and counts are exact."""
    recorder, log, folder = away
    channel = recorder.run_channel(RUN)
    channel.log_metric("once", 42.0, 0)
    recorder.control("params", {"run_id": RUN, "keys": ["lr"], "values": ["0.1"]})
    count = 260_000
    for step in range(count):
        channel.log_metric("loss", float(step), step)
        if step % 5_000 == 0:
            time.sleep(0.02)  # a flood beyond what thinning can take in is not the case here
    wait_for(lambda: held_bytes(folder) <= (1 << 20) * 5 // 4)
    log.away = None
    report = recorder.flush(SECONDS)
    assert report.complete and report.thinned_points > 0 and report.dropped_points == 0
    found = decoded(log)
    steps = [step for key, step, _ in found if key == "loss"]
    assert steps == sorted(steps) and len(set(steps)) == len(steps)
    assert report.thinned_points == count + 1 - len(found)
    assert steps[-1] == count - 1, "the newest is whole"
    assert ("once", 0, 42.0) in found, "no key loses its last point"
    assert max(b - a for a, b in zip(steps[-2000:], steps[-1999:], strict=False)) == 1
    wait_for(lambda: any(b"runstream.thinned_points" in event.body for event in log.control))
    assert any(b"lr" in event.body for event in log.control)
    recorder.close(SECONDS)
    assert sum(1 for path in folder.iterdir() if path.name != "kept") == 0


def test_a_killed_process_leaves_its_thinned_journal(tmp_path: Path) -> None:
    """Thinned segments are recovered like others."""
    import subprocess
    import sys

    from runstream.journal.recovery import recover

    program = """
import os, sys, time
from runstream.config import Settings
from runstream import recorder
from runstream.transport.memory import MemoryTransport
settings = Settings.from_environment({"RUNSTREAM_JOURNAL_LIMIT_BYTES": str(1 << 20)}, tracking_uri=sys.argv[1])
log = MemoryTransport()
log.away = "away"
rec = recorder.Recorder(settings, lambda settings: log)
run = rec.run_channel("1" * 32)
for step in range(100_000):
    run.log_metric("k", step * 0.5, step)
    if step % 5_000 == 0: time.sleep(0.02)
deadline = time.monotonic() + 20
while not rec.report().thinned_points and time.monotonic() < deadline: time.sleep(0.01)
time.sleep(0.3)
os.kill(os.getpid(), 9)
"""
    data = tmp_path / "data"
    assert subprocess.run([sys.executable, "-c", program, str(data)]).returncode == -9
    assert list(data.glob("journal/*/*.thin"))
    log = MemoryTransport()
    settings = Settings.from_environment({}, tracking_uri=data)
    report = recover(settings, SECONDS, connect=lambda settings: log)
    assert report.journals == 1 and not report.damaged
    found = decoded(log)
    steps = sorted(step for _, step, _ in found)
    assert len(set(steps)) == len(steps) and steps[-1] == 99_999 and len(steps) < 100_000
    assert all(value == step * 0.5 for _, step, value in found)


def test_memory_in_place_of_a_disk_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any journal on disk the oldest points go, counted; the newest arrive."""
    from runstream.journal import journal as module

    (tmp_path / "file").write_text("no folder")
    settings = Settings("memory://bounded", journal_dir=tmp_path / "file" / "journals", journal_limit_bytes=1 << 20)
    monkeypatch.setattr(module, "MAX_MEMORY_SEGMENTS", 3)
    log = MemoryTransport()
    log.away = "away"
    recorder = Recorder(settings, lambda settings: log)
    channel = recorder.run_channel(RUN)
    for step in range(50_000):
        channel.log_metric("k", float(step), step)
    recorder.control("params", {"run_id": RUN, "keys": ["lr"], "values": ["0.1"]})
    assert sum("no journal can be kept on disk" in record.getMessage() for record in caplog.records) == 1
    log.away = None
    report = recorder.flush(SECONDS)
    found = decoded(log)
    assert report.dropped_points > 0 and len(found) + report.dropped_points == 50_000
    assert [step for _, step, _ in found] == list(range(50_000 - len(found), 50_000))
    assert len(log.control) == 1
    recorder.close(SECONDS)


def test_a_journal_is_made_in_the_first_folder_that_takes_it(tmp_path: Path) -> None:
    """The next candidate is used where the first cannot be written."""
    (tmp_path / "file").write_text("no folder")
    journal = Journal.create([tmp_path / "file", tmp_path / "second"], "memory://x", None, 1 << 30)
    assert journal.folder is not None and journal.folder.parent == tmp_path / "second"
    journal.remove()
    assert os.listdir(tmp_path / "second") == []
