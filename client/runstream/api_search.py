"""The module-level calls that read. Each waits until what this process has logged before is visible (10 s at most)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .active import tracker
from .client import Client
from .entities import Experiment, Metric, Run, ViewType
from .errors import InvalidInputError, MissingExtraError
from .reading import Format, runs_frame

__all__ = [
    "get_experiment",
    "get_experiment_by_name",
    "get_parent_run",
    "get_run",
    "metric_history",
    "search_experiments",
    "search_runs",
    "sql",
]

_PAGE: int = 1000
"""Runs asked for at once by `search_runs`."""


def search_runs(
    experiment_ids: Sequence[str] | None = None,
    filter_string: str = "",
    run_view_type: ViewType = ViewType.ACTIVE_ONLY,
    max_results: int = 100_000,
    order_by: Sequence[str] | None = None,
    output_format: Literal["pandas", "list"] = "pandas",
    search_all_experiments: bool = False,
    experiment_names: Sequence[str] | None = None,
) -> Any:
    """The runs that match, newest first unless `order_by` says otherwise.

    Args:
        experiment_ids: where to search; the active experiment if nothing else is said.
        filter_string: such as `metrics.loss < 0.1 and params.lr = '0.01' and tags.env LIKE 'p%'`.
        order_by: such as `["metrics.loss ASC", "start_time DESC"]`.
        output_format: a DataFrame with the columns run_id, experiment_id, status, artifact_uri, start_time, end_time,
            metrics.*, params.* and tags.*; or a list of `Run`.
        search_all_experiments: search all active experiments if none is named.

    Raises:
        InvalidInputError: a filter or order that cannot be understood.
    """
    if output_format not in ("pandas", "list"):
        raise InvalidInputError(f'output_format {output_format!r} is neither "pandas" nor "list"')
    if isinstance(max_results, bool) or not isinstance(max_results, int) or max_results < 0:
        raise InvalidInputError(f"max_results must be an int of at least 0, not {max_results!r}")
    client = Client()
    ids = _experiment_ids(client, experiment_ids, experiment_names, search_all_experiments)
    found: list[Run] = []
    token: str | None = None
    while ids and len(found) < max_results:
        page = client.search_runs(
            ids, filter_string, run_view_type, min(_PAGE, max_results - len(found)), order_by, token
        )
        found.extend(page)
        token = page.token
        if not token:
            break
    return runs_frame(found) if output_format == "pandas" else found


def search_experiments(
    view_type: ViewType = ViewType.ACTIVE_ONLY,
    max_results: int | None = None,
    filter_string: str | None = None,
    order_by: Sequence[str] | None = None,
) -> list[Experiment]:
    """The experiments that match, newest first unless `order_by` says otherwise."""
    client = Client()
    found: list[Experiment] = []
    token: str | None = None
    while max_results is None or len(found) < max_results:
        wanted = _PAGE if max_results is None else min(_PAGE, max_results - len(found))
        page = client.search_experiments(view_type, wanted, filter_string, order_by, token)
        found.extend(page)
        token = page.token
        if not token:
            break
    return found


def get_run(run_id: str) -> Run:
    """One run with its latest metrics, params, tags and inputs.

    Raises:
        NotFoundError: there is none.
    """
    return Client().get_run(run_id)


def get_parent_run(run_id: str) -> Run | None:
    """The parent of a run, or None."""
    return Client().get_parent_run(run_id)


def get_experiment(experiment_id: str) -> Experiment:
    """One experiment, deleted ones included.

    Raises:
        NotFoundError: there is none.
    """
    return Client().get_experiment(experiment_id)


def get_experiment_by_name(name: str) -> Experiment | None:
    """The experiment called `name`, deleted ones included, or None."""
    return Client().get_experiment_by_name(name)


def metric_history(run_id: str, key: str, *, output_format: Literal["list", "pandas"] = "list") -> Any:
    """Every point of a metric, ordered by step, then time; empty if the run has no such metric.

    Args:
        run_id: as in `MlflowClient.get_metric_history`, whose order of arguments this is.
        output_format: a list of `Metric`, or a DataFrame with the columns step, timestamp (UTC) and value.

    Raises:
        NotFoundError: there is no such run.
    """
    if output_format not in ("pandas", "list"):
        raise InvalidInputError(f'output_format {output_format!r} is neither "pandas" nor "list"')
    points: list[Metric] = Client().get_metric_history(run_id, key)
    if output_format == "list":
        return points
    try:
        import pandas
    except ImportError as exc:
        raise MissingExtraError('output_format="pandas"', "server") from exc
    return pandas.DataFrame(
        {
            "step": pandas.Series([point.step for point in points], dtype="int64"),
            "timestamp": pandas.to_datetime([point.timestamp for point in points], unit="ms", utc=True),
            "value": pandas.Series([point.value for point in points], dtype="float64"),
        }
    )


def sql(query: str, parameters: Mapping[str, Any] | None = None, output_format: Format = "pandas") -> Any:
    """The result of read-only SQL over the public views (runs, params, tags, metrics, latest_metrics ...).

    Args:
        parameters: values of `{name:Type}` in the query, for example `{run:String}`.
        output_format: "pandas" for a DataFrame, "arrow" for a pyarrow Table, "rows" for a list of dicts.
    """
    if output_format not in ("pandas", "arrow", "rows"):
        raise InvalidInputError(f'output_format {output_format!r} is not "pandas", "arrow" or "rows"')
    return Client().sql(query, parameters, output_format)


def _experiment_ids(
    client: Client, ids: Sequence[str] | None, names: Sequence[str] | None, everywhere: bool
) -> list[str]:
    if ids is not None and names is not None:
        raise InvalidInputError("search_runs takes either experiment_ids or experiment_names")
    if isinstance(ids, str):
        ids = [ids]
    if isinstance(names, str):
        names = [names]
    if ids:
        return [str(each) for each in ids]
    if names:
        found = [client.get_experiment_by_name(name) for name in names]
        return [each.experiment_id for each in found if each is not None]
    if everywhere:
        return [each.experiment_id for each in search_experiments()]
    return [tracker.target().experiment_id] if ids is None and names is None else []
