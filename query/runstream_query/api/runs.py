"""Runs: create, get, update, delete, restore, search, params and tags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from runstream.run_name import name_for
from runstream.transport import Event
from runstream_schemas.identity import DEFAULT_EXPERIMENT_ID, new_run_id, now_ms
from runstream_schemas.limits import MAX_BODY_BYTES, MAX_TIME_MS

from .artifact_root import below
from .backend import Backend
from .errors import invalid, missing_resource
from .routing import Endpoint
from .run_rows import one_run, run_message, run_page
from .search_text import RUN_STATUSES, enum_name, view_type_of
from .state import RunState
from .validation import (
    MAX_SEARCH_RESULTS,
    check_experiment_id,
    check_max_results,
    check_run_id,
    clean_param,
    clean_tag,
)
from .wire import Empty, Int32, Int64, JsonResponse, KeyValue, Message, invalid_value, pairs_of, read

RUN_NAME_TAG: Final = "mlflow.runName"
LOGGED_MODELS_TAG: Final = "mlflow.log-model.history"
_MODEL_KEYS: Final = ("run_id", "artifact_path", "utc_time_created", "model_uuid")
_EVENT_ROOM_BYTES: Final = MAX_BODY_BYTES - 10_000


class CreateRun(Message):
    """runs/create"""

    experiment_id: str | None = None
    user_id: str | None = None
    run_name: str | None = None
    start_time: Int64 | None = None
    tags: list[KeyValue] | None = None


class GetRun(Message):
    """runs/get, delete and restore"""

    required: ClassVar[tuple[str, ...]] = ("run_id",)
    run_id: str | None = None


class UpdateRun(Message):
    """runs/update"""

    required: ClassVar[tuple[str, ...]] = ("run_id",)
    run_id: str | None = None
    end_time: Int64 | None = None
    status: str | int | None = None
    run_name: str | None = None


class SearchRuns(Message):
    """runs/search"""

    experiment_ids: list[str] | None = None
    filter: str | None = None
    run_view_type: str | int | None = None
    max_results: Int32 | None = None
    order_by: list[str] | None = None
    page_token: str | None = None


class LogParam(Message):
    """runs/log-parameter"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "key")
    run_id: str | None = None
    key: str | None = None
    value: str | None = None


class SetTag(Message):
    """runs/set-tag"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "key")
    run_id: str | None = None
    key: str | None = None
    value: str | None = None


class DeleteTag(Message):
    """runs/delete-tag"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "key")
    run_id: str | None = None
    key: str | None = None


class LogModel(Message):
    """runs/log-model: what clients before MLflow 3 say about a model they have uploaded"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "model_json")
    run_id: str | None = None
    model_json: str | None = None


def check_time(path: str, value: int) -> int:
    """Times are UTC milliseconds in [0, year 2262)."""
    if not 0 <= value < MAX_TIME_MS:
        raise invalid(invalid_value(path, value, "Expected UTC milliseconds from 0 to before the year 2262."))
    return value


def chunks(pairs: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """`pairs` in order, split so that each part fits one event body."""
    parts: list[list[tuple[str, str]]] = [[]]
    size = 0
    for key, value in pairs:
        # four bytes a character is UTF-8's upper bound
        cost = 4 * (len(key) + len(value)) + 16
        if parts[-1] and size + cost > _EVENT_ROOM_BYTES:
            parts.append([])
            size = 0
        parts[-1].append((key, value))
        size += cost
    return [part for part in parts if part]


def tag_events(backend: Backend, run_id: str, tags: Sequence[tuple[str, str]]) -> list[Event]:
    """The events that set `tags`; of a key given twice the last value counts."""
    return [
        backend.events.make(
            "run_tags",
            run_id,
            run_id=run_id,
            keys=[key for key, _ in part],
            values=[value for _, value in part],
            deleted_keys=[],
        )
        for part in chunks(list(dict(tags).items()))
    ]


def param_events(backend: Backend, run_id: str, params: Sequence[tuple[str, str]]) -> list[Event]:
    """The events that set `params`."""
    return [
        backend.events.make(
            "params", run_id, run_id=run_id, keys=[key for key, _ in part], values=[value for _, value in part]
        )
        for part in chunks(params)
    ]


async def _create(backend: Backend, request: Request) -> Response:
    message = await read(CreateRun, request)
    tags = [(key, value) for key, value in pairs_of(message.tags, "tags")]
    start_time = now_ms() if message.start_time is None else check_time("start_time", message.start_time)
    experiment = await backend.experiment(check_experiment_id(message.experiment_id or DEFAULT_EXPERIMENT_ID))
    if experiment.lifecycle_stage != "active":
        experiment = await backend.experiment(experiment.experiment_id, fresh=True)
    if experiment.lifecycle_stage != "active":
        raise invalid(
            f"The experiment {experiment.experiment_id} must be in the 'active' state."
            f" Current state is {experiment.lifecycle_stage}."
        )
    tags = [clean_tag(key, value, f"tags[{index}]") for index, (key, value) in enumerate(tags)]
    by_key = dict(tags)
    tag_name = by_key.get(RUN_NAME_TAG)
    if message.run_name and tag_name and message.run_name != tag_name:
        raise invalid(
            "Both 'run_name' argument and 'mlflow.runName' tag are specified, but with different values"
            f" (run_name='{message.run_name}', mlflow.runName='{tag_name}')."
        )
    run_id = new_run_id(experiment.experiment_id)
    name = message.run_name or tag_name or name_for(run_id)
    by_key.setdefault(RUN_NAME_TAG, name)
    artifact_uri = below(experiment.artifact_location, f"{run_id}/artifacts")
    state = RunState(
        run_id=run_id,
        experiment_id=experiment.experiment_id,
        name=name,
        user=message.user_id or "",
        status="RUNNING",
        start_time=start_time,
        end_time=None,
        artifact_uri=artifact_uri,
        lifecycle_stage="active",
        tags=by_key,
    )
    started = backend.events.make(
        "run_started",
        run_id,
        run_id=run_id,
        experiment_id=experiment.experiment_id,
        name=name,
        user=state.user,
        source_name=by_key.get("mlflow.source.name", ""),
        source_type=by_key.get("mlflow.source.type", ""),
        source_version=by_key.get("mlflow.source.git.commit", ""),
        artifact_uri=backend.artifacts.stored(artifact_uri),
        parent_run_id=by_key.get("mlflow.parentRunId", ""),
        started_at=start_time,
    )
    await backend.write(started, *tag_events(backend, run_id, list(by_key.items())))
    backend.remember_run(state)
    return JsonResponse({"run": run_message(state)})


async def _get(backend: Backend, request: Request) -> Response:
    run_id = (await read(GetRun, request)).run_id or ""
    found = await backend.read(one_run, backend.reading, backend.artifacts, run_id)
    if found is None:
        raise missing_resource(f"Run with id={run_id} not found")
    return JsonResponse({"run": found})


async def _update(backend: Backend, request: Request) -> Response:
    message = await read(UpdateRun, request)
    status = enum_name(message.status, RUN_STATUSES, "status")
    state = await backend.active_run(message.run_id or "")
    if message.end_time is not None:
        state.end_time = check_time("end_time", message.end_time)
    if status is not None:
        state.status = status
    events = []
    if status is not None or message.end_time is not None:
        ended_at = -1 if state.end_time is None else state.end_time
        events.append(
            backend.events.make(
                "run_updated", state.run_id, run_id=state.run_id, status=state.status, ended_at=ended_at
            )
        )
    if message.run_name:
        events += _rename(backend, state, message.run_name)
    if events:
        await commit(backend, state, events)
    return JsonResponse({"run_info": state.info()})


def _rename(backend: Backend, state: RunState, name: str) -> list[Event]:
    state.name = name
    state.tags[RUN_NAME_TAG] = name
    return [
        backend.events.make("run_updated", state.run_id, run_id=state.run_id, name=name),
        *tag_events(backend, state.run_id, [(RUN_NAME_TAG, name)]),
    ]


async def commit(backend: Backend, state: RunState, events: Sequence[Event]) -> None:
    """Append events whose effect is noted in `state`; if that fails, the run is read again at its next use."""
    state.generation += 1
    state.writing += 1
    state.written.clear()
    try:
        await backend.write(*events)
    except BaseException:
        backend.forget_run(state.run_id)
        raise
    finally:
        state.writing -= 1
        if not state.writing:
            state.written.set()


async def _set_stage(backend: Backend, request: Request, stage: str) -> Response:
    state = await backend.run((await read(GetRun, request)).run_id or "")
    state.lifecycle_stage = stage
    await commit(
        backend,
        state,
        [backend.events.make("run_updated", state.run_id, run_id=state.run_id, lifecycle_stage=stage)],
    )
    return Empty()


async def _delete(backend: Backend, request: Request) -> Response:
    return await _set_stage(backend, request, "deleted")


async def _restore(backend: Backend, request: Request) -> Response:
    return await _set_stage(backend, request, "active")


async def _search(backend: Backend, request: Request) -> Response:
    message = await read(SearchRuns, request)
    max_results = 1_000 if message.max_results is None else message.max_results
    if max_results > MAX_SEARCH_RESULTS:
        raise invalid(invalid_value("max_results", max_results, f"It must be at most {MAX_SEARCH_RESULTS}"))
    check_max_results(max_results)
    runs, token = await backend.read(
        _page,
        backend,
        [check_experiment_id(identity) for identity in message.experiment_ids or ()],
        message.filter or "",
        view_type_of(message.run_view_type, "run_view_type"),
        max_results,
        message.order_by or (),
        message.page_token or None,
    )
    parts = [b'"runs":[%b]' % b",".join(runs)] if runs else []
    if token:
        parts.append(b'"next_page_token":%b' % to_json(token))
    return Response(b"{%b}" % b",".join(parts), media_type="application/json")


def _page(backend: Backend, *search: Any) -> tuple[list[bytes], str | None]:
    ids, token, facts = backend.reading.search_runs(*search, shown_root=backend.artifacts.shown)
    return run_page(backend.reading, backend.artifacts, ids, facts), token


def new_params(state: RunState, params: Sequence[tuple[str, str]], *, single: bool = False) -> list[tuple[str, str]]:
    """The params that the run does not have yet.

    Raises:
        ApiError: one is there with another value.
    """
    fresh = []
    conflicts = []
    for key, value in params:
        old = state.params.get(key)
        if old is None:
            fresh.append((key, value))
        elif old != value:
            conflicts.append({"key": key, "old_value": old, "new_value": value})
    if conflicts and single:
        old, new = conflicts[0]["old_value"], conflicts[0]["new_value"]
        raise invalid(
            f"Changing param values is not allowed. Param with key='{conflicts[0]['key']}' was already"
            f" logged with value='{old}' for run ID='{state.run_id}'. Attempted logging new value '{new}'."
        )
    if conflicts:
        raise invalid(
            "Changing param values is not allowed. Params were already"
            f" logged='{conflicts}' for run ID='{state.run_id}'."
        )
    return fresh


async def _log_param(backend: Backend, request: Request) -> Response:
    message = await read(LogParam, request)
    param = clean_param(message.key or "", message.value or "")
    state = await backend.active_run(message.run_id or "")
    fresh = new_params(state, [param], single=True)
    if fresh:
        state.params.update(fresh)
        await commit(backend, state, param_events(backend, state.run_id, fresh))
    return Empty()


def apply_tags(backend: Backend, state: RunState, tags: Sequence[tuple[str, str]]) -> list[Event]:
    """Note `tags` in the state and return their events; the run's name follows its tag."""
    events: list[Event] = []
    plain = []
    for key, value in tags:
        if key == RUN_NAME_TAG:
            if value:
                events += _rename(backend, state, value)
            continue
        state.tags[key] = value
        plain.append((key, value))
    return events + (tag_events(backend, state.run_id, plain) if plain else [])


async def _set_tag(backend: Backend, request: Request) -> Response:
    message = await read(SetTag, request)
    tag = clean_tag(message.key or "", message.value or "")
    state = await backend.active_run(message.run_id or "")
    events = apply_tags(backend, state, [tag])
    if events:
        await commit(backend, state, events)
    return Empty()


async def _delete_tag(backend: Backend, request: Request) -> Response:
    message = await read(DeleteTag, request)
    key = message.key or ""
    state = await backend.active_run(message.run_id or "")
    if key not in state.tags:
        # another writer may have set it since
        fresh = await backend.read_run(state.run_id)
        if fresh is None or key not in fresh.tags:
            raise missing_resource(f"No tag with name: {key} in run with id {state.run_id}")
    state.tags.pop(key, None)
    deleted = backend.events.make("run_tags", state.run_id, run_id=state.run_id, keys=[], values=[], deleted_keys=[key])
    await commit(backend, state, [deleted])
    return Empty()


async def _log_model(backend: Backend, request: Request) -> Response:
    message = await read(LogModel, request)
    check_run_id(message.run_id or "")
    try:
        model = json.loads(message.model_json or "")
    except ValueError:
        raise invalid(f"Malformed model info. \n {message.model_json} \n is not a valid JSON.") from None
    wanted = {"artifact_path", "flavors", "utc_time_created", "run_id"}
    missing = wanted - set(model) if isinstance(model, dict) else wanted
    if missing:
        raise invalid(f"Model json is missing mandatory fields: {missing}")
    state = await backend.active_run(message.run_id or "")
    entry = {key: model[key] for key in _MODEL_KEYS if key in model}
    entry["flavors"] = {
        flavor: {key: value for key, value in config.items() if key != "config"} if isinstance(config, dict) else config
        for flavor, config in dict(model.get("flavors") or {}).items()
    }
    try:
        history = json.loads(state.tags.get(LOGGED_MODELS_TAG, "[]"))
    except ValueError:
        history = []
    value = json.dumps([*history, entry] if isinstance(history, list) else [entry])
    events = apply_tags(backend, state, [(LOGGED_MODELS_TAG, value)])
    await commit(backend, state, events)
    return Empty()


ENDPOINTS = (
    Endpoint("POST", "/mlflow/runs/create", _create, CreateRun),
    Endpoint("GET", "/mlflow/runs/get", _get, GetRun),
    Endpoint("POST", "/mlflow/runs/update", _update, UpdateRun),
    Endpoint("POST", "/mlflow/runs/delete", _delete, GetRun),
    Endpoint("POST", "/mlflow/runs/restore", _restore, GetRun),
    Endpoint("POST", "/mlflow/runs/search", _search, SearchRuns),
    Endpoint("POST", "/mlflow/runs/log-parameter", _log_param, LogParam),
    Endpoint("POST", "/mlflow/runs/set-tag", _set_tag, SetTag),
    Endpoint("POST", "/mlflow/runs/delete-tag", _delete_tag, DeleteTag),
    Endpoint("POST", "/mlflow/runs/log-model", _log_model, LogModel),
)
