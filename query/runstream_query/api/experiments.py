"""Experiments: create, get, search, rename, delete, restore and tag them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import unquote, urlsplit

from starlette.requests import Request
from starlette.responses import Response

from runstream_schemas.identity import DEFAULT_EXPERIMENT_ID, experiment_id, now_ms

from .backend import Backend
from .errors import ApiError, invalid, missing_resource
from .routing import Endpoint
from .run_rows import experiment_states, experiments_named
from .search_text import view_type_of
from .state import ExperimentState
from .validation import (
    MAX_ARTIFACT_LOCATION_CHARS,
    check_experiment_id,
    check_experiment_name,
    check_experiment_tag,
    check_max_results,
)
from .wire import Empty, Int64, JsonResponse, KeyValue, Message, pairs_of, read

HOST_SCHEMES: Final = frozenset({"http", "https", "ftp", "sftp", "viewfs"})
"""Schemes that would make whoever reads the location connect to a host that its writer chose."""


class CreateExperiment(Message):
    """experiments/create"""

    required: ClassVar[tuple[str, ...]] = ("name",)
    name: str | None = None
    artifact_location: str | None = None
    tags: list[KeyValue] | None = None


class GetExperiment(Message):
    """experiments/get, delete and restore"""

    required: ClassVar[tuple[str, ...]] = ("experiment_id",)
    experiment_id: str | None = None


class GetExperimentByName(Message):
    """experiments/get-by-name"""

    required: ClassVar[tuple[str, ...]] = ("experiment_name",)
    experiment_name: str | None = None


class UpdateExperiment(Message):
    """experiments/update"""

    required: ClassVar[tuple[str, ...]] = ("experiment_id", "new_name")
    experiment_id: str | None = None
    new_name: str | None = None


class SearchExperiments(Message):
    """experiments/search"""

    max_results: Int64 | None = None
    page_token: str | None = None
    filter: str | None = None
    order_by: list[str] | None = None
    view_type: str | int | None = None


class SetExperimentTag(Message):
    """experiments/set-experiment-tag"""

    required: ClassVar[tuple[str, ...]] = ("experiment_id", "key")
    experiment_id: str | None = None
    key: str | None = None
    value: str | None = None


class DeleteExperimentTag(Message):
    """experiments/delete-experiment-tag"""

    required: ClassVar[tuple[str, ...]] = ("experiment_id", "key")
    experiment_id: str | None = None
    key: str | None = None


def check_artifact_location(location: str) -> str:
    """The location in full: a path without a scheme stays a path, everything else is a URL.

    Raises:
        ApiError: it points into runs or to a foreign host, carries a fragment, parameters or a climbing path, or is
            too long.
    """
    parts = urlsplit(location)
    if parts.scheme == "runs":
        raise invalid(f"Artifact location cannot be a runs:/ URI. Given: '{location}'")
    if parts.scheme in HOST_SCHEMES or (parts.scheme == "mlflow-artifacts" and parts.netloc):
        raise invalid(
            f"'artifact_location' cannot use the '{parts.scheme}' scheme: the '{parts.scheme}' scheme addresses a host"
            " other than the tracking server's configured artifact storage."
        )
    if parts.fragment or ";" in location:
        raise invalid("'artifact_location' URL can't include fragments or params.")
    if ".." in unquote(parts.query):
        raise invalid("Invalid query string")
    if len(location) > MAX_ARTIFACT_LOCATION_CHARS:
        raise invalid(
            "Invalid artifact path length. The length of the artifact path cannot be "
            f"greater than {MAX_ARTIFACT_LOCATION_CHARS} characters."
        )
    if ".." in unquote(parts.path).split("/"):
        raise invalid("'artifact_location' must not climb with '..'.")
    if not parts.scheme:
        return str(Path(location).absolute())
    if "://" not in location and parts.scheme == "file":
        return Path(unquote(parts.path)).absolute().as_uri()
    if "://" not in location and parts.scheme != "mlflow-artifacts":
        location = f"{parts.scheme}://{location.partition(':')[2]}"
    return location.rstrip("/")


async def _create(backend: Backend, request: Request) -> Response:
    message = await read(CreateExperiment, request)
    name = message.name or ""
    check_experiment_name(name)
    location = check_artifact_location(message.artifact_location) if message.artifact_location else ""
    tags = pairs_of(message.tags, "tags")
    for key, value in tags:
        check_experiment_tag(key, value)
    async with backend.lock(f"experiment {name}"):
        taken = await backend.read(experiments_named, backend.reading, backend.artifacts, name)
        if taken:
            raise ApiError("RESOURCE_ALREADY_EXISTS", f"Experiment(name={name}) already exists.")
        identity = await _free_id(backend, name)
        now = now_ms()
        made = backend.events.make(
            "experiment_created",
            identity,
            experiment_id=identity,
            name=name,
            artifact_uri=backend.artifacts.stored(location),
            created_at=now,
        )
        events = [made]
        if tags:
            events.append(
                backend.events.make(
                    "experiment_tags",
                    identity,
                    experiment_id=identity,
                    keys=[key for key, _ in tags],
                    values=[value for _, value in tags],
                    deleted_keys=[],
                )
            )
        await backend.write(*events)
    backend.forget_experiment(identity)
    return JsonResponse({"experiment_id": identity})


async def _free_id(backend: Backend, name: str) -> str:
    """The id of the hash of `name`, or of name#2, name#3 ... where a renamed experiment has it."""
    candidates = [experiment_id(name)] + [experiment_id(f"{name}#{count}") for count in range(2, 6)]
    taken = {
        state.experiment_id
        for state in await backend.read(experiment_states, backend.reading, backend.artifacts, candidates)
    }
    for candidate in candidates:
        if candidate not in taken:
            return candidate
    raise ApiError("RESOURCE_CONFLICT", f"No free experiment id for the name {name!r}; choose another name.")


async def _existing(backend: Backend, identity: str | None) -> ExperimentState:
    return await backend.experiment(check_experiment_id(identity or DEFAULT_EXPERIMENT_ID), fresh=True)


async def _get(backend: Backend, request: Request) -> Response:
    message = await read(GetExperiment, request)
    return JsonResponse({"experiment": (await _existing(backend, message.experiment_id)).message()})


async def _get_by_name(backend: Backend, request: Request) -> Response:
    message = await read(GetExperimentByName, request)
    name = message.experiment_name or ""
    found = await backend.read(experiments_named, backend.reading, backend.artifacts, name)
    if not found:
        raise missing_resource(f"Could not find experiment with name '{name}'")
    return JsonResponse({"experiment": found[0].message()})


async def _change(backend: Backend, identity: str, **fields: str) -> None:
    await backend.write(backend.events.make("experiment_updated", identity, experiment_id=identity, **fields))
    backend.forget_experiment(identity)


async def _delete(backend: Backend, request: Request) -> Response:
    state = await _existing(backend, (await read(GetExperiment, request)).experiment_id)
    if state.lifecycle_stage != "active":
        raise missing_resource(f"No Experiment with id={state.experiment_id} exists")
    await _change(backend, state.experiment_id, lifecycle_stage="deleted")
    backend.forget_runs_of(state.experiment_id)
    return Empty()


async def _restore(backend: Backend, request: Request) -> Response:
    state = await _existing(backend, (await read(GetExperiment, request)).experiment_id)
    if state.lifecycle_stage != "deleted":
        raise missing_resource(f"No Experiment with id={state.experiment_id} exists")
    await _change(backend, state.experiment_id, lifecycle_stage="active")
    backend.forget_runs_of(state.experiment_id)
    return Empty()


async def _rename(backend: Backend, request: Request) -> Response:
    message = await read(UpdateExperiment, request)
    name = message.new_name or ""
    check_experiment_name(name)
    async with backend.lock(f"experiment {name}"):
        state = await _existing(backend, message.experiment_id)
        if state.lifecycle_stage != "active":
            raise ApiError("INVALID_STATE", "Cannot rename a non-active experiment.")
        taken = await backend.read(experiments_named, backend.reading, backend.artifacts, name)
        if any(other.experiment_id != state.experiment_id for other in taken):
            raise ApiError("RESOURCE_ALREADY_EXISTS", f"Experiment(name={name}) already exists.")
        await _change(backend, state.experiment_id, name=name)
    return Empty()


async def _search(backend: Backend, request: Request) -> Response:
    message = await read(SearchExperiments, request)
    max_results = message.max_results or 0
    check_max_results(max_results)
    ids, token = await backend.read(
        backend.reading.search_experiments,
        message.filter or "",
        view_type_of(message.view_type, "view_type"),
        max_results,
        message.order_by or (),
        message.page_token or None,
    )
    answer: dict[str, Any] = {}
    if ids:
        states = await backend.read(experiment_states, backend.reading, backend.artifacts, ids, ())
        answer["experiments"] = [state.message() for state in states]
    if token:
        answer["next_page_token"] = token
    return JsonResponse(answer)


async def _active(backend: Backend, identity: str | None) -> ExperimentState:
    state = await _existing(backend, identity)
    if state.lifecycle_stage != "active":
        raise invalid(
            f"The experiment {state.experiment_id} must be in the 'active' state."
            f" Current state is {state.lifecycle_stage}."
        )
    return state


async def _set_tag(backend: Backend, request: Request) -> Response:
    message = await read(SetExperimentTag, request)
    key, value = message.key or "", message.value or ""
    check_experiment_tag(key, value)
    state = await _active(backend, message.experiment_id)
    await backend.write(
        backend.events.make(
            "experiment_tags",
            state.experiment_id,
            experiment_id=state.experiment_id,
            keys=[key],
            values=[value],
            deleted_keys=[],
        )
    )
    backend.forget_experiment(state.experiment_id)
    return Empty()


async def _delete_tag(backend: Backend, request: Request) -> Response:
    message = await read(DeleteExperimentTag, request)
    state = await _active(backend, message.experiment_id)
    if message.key not in state.tags:
        raise missing_resource(f"No tag with name: {message.key} in experiment with id {state.experiment_id}")
    await backend.write(
        backend.events.make(
            "experiment_tags",
            state.experiment_id,
            experiment_id=state.experiment_id,
            keys=[],
            values=[],
            deleted_keys=[message.key],
        )
    )
    backend.forget_experiment(state.experiment_id)
    return Empty()


ENDPOINTS = (
    Endpoint("POST", "/mlflow/experiments/create", _create, CreateExperiment),
    Endpoint("GET", "/mlflow/experiments/get", _get, GetExperiment),
    Endpoint("GET", "/mlflow/experiments/get-by-name", _get_by_name, GetExperimentByName),
    Endpoint("POST", "/mlflow/experiments/delete", _delete, GetExperiment),
    Endpoint("POST", "/mlflow/experiments/restore", _restore, GetExperiment),
    Endpoint("POST", "/mlflow/experiments/update", _rename, UpdateExperiment),
    Endpoint("GET", "/mlflow/experiments/search", _search, SearchExperiments),
    Endpoint("POST", "/mlflow/experiments/search", _search, SearchExperiments),
    Endpoint("POST", "/mlflow/experiments/set-experiment-tag", _set_tag, SetExperimentTag),
    Endpoint("POST", "/mlflow/experiments/delete-experiment-tag", _delete_tag, DeleteExperimentTag),
)
