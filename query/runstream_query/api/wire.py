"""Protobuf JSON on the wire: requests become pydantic models as MLflow's server reads them, answers become JSON bytes.

What protobuf JSON takes and pydantic alone would not: snake_case and camelCase names (never both of one field), null
for an absent field, 64-bit integers as strings, NaN and infinities as the strings "NaN", "Infinity", "-Infinity";
GET requests carry the fields as query parameters, lists as repeated ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Final, TypeVar
from urllib.parse import parse_qsl

from pydantic import AliasChoices, AliasGenerator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, invalid

_DOCS: Final = " See the API docs for more information about request parameters."
_INT64: Final = 1 << 63
MAX_JSON_CONTAINERS: Final = 100_000
MAX_JSON_VALUES: Final = 1_000_000
"""Of one request's body, counted without regard to strings: far beyond what any operation takes."""
_EXPONENT = re.compile(r"[+-]?\d+(\.\d+)?[eE][+-]?\d{1,2}\Z")


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(word.capitalize() for word in tail)


def _choices(name: str) -> AliasChoices:
    return AliasChoices(name, _camel(name))


def _integer(value: Any) -> Any:
    """Protobuf takes no booleans for numbers (pydantic would), but whole numbers such as "1e+05", as R writes them."""
    if value is True or value is False:
        raise ValueError("a boolean is not a number")
    if isinstance(value, str) and _EXPONENT.match(value):
        number = float(value)
        return int(number) if number.is_integer() else value
    return value


def _number(value: Any) -> Any:
    if value is True or value is False:
        raise ValueError("a boolean is not a number")
    if isinstance(value, str) and value != value.strip():
        raise ValueError("not a number")
    return value


Int64 = Annotated[int, BeforeValidator(_integer), Field(ge=-_INT64, lt=_INT64)]
Int32 = Annotated[int, BeforeValidator(_integer), Field(ge=-(1 << 31), lt=1 << 31)]
Double = Annotated[float, BeforeValidator(_number)]


class Message(BaseModel):
    """A request or a part of one. Every field is optional, as in proto2; `required` names those a request must have."""

    model_config = ConfigDict(
        extra="ignore", alias_generator=AliasGenerator(validation_alias=_choices), protected_namespaces=()
    )

    required: ClassVar[tuple[str, ...]] = ()


M = TypeVar("M", bound=Message)


def invalid_value(path: str, value: object, hint: str = "") -> str:
    """MLflow's sentence about a value that will not do."""
    shown = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return f"Invalid value {shown} for parameter '{path}' supplied" + (f": {hint}" if hint else ".")


def missing_value(path: str) -> ApiError:
    """MLflow's error about a required parameter that is absent."""
    return invalid(f"Missing value for required parameter '{path}'.{_DOCS}")


@cache
def _aliases(model: type[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _camel(name)) for name in model.model_fields)


def _raw(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    return fields.get(_camel(name)) if value is None else value


def _refuse(model: type[Message], fields: Mapping[str, Any], problem: ValidationError) -> ApiError:
    """The first thing wrong, in the order of the model's fields: something missing, or a value of a wrong type."""
    first: dict[str, tuple[str, Any]] = {}
    for error in problem.errors(include_url=False, include_context=False):
        names = [str(part) for part in error["loc"]]
        if not names:
            continue
        path = names[0]
        for part in names[1:]:
            path += f"[{part}]" if part.isdigit() else f".{part}"
        snake = next((name for name, camel in _aliases(model) if names[0] in (name, camel)), names[0])
        if len(names) == 2 and names[1].isdigit() and error["type"] == "string_type":
            first.setdefault(snake, (names[0], fields[names[0]]))  # MLflow shows a list of texts as a whole
        first.setdefault(snake, (path, error.get("input")))
    for name in [*model.model_fields, *first]:
        if name in model.required and _raw(fields, name) in (None, ""):
            return missing_value(name)
        if name in first:
            path, value = first[name]
            return invalid(invalid_value(path, value, f" Hint: Value was of type '{type(value).__name__}'.{_DOCS}"))
    return invalid(f"The request does not fit its schema: {problem}")


def parse(model: type[M], fields: Mapping[str, Any]) -> M:
    """The message in `fields` (already decoded JSON or query parameters).

    Raises:
        ApiError: INVALID_PARAMETER_VALUE with MLflow's wording: a required field is missing or empty, a value has the
            wrong type, or a field is given under both of its names.
    """
    for name, camel in _aliases(model):
        if name != camel and name in fields and camel in fields:
            raise invalid(f"Request specifies both '{name}' and '{camel}'; provide only one of them.")
    if "run_id" in model.required and _raw(fields, "run_id") in (None, ""):
        former = _raw(fields, "run_uuid")
        if former is not None:
            fields = {**fields, "run_id": former}
    try:
        message = model.model_validate(fields)
    except ValidationError as exc:
        raise _refuse(model, fields, exc) from None
    for name in model.required:
        if _raw(fields, name) in (None, ""):
            raise missing_value(name)
    return message


def _check_parts(body: bytes) -> None:
    """Refuse a body of very many small parts: as Python objects they take up to a hundred times its size."""
    if body.count(b"{") + body.count(b"[") > MAX_JSON_CONTAINERS or body.count(b",") > MAX_JSON_VALUES:
        raise invalid(
            f"The request body may have at most {MAX_JSON_CONTAINERS} objects and lists and {MAX_JSON_VALUES} values."
        )


def json_fields(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; an empty body is an empty object, and a doubly encoded one (old clients) is unwrapped.

    Raises:
        ApiError: the body is not JSON, not an object, or has too many parts.
    """
    if not body:
        return {}
    if len(body) > MAX_JSON_CONTAINERS:  # a smaller one cannot have so many
        _check_parts(body)
    try:
        value = from_json(body)
        if isinstance(value, str):
            value = from_json(value)
    except ValueError as exc:
        raise invalid(f"The request body is not valid JSON: {exc}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"The request body must be a JSON object, not {type(value).__name__}.")
    return value


def query_fields(model: type[Message], query: bytes) -> dict[str, Any]:
    """Query parameters as fields of `model`: repeated for its lists, the first one otherwise."""
    found: dict[str, list[str]] = {}
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="strict")
    except ValueError as exc:
        raise invalid(f"The query string is not valid UTF-8: {exc}") from None
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    repeated = _repeated(model)
    return {key: values if key in repeated else values[0] for key, values in found.items()}


@cache
def _repeated(model: type[Message]) -> frozenset[str]:
    names = {name for name, field in model.model_fields.items() if "list[" in str(field.annotation)}
    return frozenset(names | {_camel(name) for name in names})


def check_content_type(request: Request) -> None:
    """Refuse POST and PUT bodies that do not say they are JSON: browsers may send others across origins."""
    if request.method not in ("POST", "PUT"):
        return
    declared = request.headers.get("content-type")
    if declared is None:
        raise invalid("Bad Request. Content-Type header is missing.")
    if declared.partition(";")[0].strip().lower() != "application/json":
        raise invalid("Bad Request. Content-Type must be one of ['application/json'].")


async def read(model: type[M], request: Request, **path_fields: str) -> M:
    """The message of `request`: query parameters of a GET, the JSON body otherwise; path parameters win over both."""
    if request.method in ("GET", "HEAD") and request.scope["query_string"]:
        fields = query_fields(model, request.scope["query_string"])
    else:
        check_content_type(request)
        fields = json_fields(await request.body())
    fields.update(path_fields)
    return parse(model, fields)


class JsonResponse(Response):
    """An answer in protobuf JSON: dicts, lists and scalars; the caller leaves absent fields out."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="strings")


class Empty(Response):
    """`{}`: what a write answers."""

    media_type = "application/json"

    def __init__(self) -> None:
        super().__init__(b"{}")


def error_response(error: ApiError) -> Response:
    """The error body, with Retry-After where waiting helps."""
    headers = {} if error.retry_after_seconds is None else {"Retry-After": str(error.retry_after_seconds)}
    body = {"error_code": error.code, "message": error.message}
    return JsonResponse(body, status_code=error.status, headers=headers)


def key_values(pairs: Mapping[str, str]) -> list[dict[str, str]]:
    """A map as MLflow's list of `{"key", "value"}`."""
    return [{"key": key, "value": value} for key, value in pairs.items()]


class KeyValue(Message):
    """One tag or param."""

    key: str | None = None
    value: str | None = None


def pairs_of(items: Sequence[KeyValue] | None, path: str) -> list[tuple[str, str]]:
    """`items` as pairs; a missing value is the empty string, a missing key an error that names its place."""
    found = []
    for index, item in enumerate(items or ()):
        if not item.key:
            raise missing_value(f"{path}[{index}].key")
        found.append((item.key, item.value or ""))
    return found
