"""One `Recorder` per process and tracking address: the journal, its delivery thread, and the calls that write to both.

What a call here returned from survives kill -9: it lies in the journal's pages and is delivered by this process or by the
next one on the machine. Nothing here raises for trouble with delivery; wrong use raises at the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runstream_schemas.identity import Version
from runstream_schemas.names import EventName

from .config import Settings
from .transport import Positions

__all__ = ["Recorder", "Report", "RunChannel", "current", "for_target"]


@dataclass(frozen=True, slots=True)
class Report:
    """What has become of everything logged so far by this process to one target."""

    complete: bool
    """Everything logged before the call is acknowledged by the log."""
    positions: Positions = field(default_factory=dict)
    """Next offsets behind what this process has delivered: what a reader must wait for to see it."""
    delivered_points: int = 0
    delivered_events: int = 0
    """Control events and metric batches."""
    thinned_points: int = 0
    """Points left out because the journal reached its limit while the log was away."""
    dropped_points: int = 0
    """Points lost: no room even after thinning, or no journal on disk and the memory fallback full."""
    refused_events: int = 0
    """Bodies that the log will never take; kept in the journal's refused/ folder."""
    last_error: str | None = None
    """The newest delivery trouble, for people; None if there was none."""

    def __bool__(self) -> bool:
        return self.complete


class RunChannel:
    """Logs metrics of one run. The two attributes are the hot path: look them up once, call them often, from any thread."""

    run_id: str
    log_metric: Callable[..., None]
    """`log_metric(key, value, step=None, timestamp=None)`: timestamp in UTC ms, None is now; step None is 0.

    Raises InvalidTypeError or InvalidInputError for what cannot be logged, and has logged nothing then.
    """
    log_metrics: Callable[..., None]
    """`log_metrics(mapping, step=None, timestamp=None)`: one call, all or nothing."""

    def hot(self) -> tuple[Callable[[bytes], object], dict[str, int]]:
        """`(write, ids)` of the present journal segment, for `runstream.hot`; stale ones fail with ValueError or KeyError."""
        raise NotImplementedError


class Recorder:
    """Owns journal and delivery of one tracking address in this process. All methods are thread-safe and fork-safe."""

    settings: Settings

    def run_channel(self, run_id: str) -> RunChannel:
        """The channel of `run_id`, made at the first call (no I/O)."""
        raise NotImplementedError

    def control(self, event: EventName, fields: Mapping[str, Any]) -> Version:
        """Write one control event to the journal; it survives kill -9 once this returns. No network, about 20 us.

        `time_ms`, `seq` and `writer` are filled in where absent. Validates nothing but the schema.

        Raises:
            CodecError: `fields` do not fit the event's schema.
        """
        raise NotImplementedError

    def next_version(self) -> Version:
        """A version newer than all that this recorder gave out before, also when the clock went back."""
        raise NotImplementedError

    def open_run(self, run_id: str) -> None:
        """Send heartbeats for `run_id` after `limits.HEARTBEAT_SECONDS` without an event of it, until `close_run`."""
        raise NotImplementedError

    def close_run(self, run_id: str) -> None:
        """No more heartbeats for `run_id`."""
        raise NotImplementedError

    def flush(self, timeout_seconds: float = 30.0) -> Report:
        """Block until everything logged before is acknowledged by the log, at most `timeout_seconds`. Never raises for delivery."""
        raise NotImplementedError

    def report(self) -> Report:
        """The counts of this moment; does not block. `complete` says whether nothing waits."""
        raise NotImplementedError

    def close(self, timeout_seconds: float = 10.0) -> Report:
        """Flush, stop the thread, remove the journal if all of it is delivered. A later call begins a new journal."""
        raise NotImplementedError


def for_target(settings: Settings) -> Recorder:
    """The recorder of `settings.tracking_uri` in this process; made at the first call (no I/O, no thread yet)."""
    raise NotImplementedError


def current() -> Recorder:
    """The recorder of the environment's tracking address (`Settings.from_environment()`)."""
    return for_target(Settings.from_environment())
