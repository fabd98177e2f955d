"""Logs events straight to a data directory, so that tests of reading know exactly what is there."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runstream.transport import Event
from runstream.transport.directory import DirectoryTransport
from runstream_schemas import codec
from runstream_schemas.identity import experiment_id, now_ms
from runstream_schemas.layout import DataDirectory, ServerAddress
from runstream_schemas.names import FIRST_PARTITION_EVENTS, STREAM_OF, EventName


class Logged:
    """The writing side of one data directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.transport = DirectoryTransport(DataDirectory(root).log)
        self._seq = 0
        self._points = 0
        self._waiting: list[Event] = []

    def event(self, name: EventName, key: str, /, **fields: Any) -> None:
        """Add one event; `send` appends all that were added."""
        schema = codec.current(name)
        if any(field["name"] == "seq" for field in schema.definition["fields"]):
            self._seq += 1
            fields = {"time_ms": now_ms(), "seq": self._seq, "writer": 7} | fields
        body = codec.encode(name, fields)
        self._waiting.append(Event(STREAM_OF[name], key, schema.fingerprint, body, name in FIRST_PARTITION_EVENTS))

    def send(self) -> None:
        """Append what was added since the last call."""
        events, self._waiting = self._waiting, []
        self.transport.send(events).result(5.0)

    def experiment(self, name: str, *, created_at: int = 1_000, tags: Mapping[str, str] | None = None) -> str:
        """Create an experiment; its id."""
        found = experiment_id(name)
        self.event("experiment_created", found, experiment_id=found, name=name, artifact_uri="", created_at=created_at)
        if tags:
            self.event("experiment_tags", found, experiment_id=found, keys=list(tags), values=list(tags.values()))
        return found

    def run(
        self,
        run_id: str,
        experiment: str,
        *,
        name: str = "",
        user: str = "ann",
        started_at: int = 1_000,
        status: str = "",
        ended_at: int = -1,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: str = "",
    ) -> str:
        """Start a run, with one point at step 0 for each of `metrics`, and end it where `status` is given."""
        self.event(
            "run_started",
            run_id,
            run_id=run_id,
            experiment_id=experiment,
            name=name,
            user=user,
            source_name="train.py",
            source_type="LOCAL",
            source_version="abc",
            artifact_uri=f"{experiment}/{run_id}/artifacts",
            parent_run_id=parent,
            started_at=started_at,
        )
        if params:
            self.event("params", run_id, run_id=run_id, keys=list(params), values=list(params.values()))
        if tags:
            self.event("run_tags", run_id, run_id=run_id, keys=list(tags), values=list(tags.values()))
        for key, value in (metrics or {}).items():
            self.points(run_id, key, [(0, started_at, value)])
        if status:
            self.event("run_updated", run_id, run_id=run_id, status=status, ended_at=ended_at)
        return run_id

    def points(self, run_id: str, key: str, points: Sequence[tuple[int, int, float]]) -> None:
        """Log (step, time in ms, value) points of one metric."""
        self.event(
            "metric_batch",
            run_id,
            run_id=run_id,
            writer=7,
            first_seq=self._points,
            sent_at=now_ms(),
            keys=[key],
            steps=[step for step, _, _ in points],
            times=[time for _, time, _ in points],
            ki=[0] * len(points),
            ci=list(range(len(points))),
            values=[value for _, _, value in points],
        )
        self._points += len(points)

    def stop_store(self, number: int = signal.SIGTERM) -> int | None:
        """Signal the local store process, if one lives; its pid."""
        address = ServerAddress.read(DataDirectory(self.root).server_file)
        if address is None:
            return None
        try:
            os.kill(address.pid, number)
        except ProcessLookupError:
            return None
        return address.pid
