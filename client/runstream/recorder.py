"""One `Recorder` per process and tracking address: the journal, its delivery thread, and the calls that write to both.

What a call here returned from survives kill -9: it lies in the journal's pages and is delivered by this process or by
the next one on the machine. Nothing here raises for trouble with delivery; wrong use raises at the call.

Locks: `_lock` guards the journal against training threads and is reentrant, because a signal handler may log in the
middle of a slow path. The delivery thread never waits for it, since a handler may hold it while it waits for delivery
(`flush`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from runstream_schemas.identity import Version, now_ms
from runstream_schemas.limits import HEARTBEAT_SECONDS
from runstream_schemas.names import EventName
from runstream_schemas.segment import encode_frame

from . import process_life
from .channel import RunChannel, Write
from .config import Settings
from .control_event import encode_control
from .delivery import BUSY_CHUNK_BYTES, DRAIN_CHUNK_BYTES, Pump, Tally, importing, open_transport
from .delivery_report import Report
from .journal.guard import keep_below_limit
from .journal.journal import Journal
from .journal.place import journal_folders
from .journal.record import call_packer
from .journal.source import Parcel, Source
from .transport import Transport

__all__ = ["Recorder", "Report", "RunChannel", "current", "for_target"]

LINGER_SECONDS: Final = 0.2
"""How long the delivery thread lets records gather: larger bodies, well below the second in which they become visible.
"""
BUSY_PAUSE_SECONDS: Final = 0.001
BACKLOG_BYTES: Final = 4 << 20
"""Above this (131,000 points) larger chunks are encoded also while training runs, or delivery would never catch up."""
CHORES_SECONDS: Final = 1.0
RECOVERY_DELAY_SECONDS: Final = 1.0
"""A new process serves itself before it looks for what others left."""

log = logging.getLogger("runstream")


@dataclass(slots=True)
class _Outlet:
    """A journal and the pump that empties it."""

    journal: Journal
    source: Source
    pump: Pump


class Recorder:
    """Owns journal and delivery of one tracking address in this process. All methods are thread-safe and fork-safe."""

    def __init__(self, settings: Settings, connect: Callable[[Settings], Transport] = open_transport) -> None:
        """No I/O, no thread.

        Args:
            connect: makes the transport, in the delivery thread; tried again after a TransportError.

        Raises:
            SettingsError: RUNSTREAM_JOURNAL_DIR lies on a network file system.
        """
        self.settings = settings
        self._connect = connect
        self._folders = journal_folders(settings)
        self._channels: dict[str, RunChannel] = {}
        self._open_runs: dict[str, float] = {}
        """Run id -> monotonic seconds of its last delivered event."""
        self._last_ms = 0
        self._inherited: list[Transport] = []
        """Of the parent process: never closed, never collected, for that could disturb the parent's connections."""
        self._transport: Transport | None = None
        self._outlet: _Outlet | None = None
        self._reset()
        process_life.join(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._moved = threading.Condition()
        """Notified after each acknowledgement and when the thread shall wake."""
        self._driving = threading.Lock()
        """Held by whoever drives the pumps."""
        self._tally = Tally()
        self._retired: list[_Outlet] = []
        self._thread: threading.Thread | None = None
        self._drainers = 0
        self._next_chores = 0.0
        self._unsynced = False
        self._failed_before = False
        self._rounds = 0
        self._recovery: Any = None
        self._recovery_at: float | None = None
        self._thinned_reported: dict[str, int] = {}

    # -- logging

    @property
    def writer(self) -> int:
        """The random 63-bit number of the present journal, which is made if there is none."""
        with self._lock:
            return self._ensure().journal.writer

    def run_channel(self, run_id: str) -> RunChannel:
        """The channel of `run_id`, made at the first call (no I/O)."""
        with self._lock:
            channel = self._channels.get(run_id)
            if channel is None:
                channel = self._channels[run_id] = RunChannel(run_id, self._bind, self._add_name)
            return channel

    def control(self, event: EventName, fields: Mapping[str, Any]) -> Version:
        """Write one control event to the journal; it survives kill -9 once this returns. No network, about 20 us.

        `time_ms`, `seq` and `writer` are filled in where absent. Validates nothing but the schema and the size; an
        event with many params or tags is split.

        Raises:
            CodecError: `fields` do not fit the event's schema.
            InvalidInputError: the event is larger than `limits.MAX_BODY_BYTES` and cannot be split.
        """
        version = self.next_version()
        stamped = {"time_ms": version.time_ms, "seq": version.seq, "writer": version.writer, **fields}
        version = Version(stamped["time_ms"], stamped["seq"], stamped["writer"])
        for key, fingerprint, body in encode_control(event, stamped):
            frame = encode_frame(version.time_ms, fingerprint, key, body)
            with self._lock:
                self._ensure().journal.append_control(frame)
        return version

    def next_version(self) -> Version:
        """A version newer than all that this recorder gave out before, also when the clock went back."""
        with self._lock:
            journal = self._ensure().journal
            self._last_ms = max(self._last_ms, now_ms())
            return Version(self._last_ms, journal.next_seq(), journal.writer)

    def open_run(self, run_id: str) -> None:
        """Send heartbeats for `run_id` after `limits.HEARTBEAT_SECONDS` without an event of it, until `close_run`."""
        self._open_runs[run_id] = time.monotonic()

    def close_run(self, run_id: str) -> None:
        """No more heartbeats for `run_id`, and its channel is forgotten; one still in use goes on working."""
        self._open_runs.pop(run_id, None)
        with self._lock:
            self._channels.pop(run_id, None)

    @property
    def open_runs(self) -> tuple[str, ...]:
        """Runs that get heartbeats."""
        return tuple(self._open_runs)

    def _bind(self, channel: RunChannel, stale: Write | None) -> Write:
        outlet = self._outlet
        if outlet is not None and outlet.journal.write is stale:
            outlet.journal.prepare_spare(now=True)
        with self._lock:
            journal = self._ensure().journal
            self._adopt(channel, journal)
            return journal.write if stale is None else journal.write_after(stale)

    def _add_name(self, channel: RunChannel, key: str | tuple[str, ...]) -> None:
        with self._lock:
            journal = self._ensure().journal
            self._adopt(channel, journal)
            if isinstance(key, tuple):
                if key not in channel.shapes:
                    number = journal.add_name((channel.run_id, key))
                    channel.shapes[key] = (number, call_packer(len(key)))
            elif key not in channel.ids:
                channel.ids[key] = journal.add_name((channel.run_id, key))

    @staticmethod
    def _adopt(channel: RunChannel, journal: Journal) -> None:
        if channel.journal is not journal:
            channel.ids.clear()
            channel.shapes.clear()
            channel.journal = journal

    def _ensure(self) -> _Outlet:
        """The present journal, made now if there is none. Under `_lock`."""
        outlet = self._outlet
        if outlet is not None:
            return outlet
        data = self.settings.data_directory
        journal = Journal.create(
            self._folders,
            self.settings.tracking_uri,
            data.journals if data is not None else None,
            self.settings.journal_limit_bytes,
        )
        if self._outlet is not None:  # a signal handler was faster
            journal.seal()
            journal.remove()
            return self._outlet
        source = Source(
            journal.segments,
            journal.control,
            journal.names.table,
            journal.writer,
            forget=journal.forget,
            progress=journal.remember,
        )
        pump = Pump(source, self._tally, refuse=journal.refuse, delivered=self._delivered)
        self._outlet = outlet = _Outlet(journal, source, pump)
        self._start_thread()
        process_life.deliver_at_end_of_child()
        return outlet

    # -- waiting

    def flush(self, timeout_seconds: float = 30.0) -> Report:
        """Block until everything logged before is acknowledged by the log, at most `timeout_seconds`.

        Never raises for delivery; the report says what is missing.
        """
        outlets = self._outlets()
        ends = [(outlet, outlet.source.end()) for outlet in outlets]
        complete = self._wait(lambda: all(outlet.source.done(end) for outlet, end in ends), outlets, timeout_seconds)
        return self._reported(complete)

    def report(self) -> Report:
        """The counts of this moment; does not block. `complete` says whether nothing waits."""
        outlets = self._outlets()
        return self._reported(all(outlet.source.done(outlet.source.end()) for outlet in outlets))

    def close(self, timeout_seconds: float = 10.0) -> Report:
        """Flush, stop the thread, remove the journal if all of it is delivered; what is left waits for recovery.

        A later call begins a new journal.
        """
        with self._lock:
            outlet, self._outlet = self._outlet, None
            if outlet is not None:
                # Under the lock together with the line above: who finds no journal also finds this one sealed.
                outlet.journal.seal()
                self._retired.append(outlet)
        complete = self._wait(lambda: not self._retired, list(self._retired), timeout_seconds, retiring=True)
        with self._moved:
            thread, self._thread = self._thread, None
            self._moved.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(1.0, min(5.0, timeout_seconds)))
        if self._driving.acquire(timeout=1.0):
            try:
                for left in self._retired:
                    left.journal.leave()
                self._retired.clear()
                recovery, self._recovery = self._recovery, None
                if recovery is not None:
                    recovery.stop()
                transport, self._transport = self._transport, None
                if transport is not None:
                    with contextlib.suppress(Exception):
                        transport.close(1.0)
            finally:
                self._driving.release()
        self._revive()
        if not complete:
            log.warning(
                "runstream: not everything could be delivered in %.0f s (%s). The rest waits in the journal and is "
                "sent by the next process on this machine, or by `runstream sync`.",
                timeout_seconds,
                self._tally.last_error or "no acknowledgement yet",
            )
        return self._reported(complete)

    def _wait(
        self, done: Callable[[], bool], outlets: list[_Outlet], timeout_seconds: float, *, retiring: bool = False
    ) -> bool:
        deadline = time.monotonic() + timeout_seconds
        with self._moved:
            self._drainers += 1
            for outlet in outlets:
                outlet.pump.retry_now()
            self._moved.notify_all()
            try:
                while not done():
                    left = deadline - time.monotonic()
                    if left <= 0.0:
                        return False
                    if self._has_thread():
                        self._moved.wait(min(left, 0.5))
                        continue
                    self._moved.release()  # no thread can be had any more: this one delivers
                    try:
                        time.sleep(min(left, self._round()))
                    finally:
                        self._moved.acquire()
                return True
            finally:
                self._drainers -= 1

    def _reported(self, complete: bool) -> Report:
        tally = self._tally
        outlet = self._outlet
        with tally.lock:
            return Report(
                complete=complete,
                positions=dict(tally.positions),
                delivered_points=tally.delivered_points,
                delivered_events=tally.delivered_events,
                thinned_points=sum(tally.thinned.values()),
                dropped_points=tally.dropped_points + (outlet.journal.dropped_points if outlet is not None else 0),
                refused_events=tally.refused_events,
                last_error=tally.last_error,
            )

    # -- the delivery thread

    def _revive(self) -> None:
        """Have a thread again if somebody logged while the old one was being stopped."""
        with self._lock:
            if self._outlet is not None:
                self._start_thread()

    def _has_thread(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start_thread(self) -> None:
        if self._has_thread():
            return
        thread = threading.Thread(target=self._run, name="runstream-delivery", daemon=True)
        self._recovery_at = time.monotonic() + RECOVERY_DELAY_SECONDS
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # the interpreter is going down: what is logged now waits in the journal
            self._thread = None

    def _run(self) -> None:
        me = threading.current_thread()
        with importing:
            from runstream_schemas import codec

            codec.schemas()
        while self._thread is me:
            pause = self._round()
            with self._moved:
                if pause > 0.0 and self._thread is me:
                    self._moved.wait(pause)

    def _round(self) -> float:
        """One step of everything; seconds to rest before the next. Never raises."""
        with self._driving:
            try:
                return self._advance()
            except Exception as exc:
                # A bug must not end delivery for good: the journal keeps everything, and it is read again from there.
                for outlet in self._outlets():
                    outlet.pump.forget_in_flight()
                if not self._failed_before:
                    self._failed_before = True
                    log.exception("runstream: unexpected error in delivery; the journal keeps everything")
                with self._tally.lock:
                    self._tally.last_error = f"unexpected {type(exc).__name__}: {exc}"
                return 1.0

    def _outlets(self) -> list[_Outlet]:
        return [*self._retired, *([self._outlet] if self._outlet is not None else [])]

    def _advance(self) -> float:
        draining = self._drainers > 0
        moved = False
        rest = LINGER_SECONDS
        outlets = self._outlets()
        for outlet in outlets:
            backlog = outlet.source.backlog_bytes()
            chunk = DRAIN_CHUNK_BYTES if draining or backlog > BACKLOG_BYTES else BUSY_CHUNK_BYTES
            if outlet.pump.step(self._connected, chunk, 0.05 if draining else 0.0):
                moved = True
            elif outlet.pump.is_waiting:
                rest = min(rest, 0.01)
        for outlet in self._retired[:]:
            if outlet.source.done(outlet.source.end()):
                self._finish(outlet)
                moved = True
        self._chores(outlets)
        self._rounds += 1
        # Also beside a training loop that never rests: who has taken an orphan must bring it to its end.
        if not draining and (not moved or self._rounds % 4 == 0):
            moved = self._recover() or moved
        if draining:
            return 0.0 if moved else 0.005
        return BUSY_PAUSE_SECONDS if moved else rest

    def _finish(self, outlet: _Outlet) -> None:
        self._tally.dropped_points += outlet.journal.dropped_points
        outlet.journal.remove()
        with self._moved:
            self._retired.remove(outlet)
            self._moved.notify_all()

    def _connected(self) -> Transport:
        if self._transport is None:
            self._transport = self._connect(self.settings)
        return self._transport

    def _delivered(self, parcel: Parcel) -> None:
        now = time.monotonic()
        for event in parcel.events:
            if event.key in self._open_runs:
                self._open_runs[event.key] = now
        self._unsynced = True
        with self._moved:
            self._moved.notify_all()

    def _chores(self, outlets: list[_Outlet]) -> None:
        for outlet in outlets:
            outlet.journal.prepare_spare()
            keep_below_limit(outlet.journal, outlet.source.reading, self._tally)
        now = time.monotonic()
        if now < self._next_chores:
            return
        self._next_chores = now + CHORES_SECONDS
        for outlet in outlets:
            outlet.journal.sync()
            if self._lock.acquire(blocking=False):
                try:
                    outlet.journal.tidy(outlet.source.acknowledged.control)
                finally:
                    self._lock.release()
        if self._unsynced and self._transport is not None:
            self._unsynced = False
            with contextlib.suppress(Exception):
                self._transport.sync()
        if self._outlet is not None and self._lock.acquire(blocking=False):
            try:
                self._heartbeats(now)
                self._report_thinning()
            finally:
                self._lock.release()

    def _heartbeats(self, now: float) -> None:
        for run_id, last in list(self._open_runs.items()):
            if now - last >= HEARTBEAT_SECONDS and run_id in self._open_runs:
                self._open_runs[run_id] = now
                self.control("run_updated", {"run_id": run_id})

    def _report_thinning(self) -> None:
        """Make it visible on the run that points were left out."""
        for run_id, points in list(self._tally.thinned.items()):
            if self._thinned_reported.get(run_id) != points:
                self._thinned_reported[run_id] = points
                tag = {"run_id": run_id, "keys": ["runstream.thinned_points"], "values": [str(points)]}
                self.control("run_tags", tag)

    def _recover(self) -> bool:
        """One step of delivering what a dead process left for this target; False if there is nothing to do."""
        if self._recovery is None:
            if self._recovery_at is None or time.monotonic() < self._recovery_at:
                return False
            self._recovery_at = None
            with importing:
                from .journal.recovery import Recovery

            self._recovery = Recovery(self.settings, self._folders)
        recovery = self._recovery
        if recovery.step(self._connected, BUSY_CHUNK_BYTES):
            return True
        if recovery.finished:
            self._recovery = None
        return False

    # -- fork (`process_life.Member`)

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """The parent's journal, thread and connections stay the parent's; the child makes its own when it logs."""
        outlets = self._outlets()
        self._outlet = None
        recovery = self._recovery
        if self._transport is not None:
            self._inherited.append(self._transport)
            self._transport = None
        self._reset()
        # Heartbeats of the parent's runs are the parent's: a child that outlives it must not keep them alive.
        self._open_runs.clear()
        if recovery is not None:
            recovery.abandon()
        for outlet in outlets:
            outlet.journal.abandon()


_by_target: dict[str, Recorder] = {}


def for_target(settings: Settings) -> Recorder:
    """The recorder of `settings.tracking_uri` in this process; made at the first call (no I/O, no thread yet).

    Raises:
        SettingsError: see `Recorder`.
    """
    with process_life.guard:
        recorder = _by_target.get(settings.tracking_uri)
        if recorder is None:
            recorder = _by_target[settings.tracking_uri] = Recorder(settings)
        return recorder


def current() -> Recorder:
    """The recorder of the environment's tracking address (`Settings.from_environment()`)."""
    return for_target(Settings.from_environment())
