"""Full and read-only disks under the journal: a warning, memory in its place, and never a dead process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runstream.config import Settings
from runstream.errors import SettingsError
from runstream.journal import place
from runstream.recorder import Recorder
from runstream.transport.memory import MemoryTransport
from runstream_schemas import codec

SECONDS = 30.0
RUN = "1" * 32


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


def steps(log: MemoryTransport) -> list[int]:
    found: dict[tuple[int, int], int] = {}
    for event in log.metrics:
        body = codec.decode(event.fingerprint, event.body)[1]
        for at, ci in enumerate(body["ci"]):
            assert found.setdefault((body["writer"], body["first_seq"] + at), body["steps"][ci]) == body["steps"][ci]
    return list(found.values())


def stage(folder: Path, log: MemoryTransport) -> Recorder:
    return Recorder(Settings("memory://disk", journal_dir=folder), lambda settings: log)


@pytest.mark.parametrize("size", ["4k", "100k", "300k"])
def test_a_disk_that_is_full_from_the_start(tmp_path: Path, size: str, caplog: pytest.LogCaptureFixture) -> None:
    """Logging goes on in memory, with one clear warning; nothing half-made stays on the disk."""
    with mounted(tmp_path / "disk", "-o", f"size={size}"):
        log = MemoryTransport()
        recorder = stage(tmp_path / "disk" / "journals", log)
        channel = recorder.run_channel(RUN)
        for step in range(20_000):
            channel.log_metric("k", 1.0, step)
        recorder.control("params", {"run_id": RUN, "keys": ["lr"], "values": ["0.1"]})
        assert recorder.close(SECONDS).complete
        assert steps(log) == list(range(20_000)) and len(log.control) == 1
        texts = [record.getMessage() for record in caplog.records]
        assert any("space" in text.lower() or "no room" in text for text in texts), texts
        assert not list((tmp_path / "disk").glob("journals/*"))


def test_a_disk_that_fills_while_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The process lives (no SIGBUS), goes on in memory, and everything arrives when the log is back."""
    with mounted(tmp_path / "disk", "-o", "size=1500k"):
        log = MemoryTransport()
        log.away = "away"
        recorder = stage(tmp_path / "disk" / "journals", log)
        channel = recorder.run_channel(RUN)
        for step in range(150_000):  # 4.8 MB into 1.5 MB
            channel.log_metric("k", 1.0, step)
        for number in range(200):
            channel.log_metric(f"key {number}", 1.0, 1_000_000 + number)
            keys = [f"p{number}"]
            recorder.control("params", {"run_id": RUN, "keys": keys, "values": ["v" * 10_000]})
        assert sum("takes no more" in record.getMessage() for record in caplog.records) in (1, 2, 3)
        log.away = None
        assert recorder.close(SECONDS).complete
        assert steps(log) == [*range(150_000), *range(1_000_000, 1_000_200)]
        keys = [codec.decode(event.fingerprint, event.body)[1]["keys"] for event in log.control]
        assert keys == [[f"p{number}"] for number in range(200)]
        assert not list((tmp_path / "disk").glob("journals/*"))


def test_a_read_only_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning that names the folder; delivery works all the same."""
    with mounted(tmp_path / "disk", "-o", "ro"):
        log = MemoryTransport()
        recorder = stage(tmp_path / "disk" / "journals", log)
        recorder.run_channel(RUN).log_metric("k", 1.0, 7)
        assert recorder.close(SECONDS).complete and steps(log) == [7]
        (text,) = [record.getMessage() for record in caplog.records if "no journal" in record.getMessage()]
        assert str(tmp_path / "disk") in text and "Read-only" in text and "RUNSTREAM_JOURNAL_DIR" in text


def test_a_journal_folder_that_vanishes(tmp_path: Path) -> None:
    """Someone removes the journal while it is in use: logging goes on, and what is logged arrives."""
    import shutil

    log = MemoryTransport()
    recorder = stage(tmp_path / "journals", log)
    channel = recorder.run_channel(RUN)
    channel.log_metric("k", 1.0, 0)
    shutil.rmtree(tmp_path / "journals")
    for step in range(1, 30_000):
        channel.log_metric("k", 1.0, step)
    recorder.control("params", {"run_id": RUN, "keys": ["lr"], "values": ["0.1"]})
    assert recorder.close(SECONDS).complete
    assert steps(log) == list(range(30_000)) and len(log.control) == 1


def test_a_write_beyond_the_file_size_limit(tmp_path: Path) -> None:
    """ulimit -f: segments cannot be made, and the process neither dies nor loses a point."""
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from runstream.config import Settings
from runstream.recorder import Recorder
from runstream.transport.memory import MemoryTransport
from pathlib import Path
log = MemoryTransport()
recorder = Recorder(Settings("memory://x", journal_dir=Path(sys.argv[1])), lambda settings: log)
channel = recorder.run_channel("1" * 32)
for step in range(20_000): channel.log_metric("k", 1.0, step)
report = recorder.close(20)
assert report.complete and report.delivered_points == 20_000, report
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "journals")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


MOUNTS = [("/", "ext4"), ("/home", "nfs4"), ("/home/me/disk", "xfs"), ("/net", "fuse.sshfs"), ("/home", "nfs4")]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("/var/x", False), ("/home/me", True), ("/homework", False), ("/home/me/disk/j", False), ("/net", True)],
)
def test_network_file_systems_are_known(folder: str, expected: bool) -> None:
    """By the innermost mount above the folder, whether it exists or not."""
    assert place.is_network_file_system(Path(folder), MOUNTS) is expected


def test_journals_avoid_network_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data directory on one gets its journals elsewhere; a journal folder set to one is refused."""
    monkeypatch.setattr(place, "_mounts", lambda: [("/", "ext4"), (str(tmp_path), "nfs")])
    folders = place.journal_folders(Settings.from_environment({}, tracking_uri=tmp_path / "data"))
    assert folders and not any(str(folder).startswith(str(tmp_path)) for folder in folders)
    with pytest.raises(SettingsError, match="network file system"):
        place.journal_folders(Settings("memory://x", journal_dir=tmp_path / "journals"))
