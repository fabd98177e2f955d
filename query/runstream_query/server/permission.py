"""What a principal who is limited to some experiments may do: one rule for each operation of the MLflow API.

The rules stand here and not in the handlers, so that they can be read at one place. An operation without a rule is
refused to such a principal, and so is every route that knows nothing of experiments (SQL above all). A rule parses the
request with the same function as the handler and names experiments; searches are narrowed to what may be read. For
everybody else no rule runs.

Permissions: read (get, search, download), edit (log, tag, rename, upload), manage (delete and restore).
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from runstream.transport import Event
from runstream_query.api.artifacts import proxied_path
from runstream_query.api.backend import Backend
from runstream_query.api.errors import ApiError, invalid, missing_resource
from runstream_query.api.inputs import SearchDatasets
from runstream_query.api.logged_models import LogInputs, LogOutputs, SearchLoggedModels
from runstream_query.api.metrics import MAX_BULK_RUNS, GetMetricHistoryBulk, LogBatch, LogMetric
from runstream_query.api.model_rows import model_rows
from runstream_query.api.routing import PREFIXES, Endpoint
from runstream_query.api.runs import SearchRuns
from runstream_query.api.validation import check_experiment_id
from runstream_query.api.wire import JsonResponse, Message, query_fields, read
from runstream_schemas import codec
from runstream_schemas.delivery import EVENTS_PATH
from runstream_schemas.identity import DEFAULT_EXPERIMENT_ID, experiment_id

from .principal import Permission, Principal

MAX_SEARCH_ROUNDS: Final = 50
"""Pages read to fill one page of experiments that may be read; then a shorter page is answered."""
_UNRULED_PATHS: Final = frozenset({"/openapi.json", "/metrics", "/health", "/ready", "/version", "/ping"})
"""Paths beside the API that a limited principal may use. Posted events are checked one by one, by `check_events`."""
_GUARDED: Final = (*(f"{prefix}/" for prefix in PREFIXES), "/get-artifact")


def guarded(path: str) -> bool:
    """Whether a limited principal may use `path` (below the root path): its operations have rules."""
    return path in _UNRULED_PATHS or path.startswith(_GUARDED)


Owner = Callable[[str, str], Awaitable[bool]]
"""Notes that `name` has made the experiment with this id, before it is answered; False: it could not be noted."""


@dataclass(slots=True)
class Call:
    """One request of a limited principal."""

    endpoint: Endpoint
    backend: Backend
    request: Request
    principal: Principal
    owner: Owner | None
    """None: this principal cannot be given experiments of their own."""

    async def perform(self) -> Response:
        """The operation itself."""
        return await self.endpoint.handler(self.backend, self.request)

    async def message(self) -> Any:
        """The request as its handler will read it."""
        assert self.endpoint.request is not None, self.endpoint.path
        return await read(self.endpoint.request, self.request)

    def require(self, needed: Permission, experiment: str) -> None:
        """Raises:
        ApiError: 403, the principal has less than `needed` for this experiment.
        """
        if not self.principal.can(needed, experiment):
            raise ApiError(
                "PERMISSION_DENIED",
                f"{self.principal.name} needs the permission {needed} for experiment {experiment}.",
            )

    async def require_run(self, needed: Permission, run_id: str) -> str:
        """The experiment of a run, if `needed` is held for it; 404 where there is no such run."""
        experiment = (await self.backend.run(run_id)).experiment_id
        self.require(needed, experiment)
        return experiment

    async def require_model(self, needed: Permission, model_id: str) -> None:
        """Checks the experiment of a logged model; one that does not exist is the handler's matter."""
        for row in await self.backend.read(model_rows, self.backend.reading, self.backend.artifacts, [model_id]):
            self.require(needed, row.experiment_id)

    async def require_path(self, needed: Permission, path: str) -> None:
        """Checks who owns a path (clean) below the artifact root: experiment/run/artifacts or experiment/models/id."""
        parts = path.split("/")
        if re.fullmatch(r"[0-9]{1,20}", parts[0]):
            self.require(needed, check_experiment_id(parts[0]))
            if len(parts) >= 3 and parts[1] == "models":
                await self.require_model(needed, parts[2])
            elif len(parts) >= 2:
                await self.require_run(needed, parts[1])
            return
        for index in range(1, len(parts)):
            if parts[index] != "artifacts":
                continue
            state = await self.backend.run(parts[index - 1])
            if self.backend.artifacts.path_of(state.artifact_uri) == "/".join(parts[: index + 1]):
                self.require(needed, state.experiment_id)
                return
        raise ApiError("PERMISSION_DENIED", f"{self.principal.name} may use artifact paths of experiments only.")

    async def require_run_artifacts(self, needed: Permission, run_id: str) -> None:
        """Checks a run, and that its artifacts do not lie in a folder of another experiment."""
        experiment = await self.require_run(needed, run_id)
        base = self.backend.artifacts.path_of((await self.backend.run(run_id)).artifact_uri)
        first = "" if base is None else base.partition("/")[0]
        if first.isdecimal() and first != experiment:
            self.require(needed, first)

    def replace(self, fields: Mapping[str, Any]) -> None:
        """Give the handler a JSON body of these fields instead of the one that came."""
        self.request._body = json.dumps(fields).encode()


Rule = Callable[[Call], Awaitable[Response]]


def _open() -> Rule:
    """Touches no experiment."""
    return Call.perform


def _run(needed: Permission) -> Rule:
    async def rule(call: Call) -> Response:
        await call.require_run(needed, (await call.message()).run_id or "")
        return await call.perform()

    return rule


def _experiment(needed: Permission) -> Rule:
    async def rule(call: Call) -> Response:
        named = (await call.message()).experiment_id or DEFAULT_EXPERIMENT_ID
        call.require(needed, check_experiment_id(named))
        return await call.perform()

    return rule


def _model(needed: Permission) -> Rule:
    async def rule(call: Call) -> Response:
        await call.require_model(needed, call.request.path_params["model_id"])
        return await call.perform()

    return rule


async def _log_metric(call: Call) -> Response:
    message: LogMetric = await call.message()
    await call.require_run("edit", message.run_id or "")
    if message.model_id:
        await call.require_model("edit", message.model_id)
    return await call.perform()


async def _log_batch(call: Call) -> Response:
    message: LogBatch = await call.message()
    await call.require_run("edit", message.run_id or "")
    for model_id in sorted({metric.model_id for metric in message.metrics or () if metric.model_id}):
        await call.require_model("edit", model_id)
    return await call.perform()


async def _log_models(call: Call) -> Response:
    message: LogInputs | LogOutputs = await call.message()
    await call.require_run("edit", message.run_id or "")
    for model_id in sorted({entry.model_id for entry in message.models or () if entry.model_id}):
        await call.require_model("read", model_id)
    return await call.perform()


async def _histories(call: Call) -> Response:
    if call.endpoint.request is GetMetricHistoryBulk:  # its handler looks at the query alone
        run_ids = query_fields(GetMetricHistoryBulk, call.request.scope["query_string"]).get("run_id") or []
    else:
        run_ids = (await call.message()).run_ids or []
    if len(run_ids) <= MAX_BULK_RUNS:  # with more the handler refuses
        for run_id in run_ids:
            try:
                await call.require_run("read", run_id)
            except ApiError as exc:
                if exc.code != "RESOURCE_DOES_NOT_EXIST":
                    raise
    return await call.perform()


def _narrowed(model: type[Message]) -> Rule:
    """A search in named experiments: those that may not be read are left out."""

    async def rule(call: Call) -> Response:
        message = await read(model, call.request)
        fields = message.model_dump(mode="json", exclude_none=True)
        named = [check_experiment_id(identity) for identity in fields.get("experiment_ids") or ()]
        fields["experiment_ids"] = [identity for identity in named if call.principal.can("read", identity)]
        if not fields["experiment_ids"] and named:
            return JsonResponse({})
        call.replace(fields)
        return await call.perform()

    return rule


async def _search_experiments(call: Call) -> Response:
    """Read pages until one is full of experiments that may be read."""
    message = await call.message()
    fields = message.model_dump(mode="json", exclude_none=True)
    wanted = fields.get("max_results") or 0
    found: list[Any] = []
    token: str | None = None
    for _ in range(MAX_SEARCH_ROUNDS):
        if fields.get("max_results"):
            fields["max_results"] = wanted - len(found)
        scope = {**call.request.scope, "method": "POST", "headers": [(b"content-type", b"application/json")]}
        again = Request(scope, call.request.receive)
        again._body = json.dumps(fields).encode()
        response = await call.endpoint.handler(call.backend, again)
        page = json.loads(bytes(response.body))
        found += [entry for entry in page.get("experiments", ()) if call.principal.can("read", entry["experiment_id"])]
        token = page.get("next_page_token")
        if token is None or len(found) >= wanted:
            break
        fields["page_token"] = token
    answer: dict[str, Any] = {"experiments": found} if found else {}
    if token is not None:
        answer["next_page_token"] = token
    return JsonResponse(answer)


async def _experiment_by_name(call: Call) -> Response:
    response = await call.perform()
    call.require("read", json.loads(bytes(response.body))["experiment"]["experiment_id"])
    return response


def may_create(principal: Principal, name: str, *, ownable: bool) -> bool:
    """Whether a limited principal may make the experiment `name`: where they may edit all without permissions of their
    own, or where it can become theirs (`ownable`)."""
    identity = experiment_id(name)
    if identity in principal.experiments:
        return principal.can("edit", identity)
    return principal.can("edit", identity) or (ownable and principal.may("write"))


async def _create_experiment(call: Call) -> Response:
    message = await call.message()
    if not may_create(call.principal, message.name or "", ownable=call.owner is not None):
        raise ApiError("PERMISSION_DENIED", f"{call.principal.name} may not make this experiment.")
    location = message.artifact_location or ""
    try:
        below = bool(location) and call.backend.artifacts.path_of(location) is not None
    except ApiError:
        below = True
    if below:
        raise ApiError("PERMISSION_DENIED", "A folder of this server's artifact root can be chosen by others only.")
    response = await call.perform()
    made = json.loads(bytes(response.body))["experiment_id"]
    if call.owner is not None and not call.principal.can("manage", made):
        await call.owner(call.principal.name, made)
    return response


async def _list_proxied(call: Call) -> Response:
    path = proxied_path(call.request, (await call.message()).path or "")
    await call.require_path("read", path)
    return await call.perform()


def _proxied(needed: Permission) -> Rule:
    async def rule(call: Call) -> Response:
        await call.require_path(needed, proxied_path(call.request, call.request.path_params["path"]))
        return await call.perform()

    return rule


async def _list_artifacts(call: Call) -> Response:
    await call.require_run_artifacts("read", (await call.message()).run_id or "")
    return await call.perform()


async def _get_artifact(call: Call) -> Response:
    # the same look-up as its handler: the last of several wins
    query = call.request.query_params
    run_id = query.get("run_id") or query.get("run_uuid")
    if run_id:
        await call.require_run_artifacts("read", run_id)
    return await call.perform()


def _sign(needed: Permission) -> Rule:
    async def rule(call: Call) -> Response:
        message = await call.message()
        if message.run_id:
            await call.require_run_artifacts(needed, message.run_id)
        model_id = getattr(message, "model_id", None)
        if model_id:
            await call.require_model(needed, model_id)
        return await call.perform()

    return rule


async def _upload_artifact(call: Call) -> Response:
    run_id = call.request.query_params.get("run_uuid")
    if run_id:
        await call.require_run_artifacts("edit", run_id)
    return await call.perform()


RULES: Final[Mapping[tuple[str, str], Rule]] = {
    ("POST", "/mlflow/experiments/create"): _create_experiment,
    ("GET", "/mlflow/experiments/get"): _experiment("read"),
    ("GET", "/mlflow/experiments/get-by-name"): _experiment_by_name,
    ("POST", "/mlflow/experiments/delete"): _experiment("manage"),
    ("POST", "/mlflow/experiments/restore"): _experiment("manage"),
    ("POST", "/mlflow/experiments/update"): _experiment("edit"),
    ("GET", "/mlflow/experiments/search"): _search_experiments,
    ("POST", "/mlflow/experiments/search"): _search_experiments,
    ("POST", "/mlflow/experiments/set-experiment-tag"): _experiment("edit"),
    ("POST", "/mlflow/experiments/delete-experiment-tag"): _experiment("edit"),
    ("POST", "/mlflow/experiments/search-datasets"): _narrowed(SearchDatasets),
    ("POST", "/mlflow/runs/create"): _experiment("edit"),
    ("GET", "/mlflow/runs/get"): _run("read"),
    ("POST", "/mlflow/runs/update"): _run("edit"),
    ("POST", "/mlflow/runs/delete"): _run("manage"),
    ("POST", "/mlflow/runs/restore"): _run("manage"),
    ("POST", "/mlflow/runs/search"): _narrowed(SearchRuns),
    ("POST", "/mlflow/runs/log-metric"): _log_metric,
    ("POST", "/mlflow/runs/log-parameter"): _run("edit"),
    ("POST", "/mlflow/runs/log-batch"): _log_batch,
    ("POST", "/mlflow/runs/log-inputs"): _log_models,
    ("POST", "/mlflow/runs/outputs"): _log_models,
    ("POST", "/mlflow/runs/log-model"): _run("edit"),
    ("POST", "/mlflow/runs/set-tag"): _run("edit"),
    ("POST", "/mlflow/runs/delete-tag"): _run("edit"),
    ("GET", "/mlflow/metrics/get-history"): _run("read"),
    ("GET", "/mlflow/metrics/get-history-bulk"): _histories,
    ("GET", "/mlflow/metrics/get-history-bulk-interval"): _histories,
    ("GET", "/mlflow/artifacts/list"): _list_artifacts,
    ("POST", "/mlflow/artifacts/presigned-upload-url"): _sign("edit"),
    ("POST", "/mlflow/artifacts/presigned-download-url"): _sign("read"),
    ("POST", "/mlflow/upload-artifact"): _upload_artifact,
    ("GET", "/get-artifact"): _get_artifact,
    ("GET", "/mlflow-artifacts/artifacts"): _list_proxied,
    ("GET", "/mlflow-artifacts/artifacts/{path:path}"): _proxied("read"),
    ("PUT", "/mlflow-artifacts/artifacts/{path:path}"): _proxied("edit"),
    ("DELETE", "/mlflow-artifacts/artifacts/{path:path}"): _proxied("manage"),
    ("POST", "/mlflow-artifacts/mpu/create/{path:path}"): _proxied("edit"),
    ("POST", "/mlflow-artifacts/mpu/complete/{path:path}"): _proxied("edit"),
    ("POST", "/mlflow-artifacts/mpu/abort/{path:path}"): _proxied("edit"),
    ("GET", "/mlflow-artifacts/presigned/{path:path}"): _proxied("read"),
    ("POST", "/mlflow/logged-models"): _experiment("edit"),
    ("POST", "/mlflow/logged-models/search"): _narrowed(SearchLoggedModels),
    ("GET", "/mlflow/logged-models/{model_id}"): _model("read"),
    ("PATCH", "/mlflow/logged-models/{model_id}"): _model("edit"),
    ("DELETE", "/mlflow/logged-models/{model_id}"): _model("manage"),
    ("POST", "/mlflow/logged-models/{model_id}/params"): _model("edit"),
    ("PATCH", "/mlflow/logged-models/{model_id}/tags"): _model("edit"),
    ("DELETE", "/mlflow/logged-models/{model_id}/tags/{tag_key}"): _model("edit"),
    ("GET", "/mlflow/logged-models/{model_id}/artifacts/directories"): _model("read"),
    ("GET", "/mlflow/logged-models/{model_id}/artifacts/files"): _model("read"),
    ("GET", "/mlflow/server-info"): _open(),
}
"""By method and path (as `Endpoint` has it)."""


async def perform_limited(call: Call) -> Response:
    """Run one operation of a limited principal, within its rule.

    Raises:
        ApiError: 403, or what the operation raises.
    """
    rule = RULES.get((call.endpoint.method, call.endpoint.path))
    if rule is None:
        raise ApiError(
            "PERMISSION_DENIED", f"{call.principal.name} is limited to some experiments; this needs all of them."
        )
    return await rule(call)


_OF_RUNS: Final = frozenset({"run_updated", "params", "run_tags", "artifact_logged", "input_logged", "metric_batch"})


async def check_events(backend: Backend, principal: Principal, events: Sequence[Event], owner: Owner | None) -> None:
    """Whether `principal` may append these events (posted as bodies); whoever is not limited may append all.

    Raises:
        ApiError: 403, at least one may not be appended; 404, one is about a run that neither exists nor is started
            before it among `events`; 400, one cannot be read.
    """
    if not principal.restricted:
        return
    call = Call(_NO_ENDPOINT, backend, _NO_REQUEST, principal, owner)
    started: dict[str, str] = {}
    created: set[str] = set()
    for item in events:
        try:
            name, fields = codec.decode(item.fingerprint, item.body)
        except codec.CodecError as exc:
            raise invalid(f"An event cannot be read: {exc}") from None
        if name == "experiment_created":
            named = fields["experiment_id"] == experiment_id(fields["name"])
            if not named or not may_create(principal, fields["name"], ownable=owner is not None):
                call.require("edit", fields["experiment_id"])
            if fields["artifact_uri"] and _below_root(backend, fields["artifact_uri"]):
                raise ApiError("PERMISSION_DENIED", "The experiment's artifacts may not lie in this folder.")
            if not principal.can("manage", fields["experiment_id"]):
                if await _experiment_known(backend, fields["experiment_id"]):
                    call.require("edit", fields["experiment_id"])
                else:
                    created.add(fields["experiment_id"])
        elif name in ("experiment_updated", "experiment_tags"):
            stage = fields.get("lifecycle_stage", "")
            if fields["experiment_id"] not in created:
                call.require("manage" if stage else "edit", fields["experiment_id"])
        elif name == "run_started":
            await _check_start(call, fields, created)
            started[fields["run_id"]] = fields["experiment_id"]
        elif name in _OF_RUNS:
            needed: Permission = "manage" if fields.get("lifecycle_stage") else "edit"
            await _check_run(call, needed, fields["run_id"], started)
        elif name == "models_linked":
            await _check_run(call, "edit", fields["run_id"], started)
            for model_id in fields["model_ids"]:
                await call.require_model("read", model_id)
        elif name == "logged_model":
            await _check_model(call, fields)
        else:
            raise ApiError("PERMISSION_DENIED", f"{principal.name} may not append {name} events.")
    if owner is not None:
        for identity in sorted(created):
            await owner(principal.name, identity)


async def check_path(backend: Backend, principal: Principal, needed: Permission, path: str) -> None:
    """Whether `principal` may do `needed` with the path (clean) below the artifact root.

    Raises:
        ApiError: 403, they may not; 404, it belongs to no run that there is.
    """
    if principal.restricted:
        await Call(_NO_ENDPOINT, backend, _NO_REQUEST, principal, None).require_path(needed, path)


async def _check_run(call: Call, needed: Permission, run_id: str, started: Mapping[str, str]) -> None:
    if run_id in started:
        return  # in an experiment that was checked
    await call.require_run(needed, run_id)


async def _check_start(call: Call, fields: Mapping[str, Any], created: set[str]) -> None:
    experiment, run_id = fields["experiment_id"], fields["run_id"]
    if experiment not in created:
        call.require("edit", experiment)
    try:
        known = (await call.backend.run(run_id)).experiment_id
    except ApiError as exc:
        if exc.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = experiment
    if known != experiment:
        raise ApiError("PERMISSION_DENIED", f"Run {run_id} belongs to another experiment.")
    uri = fields["artifact_uri"]
    usual = f"{experiment}/{run_id}/artifacts"
    if uri and call.backend.artifacts.stored(uri) != usual and _below_root(call.backend, uri):
        raise ApiError("PERMISSION_DENIED", f"The artifacts of run {run_id} may not lie in this folder.")


async def _check_model(call: Call, fields: Mapping[str, Any]) -> None:
    experiment, model_id = fields["experiment_id"], fields["model_id"]
    rows = await call.backend.read(model_rows, call.backend.reading, call.backend.artifacts, [model_id])
    if not rows and not experiment:
        raise missing_resource(f"Logged model with ID '{model_id}' not found.")
    needed: Permission = "manage" if fields.get("lifecycle_stage") else "edit"
    for row in rows:
        call.require(needed, row.experiment_id)
    if experiment:
        call.require("edit", experiment)
        uri = fields["artifact_uri"]
        usual = f"{experiment}/models/{model_id}/artifacts"
        if uri and call.backend.artifacts.stored(uri) != usual and _below_root(call.backend, uri):
            raise ApiError("PERMISSION_DENIED", f"The artifacts of model {model_id} may not lie in this folder.")


def _below_root(backend: Backend, uri: str) -> bool:
    """Whether an address in an event lies below the artifact root: relative ones do."""
    if "://" not in uri and not uri.startswith("/"):
        return True
    try:
        return backend.artifacts.path_of(uri) is not None
    except ApiError:
        return True


async def _experiment_known(backend: Backend, identity: str) -> bool:
    try:
        await backend.experiment(identity, fresh=True)
    except ApiError as exc:
        if exc.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


async def _nothing(backend: Backend, request: Request) -> Response:
    raise NotImplementedError


_NO_ENDPOINT: Final = Endpoint("POST", EVENTS_PATH, _nothing, absolute=True)
_NO_REQUEST: Final = Request({"type": "http", "method": "POST", "headers": []})
