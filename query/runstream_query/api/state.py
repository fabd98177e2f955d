"""What is known of runs and experiments, and the two seams that handlers stand on: reading and appending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from runstream.transport import Event, Positions
from runstream_query.facts import Facts
from runstream_query.run_records import RunRecord
from runstream_schemas.names import STREAMS, Stream

Row = Sequence[Any]


class Reading(Protocol):
    """Reads from the store. Each first waits until the log's end, as it stood at the call, is visible. Blocks."""

    def rows(self, sql: str, parameters: Mapping[str, Any], wait: Sequence[Stream] = STREAMS) -> Sequence[Row]:
        """The rows of one SELECT over the public views."""
        ...

    def json_rows(self, sql: str, parameters: Mapping[str, Any], wait: Sequence[Stream] = STREAMS) -> bytes:
        """The rows of one SELECT as a JSON array of objects, written by the store; NaN is the string "nan"."""
        ...

    def raw(self, sql: str, output_format: str, parameters: Mapping[str, Any], settings: Mapping[str, str]) -> bytes:
        """The result of one SELECT over the private tables as the store wrote it. Does not wait."""
        ...

    def facts(self, wait: Sequence[Stream] = STREAMS) -> Facts:
        """Rare facts about everything, as they are once the log's end is visible."""
        ...

    def records(self, ids: Sequence[str], facts: Facts, *, metrics: bool = True) -> list[RunRecord]:
        """The runs of `ids` (at most `MAX_RECORDS`, each once) that exist, in that order. Does not wait."""
        ...

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str,
        view_type: int,
        max_results: int,
        order_by: Sequence[str],
        page_token: str | None,
        *,
        shown_root: str | None = None,
    ) -> tuple[list[str], str | None, Facts]:
        """The ids of one page of runs, in order, the next page's token, and the facts they were found with.

        Args:
            shown_root: where clients are told that the artifact root is; None: where it is.
        """
        ...

    def search_experiments(
        self, filter_string: str, view_type: int, max_results: int, order_by: Sequence[str], page_token: str | None
    ) -> tuple[list[str], str | None]:
        """The ids of one page of experiments, in order, and the next page's token."""
        ...


class Appending(Protocol):
    """Where events go."""

    async def append(self, events: Sequence[Event]) -> Positions:
        """Wait until the events are durable in the log."""
        ...


@dataclass(slots=True)
class RunState:
    """What is known of one run, kept current by this server's own writes."""

    run_id: str
    experiment_id: str
    name: str
    user: str
    status: str
    start_time: int
    end_time: int | None
    artifact_uri: str
    """As clients are told: `mlflow-artifacts:/...` where this server serves it."""
    lifecycle_stage: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    read_at: float = field(default_factory=time.monotonic)
    generation: int = 0
    """Counts this server's writes, so that an older reading does not undo them."""
    writing: int = 0
    """Writes noted here that the log may not have yet: what is read meanwhile may lack them."""
    written: asyncio.Event = field(default_factory=asyncio.Event, repr=False, compare=False)
    """Set when the last of these has ended."""
    refreshing: bool = False

    async def settled(self) -> None:
        """Wait until no write is on its way."""
        while self.writing:
            await self.written.wait()

    def info(self) -> dict[str, Any]:
        """MLflow's RunInfo."""
        info: dict[str, Any] = {
            "run_uuid": self.run_id,
            "run_id": self.run_id,
            "run_name": self.name,
            "experiment_id": self.experiment_id,
            "user_id": self.user,
            "status": self.status,
            "start_time": self.start_time,
            "artifact_uri": self.artifact_uri,
            "lifecycle_stage": self.lifecycle_stage,
        }
        if self.end_time:
            info["end_time"] = self.end_time
        return info


@dataclass(slots=True)
class ExperimentState:
    """What is known of one experiment."""

    experiment_id: str
    name: str
    artifact_location: str
    """As clients are told."""
    lifecycle_stage: str
    creation_time: int
    last_update_time: int
    tags: dict[str, str] = field(default_factory=dict)
    read_at: float = field(default_factory=time.monotonic)

    def message(self) -> dict[str, Any]:
        """MLflow's Experiment."""
        found: dict[str, Any] = {
            "experiment_id": self.experiment_id,
            "name": self.name,
            "artifact_location": self.artifact_location,
            "lifecycle_stage": self.lifecycle_stage,
        }
        if self.last_update_time:
            found["last_update_time"] = self.last_update_time
        if self.creation_time:
            found["creation_time"] = self.creation_time
        if self.tags:
            found["tags"] = [{"key": key, "value": value} for key, value in self.tags.items()]
        return found
