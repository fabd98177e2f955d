"""Keeps a journal below its limit on disk: which segments are thinned, and when. How is `thin`'s business."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from .segment import MAX_SEGMENT_BYTES, Segment
from .thin import Thinned, drop, thin

if TYPE_CHECKING:
    from ..delivery import Tally
    from .journal import Journal

__all__ = ["keep_below_limit"]

PAUSE_SECONDS = 0.0005


def keep_below_limit(journal: Journal, reading: int, tally: Tally) -> bool:
    """Thin one segment of `journal` if it holds more than its limit; whether something changed.

    Called by the delivery thread. Touches only finished segments behind `reading`, the one that is being sent.
    """
    if journal.folder is None or len(journal.segments) * MAX_SEGMENT_BYTES < journal.limit_bytes:
        return False
    parts = [part for number, part in sorted(journal.segments.items()) if part.path is not None]
    held = sum(part.size for part in parts)
    if held <= journal.limit_bytes:
        return False
    waiting = [part for part in parts if part.number > reading and part is not journal.current]
    whole = [part for part in waiting if isinstance(part, Segment) and part.sealed_at is not None]
    # Far above the limit there is no time to be gentle.
    gentle = held < journal.limit_bytes * 5 // 4

    def pause() -> None:
        if gentle:
            time.sleep(PAUSE_SECONDS)

    rest: Thinned
    if whole:
        old: Segment | Thinned = whole[0]
        try:
            rest, left_out = thin(whole[0], journal.names.table, journal.writer, str(journal.folder), pause)
        except OSError as exc:
            journal.trouble("thinned metrics", exc)
            return False
    else:
        thinned = [part for part in waiting if isinstance(part, Thinned)]
        victims = [part for part in thinned if not part.is_remnant]
        if not victims:
            return False
        old = victims[0]
        later = [part for part in thinned if part.number > old.number]
        before = journal.left_out.get(old.number, 0)
        try:
            rest, left_out = drop(victims[0], later, before, pause)
        except OSError as exc:
            journal.trouble("thinned metrics", exc)
            return False
    journal.left_out[old.number] = journal.left_out.get(old.number, 0) + sum(left_out.values())
    journal.segments[old.number] = rest
    if isinstance(old, Segment):
        old.remove()
    if not rest.size:
        journal.segments.pop(old.number, None)
        with contextlib.suppress(OSError):
            rest.remove()
    with tally.lock:
        tally.thinned.update(left_out)
    return True
