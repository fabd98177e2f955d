"""Appends events to the log for many requests at once: group commit in one thread.

Requests hand in events and wait; the thread takes everything that has gathered, sends it as one batch through the
client's transport and wakes the requests when it is acknowledged. The queue is bounded: beyond it requests are refused
at once (429) instead of waiting without end.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from runstream.transport import Event, Positions, Transport, TransportError

MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024
"""Bodies waiting for the log, over all requests."""
MAX_BATCH_EVENTS: Final = 2_000
ACKNOWLEDGE_SECONDS: Final = 10.0
"""How long one batch may wait for its acknowledgement before its requests are answered 503."""


class AppendRefusedError(RuntimeError):
    """The events were not taken, or their fate is not known; sending them again is safe."""

    def __init__(self, message: str, *, overloaded: bool) -> None:
        super().__init__(message)
        self.overloaded = overloaded
        """True: too much is waiting, nothing was sent."""


class EventAppender:
    """One thread in front of a transport. `append` is called on the event loop that made this object."""

    def __init__(self, transport: Transport, *, sync_interval_seconds: float = 1.0) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._queue: deque[tuple[Sequence[Event], asyncio.Future[Positions]]] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._sync_interval_seconds = sync_interval_seconds
        self._unsynced = False
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
        return await future

    def _take(self) -> list[tuple[Sequence[Event], asyncio.Future[Positions]]] | None:
        with self._wake:
            while not self._queue:
                if self._closed:
                    return None
                timed_out = not self._wake.wait(self._sync_interval_seconds if self._unsynced else None)
                if timed_out:
                    return []
            batch = []
            count = 0
            while self._queue and count < MAX_BATCH_EVENTS:
                item = self._queue.popleft()
                count += len(item[0])
                batch.append(item)
            return batch

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if not batch:
                self._sync()
                continue
            failure: Exception | None = None
            positions: Positions = {}
            events = [item for group, _ in batch for item in group]
            try:
                positions = self._transport.send(events).result(ACKNOWLEDGE_SECONDS)
            except TimeoutError:
                failure = AppendRefusedError(
                    f"the event log did not acknowledge within {ACKNOWLEDGE_SECONDS:.0f} s", overloaded=False
                )
            except TransportError as exc:
                failure = AppendRefusedError(f"the event log refused the write: {exc}", overloaded=False)
            except Exception as exc:  # a defect in the transport must fail requests, not end this thread
                failure = exc
            else:
                self.appended_events += len(events)
                self._unsynced = True
            size = sum(len(item.body) for item in events)
            with self._wake:
                self._queued_bytes -= size
            futures = [future for _, future in batch]
            try:
                self._loop.call_soon_threadsafe(_settle, futures, positions, failure)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _sync(self) -> None:
        self._unsynced = False
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
