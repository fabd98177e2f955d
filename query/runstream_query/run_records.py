"""Some runs by id -> everything known of them. One statement, made to be planned quickly.

Planning costs more than reading here: about 4 ms a table, and functions over strings cost as much again. So rows come
as they lie, unmerged, and are merged in Python; only a run's own facts, of which there is a row for each heartbeat
until parts merge, are grouped in the store. For many runs at once see `records` and `api.run_json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from runstream.entities import Dataset, DatasetInput, InputTag, RunInfo
from runstream_schemas.limits import LOST_AFTER_SECONDS

from .facts import Facts
from .store import Store

__all__ = ["MAX_RECORDS", "Point", "RunRecord", "fetch_records", "run_info", "run_input"]

MAX_RECORDS: Final = 100
"""Runs for which this is the quickest way."""
_CONTEXT_TAG: Final = "mlflow.data.context"

INFO: Final = """
    SELECT run_id, max(start) AS start, max(status) AS status, max(name) AS name, max(lifecycle) AS lifecycle,
        max(heartbeat_at) AS heartbeat_at
    FROM run_facts PREWHERE run_id IN {ids:Array(String)}{condition}
    GROUP BY run_id"""
"""Merged by GROUP BY, which gives what FINAL gives (every column is a maximum of whole tuples)."""
NOT_PURGED: Final = " WHERE run_id NOT IN (SELECT run_id FROM purged_runs)"

_INFO: Final = f"""
SELECT 'i' AS kind, toString(run_id) AS id, '' AS item,
    toJSONString((start, status, name, lifecycle, heartbeat_at, toUnixTimestamp64Milli(now64(3)))) AS text,
    toFloat64(0) AS number, toInt64(0) AS step, toInt64(0) AS time, toUInt8(0) AS flag, toUInt128(0) AS version
FROM ({INFO})"""
_PARAMS_TAGS: Final = """
UNION ALL
SELECT 'p', toString(run_id), toString(key), first.value, 0, first.seq, first.time_ms, 0, 0
FROM param_facts PREWHERE run_id IN {ids:Array(String)}
UNION ALL
SELECT 't', toString(run_id), toString(key), latest.value, 0, 0, 0, latest.deleted, latest.version
FROM run_tag_facts PREWHERE run_id IN {ids:Array(String)}"""
_METRICS: Final = """
UNION ALL
SELECT 'm', toString(run_id), toString(key), '', last.value, last.step, toUnixTimestamp64Milli(last.timestamp),
    last.is_nan, 0
FROM rollup PREWHERE run_id IN {ids:Array(String)}"""
_INPUTS: Final = """
UNION ALL
SELECT 'd', toString(run_id), name, toJSONString((digest, latest.source_type, latest.source, latest.schema,
    latest.profile, latest.context, latest.tags)), 0, 0, latest.time_ms, 0, latest.version
FROM (SELECT run_id, name, digest, latest FROM input_facts FINAL PREWHERE run_id IN {ids:Array(String)})"""
_MODELS: Final = """
UNION ALL
SELECT direction, toString(run_id), model_id, '', 0, step, logged_at, 0, 0
FROM (SELECT * FROM model_links FINAL PREWHERE run_id IN {ids:Array(String)})"""


@dataclass(frozen=True, slots=True)
class Point:
    """The newest point of a metric."""

    value: float
    timestamp: int
    """UTC milliseconds."""
    step: int


@dataclass(slots=True)
class RunRecord:
    """One run, merged. Maps are in the order of their keys, lists in the order of their times and names."""

    info: RunInfo
    metrics: dict[str, Point] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: list[DatasetInput] = field(default_factory=list)
    models: list[tuple[str, str, int]] = field(default_factory=list)
    """(input or output, model id, step)."""


def fetch_records(store: Store, ids: Sequence[str], facts: Facts, *, metrics: bool = True) -> list[RunRecord]:
    """The runs of `ids` that exist, in that order.

    Args:
        ids: at most `MAX_RECORDS`, each once.
        metrics: also read metrics, inputs and models.
    """
    sql = _INFO.replace("{condition}", NOT_PURGED if facts.any_purged else "") + _PARAMS_TAGS
    if metrics:
        sql += _METRICS + (_INPUTS if facts.any_inputs else "") + (_MODELS if facts.any_models else "")
    by_id: dict[str, _Merging] = {each: _Merging() for each in ids}
    for kind, run_id, item, text, number, step, time, flag, version in store.rows(sql, {"ids": list(ids)}):
        merging = by_id[run_id]
        if kind == "m":
            # The largest (step, time, value, is NaN), as the store merges them.
            merging.metrics[item] = max(merging.metrics.get(item, _NO_POINT), (step, time, number, flag))
        elif kind == "p":
            new = (time, step, text)
            merging.params[item] = min(merging.params.get(item, new), new)
        elif kind == "t":
            merging.tags[item] = max(merging.tags.get(item, _NO_TAG), (version, flag, text))
        elif kind == "i":
            merging.info = run_info(run_id, json.loads(text), facts)
        elif kind == "d":
            merging.inputs.append((time, item, run_input(item, text)))
        else:
            merging.models.append((kind, time, item, step))
    return [record for each in by_id.values() if (record := each.record()) is not None]


_NO_POINT: Final = (-(1 << 63) - 1, 0, 0.0, 0)
_NO_TAG: Final = (-1, 0, "")


class _Merging:
    """The rows of one run."""

    __slots__ = ("info", "inputs", "metrics", "models", "params", "tags")

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.metrics: dict[str, tuple[int, int, float, int]] = {}
        self.params: dict[str, tuple[int, int, str]] = {}
        self.tags: dict[str, tuple[int, int, str]] = {}
        self.inputs: list[tuple[int, str, DatasetInput]] = []
        self.models: list[tuple[str, int, str, int]] = []

    def record(self) -> RunRecord | None:
        if self.info is None:
            return None
        return RunRecord(
            self.info,
            {
                key: Point(float("nan") if nan else value, time, step)
                for key, (step, time, value, nan) in sorted(self.metrics.items())
            },
            {key: text for key, (_, _, text) in sorted(self.params.items())},
            {key: text for key, (_, gone, text) in sorted(self.tags.items()) if not gone},
            [each for _, _, each in sorted(self.inputs, key=lambda item: item[:2])],
            [(direction, model_id, step) for direction, _, model_id, step in sorted(self.models)],
        )


def run_info(run_id: str, merged: Any, facts: Facts) -> RunInfo | None:
    """The run of one row of `INFO` (with the store's clock in ms behind it); None: it has no start or is purged."""
    start, status, name, lifecycle, heartbeat, now = map(_values, _values(merged))
    inverse_version, experiment_id, started_as, user, source_name, source_type, source_version, uri, parent, at = start
    if not int(inverse_version):
        return None
    purged = facts.purged_experiments.get(experiment_id, 0)
    if purged and (1 << 128) - 1 - int(inverse_version) <= purged:
        return None
    state = status[1] if int(status[0]) else "RUNNING"
    ended = int(status[2]) if int(status[0]) and state not in ("RUNNING", "SCHEDULED") else -1
    return RunInfo(
        run_id=run_id,
        experiment_id=experiment_id,
        run_name=name[1] if int(name[0]) else started_as,
        user_id=user,
        status=state,
        start_time=int(at),
        end_time=ended if ended >= 0 else None,
        artifact_uri=facts.uri(uri),
        lifecycle_stage=facts.stage(experiment_id, lifecycle[1], int(lifecycle[0])),
        heartbeat_time=int(heartbeat) or None,
        lost=state == "RUNNING" and int(heartbeat) < int(now) - LOST_AFTER_SECONDS * 1000,
        parent_run_id=parent or None,
        source_name=source_name,
        source_type=source_type,
        source_version=source_version,
    )


def run_input(name: str, text: str) -> DatasetInput:
    """A data set from its name and the JSON of the rest."""
    digest, source_type, source, schema, profile, context, tags = _values(json.loads(text))
    found = [InputTag(key, value) for key, value in sorted(tags.items())]
    if context and _CONTEXT_TAG not in tags:
        found.insert(0, InputTag(_CONTEXT_TAG, context))
    return DatasetInput(Dataset(name, digest, source_type, source, schema or None, profile or None), found)


def _values(item: Any) -> Any:
    """A tuple's values: engines write one with named elements as an object."""
    return list(item.values()) if isinstance(item, dict) else item
