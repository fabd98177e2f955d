"""Runs and experiments by id -> entities. Reads only the rows of the ids asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

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

from .facts import Facts
from .store import Store

__all__ = ["EXPERIMENT_COLUMNS", "experiment", "fetch_experiment", "fetch_runs", "id_chunks"]

CHUNK_RUNS: Final = 500
CHUNK_CHARS: Final = 20_000
"""Bounds of the ids of one statement: they stand in its text four times, in hexadecimal."""
_CONTEXT_TAG: Final = "mlflow.data.context"

# Merged by GROUP BY, which gives what FINAL gives (every column is a maximum or minimum of whole tuples), three times
# faster for ids that lie far apart. PREWHERE reads the wide columns of these rows alone. What the view `runs` joins is
# joined here, from `Facts`.
_INFO: Final = """
SELECT run_id, max(start), max(status), max(name), max(lifecycle), max(heartbeat_at), toUnixTimestamp64Milli(now64(3))
FROM run_facts PREWHERE run_id IN {ids:Array(String)}"""
_NOT_PURGED: Final = "\nWHERE run_id NOT IN (SELECT run_id FROM purged_runs)"
_BY_RUN: Final = "\nGROUP BY run_id"

_DATA: Final = """
SELECT 'm' AS kind, toString(run_id) AS id, toString(key) AS name, '' AS text, if(newest.4 = 1, nan, newest.3) AS number
FROM (SELECT run_id, key, max(last) AS newest FROM rollup PREWHERE run_id IN {ids:Array(String)} GROUP BY run_id, key)
UNION ALL
SELECT 'p', toString(run_id), toString(key), oldest.3, 0
FROM
(
    SELECT run_id, key, min(first) AS oldest FROM param_facts PREWHERE run_id IN {ids:Array(String)}
    GROUP BY run_id, key
)
UNION ALL
SELECT 't', toString(run_id), toString(key), newest.3, 0
FROM
(
    SELECT run_id, key, max(latest) AS newest FROM run_tag_facts PREWHERE run_id IN {ids:Array(String)}
    GROUP BY run_id, key
)
WHERE newest.2 = 0"""
_INPUTS: Final = """
UNION ALL
SELECT 'i', run_id, name, toJSONString((digest, newest.2, newest.3, newest.4, newest.5, newest.6, newest.7)), newest.8
FROM
(
    SELECT run_id, name, digest, max(latest) AS newest FROM input_facts PREWHERE run_id IN {ids:Array(String)}
    GROUP BY run_id, name, digest
)"""

# Joined by id in the store, merged and judged here: the view `experiments` costs 30 ms to plan, this less than ten.
_EXPERIMENT: Final = """
SELECT experiment_id, max(created), max(last_created), max(name), max(lifecycle), max(last_start), max(updated_at),
    (SELECT groupArray((key, latest.1, latest.2, latest.3)) FROM experiment_tag_facts WHERE experiment_id = {id:String})
FROM experiment_facts PREWHERE experiment_id = {id:String}
GROUP BY experiment_id"""
_EXPERIMENTS_NAMED: Final = """
SELECT DISTINCT experiment_id FROM experiment_facts
WHERE created.name = {name:String} OR last_created.name = {name:String} OR name.name = {name:String}"""

EXPERIMENT_COLUMNS: Final = (
    "r.experiment_id, r.name, r.artifact_uri, r.lifecycle_stage, r.tags, toUnixTimestamp64Milli(r.created_at), "
    "toUnixTimestamp64Milli(r.updated_at)"
)
"""What `experiment` takes, from the view `experiments` as `r`."""


def fetch_runs(store: Store, run_ids: Sequence[str], facts: Facts) -> list[Run]:
    """The runs of `run_ids` that exist, in that order, with latest metrics, params, tags and inputs."""
    return [run for chunk in id_chunks(run_ids) for run in _fetch(store, chunk, facts)]


def experiment(row: Sequence[Any]) -> Experiment:
    """The experiment of a row of `EXPERIMENT_COLUMNS`."""
    experiment_id, name, uri, stage, tags, created, updated = row
    return Experiment(experiment_id, name, uri, stage, dict(tags), int(created), int(updated))


def fetch_experiment(
    store: Store, column: Literal["experiment_id", "name"], value: str, facts: Facts
) -> Experiment | None:
    """The experiment with that id or name, an active one before a deleted one."""
    ids = [value]
    if column == "name":
        # Whatever was ever called so; what it is called now comes with the rest.
        ids = [row[0] for row in store.rows(_EXPERIMENTS_NAMED, {"name": value})]
    rows = [row for each in ids for row in store.rows(_EXPERIMENT, {"id": each})]
    found = [each for row in rows if (each := _merged(row, facts))]
    matching = [each for each in found if column == "experiment_id" or each.name == value]
    matching.sort(
        key=lambda each: (each.lifecycle_stage == "deleted", -(each.last_update_time or 0), each.experiment_id)
    )
    return matching[0] if matching else None


def _merged(row: Sequence[Any], facts: Facts) -> Experiment | None:
    """What the view `experiments` says of one experiment; None where it has none."""
    experiment_id, created, last_created, name, lifecycle, last_start, updated, tags = row
    purged = facts.purged_experiments.get(experiment_id, 0)
    if not created["inverse_version"]:
        return None
    if purged and max(last_created["version"], last_start["version"]) <= purged:
        return None
    creation = last_created if purged and last_created["version"] > purged else created
    deleted = lifecycle["version"] > purged and lifecycle["stage"] == "deleted"
    restored = deleted and last_start["version"] > lifecycle["version"]
    latest: dict[str, tuple[int, int, str]] = {}
    for each in tags:
        key, version, gone, text = each.values() if isinstance(each, dict) else each
        latest[key] = max(latest.get(key, (0, 0, "")), (version, gone, text))
    kept = {key: text for key, (version, gone, text) in latest.items() if not gone and version > purged}
    if restored:
        kept["runstream.restored_by"] = last_start["run_id"]
    return Experiment(
        experiment_id,
        name["name"] if name["version"] > purged else creation["name"],
        facts.uri(creation["artifact_uri"] or experiment_id),
        "deleted" if deleted and last_start["version"] < lifecycle["version"] else "active",
        kept,
        int(creation["created_at"]),
        int(max(updated, creation["created_at"])),
    )


def _fetch(store: Store, ids: Sequence[str], facts: Facts) -> list[Run]:
    rows = store.rows(_INFO + (_NOT_PURGED if facts.any_purged else "") + _BY_RUN, {"ids": ids})
    infos = {row[0]: _info(row, facts) for row in rows if row[1]["inverse_version"]}
    if not infos:
        return []
    data: dict[str, dict[str, dict[str, Any]]] = {run_id: {"m": {}, "p": {}, "t": {}} for run_id in infos}
    inputs: dict[str, list[tuple[float, str, DatasetInput]]] = {}
    for kind, run_id, key, text, number in store.rows(
        _DATA + (_INPUTS if facts.any_inputs else ""), {"ids": list(infos)}
    ):
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


def _info(row: Sequence[Any], facts: Facts) -> RunInfo:
    run_id, start, status, name, lifecycle, heartbeat, now = row
    state = status["status"] if status["version"] else "RUNNING"
    ended = status["ended_at"] if status["version"] and state not in ("RUNNING", "SCHEDULED") else -1
    return RunInfo(
        run_id=run_id,
        experiment_id=start["experiment_id"],
        run_name=name["name"] if name["version"] else start["name"],
        user_id=start["user"],
        status=state,
        start_time=int(start["started_at"]),
        end_time=int(ended) if ended >= 0 else None,
        artifact_uri=facts.uri(start["artifact_uri"]),
        lifecycle_stage=facts.stage(start["experiment_id"], lifecycle["stage"], lifecycle["version"]),
        heartbeat_time=int(heartbeat) or None,
        lost=state == "RUNNING" and heartbeat < now - LOST_AFTER_SECONDS * 1000,
        parent_run_id=start["parent_run_id"] or None,
        source_name=start["source_name"],
        source_type=start["source_type"],
        source_version=start["source_version"],
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
