"""Adds to the OpenAPI description what FastAPI cannot see: the MLflow operations, SQL, log-in, and the error body."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

from fastapi import FastAPI

from runstream_query.api.errors import ErrorCode
from runstream_query.api.routing import Endpoint
from runstream_query.api.wire import Message

_ERROR: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_BYTES: Final = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_TEXT: Final = {"text/plain": {"schema": {"type": "string"}}}
_PAGE: Final = {"text/html": {"schema": {"type": "string"}}}
_RETRY: Final = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}, "required": False}}
_REFUSED: Final = {"description": "error_code and message say what does not fit", "content": _ERROR, "headers": _RETRY}
_BUSY: Final = {"description": "Not now: Retry-After says when", "content": _ERROR, "headers": _RETRY}
_ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error_code", "message"],
    "properties": {
        "error_code": {"type": "string", "enum": list(get_args(ErrorCode))},
        "message": {"type": "string"},
    },
}

_QUERIES: Final[Mapping[tuple[str, str], Sequence[str]]] = {
    ("GET", "/get-artifact"): ("run_id", "path"),
    ("POST", "/mlflow/upload-artifact"): ("run_uuid", "path"),
    ("GET", "/mlflow/logged-models/{model_id}/artifacts/files"): ("artifact_file_path",),
}
"""Query parameters, all required, of operations without a message."""
_UPLOADS: Final = frozenset({("PUT", "/mlflow-artifacts/artifacts/{path:path}"), ("POST", "/mlflow/upload-artifact")})
_DOWNLOADS: Final = frozenset(
    {
        ("GET", "/mlflow-artifacts/artifacts/{path:path}"),
        ("GET", "/get-artifact"),
        ("GET", "/mlflow/logged-models/{model_id}/artifacts/files"),
    }
)


def _schema(model: type[Message]) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=False, ref_template="#/components/schemas/{model}")
    schema["required"] = list(model.required)
    return schema


def _parameter(name: str, place: str, *, required: bool, schema: Any = None) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": schema or {"type": "string"}}


def _operation(endpoint: Endpoint, path: str, components: dict[str, Any]) -> dict[str, Any]:
    key = endpoint.method, endpoint.path
    operation: dict[str, Any] = {
        "summary": endpoint.path,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method} {path}"),
        "tags": ["mlflow"],
        "responses": {
            "200": {
                "description": "Done",
                "content": {"*/*": {}} if key in _DOWNLOADS else {"application/json": {}},
            },
        },
        "parameters": [_parameter(name, "path", required=True) for name in re.findall(r"\{(\w+)(?::path)?\}", path)]
        + [_parameter(name, "query", required=True) for name in _QUERIES.get(key, ())],
    }
    if key in _UPLOADS:
        operation["requestBody"] = {"required": False, "content": _BYTES}
    if endpoint.request is None:
        return operation
    schema = _schema(endpoint.request)
    components.update(schema.pop("$defs", {}))
    if endpoint.method == "GET":
        operation["parameters"] += [
            _parameter(name, "query", required=name in endpoint.request.required, schema=shape)
            for name, shape in schema["properties"].items()
        ]
    else:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _text(summary: str, tag: str, content: Any, **others: Any) -> dict[str, Any]:
    return {
        "summary": summary,
        "tags": [tag],
        "responses": {"200": {"description": "Done", "content": content}},
        **others,
    }


def _beside() -> dict[str, dict[str, Any]]:
    """SQL over HTTP and the log-in pages."""
    form = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in ("form", "name", "password", "next")},
    }
    body = {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": form}}}
    query = _parameter("query", "query", required=False)
    any_format: dict[str, Any] = {"*/*": {}}
    found = {
        "/": {
            "get": _text("A SELECT in `query`, as ClickHouse takes it", "sql", any_format, parameters=[query]),
            "post": _text(
                "A SELECT in the body",
                "sql",
                any_format,
                parameters=[query],
                requestBody={"required": False, "content": _TEXT},
            ),
        },
        "/ping": {"get": _text("Ok.", "sql", _TEXT)},
        "/replicas_status": {"get": _text("Whether the store is well", "sql", any_format)},
        "/login": {
            "get": _text("The log-in form", "login", _PAGE, parameters=[_parameter("next", "query", required=False)]),
            "post": _text("Begin a session", "login", _PAGE, requestBody=body),
        },
        "/logout": {"post": _text("End the session", "login", _PAGE, requestBody=body)},
    }  # fmt: skip
    for path, item in found.items():
        for operation in item.values():
            answers = operation["responses"]
            if path.startswith("/log"):
                answers["303"] = {"description": "Go on there"}
            # SQL's errors are ClickHouse's text, the forms' are pages; the gateway's are the error body.
            answers["4XX"] = {"description": "Refused", "content": {**_ERROR, **_TEXT, **_PAGE}}
            if path in ("/", "/replicas_status"):
                for status in ("500", "501", "503"):  # 500: a statement that the store could not finish
                    answers[status] = {"description": "The store's error", "content": {**_ERROR, **_TEXT, "*/*": {}}}
    return found


def describe(app: FastAPI, endpoints: Sequence[Endpoint]) -> None:
    """Make `app.openapi()` list `endpoints` too, each once, under its first path."""
    own = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = own()
            components = found.setdefault("components", {}).setdefault("schemas", {})
            components["Error"] = _ERROR_SCHEMA
            for endpoint in endpoints:
                path = next(iter(endpoint.paths()))
                item = found["paths"].setdefault(re.sub(r":path\}", "}", path), {})
                item[endpoint.method.lower()] = _operation(endpoint, path, components)
            found["paths"] |= _beside()
            for item in found["paths"].values():
                for operation in item.values():
                    operation["responses"].setdefault("4XX", _REFUSED)
                    for status in ("501", "503"):
                        operation["responses"].setdefault(status, _BUSY)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
