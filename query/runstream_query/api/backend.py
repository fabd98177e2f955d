"""What the handlers work with: reads in worker threads, writes through the appender, and what is known of live runs.

Writes are validated against state that this server has read once and then followed: a log-metric never waits for the
store. State older than `STALE_SECONDS` is read again in the background, so that what another server process or a
training process changed is noticed; DESIGN 6.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from runstream.transport import Event, Positions
from runstream_schemas.names import CONTROL, STREAMS, Stream

from .artifact_root import ArtifactRoot
from .errors import ApiError, invalid, missing_resource
from .event import EventMaker
from .run_rows import experiment_states, run_state
from .state import Appending, ExperimentState, Reading, Row, RunState

STALE_SECONDS: Final = 5.0
"""Age above which a run's or experiment's state is read again, in the background."""
REFRESH_TRIES: Final = 3
"""Readings of a run that a write of this server may overtake before requests have to wait for one."""
MAX_CACHED_RUNS: Final = 20_000
MAX_CACHED_EXPERIMENTS: Final = 20_000

T = TypeVar("T")


class Backend:
    """Reads, writes and cached state for all handlers of one server process. Used on its event loop only."""

    def __init__(
        self,
        reading: Reading,
        appending: Appending,
        artifacts: ArtifactRoot,
        executor: Executor,
        *,
        max_waiting_reads: int = 256,
        max_artifact_bytes: int = 50 << 30,
        spool_folder: Path | None = None,
    ) -> None:
        self.reading = reading
        self.artifacts = artifacts
        self.events = EventMaker()
        self.max_artifact_bytes = max_artifact_bytes
        """Largest upload through the artifact proxy."""
        self.spool_folder = spool_folder
        """Where uploads are gathered; None: the system's temporary folder."""
        self._appending = appending
        self._executor = executor
        self._max_waiting_reads = max_waiting_reads
        self._waiting_reads = 0
        self._runs: OrderedDict[str, RunState] = OrderedDict()
        self._experiments: OrderedDict[str, ExperimentState] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting_reads(self) -> int:
        """Reads that wait or run now."""
        return self._waiting_reads

    async def read(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking read in a worker thread.

        Raises:
            ApiError: 429 where too many reads are waiting already.
        """
        if self._waiting_reads >= self._max_waiting_reads:
            raise ApiError(
                "REQUEST_LIMIT_EXCEEDED",
                f"{self._waiting_reads} reads are waiting already; try again in a moment.",
                retry_after_seconds=1,
            )
        self._waiting_reads += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args, **kwargs))
        finally:
            self._waiting_reads -= 1

    async def rows(self, sql: str, parameters: Mapping[str, Any], wait: Sequence[Stream] = STREAMS) -> Sequence[Row]:
        """The rows of one SELECT."""
        return await self.read(self.reading.rows, sql, parameters, wait)

    async def write(self, *events: Event) -> None:
        """Wait until the events are durable in the log."""
        await self._appending.append(events)

    async def append(self, events: Sequence[Event]) -> Positions:
        """`write`, and where the log stands then: at or behind the last of these events."""
        return await self._appending.append(events)

    def lock(self, name: str) -> asyncio.Lock:
        """The lock called `name`: orders read-check-write sequences that need it (few, so they are kept)."""
        if len(self._locks) > 10_000:
            self._locks = {key: lock for key, lock in self._locks.items() if lock.locked()}
        return self._locks.setdefault(name, asyncio.Lock())

    # runs

    async def run(self, run_id: str) -> RunState:
        """The state of a run, from memory if it is known.

        Raises:
            ApiError: 404, there is no such run.
        """
        state = self._runs.get(run_id)
        if state is None:
            return await self._load_run(run_id)
        if not state.refreshing and time.monotonic() - state.read_at > STALE_SECONDS:
            state.refreshing = True
            self._background(self._refresh_run(state))
        return state

    async def active_run(self, run_id: str) -> RunState:
        """The state of a run that may be written to.

        Raises:
            ApiError: there is no such run, or it is deleted.
        """
        state = await self.run(run_id)
        if state.lifecycle_stage != "active":
            raise invalid(f"The run {run_id} must be in the 'active' state. Current state is {state.lifecycle_stage}.")
        return state

    def remember_run(self, state: RunState) -> None:
        """Follow `state` from now on."""
        self._runs[state.run_id] = state
        self._runs.move_to_end(state.run_id)
        while len(self._runs) > MAX_CACHED_RUNS:
            self._runs.popitem(last=False)

    def forget_run(self, run_id: str) -> None:
        """Read the run again at the next use."""
        self._runs.pop(run_id, None)

    def forget_runs_of(self, experiment_id: str) -> None:
        """The experiment's lifecycle changed: its runs must be read again."""
        for run_id in [run_id for run_id, state in self._runs.items() if state.experiment_id == experiment_id]:
            del self._runs[run_id]

    async def read_run(self, run_id: str) -> RunState | None:
        """The run as the store has it now."""
        return await self.read(run_state, self.reading, self.artifacts, run_id)

    async def _load_run(self, run_id: str) -> RunState:
        state = await self.read_run(run_id)
        if state is None:
            raise missing_resource(f"Run with id={run_id} not found")
        known = self._runs.get(run_id)  # another request may have loaded and written to it meanwhile
        if known is not None:
            return known
        self.remember_run(state)
        return state

    async def _refresh_run(self, state: RunState) -> None:
        try:
            for _ in range(REFRESH_TRIES):
                await state.settled()  # what is read before may lack a write
                generation = state.generation
                fresh = await self.read_run(state.run_id)
                if self._runs.get(state.run_id) is not state:
                    return
                if state.generation == generation:
                    break
            else:  # it is written to without a pause: its next use waits for a reading
                fresh = None
                await state.settled()
            if self._runs.get(state.run_id) is not state:
                return
            if fresh is None:
                self.forget_run(state.run_id)
            else:
                self._runs[state.run_id] = fresh
        finally:
            state.refreshing = False

    # experiments

    async def experiment(self, experiment_id: str, *, fresh: bool = False) -> ExperimentState:
        """The state of an experiment; from memory if it is known, not old and `fresh` is not asked for.

        Raises:
            ApiError: 404, there is no such experiment.
        """
        state = self._experiments.get(experiment_id)
        if state is not None and not fresh and time.monotonic() - state.read_at <= STALE_SECONDS:
            return state
        found = await self.read(experiment_states, self.reading, self.artifacts, [experiment_id], (CONTROL,))
        if not found:
            self._experiments.pop(experiment_id, None)
            raise missing_resource(f"No Experiment with id={experiment_id} exists")
        self.remember_experiment(found[0])
        return found[0]

    def remember_experiment(self, state: ExperimentState) -> None:
        """Follow `state` from now on."""
        self._experiments[state.experiment_id] = state
        self._experiments.move_to_end(state.experiment_id)
        while len(self._experiments) > MAX_CACHED_EXPERIMENTS:
            self._experiments.popitem(last=False)

    def forget_experiment(self, experiment_id: str) -> None:
        """Read the experiment again at the next use."""
        self._experiments.pop(experiment_id, None)

    def _background(self, work: Awaitable[None]) -> None:
        async def quiet() -> None:
            try:
                await work
            except Exception:  # the next use tries again; writes meanwhile see the state as it was
                return

        task = asyncio.get_running_loop().create_task(quiet())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
