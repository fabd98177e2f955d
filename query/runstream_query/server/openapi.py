"""Adds the MLflow-compatible operations to the OpenAPI description, from their request models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from runstream_query.api.routing import Endpoint
from runstream_query.api.wire import Message


def _schema(model: type[Message]) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=False, ref_template="#/components/schemas/{model}")
    schema["required"] = list(model.required)
    return schema


def _operation(endpoint: Endpoint, path: str, components: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.path,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method} {path}"),
        "tags": ["mlflow"],
        "responses": {
            "200": {"description": "Done", "content": {"application/json": {}}},
            "4XX": {"description": "error_code and message say what does not fit"},
        },
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"\{(\w+)(?::path)?\}", path)
        ],
    }
    if endpoint.request is None:
        return operation
    schema = _schema(endpoint.request)
    components.update(schema.pop("$defs", {}))
    if endpoint.method == "GET":
        operation["parameters"] += [
            {"name": name, "in": "query", "required": name in endpoint.request.required, "schema": shape}
            for name, shape in schema["properties"].items()
        ]
    else:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def describe(app: FastAPI, endpoints: Sequence[Endpoint]) -> None:
    """Make `app.openapi()` list `endpoints` too, each once, under its first path."""
    own = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = own()
            components = found.setdefault("components", {}).setdefault("schemas", {})
            for endpoint in endpoints:
                path = next(iter(endpoint.paths()))
                item = found["paths"].setdefault(re.sub(r":path\}", "}", path), {})
                item[endpoint.method.lower()] = _operation(endpoint, path, components)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
