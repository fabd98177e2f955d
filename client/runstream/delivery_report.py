"""What has become of everything that was logged: the answer of `flush`, `end_run` and `close`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .transport import Positions

__all__ = ["Report"]


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
    """Points lost because there was no journal on disk and the memory in its place was full."""
    refused_events: int = 0
    """Bodies that the log will never take; kept in the journal's refused/ folder."""
    last_error: str | None = None
    """The newest delivery trouble, for people; None if there was none."""
