"""Read-your-writes: before a read, wait until everything logged so far is in the store.

flush this process's journal -> deliver journals that dead processes left -> where does the log end? -> wait for it
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from runstream.config import Settings
from runstream.transport import Positions, TransportError
from runstream_schemas.names import CONTROL, STREAMS, Stream

from .errors import QueryTimeout, StoreUnavailable
from .store import Store

__all__ = ["LogEnd", "Mark", "Patience", "Visibility"]

_POSITIONS: Final = "SELECT stream, partition, max(next_offset) FROM ingest_positions GROUP BY stream, partition"
_FIRST_POLL_SECONDS: Final = 0.005
_LAST_POLL_SECONDS: Final = 0.05
_SHOW_AFTER_SECONDS: Final = 2.0
"""Waits longer than this show their progress, on a terminal."""


class Mark(NamedTuple):
    """A state of the log, all of it visible: two reads at equal marks read the same."""

    control: Hashable
    """Stays the same as long as nothing but metrics was logged, and the store is the same."""
    everything: Hashable
    """Stays the same as long as nothing at all was logged; None where not all streams were waited for."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a read waits for what was logged before it."""

    stall_seconds: float = 10.0
    """Give up after so long without progress."""
    limit_seconds: float = 600.0
    """Give up after so long in any case: a cold store may have a long log to read."""


class LogEnd(Protocol):
    """Delivers what this machine still holds, and says where the log ends then."""

    def positions(self, streams: Sequence[Stream], timeout_seconds: float) -> Positions:
        """Next offsets behind everything logged before the call, in `streams`. Blocks at most `timeout_seconds`.

        Raises:
            QueryTimeout: not all of this process's data could be delivered in time.
            StoreUnavailable: the log cannot be reached.
        """
        ...


class Visibility:
    """Waits on behalf of one reader. Any thread, several at once."""

    def __init__(
        self,
        store: Store,
        log: LogEnd,
        *,
        patience: Patience | None = None,
        trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Args:
        trouble: what ingest says is wrong with it, for the error message.
        """
        self._store = store
        self._log = log
        self._patience = patience or Patience()
        self._trouble = trouble
        self._lock = threading.Lock()
        self._seen: dict[tuple[Stream, int], int] = {}
        self._seen_on = -1

    def wait(self, streams: Sequence[Stream] = STREAMS, patience: Patience | None = None) -> Mark:
        """Return once everything logged before the call is in the store.

        Returns:
            where the log ended at the call.

        Raises:
            QueryTimeout: it took too long; says how far ingest is.
            StoreUnavailable: log or store cannot be reached.
        """
        patience = patience or self._patience
        began = time.monotonic()
        ends = self._log.positions(streams, patience.stall_seconds)
        missing = self._missing(ends)
        if not missing:
            return self._mark(ends, streams)
        pause, shown = _FIRST_POLL_SECONDS, False
        progressed_at, before = time.monotonic(), -1
        while True:
            reached = self._read_positions()
            missing = {place: end for place, end in ends.items() if end > reached.get(place, 0)}
            if not missing:
                break
            now = time.monotonic()
            done = sum(reached.get(place, 0) for place in missing)
            if done > before:
                progressed_at, before = now, done
            if now - progressed_at > patience.stall_seconds or now - began > patience.limit_seconds:
                raise QueryTimeout(self._late(ends, reached, now - began))
            if now - began > _SHOW_AFTER_SECONDS and sys.stderr is not None and sys.stderr.isatty():
                shown = True
                _show(ends, reached)
            time.sleep(pause)
            pause = min(pause * 1.5, _LAST_POLL_SECONDS)
        if shown:
            _show_done()
        return self._mark(ends, streams)

    def after_fork_in_child(self) -> None:
        """The parent's lock may have been held at the fork."""
        self._lock = threading.Lock()
        self._seen = {}

    def _mark(self, ends: Positions, streams: Sequence[Stream]) -> Mark:
        control = self._store.connections, frozenset(item for item in ends.items() if item[0][0] == CONTROL)
        return Mark(control, frozenset(ends.items()) if set(streams) == set(STREAMS) else None)

    def _missing(self, ends: Positions) -> Mapping[tuple[Stream, int], int]:
        with self._lock:
            if self._seen_on != self._store.connections:
                return {place: end for place, end in ends.items() if end > 0}
            return {place: end for place, end in ends.items() if end > self._seen.get(place, 0)}

    def _read_positions(self) -> dict[tuple[Stream, int], int]:
        rows = self._store.rows(_POSITIONS)
        reached = {(stream, int(partition)): int(offset) for stream, partition, offset in rows}
        with self._lock:
            self._seen_on, self._seen = self._store.connections, reached
        return reached

    def _late(self, ends: Positions, reached: Positions, seconds: float) -> str:
        parts = ", ".join(
            f"{stream} {reached.get((stream, partition), 0):,} of {end:,}"
            + (f" in partition {partition}" if partition else "")
            for (stream, partition), end in sorted(ends.items())
            if end > reached.get((stream, partition), 0)
        )
        trouble = self._trouble()
        if trouble:
            cause = f"ingest is in trouble: {trouble}"
        elif any(reached.values()):
            cause = "ingest is behind; read again in a moment"
        else:
            cause = "nothing has been ingested yet: is `runstream ingest` running?"
        return f"what was logged is not visible after {seconds:.0f} s: ingest has read {parts}; {cause}"


class ClientLog:
    """The log of the client's settings: this process's recorder, left-over journals, and the transport's end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._transport: Any = None

    def positions(self, streams: Sequence[Stream], timeout_seconds: float) -> Positions:
        deadline = time.monotonic() + timeout_seconds
        self._flush(timeout_seconds)
        self._recover(deadline)
        remaining = max(0.1, deadline - time.monotonic())
        try:
            ends = self._end_positions(remaining)
        except (TransportError, OSError) as exc:
            raise StoreUnavailable(f"the log of {self._settings.tracking_uri} cannot be read: {exc}") from exc
        return {place: end for place, end in ends.items() if place[0] in streams}

    def close(self) -> None:
        """Release the transport."""
        with self._lock:
            transport, self._transport = self._transport, None
            if transport is not None:
                transport.close(1.0)

    def after_fork_in_child(self) -> None:
        """The transport is the parent's: closing it here could disturb the parent's connections."""
        self._lock = threading.Lock()
        self._inherited, self._transport = self._transport, None

    def _end_positions(self, timeout_seconds: float) -> Positions:
        from runstream.delivery import open_transport

        with self._lock:
            if self._transport is None:
                self._transport = open_transport(self._settings)
            ends: Positions = self._transport.end_positions(timeout_seconds)
            return ends

    def _flush(self, timeout_seconds: float) -> None:
        # Without the module nothing was logged by this process.
        recorder = sys.modules.get("runstream.recorder")
        if recorder is None:
            return
        report = recorder.for_target(self._settings).flush(timeout_seconds)
        if not report.complete:
            reason = f": {report.last_error}" if report.last_error else ""
            raise QueryTimeout(
                f"what this process logged could not be delivered within {timeout_seconds:.0f} s{reason}; "
                "it is safe in the journal and is delivered when the log is back"
            )

    def _recover(self, deadline: float) -> None:
        """Deliver what killed processes of this machine left; what cannot be delivered now stays for later."""
        from runstream.journal.recovery import recover

        recover(self._settings, max(0.1, deadline - time.monotonic()))


def _show(ends: Positions, reached: Positions) -> None:
    total = sum(ends.values()) or 1
    done = sum(min(reached.get(place, 0), end) for place, end in ends.items())
    print(f"\rrunstream: reading the log, {100 * done // total} %", end="", file=sys.stderr, flush=True)


def _show_done() -> None:
    print("\rrunstream: reading the log, done ", file=sys.stderr, flush=True)
