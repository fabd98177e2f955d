"""Journals of dead processes: found, delivered once, and never lost by damage, crashes or crowds."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runstream.config import Settings
from runstream.journal.journal import DRAFT_PREFIX, GONE_PREFIX
from runstream.journal.recovery import Recovery, RecoveryReport, recover, recover_all
from runstream.journal.segment import HEADER_BYTES
from runstream.transport.memory import MemoryTransport
from runstream_schemas import codec

from .directory_log import logged

SECONDS = 30.0
POINTS = 20_000

VICTIM = """
import os, sys
from runstream.config import Settings
from runstream import recorder
from runstream.journal import journal
journal.MAX_SEGMENT_BYTES = 64 * 1024
settings = Settings.from_environment({}, tracking_uri=sys.argv[1])
from runstream.transport.memory import MemoryTransport
log = MemoryTransport()
log.away = "away"
rec = recorder.Recorder(settings, lambda settings: log)
run = rec.run_channel("1" * 32)
for step in range(int(sys.argv[2])):
    run.log_metric("k", step * 0.5, step)
run.log_metrics({"a": 1.0, "b": 2.0}, 7)
for number in range(10):
    rec.control("params", {"run_id": "1" * 32, "keys": [f"p{number}"], "values": ["v"]})
os.kill(os.getpid(), 9)
"""


def leave_journal(data: Path, points: int = POINTS) -> Path:
    """A journal whose process was killed before anything was delivered."""
    done = subprocess.run([sys.executable, "-c", VICTIM, str(data), str(points)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    return max((path for path in (data / "journal").iterdir() if path.name[0].isdigit()), key=os.path.getmtime)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dead journal to copy from."""
    return leave_journal(tmp_path_factory.mktemp("model") / "data")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def journal(model: Path, data: Path) -> Path:
    """A copy of the dead journal in `data`."""
    return Path(shutil.copytree(model, data / "journal" / model.name))


def settings_of(data: Path) -> Settings:
    return Settings.from_environment({}, tracking_uri=data)


def steps(data: Path, key: str = "k") -> list[int]:
    """Steps of a metric in the directory log, each identity once; values are checked."""
    found: dict[tuple[int, int], int] = {}
    for event, body in logged(data):
        if event == "metric_batch":
            for at, value in enumerate(body["values"]):
                if body["keys"][body["ki"][at]] == key:
                    step = body["steps"][body["ci"][at]]
                    assert key != "k" or value == step * 0.5
                    assert found.setdefault((body["writer"], body["first_seq"] + at), step) == step
    return sorted(found.values())


def params(data: Path) -> set[str]:
    return {key for event, body in logged(data) if event == "params" for key in body["keys"]}


ALL_PARAMS = {f"p{number}" for number in range(10)}


def test_a_killed_process_loses_nothing(data: Path, journal: Path) -> None:
    """Everything is delivered, counted, and the folder goes."""
    report = recover(settings_of(data), SECONDS)
    assert (report.journals, report.points) == (1, POINTS + 2)
    assert not (report.damaged or report.foreign or report.unfinished or report.last_error)
    assert steps(data) == list(range(POINTS)) and steps(data, "a") == [7] and params(data) == ALL_PARAMS
    assert os.listdir(data / "journal") == []
    assert report.positions == {
        (stream, 0): sum(path.stat().st_size for path in (data / "log" / stream).glob("*.log"))
        for stream in ("control", "metrics")
    }


def test_nothing_to_do_is_quick(data: Path) -> None:
    """Readers call it each time: no folder, or an empty one, costs next to nothing and makes nothing."""
    assert recover(settings_of(data), SECONDS) == RecoveryReport()
    assert not data.exists()
    (data / "journal").mkdir(parents=True)
    spans = []
    for _ in range(50):
        begun = time.perf_counter()
        recover(settings_of(data), SECONDS)
        spans.append(time.perf_counter() - begun)
    assert not (data / "log").exists()
    assert sorted(spans)[25] < 0.01  # ten times the promise: the machine may be busy


def test_a_live_journal_is_left_alone(data: Path) -> None:
    """Its owner holds the lock."""
    from runstream.recorder import Recorder

    log = MemoryTransport()
    log.away = "away"
    recorder = Recorder(settings_of(data), lambda settings: log)
    recorder.run_channel("1" * 32).log_metric("k", 0.0)
    assert recover(settings_of(data), SECONDS) == RecoveryReport()
    log.away = None
    assert recorder.close(SECONDS).delivered_points == 1


def test_a_log_that_is_away_leaves_the_journal(data: Path, journal: Path) -> None:
    """It ends in time, says so, and the next attempt delivers everything."""
    log = MemoryTransport()
    log.away = "no broker"
    report = recover(settings_of(data), 0.3, connect=lambda settings: log)
    assert report.unfinished == [str(journal)] and report.last_error == "no broker"
    assert recover(settings_of(data), SECONDS).journals == 1
    assert steps(data) == list(range(POINTS))


@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_crash_in_the_middle_of_recovery(data: Path, journal: Path, after: int) -> None:
    """What was sent but not acknowledged, and what was, comes again under the same identities or not at all."""
    log = MemoryTransport()
    recovery = Recovery(settings_of(data), [data / "journal"])
    for _ in range(after * 20):
        recovery.step(lambda: log, 3000)
    recovery.stop()
    assert recovery.report.unfinished
    assert 0 < len(log.metrics) < POINTS // 93
    recover(settings_of(data), SECONDS, connect=lambda settings: log)
    found: dict[int, int] = {}
    for event in log.metrics:
        body = codec.decode(event.fingerprint, event.body)[1]
        for at, ci in enumerate(body["ci"]):
            if body["keys"][body["ki"][at]] == "k":
                step = body["steps"][ci]
                assert found.setdefault(body["first_seq"] + at, step) == step
    assert sorted(found.values()) == list(range(POINTS))


def test_lost_progress_only_sends_again(data: Path, journal: Path) -> None:
    """Without the progress file everything comes a second time, under the identities it had."""
    log = MemoryTransport()
    recovery = Recovery(settings_of(data), [data / "journal"])
    while recovery.report.journals == 0 and len(log.metrics) < 12:
        recovery.step(lambda: log, 1000)
    recovery.stop()
    (journal / "progress").unlink()
    recover(settings_of(data), SECONDS, connect=lambda settings: log)
    found: dict[int, int] = {}
    for event in log.metrics:
        body = codec.decode(event.fingerprint, event.body)[1]
        for at, ci in enumerate(body["ci"]):
            if body["keys"][body["ki"][at]] == "k":
                assert found.setdefault(body["first_seq"] + at, body["steps"][ci]) == body["steps"][ci]
    assert sorted(found.values()) == list(range(POINTS))


def _recover(data: str, queue: object) -> None:
    queue.put(recover(settings_of(Path(data)), SECONDS).points)  # type: ignore[attr-defined]


def test_a_crowd_of_recoverers(data: Path, model: Path) -> None:
    """Several at once share the journals: each is delivered by one of them, once."""
    for number in range(6):
        copy = data / "journal" / f"{number}-copy"
        shutil.copytree(model, copy)
        meta = json.loads((copy / "journal.json").read_text())
        assert meta["beside"]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    crew = [context.Process(target=_recover, args=(str(data), queue)) for _ in range(4)]
    for process in crew:
        process.start()
    points = [queue.get(timeout=90) for _ in crew]
    for process in crew:
        process.join()
    assert sum(points) == 6 * (POINTS + 2)
    assert steps(data) == list(range(POINTS))  # six copies of the same identities
    assert os.listdir(data / "journal") == []


def test_a_reader_waits_for_another_recoverer(data: Path, journal: Path) -> None:
    """Who asks right after a kill sees everything, also if another process took the journal a moment before."""
    import threading

    log = MemoryTransport()
    other = Recovery(settings_of(data), [data / "journal"])
    other.step(lambda: log, 3000)
    reports: list[RecoveryReport] = []
    reader = threading.Thread(target=lambda: reports.append(recover(settings_of(data), SECONDS)))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive(), "it waits"
    while not other.finished:
        other.step(lambda: log, 3000)
    reader.join(SECONDS)
    assert not reader.is_alive() and reports == [RecoveryReport()]
    assert sum(len(codec.decode(event.fingerprint, event.body)[1]["values"]) for event in log.metrics) == POINTS + 2


def test_a_reader_takes_over_from_a_recoverer_that_gives_up(data: Path, journal: Path) -> None:
    """It stopped, or was killed: its lock is free, and the reader goes on from its progress."""
    other = Recovery(settings_of(data), [data / "journal"])
    other.step(MemoryTransport, 3000)
    assert recover(settings_of(data), 0.1).unfinished == [str(journal)]
    other.stop()
    assert recover(settings_of(data), SECONDS).journals == 1


def test_recovery_goes_on_beside_a_busy_training_loop(data: Path, journal: Path) -> None:
    """A process that logs without a pause still delivers the orphan that it has taken."""
    from runstream.recorder import Recorder

    log = MemoryTransport()
    recorder = Recorder(settings_of(data), lambda settings: log)
    channel = recorder.run_channel("2" * 32)
    deadline = time.monotonic() + SECONDS
    count = 0
    while journal.exists():
        assert time.monotonic() < deadline
        channel.log_metric("busy", 1.0, count)
        count += 1
        if count % 100 == 0:
            time.sleep(0.0002)
    recorder.close(SECONDS)
    values = [len(codec.decode(event.fingerprint, event.body)[1]["values"]) for event in log.metrics]
    assert sum(values) == POINTS + 2 + count


def last_used_segment(journal: Path) -> Path:
    used = [path for path in journal.glob("*.seg") if path.read_bytes()[HEADER_BYTES:].strip(b"\0")]
    return max(used)


def cut_to_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 // 32 * 32 + 13])


def flip_id(path: Path) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into("<q", data, HEADER_BYTES + 32 * 100, 123_456)
    path.write_bytes(data)


def zero_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(data)


def garbage_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8192:12288] = os.urandom(4096)
    path.write_bytes(data)


def garbage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:16] = b"not a segment..."
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "lost"),
    [
        (cut_to_half, range(900, 1100)),
        (flip_id, range(1, 2)),
        (zero_page, range(128, 130)),
        (garbage_page, range(128, 130)),
        (garbage_header, range(1)),
    ],
)
def test_damage_costs_what_is_damaged(data: Path, journal: Path, spoil: Callable[[Path], None], lost: range) -> None:
    """Every whole record of a damaged segment and of all others arrives; the files are kept, with a report."""
    spoil(sorted(journal.glob("*.seg"))[1])
    report = recover(settings_of(data), SECONDS)
    found = steps(data)
    assert POINTS - len(found) in lost
    assert len(set(found)) == len(found) and set(found) <= set(range(POINTS)), "nothing is invented"
    assert params(data) == ALL_PARAMS
    assert report.damaged and journal.name in report.damaged[0]
    kept = data / "journal" / "kept" / journal.name
    assert json.loads((kept / "report.json").read_text())
    assert recover(settings_of(data), SECONDS).journals == 0, "kept journals are not tried again"


@pytest.mark.parametrize("cut", [1, 8, 16, 24, 31])
def test_a_torn_last_point_is_no_damage(data: Path, journal: Path, cut: int) -> None:
    """The kill tore it and its call never returned: it is left out without a word."""
    path = last_used_segment(journal)
    content = path.read_bytes()
    used = len(content.rstrip(b"\0"))
    used += -used % 32
    torn = struct.pack("<qdqd", 1, 0.5, 99, 1.7e9)[:cut].ljust(32, b"\0")
    # The dict call at the end has 40 bytes; what follows it begins right behind.
    path.write_bytes(content[:used] + torn + content[used + 32 :])
    report = recover(settings_of(data), SECONDS)
    assert report.damaged == [] and report.journals == 1
    assert steps(data) == list(range(POINTS))


def test_a_torn_control_event_is_no_damage(data: Path, journal: Path) -> None:
    """Neither is a control event whose call never returned."""
    (control,) = journal.glob("control-*")
    whole = control.read_bytes()
    control.write_bytes(whole[:-5])
    assert recover(settings_of(data), SECONDS).damaged == []
    assert params(data) == ALL_PARAMS - {"p9"}


def test_damaged_control_events_cost_only_themselves(data: Path, journal: Path) -> None:
    """One bad frame is skipped and reported."""
    (control,) = journal.glob("control-*")
    content = bytearray(control.read_bytes())
    content[len(content) // 2] ^= 0xFF
    control.write_bytes(content)
    report = recover(settings_of(data), SECONDS)
    assert len(params(data)) == 9 and "control events" in report.damaged[0]
    assert steps(data) == list(range(POINTS))


@pytest.mark.parametrize("content", [b"", b"garbage\n", b'[1,"x","y"'])
def test_lost_names_keep_the_files(data: Path, journal: Path, content: bytes) -> None:
    """Without names points cannot be told apart: nothing is invented, everything is kept for a person."""
    (journal / "names").write_bytes(content)
    files = {path.name: path.read_bytes() for path in journal.glob("*.seg")}
    report = recover(settings_of(data), SECONDS)
    assert steps(data) == [] and params(data) == ALL_PARAMS
    assert report.damaged
    kept = data / "journal" / "kept" / journal.name
    assert {path.name: path.read_bytes() for path in kept.glob("*.seg")} == files


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1, "host": 7}'])
def test_a_damaged_meta_file_leaves_the_journal(data: Path, journal: Path, content: str) -> None:
    """Whose journal it is cannot be known: it stays where it is, and is reported."""
    (journal / "journal.json").write_text(content)
    report = recover(settings_of(data), SECONDS)
    assert report.journals == 0 and "meta file" in report.damaged[0] and journal.is_dir()


def test_a_missing_lock_file_is_no_journal(data: Path, journal: Path) -> None:
    """Such a folder is none of ours, or just being removed: nothing happens to it."""
    (journal / "lock").unlink()
    assert recover(settings_of(data), SECONDS) == RecoveryReport()
    assert journal.is_dir()


def test_journals_of_other_machines_are_left_alone(data: Path, journal: Path) -> None:
    """Whether their process lives cannot be seen from here; a person may say so."""
    meta = json.loads((journal / "journal.json").read_text())
    meta["host"] = {"boot_id": "another", "machine_id": "machine"}
    (journal / "journal.json").write_text(json.dumps(meta))
    report = recover(settings_of(data), SECONDS)
    assert report.foreign == [str(journal)] and report.points == 0 and journal.is_dir()
    assert recover(settings_of(data), SECONDS, any_host=True).points == POINTS + 2


def test_a_reboot_makes_no_stranger(data: Path, journal: Path) -> None:
    """The same machine with another boot id is still the same machine."""
    meta = json.loads((journal / "journal.json").read_text())
    meta["host"]["boot_id"] = "before the reboot"
    (journal / "journal.json").write_text(json.dumps(meta))
    assert recover(settings_of(data), SECONDS).points == POINTS + 2


def test_a_moved_data_directory_takes_its_journals_along(data: Path, journal: Path, tmp_path: Path) -> None:
    """A journal beside its log belongs to that log wherever it lies now."""
    moved = tmp_path / "moved"
    shutil.move(data, moved)
    assert recover(settings_of(moved), SECONDS).points == POINTS + 2
    assert steps(moved) == list(range(POINTS)) and not data.exists()


def test_journals_of_other_targets_are_left_to_sync(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared folder each journal goes to its own target; sync serves them all."""
    shared = tmp_path / "shared"
    settings = {name: Settings((tmp_path / name).as_uri(), journal_dir=shared) for name in ("one", "two")}
    for name in settings:
        copy = Path(shutil.copytree(model, shared / name))
        meta = json.loads((copy / "journal.json").read_text())
        meta.update(target=settings[name].tracking_uri, beside=False)
        (copy / "journal.json").write_text(json.dumps(meta))
    assert recover(settings["one"], SECONDS).journals == 1
    assert sorted(os.listdir(shared)) == ["two"]
    reports = recover_all(settings["one"], SECONDS)
    assert {uri: report.journals for uri, report in reports.items()} == {
        settings["one"].tracking_uri: 0,
        settings["two"].tracking_uri: 1,
    }
    assert steps(tmp_path / "one") == steps(tmp_path / "two") == list(range(POINTS))


def test_leftovers_of_crashes_are_cleared(data: Path, journal: Path) -> None:
    """Half-made folders go when they are old, half-removed ones at once, other things never."""
    folder = data / "journal"
    (folder / f"{GONE_PREFIX}1-a").mkdir()
    (folder / f"{DRAFT_PREFIX}new").mkdir()
    old = folder / f"{DRAFT_PREFIX}old"
    old.mkdir()
    os.utime(old, (1.0, 1.0))
    (folder / "notes.txt").write_text("a person's")
    recover(settings_of(data), SECONDS)
    assert sorted(os.listdir(folder)) == [f"{DRAFT_PREFIX}new", "notes.txt"]


def test_two_hundred_damaged_journals_never_invent(data: Path, journal: Path) -> None:
    """Random bytes flipped anywhere in a segment's records: no point that was never logged, no point twice."""
    import random

    from runstream.journal.dead_segment import DeadSegment
    from runstream.journal.names import read_names
    from runstream.journal.record import POINT

    names, _ = read_names((journal / "names").read_bytes())
    path = sorted(journal.glob("*.seg"))[1]
    original = path.read_bytes()
    writer = json.loads((journal / "journal.json").read_text())["writer"]
    number = int(path.stem)
    rng = random.Random(5)
    legal = {original[at : at + 32] for at in range(HEADER_BYTES, len(original), 32)}
    target = data / path.name
    for _ in range(200):
        spoiled = bytearray(original)
        touched = set()
        for _ in range(rng.randrange(1, 20)):
            # Whole words: a flip within a value or step cannot be seen, and is none of this test.
            at = rng.randrange(HEADER_BYTES // 32, len(original) // 32) * 32 + rng.choice((0, 24))
            spoiled[at : at + 8] = rng.choice((bytes(8), os.urandom(8)))
            touched.add(at // 32 * 32)
        target.write_bytes(spoiled)
        segment = DeadSegment(number, target, names)
        segment.check(writer)
        found = [segment.read(at, at + 32) for at in range(HEADER_BYTES, segment.end(), 32)]
        times_may_differ = {POINT.unpack(record)[:3] for record in legal if len(record) == 32 and record.strip(b"\0")}
        assert all(POINT.unpack(record)[:3] in times_may_differ for record in found)
        assert len(found) >= len(legal) - 1 - len(touched) - 1
        assert len({POINT.unpack(record)[2] for record in found}) == len(found)
