"""The module-level calls that write: address, experiments, runs, params, tags, inputs. Names and order as in MLflow.

`log_metric` and `log_metrics` are in `hot`, files in `api_artifacts`, reading in `api_search`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import hot
from .active import Target, tracker
from .addresses import full_artifact_uri, location_uri
from .entities import Dataset, Experiment, Run
from .errors import InvalidInputError
from .run import ActiveRun
from .validation import check_experiment_tags, check_key, check_run_id

if TYPE_CHECKING:
    from .client import Client
    from .delivery_report import Report

__all__ = [
    "active_run",
    "create_experiment",
    "delete_experiment",
    "delete_experiment_tag",
    "delete_run",
    "delete_tag",
    "disable_system_metrics_logging",
    "enable_system_metrics_logging",
    "end_run",
    "flush",
    "get_tracking_uri",
    "is_tracking_uri_set",
    "last_active_run",
    "log_input",
    "log_inputs",
    "log_param",
    "log_params",
    "rename_experiment",
    "restore_experiment",
    "restore_run",
    "set_experiment",
    "set_experiment_tag",
    "set_experiment_tags",
    "set_system_metrics_node_id",
    "set_system_metrics_samples_before_logging",
    "set_system_metrics_sampling_interval",
    "set_tag",
    "set_tags",
    "set_tracking_uri",
    "start_run",
]

_LOG = logging.getLogger("runstream")


def set_tracking_uri(uri: str | os.PathLike[str] | None) -> None:
    """Where later runs log to and reads read from; open runs stay where they are.

    Args:
        uri: a data directory (path or file:///dir), kafka://host:9092/PREFIX or http(s)://server; None or "" for
            RUNSTREAM_TRACKING_URI, or else ./runstream-data.
    """
    tracker.set_tracking_uri(None if uri is None or uri == "" else uri)


def get_tracking_uri() -> str:
    """The tracking address in force, as a URL."""
    return tracker.settings().tracking_uri


def is_tracking_uri_set() -> bool:
    """Whether `set_tracking_uri` or RUNSTREAM_TRACKING_URI names an address."""
    return tracker.is_uri_set or bool(os.environ.get("RUNSTREAM_TRACKING_URI"))


def set_experiment(
    experiment_name: str | None = None, experiment_id: str | None = None, *, artifact_location: str | None = None
) -> Experiment:
    """Make an experiment the one of later runs; it is created if it does not exist.

    By name nothing is read, since the id follows from the name. By id it is looked up where reading is possible.

    Args:
        artifact_location: path or URL for the artifacts of runs that this process starts.
    """
    if (experiment_name is None) == (experiment_id is None):
        raise InvalidInputError("set_experiment takes either a name or experiment_id=")
    writer = tracker.writer()
    if experiment_name is not None:
        target = tracker.target_named(experiment_name)
    else:
        target = tracker.target_with_id(experiment_id, writer.settings)
    if artifact_location is not None:
        target = Target(target.experiment_id, target.name, location_uri(artifact_location))
    tracker.ensure_created(writer, target)
    tracker.use(writer.settings, target)
    stored = tracker.stored_location(writer.settings, target) or target.experiment_id
    return Experiment(target.experiment_id, target.name, full_artifact_uri(writer.settings, stored))


def create_experiment(name: str, artifact_location: str | None = None, tags: Mapping[str, Any] | None = None) -> str:
    """Create an experiment; its id.

    Raises:
        InvalidInputError: there is one of this name already (deleted ones count), as far as that can be read.
    """
    return _client().create_experiment(name, artifact_location, tags)


def delete_experiment(experiment_id: str) -> None:
    """Delete an experiment and hide its runs; `restore_experiment` brings them back."""
    _client().delete_experiment(experiment_id)


def restore_experiment(experiment_id: str) -> None:
    """Bring a deleted experiment back."""
    _client().restore_experiment(experiment_id)


def rename_experiment(experiment_id: str, new_name: str) -> None:
    """Give an experiment another name; its id stays."""
    _client().rename_experiment(experiment_id, new_name)


def set_experiment_tag(key: str, value: Any) -> None:
    """Set a tag of the active experiment."""
    set_experiment_tags({check_key("experiment tag key", key): value})


def set_experiment_tags(tags: Mapping[str, Any]) -> None:
    """Set tags of the active experiment."""
    checked = check_experiment_tags(tags)
    writer, target = tracker.writer(), tracker.target()
    tracker.ensure_created(writer, target)
    writer.tag_experiment(target.experiment_id, checked)


def delete_experiment_tag(key: str) -> None:
    """Delete a tag of the active experiment."""
    name = check_key("experiment tag key", key)
    tracker.writer().tag_experiment(tracker.target().experiment_id, {}, (name,))


def start_run(
    run_id: str | None = None,
    experiment_id: str | None = None,
    run_name: str | None = None,
    nested: bool = False,
    parent_run_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
    description: str | None = None,
    log_system_metrics: bool | None = None,
) -> ActiveRun:
    """Start a run, or resume one, and make it the active run of this process. Waits for no network.

    Use it in a `with` statement, or call `end_run()`. With RUNSTREAM_RUN_ID in the environment the first call joins
    that run; processes with RANK above 0 then never write its status.

    Args:
        run_id: resume this run. It is looked up first where reading is possible, so that a wrong id is an error.
        experiment_id: instead of the active experiment.
        run_name: random and readable if left out, such as `calm-otter-417`.
        nested: start a child of the active run.
        parent_run_id: start a child of this run.
        description: shown with the run; the tag mlflow.note.content.
        log_system_metrics: sample CPU, memory, disk, network and GPU; as `enable_system_metrics_logging` says if None.

    Raises:
        InvalidInputError: another run is active and `nested` is False; an argument does not fit; the run is deleted.
        NotFoundError: there is no run `run_id`.
    """
    return tracker.start_run(
        run_id, experiment_id, run_name, nested, parent_run_id, tags, description, log_system_metrics
    )


def end_run(status: str = "FINISHED") -> None:
    """End the active run; nothing happens where there is none."""
    tracker.end_run(status)


def active_run() -> ActiveRun | None:
    """The active run, or None."""
    return tracker.active_run


def last_active_run() -> Run | None:
    """The active run, or the one that ended last in this process, as this process knows it; None if there was none.

    Its metrics are empty here: `get_run` reads them.
    """
    run = tracker.last_run
    return None if run is None else run.to_entity()


def delete_run(run_id: str) -> None:
    """Delete a run; `restore_run` brings it back."""
    _client().delete_run(run_id)


def restore_run(run_id: str) -> None:
    """Bring a deleted run back."""
    _client().restore_run(run_id)


def log_param(key: str, value: Any, synchronous: bool | None = None) -> Any:
    """Log a param of the active run; returns `value`. The same value again is fine, another one is an error.

    Raises:
        InvalidInputError: key or value does not fit, or this process knows another value.
    """
    return tracker.require_run().log_param(key, value)


def log_params(params: Mapping[str, Any], synchronous: bool | None = None, run_id: str | None = None) -> None:
    """Log several params, all or none; see `log_param`."""
    if run_id is None:
        tracker.require_run().log_params(params)
    else:
        checked = check_run_id(run_id)
        tracker.writer_of(checked).log_params(checked, params)


def set_tag(key: str, value: Any, synchronous: bool | None = None) -> None:
    """Set a tag of the active run; the newest value counts."""
    tracker.require_run().set_tag(key, value)


def set_tags(tags: Mapping[str, Any], synchronous: bool | None = None) -> None:
    """Set several tags of the active run, all or none."""
    tracker.require_run().set_tags(tags)


def delete_tag(key: str) -> None:
    """Delete a tag of the active run; a missing one is no error."""
    tracker.require_run().delete_tag(key)


def log_input(
    dataset: Any = None,
    context: str | None = None,
    tags: Mapping[str, str] | None = None,
    model: Any = None,
    *,
    name: str | None = None,
    digest: str | None = None,
    source: str | None = None,
    source_type: str | None = None,
    schema: Mapping[str, Any] | str | None = None,
    profile: Mapping[str, Any] | str | None = None,
) -> Dataset:
    """Say that the active run uses a data set. The data themselves are not stored.

    Args:
        dataset: of `runstream.data`, MLflow's own, a pandas DataFrame or a numpy array; or left out, with `name` given.
        context: what for: training, validation, test ...
        tags: of this use.
        model: accepted for MLflow, not stored.
        name, digest, source, source_type, schema, profile: describe the data set; see `runstream.data.describe`.
    """
    given = {
        "name": name,
        "digest": digest,
        "source": source,
        "source_type": source_type,
        "schema": schema,
        "profile": profile,
    }
    described = {key: value for key, value in given.items() if value is not None}
    return tracker.require_run().log_input(dataset, context, tags, **described)


def log_inputs(
    datasets: list[Any],
    contexts: list[str | None] | None = None,
    tags_list: list[Mapping[str, str] | None] | None = None,
) -> None:
    """Log several data sets; the lists go side by side."""
    count = len(datasets)
    contexts = contexts if contexts is not None else [None] * count
    tags_list = tags_list if tags_list is not None else [None] * count
    if not count == len(contexts) == len(tags_list):
        raise InvalidInputError("log_inputs takes lists of equal length")
    for dataset, context, tags in zip(datasets, contexts, tags_list, strict=True):
        log_input(dataset, context, tags)


def flush(timeout_seconds: float = 30.0) -> Report:
    """Block until everything logged so far is in the log, at most `timeout_seconds`; the report is true if it is.

    Not needed for durability: what a call returned from is delivered even if this process is killed.
    """
    return tracker.flush(timeout_seconds)


def enable_system_metrics_logging() -> None:
    """Sample system metrics in every run that starts from now on."""
    tracker.system_metrics = True


def disable_system_metrics_logging() -> None:
    """Sample no system metrics in runs that start from now on."""
    tracker.system_metrics = False


def set_system_metrics_sampling_interval(interval: float | None) -> None:
    """Seconds between two samples; None for the default of 10."""
    tracker.change_system_metrics("interval_seconds", interval)


def set_system_metrics_samples_before_logging(samples: int | None) -> None:
    """How many samples are averaged into one point; None for the default of 1."""
    tracker.change_system_metrics("samples_before_logging", samples)


def set_system_metrics_node_id(node_id: str | None) -> None:
    """Name of this machine in system metrics (`system/<node>/...`); None for none."""
    tracker.change_system_metrics("node_id", node_id)


def _client() -> Client:
    from .client import Client

    return Client()


_told_of_models = False


def _routed(run_id: str | None, model_id: object, dataset: object) -> Any:
    """The channel that a call outside of the fast path means."""
    global _told_of_models
    if model_id is not None and not _told_of_models:
        _told_of_models = True
        _LOG.warning("model_id is not stored with metrics: log it as a tag of the run")
    if run_id is None:
        run = tracker.require_run()
        channel, identifier = run.channel, run.info.run_id
    else:
        identifier = check_run_id(run_id)
        channel = tracker.writer_of(identifier).recorder.run_channel(identifier)
    if dataset is not None:
        from .dataset import dataset_of

        tracker.writer_of(identifier).log_input(identifier, dataset_of(dataset), "", {})
    return channel


def _slow_metric(key: Any, value: Any, step: Any, timestamp: Any, run_id: Any, model_id: Any, dataset: Any) -> None:
    _routed(run_id, model_id, dataset).log_metric(key, value, step, timestamp)


def _slow_metrics(metrics: Any, step: Any, timestamp: Any, run_id: Any, model_id: Any, dataset: Any) -> None:
    _routed(run_id, model_id, dataset).log_metrics(metrics, step, timestamp)


hot.on_slow(_slow_metric, _slow_metrics)
