"""runstream: experiment tracking that costs the training loop nothing. Public names, and nothing else.

What a training loop needs at once is imported here; the rest when it is first used, since an import in every one of
ten thousand jobs should cost little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .api import (
    active_run,
    create_experiment,
    delete_experiment,
    delete_experiment_tag,
    delete_run,
    delete_tag,
    disable_system_metrics_logging,
    enable_system_metrics_logging,
    end_run,
    flush,
    get_tracking_uri,
    is_tracking_uri_set,
    last_active_run,
    log_input,
    log_inputs,
    log_param,
    log_params,
    rename_experiment,
    restore_experiment,
    restore_run,
    set_experiment,
    set_experiment_tag,
    set_experiment_tags,
    set_system_metrics_node_id,
    set_system_metrics_samples_before_logging,
    set_system_metrics_sampling_interval,
    set_tag,
    set_tags,
    set_tracking_uri,
    start_run,
)
from .entities import (
    Dataset,
    DatasetInput,
    Experiment,
    FileInfo,
    InputTag,
    Metric,
    Param,
    Run,
    RunStatus,
    RunTag,
    ViewType,
)
from .errors import (
    ArtifactError,
    DeadlineError,
    InvalidInputError,
    InvalidTypeError,
    MissingExtraError,
    NotFoundError,
    RunstreamError,
    SettingsError,
    UnavailableError,
)
from .hot import log_metric, log_metrics
from .run import ActiveRun

if TYPE_CHECKING:
    from . import artifacts, data
    from .api_artifacts import (
        get_artifact_uri,
        load_table,
        log_artifact,
        log_artifacts,
        log_dict,
        log_figure,
        log_image,
        log_table,
        log_text,
    )
    from .api_search import (
        get_experiment,
        get_experiment_by_name,
        get_parent_run,
        get_run,
        metric_history,
        search_experiments,
        search_runs,
        sql,
    )
    from .artifacts import download_artifacts, list_artifacts, load_dict, load_image, load_text
    from .client import Client
    from .delivery_report import Report

__version__ = "0.1.0"

__all__ = [
    "ActiveRun",
    "ArtifactError",
    "Client",
    "Dataset",
    "DatasetInput",
    "DeadlineError",
    "Experiment",
    "FileInfo",
    "InputTag",
    "InvalidInputError",
    "InvalidTypeError",
    "Metric",
    "MissingExtraError",
    "NotFoundError",
    "Param",
    "Report",
    "Run",
    "RunStatus",
    "RunTag",
    "RunstreamError",
    "SettingsError",
    "UnavailableError",
    "ViewType",
    "__version__",
    "active_run",
    "artifacts",
    "create_experiment",
    "data",
    "delete_experiment",
    "delete_experiment_tag",
    "delete_run",
    "delete_tag",
    "disable_system_metrics_logging",
    "download_artifacts",
    "enable_system_metrics_logging",
    "end_run",
    "flush",
    "get_artifact_uri",
    "get_experiment",
    "get_experiment_by_name",
    "get_parent_run",
    "get_run",
    "get_tracking_uri",
    "is_tracking_uri_set",
    "last_active_run",
    "list_artifacts",
    "load_dict",
    "load_image",
    "load_table",
    "load_text",
    "log_artifact",
    "log_artifacts",
    "log_dict",
    "log_figure",
    "log_image",
    "log_input",
    "log_inputs",
    "log_metric",
    "log_metrics",
    "log_param",
    "log_params",
    "log_table",
    "log_text",
    "metric_history",
    "rename_experiment",
    "restore_experiment",
    "restore_run",
    "search_experiments",
    "search_runs",
    "set_experiment",
    "set_experiment_tag",
    "set_experiment_tags",
    "set_system_metrics_node_id",
    "set_system_metrics_samples_before_logging",
    "set_system_metrics_sampling_interval",
    "set_tag",
    "set_tags",
    "set_tracking_uri",
    "sql",
    "start_run",
]

_LATER = {
    "Report": "recorder",
    "get_artifact_uri": "api_artifacts",
    "load_table": "api_artifacts",
    "log_artifact": "api_artifacts",
    "log_artifacts": "api_artifacts",
    "log_dict": "api_artifacts",
    "log_figure": "api_artifacts",
    "log_image": "api_artifacts",
    "log_table": "api_artifacts",
    "log_text": "api_artifacts",
    "get_experiment": "api_search",
    "get_experiment_by_name": "api_search",
    "get_parent_run": "api_search",
    "get_run": "api_search",
    "metric_history": "api_search",
    "search_experiments": "api_search",
    "search_runs": "api_search",
    "sql": "api_search",
    "download_artifacts": "artifacts",
    "list_artifacts": "artifacts",
    "load_dict": "artifacts",
    "load_image": "artifacts",
    "load_text": "artifacts",
    "Client": "client",
}
"""Name -> module, imported when the name is first used."""


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in ("artifacts", "data"):
        return import_module(f".{name}", __name__)
    module = _LATER.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
