"""Runs by id for a server: remembered for one state of the log, and read together where several callers ask at once.

What was read of a run after some state of the log had become visible stays all there is to say as long as the log's
ends stay where they are, whoever writes and through whichever process: a mark (`visibility`) names them. Where only
metrics were logged since, only metrics are read again. Nothing is ever older than a read of the store would be. The
exceptions are `heartbeat_time` and `lost` of `info`, which are as they were when it was read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Generic, TypeVar

from .errors import QueryError
from .facts import Facts
from .remembering import Remembered
from .run_records import MAX_RECORDS, Point, RunRecord, fetch_metrics, fetch_records
from .store import Store
from .visibility import Mark

__all__ = ["MAX_AGE_SECONDS", "KnownRuns"]

MAX_BYTES: Final = 32 << 20
"""Of remembered runs, estimated."""
_ITEM_BYTES: Final = 250
"""A metric, param or tag as Python objects, without its text."""
_MAX_CHARS: Final = 20_000
"""Of the ids of one statement."""
MAX_AGE_SECONDS: Final = 30.0
"""Insurance: behind one address there may be replicas of which one was late when it was asked."""
_ROUNDS_AT_ONCE: Final = 2
"""Statements: more of them cost more than they gain, for what waits meanwhile goes together in the next one."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Known:
    mark: Mark
    record: RunRecord
    read_at: float


class KnownRuns:
    """Any thread, several at once. What it returns is shared: nobody may change it."""

    def __init__(self, store: Store, *, max_bytes: int = MAX_BYTES) -> None:
        self._store = store
        self._known: Remembered[str, _Known] = Remembered(max_bytes)
        self._metrics: _Rounds[dict[str, Point]] = _Rounds(lambda ids, _: fetch_metrics(store, ids))
        self._records: _Rounds[RunRecord] = _Rounds(self._fetch)

    def at(self, ids: Sequence[str], facts: Facts, mark: Mark) -> list[RunRecord]:
        """The runs of `ids` (at most `MAX_RECORDS`, each once) that exist, in that order, as of `mark` or later.

        Args:
            mark: of all streams; whatever it names is visible.
        """
        found: dict[str, RunRecord] = {}
        outdated: dict[str, _Known] = {}
        for each in ids:
            known = self._usable(each, mark)
            if known is not None:
                if known.mark == mark:
                    found[each] = known.record
                else:
                    outdated[each] = known
        began = time.monotonic()
        unknown = [each for each in ids if each not in found and each not in outdated]
        fresh = self._records.get(unknown, facts, mark.control) if unknown else {}
        if outdated:
            metrics = self._metrics.get(list(outdated), facts, mark.control)
            fresh |= {each: replace(known.record, metrics=metrics[each]) for each, known in outdated.items()}
        for each, record in fresh.items():
            read_at = outdated[each].read_at if each in outdated else began
            self._known.put(each, _Known(mark, record, read_at), _size(record))
        found |= fresh
        return [found[each] for each in ids if each in found]

    def without_metrics(self, ids: Sequence[str], facts: Facts, mark: Mark) -> list[RunRecord]:
        """The same, without metrics, inputs and models, or with; `mark` may be of control events alone."""
        found = [known.record for each in ids if (known := self._usable(each, mark)) is not None]
        return found if len(found) == len(ids) else fetch_records(self._store, ids, facts, metrics=False)

    def _usable(self, run_id: str, mark: Mark) -> _Known | None:
        known = self._known.get(run_id)
        if known is None or known.mark.control != mark.control:
            return None
        return known if time.monotonic() - known.read_at < MAX_AGE_SECONDS else None

    def _fetch(self, ids: Sequence[str], facts: Facts) -> dict[str, RunRecord]:
        return {record.info.run_id: record for record in fetch_records(self._store, ids, facts)}


def _size(record: RunRecord) -> int:
    items = len(record.metrics) + len(record.params) + len(record.tags) + 4 * len(record.inputs) + len(record.models)
    text = sum(map(len, record.metrics))
    text += sum(len(key) + len(value) for part in (record.params, record.tags) for key, value in part.items())
    for each in record.inputs:
        about = each.dataset
        text += sum(len(item or "") for item in (about.source, about.schema, about.profile))
    return 2_000 + _ITEM_BYTES * items + text


@dataclass(slots=True, eq=False)
class _Round(Generic[T]):
    """Ids that go into one statement."""

    ids: dict[str, None] = field(default_factory=dict)
    chars: int = 0
    callers: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    found: dict[str, T] | None = None
    """None: it failed."""


class _Rounds(Generic[T]):
    """While statements run, what others ask for gathers for the next one. No answer is older than its question: a
    statement takes up nothing once it has begun."""

    def __init__(self, fetch: Callable[[Sequence[str], Facts], dict[str, T]]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(_ROUNDS_AT_ONCE)
        self._gathering: dict[Hashable, _Round[T]] = {}

    def get(self, ids: Sequence[str], facts: Facts, key: Hashable) -> dict[str, T]:
        """What there is of `ids`; only callers with the same `key` share a statement.

        Raises:
            QueryError: of the statement for these ids alone.
        """
        chars = sum(map(len, ids))
        with self._lock:
            current = self._gathering.get(key)
            leads = current is None or len(current.ids) + len(ids) > MAX_RECORDS or current.chars + chars > _MAX_CHARS
            if current is None or leads:
                current = self._gathering[key] = _Round()
            current.ids.update(dict.fromkeys(ids))
            current.chars += chars
            current.callers += 1
        if not leads:
            current.ended.wait()
            if current.found is None:  # somebody else's id may be to blame
                return self._fetch(ids, facts)
        else:
            try:
                self._lead(current, facts, key)
            except QueryError:
                if current.callers == 1:
                    raise
                return self._fetch(ids, facts)
        found = current.found or {}
        return {each: found[each] for each in ids if each in found}

    def _lead(self, current: _Round[T], facts: Facts, key: Hashable) -> None:
        try:
            with self._turns:
                self._begin(current, key)
                current.found = self._fetch(list(current.ids), facts)
        finally:
            self._begin(current, key)
            current.ended.set()

    def _begin(self, current: _Round[T], key: Hashable) -> None:
        """From here on nobody joins."""
        with self._lock:
            if self._gathering.get(key) is current:
                del self._gathering[key]
