"""Rows of the public views as MLflow's JSON messages. Functions block; handlers call them in worker threads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from runstream_schemas.names import CONTROL, STREAMS, Stream

from .artifact_root import ArtifactRoot
from .state import ExperimentState, Reading, Row, RunState

_RUN_COLUMNS: Final = """run_id, experiment_id, name, user, status, toUnixTimestamp64Milli(started_at),
    if(ended_at IS NULL, -1, toUnixTimestamp64Milli(assumeNotNull(ended_at))), artifact_uri, lifecycle_stage"""
_CONTEXT_TAG: Final = "mlflow.data.context"


def _run_states(
    reading: Reading, artifacts: ArtifactRoot, ids: Sequence[str], wait: Sequence[Stream]
) -> list[RunState]:
    rows = reading.rows(
        f"SELECT {_RUN_COLUMNS} FROM runs WHERE run_id IN {{ids:Array(String)}}", {"ids": list(ids)}, wait
    )
    return [
        RunState(
            run_id=run_id,
            experiment_id=experiment_id,
            name=name,
            user=user,
            status=status,
            start_time=int(start),
            end_time=int(end) if end >= 0 else None,
            artifact_uri=artifacts.present(artifact_uri),
            lifecycle_stage=stage,
        )
        for run_id, experiment_id, name, user, status, start, end, artifact_uri, stage in rows
    ]


_FACTS: Final = """
    SELECT 'param' AS kind, run_id, key, value, toFloat64(0) AS number, toInt64(0) AS time, toInt64(0) AS step
    FROM params WHERE run_id IN {ids:Array(String)}
    UNION ALL SELECT 'tag', run_id, key, value, 0, 0, 0 FROM tags WHERE run_id IN {ids:Array(String)}"""
_MORE_FACTS: Final = """
    UNION ALL SELECT 'metric', run_id, key, '', value, toUnixTimestamp64Milli(timestamp), step
    FROM latest_metrics WHERE run_id IN {ids:Array(String)}
    UNION ALL SELECT 'input', run_id, name, toJSONString([digest, source_type, source, schema, profile, context,
        toJSONString(tags)]), 0, toUnixTimestamp64Milli(logged_at), 0
    FROM inputs WHERE run_id IN {ids:Array(String)}
    UNION ALL SELECT direction, run_id, model_id, 'model', 0, toUnixTimestamp64Milli(logged_at), step
    FROM run_models WHERE run_id IN {ids:Array(String)}"""


def _fill(reading: Reading, states: Sequence[RunState], *, everything: bool) -> dict[str, list[Row]]:
    """Read params and tags into `states`; and, with `everything`, the other facts, by run. One query for all."""
    by_id = {state.run_id: state for state in states}
    sql = f"SELECT * FROM ({_FACTS}{_MORE_FACTS if everything else ''}) ORDER BY run_id, kind, time, key"
    others: dict[str, list[Row]] = {}
    for row in reading.rows(sql, {"ids": list(by_id)}, ()):
        kind, run_id, key, value = row[:4]
        if kind == "param":
            by_id[run_id].params[key] = value
        elif kind == "tag":
            by_id[run_id].tags[key] = value
        else:
            others.setdefault(run_id, []).append(row)
    return others


def run_state(reading: Reading, artifacts: ArtifactRoot, run_id: str) -> RunState | None:
    """Everything a write is validated against."""
    states = _run_states(reading, artifacts, [run_id], (CONTROL,))
    if not states:
        return None
    _fill(reading, states, everything=False)
    return states[0]


def _input(name: str, packed: str) -> dict[str, Any]:
    digest, source_type, source, schema, profile, context, tags = json.loads(packed)
    dataset = {"name": name, "digest": digest, "source_type": source_type, "source": source}
    if schema:
        dataset["schema"] = schema
    if profile:
        dataset["profile"] = profile
    all_tags = {**json.loads(tags), **({_CONTEXT_TAG: context} if context else {})}
    entry: dict[str, Any] = {"dataset": dataset}
    if all_tags:
        entry["tags"] = [{"key": key, "value": value} for key, value in all_tags.items()]
    return entry


def _message(state: RunState, facts: Sequence[Row]) -> dict[str, Any]:
    metrics: list[dict[str, Any]] = []
    inputs: list[dict[str, Any]] = []
    models: dict[str, list[dict[str, Any]]] = {}
    for kind, _, key, value, number, time, step in facts:
        if kind == "metric":
            metrics.append({"key": key, "value": finite(number), "timestamp": int(time), "step": int(step)})
        elif value == "model":
            models.setdefault(kind, []).append(
                {"model_id": key, "step": int(step)} if kind == "output" else {"model_id": key}
            )
        else:
            inputs.append(_input(key, value))
    return run_message(state, metrics, inputs, models)


def run_message(
    state: RunState,
    metrics: Sequence[dict[str, Any]] = (),
    inputs: Sequence[dict[str, Any]] = (),
    models: Mapping[str, list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """MLflow's Run; empty lists are left out, as protobuf JSON does."""
    data: dict[str, Any] = {}
    if metrics:
        data["metrics"] = list(metrics)
    if state.params:
        data["params"] = [{"key": key, "value": value} for key, value in state.params.items()]
    if state.tags:
        data["tags"] = [{"key": key, "value": value} for key, value in state.tags.items()]
    read: dict[str, Any] = {"dataset_inputs": list(inputs)} if inputs else {}
    made: dict[str, Any] = {}
    if models and models.get("input"):
        read["model_inputs"] = models["input"]
    if models and models.get("output"):
        made["model_outputs"] = models["output"]
    run = {"info": state.info(), "data": data, "inputs": read}
    return {**run, "outputs": made} if made else run


def run_messages(
    reading: Reading, artifacts: ArtifactRoot, ids: Sequence[str], wait: Sequence[Stream] = STREAMS
) -> list[dict[str, Any]]:
    """The runs of `ids` that exist, in that order, with latest metrics, params, tags and inputs."""
    if not ids:
        return []
    by_id = {state.run_id: state for state in _run_states(reading, artifacts, ids, wait)}
    if not by_id:
        return []
    facts = _fill(reading, list(by_id.values()), everything=True)
    return [_message(by_id[run_id], facts.get(run_id, ())) for run_id in ids if run_id in by_id]


def experiment_states(
    reading: Reading, artifacts: ArtifactRoot, ids: Sequence[str], wait: Sequence[Stream] = (CONTROL,)
) -> list[ExperimentState]:
    """The experiments of `ids` that exist, in that order."""
    return _experiments(reading, artifacts, "experiment_id IN {ids:Array(String)}", {"ids": list(ids)}, wait, ids)


def experiments_named(reading: Reading, artifacts: ArtifactRoot, name: str) -> list[ExperimentState]:
    """The experiments called `name`, the active one first."""
    found = _experiments(reading, artifacts, "name = {name:String}", {"name": name}, (CONTROL,), None)
    return sorted(found, key=lambda state: state.lifecycle_stage != "active")


def _experiments(
    reading: Reading,
    artifacts: ArtifactRoot,
    where: str,
    parameters: dict[str, Any],
    wait: Sequence[Stream],
    order: Sequence[str] | None,
) -> list[ExperimentState]:
    sql = f"""SELECT experiment_id, name, artifact_uri, lifecycle_stage, toUnixTimestamp64Milli(created_at),
        toUnixTimestamp64Milli(updated_at), tags FROM experiments WHERE {where}"""
    found = {
        experiment_id: ExperimentState(
            experiment_id=experiment_id,
            name=name,
            artifact_location=artifacts.present(artifact_uri),
            lifecycle_stage=stage,
            creation_time=int(created),
            last_update_time=int(updated),
            tags=dict(tags),
        )
        for experiment_id, name, artifact_uri, stage, created, updated, tags in reading.rows(sql, parameters, wait)
    }
    if order is None:
        return list(found.values())
    return [found[experiment_id] for experiment_id in order if experiment_id in found]


def finite(value: float) -> float:
    """A metric value as MLflow's clients expect it: infinities logged by other writers as the largest doubles."""
    if math.isinf(value):
        return math.copysign(1.7976931348623157e308, value)
    return value


def input_names(reading: Reading, run_id: str) -> set[tuple[str, str]]:
    """(name, digest) of the data sets that a run has."""
    rows = reading.rows("SELECT name, digest FROM inputs WHERE run_id = {id:String}", {"id": run_id}, (CONTROL,))
    return {(name, digest) for name, digest in rows}
