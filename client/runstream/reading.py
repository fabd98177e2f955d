"""The one door from the client to reading: imports `runstream_query` when something is first read, and not before.

Owns no SQL. Waiting until what was logged can be seen is the reader's work, behind `Reader`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar, cast

from runstream_schemas.identity import Version

from .config import Settings
from .entities import Experiment, Metric, PagedList, Run, ViewType
from .errors import MissingExtraError, RunstreamError, UnavailableError

__all__ = ["Format", "Reader", "close_readers", "existing", "newest_state", "reader_for", "runs_frame"]

_LOG = logging.getLogger("runstream")
T = TypeVar("T")
Format = Literal["pandas", "arrow", "rows"]
"""Of `sql`: a DataFrame, a pyarrow Table, or a list of dicts."""


class Reader(Protocol):
    """What the door gives. Every method blocks until what was logged before the call is visible (10 s at most).

    Raises:
        NotFoundError: what was named does not exist.
        InvalidInputError: a filter, an order or SQL that cannot be understood.
        UnavailableError: the store does not answer.
    """

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str = "",
        run_view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList[Run]: ...

    def search_experiments(
        self,
        view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        filter_string: str = "",
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList[Experiment]: ...

    def get_run(self, run_id: str) -> Run: ...

    def get_experiment(self, experiment_id: str) -> Experiment: ...

    def get_experiment_by_name(self, name: str) -> Experiment | None: ...

    def metric_history(self, run_id: str, key: str) -> list[Metric]: ...

    def sql(self, query: str, parameters: Mapping[str, Any] | None = None, output_format: Format = "pandas") -> Any: ...

    def rows(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]: ...

    def close(self) -> None: ...


_lock = threading.Lock()
_readers: dict[str, Reader] = {}


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _readers.clear()  # the parent's connections are the parent's


os.register_at_fork(after_in_child=_after_fork)


def reader_for(settings: Settings) -> Reader:
    """The reader of `settings.tracking_uri`, opened at the first call in this process; it may start the local store.

    Raises:
        MissingExtraError: reading is not installed; gives the pip line.
    """
    with _lock:
        reader = _readers.get(settings.tracking_uri)
        if reader is None:
            from importlib.util import find_spec

            try:
                import runstream_query
            except ImportError as exc:
                raise MissingExtraError("reading", "server") from exc
            if any(find_spec(package) is None for package in ("clickhouse_connect", "lark")):
                raise MissingExtraError("reading", "server")
            reader = _readers[settings.tracking_uri] = cast(Reader, runstream_query.open_reader(settings))
        return reader


def close_readers() -> None:
    """Close every reader of this process; the next read opens a new one."""
    with _lock:
        readers = list(_readers.values())
        _readers.clear()
    for reader in readers:
        reader.close()


def existing(settings: Settings, what: str, read: Callable[[Reader], T]) -> T | None:
    """What `read` finds, for a check before a write; None where it cannot be known now.

    Raises:
        NotFoundError: it is known that there is no such thing.
    """
    try:
        reader = reader_for(settings)
    except RunstreamError as exc:  # not installed, or the address names no store
        _LOG.debug("%s is not checked: %s", what, exc)
        return None
    try:
        return read(reader)
    except MissingExtraError as exc:
        _LOG.debug("%s is not checked: %s", what, exc)
    except UnavailableError as exc:
        _LOG.warning("%s could not be checked, going on without: %s", what, exc)
    return None


def newest_state(settings: Settings, kind: Literal["run", "experiment"], identifier: str) -> Version | None:
    """The newest version of what is known of the state of a run (and its experiment) or of an experiment.

    Who changes a state that it has read writes a version above this one, so that a host whose clock is behind is not
    overruled by what it has seen. None where nothing is known or can be read.
    """
    try:
        found = reader_for(settings).rows(_NEWEST[kind], {"id": identifier})
    except RunstreamError as exc:
        _LOG.debug("the state of %s %s is not known: %s", kind, identifier, exc)
        return None
    newest = max((int(value) for row in found for value in row), default=0)
    return Version.unpacked(newest) if newest else None


_NEWEST: Final = {
    # Whole tuple columns in the subquery: under FINAL a subcolumn would come from one part only.
    "run": """
        SELECT toString(greatest(r.status.version, r.name.version, r.lifecycle.version, e.lifecycle.version))
        FROM (SELECT * FROM run_facts FINAL WHERE run_id = {id:String}) AS r
        LEFT JOIN (SELECT * FROM experiment_facts FINAL) AS e ON e.experiment_id = r.start.experiment_id
    """,
    "experiment": """
        SELECT toString(greatest(e.name.version, e.lifecycle.version, e.last_start.version))
        FROM (SELECT * FROM experiment_facts FINAL WHERE experiment_id = {id:String}) AS e
    """,
}


def runs_frame(runs: Sequence[Run]) -> Any:
    """`runs` as a pandas DataFrame with MLflow's columns; times are UTC; a missing metric is NaN, else None."""
    try:
        import pandas
    except ImportError as exc:
        raise MissingExtraError('output_format="pandas"', "server") from exc
    columns: dict[str, Any] = {
        "run_id": [run.info.run_id for run in runs],
        "experiment_id": [run.info.experiment_id for run in runs],
        "status": [run.info.status for run in runs],
        "artifact_uri": [run.info.artifact_uri for run in runs],
        "start_time": _times(pandas, [run.info.start_time for run in runs]),
        "end_time": _times(pandas, [run.info.end_time for run in runs]),
    }
    for prefix, absent, values in (
        ("metrics", float("nan"), [run.data.metrics for run in runs]),
        ("params", None, [run.data.params for run in runs]),
        ("tags", None, [run.data.tags for run in runs]),
    ):
        keys = sorted({key for each in values for key in each})
        columns |= {f"{prefix}.{key}": [each.get(key, absent) for each in values] for key in keys}
    return pandas.DataFrame(columns)


def _times(pandas: Any, times_ms: Sequence[int | None]) -> Any:
    series = pandas.Series(times_ms, dtype="Int64")
    return pandas.to_datetime(series, unit="ms", utc=True)
