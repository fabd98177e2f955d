"""Fakes that we promise to users: test code that logs to runstream without a disk, a broker or a store.

    from runstream.testing import recording

    def test_training_logs_its_loss():
        with recording() as recorded:
            train(steps=3)
        (run,) = recorded.runs
        assert run.data.params["lr"] == "0.1"
        assert [point.value for point in recorded.metric(run.info.run_id, "loss")] == [0.9, 0.5, 0.3]

Everything goes through the real journal and delivery, in a temporary folder; only the log is in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from runstream_schemas import codec
from runstream_schemas.identity import Version
from runstream_schemas.names import EventName

from .active import tracker
from .config import Settings
from .dataset import CONTEXT_TAG
from .entities import Dataset, DatasetInput, InputTag, Metric, Run, RunData, RunInfo, RunInputs
from .recorder import Recorder, for_target
from .transport.memory import MemoryTransport

__all__ = ["Recording", "recording"]


class Recording:
    """What has been logged since `recording()` began. Each look waits until everything logged before is delivered."""

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self.settings = settings
        self._recorder = recorder
        self._transport = MemoryTransport.named(settings.tracking_uri)

    @property
    def transport(self) -> MemoryTransport:
        """The log; it can be told to be away, to hold or to refuse."""
        return self._transport

    @property
    def events(self) -> list[tuple[EventName, dict[str, Any]]]:
        """Every event in the log: control events in the order of their calls, then metric batches."""
        self._recorder.flush(30.0)
        return [
            codec.decode(event.fingerprint, event.body) for event in self._transport.control + self._transport.metrics
        ]

    @property
    def runs(self) -> list[Run]:
        """Every run with its latest metrics, params, tags and inputs, in the order of their starts."""
        events = self.events
        started = dict.fromkeys(fields["run_id"] for name, fields in events if name == "run_started")
        return [self._run(run_id, events) for run_id in started]

    def run(self, run_id: str) -> Run:
        """One run; KeyError if it has not started."""
        return next((run for run in self.runs if run.info.run_id == run_id), None) or _missing(run_id)

    def metric(self, run_id: str, key: str) -> list[Metric]:
        """Every point of a metric, in the order of the calls of each process."""
        return [point for point in _points(run_id, self.events) if point.key == key]

    def _run(self, run_id: str, events: list[tuple[EventName, dict[str, Any]]]) -> Run:
        mine = [(name, fields) for name, fields in events if fields.get("run_id") == run_id]
        starts = [fields for name, fields in mine if name == "run_started"]
        start = min(starts, key=_version)
        status, ended_at, stage, run_name = "RUNNING", -1, "active", start["name"]
        for name, fields in sorted(mine, key=lambda item: _version(item[1])):
            if name == "run_updated":
                if fields["status"]:
                    status, ended_at = fields["status"], fields["ended_at"]
                stage = fields["lifecycle_stage"] or stage
                run_name = fields["name"] or run_name
        latest: dict[str, Metric] = {}
        for point in _points(run_id, events):
            if point.key not in latest or (point.step, point.timestamp) >= (
                latest[point.key].step,
                latest[point.key].timestamp,
            ):
                latest[point.key] = point
        info = RunInfo(
            run_id=run_id,
            experiment_id=start["experiment_id"],
            run_name=run_name,
            user_id=start["user"],
            status=status,
            start_time=start["started_at"],
            end_time=ended_at if ended_at >= 0 else None,
            artifact_uri=start["artifact_uri"],
            lifecycle_stage=stage,
            parent_run_id=start["parent_run_id"] or None,
            source_name=start["source_name"],
            source_type=start["source_type"],
            source_version=start["source_version"],
        )
        data = RunData({key: point.value for key, point in latest.items()}, _params(mine), _tags(mine))
        return Run(info, data, RunInputs([_input(fields) for name, fields in mine if name == "input_logged"]))


@contextmanager
def recording() -> Iterator[Recording]:
    """Send what is logged in the `with` block to memory, instead of where the environment says.

    Runs left open are ended when the block is left; artifacts go to fsspec's file system in memory.
    """
    name = f"memory://test-{os.urandom(6).hex()}"
    with tempfile.TemporaryDirectory(prefix="runstream-recording-") as folder:
        settings = Settings.from_environment({"RUNSTREAM_JOURNAL_DIR": folder}, tracking_uri=name)
        settings = _with_artifacts(settings, name)
        before = tracker.override
        recorder = for_target(settings)
        tracker.override = settings
        try:
            yield Recording(settings, recorder)
        finally:
            tracker.end_all("FINISHED")
            tracker.override = before
            recorder.close(30.0)


def _with_artifacts(settings: Settings, name: str) -> Settings:
    from dataclasses import replace

    return replace(settings, artifact_root=f"memory://{name.removeprefix('memory://')}/artifacts")


def _version(fields: Mapping[str, Any]) -> Version:
    return Version(fields.get("time_ms", 0), fields.get("seq", 0), fields.get("writer", 0))


def _points(run_id: str, events: list[tuple[EventName, dict[str, Any]]]) -> Iterator[Metric]:
    for name, fields in events:
        if name == "metric_batch" and fields["run_id"] == run_id:
            for ki, ci, value in zip(fields["ki"], fields["ci"], fields["values"], strict=True):
                yield Metric(fields["keys"][ki], value, fields["times"][ci], fields["steps"][ci])


def _params(events: list[tuple[EventName, dict[str, Any]]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, fields in sorted(events, key=lambda item: _version(item[1])):
        if name == "params":
            for key, value in zip(fields["keys"], fields["values"], strict=True):
                found.setdefault(key, value)
    return found


def _tags(events: list[tuple[EventName, dict[str, Any]]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, fields in sorted(events, key=lambda item: _version(item[1])):
        if name == "run_tags":
            found.update(zip(fields["keys"], fields["values"], strict=True))
            for key in fields["deleted_keys"]:
                found.pop(key, None)
    return found


def _input(fields: Mapping[str, Any]) -> DatasetInput:
    tags = {CONTEXT_TAG: fields["context"], **fields["tags"]} if fields["context"] else fields["tags"]
    dataset = Dataset(
        fields["name"],
        fields["digest"],
        fields["source_type"],
        fields["source"],
        fields["schema"] or None,
        fields["profile"] or None,
    )
    return DatasetInput(dataset, [InputTag(key, value) for key, value in tags.items()])


def _missing(run_id: str) -> Run:
    raise KeyError(f"no run {run_id!r} has started in this recording")
