"""The active run: what `start_run` returns. A context manager that logs to its run and ends it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runstream_schemas import identity

from .entities import Dataset, Run, RunData, RunInfo, RunInputs, RunStatus
from .errors import InvalidInputError
from .events import EventWriter
from .process_end import status_of_exception
from .validation import check_key, check_status, check_tags, check_text, check_time_ms

if TYPE_CHECKING:
    from .run_artifacts import RunArtifacts
    from .system_metrics import SystemMetrics

__all__ = ["ActiveRun", "input_of"]

_LOG = logging.getLogger("runstream")


class ActiveRun:
    """A run of this process. Thread-safe; a forked child may log to it, and never ends it.

    Leaving the `with` block ends it: FINISHED, FAILED after an exception, KILLED after KeyboardInterrupt or SIGTERM.
    """

    def __init__(
        self,
        writer: EventWriter,
        info: RunInfo,
        *,
        tags: Mapping[str, str],
        owns_status: bool,
        on_end: Callable[[ActiveRun], None],
        judge: Callable[[str], str] = str,
    ) -> None:
        """
        Args:
            judge: turns the status that the end of a `with` block suggests into the one that is written.
            owns_status: False for a process that only attaches (RANK > 0): it never writes the run's status.
            on_end: called once, when the run has ended in this process.
        """
        self._writer, self._info, self._tags = writer, info, dict(tags)
        self._owns_status, self._on_end, self._judge = owns_status, on_end, judge
        self._pid = os.getpid()
        self._right_to_end = [True]
        self._system_metrics: SystemMetrics | None = None
        self.channel = writer.recorder.run_channel(info.run_id)
        """For the module-level hot path."""
        self._artifacts: RunArtifacts | None = None

    def __repr__(self) -> str:
        return f"<ActiveRun {self._info.run_name!r} run_id={self._info.run_id} status={self._info.status}>"

    @property
    def info(self) -> RunInfo:
        """The run as this process knows it."""
        return self._info

    @property
    def artifacts(self) -> RunArtifacts:
        """Files of this run."""
        if self._artifacts is None:
            from .run_artifacts import RunArtifacts

            self._artifacts = RunArtifacts(self._writer, self._info.run_id, self._info.artifact_uri)
        return self._artifacts

    @property
    def data(self) -> RunData:
        """Params and tags as far as this process has set them; metrics are read with `runstream.get_run`."""
        return RunData({}, self._writer.known_params(self._info.run_id), dict(self._tags))

    @property
    def inputs(self) -> RunInputs:
        """Empty: inputs are read with `runstream.get_run`."""
        return RunInputs()

    def to_entity(self) -> Run:
        """The run as this process knows it, as a plain value."""
        return Run(self.info, self.data, self.inputs)

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a forked child of the one that started the run."""
        return self._pid != os.getpid()

    def log_metric(self, key: str, value: float, step: int | None = None, timestamp: int | None = None) -> None:
        """Log one point; see `runstream.log_metric`."""
        self.channel.log_metric(key, value, step, timestamp)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None, timestamp: int | None = None) -> None:
        """Log several metrics of one step, all or none."""
        self.channel.log_metrics(metrics, step, timestamp)

    def log_param(self, key: str, value: Any) -> Any:
        """Log a param; returns `value`. Another value for a key that is known is an error."""
        self._writer.log_params(self._info.run_id, {check_key("param key", key): value})
        return value

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log several params, all or none."""
        self._writer.log_params(self._info.run_id, params)

    def set_tag(self, key: str, value: Any) -> None:
        """Set one tag."""
        self.set_tags({check_key("tag key", key): value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set several tags, all or none."""
        stored = self._writer.set_tags(self._info.run_id, tags)
        self._tags = {**self._tags, **stored}
        name = stored.get("mlflow.runName")
        if name:
            self._writer.update_run(self._info.run_id, name=name)
            self._info = replace(self._info, run_name=name)

    def delete_tag(self, key: str) -> None:
        """Delete one tag."""
        self._writer.delete_tag(self._info.run_id, key)
        self._tags = {each: value for each, value in self._tags.items() if each != key}

    def log_input(
        self, dataset: Any = None, context: str | None = None, tags: Mapping[str, str] | None = None, **described: Any
    ) -> Dataset:
        """Say that the run uses a data set; see `runstream.log_input`."""
        found, use, more = input_of(dataset, context, tags, described)
        self._writer.log_input(self._info.run_id, found, use, more)
        return found

    def start_system_metrics(self, metrics: SystemMetrics) -> None:
        """Sample until the run ends."""
        self._system_metrics = metrics
        metrics.start()

    def end(self, status: str = "FINISHED", end_time: int | None = None) -> None:
        """End the run; a second call does nothing. Does not wait for the network.

        Args:
            end_time: UTC milliseconds; now if left out.
        """
        status = check_status(status)
        ended_at = identity.now_ms() if end_time is None else check_time_ms("end_time", end_time)
        try:
            self._right_to_end.pop()  # one C call instead of a lock, which a fork could copy while it is held
        except IndexError:
            return
        try:
            if not self.is_inherited:
                self._end_here(status, ended_at)
        finally:
            self._on_end(self)

    def __enter__(self) -> ActiveRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(self._judge("FINISHED" if kind is None else status_of_exception(kind, value)))

    def _end_here(self, status: str, ended_at: int) -> None:
        if self._system_metrics is not None:
            self._system_metrics.stop()
        recorder = self._writer.recorder
        if self._owns_status:
            over = RunStatus.is_terminated(status)
            self._writer.update_run(self._info.run_id, status=status, ended_at=ended_at if over else None)
            self._info = replace(self._info, status=status, end_time=ended_at if over else None)
        recorder.close_run(self._info.run_id)
        report = recorder.report()
        if report.thinned_points or report.dropped_points or report.refused_events:
            _LOG.warning(
                "run %s: %d points thinned, %d dropped, %d events refused so far; last trouble: %s",
                self._info.run_id,
                report.thinned_points,
                report.dropped_points,
                report.refused_events,
                report.last_error,
            )
        elif report.last_error and not report.complete:
            _LOG.warning(
                "run %s has ended; what is not delivered yet lies in the journal and follows: %s",
                self._info.run_id,
                report.last_error,
            )


def input_of(
    dataset: Any, context: str | None, tags: Mapping[str, str] | None, described: Mapping[str, Any]
) -> tuple[Dataset, str, dict[str, str]]:
    """The data set, context and further tags that a `log_input` call means.

    Raises:
        InvalidInputError: neither a data set nor a name, or an unknown argument.
    """
    from .dataset import CONTEXT_TAG, dataset_of, describe

    unknown = described.keys() - {"name", "digest", "source", "source_type", "schema", "profile"}
    if unknown:
        raise InvalidInputError(f"log_input has no argument {sorted(unknown)[0]!r}")
    if isinstance(dataset, str) and "name" not in described:
        dataset, described = None, {**described, "name": dataset}
    if dataset is None:
        if "name" not in described:
            raise InvalidInputError("log_input needs a data set, or name= with digest= and source=")
        found = describe(**described)
    else:
        found = dataset_of(dataset, described.get("name"), described.get("source") or "")
    more = check_tags(tags or {}, "data set tag")
    use = check_text("context", context, 250, empty_is_legal=True) if context is not None else ""
    return found, use or more.get(CONTEXT_TAG, ""), {key: value for key, value in more.items() if key != CONTEXT_TAG}
