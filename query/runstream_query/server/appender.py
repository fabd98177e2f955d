"""Appends events to the log for many requests at once: group commit.

Requests hand in events and wait. Everything that has gathered is sent as one batch through the client's transport, and
the requests go on when it is acknowledged. A log that acknowledges at once (a directory) is written on the event loop,
once per turn, for a thread's two hand-overs would cost more than the write; a broker is waited for in a thread. So is a
directory that has just been slow (a stopped process can hold its lock). The queue is bounded: beyond it requests are
refused at once (429) instead of waiting without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from runstream.transport import Event, Positions, Transport, TransportError

MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024
"""Bodies waiting for the log, over all requests."""
MAX_BATCH_EVENTS: Final = 2_000
ACKNOWLEDGE_SECONDS: Final = 10.0
"""How long one batch may wait for its acknowledgement before its requests are answered 503."""
SLOW_WRITE_SECONDS: Final = 0.25
"""A write on the event loop that takes longer sends the next ones to the thread for `SLOW_PAUSE_SECONDS`."""
SLOW_PAUSE_SECONDS: Final = 30.0


class AppendRefusedError(RuntimeError):
    """The events were not taken, or their fate is not known; sending them again is safe."""

    def __init__(self, message: str, *, overloaded: bool) -> None:
        super().__init__(message)
        self.overloaded = overloaded
        """True: too much is waiting, nothing was sent."""


class EventAppender:
    """Stands in front of one transport. `append` is called on the event loop that made this object."""

    def __init__(self, transport: Transport, *, immediate: bool = False, sync_interval_seconds: float = 1.0) -> None:
        """Args:
        immediate: the transport acknowledges within `send`, so that it may be called on the event loop.
        sync_interval_seconds: acknowledged events are safe from power loss after at most about so long.
        """
        self._transport = transport
        self._in_use = threading.Lock()
        """Held around every call of the transport but `sync`."""
        self._immediate = immediate
        self._slow_until = 0.0
        self._gathered: list[tuple[Sequence[Event], asyncio.Future[Positions]]] = []
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._queue: deque[tuple[Sequence[Event], asyncio.Future[Positions]]] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._sync_interval_seconds = sync_interval_seconds
        self._unsynced = False
        self._syncing = False
        self.appended_events = 0
        """Events acknowledged since the start, for metrics."""
        self._thread = threading.Thread(target=self._run, name="runstream-append", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting now."""
        return self._queued_bytes

    async def append(self, events: Sequence[Event]) -> Positions:
        """Wait until `events` are durable in the log, in order and together.

        Raises:
            AppendRefusedError: the queue is full, the log did not acknowledge in time, or the server is stopping.
        """
        size = sum(len(item.body) for item in events)
        future: asyncio.Future[Positions] = self._loop.create_future()
        if self._immediate and not self._closed and self._queued_bytes == 0 and time.monotonic() >= self._slow_until:
            self._gathered.append((events, future))
            if len(self._gathered) == 1:
                self._loop.call_soon(self._write_gathered)
            return await future
        self._enqueue(events, future, size)
        return await future

    def _write_gathered(self) -> None:
        batch, self._gathered = self._gathered, []
        if not self._in_use.acquire(blocking=False):
            for events, future in batch:
                try:
                    self._enqueue(events, future, sum(len(item.body) for item in events))
                except AppendRefusedError as exc:
                    _settle([future], {}, exc)
            return
        began = time.monotonic()
        try:
            positions, failure = self._send([item for group, _ in batch for item in group])
        finally:
            self._in_use.release()
        if failure is not None or time.monotonic() - began > SLOW_WRITE_SECONDS:
            self._slow_until = time.monotonic() + SLOW_PAUSE_SECONDS
        if failure is None and self._unsynced and not self._syncing:
            self._syncing = True
            with self._wake:
                self._wake.notify()
        _settle([future for _, future in batch], positions, failure)

    def _enqueue(self, events: Sequence[Event], future: asyncio.Future[Positions], size: int) -> None:
        with self._wake:
            if self._closed:
                raise AppendRefusedError("the server is stopping", overloaded=True)
            if self._queued_bytes + size > MAX_QUEUED_BYTES:
                raise AppendRefusedError(
                    f"{self._queued_bytes} bytes are already waiting for the event log", overloaded=True
                )
            self._queued_bytes += size
            self._queue.append((events, future))
            if len(self._queue) == 1:
                self._wake.notify()

    def _take(self) -> list[tuple[Sequence[Event], asyncio.Future[Positions]]] | None:
        """What waits; nothing where it is time to sync; None at the end."""
        with self._wake:
            while not self._queue:
                if self._closed:
                    return None
                pending = self._unsynced
                timed_out = not self._wake.wait(self._sync_interval_seconds if pending else None)
                if timed_out:
                    return []
            batch = []
            count = 0
            while self._queue and count < MAX_BATCH_EVENTS:
                item = self._queue.popleft()
                count += len(item[0])
                batch.append(item)
            return batch

    def _send(self, events: Sequence[Event]) -> tuple[Positions, Exception | None]:
        try:
            positions = self._transport.send(events).result(ACKNOWLEDGE_SECONDS)
        except TimeoutError:
            said = f"the event log did not acknowledge within {ACKNOWLEDGE_SECONDS:.0f} s"
            return {}, AppendRefusedError(said, overloaded=False)
        except TransportError as exc:
            return {}, AppendRefusedError(f"the event log refused the write: {exc}", overloaded=False)
        except Exception as exc:  # a defect in the transport must fail requests, not end the thread or the loop
            return {}, exc
        self.appended_events += len(events)
        self._unsynced = True
        return positions, None

    def _run(self) -> None:
        synced_at = time.monotonic()
        while (batch := self._take()) is not None:
            if batch:
                with self._in_use:
                    positions, failure = self._send([item for group, _ in batch for item in group])
                with self._wake:
                    self._queued_bytes -= sum(len(item.body) for group, _ in batch for item in group)
                futures = [future for _, future in batch]
                try:
                    self._loop.call_soon_threadsafe(_settle, futures, positions, failure)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return
            if not batch or time.monotonic() - synced_at > self._sync_interval_seconds:
                self._sync()
                synced_at = time.monotonic()

    def _sync(self) -> None:
        # Beside `send`, which may run on the event loop now: a sync touches nothing but the files already written.
        self._unsynced = self._syncing = False
        try:
            self._transport.sync()
        except Exception:  # power-loss safety is retried with the next write; acknowledged data is in the log already
            self._unsynced = True

    def close(self, timeout_seconds: float) -> None:
        """Take no more events, send what waits, then close the transport. Blocks; not on the event loop."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(timeout_seconds)
        with contextlib.suppress(Exception):
            self._sync()
        self._transport.close(timeout_seconds)


def _settle(futures: list[asyncio.Future[Positions]], positions: Positions, failure: Exception | None) -> None:
    for future in futures:
        if future.done():  # its request was cancelled
            continue
        if failure is None:
            future.set_result(positions)
        else:
            future.set_exception(failure)
