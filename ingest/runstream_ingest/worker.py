"""The worker: poll, batch, insert, commit, in two threads that overlap; it knows nothing of events.

    the thread that calls `run`                      the insert thread
    poll -> open batch --(when due, one at a time)-> commit.Committer -> done --> log.commit

In memory are the open batch, the batch being inserted and its framed copy: at most about 3 x 8 MiB of bodies. When the
open batch is full and the other not done, the log is paused, but polled on: a Kafka consumer stays in its group.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from runstream_schemas.names import Stream

from . import identity
from .batch import Batch, BatchLimits, Pace
from .commit import Abandoned, Committer, DeadLetterLimits, Retry, read_positions
from .dead_letter import DeadLetters
from .errors import StoreBusy, StoreError
from .log import EventLog
from .metrics import Metrics
from .replay import replay_known
from .store import Store

__all__ = ["Worker", "WorkerSettings"]

_log = logging.getLogger(__name__)
_IDLE_POLL_SECONDS = 0.25
_WAITING_POLL_SECONDS = 0.02
_BUSY_POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker may be told; `config.IngestSettings` reads the same from the environment."""

    limits: BatchLimits = field(default_factory=BatchLimits)
    min_gap_seconds: float = 0.01
    """Shortest pause between two inserts."""
    flush_interval_seconds: float = 0.5
    """Longest pause between two inserts while there is something to insert."""
    retry: Retry = field(default_factory=Retry)
    dead_letters: DeadLetterLimits = field(default_factory=DeadLetterLimits)


class Worker:
    """Moves the log into the store. `run` is called once; the other methods by any thread."""

    def __init__(
        self,
        log: EventLog,
        store: Store,
        dead_letters: DeadLetters,
        settings: WorkerSettings | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """The caller closes `log`, `store` and `dead_letters` after `run`; until then the worker alone uses them."""
        self._log = log
        self._settings = settings or WorkerSettings()
        self.metrics = metrics or Metrics()
        self._inserter = _Inserter(store, dead_letters, log.identities, self._settings, self.metrics)
        self._open = Batch()
        self._positions: dict[tuple[Stream, int], int] = {}
        self._ends: dict[tuple[Stream, int], int] = {}
        self._looked_at_ends = 0.0
        self._paused = False

    def positions(self) -> Mapping[tuple[Stream, int], int]:
        """Next offsets whose rows are in the store, for the partitions this worker has."""
        return dict(self._positions)

    def ends(self) -> Mapping[tuple[Stream, int], int]:
        """Ends of this worker's partitions when it last looked, at most a second ago while it runs."""
        return dict(self._ends)

    def trouble(self) -> str | None:
        """What is wrong now, for a health check; None while all is well."""
        return self._inserter.trouble()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then insert and commit what was polled, and return. Blocks.

        Raises:
            SystemicFailure: the store refuses everything; the failing batch was not committed.
            LogError: the log is not what it was.
            MigrationError: the database is not at this runstream's migrations.
        """
        self._inserter.start()
        try:
            while not stop.is_set():
                self._round()
            self._drain()
        finally:
            self._inserter.stop()
        self._inserter.raise_failure()

    def _round(self) -> None:
        self._take(self._poll_seconds())
        self._collect()
        self._assign()
        self._hand_over()
        self._look_at_ends()

    def _take(self, timeout_seconds: float) -> None:
        self._open.add(self._log.poll(timeout_seconds))
        lost = self._log.lost()
        if lost:
            self._open.drop(lost)
            self._inserter.forget(lost)
            for partition in lost:
                self._positions.pop(partition, None)
                self._ends.pop(partition, None)
                self.metrics.lag.pop(partition, None)

    def _poll_seconds(self) -> float:
        if self._paused:
            # The insert thread decides when it goes on; the log is only told that its reader lives.
            self._inserter.wait(_WAITING_POLL_SECONDS)
            return 0.0
        if self._inserter.busy():
            return _WAITING_POLL_SECONDS
        if self._open or self._log.assigned():
            # Something waits for the gap to pass.
            return max(_BUSY_POLL_SECONDS, min(_WAITING_POLL_SECONDS, self._inserter.due_in_seconds()))
        return _IDLE_POLL_SECONDS

    def _assign(self) -> None:
        if not self._log.assigned():
            return
        positions = self._inserter.positions()
        if positions is not None:
            # Asked before these partitions were assigned, the answer is at worst too small: they are read again.
            self._log.start(positions)
            self._positions.update(positions)
            self._looked_at_ends = 0.0

    def _hand_over(self) -> None:
        full = self._open.fullness(self._settings.limits) >= 1.0
        if self._open and not self._inserter.busy() and (full or self._inserter.due_in_seconds() <= 0):
            self._inserter.submit(self._open)
            self._open = Batch()
            full = False
        if full != self._paused:
            self._paused = full
            (self._log.pause if full else self._log.resume)()

    def _collect(self) -> None:
        self._inserter.raise_failure()
        done = self._inserter.collect()
        if done:
            self._positions.update(done)
            self._log.commit(done)

    def _look_at_ends(self, max_age_seconds: float = 1.0) -> None:
        now = time.monotonic()
        if now - self._looked_at_ends < max_age_seconds:
            return
        self._looked_at_ends = now
        self._ends = dict(self._log.end_positions())
        self.metrics.lag.update(
            {place: max(0, end - self._positions.get(place, 0)) for place, end in self._ends.items()}
        )

    def _drain(self) -> None:
        """Insert what was polled. Ends early where the store is away: the log has it still."""
        self._inserter.hurry()
        while self._inserter.alive() and (self._open or self._inserter.busy()):
            if self._open and not self._inserter.busy():
                self._inserter.submit(self._open)
                self._open = Batch()
            self._inserter.wait(0.1)
            self._collect()
        self._collect()


class _Inserter:
    """The insert thread and what the two threads tell each other."""

    def __init__(
        self,
        store: Store,
        dead_letters: DeadLetters,
        identities: Callable[[], Mapping[Stream, str]],
        settings: WorkerSettings,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._identities = identities
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._limits = settings.limits
        self._pace = Pace(settings.min_gap_seconds, settings.flush_interval_seconds)
        self._condition = threading.Condition()
        self._batch: Batch | None = None
        self._done: dict[tuple[Stream, int], int] = {}
        self._forgotten: set[tuple[Stream, int]] = set()
        self._stored_positions: dict[tuple[Stream, int], int] | None = None
        self._positions_wanted = False
        self._failure: BaseException | None = None
        self._stopping = False
        self._ended = False
        self._hurry = threading.Event()
        self._ended_at = 0.0
        self._parts = 0
        self._counted_parts_at = 0.0
        self._waiting_since: float | None = None
        self._committer = Committer(
            store,
            dead_letters,
            wait=self._wait_for_store,
            retry=settings.retry,
            limits=settings.dead_letters,
            metrics=metrics,
        )
        self._thread = threading.Thread(target=self._main, name="runstream-insert", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread once its batch is done, or at once where it waits for the store."""
        self._hurry.set()
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join()

    def alive(self) -> bool:
        """Whether the thread still takes batches."""
        return not self._ended

    def hurry(self) -> None:
        """From now on a store that is away is not waited for."""
        self._hurry.set()

    def submit(self, batch: Batch) -> None:
        """Hand over a batch; only while not `busy`."""
        with self._condition:
            self._batch = batch
            self._forgotten.clear()
            self._condition.notify_all()

    def busy(self) -> bool:
        return self._batch is not None

    def wait(self, timeout_seconds: float) -> None:
        """Block until there is no batch in work, for so long at most."""
        with self._condition:
            self._condition.wait_for(lambda: self._batch is None, timeout_seconds)

    def due_in_seconds(self) -> float:
        """How long until the next batch that is not full may go."""
        return self._ended_at + self._pace.gap_seconds - time.monotonic()

    def collect(self) -> dict[tuple[Stream, int], int]:
        """Positions written since the last call."""
        with self._condition:
            done, self._done = self._done, {}
            return done

    def forget(self, partitions: frozenset[tuple[Stream, int]]) -> None:
        """These are another worker's now: what is in work of them may land but is not committed here."""
        with self._condition:
            self._forgotten |= partitions
            for partition in partitions:
                self._done.pop(partition, None)

    def positions(self) -> dict[tuple[Stream, int], int] | None:
        """The store's positions, read since the last call that returned some; None while not known yet."""
        with self._condition:
            found, self._stored_positions = self._stored_positions, None
            if found is None:
                self._positions_wanted = True
                self._condition.notify_all()
            return found

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def trouble(self) -> str | None:
        if self._failure is not None:
            return f"stopped: {self._failure}"
        since = self._waiting_since
        return None if since is None else f"the store has been away for {time.monotonic() - since:.0f} seconds"

    def _main(self) -> None:
        try:
            self._replay_known()
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._batch or self._positions_wanted or self._stopping)
                    batch = self._batch
                    if batch is None and self._stopping:
                        return
                if self._positions_wanted:
                    self._read_positions()
                if batch is not None:
                    self._insert(batch)
        except Abandoned:
            _log.warning("stopped while the store is away; what was not stored is read again at the next start")
        except BaseException as exc:
            self._failure = exc
        finally:
            with self._condition:
                self._ended = True
                self._batch = None
                self._condition.notify_all()

    def _replay_known(self) -> None:
        """Dead letters of a schema that was unknown when they came and is known now go into the store by themselves."""
        try:
            result = replay_known(self._store, self._dead_letters, self._wait_for_store)
        except (StoreError, OSError) as exc:
            _log.warning("dead letters of schemas that are known now were not replayed: %s", str(exc)[:300])
            return
        if result.stored:
            _log.info("replayed %d dead letters whose schema is known now", result.stored)

    def _insert(self, batch: Batch) -> None:
        started = time.monotonic()
        self._committer.commit(batch)
        self._waiting_since = None
        ended = time.monotonic()
        times = [record.time_ms for record in batch.records] + [block.time_ms for block in batch.blocks]
        self._metrics.batch(
            batch.count() - len(batch.dead), batch.body_bytes, ended - started, min(times, default=None)
        )
        self._count_parts(ended)
        with self._condition:
            self._pace.inserted(ended - started, batch.fullness(self._limits), self._parts)
            self._ended_at = time.monotonic()
            self._done.update({k: v for k, v in batch.positions.items() if k not in self._forgotten})
            self._batch = None
            self._condition.notify_all()

    def _read_positions(self) -> None:
        found: dict[tuple[Stream, int], int] = {}
        self._committer.patiently(lambda: found.update(read_positions(self._store)), "reading positions")
        self._committer.patiently(lambda: identity.check(self._store, self._identities(), found), "the log's identity")
        self._waiting_since = None
        with self._condition:
            self._stored_positions = found
            self._positions_wanted = False

    def _wait_for_store(self, seconds: float) -> bool:
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        return self._hurry.wait(seconds)

    def _count_parts(self, now: float) -> None:
        """Parts that wait to be merged; asked every 2 seconds at most, and without it the pace is a guess, no more."""
        if now - self._counted_parts_at < 2.0:
            return
        self._counted_parts_at = now
        try:
            [(parts,)] = self._store.rows(
                "SELECT max(parts) FROM (SELECT count() AS parts FROM system.parts "
                "WHERE database = {database:String} AND active GROUP BY table)",
                {"database": self._store.database},
            )
        except StoreBusy:
            return
        self._parts = int(parts)
