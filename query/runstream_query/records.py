"""Runs and experiments by id -> entities. Reads only the rows of the ids asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from runstream.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    Run,
    RunData,
    RunInfo,
    RunInputs,
)
from runstream_schemas.limits import LOST_AFTER_SECONDS

from .store import Store

__all__ = ["fetch_experiments", "fetch_runs", "id_chunks"]

CHUNK_RUNS: Final = 500
CHUNK_CHARS: Final = 20_000
"""Bounds of the ids of one statement: they stand in its text four times, in hexadecimal."""
_CONTEXT_TAG: Final = "mlflow.data.context"

# The view `runs` for known ids: PREWHERE reads the wide columns of these runs' rows alone. FINAL stands in a subquery,
# with whole tuples (see 0003_views.sql).
_INFO: Final = f"""
SELECT
    f.run_id AS run_id, f.start.experiment_id AS experiment_id,
    if(f.name.version > 0, f.name.name, f.start.name) AS name, f.start.user AS user,
    if(f.status.version > 0, f.status.status, 'RUNNING') AS run_status,
    f.start.started_at AS started_at,
    if(f.status.version = 0 OR run_status IN ('RUNNING', 'SCHEDULED'), -1, f.status.ended_at) AS ended_at,
    if(f.start.artifact_uri LIKE '%://%', f.start.artifact_uri,
        concat((SELECT value FROM settings FINAL WHERE name = 'artifact_root'), '/', f.start.artifact_uri)) AS uri,
    if(if(x.stage_version > f.lifecycle.version, x.stage, f.lifecycle.stage) = 'deleted', 'deleted', 'active') AS stage,
    f.heartbeat_at AS heartbeat_at,
    run_status = 'RUNNING' AND f.heartbeat_at < toUnixTimestamp64Milli(now64(3)) - {LOST_AFTER_SECONDS * 1000} AS lost,
    f.start.parent_run_id AS parent_run_id, f.start.source_name AS source_name, f.start.source_type AS source_type,
    f.start.source_version AS source_version
FROM (SELECT * FROM run_facts FINAL PREWHERE run_id IN {{ids:Array(String)}}) AS f
LEFT JOIN
(
    SELECT
        experiment_id, s.lifecycle.stage = 'deleted' AND s.last_start.version > s.lifecycle.version AS restored,
        if(restored, 'active', s.lifecycle.stage) AS stage,
        if(restored, s.last_start.version, s.lifecycle.version) AS stage_version
    FROM (SELECT experiment_id, lifecycle, last_start FROM experiment_facts FINAL) AS s
) AS x ON x.experiment_id = f.start.experiment_id
WHERE f.start.inverse_version > 0 AND f.run_id NOT IN (SELECT run_id FROM purged_runs)"""

_DATA: Final = """
SELECT 'm' AS kind, toString(run_id) AS run_id, toString(key) AS key, '' AS text,
    if(last.is_nan = 1, nan, last.value) AS number
FROM (SELECT run_id, key, last FROM rollup FINAL PREWHERE run_id IN {ids:Array(String)})
UNION ALL
SELECT 'p', toString(run_id), toString(key), first.value, 0
FROM (SELECT run_id, key, first FROM param_facts FINAL PREWHERE run_id IN {ids:Array(String)})
UNION ALL
SELECT 't', toString(run_id), toString(key), latest.value, 0
FROM (SELECT run_id, key, latest FROM run_tag_facts FINAL PREWHERE run_id IN {ids:Array(String)})
WHERE latest.deleted = 0
UNION ALL
SELECT 'i', run_id, name, toJSONString((digest, latest.source_type, latest.source, latest.schema, latest.profile,
    latest.context, latest.tags)), latest.time_ms
FROM (SELECT run_id, name, digest, latest FROM input_facts FINAL PREWHERE run_id IN {ids:Array(String)})"""

_EXPERIMENTS: Final = """
SELECT experiment_id, name, artifact_uri, lifecycle_stage, tags, toUnixTimestamp64Milli(created_at),
    toUnixTimestamp64Milli(updated_at)
FROM experiments WHERE experiment_id IN {ids:Array(String)}"""


def fetch_runs(store: Store, run_ids: Sequence[str]) -> list[Run]:
    """The runs of `run_ids` that exist, in that order, with latest metrics, params, tags and inputs."""
    return [run for chunk in id_chunks(run_ids) for run in _fetch(store, chunk)]


def fetch_experiments(store: Store, experiment_ids: Sequence[str]) -> list[Experiment]:
    """The experiments of `experiment_ids` that exist, in that order."""
    found: dict[str, Experiment] = {}
    for chunk in id_chunks(experiment_ids):
        for experiment_id, name, uri, stage, tags, created, updated in store.rows(_EXPERIMENTS, {"ids": chunk}):
            found[experiment_id] = Experiment(experiment_id, name, uri, stage, dict(tags), int(created), int(updated))
    return [found[experiment_id] for experiment_id in experiment_ids if experiment_id in found]


def _fetch(store: Store, ids: Sequence[str]) -> list[Run]:
    infos = {row[0]: _info(row) for row in store.rows(_INFO, {"ids": ids})}
    if not infos:
        return []
    data: dict[str, dict[str, dict[str, Any]]] = {run_id: {"m": {}, "p": {}, "t": {}} for run_id in infos}
    inputs: dict[str, list[tuple[float, str, DatasetInput]]] = {}
    for kind, run_id, key, text, number in store.rows(_DATA, {"ids": list(infos)}):
        if run_id not in data:
            continue
        if kind == "i":
            inputs.setdefault(run_id, []).append((number, key, _input(key, text)))
        else:
            data[run_id][kind][key] = number if kind == "m" else text
    return [
        Run(
            infos[run_id],
            RunData(*(dict(sorted(data[run_id][kind].items())) for kind in "mpt")),
            RunInputs([each for _, _, each in sorted(inputs.get(run_id, ()), key=lambda item: item[:2])]),
        )
        for run_id in ids
        if run_id in infos
    ]


def _info(row: Sequence[Any]) -> RunInfo:
    (run_id, experiment_id, name, user, status, started, ended, uri, stage, heartbeat, lost, parent, *source) = row
    return RunInfo(
        run_id=run_id,
        experiment_id=experiment_id,
        run_name=name,
        user_id=user,
        status=status,
        start_time=int(started),
        end_time=int(ended) if ended >= 0 else None,
        artifact_uri=uri,
        lifecycle_stage=stage,
        heartbeat_time=int(heartbeat) or None,
        lost=bool(lost),
        parent_run_id=parent or None,
        source_name=source[0],
        source_type=source[1],
        source_version=source[2],
    )


def _input(name: str, text: str) -> DatasetInput:
    values = json.loads(text)
    if isinstance(values, dict):  # engines write a tuple of named elements as an object
        values = list(values.values())
    digest, source_type, source, schema, profile, context, tags = values
    found = [InputTag(key, value) for key, value in sorted(tags.items())]
    if context and _CONTEXT_TAG not in tags:
        found.insert(0, InputTag(_CONTEXT_TAG, context))
    return DatasetInput(Dataset(name, digest, source_type, source, schema or None, profile or None), found)


def id_chunks(ids: Sequence[str]) -> Iterator[list[str]]:
    """`ids` in order, in pieces of which each fits one statement."""
    chunk: list[str] = []
    size = 0
    for each in ids:
        if chunk and (len(chunk) >= CHUNK_RUNS or size + len(each) > CHUNK_CHARS):
            yield chunk
            chunk, size = [], 0
        chunk.append(each)
        size += len(each)
    if chunk:
        yield chunk
