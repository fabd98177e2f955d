"""Runs and experiments by id -> entities. Reads only the rows of the ids asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from runstream.entities import DatasetInput, Experiment, Run, RunData, RunInfo, RunInputs

from .facts import Facts
from .run_records import INFO, MAX_RECORDS, NOT_PURGED, RunRecord, fetch_records, run_info, run_input
from .store import Parameter, Store

__all__ = ["EXPERIMENT_COLUMNS", "experiment", "fetch_experiment", "fetch_runs", "id_chunks"]

CHUNK_RUNS: Final = 500
CHUNK_CHARS: Final = 20_000
"""Bounds of the ids of one statement that names them several times: they stand in its text in hexadecimal."""
BULK_RUNS: Final = 3_000
BULK_CHARS: Final = 100_000
"""The same where the statement names them once."""

# For many runs: merged by FINAL, which is three times quicker than GROUP BY there (and slower for few ids far apart);
# runs are numbered in the store, so that no id crosses the wire once per fact.
_IDS: Final = "WITH {ids:Array(String)} AS ids\n"
_NUMBERED: Final = "toUInt32(transform(toString(run_id), ids, arrayEnumerate(ids), toUInt32(0)))"
_BY_KEY: Final = "\nORDER BY key"
_MANY: Final = {
    "metrics": """SELECT {number}, toString(key), if(last.is_nan = 1, nan, last.value)
FROM (SELECT run_id, key, last FROM rollup FINAL PREWHERE run_id IN ids)""",
    "params": """SELECT {number}, toString(key), first.value
FROM (SELECT run_id, key, first FROM param_facts FINAL PREWHERE run_id IN ids)""",
    "tags": """SELECT {number}, toString(key), latest.value
FROM (SELECT run_id, key, latest FROM run_tag_facts FINAL PREWHERE run_id IN ids) WHERE latest.deleted = 0""",
}
_MANY_INPUTS: Final = """SELECT {number}, name, toJSONString((digest, latest.source_type, latest.source, latest.schema,
    latest.profile, latest.context, latest.tags)), latest.time_ms
FROM (SELECT run_id, name, digest, latest FROM input_facts FINAL PREWHERE run_id IN ids)"""

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
    if len(run_ids) <= MAX_RECORDS:
        chunks = id_chunks(run_ids)
        return [_run(record) for chunk in chunks for record in fetch_records(store, chunk, facts)]
    chunks = id_chunks(run_ids, BULK_RUNS, BULK_CHARS)
    return [run for chunk in chunks for run in _fetch_many(store, chunk, facts)]


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


def _run(record: RunRecord) -> Run:
    metrics = {key: point.value for key, point in record.metrics.items()}
    return Run(record.info, RunData(metrics, record.params, record.tags), RunInputs(record.inputs))


def _fetch_many(store: Store, ids: list[str], facts: Facts) -> list[Run]:
    parameters: dict[str, Parameter] = {"ids": ids}
    found: dict[str, RunInfo] = {}
    sql = INFO.replace("{condition}", NOT_PURGED if facts.any_purged else "")
    for run_id, *merged in store.rows(f"SELECT *, toUnixTimestamp64Milli(now64(3)) FROM ({sql})", parameters):
        info = run_info(run_id, merged, facts)
        if info is not None:
            found[run_id] = info
    if not found:
        return []
    data: dict[str, list[dict[str, Any]]] = {}
    for kind, sql in _MANY.items():
        data[kind] = [{} for _ in range(len(ids) + 1)]
        for number, key, value in store.rows(_IDS + sql.replace("{number}", _NUMBERED) + _BY_KEY, parameters):
            data[kind][number][key] = value
    inputs: list[list[tuple[int, str, DatasetInput]]] = [[] for _ in range(len(ids) + 1)]
    if facts.any_inputs:
        for number, name, text, time in store.rows(_IDS + _MANY_INPUTS.replace("{number}", _NUMBERED), parameters):
            inputs[number].append((time, name, run_input(name, json.loads(text))))
    return [
        Run(
            found[run_id],
            RunData(data["metrics"][number], data["params"][number], data["tags"][number]),
            RunInputs([each for _, _, each in sorted(inputs[number], key=lambda item: item[:2])]),
        )
        for number, run_id in enumerate(ids, 1)
        if run_id in found
    ]


def id_chunks(ids: Sequence[str], max_runs: int = CHUNK_RUNS, max_chars: int = CHUNK_CHARS) -> Iterator[list[str]]:
    """`ids` in order, in pieces of which each fits one statement."""
    chunk: list[str] = []
    size = 0
    for each in ids:
        if chunk and (len(chunk) >= max_runs or size + len(each) > max_chars):
            yield chunk
            chunk, size = [], 0
        chunk.append(each)
        size += len(each)
    if chunk:
        yield chunk
