"""What the server remembers of runs, while the store and the log are slower than the requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream.transport import Event, Positions
from runstream_query.api.artifact_root import ArtifactRoot
from runstream_query.api.backend import REFRESH_TRIES, Backend
from runstream_query.api.runs import commit
from runstream_query.api.state import Reading, RunState


class _SlowLog:
    """A log that takes events only while `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def append(self, events: Sequence[Event]) -> Positions:
        await self.gate.wait()
        return {}


class _Stored(Backend):
    """A backend whose store knows one run; `while_reading` runs while a reading is on its way."""

    def __init__(self, log: _SlowLog, executor: ThreadPoolExecutor, artifacts: ArtifactRoot, stored: RunState) -> None:
        super().__init__(cast(Reading, None), log, artifacts, executor)
        self.stored = stored
        self.readings = 0
        self.while_reading: Callable[[], None] = lambda: None

    async def read_run(self, run_id: str) -> RunState | None:
        found = _copy(self.stored)
        self.readings += 1
        self.while_reading()
        await asyncio.sleep(0)  # as a reading does: others run meanwhile
        return found

    async def settled(self) -> None:
        """Wait for the background tasks."""
        while self._tasks:
            await asyncio.gather(*self._tasks)


def _state(**fields: Any) -> RunState:
    return RunState("r", "0", "name", "", "RUNNING", 1, None, "mlflow-artifacts:/0/r/artifacts", "active", **fields)


def _copy(state: RunState) -> RunState:
    return replace(state, tags=dict(state.tags), written=asyncio.Event())


def _run(tmp_path: Path, scenario: Callable[[_Stored, _SlowLog], Coroutine[Any, Any, None]]) -> None:
    """Run `scenario` with a backend whose state of the run is old."""

    async def main(executor: ThreadPoolExecutor) -> None:
        log = _SlowLog()
        backend = _Stored(log, executor, ArtifactRoot(str(tmp_path), served=False), _state())
        backend.remember_run(_state(read_at=-1_000.0))
        await asyncio.wait_for(scenario(backend, log), 30)

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(main(executor))


def test_a_state_read_again_does_not_undo_a_write_on_its_way(tmp_path: Path) -> None:
    """A run whose state is old is read again while its next write is not in the log yet: the write stays noted."""

    async def scenario(backend: _Stored, log: _SlowLog) -> None:
        async def end_run() -> None:
            state = await backend.active_run("r")
            state.end_time = 12
            await commit(backend, state, [])

        request = asyncio.create_task(end_run())
        await asyncio.wait([request], timeout=0)  # until it waits for the log
        for _ in range(10):
            await asyncio.sleep(0)
        assert (await backend.run("r")).end_time == 12
        assert backend.readings == 0, "a reading now would lack the write"
        backend.stored = replace(backend.stored, end_time=12, name="of another server")
        log.gate.set()
        await request
        await backend.settled()
        found = await backend.run("r")
        assert (found.end_time, found.name) == (12, "of another server")

    _run(tmp_path, scenario)


def test_a_run_that_is_written_to_without_a_pause_is_read_again_all_the_same(tmp_path: Path) -> None:
    """Every reading is overtaken by a write: then the next use waits for one, and sees what other servers wrote."""

    async def scenario(backend: _Stored, log: _SlowLog) -> None:
        log.gate.set()
        state = await backend.run("r")
        backend.stored.tags["of"] = "another server"

        def write() -> None:
            state.generation += 1

        backend.while_reading = write
        await backend.settled()
        assert backend.readings == REFRESH_TRIES
        backend.while_reading = lambda: None
        assert (await backend.run("r")).tags == {"of": "another server"}

    _run(tmp_path, scenario)
