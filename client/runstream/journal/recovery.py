"""Delivers journals whose process is gone: killed, lost with the power, or at its end before the log was reached.

A journal is dead when nobody holds its `flock`. Only journals of this machine are touched, each by one process at a
time; a crash in the middle is harmless, because records keep their identity and the folder goes only after
acknowledgement. Of a damaged journal every whole record is delivered and its files are kept aside, with a report.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runstream_schemas.segment import Damage, Incomplete, read_frames

from ..config import Settings, normal_tracking_uri
from ..delivery import DRAIN_CHUNK_BYTES, Pump, Tally, open_transport
from ..errors import RunstreamError
from ..transport import Transport
from .control import control_base
from .dead_segment import dead_segments
from .journal import DRAFT_PREFIX, GONE_PREFIX, LOCK_FILE, REFUSED_FOLDER, Meta, keep_folder, remove_folder
from .names import NAMES_FILE, read_names
from .place import journal_folders, this_host
from .progress import Position, read_progress
from .source import End, Source

__all__ = ["KEPT_FOLDER", "Orphan", "Recovery", "RecoveryReport", "recover", "recover_all"]

KEPT_FOLDER: Final = "kept"
RECOVERING_FILE: Final = "recovering"
"""Tells a journal that somebody recovers from one whose process lives: both are locked."""
ABANDONED_DRAFT_SECONDS: Final = 3600.0
log = logging.getLogger("runstream")


@dataclass(slots=True)
class RecoveryReport:
    """What a recovery did."""

    journals: int = 0
    """Delivered completely."""
    points: int = 0
    events: int = 0
    positions: dict[tuple[str, int], int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    """One line per damage found; the files lie in kept/ beside the journals."""
    foreign: list[str] = field(default_factory=list)
    """Journals of other machines, left alone."""
    unfinished: list[str] = field(default_factory=list)
    """Journals that could not be delivered in time or because the log is away; they stay."""
    last_error: str | None = None


class Orphan:
    """One dead journal, locked by us."""

    def __init__(self, folder: Path, lock_fd: int, meta: Meta) -> None:
        self.folder = folder
        self.meta = meta
        self.tally = Tally()
        self.damage: list[str] = []
        self._lock_fd = lock_fd
        _held.add(self)
        with contextlib.suppress(OSError):
            (folder / RECOVERING_FILE).touch()
        names_data = _read_file(folder / NAMES_FILE)
        names, bad_names = read_names(names_data)
        if bad_names:
            self.damage.append(f"{NAMES_FILE}: {bad_names} lines are damaged")
        control_at, metrics_at = read_progress(str(folder))
        self._control = _DeadControl(folder, control_at, self.damage)
        parts = dead_segments(folder, names, meta.writer, metrics_at.segment, self.damage)
        # A progress beyond the control file cannot be ours: send all of it again.
        start = End(min(control_at, self._control.end), metrics_at)
        if start.control < self._control.base:
            start = End(self._control.base, start.metrics)
        self.source = Source(
            parts, self._control, names, meta.writer, forget=lambda number: None, progress=self._remember, start=start
        )
        self.pump = Pump(self.source, self.tally, refuse=self._refuse)
        self._end = self.source.end()

    @property
    def done(self) -> bool:
        """Everything is acknowledged."""
        return self.source.done(self._end) and not self.pump.is_waiting

    def _remember(self, control: int, metrics: Position) -> None:
        from .progress import ProgressFile

        with contextlib.suppress(OSError):
            file = ProgressFile(str(self.folder))
            file.write(control, metrics)
            file.close()

    def _refuse(self, name: str, frame: bytes) -> None:
        with contextlib.suppress(OSError):
            (self.folder / REFUSED_FOLDER).mkdir(exist_ok=True)
            (self.folder / REFUSED_FOLDER / name).write_bytes(frame)

    def finish(self) -> None:
        """Delete the folder, or keep it aside where something in it is damaged or was refused; release the lock."""
        try:
            if self.damage:
                with contextlib.suppress(OSError):
                    (self.folder / RECOVERING_FILE).unlink(missing_ok=True)
                    (self.folder / "report.json").write_text(json.dumps(self.damage, indent=1), encoding="utf-8")
                with contextlib.suppress(OSError):
                    kept = keep_folder(self.folder)
                    log.error(
                        "runstream: a journal of a dead process was damaged; its whole records are delivered, its "
                        "files kept at %s: %s",
                        kept,
                        "; ".join(self.damage[:3]),
                    )
            else:
                remove_folder(self.folder)
        finally:
            self.release()

    def release(self) -> None:
        """Let go of the lock."""
        self._control.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                # Said, not left to close(): a forked child may hold the same open file.
                fcntl.flock(fd, fcntl.LOCK_UN)
                os.close(fd)

    def abandon(self) -> None:
        """Close without unlocking: in a forked child the lock is the parent's."""
        self._control.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


class Recovery:
    """Finds and delivers the dead journals of one target, step by step, on the delivery thread."""

    def __init__(
        self,
        settings: Settings,
        folders: Sequence[Path],
        report: RecoveryReport | None = None,
        *,
        any_host: bool = False,
    ) -> None:
        self.report = report if report is not None else RecoveryReport()
        self.finished = False
        self.busy: list[Path] = []
        """Journals of this target that another process, or another thread, is delivering."""
        self._orphans = _claim_all(folders, {settings.tracking_uri}, self.report, self.busy, any_host=any_host)
        self._orphan: Orphan | None = None

    @property
    def retry_in_seconds(self) -> float:
        """How long the present orphan's pump rests after a failure."""
        return self._orphan.pump.retry_in_seconds if self._orphan is not None else 0.0

    def step(self, connect: Callable[[], Transport], chunk_bytes: int) -> bool:
        """Send one parcel, or take the next orphan; whether anything moved."""
        if self._orphan is None:
            self._orphan = next(self._orphans, None)
            if self._orphan is None:
                self.finished = True
                return False
        orphan = self._orphan
        try:
            moved = orphan.pump.step(connect, chunk_bytes, 0.0)
        except Exception as exc:
            # Damage of a kind that nobody thought of: one journal must not keep the others from being delivered.
            log.exception("runstream: the journal %s cannot be recovered; left as it is", orphan.folder)
            orphan.damage.append(f"cannot be recovered: {type(exc).__name__}: {exc}")
            self._tell(orphan)
            orphan.release()
            self._orphan = None
            return True
        if orphan.done:
            self._tell(orphan)
            self._orphan = None
            orphan.finish()
            self.report.journals += 1
            return True
        if not moved and orphan.pump.retry_in_seconds > 0.0:
            self.report.last_error = orphan.tally.last_error
        return moved

    def _tell(self, orphan: Orphan) -> None:
        report, tally = self.report, orphan.tally
        report.points += tally.delivered_points
        report.events += tally.delivered_events
        report.damaged += [f"{orphan.folder}: {line}" for line in orphan.damage]
        for place, offset in tally.positions.items():
            report.positions[place] = max(offset, report.positions.get(place, 0))

    def stop(self) -> None:
        """Let go of what is not delivered; it stays for the next recovery."""
        if self._orphan is not None:
            self._tell(self._orphan)
            self.report.unfinished.append(str(self._orphan.folder))
            self.report.last_error = self._orphan.tally.last_error
            self._orphan.release()
            self._orphan = None

    def abandon(self) -> None:
        """Forget everything without unlocking: for a forked child."""
        if self._orphan is not None:
            self._orphan.abandon()
            self._orphan = None


def recover(
    settings: Settings,
    timeout_seconds: float = 10.0,
    *,
    any_host: bool = False,
    connect: Callable[[Settings], Transport] = open_transport,
) -> RecoveryReport:
    """Deliver what dead processes of this machine left for one target. Below 1 ms where there is nothing.

    Blocks until all of it is acknowledged, at most about `timeout_seconds`; may be called by any number of processes
    at once. A journal that another process is delivering is left to it, and waited for.

    Args:
        any_host: also journals of other machines: only safe where their processes are known to be gone.
    """
    report = RecoveryReport()
    folders = [folder for folder in journal_folders(settings) if folder.is_dir()]
    if not folders:
        return report
    deadline = time.monotonic() + timeout_seconds
    transport: Transport | None = None

    def connected() -> Transport:
        nonlocal transport
        if transport is None:
            transport = connect(settings)
        return transport

    recovery = Recovery(settings, folders, report, any_host=any_host)
    try:
        while True:
            left = deadline - time.monotonic()
            if recovery.finished:
                if not recovery.busy:
                    break
                if left <= 0.0:
                    report.unfinished += [str(folder) for folder in recovery.busy]
                    break
                time.sleep(0.01)
                recovery = Recovery(settings, folders, report, any_host=any_host)
            elif not recovery.step(connected, DRAIN_CHUNK_BYTES) and not recovery.finished:
                if left <= 0.0:
                    break
                time.sleep(min(left, max(0.002, recovery.retry_in_seconds)))
    finally:
        recovery.stop()
        if transport is not None:
            with contextlib.suppress(Exception):
                transport.sync()
                transport.close(1.0)
    return report


def recover_all(
    settings: Settings, timeout_seconds: float = 60.0, *, any_host: bool = False
) -> dict[str, RecoveryReport]:
    """`recover` for every target that a dead journal in this user's folders names: what `runstream sync` does.

    Returns:
        reports by tracking URI; `settings`' own target is always among them.
    """
    deadline = time.monotonic() + timeout_seconds
    targets = {settings.tracking_uri}
    for folder in journal_folders(settings):
        for entry in _entries(folder):
            with contextlib.suppress(OSError, ValueError, TypeError, RunstreamError):
                targets.add(_target_of(Meta.read(entry), folder))
    return {
        target: recover(settings.at(target), max(0.1, deadline - time.monotonic()), any_host=any_host)
        for target in sorted(targets)
    }


def _after_fork_in_child() -> None:
    for orphan in list(_held):
        orphan.abandon()


_held: weakref.WeakSet[Orphan] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    # A child that kept the lock file open could keep the lock of a parent that was killed while it held it.
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _claim_all(
    folders: Sequence[Path], targets: set[str], report: RecoveryReport, busy: list[Path], *, any_host: bool
) -> Iterator[Orphan]:
    for folder in folders:
        for entry in _entries(folder):
            orphan = _claim(entry, folder, targets, report, busy, any_host=any_host)
            if orphan is not None:
                yield orphan


def _entries(folder: Path) -> list[Path]:
    """Journals in `folder`, oldest first; clears what unfinished creations and deletions left."""
    found: list[tuple[float, Path]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == KEPT_FOLDER or not entry.is_dir(follow_symlinks=False):
                    continue
                if entry.name.startswith(GONE_PREFIX):
                    shutil.rmtree(entry.path, ignore_errors=True)
                    continue
                with contextlib.suppress(OSError):
                    changed = entry.stat(follow_symlinks=False).st_mtime
                    if not entry.name.startswith(DRAFT_PREFIX):
                        found.append((changed, Path(entry.path)))
                    elif time.time() - changed > ABANDONED_DRAFT_SECONDS:
                        shutil.rmtree(entry.path, ignore_errors=True)
    except OSError:
        return []
    return [path for _, path in sorted(found)]


def _claim(
    entry: Path, parent: Path, targets: set[str], report: RecoveryReport, busy: list[Path], *, any_host: bool
) -> Orphan | None:
    """The journal at `entry`, locked, if it is dead, ours and of one of `targets`."""
    try:
        fd = os.open(entry / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # no journal, or one that is just being removed
    claimed = False
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Its process lives, or another one recovers it.
            with contextlib.suppress(OSError, ValueError, TypeError, RunstreamError):
                if (entry / RECOVERING_FILE).exists() and _target_of(Meta.read(entry), parent) in targets:
                    busy.append(entry)
            return None
        with contextlib.suppress(OSError):
            status = os.stat(entry / LOCK_FILE)
            if (status.st_dev, status.st_ino) != (os.fstat(fd).st_dev, os.fstat(fd).st_ino):
                return None
        if not (entry / LOCK_FILE).exists():
            return None  # recovered and removed between our open and our lock
        try:
            meta = Meta.read(entry)
            target = _target_of(meta, parent)
        except (OSError, ValueError, TypeError, RunstreamError) as exc:
            report.damaged.append(f"{entry}: its meta file cannot be read ({exc}); left as it is")
            return None
        if target not in targets:
            return None
        if not any_host and not meta.host.is_same(this_host()):
            report.foreign.append(str(entry))
            return None
        orphan = Orphan(entry, fd, meta)
        claimed = True
        return orphan
    finally:
        if not claimed:
            os.close(fd)


def _target_of(meta: Meta, parent: Path) -> str:
    return normal_tracking_uri(parent.parent) if meta.beside else meta.target


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


class _DeadControl:
    """The control files of a dead journal, as one `ControlReader`."""

    def __init__(self, folder: Path, acknowledged: int, damage: list[str]) -> None:
        found = sorted((base, name) for name in os.listdir(folder) if (base := control_base(name)) is not None)
        self.base = found[0][0] if found else 0
        self._fd = -1
        self._parts: list[bytes] = []
        data = b""
        for base, name in found:
            if base != self.base + len(data):
                damage.append(f"{name}: does not follow the file before it")
                # Offsets only order the bytes; a hole of zeros keeps those of what follows.
                data += bytes(max(0, base - self.base - len(data)))
            data += _read_file(folder / name)
        self._data = data
        end = self.base
        for item in read_frames(data, self.base):
            if isinstance(item, Incomplete):
                break  # torn by the kill: its call never returned
            if isinstance(item, Damage) and item.next_offset > acknowledged:
                damage.append(f"control events: bytes {item.offset} to {item.next_offset} hold no whole event")
            end = item.next_offset
        self.end = end

    def read(self, offset: int, size: int) -> bytes:
        """See `ControlReader`."""
        at = offset - self.base
        return self._data[at : min(at + size, self.end - self.base)]

    def close(self) -> None:
        """Nothing is open."""
