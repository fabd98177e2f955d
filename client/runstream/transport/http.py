"""Events to a server, which appends them to its log: one request after the other, from a thread of its own.

`send` hands over and returns; what has gathered while a request was on its way goes with the next one. A failed request
fails everything that is handed over: the journal sends it again, in order. Resending is harmless, so a request whose
answer was lost is no trouble.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas.delivery import (
    CONTENT_TYPE,
    EVENTS_PATH,
    MAX_REQUEST_BYTES,
    MAX_REQUEST_EVENTS,
    POSITIONS_PATH,
    compress,
)
from runstream_schemas.identity import now_ms
from runstream_schemas.limits import MAX_BODY_BYTES
from runstream_schemas.names import STREAMS, Stream
from runstream_schemas.segment import encode_frame

from ..remote.connection import Connection, RequestError
from . import Event, Positions, TransportError

if TYPE_CHECKING:
    from ..remote.server import Server

__all__ = ["HttpTransport"]

GATHER_BYTES: Final = 4 * 1024 * 1024
"""Frames of one request; more would only make the answer later."""
ANSWER_SECONDS: Final = 30.0
"""Longest wait for one acknowledgement; the server itself gives up after 10 s and says so."""
MIN_REQUEST_BYTES: Final = 64 * 1024
"""A single event is sent whatever its size; no proxy's limit is taken to be below this."""


class _Sent:
    """The fate of one `send`."""

    def __init__(self, owner: HttpTransport, frames: Sequence[bytes]) -> None:
        self._owner = owner
        self.waiting = deque(frames)
        """Frames that no request has carried yet."""
        self.positions: dict[tuple[Stream, int], int] = {}
        self.failure: TransportError | None = None
        self.done = not frames

    def result(self, timeout_seconds: float) -> Positions:
        """See `Receipt`."""
        with self._owner._changed:
            if not self._owner._changed.wait_for(lambda: self.done, max(0.0, timeout_seconds)):
                raise TimeoutError("not acknowledged yet")
            if self.failure is not None:
                raise TransportError(
                    str(self.failure),
                    retryable=self.failure.retryable,
                    retry_after_seconds=self.failure.retry_after_seconds,
                )
            return dict(self.positions)


class HttpTransport:
    """A `Transport` that posts. Any thread may call it."""

    def __init__(
        self,
        server: Server,
        *,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_request_events: int = MAX_REQUEST_EVENTS,
        encodings: Sequence[str] = ("gzip",),
    ) -> None:
        """No I/O, no thread.

        Args:
            encodings: content codings that the server takes.
        """
        self._server = server
        self.limit(max_request_bytes, max_request_events, encodings)
        self._changed = threading.Condition()
        self._queue: deque[_Sent] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._rest_until = 0.0
        self._asking = threading.Lock()
        self._asker: Connection | None = None
        self.requests = 0
        """Posted so far, for tests and figures."""

    def __repr__(self) -> str:
        return f"HttpTransport({self._server.uri!r})"

    def limit(self, max_request_bytes: int, max_request_events: int, encodings: Sequence[str]) -> None:
        """Keep to what the server says it takes."""
        self._max_bytes = min(GATHER_BYTES, max_request_bytes)
        self._max_events = max_request_events
        self._encodings = tuple(encodings)

    def send(self, events: Sequence[Event]) -> _Sent:
        """See `Transport`; does not block."""
        rest = self._rest_until - time.monotonic()
        if rest > 0.0:
            raise TransportError(
                f"{self._server.uri} asked to be left alone for another {rest:.0f} s",
                retryable=True,
                retry_after_seconds=rest,
            )
        for event in events:
            if len(event.body) > MAX_BODY_BYTES:
                raise TransportError(
                    f"an event of {len(event.body)} bytes for {event.key!r} is above the limit of {MAX_BODY_BYTES}",
                    retryable=False,
                )
        now = now_ms()
        sent = _Sent(self, [encode_frame(now, e.fingerprint, e.key, e.body) for e in events])
        with self._changed:
            if self._closed:
                raise TransportError(f"the transport to {self._server.uri} is closed", retryable=True)
            if not sent.done:
                self._queue.append(sent)
                self._start()
                self._changed.notify_all()
        return sent

    def sync(self) -> None:
        """Nothing: the server syncs its log itself."""

    def end_positions(self, timeout_seconds: float) -> Positions:
        """See `Transport`."""
        with self._asking:
            if self._asker is None:
                self._asker = self._server.connection(max(0.5, timeout_seconds))
            try:
                return _positions(self._asker.request("GET", POSITIONS_PATH).json())
            except RequestError as exc:
                raise _translated(exc) from exc

    def close(self, timeout_seconds: float) -> None:
        """See `Transport`."""
        with self._changed:
            self._closed = True
            self._fail_all(TransportError(f"the transport to {self._server.uri} is closed", retryable=True))
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_seconds)
        with self._asking:
            if self._asker is not None:
                self._asker.close()
                self._asker = None

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="runstream-post", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as exc:  # the interpreter is going down
                self._thread = None
                self._queue.clear()
                raise TransportError(f"no thread can be started any more: {exc}", retryable=True) from exc

    def _run(self) -> None:
        connection = self._server.connection(ANSWER_SECONDS)
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closed)
                    if self._closed:
                        return
                    frames, shares = self._gather()
                self._post(connection, frames, shares)
        finally:
            connection.close()

    def _gather(self) -> tuple[list[bytes], list[_Sent]]:
        """The frames of one request, and whose they are; each `_Sent` gives its last frames to the last of them."""
        frames: list[bytes] = []
        shares: list[_Sent] = []
        size = 0
        for sent in self._queue:
            if len(frames) >= self._max_events:
                break
            taken = False
            while sent.waiting and len(frames) < self._max_events:
                if frames and size + len(sent.waiting[0]) > self._max_bytes:
                    break
                frame = sent.waiting.popleft()
                frames.append(frame)
                size += len(frame)
                taken = True
            if taken:
                shares.append(sent)
            if sent.waiting:
                break
        return frames, shares

    def _post(self, connection: Connection, frames: list[bytes], shares: list[_Sent]) -> None:
        encoding, body = compress(b"".join(frames), self._encodings)
        try:
            self.requests += 1
            answer = connection.request(
                "POST",
                EVENTS_PATH,
                body=body,
                headers={"Content-Type": CONTENT_TYPE, "Content-Encoding": encoding},
            )
            positions = _positions(answer.json())
        except RequestError as exc:
            failure = self._judge(exc, len(frames), sum(map(len, frames)))
            with self._changed:
                if failure.retry_after_seconds:
                    self._rest_until = time.monotonic() + failure.retry_after_seconds
                self._fail_all(failure)
                self._changed.notify_all()
            return
        except Exception as exc:  # a bug must not leave receipts open for ever
            with self._changed:
                self._fail_all(TransportError(f"unexpected {type(exc).__name__}: {exc}", retryable=True))
                self._changed.notify_all()
            return
        with self._changed:
            for sent in shares:
                for place, offset in positions.items():
                    sent.positions[place] = max(offset, sent.positions.get(place, 0))
                if not sent.waiting:
                    sent.done = True
            while self._queue and self._queue[0].done:
                self._queue.popleft()
            self._changed.notify_all()

    def _judge(self, exc: RequestError, events: int, size: int) -> TransportError:
        """What the journal must do about a refusal."""
        if exc.refused:
            reasons = "; ".join(sorted(set(exc.refused.values()))[:3])
            return TransportError(f"{self._server.uri} refuses: {reasons}", retryable=False)
        if exc.status == 413:
            if events > 1:
                # Some proxy takes less than the server behind it.
                self._max_bytes = max(MIN_REQUEST_BYTES, size // 2)
                self._max_events = max(1, events // 2)
                return TransportError(str(exc), retryable=True)
            return TransportError(f"{exc}; the event has {size} bytes", retryable=False)
        return _translated(exc)

    def _fail_all(self, failure: TransportError) -> None:
        for sent in self._queue:
            sent.failure, sent.done = failure, True
        self._queue.clear()


def _translated(exc: RequestError) -> TransportError:
    return TransportError(str(exc), retryable=True, retry_after_seconds=exc.retry_after_seconds)


def _positions(answer: Mapping[str, Any]) -> Positions:
    found: dict[tuple[Stream, int], int] = {}
    try:
        for entry in answer["positions"]:
            if entry["stream"] in STREAMS:
                found[entry["stream"], int(entry["partition"])] = int(entry["next_offset"])
    except (KeyError, TypeError, ValueError) as exc:
        raise RequestError("the answer is not that of a runstream server: check the address") from exc
    return found
