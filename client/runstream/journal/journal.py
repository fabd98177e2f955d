"""The writing side of a journal: its folder, its lock, and the segment that calls write to now.

Every method that training threads call runs under the recorder's reentrant lock, and is so written that a signal
handler that logs may enter it again between any two lines: numbers and ids come from counters, and each step is whole
by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from runstream_schemas.identity import new_writer, now_ms

from .control import ControlFile
from .names import Name, Names
from .place import Host, this_host
from .progress import Position, ProgressFile
from .segment import HEADER_BYTES, MAX_SEGMENT_BYTES, Segment
from .thin import Thinned

__all__ = ["DRAFT_PREFIX", "GONE_PREFIX", "LOCK_FILE", "META_FILE", "Journal", "Meta", "keep_folder", "remove_folder"]

LOCK_FILE: Final = "lock"
META_FILE: Final = "journal.json"
REFUSED_FOLDER: Final = "refused"
DRAFT_PREFIX: Final = ".new-"
"""A folder that is not published yet."""
GONE_PREFIX: Final = ".gone-"
"""A folder whose contents are delivered."""
FIRST_SEGMENT_BYTES: Final = 256 * 1024
"""Small, because a machine may run 1,000 processes that log little."""
MAX_MEMORY_SEGMENTS: Final = 8
"""Without a disk, at most 32 MiB are kept: the oldest go."""

log = logging.getLogger("runstream")


@dataclass(frozen=True, slots=True)
class Meta:
    """What a stranger must know to deliver a journal."""

    target: str
    """Tracking URI in its normal form."""
    beside: bool
    """The journal lies in `journal/` of the data directory it is for, wherever that is moved to."""
    writer: int
    pid: int
    host: Host
    created_ms: int
    format: int = 1

    @classmethod
    def read(cls, folder: Path) -> Meta:
        """The meta file in `folder`.

        Raises:
            OSError, ValueError, TypeError: missing or damaged.
        """
        fields = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or fields.get("format") != 1:
            raise ValueError(f"{folder / META_FILE}: unknown journal format")
        fields["host"] = Host(**fields["host"])
        return cls(**fields)


class Journal:
    """One journal of this process."""

    def __init__(self, folder: Path | None, lock_fd: int, meta: Meta, limit_bytes: int) -> None:
        self.folder = folder
        """None: everything is in memory."""
        self.meta = meta
        self.writer = meta.writer
        self.limit_bytes = limit_bytes
        self._lock_fd = lock_fd
        self._place = None if folder is None else str(folder)
        self._numbers = itertools.count()
        self._seqs = itertools.count(1)
        self._largest = min(MAX_SEGMENT_BYTES, max(65_536, limit_bytes // 8 >> 12 << 12))
        self._next_size = min(FIRST_SEGMENT_BYTES, self._largest)
        self.names = Names(self._place)
        self.control = ControlFile(self._place)
        self.progress = ProgressFile(self._place) if self._place is not None else None
        self.segments: dict[int, Segment | Thinned] = {}
        """Live and sealed segments by number; thinning replaces them, delivery takes them out."""
        self.left_out: dict[int, int] = {}
        """Points that thinning left out, by segment."""
        self._spare: Segment | None = None
        self._preparing = threading.RLock()
        self.dropped_points = 0
        """Of memory segments that went before they were delivered; an estimate from their bytes."""
        self._warned: set[str] = set()
        self._synced: tuple[int, ...] = ()
        self.closed = False
        self.current = self._adopt(self._new_segment())
        self.segments[self.current.number] = self.current

    @classmethod
    def create(cls, folders: Sequence[Path], target: str, beside: Path | None, limit_bytes: int) -> Journal:
        """A new journal in the first of `folders` that takes it; in memory, with a warning, if none does.

        Args:
            beside: the one of `folders` that belongs to the data directory itself.
        """
        errors: list[str] = []
        for parent in folders:
            meta = Meta(target, parent == beside, new_writer(), os.getpid(), this_host(), now_ms())
            try:
                return cls._create_in(parent, meta, limit_bytes)
            except OSError as exc:
                errors.append(f"{parent}: {exc.strerror or exc}")
        log.warning(
            "runstream: no journal can be kept on disk (%s). Logging goes on in memory: what is not delivered yet is "
            "lost if this process is killed. Free space, or set RUNSTREAM_JOURNAL_DIR to a writable local folder.",
            "; ".join(errors),
        )
        return cls(None, -1, Meta(target, False, new_writer(), os.getpid(), this_host(), now_ms()), limit_bytes)

    @classmethod
    def _create_in(cls, parent: Path, meta: Meta, limit_bytes: int) -> Journal:
        parent.mkdir(parents=True, exist_ok=True)
        name = f"{meta.pid}-{meta.writer:x}"
        draft = parent / f"{DRAFT_PREFIX}{name}"
        draft.mkdir(mode=0o700)
        lock_fd = -1
        journal = None
        try:
            lock_fd = os.open(draft / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (draft / META_FILE).write_text(json.dumps(asdict(meta)), encoding="utf-8")
            journal = cls(draft, lock_fd, meta, limit_bytes)
            if journal.progress is not None:
                journal.progress.write(0, Position())
            # Published only now: whoever sees the folder under this name finds it locked and complete.
            folder = parent / name
            os.rename(draft, folder)
            journal._moved(folder)
            return journal
        except BaseException:
            if journal is not None:
                journal._close_files()
            elif lock_fd >= 0:
                os.close(lock_fd)
            remove_tree(draft)
            raise

    def _moved(self, folder: Path) -> None:
        self.folder, self._place = folder, str(folder)
        self.control.folder = self._place
        for segment in self.segments.values():
            if segment.path is not None:
                segment.path = f"{folder}/{os.path.basename(segment.path)}"

    # -- called by training threads, under the recorder's lock

    @property
    def write(self) -> Callable[[bytes], object]:
        """The present segment's write."""
        return self.current.write

    def write_after(self, stale: Callable[[bytes], object]) -> Callable[[bytes], object]:
        """The write to use after `stale` raised ValueError: the present one, or that of a new segment."""
        if self.current.write is not stale:
            return self.current.write
        old = self.current
        new = self._adopt(self._take_spare())
        old.seal()
        # Sealed before the new one is listed: a reader that sees the new one takes the old one as finished.
        self.segments[new.number] = new
        self.current = new
        for number, segment in list(self.segments.items()):
            # One that a signal handler began between the lines above.
            if number != new.number:
                segment.seal()
        return self.current.write

    def add_name(self, name: Name) -> int:
        """A new id for a key or shape of a run."""
        number, error = self.names.add(name)
        if error is not None:
            self.trouble("names", error)
        return number

    def next_seq(self) -> int:
        """The next ordinal of a control event."""
        return next(self._seqs)

    def append_control(self, frame: bytes) -> None:
        """Keep one frame; in memory if the disk refuses."""
        error = self.control.append(frame)
        if error is not None:
            self.trouble("control events", error)

    def _take_spare(self) -> Segment:
        spare, self._spare = self._spare, None
        return spare if spare is not None else self._new_segment()

    def _new_segment(self) -> Segment:
        if self._place is None:
            self._make_room_in_memory()
            return Segment.in_memory(self._largest)
        try:
            segment = Segment.prepare(self._place, self._next_size)
        except OSError as exc:
            self.trouble("metrics", exc)
            self._make_room_in_memory()
            return Segment.in_memory(self._largest)
        self._next_size = min(self._next_size * 4, self._largest)
        return segment

    def _adopt(self, segment: Segment) -> Segment:
        try:
            segment.adopt(self._place, next(self._numbers), self.writer)
        except OSError as exc:  # the folder is gone
            self.trouble("metrics", exc)
            segment.remove()
            segment = Segment.in_memory(self._largest)
            segment.adopt(None, next(self._numbers), self.writer)
        return segment

    def _make_room_in_memory(self) -> None:
        held = [part for part in list(self.segments.values()) if isinstance(part, Segment) and part.path is None]
        for segment in held[: len(held) + 1 - MAX_MEMORY_SEGMENTS]:
            self.segments.pop(segment.number, None)
            self.dropped_points += max(0, segment.end() - HEADER_BYTES) // 32
            segment.detach()

    def trouble(self, what: str, error: OSError) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning(
                "runstream: the journal %s takes no more %s (%s). They are kept in memory until delivered, and lost if "
                "this process is killed before. Free space on that disk.",
                self.folder,
                what,
                error.strerror or error,
            )

    # -- called by the delivery thread

    def _has_spare(self) -> bool:
        return self._spare is not None

    def prepare_spare(self, *, now: bool = False) -> None:
        """Have the next segment ready, so that no training thread waits for the disk. Takes up to some milliseconds.

        Never under the recorder's lock: a signal handler may wait for another thread that needs it (SIGTERM ends runs).

        Args:
            now: a training thread that has come before the delivery thread needs the segment.
        """
        if self._has_spare() or self._place is None or self.closed:
            return
        if not now and self.current.path is not None and self.current.end() * 4 < self.current.size:
            return  # not needed soon
        if not self._preparing.acquire(blocking=now):
            return
        try:
            if self._has_spare():
                return
            segment = Segment.prepare(self._place, self._next_size)
            self._next_size = min(self._next_size * 4, self._largest)
            if self._has_spare():  # a signal handler was faster
                segment.remove()
            else:
                self._spare = segment
        except OSError as exc:
            self.trouble("metrics", exc)
        finally:
            self._preparing.release()

    def sync(self) -> None:
        """Make everything written before safe from power loss: at most the last second is lost then."""
        current = self.current
        written = (len(self.names.table), self.control.end, current.number, current.end())
        if written == self._synced:
            return
        before, self._synced = self._synced, written
        since = before[2] if before else 0
        finished = [part for number, part in sorted(self.segments.items()) if since <= number < current.number]
        for part in (self.names, self.control, *finished, current):
            with contextlib.suppress(OSError, ValueError):
                part.sync()

    def tidy(self, acknowledged_control: int) -> None:
        """Write what the disk refused before; begin a new control file where the old one is done. Under the lock."""
        with contextlib.suppress(OSError):
            if self.names.save() is None and self.control.save() is None:
                self._warned.discard("control events")
            self.control.trim(acknowledged_control)

    def forget(self, number: int) -> None:
        """Segment `number` is delivered."""
        segment = self.segments.pop(number, None)
        if segment is not None:
            segment.remove()

    def remember(self, control: int, metrics: Position) -> None:
        """Note what is delivered."""
        if self.progress is not None:
            self.progress.write(control, metrics)

    def refuse(self, name: str, frame: bytes) -> None:
        """Keep a body that the log will never take, for a person to look at."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                folder = self.folder / REFUSED_FOLDER
                folder.mkdir(exist_ok=True)
                (folder / name).write_bytes(frame)

    # -- the end

    def seal(self) -> None:
        """Refuse all further writes; the next log call begins a new journal. Under the recorder's lock."""
        self.closed = True
        for segment in list(self.segments.values()):
            segment.seal()
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.remove()

    def abandon(self) -> None:
        """Let go of everything without touching a file: for a forked child."""
        self.closed = True
        for segment in [*self.segments.values(), *([self._spare] if self._spare else [])]:
            segment.detach()
        self.segments.clear()
        self._spare = None
        self._close_files()

    def leave(self) -> None:
        """Let go and leave the files for recovery, by another process or a later one."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.remove()
        for segment in self.segments.values():
            segment.detach()
        self._close_files()

    def remove(self) -> None:
        """Delete the folder: everything in it is delivered. One with refused bodies is kept."""
        for segment in self.segments.values():
            segment.detach()
        if self.folder is not None:
            remove_folder(self.folder)
        self._close_files()

    def _close_files(self) -> None:
        self.names.close()
        self.control.close()
        if self.progress is not None:
            self.progress.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def remove_folder(folder: Path) -> None:
    """Delete a delivered journal, or move it to kept/ beside it if bodies were refused. The caller holds its lock."""
    with contextlib.suppress(OSError):
        if (folder / REFUSED_FOLDER).is_dir():
            keep_folder(folder)
            return
        # One atomic step first: a crash in the middle of the deletion must not leave half a journal under its name.
        gone = folder.with_name(GONE_PREFIX + folder.name)
        os.rename(folder, gone)
        remove_tree(gone)


def keep_folder(folder: Path) -> Path:
    """Move a journal that is done but holds what could not be delivered to kept/; where it lies now."""
    kept = folder.parent / "kept"
    kept.mkdir(exist_ok=True)
    target = kept / folder.name
    os.rename(folder, target)
    return target


def remove_tree(folder: Path) -> None:
    """Delete a folder, as far as that is possible. shutil is heavy, so it is imported only here."""
    from shutil import rmtree

    rmtree(folder, ignore_errors=True)
