"""Logged models (MLflow 3): make, finish, tag, search, delete; and which models a run read and made."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar, Final, Literal

from starlette.requests import Request
from starlette.responses import Response

from runstream.run_name import name_for
from runstream.transport import Event
from runstream_schemas.identity import now_ms

from .artifact_root import below, clean_path
from .artifacts import download, listed
from .backend import Backend
from .errors import ApiError, invalid, missing_resource
from .inputs import DatasetInput, log_datasets
from .model_events import model_event
from .model_rows import ModelRow, model_messages, model_rows, search_models
from .routing import Endpoint
from .runs import chunks
from .search_text import enum_name
from .validation import check_experiment_id, check_model_name, check_run_id
from .wire import Empty, Int32, Int64, JsonResponse, KeyValue, Message, missing_value, pairs_of, read

STATUSES: Final = {
    "LOGGED_MODEL_STATUS_UNSPECIFIED": 0,
    "LOGGED_MODEL_PENDING": 1,
    "LOGGED_MODEL_READY": 2,
    "LOGGED_MODEL_UPLOAD_FAILED": 3,
}
DEFAULT_RESULTS: Final = 100
MAX_RESULTS: Final = 50_000


class CreateLoggedModel(Message):
    """POST logged-models"""

    required: ClassVar[tuple[str, ...]] = ("experiment_id",)
    experiment_id: str | None = None
    name: str | None = None
    model_type: str | None = None
    source_run_id: str | None = None
    params: list[KeyValue] | None = None
    tags: list[KeyValue] | None = None


class ModelPath(Message):
    """A model named in the path"""

    model_id: str | None = None
    allow_deleted: str | None = None


class FinalizeLoggedModel(Message):
    """PATCH logged-models/{model_id}"""

    required: ClassVar[tuple[str, ...]] = ("model_id", "status")
    model_id: str | None = None
    status: str | int | None = None


class ModelParams(Message):
    """POST logged-models/{model_id}/params"""

    model_id: str | None = None
    params: list[KeyValue] | None = None


class ModelTags(Message):
    """PATCH logged-models/{model_id}/tags"""

    model_id: str | None = None
    tags: list[KeyValue] | None = None


class ListModelArtifacts(Message):
    """GET logged-models/{model_id}/artifacts/directories"""

    model_id: str | None = None
    artifact_directory_path: str | None = None
    page_token: str | None = None


class DatasetFilter(Message):
    """Metrics on this data set count"""

    dataset_name: str | None = None
    dataset_digest: str | None = None


class OrderBy(Message):
    """One key of the order"""

    field_name: str | None = None
    ascending: bool | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class SearchLoggedModels(Message):
    """POST logged-models/search"""

    required: ClassVar[tuple[str, ...]] = ("experiment_ids",)
    experiment_ids: list[str] | None = None
    filter: str | None = None
    datasets: list[DatasetFilter] | None = None
    max_results: Int32 | None = None
    order_by: list[OrderBy] | None = None
    page_token: str | None = None


class ModelInput(Message):
    """A model that a run read"""

    model_id: str | None = None


class ModelOutput(Message):
    """A model that a run made"""

    model_id: str | None = None
    step: Int64 | None = None


class LogInputs(Message):
    """runs/log-inputs"""

    required: ClassVar[tuple[str, ...]] = ("run_id",)
    run_id: str | None = None
    datasets: list[DatasetInput] | None = None
    models: list[ModelInput] | None = None


class LogOutputs(Message):
    """runs/outputs"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "models")
    run_id: str | None = None
    models: list[ModelOutput] | None = None


async def _row(backend: Backend, model_id: str, *, allow_deleted: bool = False) -> ModelRow:
    rows = await backend.read(model_rows, backend.reading, backend.artifacts, [model_id])
    if not rows or (rows[0].lifecycle_stage == "deleted" and not allow_deleted):
        raise missing_resource(f"Logged model with ID '{model_id}' not found.")
    return rows[0]


async def _message(backend: Backend, row: ModelRow) -> Response:
    messages = await backend.read(model_messages, backend.reading, [row])
    return JsonResponse({"model": messages[0]})


async def _create(backend: Backend, request: Request) -> Response:
    message = await read(CreateLoggedModel, request)
    check_model_name(message.name or None)
    experiment = await backend.experiment(check_experiment_id(message.experiment_id or ""))
    if experiment.lifecycle_stage != "active":
        raise invalid(
            f"The experiment {experiment.experiment_id} must be in the 'active' state."
            f" Current state is {experiment.lifecycle_stage}."
        )
    params = pairs_of(message.params, "params")
    tags = pairs_of(message.tags, "tags")
    model_id = f"m-{uuid.uuid4().hex}"
    location = below(experiment.artifact_location, f"models/{model_id}/artifacts")
    now = now_ms()
    row = ModelRow(
        model_id=model_id,
        experiment_id=experiment.experiment_id,
        name=message.name or name_for(model_id),
        model_type=message.model_type or "",
        status="PENDING",
        lifecycle_stage="active",
        source_run_id=message.source_run_id or "",
        artifact_uri=location,
        created_at=now,
        updated_at=now,
        params=dict(params),
        tags=dict(tags),
    )
    made = model_event(
        backend,
        model_id,
        experiment_id=row.experiment_id,
        name=row.name,
        model_type=row.model_type,
        source_run_id=row.source_run_id,
        artifact_uri=backend.artifacts.stored(location),
        created_at=now,
        status="PENDING",
    )
    await backend.write(made, *_param_events(backend, model_id, params), *_tag_events(backend, model_id, tags))
    return JsonResponse({"model": row.message(())})


def _param_events(backend: Backend, model_id: str, params: list[tuple[str, str]]) -> list[Event]:
    return [
        model_event(backend, model_id, param_keys=[key for key, _ in part], param_values=[value for _, value in part])
        for part in chunks(params)
    ]


def _tag_events(backend: Backend, model_id: str, tags: list[tuple[str, str]]) -> list[Event]:
    return [
        model_event(backend, model_id, tag_keys=[key for key, _ in part], tag_values=[value for _, value in part])
        for part in chunks(list(dict(tags).items()))
    ]


async def _get(backend: Backend, request: Request) -> Response:
    message = await read(ModelPath, request, model_id=request.path_params["model_id"])
    deleted_too = (message.allow_deleted or "").lower() == "true"
    return await _message(backend, await _row(backend, message.model_id or "", allow_deleted=deleted_too))


async def _finalize(backend: Backend, request: Request) -> Response:
    message = await read(FinalizeLoggedModel, request, model_id=request.path_params["model_id"])
    status = enum_name(message.status, STATUSES, "status") or ""
    row = await _row(backend, message.model_id or "", allow_deleted=True)
    short = status.removeprefix("LOGGED_MODEL_")
    if short == "STATUS_UNSPECIFIED":
        raise invalid("Invalid value for parameter 'status' supplied: give READY, PENDING or UPLOAD_FAILED.")
    await backend.write(model_event(backend, row.model_id, status=short))
    row.status = short
    row.updated_at = now_ms()
    return await _message(backend, row)


async def _delete(backend: Backend, request: Request) -> Response:
    row = await _row(backend, request.path_params["model_id"], allow_deleted=True)
    await backend.write(model_event(backend, row.model_id, lifecycle_stage="deleted"))
    return Empty()


async def _log_params(backend: Backend, request: Request) -> Response:
    message = await read(ModelParams, request, model_id=request.path_params["model_id"])
    params = pairs_of(message.params, "params")
    row = await _row(backend, message.model_id or "", allow_deleted=True)
    taken = [key for key, value in params if row.params.get(key, value) != value]
    if taken:
        raise invalid(f"Changing param values is not allowed. Params {taken} were already logged for this model.")
    if params:
        await backend.write(*_param_events(backend, row.model_id, params))
    return Empty()


async def _set_tags(backend: Backend, request: Request) -> Response:
    message = await read(ModelTags, request, model_id=request.path_params["model_id"])
    tags = pairs_of(message.tags, "tags")
    row = await _row(backend, message.model_id or "", allow_deleted=True)
    if tags:
        await backend.write(*_tag_events(backend, row.model_id, tags))
    return Empty()


async def _delete_tag(backend: Backend, request: Request) -> Response:
    model_id, key = request.path_params["model_id"], request.path_params["tag_key"]
    row = await _row(backend, model_id, allow_deleted=True)
    if key not in row.tags:
        raise missing_resource(f"No tag with key {key!r} found for model with ID {model_id!r}.")
    await backend.write(model_event(backend, model_id, deleted_tag_keys=[key]))
    return Empty()


async def _search(backend: Backend, request: Request) -> Response:
    message = await read(SearchLoggedModels, request)
    ids = [check_experiment_id(identity) for identity in message.experiment_ids or ()]
    datasets = [(entry.dataset_name or "", entry.dataset_digest or "") for entry in message.datasets or ()]
    if any(not name for name, _ in datasets):
        raise invalid("`dataset_name` in the `datasets` clause must be specified.")
    order = []
    for index, entry in enumerate(message.order_by or ()):
        if not entry.field_name:
            raise missing_value(f"order_by[{index}].field_name")
        ascending = True if entry.ascending is None else entry.ascending
        order.append((entry.field_name, ascending, entry.dataset_name or "", entry.dataset_digest or ""))
    limit = message.max_results or DEFAULT_RESULTS
    if not 1 <= limit <= MAX_RESULTS:
        raise invalid(f"Invalid value {limit} for parameter 'max_results' supplied. It must be from 1 to {MAX_RESULTS}")
    rows, token = await backend.read(
        search_models,
        backend.reading,
        backend.artifacts,
        ids,
        message.filter or "",
        datasets,
        order,
        limit,
        message.page_token or None,
    )
    answer: dict[str, Any] = {}
    if rows:
        answer["models"] = await backend.read(model_messages, backend.reading, rows)
    if token:
        answer["next_page_token"] = token
    return JsonResponse(answer)


async def _list_artifacts(backend: Backend, request: Request) -> Response:
    message = await read(ListModelArtifacts, request, model_id=request.path_params["model_id"])
    path = clean_path(message.artifact_directory_path or "")
    row = await _row(backend, message.model_id or "")
    return JsonResponse(await listed(backend, row.artifact_uri, path))


async def _get_artifact(backend: Backend, request: Request) -> Response:
    wanted = request.query_params.get("artifact_file_path")
    if not wanted:
        raise ApiError("BAD_REQUEST", 'Request must include the "artifact_file_path" query parameter.')
    path = clean_path(wanted)
    row = await _row(backend, request.path_params["model_id"])
    base = backend.artifacts.path_of(row.artifact_uri)
    if base is None:
        raise invalid(f"The model lies at '{row.artifact_uri}', outside this server's artifact root: read it there.")
    return await download(backend, f"{base}/{path}")


def _links(backend: Backend, run_id: str, direction: Literal["input", "output"], links: list[tuple[str, int]]) -> Event:
    return backend.events.make(
        "models_linked",
        run_id,
        run_id=run_id,
        direction=direction,
        model_ids=[model_id for model_id, _ in links],
        steps=[step for _, step in links],
    )


async def _log_inputs(backend: Backend, request: Request) -> Response:
    message = await read(LogInputs, request)
    run_id = message.run_id or ""
    links = []
    for index, entry in enumerate(message.models or ()):
        if not entry.model_id:
            raise missing_value(f"models[{index}].model_id")
        links.append((entry.model_id, 0))
    await log_datasets(backend, run_id, message.datasets or [])
    if links:
        state = await backend.active_run(run_id)
        await backend.write(_links(backend, state.run_id, "input", links))
    return Empty()


async def _log_outputs(backend: Backend, request: Request) -> Response:
    message = await read(LogOutputs, request)
    check_run_id(message.run_id or "")
    links = []
    for index, entry in enumerate(message.models or ()):
        if not entry.model_id:
            raise missing_value(f"models[{index}].model_id")
        links.append((entry.model_id, entry.step or 0))
    state = await backend.active_run(message.run_id or "")
    if links:
        await backend.write(_links(backend, state.run_id, "output", links))
    return Empty()


_MODEL: Final = "/mlflow/logged-models/{model_id}"

ENDPOINTS = (
    Endpoint("POST", "/mlflow/logged-models", _create, CreateLoggedModel),
    Endpoint("POST", "/mlflow/logged-models/search", _search, SearchLoggedModels),
    Endpoint("GET", _MODEL, _get, ModelPath),
    Endpoint("PATCH", _MODEL, _finalize, FinalizeLoggedModel),
    Endpoint("DELETE", _MODEL, _delete),
    Endpoint("POST", _MODEL + "/params", _log_params, ModelParams),
    Endpoint("PATCH", _MODEL + "/tags", _set_tags, ModelTags),
    Endpoint("DELETE", _MODEL + "/tags/{tag_key}", _delete_tag),
    Endpoint("GET", _MODEL + "/artifacts/directories", _list_artifacts, ListModelArtifacts),
    Endpoint("GET", _MODEL + "/artifacts/files", _get_artifact),
    Endpoint("POST", "/mlflow/runs/log-inputs", _log_inputs, LogInputs),
    Endpoint("POST", "/mlflow/runs/outputs", _log_outputs, LogOutputs),
)
