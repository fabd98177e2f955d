"""What happens at the journal's size limit: beyond it the resolution of the oldest undelivered metrics halves, once.

Of a sealed segment that was never submitted every second point of each key goes; the last point of a key in a segment
always stays. The rest is kept as encoded batches with their old seqs, ready to be sent. If that is not enough, the
oldest of these go too, but for the last point of each key that does not occur later. Params, tags and status are never
touched.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from runstream_schemas.identity import now_ms
from runstream_schemas.names import METRICS
from runstream_schemas.segment import Frame, encode_frame, read_frames

from ..transport import Event
from .batch import Batch, batch_event, parse
from .names import Name
from .record import BLOCK_BYTES, sequence
from .segment import HEADER_BYTES
from .source import PlainPart, ThinPart

__all__ = ["Thinned", "drop", "thin", "thinned_file", "thinned_number"]

_SUFFIX: Final = ".thin"

Pause = Callable[[], object]
"""Called every few hundred points, so that training gets the GIL."""


def thinned_file(number: int, left_out: int) -> str:
    """File name of what is left of segment `number` when `left_out` of its points are gone."""
    return f"{number:010d}-{left_out}{_SUFFIX}"


def thinned_number(name: str) -> tuple[int, int] | None:
    """The inverse of `thinned_file`; None for other files."""
    number, dash, left_out = name.removesuffix(_SUFFIX).partition("-")
    if name.endswith(_SUFFIX) and dash and number.isdecimal() and left_out.isdecimal():
        return int(number), int(left_out)
    return None


class Thinned(ThinPart):
    """A thinned segment of a live journal."""

    def __init__(self, number: int, path: str, size: int, keys: frozenset[tuple[str, str]]) -> None:
        self.number = number
        self.path = path
        self.size = size
        self.keys = keys
        """(run id, key) of every series in it."""
        self.is_remnant = False
        """Only last points are left."""
        self._data: bytes | None = None

    def frames(self) -> bytes:
        """The whole file; stays in memory until it is removed, for it is read in parts.

        Raises:
            OSError: it cannot be read.
        """
        if self._data is None:
            with open(self.path, "rb") as file:
                self._data = file.read()
        return self._data

    def remove(self) -> None:
        """Delete the file, if it is still there."""
        self._data = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    detach = seal = sync = lambda self: None  # what a journal asks of all its parts; a thinned one is finished


def thin(
    part: PlainPart, names: Mapping[int, Name], writer: int, folder: str, pause: Pause
) -> tuple[Thinned, Counter[str]]:
    """Write the thinned form of a sealed segment beside it; the caller removes the segment then.

    Returns:
        what is left, and the number of points left out per run.

    Raises:
        OSError: no room; nothing changed.
    """
    batches = list(_batches(part, names, pause))
    totals: Counter[tuple[str, str]] = Counter()
    for batch in batches:
        for index, count in Counter(batch.ki).items():
            totals[batch.run_id, batch.keys[index]] += count
        pause()
    left_out: Counter[str] = Counter()
    frames: list[bytes] = []
    for batch in batches:
        kept = [_counted_down(totals, batch, index) for index in batch.ki]
        left_out[batch.run_id] += len(kept) - sum(kept)
        if any(kept):
            frames.append(_frame(batch_event(_selected(batch, kept), writer, now_ms())))
        pause()
    path = f"{folder}/{thinned_file(part.number, sum(left_out.values()))}"
    _write(path, frames)
    return Thinned(part.number, path, sum(map(len, frames)), frozenset(totals)), left_out


def drop(part: Thinned, later: Iterable[Thinned], left_out_before: int, pause: Pause) -> tuple[Thinned, Counter[str]]:
    """Leave of a thinned segment only the last point of each key that none of `later` has; replaces its file.

    Raises:
        OSError: no room; nothing changed.
    """
    from runstream_schemas import codec

    elsewhere: set[tuple[str, str]] = set().union(*(other.keys for other in later))
    bodies: list[dict[str, Any]] = []
    for item in read_frames(part.frames(), 0):
        if isinstance(item, Frame):
            bodies.append(codec.decode(item.fingerprint, item.body)[1])
            pause()
    seen: set[tuple[str, str]] = set()
    left_out: Counter[str] = Counter()
    frames: list[bytes] = []
    for body in reversed(bodies):
        batch = Batch(**{name: body[name] for name in _BATCH_FIELDS})
        kept = [False] * len(batch.ki)
        for at in range(len(kept) - 1, -1, -1):
            name = (batch.run_id, batch.keys[batch.ki[at]])
            if name not in seen and name not in elsewhere:
                kept[at] = True
            seen.add(name)
        left_out[batch.run_id] += len(kept) - sum(kept)
        if any(kept):
            frames.append(_frame(batch_event(_selected(batch, kept), body["writer"], now_ms())))
        pause()
    frames.reverse()
    folder = os.path.dirname(part.path)
    path = f"{folder}/{thinned_file(part.number, left_out_before + sum(left_out.values()))}"
    _write(path, frames)
    if path != part.path:
        part.remove()
    rest = Thinned(part.number, path, sum(map(len, frames)), frozenset(seen - elsewhere))
    rest.is_remnant = True
    return rest, left_out


_BATCH_FIELDS: Final = ("run_id", "first_seq", "keys", "steps", "times", "ki", "ci", "values", "seqs")


def _batches(part: PlainPart, names: Mapping[int, Name], pause: Pause) -> Iterable[Batch]:
    offset, end = HEADER_BYTES, part.end()
    while offset < end:
        counts: dict[str, int] = {}
        base = sequence(part.number, offset)
        block_end = min(end, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)
        while offset < block_end:
            # In small steps, for one step holds the GIL; seqs go by the block all the same.
            limit = min(block_end, offset + 8192)
            batches, used, needed = parse(part.read(offset, limit), names, base, counts)
            if not used and needed:
                batches, used, needed = parse(part.read(offset, offset + needed), names, base, counts)
            yield from batches
            pause()
            if not used:
                return
            offset += used


def _counted_down(totals: Counter[tuple[str, str]], batch: Batch, index: int) -> bool:
    """Whether the next point of this key stays: every second one, counted from the last, which stays."""
    name = (batch.run_id, batch.keys[index])
    totals[name] -= 1
    return totals[name] % 2 == 0


def _selected(batch: Batch, kept: list[bool]) -> Batch:
    """The values of `batch` that are kept, with the seqs they had."""
    rest = Batch(batch.run_id, batch.first_seq)
    keys: dict[int, int] = {}
    calls: dict[int, int] = {}
    for at, keep in enumerate(kept):
        if not keep:
            continue
        ki, ci = batch.ki[at], batch.ci[at]
        if ki not in keys:
            keys[ki] = len(keys)
            rest.keys.append(batch.keys[ki])
        if ci not in calls:
            calls[ci] = len(calls)
            rest.steps.append(batch.steps[ci])
            rest.times.append(batch.times[ci])
        rest.ki.append(keys[ki])
        rest.ci.append(calls[ci])
        rest.values.append(batch.values[at])
        rest.seqs.append(batch.seqs[at] if batch.seqs else batch.first_seq + at)
    rest.first_seq = rest.seqs[0]
    return rest


def _frame(event: Event) -> bytes:
    if event.stream != METRICS:
        raise ValueError(event.stream)
    return encode_frame(now_ms(), event.fingerprint, event.key, event.body)


def _write(path: str, frames: list[bytes]) -> None:
    draft = f"{path}.new"
    try:
        with open(draft, "wb") as file:
            file.writelines(frames)
        os.rename(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
