"""What the server remembers of runs, while the store and the log are slower than the requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream.transport import Event, Positions
from runstream_query.api.artifact_root import ArtifactRoot
from runstream_query.api.backend import Backend
from runstream_query.api.runs import commit
from runstream_query.api.state import Reading, RunState


class _SlowLog:
    """A log that takes events only once `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def append(self, events: Sequence[Event]) -> Positions:
        await self.gate.wait()
        return {}


class _Stored(Backend):
    """A backend whose store knows one run, as it was at first."""

    def __init__(self, log: _SlowLog, executor: ThreadPoolExecutor, artifacts: ArtifactRoot, stored: RunState) -> None:
        super().__init__(cast(Reading, None), log, artifacts, executor)
        self._stored = stored

    async def read_run(self, run_id: str) -> RunState | None:
        return replace(self._stored)

    async def settled(self) -> None:
        """Wait for the background tasks."""
        while self._tasks:
            await asyncio.gather(*self._tasks)


def _state(**fields: Any) -> RunState:
    return RunState("r", "0", "name", "", "RUNNING", 1, None, "mlflow-artifacts:/0/r/artifacts", "active", **fields)


def test_a_state_read_again_does_not_undo_a_write_on_its_way(tmp_path: Path) -> None:
    """A run whose state is old is read again while its next write is not in the log yet: the write stays noted."""

    async def scenario(executor: ThreadPoolExecutor) -> None:
        log = _SlowLog()
        backend = _Stored(log, executor, ArtifactRoot(str(tmp_path), served=False), _state())
        backend.remember_run(_state(read_at=-1_000.0))

        async def end_run() -> None:
            state = await backend.active_run("r")
            state.end_time = 12
            await commit(backend, state, [])

        request = asyncio.create_task(end_run())
        await asyncio.wait([request], timeout=0)  # until it waits for the log
        await backend.settled()
        log.gate.set()
        await request
        assert (await backend.run("r")).end_time == 12
        await backend.settled()

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(scenario(executor))
