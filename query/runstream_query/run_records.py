"""Some runs by id -> everything known of them. One statement, made to be planned quickly.

Planning costs more than reading here: 2 to 4 ms a table, and more for every column that is computed. So rows come as
they lie, unmerged, with everything but run and key in one JSON text, and are merged in Python; only the own facts of
more than a few runs, of which there is a row for each heartbeat until parts merge, are grouped in the store. For many
runs at once see `records` and `api.run_json`, for a server's reads `known_runs`.
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

__all__ = ["MAX_RECORDS", "Point", "RunRecord", "fetch_metrics", "fetch_records", "run_info", "run_input"]

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

_IDS: Final = "run_id IN {ids:Array(String)}"
_RAW_INFO: Final = (
    f"SELECT run_id, start, status, name, lifecycle, heartbeat_at FROM run_facts PREWHERE {_IDS}{{condition}}"
)
_INFO: Final = """SELECT 0 AS kind, run_id AS id, '' AS item,
    toJSONString((start, status, name, lifecycle, heartbeat_at, toUnixTimestamp64Milli(now64(3)))) AS text
FROM ({rows})"""
_PARAMS: Final = f"SELECT 1, run_id, key, toJSONString(first) FROM param_facts PREWHERE {_IDS}"
_TAGS: Final = f"SELECT 2, run_id, key, toJSONString(latest) FROM run_tag_facts PREWHERE {_IDS}"
_METRICS: Final = f"""SELECT 3, run_id, key,
    toJSONString((last.step, toUnixTimestamp64Milli(last.timestamp), toString(last.value), last.is_nan))
FROM rollup PREWHERE {_IDS}"""
_INPUTS: Final = f"""SELECT 4, run_id, name, toJSONString((digest, latest.source_type, latest.source, latest.schema,
    latest.profile, latest.context, latest.tags, latest.time_ms))
FROM (SELECT run_id, name, digest, latest FROM input_facts FINAL PREWHERE {_IDS})"""
_MODELS: Final = f"""SELECT 5, run_id, model_id, toJSONString((direction, step, logged_at))
FROM (SELECT * FROM model_links FINAL PREWHERE {_IDS})"""
_UNION: Final = "\nUNION ALL\n"
_MERGED_FROM: Final = 10
"""Runs from which on their own facts are merged in the store; for fewer planning that costs more than the rows."""


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
    rows = INFO if len(ids) >= _MERGED_FROM else _RAW_INFO
    parts = [_INFO.replace("{rows}", rows.replace("{condition}", NOT_PURGED if facts.any_purged else ""))]
    parts += [_PARAMS, _TAGS]
    if metrics:
        parts += [_METRICS] + [_INPUTS] * facts.any_inputs + [_MODELS] * facts.any_models
    by_id: dict[str, _Merging] = {each: _Merging(each) for each in ids}
    for kind, run_id, item, text in store.rows(_UNION.join(parts), {"ids": list(ids)}):
        by_id[run_id].add(kind, item, text)
    return [record for each in by_id.values() if (record := each.record(facts)) is not None]


def fetch_metrics(store: Store, ids: Sequence[str]) -> dict[str, dict[str, Point]]:
    """The newest point of each metric of each run of `ids` (at most `MAX_RECORDS`, each once), by key in order."""
    by_id: dict[str, _Merging] = {each: _Merging(each) for each in ids}
    for kind, run_id, item, text in store.rows(_METRICS, {"ids": list(ids)}):
        by_id[run_id].add(kind, item, text)
    return {run_id: merging.points() for run_id, merging in by_id.items()}


_NO_POINT: Final = (-(1 << 63) - 1, 0, 0.0, 0)


class _Merging:
    """The rows of one run."""

    __slots__ = ("facts", "inputs", "metrics", "models", "params", "run_id", "tags")

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.facts: list[Any] | None = None
        self.metrics: dict[str, tuple[int, int, float, int]] = {}
        self.params: dict[str, tuple[int, int, str]] = {}
        self.tags: dict[str, tuple[int, int, str]] = {}
        self.inputs: list[tuple[int, str, DatasetInput]] = []
        self.models: list[tuple[str, int, str, int]] = []

    def add(self, kind: int, item: str, text: str) -> None:
        """One row, merged with what is known as the store would merge them."""
        # Whether tuples come as objects and whole numbers as text is a matter of settings, which not everybody may set.
        fields = _values(json.loads(text))
        if kind == 3:
            step, time, value, nan = fields
            point = (int(step), int(time), float(value), nan)
            self.metrics[item] = max(self.metrics.get(item, _NO_POINT), point)
        elif kind == 1:
            param = (int(fields[0]), int(fields[1]), fields[2])
            self.params[item] = min(self.params.get(item, param), param)
        elif kind == 2:
            tag = (int(fields[0]), fields[1], fields[2])
            self.tags[item] = max(self.tags.get(item, tag), tag)
        elif kind == 0:
            *versioned, heartbeat, now = fields
            each = [(int(first), *rest) for first, *rest in map(_values, versioned)]
            merged = [*each, int(heartbeat), int(now)]
            self.facts = merged if self.facts is None else list(map(max, self.facts, merged))
        elif kind == 4:
            self.inputs.append((int(fields[-1]), item, run_input(item, fields[:-1])))
        else:
            direction, step, logged_at = fields
            self.models.append((direction, int(logged_at), item, int(step)))

    def points(self) -> dict[str, Point]:
        """The newest point of each metric."""
        return {
            key: Point(float("nan") if nan else value, time, step)
            for key, (step, time, value, nan) in sorted(self.metrics.items())
        }

    def record(self, facts: Facts) -> RunRecord | None:
        """All of it; None: there is no such run."""
        info = None if self.facts is None else run_info(self.run_id, self.facts, facts)
        if info is None:
            return None
        return RunRecord(
            info,
            self.points(),
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


def run_input(name: str, rest: Any) -> DatasetInput:
    """A data set from its name and the rest."""
    digest, source_type, source, schema, profile, context, tags = _values(rest)
    found = [InputTag(key, value) for key, value in sorted(tags.items())]
    if context and _CONTEXT_TAG not in tags:
        found.insert(0, InputTag(_CONTEXT_TAG, context))
    return DatasetInput(Dataset(name, digest, source_type, source, schema or None, profile or None), found)


def _values(item: Any) -> Any:
    """A tuple's values: engines write one with named elements as an object."""
    return list(item.values()) if isinstance(item, dict) else item
