"""Rows of the public views as MLflow's JSON messages. Functions block; handlers call them in worker threads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic_core import to_json

from runstream.entities import DatasetInput
from runstream_query.facts import Facts
from runstream_query.run_records import MAX_RECORDS, RunRecord
from runstream_schemas.names import CONTROL, STREAMS, Stream

from .artifact_root import ArtifactRoot
from .run_json import run_json
from .state import ExperimentState, Reading, RunState

_CONTEXT_TAG: Final = "mlflow.data.context"


def _state(artifacts: ArtifactRoot, record: RunRecord) -> RunState:
    info = record.info
    return RunState(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        name=info.run_name,
        user=info.user_id,
        status=info.status,
        start_time=info.start_time,
        end_time=info.end_time,
        artifact_uri=artifacts.present(info.artifact_uri),
        lifecycle_stage=info.lifecycle_stage,
        params=dict(record.params),  # the record is shared
        tags=dict(record.tags),
    )


def run_state(reading: Reading, artifacts: ArtifactRoot, run_id: str) -> RunState | None:
    """Everything a write is validated against."""
    found = reading.records([run_id], reading.facts((CONTROL,)), metrics=False)
    return _state(artifacts, found[0]) if found else None


def _input(use: DatasetInput) -> dict[str, Any]:
    about = use.dataset
    dataset = {"name": about.name, "digest": about.digest, "source_type": about.source_type, "source": about.source}
    if about.schema:
        dataset["schema"] = about.schema
    if about.profile:
        dataset["profile"] = about.profile
    entry: dict[str, Any] = {"dataset": dataset}
    if use.tags:
        entry["tags"] = [
            {"key": key, "value": value} for key, value in sorted((tag.key, tag.value) for tag in use.tags)
        ]
    return entry


def _message(artifacts: ArtifactRoot, record: RunRecord) -> dict[str, Any]:
    metrics = [
        {"key": key, "value": finite(point.value), "timestamp": point.timestamp, "step": point.step}
        for key, point in record.metrics.items()
    ]
    models: dict[str, list[dict[str, Any]]] = {}
    for direction, model_id, step in record.models:
        entry = {"model_id": model_id, "step": step} if direction == "output" else {"model_id": model_id}
        models.setdefault(direction, []).append(entry)
    return run_message(_state(artifacts, record), metrics, [_input(use) for use in record.inputs], models)


def run_message(
    state: RunState,
    metrics: Sequence[dict[str, Any]] = (),
    inputs: Sequence[dict[str, Any]] = (),
    models: Mapping[str, list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """MLflow's Run; empty lists are left out, as protobuf JSON does, and a run just made has no outputs at all."""
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
    return run if models is None else {**run, "outputs": made}


def one_run(reading: Reading, artifacts: ArtifactRoot, run_id: str) -> dict[str, Any] | None:
    """A run with latest metrics, params, tags, inputs and models."""
    found = reading.records([run_id], reading.facts(STREAMS))
    return _message(artifacts, found[0]) if found else None


def run_page(reading: Reading, artifacts: ArtifactRoot, ids: Sequence[str], facts: Facts) -> list[bytes]:
    """The same of the runs of `ids` that exist, in that order, as JSON."""
    if len(ids) > MAX_RECORDS:
        return run_json(reading, artifacts, ids, facts)
    found = [_message(artifacts, record) for record in reading.records(ids, facts)] if ids else []
    return [to_json(message, inf_nan_mode="strings") for message in found]


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
