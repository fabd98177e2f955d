"""`Client`: the same operations with explicit run and experiment ids, for programs that keep no active run.

Names and order of arguments are those of MLflow's client. Writing needs no round trip; where the existence of something
is checked first, that is said, and the check is left out where reading is not installed or the store is away.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from runstream_schemas import identity
from runstream_schemas.identity import Version
from runstream_schemas.limits import MAX_BATCH_METRICS

from .active import Target, tracker
from .addresses import full_artifact_uri, location_uri, stored_artifact_uri
from .client_artifacts import ArtifactCalls
from .config import Settings
from .delivery_report import Report
from .entities import (
    DatasetInput,
    Experiment,
    Metric,
    PagedList,
    Param,
    Run,
    RunData,
    RunInfo,
    RunStatus,
    RunTag,
    ViewType,
)
from .errors import InvalidInputError, NotFoundError
from .events import EventWriter, writer_for
from .reading import Format, Reader, existing, newest_state, reader_for
from .run import input_of
from .run_artifacts import RunArtifacts
from .run_name import name_for
from .source import capture
from .validation import (
    check_experiment_id,
    check_experiment_name,
    check_experiment_tags,
    check_key,
    check_params,
    check_run_id,
    check_run_name,
    check_status,
    check_tags,
    check_time_ms,
)

__all__ = ["Client"]

T = TypeVar("T")


class Client(ArtifactCalls):
    """Logs to and reads from one tracking address. Making one costs nothing. Thread-safe and fork-safe."""

    def __init__(self, tracking_uri: str | os.PathLike[str] | None = None) -> None:
        """
        Args:
            tracking_uri: as for `set_tracking_uri`; the address in force if left out.
        """
        self._settings = (
            tracker.settings() if tracking_uri is None else Settings.from_environment(tracking_uri=tracking_uri)
        )
        self._artifacts: dict[str, RunArtifacts] = {}

    def __repr__(self) -> str:
        return f"Client({self._settings.tracking_uri!r})"

    @property
    def tracking_uri(self) -> str:
        """The address, as a URL."""
        return self._settings.tracking_uri

    # Experiments

    def create_experiment(
        self, name: str, artifact_location: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> str:
        """Create an experiment; its id. Checks first whether the name is free."""
        if check_experiment_name(name) == identity.DEFAULT_EXPERIMENT_NAME:
            raise InvalidInputError("the experiment Default exists always (id 0): choose another name")
        checked = check_experiment_tags(tags or {})
        location = location_uri(artifact_location) if artifact_location is not None else ""
        self._refuse_taken(name)
        identifier = self._free_experiment_id(name)
        target = Target(identifier, name, location)
        tracker.know(self._settings, target)
        tracker.ensure_created(self._writer, target)
        if checked:
            self._writer.tag_experiment(identifier, checked)
        return identifier

    def get_experiment(self, experiment_id: str) -> Experiment:
        """One experiment, deleted ones included; NotFoundError if there is none."""
        return self._reader.get_experiment(check_experiment_id(experiment_id))

    def get_experiment_by_name(self, name: str) -> Experiment | None:
        """The experiment called `name`, deleted ones included, or None."""
        return self._reader.get_experiment_by_name(check_experiment_name(name))

    def search_experiments(
        self,
        view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        filter_string: str | None = None,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList[Experiment]:
        """One page of the experiments that match; `token` of the result asks for the next."""
        return self._reader.search_experiments(
            ViewType(view_type), max_results, filter_string or "", order_by, page_token
        )

    def delete_experiment(self, experiment_id: str) -> None:
        """Delete an experiment and hide its runs. Checks that it exists."""
        identifier = self._known_experiment(experiment_id)
        if identifier == identity.DEFAULT_EXPERIMENT_ID:
            raise InvalidInputError("the experiment Default cannot be deleted: delete its runs instead")
        self._writer.update_experiment(
            identifier, lifecycle_stage="deleted", after=self._state("experiment", identifier)
        )

    def restore_experiment(self, experiment_id: str) -> None:
        """Bring a deleted experiment back. Checks that it exists."""
        identifier = self._known_experiment(experiment_id)
        self._writer.update_experiment(
            identifier, lifecycle_stage="active", after=self._state("experiment", identifier)
        )

    def rename_experiment(self, experiment_id: str, new_name: str) -> None:
        """Give an experiment another name; its id stays. Checks that it exists and that the name is free."""
        name = check_experiment_name(new_name)
        identifier = self._known_experiment(experiment_id)
        if identifier == identity.DEFAULT_EXPERIMENT_ID:
            raise InvalidInputError("the experiment Default cannot be renamed")
        self._refuse_taken(name, unless=identifier)
        self._writer.update_experiment(identifier, name=name, after=self._state("experiment", identifier))
        tracker.know(self._settings, Target(identifier, name))

    def set_experiment_tag(self, experiment_id: str, key: str, value: Any) -> None:
        """Set a tag of an experiment."""
        name = check_key("experiment tag key", key)
        self._writer.tag_experiment(check_experiment_id(experiment_id), {name: value})

    def delete_experiment_tag(self, experiment_id: str, key: str) -> None:
        """Delete a tag of an experiment; a missing one is no error."""
        name = check_key("experiment tag key", key)
        self._writer.tag_experiment(check_experiment_id(experiment_id), {}, (name,))

    # Runs

    def create_run(
        self,
        experiment_id: str,
        start_time: int | None = None,
        tags: Mapping[str, Any] | None = None,
        run_name: str | None = None,
    ) -> Run:
        """Start a run; it stays RUNNING until `set_terminated`.

        Args:
            start_time: UTC milliseconds; now if left out.
        """
        identifier = check_experiment_id(experiment_id)
        started_at = identity.now_ms() if start_time is None else check_time_ms("start_time", start_time)
        checked = check_tags(tags or {})
        run_id = identity.new_run_id(identifier)
        name = check_run_name(run_name) if run_name is not None else checked.get("mlflow.runName") or name_for(run_id)
        checked["mlflow.runName"] = name
        target = tracker.target_with_id(identifier, self._settings)
        tracker.ensure_created(self._writer, target)
        source = capture()
        stored = stored_artifact_uri(self._settings, identifier, run_id, target.location)
        info = RunInfo(
            run_id=run_id,
            experiment_id=identifier,
            run_name=name,
            user_id=checked.get("mlflow.user", source.user),
            status=RunStatus.RUNNING.value,
            start_time=started_at,
            end_time=None,
            artifact_uri=full_artifact_uri(self._settings, stored),
            parent_run_id=checked.get("mlflow.parentRunId"),
            source_name=source.name,
            source_type=source.type,
            source_version=source.version,
        )
        self._writer.start_run(info, stored)
        self._writer.update_run(run_id, status=RunStatus.RUNNING.value)
        self._writer.set_tags(run_id, checked)
        self._writer.recorder.open_run(run_id)
        self._artifacts[run_id] = RunArtifacts(self._writer, run_id, info.artifact_uri)
        return Run(info, RunData({}, {}, checked))

    def get_run(self, run_id: str) -> Run:
        """One run with its latest metrics, params, tags and inputs; NotFoundError if there is none."""
        return self._reader.get_run(check_run_id(run_id))

    def get_parent_run(self, run_id: str) -> Run | None:
        """The parent of a run, or None."""
        parent = self.get_run(run_id).info.parent_run_id
        return self.get_run(parent) if parent else None

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str = "",
        run_view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList[Run]:
        """One page of the runs that match, newest first unless `order_by` says otherwise."""
        if isinstance(experiment_ids, str | int):
            experiment_ids = [str(experiment_ids)]
        ids = [check_experiment_id(each) for each in experiment_ids]
        return self._reader.search_runs(
            ids, filter_string or "", ViewType(run_view_type), max_results, order_by, page_token
        )

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        """Change status or name of a run. Checks that it exists."""
        changed = check_status(status) if status is not None else ""
        renamed = check_run_name(name) if name is not None else ""
        self._known_run(run_id)
        over = bool(changed) and RunStatus.is_terminated(changed)
        self._writer.update_run(
            run_id,
            status=changed,
            ended_at=identity.now_ms() if over else None,
            name=renamed,
            after=self._state("run", run_id),
        )
        if renamed:
            self._writer.set_tags(run_id, {"mlflow.runName": renamed})
        if over:
            self._writer.recorder.close_run(run_id)

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        """End a run.

        Args:
            status: FINISHED if left out.
            end_time: UTC milliseconds; now if left out.
        """
        changed = check_status(status if status is not None else RunStatus.FINISHED)
        ended_at = identity.now_ms() if end_time is None else check_time_ms("end_time", end_time)
        self._writer.update_run(check_run_id(run_id), status=changed, ended_at=ended_at)
        self._writer.recorder.close_run(run_id)

    def delete_run(self, run_id: str) -> None:
        """Delete a run; `restore_run` brings it back. Checks that it exists."""
        self._writer.update_run(self._known_run(run_id), lifecycle_stage="deleted", after=self._state("run", run_id))
        tracker.note_lifecycle(run_id, "deleted")

    def restore_run(self, run_id: str) -> None:
        """Bring a deleted run back. Checks that it exists."""
        self._writer.update_run(self._known_run(run_id), lifecycle_stage="active", after=self._state("run", run_id))
        tracker.note_lifecycle(run_id, "active")

    # Logging

    def log_metric(
        self,
        run_id: str,
        key: str,
        value: float,
        timestamp: int | None = None,
        step: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        """Log one point.

        Args:
            timestamp: UTC milliseconds; now if left out.
        """
        self._writer.recorder.run_channel(check_run_id(run_id)).log_metric(key, value, step, timestamp)

    def log_param(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        """Log a param; returns `value`. Another value for a key that this process knows is an error."""
        self._writer.log_params(check_run_id(run_id), {check_key("param key", key): value})
        return value

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
        """Set a tag."""
        self._writer.set_tags(check_run_id(run_id), {check_key("tag key", key): value})

    def delete_tag(self, run_id: str, key: str) -> None:
        """Delete a tag; a missing one is no error."""
        self._writer.delete_tag(check_run_id(run_id), key)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> None:
        """Log many things of one run.

        Params and tags are checked before anything is written; a metric that does not fit ends the call, and what
        stands before it in `metrics` is logged.
        """
        identifier = check_run_id(run_id)
        if len(metrics) > MAX_BATCH_METRICS:
            raise InvalidInputError(f"{len(metrics):,} metrics in one call; the limit is {MAX_BATCH_METRICS:,}")
        checked_params = check_params(_mapping("params", params))
        checked_tags = check_tags(_mapping("tags", tags))
        log_metric = self._writer.recorder.run_channel(identifier).log_metric
        for metric in metrics:
            try:
                point = (metric.key, metric.value, metric.step, metric.timestamp)
            except AttributeError as exc:
                raise InvalidInputError(f"metrics takes Metric objects, not {type(metric).__name__}") from exc
            log_metric(*point)
        if checked_params:
            self._writer.log_params(identifier, checked_params)
        if checked_tags:
            self._writer.set_tags(identifier, checked_tags)

    def log_inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None:
        """Say that a run used data sets."""
        identifier = check_run_id(run_id)
        for each in datasets:
            tags = {tag.key: tag.value for tag in each.tags}
            self._writer.log_input(identifier, *input_of(each.dataset, None, tags, {}))

    def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
        """Every point of a metric, ordered by step, then time; empty if the run has no such metric.

        Raises:
            NotFoundError: there is no such run.
        """
        points: list[Metric] = self._reader.metric_history(check_run_id(run_id), check_key("metric key", key))
        if not points:
            self.get_run(run_id)
        return points

    # All of it

    def sql(self, query: str, parameters: Mapping[str, Any] | None = None, output_format: Format = "pandas") -> Any:
        """The result of read-only SQL over the public views; see `runstream.sql`."""
        return self._reader.sql(query, parameters, output_format)

    def flush(self, timeout_seconds: float = 30.0) -> Report:
        """Block until everything logged so far is in the log; the report is true if it is."""
        return self._writer.recorder.flush(timeout_seconds)

    @property
    def _writer(self) -> EventWriter:
        return writer_for(self._settings)

    @property
    def _reader(self) -> Reader:
        return reader_for(self._settings)

    def artifacts_of(self, run_id: str) -> RunArtifacts:
        """The artifacts of a run; its address is looked up unless this process started it."""
        identifier = check_run_id(run_id)
        known = self._artifacts.get(identifier)
        if known is None:
            run = tracker.open_run(identifier)
            if run is not None:
                return run.artifacts
            uri = self._reader.get_run(identifier).info.artifact_uri
            known = self._artifacts[identifier] = RunArtifacts(self._writer, identifier, uri.rstrip("/"))
        return known

    def _check(self, what: str, read: Callable[[Reader], T]) -> T | None:
        return existing(self._settings, what, read)

    def _state(self, kind: Literal["run", "experiment"], identifier: str) -> Version | None:
        return newest_state(self._settings, kind, identifier)

    def _known_run(self, run_id: str) -> str:
        identifier = check_run_id(run_id)
        self._check(f"run {identifier}", lambda reader: reader.get_run(identifier))
        return identifier

    def _known_experiment(self, experiment_id: object) -> str:
        identifier = check_experiment_id(experiment_id)
        self._check(f"experiment {identifier}", lambda reader: reader.get_experiment(identifier))
        return identifier

    def _refuse_taken(self, name: str, unless: str = "") -> None:
        found = self._check(f"experiment {name!r}", lambda reader: reader.get_experiment_by_name(name))
        if found is not None and found.experiment_id != unless:
            remedy = (
                f"restore it with restore_experiment({found.experiment_id!r})"
                if found.lifecycle_stage == "deleted"
                else "use set_experiment, or choose another name"
            )
            state = "exists and is deleted" if found.lifecycle_stage == "deleted" else "exists already"
            raise InvalidInputError(f"experiment {name!r} {state} (id {found.experiment_id}): {remedy}")

    def _free_experiment_id(self, name: str) -> str:
        """The id of `name`, or that of `name#2`, `name#3` ... where a renamed experiment holds it."""

        number = 1
        while True:
            identifier = identity.experiment_id(name if number == 1 else f"{name}#{number}")
            if not self._is_taken(identifier):
                return identifier
            number += 1

    def _is_taken(self, experiment_id: str) -> bool:
        try:
            found = self._check(f"experiment {experiment_id}", lambda reader: reader.get_experiment(experiment_id))
        except NotFoundError:
            return False
        return found is not None


def _mapping(what: str, items: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        try:
            key, value = item.key, item.value
        except AttributeError as exc:
            raise InvalidInputError(f"{what} takes objects with key and value, not {type(item).__name__}") from exc
        if what == "params" and found.get(key, value) != value:
            raise InvalidInputError(f"param {key!r} stands twice in one call, with different values")
        found[key] = value
    return found
